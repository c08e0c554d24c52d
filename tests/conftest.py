"""What many tests share: one thread, a tiny study, features without any image."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

# Before PyTorch is imported, and for every process that a test starts: where more threads than processors are at work, those that
# wait for their like in a loop, as is usual, take twenty times the seconds of the work itself. What is computed is the same.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import HealthCheck, settings

from icmoe.backbone import backbone_digest, grid_of, widths
from icmoe.config import parse
from icmoe.features import Features
from icmoe.profiles import merged
from icmoe.rest import drawn_rest
from icmoe.study import Study

# How long an example takes says how busy the machine is, nothing about the code.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


LONG = ("run_sim", "poisoned_training", "pin", "privacy_attacks", "ingest_real", "benchmarks", "memory", "docs", "privacy_checks")
"""Files whose tests take minutes: they begin first, so that no processor waits for the last of them at the end."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files; the rest keeps its order. The Makefile finds files with network tests by the mark's name."""
    for path in {item.path for item in items if item.get_closest_marker("network")}:
        if "pytest.mark.network" not in path.read_text(encoding="utf-8"):
            raise pytest.UsageError(f"{path.name}: write pytest.mark.network in this file; the Makefile looks for it")
    order = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish() -> None:
    """Leave what is imported by now to itself: Flower's robust rules collect garbage after each update, all of it each time."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread_again() -> Iterator[None]:
    """A test may have called what takes all processors."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _flower_task() -> None:
    """Messages can only be made inside a task of a run; Flower sets this in the processes that it starts."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


@pytest.fixture(scope="session")
def make_study() -> Callable[..., Study]:
    """A study over the seeded test backbone; changes are nested like the TOML file."""

    def make(**changes: Any) -> Study:
        base = {
            "name": "tiny",
            "seed": 3,
            "rounds": 2,
            "test_only": True,
            "labels": [{"name": "background", "values": [0]}, {"name": "lesion", "values": [1, 255]}],
            "backbone": {"name": "sam-vit-test", "digest": backbone_digest("sam-vit-test", None), "image_size": 32},
            "model": {"basic_experts": 1, "semantic_experts": 1, "adaptive_experts": 1, "bottleneck": 8},
        }
        return parse(Study, merged(base, changes), where="test")

    return make


@pytest.fixture(scope="session")
def make_features() -> Callable[..., tuple[Features, torch.Tensor]]:
    """Random features and soft targets that depend on the first channel, so that there is something to learn."""

    def make(study: Study, batch: int = 2, seed: int = 0) -> tuple[Features, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        channels, blocks, behind = widths(study.backbone)
        grid, last = grid_of(study.backbone), None if behind is None else drawn_rest(study.backbone, seed=1)
        embedding = torch.randn(batch, channels, grid, grid, generator=generator)
        drawn = tuple(torch.randn(batch, width, grid, grid, generator=generator) for width in blocks)
        features = Features(embedding, drawn, last)
        lesion = (embedding[:, :1] > 0.3).float().repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        rest = (1 - lesion) / (study.classes - 1)
        return features, torch.cat([rest, lesion, *[rest] * (study.classes - 2)], dim=1)

    return make


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ingest read and decode here, which is far quicker for a handful of files; test_ingest.py has the processes."""
    from icmoe.data.ingest import work

    monkeypatch.setattr(work, "in_processes", lambda function, items, *_, **__: ((one, function(one)) for one in items))
