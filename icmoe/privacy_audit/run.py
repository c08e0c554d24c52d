"""The machinery behind `icmoe audit-privacy`: what a study claims, and what attacks make of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from icmoe.accounting import Spending, epsilon, training_spending
from icmoe.errors import Fault, IcmoeError
from icmoe.memory import free_bytes
from icmoe.mixture import Mixture
from icmoe.model import ICMoE
from icmoe.modelfile import read_model
from icmoe.privacy_audit.canaries import CanaryAudit, audit_canaries
from icmoe.privacy_audit.checks import CHECKS, Finding
from icmoe.privacy_audit.inversion import invert_gradient
from icmoe.privacy_audit.membership import membership_attack
from icmoe.privacy_audit.seeded import seeded_bytes, seeded_rows
from icmoe.study import Study
from icmoe.study_privacy import SitePrivacy

_PATIENTS = 60
_MODELS = 8
_ITERATIONS = 300
_STARTS = 6

Say = Callable[[str], None]


def run_checks(say: Say) -> list[Finding]:
    """Return what the named checks say of the installed private step.

    Parameters
    ----------
    say
        Called with each check's name before it runs.
    """
    findings = []
    for name, check in CHECKS.items():
        say(name)
        findings.append(check())
    return findings


def check_faults(findings: list[Finding]) -> list[Fault]:
    """Return a fault 425 per check that found something."""
    return [
        Fault(number=425, where=one.name, what=one.what, value=f"{one.measured:.4g}", limit=f"at most {one.limit:g}")
        for one in findings
        if not one.passed
    ]


def audit_model(path: Path, *, canaries: int, seed: int, say: Say) -> dict[str, Any]:
    """Return the record that `icmoe audit-privacy --json` prints.

    Canaries go through the product's private step with the study's constants, over as many steps as the study has;
    membership and inversion attack one further round, or step, of training from this model on seeded patients. No
    hospital's data are read.

    Parameters
    ----------
    path
        Model file.
    canaries
        m, at least 2; none are sent where the study promises nothing.
    seed
        Of coins, patients and attacks.
    say
        Called with the name of each part before it begins.

    Raises
    ------
    IcmoeError
        205, 208, 209, 301 where the file cannot be read as a model, 426 for a mixture, 315 where the patients that its sample
        rate asks for do not fit into memory, 403 and 213 as in accounting.
    """
    model, header = read_model(path)
    if isinstance(model, Mixture):
        raise IcmoeError(Fault(number=426, where=str(path), value="a mixture of models", did="Nothing was audited."))
    study, privacy = header.study, header.study.privacy.site
    _require_room(study, _patients(study), path)
    record: dict[str, Any] = {"model": header.record(), "seed": seed, "claim": None, "canaries": None}
    sigma = 0.0
    if privacy is not None:
        spending = training_spending(privacy, rounds=study.rounds)
        sigma = spending.noise_multiplier
        say("canaries")
        audit = _canaries(privacy, sigma, privacy.steps * study.rounds, canaries, seed)
        record["claim"] = _claim(privacy, audit)
        record["canaries"] = {**asdict(audit), "kept": audit.kept, "steps": privacy.steps * study.rounds}
    record |= _attacks(model, study, sigma, seed, say)
    return {**record, "meaning": meaning(record)}


def audit_faults(record: dict[str, Any]) -> list[Fault]:
    """Return a fault 425 where the canaries refute the study's claim."""
    found = record["canaries"]
    if found is None or found["kept"]:
        return []
    what = f"lower bound on epsilon, confidence {found['confidence']:.0%}"
    limit = f"claimed epsilon {found['claimed_epsilon']:.3g}"
    return [Fault(number=425, where="canaries", what=what, value=f"{found['lower_bound']:.3g}", limit=limit)]


def meaning(record: dict[str, Any]) -> str:
    """Return in a sentence or two what the figures say, for readers who know no attack by name."""
    attack = record["membership"]
    told = f"one further round lets an attacker tell members from others with an AUC of {attack['auc']:.2f} (chance 0.5)"
    if record["claim"] is None:
        return f"The study promises a patient nothing at the site; {told}."
    found = record["canaries"]
    verdict = "is consistent with" if found["kept"] else "refutes"
    sure = f"with {found['confidence']:.0%} confidence"
    return (
        f"The attack on canaries {verdict} the claim: {sure} the training's epsilon is at least "
        f"{found['lower_bound']:.2f}, and {found['claimed_epsilon']:.2f} is claimed; {told}. "
        "A low bound proves nothing; only a bound above the claim proves a fault."
    )


def _claim(privacy: SitePrivacy, audit: CanaryAudit) -> dict[str, Any]:
    return {
        "epsilon": audit.claimed_epsilon,
        "delta": privacy.delta,
        "unit": privacy.unit,
        "adjacency": "add or remove one patient",
        "accountant": privacy.accountant,
        "of": "all training steps of the study",
    }


def _canaries(privacy: SitePrivacy, sigma: float, steps: int, canaries: int, seed: int) -> CanaryAudit:
    history = [Spending(sigma, privacy.sample_rate, steps)]
    claimed = epsilon(history, delta=privacy.delta, accountant=privacy.accountant)
    return audit_canaries(privacy, sigma=sigma, steps=steps, claimed_epsilon=claimed, canaries=canaries, seed=seed)


def _attacks(model: ICMoE, study: Study, sigma: float, seed: int, say: Say) -> dict[str, Any]:
    patients = _patients(study)
    if (privacy := study.privacy.site) is not None:
        study = _with_patients(study, privacy, sigma, patients // 2)
    data = seeded_rows(study, [1] * patients, seed=seed)
    say("membership")
    membership = membership_attack(model, study, data, models=_MODELS, rounds=1, seed=seed)
    inversion = invert_gradient(
        model,
        study,
        data,
        sigma=sigma,
        iterations=_ITERATIONS,
        seed=seed,
        starts=_STARTS,
        on_start=lambda number: say(f"inversion, guess {number} of {_STARTS}"),
    )
    return {"membership": asdict(membership), "inversion": asdict(inversion)}


def _patients(study: Study) -> int:
    """Return how many patients the attacks draw: at a small rate most steps of fewer would be empty."""
    privacy = study.privacy.site
    return _PATIENTS if privacy is None else max(_PATIENTS, 4 * math.ceil(1.0 / privacy.sample_rate))


def _require_room(study: Study, patients: int, path: Path) -> None:
    needed, free = seeded_bytes(study, patients), free_bytes()
    if free is None or needed <= free:
        return
    what, value = "made-up patients do not fit into memory", f"{needed / 1e9:.1f} GB for {patients}"
    todo = "Close other programs, or audit it where there is more memory: a sample rate of q asks for 4 / q patients."
    limit, did = f"{free / 1e9:.1f} GB, which are free", "Nothing was audited."
    raise IcmoeError(Fault(number=315, where=str(path), what=what, value=value, limit=limit, did=did, todo=todo))


def _with_patients(study: Study, privacy: SitePrivacy, sigma: float, patients: int) -> Study:
    """Return the study for about so many patients a training: rate, norms and noise stay, divisor and delta follow."""
    fewest = max(1, round(0.7 * patients))  # halves differ in size, and a site below the batch is refused
    change = {"patients": fewest, "delta": min(privacy.delta, 0.5 / patients), "epsilon": None, "noise_multiplier": sigma}
    site = privacy.model_copy(update=change)
    return study.model_copy(update={"privacy": study.privacy.model_copy(update={"site": site})})
