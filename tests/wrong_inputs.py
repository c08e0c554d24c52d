"""What people type wrongly, as one table; test_wrong_inputs.py runs it and compares deploy/wrong-inputs.md with it."""

from __future__ import annotations

from dataclasses import dataclass

ALDER = "--site Alder --config site.toml"
OUT = "--out new"
TINY = "--backbone sam-vit-test --image-size 64"


@dataclass(frozen=True)
class Wrong:
    """One wrong command line: what is the matter with it, the numbers that are printed, and the exit code."""

    matter: str
    typed: str
    numbers: tuple[int, ...]
    code: int = 1
    says: str = ""
    """A part of what is printed: the suggestion, or the value."""
    hemmed_in: bool = False
    """Run where permissions hold, also for root, and where the folder `full` has no room."""
    beside: bool = False
    """Whether a table is printed beside the sentences."""
    leaves: frozenset[str] = frozenset()
    """Files that are written all the same."""

    @property
    def program(self) -> str:
        return self.typed.split()[0]

    @property
    def words(self) -> list[str]:
        return self.typed.split()[1:]


def usage(typed: str, number: int, says: str = "", matter: str = "unknown option") -> Wrong:
    return Wrong(matter, typed, (number,), code=2, says=says)


def barred(matter: str, typed: str, code: int = 1, says: str = "Permission denied") -> Wrong:
    return Wrong(matter, typed, (205,), code, says=says, hemmed_in=True)


USAGE = [
    usage(f"fl_client {ALDER} check --jsn", 201, "--json"),
    usage("fl_client --sit Alder", 201, "--site"),
    usage("fl_server check study.toml --jason", 201, "--json"),
    usage("fl_server run study.toml --hom home", 201, "--home"),
    usage("icmoe predict --modle m.safetensors", 201, "--model"),
    usage("run_sim.py --method router-aware", 201, "--methods"),
    usage(f"fl_client {ALDER} aprove study.toml", 201, "'approve'", "unknown command"),
    usage("fl_server dashbord --home home", 201, "'dashboard'", "unknown command"),
    usage("icmoe evalute --model m.safetensors", 201, "'evaluate'", "unknown command"),
    usage("run_sim.py demo", 210, "demo", "unknown command"),
    usage(f"fl_client {ALDER} approve", 203, "STUDY", "argument missing"),
    usage("fl_server list", 203, "--home", "option missing"),
    usage("icmoe evaluate --model m.safetensors", 203, "--data", "option missing"),
    usage("run_sim.py --rounds", 210, "--rounds", "value missing"),
    usage(f"fl_client {ALDER} audit digest last", 202, "'last'", "no number"),
    usage("fl_server expiry --home home --days soon", 202, "'soon'", "no number"),
    usage("icmoe audit-privacy --canaries 1", 202, "--canaries", "number out of range"),
    usage("run_sim.py --rounds few", 202, "'few'", "no number"),
]
"""Mistakes that are seen before any file is opened."""

NOWHERE = [
    Wrong("path does not exist", "fl_client --site Alder --config nowhere.toml check", (205,), beside=True, says="nowhere.toml"),
    Wrong("path does not exist", f"fl_client {ALDER} approve nowhere.toml", (205,)),
    Wrong("path does not exist", f"fl_client {ALDER} init --kit nowhere", (205,)),
    Wrong("path does not exist", f"fl_client {ALDER} personalise tiny --model nowhere.safetensors", (205,)),
    Wrong("path does not exist", "fl_server check nowhere.toml", (205,)),
    Wrong("path does not exist", f"fl_server provision nowhere.toml {OUT}", (205,)),
    Wrong("path does not exist", "fl_server run study.toml --home nowhere", (205,)),
    Wrong("path does not exist", "fl_server admit nowhere.json --home home", (205,)),
    Wrong("path does not exist", "fl_server dashboard --home nowhere", (205,)),
    Wrong("path does not exist", "icmoe evaluate --model nowhere.safetensors --data data", (205,)),
    Wrong("path does not exist", "icmoe evaluate --model model.safetensors --data nowhere", (109,)),
    Wrong("path does not exist", "icmoe predict --model model.safetensors --input nowhere --output new", (109,)),
    Wrong("path does not exist", "icmoe compare nowhere results.json", (205,)),
    Wrong("path does not exist", f"run_sim.py --data nowhere {TINY} {OUT}", (109,)),
    Wrong("path does not exist", f"run_sim.py --scenario nowhere.toml {OUT}", (205,)),
    Wrong("path does not exist", f"run_sim.py --backbone sam-vit-b --checkpoint nowhere.pth {OUT}", (207,)),
]

