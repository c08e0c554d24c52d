"""What the rounds so far spent of the study's privacy, as far as the coordinator can know."""

from __future__ import annotations

from fl_server.dashboard.aside import Aside
from fl_server.dashboard.snapshot import Spent
from fl_server.run_state import RunState
from icmoe.accounting import Spending, epsilon, score_spending, training_spending
from icmoe.errors import IcmoeError
from icmoe.server_privacy import spending_sentence
from icmoe.study import Study
from icmoe.study_privacy import SitePrivacy


def spent(study: Study, state: RunState | None, aside: Aside) -> list[Spent]:
    """Return what was spent at the sites and at the server; empty where the study promises nothing.

    Parameters
    ----------
    study, state
        Its promises, and how far it came.
    aside
        Where the epsilon of the sites is computed: the search for a study's noise takes seconds.
    """
    found = [at_sites(study, state, aside), at_server(study, state)]
    return [one for one in found if one is not None]


def at_sites(study: Study, state: RunState | None, aside: Aside) -> Spent | None:
    """Return what each committed round, played once, spent of a patient's privacy."""
    privacy = study.privacy.site
    if privacy is None:
        return None
    done, closed = (0, False) if state is None else (state.round, state.closed)
    key = (study.digest, done, closed)
    aside.ask(key, lambda: site_epsilon(study, privacy, done, closed=closed))
    value, most = aside.found.get(key), "" if privacy.epsilon is None else f" of at most {privacy.epsilon:g}"
    amount = f"epsilon {value:.3g}" if value is not None else "an epsilon that is being computed"
    if value is None and key in aside.found:
        amount = "an epsilon that cannot be computed without Opacus (ICM213)"
    sentence = (
        f"Each site: {amount}{most} at delta {privacy.delta:g} per {privacy.unit} (add/remove; {privacy.accountant}), after "
        f"{done} of {study.rounds} rounds. Attempts that were repeated cost more; each site's own ledger counts them."
    )
    return Spent(unit=privacy.unit, epsilon=value, limit=privacy.epsilon, delta=privacy.delta, sentence=sentence)


def site_epsilon(study: Study, privacy: SitePrivacy, done: int, *, closed: bool) -> float | None:
    """Return the epsilon of so many rounds at a site; None where Opacus is not installed.

    Parameters
    ----------
    study, privacy
        The study and its section of privacy at the sites.
    done
        Rounds, each of which scores its incoming model too.
    closed
        Whether the closing evaluation scored the last one.
    """
    try:
        training = training_spending(privacy, rounds=study.rounds)
        steps = Spending(training.noise_multiplier, training.sample_rate, training.steps * done)
        scores = score_spending(privacy) * (done + closed)
        return epsilon((steps, *scores), delta=privacy.delta, accountant=privacy.accountant)
    except IcmoeError:
        return None


def at_server(study: Study, state: RunState | None) -> Spent | None:
    """Return what the released models spent of a site's privacy, as the newest round recorded it."""
    privacy = study.privacy.server
    if privacy is None:
        return None
    records = [] if state is None else [record["privacy"] for record in state.history if record.get("privacy")]
    if not records:
        sentence = f"The server: nothing so far, at delta {privacy.delta:g} per {privacy.unit} ({privacy.adjacency})."
        return Spent(unit=privacy.unit, epsilon=0.0, limit=privacy.epsilon, delta=privacy.delta, sentence=sentence)
    value, sentence = float(records[-1]["epsilon"]), f"The server: {spending_sentence(records[-1])}."
    return Spent(unit=privacy.unit, epsilon=value, limit=privacy.epsilon, delta=privacy.delta, sentence=sentence)
