"""What `fl_client personalise` does: the site's own model from the federation's final one. Nothing of it leaves the site."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch

from fl_client.approval import named
from fl_client.participant import Participant, read_site
from fl_client.preparing import Progress
from fl_client.site import read_named
from icmoe.errors import Fault, IcmoeError
from icmoe.exchange import State, global_state
from icmoe.mixture import joined
from icmoe.model import ICMoE
from icmoe.modelfile import ModelHeader, read_model, write_model
from icmoe.personalise import GLOBAL, OWN, TUNED, OwnData, Personal, personalise, train_alone, tune
from icmoe.study import Study

METHOD, ALONE = "personalised", "alone"


def personalise_study(path: Path, name: str, which: str, model_path: Path, *, on_progress: Progress) -> tuple[Path, Personal]:
    """Make the site's own model and return where it is and how it was chosen.

    A site that was stopped while it trained its model alone goes on after its last finished round, unless its training
    images changed meanwhile: then what was trained on the former ones is removed.

    Parameters
    ----------
    path, name
        The site file, and the site that the command names.
    which
        Name or digest of an approved study.
    model_path
        The study's final model.
    on_progress
        Told of the rounds.

    Raises
    ------
    IcmoeError
        2xx for the site file, 215 where the model is not the study's, 316 where the study is not approved, else as
        `read_site` and `read_model`.
    """
    study = named(path.parent / read_named(path, name).state, which)[-1].study
    state, header = _final_model(model_path, study)
    site = read_site(path, study.digest)
    torch.set_num_threads(site.threads)
    data = OwnData(site=site.name, train=site.train, val=site.val, cache=site.cache(study), device=site.torch_device())
    own = _own(site, data, header, on_progress)
    tuned = tune(state, study, data)
    found = personalise(study, {GLOBAL: state, TUNED: tuned, OWN: own}, data)
    target = site.state_folder / study.digest[:16] / site.name / "personalised.safetensors"
    about = header.model_copy(update={"method": METHOD, "weights": found.weights})
    write_model(target, joined(found.states), about, private=True)
    return target, found


def _final_model(path: Path, study: Study) -> tuple[State, ModelHeader]:
    model, header = read_model(path)
    final = header.method != ALONE and header.round == study.rounds
    if header.study.digest != study.digest or not isinstance(model, ICMoE) or not final:
        value = f"{header.method} of study {header.study.digest[:12]} after round {header.round}"
        limit = f"{study.digest[:12]} after round {study.rounds}"
        raise IcmoeError(Fault(number=215, where=str(path), value=value, limit=limit, did="Nothing was trained."))
    return global_state(model), header


def _data_digest(data: OwnData) -> str:
    """Return the digest of what is trained on: patients, pictures and what is marked on them."""
    rows = [f"{item.patient}/{item.index} {item.image_digest} {item.shape} {item.marks}" for item in data.train]
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _own(site: Participant, data: OwnData, header: ModelHeader, on_progress: Progress) -> State:
    """Return the model that the site trains alone, kept after each round."""
    study = header.study
    folder = site.state_folder / study.digest[:16] / site.name
    kept = folder / f"alone-{_data_digest(data)[:16]}.safetensors"
    for other in {*folder.glob("alone*.safetensors")} - {kept}:  # a patient may have been forgotten since
        other.unlink()
    state, done = _former(kept)

    def keep(now: State, number: int) -> None:
        write_model(kept, now, header.model_copy(update={"method": ALONE, "round": number}), private=True)
        on_progress("train", number, study.rounds)

    return train_alone(study, data, state=state, done=done, on_round=keep)


def _former(kept: Path) -> tuple[State | None, int]:
    """Return what was kept and after which round; what a full disk or a crash cut off is trained again."""
    if not kept.exists():
        return None, 0
    try:
        model, header = read_model(kept)
    except IcmoeError:
        return None, 0
    return global_state(model), header.round
