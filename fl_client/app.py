"""A hospital's Flower ClientApp: it introduces and, if allowed, summarises itself, trains, evaluates; nothing else can be asked.

Every setting comes from the site's own approved copy of the study. A message carries study digest, round and tensors, and
may carry the coordinator's receipts for the site's ledger and audit log; any other record or key is refused by number, and
the run's configuration is not looked at. Every answer leaves through `fl_client/egress.py`. What leaves on an error is a
number and its catalogue title, never the text of an exception, which Flower would send to the coordinator.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl_client.budget import releases_of, require_fit, require_room, round_spending
from fl_client.by_round import KEPT, require_none_forgotten
from fl_client.causes import cause_of
from fl_client.doing import Doing, telling
from fl_client.egress import Request, decline, release
from fl_client.finished import finished_or
from fl_client.incoming import accept
from fl_client.ledger import Book, Entry, new_entry
from fl_client.local_round import size_of, train_here, validation_numbers
from fl_client.manifest import Outgoing
from fl_client.owed import coarsened, quantised_update
from fl_client.own_lines import tag_own_lines
from fl_client.participant import Participant, site_from_environment
from fl_client.personal import keep_personal, with_personal
from fl_client.watchdog import START_S, end_after, end_with_parent
from icmoe.batch_independence import mixing_faults
from icmoe.errors import NOTHING_SENT, Fault, IcmoeError
from icmoe.exchange import State, global_state, load_state, state_digest, update_of
from icmoe.messages import ARRAYS, CONFIG, ROUND_KEY, SITE_KEY, SLICES_KEY, STUDY_KEY, SUMMARY_KEY
from icmoe.model import ICMoE, build_model
from icmoe.packing import tensors_in
from icmoe.privacy import patient_faults
from icmoe.receipts import AUDIT_RECEIPT_KEY, RECEIPT_KEY, receipt_of
from icmoe.study import Study
from icmoe.summary import summarise

log = logging.getLogger("fl_client")

Handler = Callable[[Request], Outgoing]
SiteOf = Callable[[Context, str], Participant]


def make_client_app(site_of: SiteOf, handlers: Mapping[str, Handler] | None = None) -> ClientApp:
    """Return a ClientApp for the sites that `site_of` knows.

    Parameters
    ----------
    site_of
        Returns the site of a Flower context that takes part in the study of a digest; in a simulation by partition, at a
        hospital from its site file.
    handlers
        What answers in place of the product's own, by kind of message: a benchmark measures all but the training.
    """
    own: dict[str, Handler] = {"site": introduce, "summary": describe, "train": train, "evaluate": evaluate}
    answers = {kind: _answering(site_of, kind, handle) for kind, handle in {**own, **(handlers or {})}.items()}
    client_app = ClientApp()
    client_app.query("site")(answers["site"])
    client_app.query("summary")(answers["summary"])
    client_app.train()(answers["train"])
    client_app.evaluate()(answers["evaluate"])
    return client_app


def introduce(request: Request) -> Outgoing:
    """Answer with the site's name and announced size. The name is for people: the server knows it by the node's key."""
    site = request.site
    return Outgoing(texts={SITE_KEY: site.name, SLICES_KEY: size_of(site, request.study)})


def describe(request: Request) -> Outgoing:
    """Answer with the summary of the site's training images, or decline by number 214.

    It is declined where the site file does not allow it, and under privacy at the site, whose budget does not know it.
    """
    if not request.site.share_summary or request.study.privacy.site is not None:
        raise IcmoeError(Fault(number=214, where=request.site.name, did="Nothing was sent."))
    return Outgoing(texts={SUMMARY_KEY: summarise(request.site.train, request.study.classes).text()})


def train(request: Request) -> Outgoing:
    """Score the incoming model on the site's validation patients, train it for one round, answer with the update.

    At a hospital the round is paid for before it starts, and one that was finished before is sent again as it was. What was
    trained while a patient was forgotten is not sent.
    """
    start = incoming_of(request)
    model = model_of(request, start)
    if request.site.records is None:
        return _trained(request, start, model)
    request.site.records.require(request.receipt, request.audit_receipt)
    incoming = state_digest(start)

    def spend_and_train() -> Outgoing:
        if request.study.privacy.site is not None and (faults := mixing_faults(model, request.study)):
            raise IcmoeError(*faults)  # before anything is spent
        _spend(request, incoming)
        return _trained(request, start, model)

    found = finished_or(request.site.state_folder, request.study, request.round_number, incoming, spend_and_train)
    require_none_forgotten(request.site.state_folder, request.site.forgot)
    if request.study.update.form == "float32" or found.tensors is None:
        return found
    return replace(found, tensors=coarsened(dict(found.tensors), request.site.policy.mantissa_bits))


def evaluate(request: Request) -> Outgoing:
    """Score the incoming model on the site's validation patients; noised scores are paid for like training."""
    start = incoming_of(request)
    model = model_of(request, start)
    if round_spending(request.study, request.kind):
        _spend(request, state_digest(start))
    elif request.site.records is not None:  # nothing to write down, and still not for a study that the budget excludes
        require_fit(request.site.budget, request.study, patients=_patients(request.site))
    return Outgoing(numbers=validation_numbers(request.site, request.study, model))


