"""What a site may tell about one patient in all, and whether a study fits into what is left of it.

No files here. Everything that the site's ledger holds is composed, across rounds, runs and studies, because any two of them
may have had the same patient. The unit is the patient, adjacency is add or remove one patient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from fl_client.ledger import Book, Entry, Releases
from icmoe.accounting import Spending, epsilon
from icmoe.config import Section
from icmoe.errors import Fault, IcmoeError
from icmoe.study import Study
from icmoe.study_privacy import Accountant

_NOTHING = "Nothing was trained, nothing was sent."


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
    """Return what the entries with differential privacy spent, equal releases together: few terms compose fast."""
    return merged([Spending(*release) for entry in entries for release in entry.releases or ()])


def merged(history: Sequence[Spending]) -> list[Spending]:
    """Return the history with equal mechanisms in one term, in order of noise and rate."""
    steps: dict[tuple[float, float], int] = {}
    for part in history:
        key = part.noise_multiplier, part.sample_rate
        steps[key] = steps.get(key, 0) + part.steps
    return [Spending(sigma, rate, count) for (sigma, rate), count in sorted(steps.items())]


def rounds_that_fit(budget: Budget, history: Sequence[Spending], per_round: Sequence[Spending], most: int) -> int:
    """Return how many rounds more stay within the budget, at most `most`; more rounds never cost less."""

    def fits(rounds: int) -> bool:
        more = [Spending(part.noise_multiplier, part.sample_rate, part.steps * rounds) for part in per_round]
        return epsilon_of_history(budget, merged([*history, *more])) <= budget.epsilon

    if fits(most):
        return most
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def require_room(
    budget: Budget | None, book: Book, study: Study, per_round: Sequence[Spending] | None, *, remaining: int, patients: int
) -> None:
    """Refuse what the budget does not allow.

    Before its first round here a study must fit whole, with all rounds that are left of it: half a study costs patients
    and brings little. Once begun, each round must fit.

    Parameters
    ----------
    budget
        The site's.
    book
        Its ledger.
    study
        The study.
    per_round
        What a round may tell; None without differential privacy at the site.
    remaining
        Rounds of the study that are left, this one included.
    patients
        Training patients of the site.

    Raises
    ------
    IcmoeError
        410 where the site has no budget, 202 where its delta is too large, 411 where the study would cross it, 417 where
        the study has no differential privacy and the site has a budget.
    """
    if per_round is None:
        if budget is not None:
            limit = f"epsilon {budget.epsilon:g}"
            raise IcmoeError(Fault(number=417, where=study.name, value="epsilon infinite", limit=limit, did=_NOTHING))
        return
    if budget is None:
        raise IcmoeError(Fault(number=410, where=study.name, did=_NOTHING))
    if budget.delta > 1.0 / patients:
        limit = f"at most 1 / {patients} training patients"
        raise IcmoeError(Fault(number=202, where="[budget]", value=f"delta = {budget.delta:g}", limit=limit, did=_NOTHING))
    needed = 1 if any(entry.study == study.digest for entry in book.entries) else remaining
    history = history_of(book.entries)
    fitting = rounds_that_fit(budget, history, per_round, needed)
    if fitting < needed:
        raise IcmoeError(_crossing(budget, study, history, fitting, needed))


def _crossing(budget: Budget, study: Study, history: Sequence[Spending], fitting: int, needed: int) -> Fault:
    spent = epsilon_of_history(budget, history)
    value = f"epsilon {spent:.3g} is spent, {fitting} of the {needed} rounds still fit"
    limit = f"epsilon {budget.epsilon:g} at delta {budget.delta:g}, {budget.accountant}"
    return Fault(number=411, where=study.name, value=value, limit=limit, did=_NOTHING)


def releases_of(per_round: Sequence[Spending] | None) -> Releases:
    """Return what the ledger writes down for a round."""
    return None if per_round is None else tuple((part.noise_multiplier, part.sample_rate, part.steps) for part in per_round)