OTHER_KIND = [
    Wrong("folder instead of a file", "fl_client --site Alder --config folder check", (205,), beside=True),
    Wrong("folder instead of a file", f"fl_client {ALDER} approve folder", (205,)),
    Wrong("folder instead of a file", "fl_server check folder", (205,)),
    Wrong("folder instead of a file", f"fl_server provision folder {OUT}", (205,)),
    Wrong("folder instead of a file", "fl_server new-study folder --force", (220,)),
    Wrong("folder instead of a file", "icmoe evaluate --model folder --data data", (205,)),
    Wrong("folder instead of a file", "icmoe export --model model.safetensors --output folder --force", (141,)),
    Wrong("folder instead of a file", f"run_sim.py --scenario folder {OUT}", (205,)),
    Wrong("file instead of a folder", f"fl_client {ALDER} init --kit photo.jpg", (205,)),
    Wrong("file instead of a folder", "fl_server run study.toml --home photo.jpg", (205,)),
    Wrong("file instead of a folder", "fl_server provision consortium.toml --out photo.jpg", (205,)),
    Wrong("file instead of a folder", "icmoe evaluate --model model.safetensors --data photo.jpg", (109,)),
    Wrong("file instead of a folder", "icmoe predict --model model.safetensors --input data --output photo.jpg", (141,)),
    Wrong("file instead of a folder", f"run_sim.py --data photo.jpg {TINY} {OUT}", (109,)),
    Wrong("file instead of a folder", f"run_sim.py {TINY} --out photo.jpg", (205,)),
]

OTHER_TYPE = [
    Wrong("JPEG as site file", "fl_client --site Alder --config photo.jpg check", (204,), beside=True),
    Wrong("JPEG as study", f"fl_client {ALDER} approve photo.jpg", (204,)),
    Wrong("JPEG as study", "fl_server check photo.jpg", (204,)),
    Wrong("JPEG as study", "fl_server run photo.jpg --home home", (204,)),
    Wrong("JPEG as consortium", f"fl_server provision photo.jpg {OUT}", (204,)),
    Wrong("JPEG as request", "fl_server admit photo.jpg --home home", (310,)),
    Wrong("JPEG as model", "icmoe evaluate --model photo.jpg --data data", (209,)),
    Wrong("JPEG as model", "icmoe predict --model photo.jpg --input data --output new", (209,)),
    Wrong("JPEG as model", "icmoe export --model photo.jpg --output new.pt", (209,)),
    Wrong("JPEG as model", "icmoe audit-privacy --model photo.jpg", (209,)),
    Wrong("JPEG as DICOM", "icmoe predict --model model.safetensors --input photo.jpg --output new", (140,)),
    Wrong("JPEGs as DICOM", "icmoe predict --model model.safetensors --input photos --output new", (140,)),
    Wrong("JPEGs as DICOM", "fl_client --site Alder --config photos.toml ingest --dry-run", (116, 108), beside=True),
    Wrong("JPEG as results", "icmoe compare photo.jpg results.json", (217,)),
    Wrong("JPEG as scenario", f"run_sim.py --scenario photo.jpg {OUT}", (204,)),
    Wrong("JPEG as weights", f"run_sim.py --data data --backbone sam-vit-b --checkpoint photo.jpg {OUT}", (207,), beside=True),
    Wrong("consortium as study", "fl_server check consortium.toml", (202, 203, 203, 203, 201, 201)),
    Wrong("empty file as site file", "fl_client --site Alder --config empty check", (203,), beside=True),
    Wrong("empty file as study", "fl_server check empty", (203,) * 4),
    Wrong("empty file as model", "icmoe evaluate --model empty --data data", (209,)),
    Wrong("empty file as DICOM", "icmoe predict --model model.safetensors --input empty --output new", (140,)),
    Wrong("empty file as results", "icmoe compare empty results.json", (217,)),
    Wrong("empty folder as data", "icmoe evaluate --model model.safetensors --data folder", (109,)),
    Wrong("empty folder as data", f"run_sim.py --data folder {TINY} {OUT}", (109,) * 3),
    Wrong("empty folder as DICOM", "icmoe predict --model model.safetensors --input folder --output new", (140,)),
]

