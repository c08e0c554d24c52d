"""The rounds of a study over a Flower Grid, committed to disk after each one.

A round asks every site once: the site scores the incoming model on its own validation patients, trains, and answers
with both. The validation score of round r therefore arrives with round r + 1, and one evaluation closes the study;
this halves what is sent down and saves a process start per site and round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fl_server.exchanging import ask
from fl_server.replies import mean_loss
from fl_server.roster import await_online, online
from fl_server.round_log import RoundRecord
from fl_server.round_strategy import RoundReport, RoundStrategy, record_of, unheard
from fl_server.run_state import RunState
from fl_server.scores import mean_score, score_of
from fl_server.waiting import Watch, begun
from icmoe.errors import Fault, IcmoeError
from icmoe.kinds import names_of
from icmoe.study import Study

# A site that answers at once that it cannot now is not asked again at once.
PAUSE_S, PAUSE_SHARE = 30.0, 0.1

MOST_LATE = 32
"""Questions whose missing answers are still looked for: a site that stays silent must not fill the memory."""


def run_rounds(
    grid: Grid,
    strategy: RoundStrategy,
    study: Study,
    state: RunState,
    *,
    sites: Mapping[int, str],
    commit: Callable[[RunState], None],
    poll_s: float = 1.0,
    on_reply: Callable[[int, str], None] | None = None,
    on_round: Callable[[RoundRecord], None] | None = None,
    tell: Callable[[str], None] = unheard,
    welcome: Callable[[], Sequence[str]] = tuple,
    watch: Watch = unheard,
) -> RunState:
    """Run the rounds that are left and the closing evaluation; `state` is moved on and committed after each.

    Parameters
    ----------
    grid, strategy, study
        As in Flower.
    state
        Start or committed state.
    sites
        Names by node.
    commit
        Called with the state after each round; must be atomic.
    poll_s
        Seconds between looks for replies.
    on_reply
        Called with (round, site) as replies arrive.
    on_round
        Called with each round's record.
    tell
        Called with a sentence before each wait: for whom, until when.
    welcome
        Called before each round is asked; may enter sites that joined since into `sites` and returns their names.
    watch
        Called with each wait as it begins, and again with each answer to it.

    Raises
    ------
    IcmoeError
        501 where a round brings no usable update at all or fewer sites than the quorum are connected until the deadline, 515
        where it stays below the quorum after all retries; what was committed stays.
    """
    strategy.load_state(state.extra)
    post = Post(grid, sites, study.deadline_s, poll_s, on_reply=on_reply, tell=tell, welcome=welcome, watch=watch)
    while state.round < study.rounds:
        outcome = play_round(post, strategy, study, state)
        state.arrays = {name: array.numpy() for name, array in outcome.moved.items()}
        state.extra = strategy.state()
        note_validation(state, _validation(outcome.replies, sites))
        state.history.append(round_record(state.round + 1, strategy.report, study, outcome))
        state.round += 1
        commit(state)
        if on_round is not None:
            on_round(state.history[-1])
    if not state.closed:
        messages = list(strategy.configure_evaluate(study.rounds, record_of(state.arrays), ConfigRecord(), grid))
        replies = answers_to(messages, post.ask(study.rounds, messages, online(grid), "closing evaluation"))
        note_validation(state, _validation(replies, sites))
        state.closed = True
        commit(state)
    return state


@dataclass(slots=True)
class Post:
    """Asks the sites and waits for them, never longer than the deadline and never without saying so.

    Parameters
    ----------
    grid, sites, deadline_s, poll_s, on_reply, tell, welcome, watch
        As for `run_rounds`.
    late
        By question, messages that no answer came to in time; what still comes is handed on, for the strategy to refuse.
    """

    grid: Grid
    sites: Mapping[int, str]
    deadline_s: float
    poll_s: float
    on_reply: Callable[[int, str], None] | None
    tell: Callable[[str], None]
    welcome: Callable[[], Sequence[str]]
    watch: Watch
    late: list[set[str]] = field(default_factory=list)

    def ask(self, number: int, messages: Iterable[Message], nodes: Container[int], what: str) -> list[Message]:
        """Return the answers of the sites among these nodes."""
        wanted = reachable(messages, nodes)
        names = sorted(self.sites.get(message.metadata.dst_node_id, "?") for message in wanted)
        self.tell(f"{what}: waiting for {', '.join(names) or 'nobody'} until {clock(self.deadline_s)}")
        offline = [name for node, name in self.sites.items() if node not in nodes]
        wait = begun("answers", what, number, self.deadline_s, self.sites.values(), asked=names, offline=offline)
        self.watch(wait)

        def heard(reply: Message) -> None:
            nonlocal wait
            site = self.sites.get(reply.metadata.src_node_id, "?")
            wait = wait.with_answer(site)
            self.watch(wait)
            if self.on_reply is not None:
                self.on_reply(number, site)

        before = set[str]().union(*self.late)
        late = set(before)
        replies = ask(self.grid, wanted, deadline_s=self.deadline_s, poll_s=self.poll_s, on_reply=heard, late=late)
        self.late = [*(ids & late for ids in self.late), late - before][-MOST_LATE:]
        return [reply for reply in replies if reply.metadata.src_node_id in self.sites]

    def connected(self, number: int, count: int, what: str) -> dict[int, str]:
        """Return the connected nodes of the sites as soon as there are enough."""
        self.tell(f"{what}: waiting for {count} of {', '.join(sorted(self.sites.values()))} until {clock(self.deadline_s)}")
        self.watch(begun("connection", what, number, self.deadline_s, self.sites.values()))
        return await_online(self.grid, count, deadline_s=self.deadline_s, poll_s=self.poll_s, among=self.sites)


def clock(seconds: float) -> str:
    """Return the time in so many seconds, as people read it."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%d %H:%M:%S UTC")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A round that reached its quorum.

    Parameters
    ----------
    moved
        New global arrays.
    replies
        All that came for it.
    attempts
        Times that it was asked, 1 where nothing went wrong.
    size_down_bytes
        Bytes of the tensors to each site.
    seconds
        Of training and aggregation.
    """

    moved: ArrayRecord
    replies: list[Message]
    attempts: int
    size_down_bytes: int
    seconds: dict[str, float]


def play_round(post: Post, strategy: RoundStrategy, study: Study, state: RunState) -> Outcome:
    """Ask for a round until it reaches its quorum; usable updates are kept, the other sites are asked again.

    Raises
    ------
    IcmoeError
        501, 515 as `run_rounds`.
    """
    number, most, needed = state.round + 1, study.retries + 1, min(study.quorum, len(post.sites))
    replies, asked, began = list[Message](), list[Message](), time.perf_counter()
    for attempt in range(1, most + 1):
        what = f"round {number} of {study.rounds}" + (f", attempt {attempt} of {most}" if attempt > 1 else "")
        if joined := post.welcome():
            post.tell(f"{what}: joined by {', '.join(joined)}")
        reached = post.connected(number, needed, what)
        arrays = record_of(state.arrays)
        size_bytes = sum(len(array.data) for array in arrays.values())
        have = {reply.metadata.src_node_id for reply in replies}
        messages = [
            message
            for message in strategy.configure_train(number, arrays, ConfigRecord(), post.grid)
            if message.metadata.dst_node_id not in have
        ]
        asked += messages
        replies += post.ask(number, messages, reached, what)
        trained_s = time.perf_counter() - began
        moved, _ = strategy.aggregate_train(number, replies)
        strategy.report.faults += silences(post.sites, reached, replies, strategy.report.faults)
        used = {update.site for update in strategy.report.updates}
        if moved is not None and used:
            seconds = {"train": trained_s, "aggregate": time.perf_counter() - began - trained_s}
            answers = answers_to(asked, replies)
            return Outcome(moved=moved, replies=answers, attempts=attempt, size_down_bytes=size_bytes, seconds=seconds)
        replies = [reply for reply in replies if post.sites[reply.metadata.src_node_id] in used]
        post.tell(f"{what}: {len(used)} usable updates, {study.quorum} are needed; the model did not move")
        if attempt < most:
            time.sleep(min(PAUSE_S, PAUSE_SHARE * study.deadline_s))
    did, value, limit = f"It was asked {most} times; the model did not move.", f"{len(used)} usable", f"at least {study.quorum}"
    fault = Fault(number=515 if used else 501, where=f"round {number}", value=value, limit=limit, did=did)
    raise IcmoeError(fault, *strategy.report.faults)


def reachable(messages: Iterable[Message], nodes: Container[int]) -> list[Message]:
    """Return the messages to connected nodes: Flower answers one to another node only after its own deadline."""
    return [message for message in messages if message.metadata.dst_node_id in nodes]


def answers_to(messages: Iterable[Message], replies: Iterable[Message]) -> list[Message]:
    """Return the replies to these messages: late ones to a former round say how good another model was."""
    asked = {message.metadata.message_id for message in messages}
    return [reply for reply in replies if reply.metadata.reply_to_message_id in asked]


def silences(
    sites: Mapping[int, str], reached: Container[int], replies: Iterable[Message], known: Iterable[Fault]
) -> list[Fault]:
    """Return a fault per site that is not connected or did not answer; what Flower answers in its stead does not count.

    Sites that sit out by the faults `known` were not asked.
    """
    answered = {reply.metadata.src_node_id for reply in replies}
    out = {fault.where for fault in known if fault.number == 514}
    faults = []
    for node, name in sorted(sites.items(), key=lambda item: item[1]):
        if name in out:
            continue
        if node not in reached:
            faults.append(Fault(number=332, where=name, did="The round went on without the site."))
        elif node not in answered:
            what = "site did not answer before the deadline"
            faults.append(Fault(number=304, where=name, what=what, did="The round went on without the site."))
    return faults


def _validation(replies: Iterable[Message], sites: Mapping[int, str]) -> dict[str, tuple[float, int]]:
    """Return validation Dice and patients per site that has validation patients."""
    scores = {sites.get(reply.metadata.src_node_id, ""): score_of(reply) for reply in replies}
    return {site: score for site, score in scores.items() if score is not None}


def note_validation(state: RunState, found: Mapping[str, tuple[float, int]]) -> None:
    """Enter the scores of the model that the last recorded round left behind."""
    if not state.history or not found:
        return
    record = state.history[-1]
    for site, (dice, _) in found.items():
        if site in record["sites"]:
            record["sites"][site]["val_dice"] = dice
    record["val_dice"] = mean_score(found.values())


def round_record(number: int, report: RoundReport, study: Study, outcome: Outcome) -> RoundRecord:
    """Return the record of a round as plain values."""
    sites = {
        update.site: {
            "loss": update.loss,
            "val_dice": None,
            "usage": list(update.usage_M),
            "steps": update.steps,
            "seconds": update.train_s,
            "bytes_up": update.size_bytes,
            "bytes_down": outcome.size_down_bytes,
        }
        for update in report.updates
    }
    return {
        "round": number,
        "sites": sites,
        "loss": mean_loss(report.updates),
        "val_dice": None,
        "usage_spread": report.spread,
        "expert_weights": _shares(report, names_of(study.model)),
        "bytes_up": sum(update.size_bytes for update in report.updates),
        "bytes_down": outcome.size_down_bytes * len(report.updates),
        "seconds": outcome.seconds,
        "attempts": outcome.attempts,
        "privacy": report.privacy,
        "faults": [fault.record() for fault in report.faults],
    }


def _shares(report: RoundReport, experts: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return each site's weight in each expert's mean; empty where the round was not weighted."""
    if report.weights is None:
        return {}
    names, share_SM = [update.site for update in report.updates], report.weights.share_SM
    return {expert: dict(zip(names, share_SM[:, index].tolist(), strict=True)) for index, expert in enumerate(experts)}
