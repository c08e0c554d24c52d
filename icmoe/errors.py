"""Numbered errors: what happened, the value, the limit, what the system did, what to do next.

Ranges: ICM1xx data, 2xx study and configuration, 3xx network and deployment, 4xx privacy, 5xx server and runs.
A number is never reused; a retired one stays in the catalogue with the word "retired".
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from rich.console import Console
from rich.text import Text

NOT_STARTED = "Nothing was started."
NOTHING_SENT = "Nothing was trained, nothing was sent."
"""What a site did where it refused before its part of a round."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A catalogue line: the title of an error number and its usual remedy."""

    title: str
    remedy: str


CATALOGUE: dict[int, Entry] = {
    101: Entry("image is missing", "Restore the file or remove its row from the split."),
    102: Entry("image cannot be read", "Export the image again; PNG, 8 or 16 bit, one channel is expected."),
    103: Entry("mask is missing", "Add the mask or remove the row from the split."),
    104: Entry("mask cannot be read", "Export the mask again; PNG with one channel is expected."),
    105: Entry("mask and image differ in size", "Export mask and image on the same pixel grid."),
    106: Entry("mask holds a value that no label of the study names", "Name the value in [[study.labels]] or correct the mask."),
    107: Entry(
        "one patient stands in two splits", "Give each patient to one of train, val and test; scores would lie otherwise."
    ),
    108: Entry("site has no usable image", "Look at the exclusions listed for the site."),
    109: Entry(
        "data folder does not have the expected layout",
        "Expected DIR/<site>/images, DIR/<site>/masks and DIR/splits/{train,val,test}.csv.",
    ),
    110: Entry("split file cannot be used", "Expected columns split, site, patient, slice, image, mask."),
    111: Entry(
        "cached features were damaged",
        "Start again, at a hospital after prepare: they are computed anew. If it recurs, check the disk.",
    ),
    112: Entry("image is listed twice", "Keep one of the rows."),
    113: Entry("image has no contrast", "A constant image teaches nothing; check the export."),
    114: Entry("pixel spacing is not usable", "Give positive millimetres in all three spacing columns, or leave them out."),
    115: Entry("phantoms cannot be written", "Name a new or empty folder in a place you may write to."),
    116: Entry("file is of no form that is read", "Nothing, or remove it from the export."),
    117: Entry("file is damaged or outside the limits", "Export it again."),
    118: Entry("pixels cannot be decoded", "Export the image again, uncompressed if need be."),
    119: Entry("object holds no picture", "Nothing: such objects are passed over."),
    120: Entry("mask names no class of the study", "Name its segments under [ingest.labels] in the site file."),
    121: Entry("mask does not fit its image", "Draw or export the mask on the image's own grid."),
    122: Entry(
        "mask and image are not one to one",
        "Let the mask refer to its image, or put it beside it under the same name; exclude copies and second readings.",
    ),
    123: Entry("mask has no image", "Export the images that it was drawn on into the same folder."),
    124: Entry("image has no mask", "Nothing, or add its mask: without one it cannot be trained on."),
    125: Entry("picture is there twice", "Nothing: one of them is used."),
    126: Entry(
        "text may be burned into the picture",
        "Look at it (fl_client which S-... names its files), then name its series under allow in the site file.",
    ),
    127: Entry(
        "patient shares pictures with a patient of another split", "Check whether they are one person; give them one number."
    ),
    128: Entry("another mask of these images was preferred", "Exclude the preferred one in the site file to use this."),
    129: Entry("ingest folder cannot be used", "Name a folder that this user owns, or remove the damaged file."),
    130: Entry("ingest is running already", "Wait for the other process, or stop it."),
    131: Entry("ingest has not been run", "Run fl_client --site NAME ingest."),
    132: Entry("patient was forgotten on request", "Nothing: the patient's files are not read again."),
    140: Entry("input holds no image", "Name a DICOM, NIfTI or PNG file, or a folder that holds some."),
    141: Entry("output is there already", "Name another --output, or replace a former prediction with --force."),
    142: Entry("series is incomplete", "Export it again; a segmentation that lacks slices would mislead."),
    143: Entry("format cannot hold this series", "Choose another --format: png holds everything."),
    144: Entry("exported model gives other probabilities", "Use the model file itself, and report the case."),
    201: Entry("key is not known", "Use the suggested key or remove the line."),
    202: Entry("value is outside its allowed range or of another type", "Give a value in the allowed range."),
    203: Entry("required key is missing", "Add the key."),
    204: Entry("file is not readable TOML", "Correct the syntax at the named position."),
    205: Entry("file cannot be opened", "Check the path and the permissions."),
    206: Entry(
        "backbone weights have another digest",
        "Use the file that the study names, or change the study with everybody's agreement.",
    ),
    207: Entry("backbone weights are not there", "Install or name the weights as shown in README, section Backbones."),
    208: Entry("model file was written for another version", "Use the version of icmoe-federated that wrote it."),
    209: Entry("model file is damaged or is not an IC-MoE model", "Fetch the file again and compare its digest."),
    210: Entry("option does not fit the others", "Change one of the options named."),
    211: Entry("device is not available", "Use --device cpu, or install a CUDA build of PyTorch and its driver."),
    212: Entry("study is for tests only", "Approve the real study, or set allow_test_only = true in the site file of a test."),
    213: Entry("optional packages are not installed", "Install icmoe-federated[dicom]."),
    214: Entry("site does not share a summary", "Nothing, or set share_summary = true in its site file."),
    215: Entry("model is not the study's final one", "Take the file that the coordinator handed out for this study."),
    216: Entry("case of a split file is not in the data", "Name the folder of the data set that the split file was made for."),
    217: Entry("file is not the results of a rehearsal", "Name a folder that run_sim.py --out wrote, or the results.json in it."),
    220: Entry("file is there already", "Name another file, or replace it with --force."),
    221: Entry("answer is missing", "Give it as an option, or answer the question on a terminal."),
    301: Entry(
        "message carries something the study does not allow",
        "Install the same version at coordinator and site and approve the same study.",
    ),
    302: Entry(
        "study is not approved at this site", "Compare the digests; approve the study at the site if it is the agreed one."
    ),
    303: Entry("this platform is not supported", "Use Linux on x86-64 (Windows through WSL2) with Python 3.11 or newer."),
    304: Entry("site did not finish its part of a round", "Read the site's own log; the coordinator only sees this number."),
    306: Entry("private file can be read by others", "Make it readable by its owner only, or make it anew."),
    307: Entry(
        "key is of the wrong kind", "Make one with fl_client --site NAME init: NIST curve, OpenSSH format, no passphrase."
    ),
    308: Entry("certificate is not trusted", "Compare the kit's digest with the coordinator; ask for a new kit if it differs."),
    309: Entry("certificate has expired or expires soon", "The coordinator renews it with fl_server provision --renew."),
    310: Entry("start kit or request cannot be used", "Ask for it again and compare its digest or fingerprint by telephone."),
    311: Entry("coordinator cannot be reached", "Check the address, the firewall and the outbound proxy with the hospital's IT."),
    312: Entry("port does not answer as the coordinator's should", "Check the port; the coordinator checks its reverse proxy."),
    313: Entry("clock differs from the coordinator's", "Synchronise this machine's clock by NTP."),
    314: Entry("site is not admitted", "Send request.json to the coordinator, who runs fl_server admit."),
    315: Entry("machine has too little room", "Free some, or move cache and state to another disk."),
    316: Entry("no study is approved at this site", "Approve one: fl_client --site NAME approve STUDY.toml."),
    317: Entry(
        "app bundle differs from the site's installed package",
        "Install the same version of icmoe-federated at coordinator and site; the site runs nothing else.",
    ),
    318: Entry(
        "installed package changed since the study was approved", "Look at the new version, then approve the study again."
    ),
    319: Entry("study breaks the site's policy", "Agree on another study, or change [policy] in the site file."),
    320: Entry(
        "site does not take part at this hour", "Nothing: the round goes on without it. The hours stand in the site file."
    ),
    321: Entry("site's records are damaged or were changed", "Restore the file from a backup, and find out who changed it."),
    322: Entry(
        "global model is outside its bounds", "Compare its digest with the other hospitals; do not go on before it is explained."
    ),
    323: Entry(
        "site's process ended before it answered", "Read the site's own log: the time was over, the memory was, or it was killed."
    ),
    324: Entry(
        "connection to the coordinator was refused or lost",
        "Nothing at first: it is tried again. If it lasts, ask the coordinator.",
    ),
    325: Entry("site cannot be started", "Correct what is named; another fl_client of the site may be running."),
    326: Entry("coordinator's folder is incomplete", "Run fl_server provision, or name its output folder with --home."),
    328: Entry("supervised process ended", "Nothing, it is started again; if it recurs, read its log above."),
    329: Entry("port is in use", "Stop the other process, or change superlink_port in consortium.toml."),
    330: Entry("SuperLink does not answer", "Start it: fl_server superlink --home DIR --exec."),
    331: Entry("site is not the one registered with its key", "Name the site in its site file as it was admitted."),
    332: Entry("site is not connected", "Ask the hospital to look at fl_client --site NAME."),
    333: Entry(
        "site's key is not, or no longer, registered at the coordinator",
        "Ask the coordinator. A revoked key never comes back: fl_client --site NAME init --kit KIT --new-key makes another.",
    ),
    334: Entry(
        "site ran out of memory",
        "Free memory on its device: smaller parts were tried, down to one slice.",
    ),
    335: Entry("site cannot read or write its own files", "Read the site's log: a disk may be gone, or rights have changed."),
    336: Entry("site's data changed while it trained", "Nothing: asked again, the site trains with what it has now."),
    401: Entry("frozen backbone changed during training", "Do not use the result; report the case with the two digests."),
    402: Entry(
        "site's patients do not fit the study's privacy", "Agree on other constants under [privacy.site], or leave the site out."
    ),
    403: Entry("no noise keeps the study's epsilon", "Allow more epsilon, or fewer steps and rounds."),
    404: Entry("part of the model or of the loss mixes samples", "Leave it out: clipping each patient would promise nothing."),
    410: Entry(
        "site has no privacy budget",
        "Write [budget] with epsilon and delta into the site file, as the data protection officer says.",
    ),
    411: Entry(
        "study would cross the site's privacy budget",
        "Agree on fewer rounds or more noise, or let the data protection officer raise [budget].",
    ),
    412: Entry(
        "ledger is damaged or was changed", "Restore the newest backup; do not delete it: spent epsilon cannot be undone."
    ),
    413: Entry(
        "ledger is older than what the site has sent",
        "Restore the newest backup of the site's state folder; nothing is trained with an older one.",
    ),
    414: Entry("ledger is of another site", "Give each site a state folder of its own."),
    415: Entry("ledger is in use", "Wait for the other process of this site, or stop it."),
    416: Entry("release is not what the study declares", "Read the site's log, which says what was held back; report it."),
    417: Entry(
        "study without differential privacy does not fit a privacy budget",
        "Agree on a study with [privacy.site], or remove [budget]: then nothing is promised to patients.",
    ),
    418: Entry("site's ledger went back", "Ask the hospital to restore the newest backup of its state folder."),
    420: Entry("study's privacy budget at the server would be crossed", "Give fewer rounds, more noise or a larger epsilon."),
    421: Entry("noise on the count is too small for the study's noise", "Raise count_noise, or leave out clip_quantile."),
    425: Entry("private step does not keep its promise", "Send nothing; report the case with the check's figures."),
    426: Entry("model cannot be audited", "Name the model of one study; a mixture is audited member by member."),
    501: Entry("no site delivered a usable update", "Look at the sites' errors; the global model was kept."),
    502: Entry("run folder is in use or holds another run", "Choose another --out, or continue the same run with --resume."),
    503: Entry("simulation stopped before its end", "Continue with --resume after removing the cause."),
    504: Entry("update was refused", "Look at the named tensor at the site; the round went on without it."),
    505: Entry("Ray cluster cannot be reached", "Check --address, or leave it out to start a cluster on this machine."),
    506: Entry("study is running already", "Wait for it, or stop it: fl_server stop RUN."),
    507: Entry("run failed", "Remove the cause and run the study again: it goes on after its last round."),
    508: Entry("run is not known", "List the runs: fl_server list."),
    509: Entry("run was stopped", "Run the study again: it goes on after its last round."),
    510: Entry("run did not end in time", "Look at fl_server status; the run was not stopped."),
    511: Entry("update is too large", "Look at the site's training; raise [guard] in the study only with everybody's agreement."),
    512: Entry("update was sent before", "Look at the site: it sent an old update again."),
    513: Entry("update came after its round had ended", "Nothing; if it recurs, lengthen deadline_s."),
    514: Entry("site sits out after refused updates", "Find the cause with the hospital, then run fl_server lift SITE RUN."),
    515: Entry("round stayed below its quorum", "See which sites are missing, then run the study again: it goes on there."),
    516: Entry("coordinator's audit log was changed or is damaged", "Restore it from a backup, and find out who changed it."),
    517: Entry("committed state was damaged", "Nothing: an older one was used and rounds are repeated. Check the disk."),
    518: Entry("site does not sit out", "Nothing; see fl_server status --json for who does."),
    520: Entry("results belong to other data", "Score them where the data are that they were made of."),
    521: Entry(
        "page was asked for under a name that is not its own",
        "Open it as printed at its start, or add the name with --allow-host.",
    ),
    522: Entry("token is missing or is another", "Open the page once by the whole address that was printed at its start."),
    523: Entry("file that the page shows cannot be read", "Nothing: the rest of the page holds. If it recurs, check the disk."),
    524: Entry(
        "study has no folder here", "See which there are with fl_server list, or leave the study out: the newest is shown."
    ),
    525: Entry("result of a rival cannot be continued", "Choose another --out, or remove the file."),
    526: Entry("results of rivals do not belong together", "Keep the results of one study and one set of data in a folder."),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong.

    Parameters
    ----------
    number
        Key of `CATALOGUE`.
    where
        File, site or option concerned; never a patient's name.
    what
        What happened, if the catalogue's title does not say it all.
    value
        The offending value.
    limit
        What is allowed, or the value expected.
    did
        What the system did about it.
    todo
        What to do next; the catalogue's remedy where empty.
    """

    number: int
    where: str = ""
    what: str = ""
    value: str = ""
    limit: str = ""
    did: str = ""
    todo: str = ""

    def __str__(self) -> str:
        """Return the fault as one line."""
        entry = CATALOGUE[self.number]
        sentence = f"ICM{self.number} " + (f"{self.where}: " if self.where else "") + (self.what or entry.title)
        if self.value:
            sentence += f": {self.value}"
        if self.limit:
            sentence += f" (allowed: {self.limit})"
        return printable(" ".join(filter(None, [sentence.rstrip(".") + ".", self.did, self.todo or entry.remedy])))

    def record(self) -> dict[str, str | int]:
        """Return the fault as plain values for JSON."""
        return {**asdict(self), "sentence": str(self)}


def printable(text: str) -> str:
    """Return the text in one line that commands no terminal: it may quote what came from another machine."""
    return text if text.isprintable() else "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class IcmoeError(Exception):
    """One or more faults that stop the work; all that were found are reported together.

    Parameters
    ----------
    *faults
        At least one fault.
    """

    def __init__(self, *faults: Fault) -> None:
        if not faults:
            raise ValueError("IcmoeError needs at least one fault")
        self.faults: tuple[Fault, ...] = faults
        super().__init__("\n".join(str(fault) for fault in faults))

    def __reduce__(self) -> tuple[type[IcmoeError], tuple[Fault, ...]]:
        """Return how to rebuild the error in another process."""
        return (type(self), self.faults)


def print_faults(faults: Sequence[Fault], *, stderr: bool = True) -> None:
    """Print one line per fault, the number in colour where there is a terminal."""
    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    for fault in faults:
        number, _, rest = str(fault).partition(" ")
        console.print(Text.assemble((number, "bold red"), " ", rest))


def file_fault(error: OSError) -> Fault:
    """Return what an error of the file system says: the disk is full, or a folder may not be read or written to."""
    value, did = error.strerror or type(error).__name__, "The command stopped there."
    where = str(error.filename or "")
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        todo = "Make room, or name a place on another disk."
        return Fault(number=205, where=where, what="file cannot be written", value=value, did=did, todo=todo)
    return Fault(number=205, where=where, value=value, did=did)


def faults_of(error: IcmoeError | OSError) -> tuple[Fault, ...]:
    """Return the faults of an error that a person is told of."""
    return error.faults if isinstance(error, IcmoeError) else (file_fault(error),)


@contextmanager
def exit_on_fault() -> Iterator[None]:
    """Turn an `IcmoeError` or an error of the file system into its lines and exit code 1: nobody sees a traceback for bad input.

    Yields
    ------
    None
    """
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read the output has seen enough
    except (IcmoeError, OSError) as error:
        print_faults(faults_of(error))
        sys.exit(1)
