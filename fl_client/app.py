"""A hospital's Flower ClientApp: it introduces and, if allowed, summarises itself, trains, evaluates; nothing else can be asked.

Every setting comes from the site's own approved copy of the study. A message carries study digest, round and tensors;
any other record or key is refused by number. What leaves on an error is a number and its catalogue title, never the
text of an exception, which Flower would send to the coordinator.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fl_client.participant import Participant, site_from_environment
from fl_client.personal import keep_personal, with_personal
from icmoe.dataset import TrainingSet
from icmoe.errors import CATALOGUE, Fault, IcmoeError
from icmoe.evaluation import score_slices
from icmoe.exchange import (
    ARRAYS,
    CONFIG,
    DICE_KEY,
    LOSS_KEY,
    NUMBERS,
    PATIENTS_KEY,
    ROUND_KEY,
    SECONDS_KEY,
    SITE_KEY,
    SLICES_KEY,
    STEPS_KEY,
    STUDY_KEY,
    SUMMARY_KEY,
    UPDATE,
    USAGE_KEY,
    State,
    announced_size,
    global_state,
    load_state,
    update_of,
)
from icmoe.model import ICMoE, build_model
from icmoe.study import Study, derived_seed
from icmoe.summary import summarise
from icmoe.training import train_round

log = logging.getLogger("fl_client")

Answer = Callable[[Message, Context], Message]
SiteOf = Callable[[Context], Participant]

ERROR_CODE = 1000


def make_client_app(site_of: SiteOf) -> ClientApp:
    """Return a ClientApp for the sites that `site_of` knows.

    Parameters
    ----------
    site_of
        Returns the site of a Flower context; in a simulation by partition, at a hospital from its site file.
    """
    client_app = ClientApp()
    client_app.query("site")(_numbers_only(functools.partial(introduce, site_of)))
    client_app.query("summary")(_numbers_only(functools.partial(describe, site_of)))
    client_app.train()(_numbers_only(functools.partial(train, site_of)))
    client_app.evaluate()(_numbers_only(functools.partial(evaluate, site_of)))
    return client_app


def introduce(site_of: SiteOf, message: Message, context: Context) -> Message:
    """Answer with the site's name and announced size."""
    site = site_of(context)
    _request(message, site, records={CONFIG}, keys={STUDY_KEY})
    size = announced_size(len(site.train), exact=site.exact_counts)
    return Message(RecordDict({CONFIG: ConfigRecord({SITE_KEY: site.name, SLICES_KEY: size})}), reply_to=message)


def describe(site_of: SiteOf, message: Message, context: Context) -> Message:
    """Answer with the summary of the site's training images, or decline by number 214 where the site file does not allow it."""
    site = site_of(context)
    study, _ = _request(message, site, records={CONFIG}, keys={STUDY_KEY})
    if not site.share_summary:
        raise IcmoeError(Fault(number=214, where=site.name, did="Nothing was sent."))
    text = summarise(site.train, study.classes).text()
    log.info("%s: summary sent to the coordinator: %s", site.name, text)
    return Message(RecordDict({CONFIG: ConfigRecord({SUMMARY_KEY: text})}), reply_to=message)


def train(site_of: SiteOf, message: Message, context: Context) -> Message:
    """Score the incoming model on the site's validation patients, train it for one round, answer with the update."""
    site = site_of(context)
    study, round_number = _request(message, site, records={ARRAYS, CONFIG}, keys={STUDY_KEY, ROUND_KEY})
    torch.set_num_threads(site.threads)
    start = _incoming(message)
    model = _model(site, study, start, after_round=round_number - 1)
    numbers = _validation(site, study, model)
    data = TrainingSet(site.train, study, site.cache(study))
    result = train_round(
        model,
        data,
        study,
        round_number=round_number,
        seed=derived_seed(study, "train", site.name, round_number),
        device=site.torch_device(),
        steps=site.steps_per_round,
    )
    trained = global_state(model)
    keep_personal(trained, site.state_folder, study, site.name, round_number)
    update = update_of(model, start, personal=study.aggregation.personal, shape=study.model)
    numbers |= {
        SLICES_KEY: announced_size(len(site.train), exact=site.exact_counts),
        USAGE_KEY: list(result.usage_M),
        LOSS_KEY: result.loss,
        STEPS_KEY: result.steps,
        SECONDS_KEY: result.train_s,
    }
    arrays = ArrayRecord({name: Array(tensor.numpy()) for name, tensor in update.items()})
    return Message(RecordDict({UPDATE: arrays, NUMBERS: MetricRecord(numbers)}), reply_to=message)


def evaluate(site_of: SiteOf, message: Message, context: Context) -> Message:
    """Score the incoming model on the site's validation patients."""
    site = site_of(context)
    study, round_number = _request(message, site, records={ARRAYS, CONFIG}, keys={STUDY_KEY, ROUND_KEY})
    torch.set_num_threads(site.threads)
    model = _model(site, study, _incoming(message), after_round=round_number)
    return Message(RecordDict({NUMBERS: MetricRecord(_validation(site, study, model))}), reply_to=message)


def _request(message: Message, site: Participant, *, records: set[str], keys: set[str]) -> tuple[Study, int]:
    """Return the approved study and the round of a message, or refuse what does not belong in it."""
    found = set(message.content)
    config = message.content.config_records.get(CONFIG, ConfigRecord())
    extra = sorted((found ^ records) | (set(config) ^ keys))
    if extra:
        raise IcmoeError(Fault(number=301, where=site.name, value=", ".join(extra), did="Nothing was trained, nothing was sent."))
    study = site.approved(config[STUDY_KEY])
    round_number = config.get(ROUND_KEY, 1)
    if not isinstance(round_number, int) or not 1 <= round_number <= study.rounds:
        limit = f"1 to {study.rounds}"
        raise IcmoeError(
            Fault(number=301, where=site.name, what="round is outside the study", value=str(round_number), limit=limit)
        )
    return study, round_number


def _incoming(message: Message) -> State:
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in sorted(message.content.array_records[ARRAYS].items())}


def _model(site: Participant, study: Study, start: State, *, after_round: int) -> ICMoE:
    model = build_model(study, seed=0)
    load_state(model, with_personal(start, site.state_folder, study, site.name, after_round))
    return model.to(site.torch_device()).eval()


def _validation(site: Participant, study: Study, model: ICMoE) -> dict[str, int | float | list[int] | list[float]]:
    scores = score_slices(model, site.val, study.labels, site.cache(study), site.torch_device(), surfaces=False)
    dice = math.fsum(score.dice for score in scores) / len(scores) if scores else 0.0
    return {DICE_KEY: dice, PATIENTS_KEY: len(scores)}


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


app = make_client_app(site_from_environment)
