"""Valid content made wrong, for the tests of what arrives from elsewhere: bytes changed, cut and moved; fields changed.

``ICMOE_FUZZ`` draws so many examples per test anew; without it the same few are drawn each time.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from icmoe.errors import CATALOGUE, IcmoeError

T = TypeVar("T")
Tree = dict[str, Any]

WANTED = int(os.environ.get("ICMOE_FUZZ", "0"))
CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def fuzz(examples: int) -> settings:
    """Return settings under which a test draws so many examples, always the same ones."""
    count = WANTED or examples
    return settings(max_examples=count, derandomize=not WANTED, database=None, deadline=None, suppress_health_check=CHECKS)


def accepted(read: Callable[[], T]) -> T | None:
    """Return what was read, None where it was refused by number in printable lines; whatever else is raised, passes through."""
    try:
        return read()
    except IcmoeError as error:
        for fault in error.faults:
            assert fault.number in CATALOGUE
            assert str(fault).isprintable(), repr(str(fault))
        return None


# What a message can carry: texts in UTF-8, whole numbers of 64 bits, any double.
TEXTS = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.sampled_from(["", "\n", "\x1b[2J", "a\nICM999 b", "../../etc/passwd", "0" * 64, "x" * 300, "[" * 100, "٣", "\x00", "-0"]),
)
WHOLE = st.integers(-(2**63), 2**64 - 1) | st.sampled_from([-1, 0, 1, 2, 10, 2**31, 2**53, 2**63])
REAL = st.floats(width=64) | st.sampled_from([0.0, -0.0, 1.0, 0.5, 1e308, -1e308, 5e-324, 1e-9])
SCALARS = st.one_of(st.none(), st.booleans(), WHOLE, REAL, TEXTS)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=4
)


def nested(depth: int) -> list[Any]:
    """Return a list in a list in a list."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def bytes_of(draw: st.DrawFn, content: bytes) -> bytes:
    """Return the content with one to four things done to it, anywhere, at its head or at its end."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(data)) | st.integers(0, min(64, len(data))) | st.integers(0, min(4096, len(data))))
        length = draw(st.integers(0, 16))
        what = draw(st.sampled_from(["flip", "put", "cut", "end", "repeat", "deep"]))
        if what == "flip" and data:
            data[place % len(data)] ^= 1 << draw(st.integers(0, 7))
        elif what == "put":
            data[place : place + length] = draw(
                st.binary(max_size=16) | st.sampled_from([b"\xff", b"9" * 5000, b"\n", b'"', b"}"])
            )
        elif what == "cut":
            del data[place : place + length]
        elif what == "end":
            del data[place:]
        elif what == "repeat":
            data[place:place] = data[place : place + 4 * length]
        else:
            data[place:place] = draw(st.sampled_from([b"[", b'{"a":', b"{a="])) * draw(st.sampled_from([3, 400, 20_000]))
    return bytes(data)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in _places(inner, (*path, key)))]


def _near(value: Any) -> st.SearchStrategy[Any]:
    """Return values like this one: another sign, another size, another type."""
    found = [str(value), [value], {"value": value}, None, not value]
    if isinstance(value, int | float):
        found += [value + 1, value - 1, -value, -2 * value, value * 10, value / 3, float(value), 10**6 * value, 1e308, -1e308]
    if isinstance(value, str):
        found += [value + "\n", value.upper(), value[1:], value * 50, value + "\x1b", " " + value]
    if isinstance(value, list):
        found += [value[:-1], value * 2, value * 40, list(reversed(value)), nested(20), nested(150)]
    return st.sampled_from(found)


@st.composite
def fields_of(draw: st.DrawFn, tree: Tree) -> Tree:
    """Return plain values with one to three fields changed, left out, added or renamed, at any depth."""
    root: Tree = {"root": copy.deepcopy(tree)}
    for _ in range(draw(st.integers(1, 3))):
        places = _places(root["root"], ("root",))
        *way, last = draw(st.sampled_from([one for one in places if len(one) <= 2]) | st.sampled_from(places))
        above: Any = root
        for key in way:
            above = above[key]
        _change(draw, above, last, whole=not way)
        if not isinstance(root["root"], dict):
            root["root"] = {"": root["root"]}
    return root["root"]


def _change(draw: st.DrawFn, above: Any, key: Any, *, whole: bool) -> None:
    """Do one thing to a field of a table or to an item of a list; the whole cannot be left out."""
    old = above[key]
    what = draw(st.sampled_from(["near", "any", "add"] if whole else ["near", "any", "add", "out", "rename", "swap"]))
    if what == "near":
        above[key] = draw(_near(old))
    elif what == "any":
        above[key] = draw(VALUES)
    elif what == "add" and isinstance(old, dict):
        old[draw(TEXTS)] = draw(VALUES)
    elif what == "add" and isinstance(old, list):
        old.append(draw(VALUES))
    elif what == "out":
        del above[key]
    elif what == "rename" and isinstance(above, dict):
        above[draw(TEXTS)] = above.pop(key)
    elif what == "swap" and isinstance(above, dict):
        other = draw(st.sampled_from(sorted(above)))
        above[key], above[other] = above[other], old


def toml(tree: Tree) -> str:
    """Return plain values as TOML, every table in line; what is None is left out, as TOML has no word for it."""
    return "".join(f"{_text(key)} = {_inline(value)}\n" for key, value in tree.items() if value is not None)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(key)} = {_inline(inner)}" for key, inner in value.items() if inner is not None) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_inline(inner) for inner in value if inner is not None) + "]"
    return _text(value) if isinstance(value, str) else str(value).lower()


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