def _trained(request: Request, start: State, model: ICMoE) -> Outgoing:
    site, study, round_number = request.site, request.study, request.round_number
    numbers = validation_numbers(site, study, model)
    doing = Doing(
        run=str(request.message.metadata.run_id),
        study=study.name,
        round=round_number,
        rounds=study.rounds,
        device=str(site.torch_device()),
    )
    with telling(site.state_folder if site.records is not None else None, doing) as on_step:
        numbers |= train_here(site, study, model, round_number, on_step)
    kept = KEPT if site.records is not None else 2  # a simulation's coordinator repeats the round that was cut off, no other
    keep_personal(global_state(model), site.state_folder, study, site.name, round_number, kept=kept)
    update = update_of(model, start, personal=study.aggregation.personal, shape=study.model)
    return Outgoing(tensors=_in_form(update, site, study, round_number, kept), numbers=numbers)


def _in_form(update: State, site: Participant, study: Study, round_number: int, kept: int) -> State:
    """Return the update in the form that the study asks for."""
    if study.update.form == "float32":
        return update
    bits = site.policy.mantissa_bits
    return quantised_update(update, site.state_folder, study, site.name, round_number, bits=bits, kept=kept)


def _spend(request: Request, incoming: str) -> None:
    """Write down what the answer may tell about a patient, or refuse it, before anything is drawn."""
    site, study, kind, round_number = request.site, request.study, request.kind, request.round_number

    def make(book: Book) -> Entry:
        patients = _patients(site)
        if study.privacy.site is not None and (faults := patient_faults(study.privacy.site, patients)):
            raise IcmoeError(*faults)
        most = site.policy.max_epsilon
        require_room(site.budget, book, study, kind, round_number, patients=patients, max_epsilon=most)
        return new_entry(study, kind, round_number, incoming, releases_of(round_spending(study, kind)))

    if site.records is not None:
        site.records.spend(make, request.receipt)


def _patients(site: Participant) -> int:
    return len({(item.site, item.patient) for item in site.train})


