"""Variants scored on patients that nobody trained on: who is left out, who is scored, how gains are paired."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from icmoe.data.sources import read_sites
from icmoe.errors import IcmoeError
from icmoe.study import Study
from simulations.hospitals import Hospitals
from simulations.phantoms import PhantomSite, write_phantoms
from simulations.trials import Trial, compared, left_out, views_of
from simulations.virtual_sites import repeat_sites


@pytest.fixture
def hospitals(tmp_path: Path, make_study) -> Hospitals:
    shapes = {"Elm": (2, 1), "Fir": (1, 1), "Oak": (1, 0), "Yew": (0, 0)}
    sites = [PhantomSite(name=name, train_patients=a, val_patients=b, test_patients=1) for name, (a, b) in shapes.items()]
    write_phantoms(tmp_path, seed=1, sites=sites, size_px=32)
    found = read_sites(tmp_path, make_study().labels)
    return Hospitals(root=tmp_path, phantoms=True, sites=found, sources=found)


def only(hospitals: Hospitals, *names: str) -> Hospitals:
    kept = {name: hospitals.sites[name] for name in names}
    return Hospitals(root=hospitals.root, phantoms=True, sites=kept, sources=kept)


def test_each_site_with_two_patients_outside_its_test_is_left_out_once(hospitals: Hospitals) -> None:
    assert left_out(hospitals) == ("Elm", "Fir")  # Oak has one patient, Yew none that it could train with


def test_a_site_alone_cannot_be_left_out_nor_one_whose_patients_another_has(hospitals: Hospitals) -> None:
    with pytest.raises(IcmoeError, match=r"210.*Elm: 3"):
        left_out(only(hospitals, "Elm", "Yew"))
    repeated = repeat_sites(only(hospitals, "Elm", "Fir").sites, 4)
    with pytest.raises(IcmoeError, match="210"):
        left_out(Hospitals(root=hospitals.root, phantoms=True, sites=repeated, sources=repeated))


def test_who_is_left_out_does_not_train_and_is_scored_but_for_its_test(hospitals: Hospitals, make_study) -> None:
    study: Study = make_study()
    trial = Trial(name="full", study=study, left="Elm")
    rows = trial.patients(hospitals)
    assert {(item.site, item.split) for item in rows} == {("Elm", "train"), ("Elm", "val")}
    assert len({item.patient for item in rows}) == 3
    job = trial.job(hospitals, Path("work"))
    assert job.names == ("Fir", "Oak")
    whole = Trial(name="full", study=study)
    assert {(item.site, item.split) for item in whole.patients(hospitals)} == {("Elm", "val"), ("Fir", "val")}
    other = whole.job(hospitals, Path("work"))
    assert (other.names, other.method != job.method, other.state_path != job.state_path) == (("Elm", "Fir", "Oak"), True, True)


def table(dice: dict[str, list[float]]) -> dict[tuple[str, str], float]:
    return {(site, str(number)): value for site, values in dice.items() for number, value in enumerate(values)}


def test_gains_are_paired_by_patient_and_averaged_over_seeds_first(make_study) -> None:
    """Patients differ by 0.6 among themselves and gain 0.1 each: a paired interval is narrow, an unpaired one is not."""
    base = [table({"Elm": [0.2, 0.8], "Fir": [0.4, 0.6]}), table({"Elm": [0.3, 0.9], "Fir": [0.4, 0.6]})]
    more = [table({"Elm": [0.3, 0.9], "Fir": [0.5, 0.7]}), table({"Elm": [0.4, 1.0], "Fir": [0.5, 0.7]})]
    study = make_study()
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(compared({"full": base, "more": more}, {"full": study, "more": study}, "title"))
    row = next(line for line in console.export_text().splitlines() if "more" in line)
    assert "+0.100 [+0.100, +0.100]" in row
    assert "0.625" in row  # (0.6 + 0.6 + 0.7 + 0.6) / 4


def test_the_interval_is_that_over_patients_also_with_one_seed(make_study) -> None:
    base, more = [table({"Elm": [0.2, 0.8], "Fir": [0.4, 0.6]})], [table({"Elm": [0.3, 0.9], "Fir": [0.5, 0.8]})]
    study = make_study()
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(compared({"full": base, "more": more}, {"full": study, "more": study}, "title"))
    row = next(line for line in console.export_text().splitlines() if "more" in line)
    # gains 0.1, 0.1 and 0.1, 0.2: the mean of sites has variance 0.005 / 2 / 4, and t(0.975) of one degree is 12.706
    assert "+0.125 [-0.193, +0.443]" in row


def test_images_are_encoded_as_they_are_trained_on_and_as_they_are_scored(make_study) -> None:
    flipped = make_study(training={"views": ["flip"]})
    dark = make_study(training={"views": ["flip", "dark"]})
    assert views_of([Trial(name="a", study=flipped), Trial(name="b", study=dark)]) == ("flip", "dark")
    assert views_of([Trial(name="a", study=flipped, left="Elm")]) == ("identity", "flip")
