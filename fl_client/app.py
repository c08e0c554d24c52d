"""A hospital's Flower ClientApp: it introduces and, if allowed, summarises itself, trains, evaluates; nothing else can be asked.

Every setting comes from the site's own approved copy of the study. A message carries study digest, round and tensors;
any other record or key is refused by number, and the run's configuration is not looked at. What leaves on an error is a
number and its catalogue title, never the text of an exception, which Flower would send to the coordinator.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_client.audit import record
from fl_client.incoming import accept
from fl_client.local_round import size_of, train_here, validation_numbers
from fl_client.participant import Participant, site_from_environment
from fl_client.personal import keep_personal, with_personal
from fl_client.watchdog import START_S, end_after, end_with_parent
from icmoe.errors import CATALOGUE, Fault, IcmoeError
from icmoe.exchange import (
    ARRAYS,
    CONFIG,
    NUMBERS,
    ROUND_KEY,
    SITE_KEY,
    SLICES_KEY,
    STUDY_KEY,
    SUMMARY_KEY,
    UPDATE,
    State,
    global_state,
    load_state,
    state_digest,
    update_of,
)
from icmoe.model import ICMoE, build_model
from icmoe.study import Study
from icmoe.summary import summarise

log = logging.getLogger("fl_client")

Answer = Callable[[Message, Context], Message]
SiteOf = Callable[[Context, str], Participant]

ERROR_CODE = 1000


def make_client_app(site_of: SiteOf) -> ClientApp:
    """Return a ClientApp for the sites that `site_of` knows.

    Parameters
    ----------
    site_of
        Returns the site of a Flower context that takes part in the study of a digest; in a simulation by partition, at a
        hospital from its site file.
    """
    client_app = ClientApp()
    client_app.query("site")(_numbers_only(functools.partial(introduce, site_of)))
    client_app.query("summary")(_numbers_only(functools.partial(describe, site_of)))
    client_app.train()(_numbers_only(functools.partial(train, site_of)))
    client_app.evaluate()(_numbers_only(functools.partial(evaluate, site_of)))
    return client_app


def introduce(site_of: SiteOf, message: Message, context: Context) -> Message:
    """Answer with the site's name and announced size. The name is for people: the server knows it by the node's key."""
    site, study, _ = _request(site_of, message, context, records={CONFIG}, keys={STUDY_KEY})
    answer: dict[str, str | int] = {SITE_KEY: site.name, SLICES_KEY: size_of(site, study)}
    _note_sent(site, study, "query", 0, answer)
    return Message(RecordDict({CONFIG: ConfigRecord({**answer})}), reply_to=message)


def describe(site_of: SiteOf, message: Message, context: Context) -> Message:
    """Answer with the summary of the site's training images, or decline by number 214.

    It is declined where the site file does not allow it, and under privacy at the site, whose budget does not know it.
    """
    site, study, _ = _request(site_of, message, context, records={CONFIG}, keys={STUDY_KEY})
    if not site.share_summary or study.privacy.site is not None:
        raise IcmoeError(Fault(number=214, where=site.name, did="Nothing was sent."))
    answer: dict[str, str | int] = {SUMMARY_KEY: summarise(site.train, study.classes).text()}
    _note_sent(site, study, "query", 0, answer)
    return Message(RecordDict({CONFIG: ConfigRecord({**answer})}), reply_to=message)


def train(site_of: SiteOf, message: Message, context: Context) -> Message:
    """Score the incoming model on the site's validation patients, train it for one round, answer with the update."""
    site, study, round_number = _request(site_of, message, context, records={ARRAYS, CONFIG}, keys={STUDY_KEY, ROUND_KEY})
    start = _incoming(message)
    model = _model(site, study, start, "train", round_number)
    numbers = validation_numbers(site, study, model)
    numbers |= train_here(site, study, model, round_number)
    trained = global_state(model)
    keep_personal(trained, site.state_folder, study, site.name, round_number)
    update = update_of(model, start, personal=study.aggregation.personal, shape=study.model)
    arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in update.items()})
    _note_sent(site, study, "train", round_number, numbers, digest=state_digest(update))
    return Message(RecordDict({UPDATE: arrays, NUMBERS: MetricRecord(numbers)}), reply_to=message)


def evaluate(site_of: SiteOf, message: Message, context: Context) -> Message:
    """Score the incoming model on the site's validation patients."""
    site, study, round_number = _request(site_of, message, context, records={ARRAYS, CONFIG}, keys={STUDY_KEY, ROUND_KEY})
    numbers = validation_numbers(site, study, _model(site, study, _incoming(message), "evaluate", round_number))
    _note_sent(site, study, "evaluate", round_number, numbers)
    return Message(RecordDict({NUMBERS: MetricRecord(numbers)}), reply_to=message)


def _request(
    site_of: SiteOf, message: Message, context: Context, *, records: set[str], keys: set[str]
) -> tuple[Participant, Study, int]:
    """Return the site, the approved study and the round of a message, or refuse what does not belong in it."""
    did = "Nothing was trained, nothing was sent."
    found = set(message.content)
    config = message.content.config_records.get(CONFIG, ConfigRecord())
    extra = sorted((found ^ records) | (set(config) ^ keys))
    if extra:
        raise IcmoeError(Fault(number=301, value=", ".join(extra), did=did))
    site = site_of(context, str(config[STUDY_KEY]))
    study = site.approved(config[STUDY_KEY])
    round_number = config.get(ROUND_KEY, 1)
    if not isinstance(round_number, int) or not 1 <= round_number <= study.rounds:
        limit = f"1 to {study.rounds}"
        raise IcmoeError(
            Fault(number=301, where=site.name, what="round is outside the study", value=str(round_number), limit=limit)
        )
    torch.set_num_threads(site.threads)
    return site, study, round_number


def _incoming(message: Message) -> State:
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in sorted(message.content.array_records[ARRAYS].items())}


def _model(site: Participant, study: Study, start: State, kind: str, round_number: int) -> ICMoE:
    model = build_model(study, seed=0)
    load_state(model, start)
    if site.audited:
        accept(site.state_folder, study, kind, round_number, start)
    after_round = round_number if kind == "evaluate" else round_number - 1
    load_state(model, with_personal(start, site.state_folder, study, site.name, after_round))
    return model.to(site.torch_device()).eval()


def _note_sent(
    site: Participant, study: Study, kind: str, round_number: int, numbers: Mapping[str, object], digest: str | None = None
) -> None:
    """Write down what leaves, before it does."""
    if site.audited:
        about = {"study": study.digest, "name": study.name, "kind": kind, "round": round_number}
        record(site.state_folder, "sent", {**about, "digest": digest, "numbers": dict(numbers)})


def _numbers_only(answer: Answer) -> Answer:
    """Return the answer with every exception replaced by a number and its title before it leaves."""

    def guarded(message: Message, context: Context) -> Message:
        try:
            return answer(message, context)
        except IcmoeError as error:
            log.error("%s", error)
            return _refusal(error.faults[0].number, message)
        except Exception:
            log.exception("the site did not finish its part of the round")
            return _refusal(304, message)

    return guarded


def _refusal(number: int, message: Message) -> Message:
    return Message(Error(ERROR_CODE + number, f"ICM{number} {CATALOGUE[number].title}"), reply_to=message)


def at_hospital(context: Context, digest: str) -> Participant:
    """Return the hospital's site; from here on this process ends with its parent, and at the study's deadline."""
    end_with_parent(os.getppid())
    end_after(START_S)
    site = site_from_environment(context, digest)
    end_after(site.studies[0].deadline_s)
    return site


app = make_client_app(at_hospital)
