"""What a site may tell about one patient in all, and whether a study fits into what is left of it.

No files here. Everything that the site's ledger holds is composed, across rounds, runs and studies, because any two of them
may have had the same patient. The unit is the patient, adjacency is add or remove one patient.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from fl_client.ledger import Book, Entry, Releases
from icmoe.accounting import Spending, epsilon, epsilon_under, merged, score_spending, study_spending, training_spending
from icmoe.config import Section
from icmoe.errors import NOTHING_SENT, Fault, IcmoeError
from icmoe.study import Study
from icmoe.study_privacy import Accountant

ATTEMPTS = 2
"""What a study may spend at a site, in multiples of its plan: a round is asked for again where a site or the coordinator was
stopped in it, and is drawn anew where another model comes in. Without an end to that the study's epsilon would bind nobody."""


class Budget(Section):
    """Section [budget] of the site file: the most that all studies together may tell about one patient.

    Absent, the site takes part in no study with differential privacy: spending needs a limit that somebody wrote down.
    Present, it takes part in no study without, whose epsilon is infinite.
    """

    epsilon: Annotated[float, Field(gt=0.0, le=1000.0)]
    """Largest epsilon of everything that the ledger holds, composed."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)]
    """Probability with which epsilon may not hold; at most 1 / number of the site's training patients."""
    accountant: Accountant = "prv"
    """Opacus' accountant that composes the ledger; prv is tighter, rdp faster."""


def epsilon_of_history(budget: Budget, history: Sequence[Spending]) -> float:
    """Return the epsilon of a history at the budget's delta."""
    return epsilon(history, delta=budget.delta, accountant=budget.accountant)


def history_of(entries: Sequence[Entry]) -> list[Spending]:
    """Return what the entries with differential privacy spent, equal releases added up."""
    return list(merged([Spending(*release) for entry in entries for release in entry.releases or ()]))


def round_spending(study: Study, kind: str) -> tuple[Spending, ...] | None:
    """Return what the answer to one message may tell about a patient; None without differential privacy at the site."""
    privacy = study.privacy.site
    if privacy is None:
        return None
    training = (training_spending(privacy, rounds=study.rounds),) if kind == "train" else ()
    return (*training, *score_spending(privacy))


def rounds_left_spending(study: Study, rounds: int) -> tuple[Spending, ...]:
    """Return what `rounds` more rounds of a private study and its closing evaluation spend."""
    return (*(round_spending(study, "train") or ()) * rounds, *(round_spending(study, "evaluate") or ()))


def rounds_that_fit(budget: Budget, history: Sequence[Spending], study: Study, most: int) -> int:
    """Return how many rounds more of a private study stay within the budget, at most `most`; more never cost less."""

    def fits(rounds: int) -> bool:
        return epsilon_of_history(budget, [*history, *rounds_left_spending(study, rounds)]) <= budget.epsilon

    return most if fits(most) else bisect_left(range(1, most), True, key=lambda rounds: not fits(rounds))  # noqa: FBT003


def most_of_study(study: Study, max_epsilon: float | None = None) -> float:
    """Return the epsilon up to which a private study may spend at a site, at its own delta.

    Parameters
    ----------
    study
        With privacy at the site.
    max_epsilon
        The site's own limit for a study, which holds where it is smaller.
    """
    twice = epsilon_under(study, study_spending(study) * ATTEMPTS)
    return twice if max_epsilon is None else min(twice, max_epsilon)


def require_fit(budget: Budget | None, study: Study, *, patients: int) -> None:
    """Refuse a study that does not go with the budget, whatever is spent already.

    Parameters
    ----------
    budget
        The site's.
    study
        The study.
    patients
        Training patients of the site, at least 1.

    Raises
    ------
    IcmoeError
        410 where the site has no budget, 202 where its delta is too large, 417 where the study has no differential privacy
        and the site has a budget.
    """
    if study.privacy.site is None:
        if budget is not None:
            limit = f"epsilon {budget.epsilon:g}"
            raise IcmoeError(Fault(number=417, where=study.name, value="epsilon infinite", limit=limit, did=NOTHING_SENT))
    elif budget is None:
        raise IcmoeError(Fault(number=410, where=study.name, did=NOTHING_SENT))
    elif budget.delta > 1.0 / patients:
        limit = f"at most 1 / {patients} training patients"
        raise IcmoeError(Fault(number=202, where="[budget]", value=f"delta = {budget.delta:g}", limit=limit, did=NOTHING_SENT))