def _request(site_of: SiteOf, kind: str, message: Message, context: Context) -> Request:
    """Return what a message asks, or refuse what does not belong in it."""
    rounds = kind in {"train", "evaluate"}
    records, keys = ({ARRAYS, CONFIG}, {STUDY_KEY, ROUND_KEY}) if rounds else ({CONFIG}, {STUDY_KEY})
    config: Mapping[str, object] = message.content.config_records.get(CONFIG, {})
    asked = set(config) - ({RECEIPT_KEY, AUDIT_RECEIPT_KEY} if kind == "train" else set())
    untyped = records - {CONFIG, *message.content.array_records}
    if extra := sorted((set(message.content) ^ records) | untyped | (asked ^ keys)):
        raise IcmoeError(Fault(number=301, value=", ".join(extra)[:80], did=NOTHING_SENT))
    site = site_of(context, str(config[STUDY_KEY]))
    study = site.approved(config[STUDY_KEY])
    round_number = config.get(ROUND_KEY, 1)
    receipts = {key: receipt_of(config[key]) for key in (RECEIPT_KEY, AUDIT_RECEIPT_KEY) if key in config}
    if type(round_number) is not int or not 1 <= round_number <= study.rounds:  # True is an int, and no round
        limit = f"1 to {study.rounds}"
        raise IcmoeError(
            Fault(number=301, where=site.name, what="round is outside the study", value=str(round_number), limit=limit)
        )
    if None in receipts.values():
        raise IcmoeError(Fault(number=301, where=site.name, what="receipt cannot be read", did=NOTHING_SENT))
    torch.set_num_threads(site.threads)
    return Request(
        site=site,
        study=study,
        kind=kind,
        round_number=round_number if rounds else 0,
        message=message,
        receipt=receipts.get(RECEIPT_KEY),
        audit_receipt=receipts.get(AUDIT_RECEIPT_KEY),
    )


def incoming_of(request: Request) -> State:
    """Return the round's global tensors, or refuse what is none.

    Raises
    ------
    IcmoeError
        301 where one is no array of float32.
    """
    found = tensors_in(request.message.content.array_records[ARRAYS])
    if none := [name for name, array in found.items() if array is None or array.dtype != np.float32]:
        what, value = "tensors are no arrays of float32", ", ".join(none)[:80]
        raise IcmoeError(Fault(number=301, where=request.site.name, what=what, value=value, did=NOTHING_SENT))
    return {name: torch.from_numpy(array.copy()) for name, array in found.items() if array is not None}


def model_of(request: Request, start: State) -> ICMoE:
    """Return the incoming model with the site's own parts in it, on its device.

    Raises
    ------
    IcmoeError
        As `load_state` and `with_personal`.
    """
    site, study, kind, round_number = request.site, request.study, request.kind, request.round_number
    model = _model_to_fill(study, site.torch_device())
    model.zero_grad(set_to_none=True)
    load_state(model, start)
    if site.records is not None:
        accept(site.records, study, request.about(), start)
    if study.aggregation.personal:
        after_round = round_number if kind == "evaluate" else round_number - 1
        load_state(model, with_personal(start, site.state_folder, study, site.name, after_round))
    return model.eval()


@lru_cache(maxsize=1)
def _model_to_fill(study: Study, device: torch.device) -> ICMoE:
    """Return a model that each message fills anew: an actor of a rehearsal plays hundreds of sites."""
    return build_model(study, seed=0).to(device)


def _answering(site_of: SiteOf, kind: str, handle: Handler) -> Callable[[Message, Context], Message]:
    """Return what answers one kind of message; every exception is replaced by a number and its title before it leaves."""

    def answer(message: Message, context: Context) -> Message:
        request = None
        try:
            request = _request(site_of, kind, message, context)
            return release(request, handle(request))
        except IcmoeError as error:
            log.error("%s", error)
            return decline(error.faults[0].number, message, request)
        except Exception as error:
            fault = cause_of(error)
            log.exception("%s", fault)
            return decline(fault.number, message, request)

    return answer


def at_hospital(context: Context, digest: str) -> Participant:
    """Return the hospital's site; from here on this process ends with its parent, and at the study's deadline."""
    end_with_parent(os.getppid())
    end_after(START_S)
    site = site_from_environment(context, digest)
    end_after(site.studies[0].deadline_s)
    return site


tag_own_lines()
app = make_client_app(at_hospital)
