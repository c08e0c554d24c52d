"""The content of a valid message made wrong: its records, their names and types, arrays in claims and bytes, numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from fuzzing import TEXTS, VALUES, WHOLE, bytes_of, fields_of
from hypothesis import assume
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from icmoe.packing import PACKED, array_of, pack_records

DTYPES = st.sampled_from(
    ["float32", ">f4", "float64", "float16", "int64", "bool", "complex64", "U3", "S2", "V0", "M8[s]", "i4,f4"]
)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def copied(content: RecordDict) -> RecordDict:
    """Return a content whose arrays and records can be changed without harm to the one it was made of."""
    return recorddict_from_proto(recorddict_to_proto(content))


@st.composite
def arrays_made_wrong(draw: st.DrawFn, array: Array) -> Array:
    """Return an array with other claims, other bytes, or both."""
    what = draw(st.sampled_from(["bytes", "claims", "other", "values", "header"]))
    if what == "bytes":
        return Array(array.dtype, array.shape, array.stype, draw(bytes_of(array.data)))
    if what == "claims":
        shape = draw(st.lists(st.integers(-1, 2**40), max_size=3).map(tuple) | st.just(array.shape))
        return Array(draw(TEXTS | st.just(array.dtype)), shape, draw(TEXTS | st.just(array.stype)), array.data)
    if what == "other":
        dtype = np.dtype(draw(DTYPES))
        return Array(np.zeros(draw(SHAPES), dtype=dtype) if dtype.itemsize == 0 else draw(arrays.arrays(dtype, SHAPES)))
    if what == "header":
        claimed = draw(st.sampled_from([b"(9999999999999,)", b"(-1,)", b"(2**40,)", b"()", b"[3]", b"(1e9,)"]))
        text = b"{'descr': '<f4', 'fortran_order': False, 'shape': " + claimed + b", }"
        head = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
        return Array(array.dtype, array.shape, array.stype, head + array.data[128:])
    found = array_of(array)
    if found is None or found.dtype.kind != "f" or not found.size:
        return array
    values = found.copy()
    values.reshape(-1)[draw(st.integers(0, values.size - 1))] = draw(st.floats(width=16) | st.floats(width=32))
    return Array(values)


def _record_of(kind: type, values: dict[str, Any]) -> Any:
    """Return as much of the values as Flower's type of record takes."""
    record = kind()
    for key, value in values.items():
        try:
            record[key] = value
        except TypeError:
            continue
    return record


def _values_of(record: Any) -> dict[str, Any]:
    return dict(record)


@st.composite
def contents_of(draw: st.DrawFn, right: Callable[[], RecordDict]) -> RecordDict:
    """Return the content of a message with one to three things made wrong, as the wire would carry it."""
    wrong = copied(right())
    if draw(st.booleans()):
        pack_records(wrong, ArrayRecord, Array)
    for _ in range(draw(st.sampled_from([1, 1, 2, 3]))):
        name = draw(st.sampled_from(sorted(wrong) or [""]))
        what = draw(st.sampled_from(["inside", "inside", "inside", "rename", "out", "add", "other type"]))
        if what == "add" or name not in wrong:
            kind = draw(st.sampled_from([MetricRecord, ConfigRecord, ArrayRecord]))
            wrong[draw(TEXTS)] = _record_of(kind, {draw(TEXTS): draw(VALUES)})
        elif what == "inside" and isinstance(wrong[name], ArrayRecord):
            wrong[name] = draw(_arrays_of(wrong[name]))
        elif what == "inside":
            wrong[name] = _record_of(type(wrong[name]), draw(fields_of(_values_of(wrong[name]))))
        elif what == "rename":
            wrong[draw(TEXTS)] = wrong.pop(name)
        elif what == "out":
            del wrong[name]
        else:
            kind = draw(st.sampled_from([MetricRecord, ConfigRecord, ArrayRecord]))
            wrong[name] = _record_of(kind, {key: draw(WHOLE | TEXTS) for key in [PACKED, *list(wrong[name])[:2]]})
    try:
        return copied(wrong)
    except (ValueError, TypeError):  # refused before anything here sees it: tests/test_arriving.py
        assume(False)
        raise


@st.composite
def _arrays_of(draw: st.DrawFn, record: ArrayRecord) -> ArrayRecord:
    found = dict(record)
    if not found:
        return ArrayRecord({draw(TEXTS): Array(np.zeros(2, np.float32))})
    name = draw(st.sampled_from(sorted(found)))
    what = draw(st.sampled_from(["array", "array", "array", "rename", "out", "add"]))
    if what == "array":
        found[name] = draw(arrays_made_wrong(found[name]))
    elif what == "add":
        found[draw(TEXTS)] = found[name]
    else:
        one = found.pop(name)
        found |= {draw(TEXTS): one} if what == "rename" else {}
    return ArrayRecord(found)