def require_room(
    budget: Budget | None,
    book: Book,
    study: Study,
    kind: str,
    round_number: int,
    *,
    patients: int,
    max_epsilon: float | None = None,
) -> None:
    """Refuse what the budget does not allow.

    Before its first round here a study must fit whole, with all rounds that are left of it: half a study costs patients
    and brings little. Once begun, each round must fit by itself, and all of them into what the study may spend.

    Parameters
    ----------
    budget
        The site's.
    book
        Its ledger.
    study
        The study.
    kind, round_number
        "train" or "evaluate", and its round.
    patients
        Training patients of the site, at least 1.
    max_epsilon
        The site's limit for a study, where it has one.

    Raises
    ------
    IcmoeError
        As `require_fit`; 411 where the study would cross the budget, or what it may spend itself.
    """
    require_fit(budget, study, patients=patients)
    spending = round_spending(study, kind)
    if spending is None or budget is None:
        return
    history, own = history_of(book.entries), [entry for entry in book.entries if entry.study == study.digest]
    begun, most = bool(own), most_of_study(study, max_epsilon)
    if epsilon_under(study, [*history_of(own), *spending]) > most:
        raise IcmoeError(_repeated(study, own, most))
    if begun or kind == "evaluate":
        if epsilon_of_history(budget, [*history, *spending]) > budget.epsilon:
            raise IcmoeError(_crossing(budget, study, history, 0, 1))
        return
    needed = study.rounds - round_number + 1
    if (fitting := rounds_that_fit(budget, history, study, needed)) < needed:
        raise IcmoeError(_crossing(budget, study, history, fitting, needed))


def budget_faults(budget: Budget | None, book: Book, study: Study, max_epsilon: float | None = None) -> list[Fault]:
    """Return why the budget does not allow the next round of a study, nothing where it does; patients are not counted yet."""
    try:
        # The number of patients counts before the first round alone.
        require_room(budget, book, study, "train", 1, patients=1, max_epsilon=max_epsilon)
    except IcmoeError as error:
        return list(error.faults)
    return []


def prospect(budget: Budget | None, book: Book, study: Study, max_epsilon: float | None = None) -> str:
    """Return in words what is left of a study would spend of the budget, for whoever approves it."""
    if budget is None or study.privacy.site is None:
        return "none: nothing is promised to patients"
    history = history_of(book.entries)
    left = rounds_left_spending(study, study.rounds - _last_round(book, study))
    before, after = (epsilon_of_history(budget, [*history, *more]) for more in ((), left))
    limit = f"epsilon {budget.epsilon:g} at delta {budget.delta:g} per patient, all studies together"
    most = most_of_study(study, max_epsilon)
    again = f"a round that is asked for again spends again, up to epsilon {most:.3g} for this study at its delta"
    return f"{limit}: {before:.3g} is spent, {after:.3g} after this study; {again}"


def _last_round(book: Book, study: Study) -> int:
    """Return the last round of the study that was trained here, 0 before the first."""
    return max((entry.round for entry in book.entries if entry.study == study.digest), default=0)


def releases_of(spending: Sequence[Spending] | None) -> Releases:
    """Return what the ledger writes down."""
    return None if spending is None else tuple((part.noise_multiplier, part.sample_rate, part.steps) for part in spending)


def _crossing(budget: Budget, study: Study, history: Sequence[Spending], fitting: int, needed: int) -> Fault:
    spent = epsilon_of_history(budget, history)
    value = f"epsilon {spent:.3g} is spent, {fitting} of {needed} rounds still fit"
    limit = f"epsilon {budget.epsilon:g} at delta {budget.delta:g}, {budget.accountant}, per patient"
    return Fault(number=411, where=study.name, value=value, limit=limit, did=NOTHING_SENT)


def _repeated(study: Study, own: Sequence[Entry], most: float) -> Fault:
    value = f"epsilon {epsilon_under(study, history_of(own)):.3g} is spent in {len(own)} answers"
    what, limit = "study would spend more than it may at this site", f"epsilon {most:.3g}"
    todo = (
        "Ask the coordinator why rounds were asked for again; agree on a new study for more, or raise max_epsilon under [policy]."
    )
    return Fault(number=411, where=study.name, what=what, value=value, limit=limit, did=NOTHING_SENT, todo=todo)
