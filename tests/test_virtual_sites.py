"""Virtual hospitals keep every patient whole, in its split, and exactly once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icmoe.data.slices import SiteData, Slice
from icmoe.errors import Fault, IcmoeError
from icmoe.window import Window
from simulations.results import site_record
from simulations.virtual_sites import choose_sites, dirichlet_sites, repeat_sites


def _site(name: str, train: int, test: int = 1, slices: int = 2) -> SiteData:
    items = [
        Slice(
            site=name,
            patient=f"p{number:03d}",
            index=index,
            split="train" if number < train else "test",
            image=Path(f"{name}/images/{number}_{index}.png"),
            mask=Path(f"{name}/masks/{number}_{index}.png"),
            image_digest=f"{name}{number}{index}",
            shape=(8, 8),
            window=Window(0.0, 1.0),
            spacing_mm=None,
        )
        for number in range(train + test)
        for index in range(slices)
    ]
    return SiteData(name=name, slices=tuple(items), images_found=len(items) + 1, exclusions=(Fault(number=101, where=name),))


SITES = {name: _site(name, train) for name, train in (("A", 6), ("B", 3), ("C", 1))}


def test_patients_of_several_hospitals_are_counted_each_though_their_pseudonyms_are_alike():
    everybody = SiteData(
        name="virtual-001",
        slices=tuple(item for site in SITES.values() for item in site.slices),
        images_found=0,
        exclusions=(),
    )
    assert site_record(everybody)["patients"] == {"train": 10, "val": 0, "test": 3}


def test_repetition_names_in_turns_and_shares_the_slices():
    virtual = repeat_sites(SITES, 7)
    assert list(virtual) == ["A", "B", "C", "A-2", "B-2", "C-2", "A-3"]
    assert all(name == site.name for name, site in virtual.items())
    assert virtual["A-3"].slices is SITES["A"].slices
    assert virtual["A-2"].exclusions == SITES["A"].exclusions


def test_repetition_below_the_number_of_sites_takes_the_first():
    assert list(repeat_sites(SITES, 2)) == ["A", "B"]
    assert repeat_sites(SITES, 3) == SITES


def test_repetition_never_takes_the_name_of_a_hospital():
    assert list(repeat_sites({"A": SITES["A"], "A-2": _site("A-2", 1)}, 4)) == ["A", "A-2", "A-2-2", "A-3"]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10), st.floats(0.001, 1000.0), st.integers(0, 2**40))
def test_dealing_keeps_patients_whole_and_once(n: int, alpha: float, seed: int):
    virtual = dirichlet_sites(SITES, n, alpha, seed)
    assert len(virtual) == n
    before = Counter(item for site in SITES.values() for item in site.slices)
    assert Counter(item for site in virtual.values() for item in site.slices) == before
    homes: dict[tuple[str, str], set[str]] = {}
    for name, site in virtual.items():
        assert site.of("train")
        assert site.images_found == site.images_used
        for item in site.slices:
            homes.setdefault((item.site, item.patient), set()).add(name)
    assert all(len(names) == 1 for names in homes.values())


def test_dealing_depends_on_the_seed_alone():
    backwards = dict(reversed(SITES.items()))
    assert dirichlet_sites(SITES, 4, 0.5, 3) == dirichlet_sites(backwards, 4, 0.5, 3)
    assert dirichlet_sites(SITES, 4, 0.5, 3) != dirichlet_sites(SITES, 4, 0.5, 4)


def test_alpha_sets_how_unequal_the_sites_are():
    sites = {"A": _site("A", 200, slices=1)}
    spread = {
        alpha: np.std([site.images_used for site in dirichlet_sites(sites, 8, alpha, 0).values()]) for alpha in (0.1, 100.0)
    }
    assert spread[0.1] > 4 * spread[100.0]


@pytest.mark.parametrize(
    ("n", "alpha", "seed", "limit"),
    [
        (0, 1.0, 0, "1 to 10000"),
        (11, 1.0, 0, "1 to 10"),
        (2, 0.0, 0, "0.001"),
        (2, float("nan"), 0, "0.001"),
        (2, 1.0, -1, "0 or more"),
    ],
)
def test_dealing_names_its_limits(n: int, alpha: float, seed: int, limit: str):
    with pytest.raises(IcmoeError, match="ICM210") as caught:
        dirichlet_sites(SITES, n, alpha, seed)
    assert limit in str(caught.value)


def test_choice_is_sorted_and_counts_a_name_once():
    assert list(choose_sites(SITES, ["C", "A", "C"])) == ["A", "C"]


def test_unknown_names_are_all_reported_with_their_nearest():
    with pytest.raises(IcmoeError) as caught:
        choose_sites({"Alder": SITES["A"], "Birch": SITES["B"]}, ["alder", "Brich", "Birch", "xyz"])
    sentences = [str(fault) for fault in caught.value.faults]
    assert len(sentences) == 3
    assert 'Did you mean "Alder"?' in sentences[0]
    assert 'Did you mean "Birch"?' in sentences[1]
    assert "Did you mean" not in sentences[2]
    assert "Alder, Birch" in sentences[2]


@pytest.mark.parametrize("make", [lambda: choose_sites(SITES, []), lambda: repeat_sites({}, 1), lambda: repeat_sites(SITES, 0)])
def test_nothing_to_choose_from_is_refused(make):
    with pytest.raises(IcmoeError, match="ICM210"):
        make()