NO_PERMISSION = [
    barred("not permitted to read", "fl_client --site Alder --config closed/site.toml check", 2, "not readable"),
    barred("not permitted to read", "fl_server check closed/study.toml", 2, "not readable"),
    barred("not permitted to read", "icmoe evaluate --model closed/model.safetensors --data data", 2, "not readable"),
    barred("not permitted to read", f"run_sim.py --scenario closed/scenario.toml {OUT}", 2, "not readable"),
    barred("not permitted to write", "fl_server provision consortium.toml --out sealed/new"),
    barred("not permitted to write", "fl_server new-study sealed/new.toml --labels lesion=1 --name new"),
    barred("not permitted to write", "icmoe export --model model.safetensors --output sealed/new.pt"),
    barred("not permitted to write", f"run_sim.py {TINY} --out sealed/new"),
    barred("no room on the disk", "fl_server provision consortium.toml --out full/new", says="No space left"),
    barred("no room on the disk", "icmoe export --model model.safetensors --output full/new.pt", says="No space left"),
    Wrong("no room on the disk", f"run_sim.py {TINY} --out full/new", (115,), says="No space left", hemmed_in=True),
]

FLWR = frozenset({"home/coordinator/flwr/config.toml"})
"""How Flower's own command line reaches this SuperLink; written before it is asked."""
NOBODY_THERE = [
    Wrong("coordinator does not answer", "fl_client --site Alder --config joined.toml check", (311, 207), beside=True),
    Wrong("SuperLink is not running", "fl_server run study.toml --home home", (330,), leaves=FLWR),
    Wrong("SuperLink is not running", "fl_server list --home home", (330,), leaves=FLWR),
    Wrong("SuperLink is not running", "fl_server stop 1 --home home", (330,), leaves=FLWR),
    Wrong("SuperLink is not running", "fl_server admit Alder/request.json --home home", (311,)),
    Wrong("Ray cluster does not answer", f"run_sim.py {TINY} --address 127.0.0.1:1 {OUT}", (505,)),
]

TABLE = [*USAGE, *NOWHERE, *OTHER_KIND, *OTHER_TYPE, *NO_PERMISSION, *NOBODY_THERE]

HEAD = """\
# Wrong inputs and what is printed

From the table in `tests/wrong_inputs.py`; `tests/test_wrong_inputs.py` runs every line, checks that nothing is written and no
traceback shown, and compares this page (`ICMOE_UPDATE=1` with that test writes it anew). `folder` is an empty folder,
`empty` an empty file, `photo.jpg` a JPEG, `sealed` a folder that may not be written to, `full` a disk without room; nobody
listens on port 1. Tables and progress that are printed beside the sentences are left out.

| situation | typed | printed | exit code |
| --- | --- | --- | ---: |
"""


def row(wrong: Wrong, printed: tuple[str, ...]) -> str:
    """One line of the page."""
    told = "<br>".join(line.replace("|", "\\|").replace("<", "&lt;") for line in printed)
    return f"| {wrong.matter} | `{wrong.typed}` | {told} | {wrong.code} |"
