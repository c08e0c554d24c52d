"""The tensors of a message as one array and back."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors import SafetensorError
from safetensors.numpy import load, save

from icmoe.packing import (
    HEADER_BYTES,
    NUMPY,
    PACKED,
    array_of,
    bytes_of,
    is_plain,
    pack,
    pack_records,
    packed_bytes,
    plain_view,
    unpack,
    unpack_records,
)

TENSORS = st.dictionaries(
    st.text(st.characters(codec="ascii", min_codepoint=33), min_size=1, max_size=20),
    arrays(np.float32, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)),
    min_size=1,
    max_size=5,
).filter(lambda tensors: "__metadata__" not in tensors)


def record_of(tensors: dict[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor) for name, tensor in tensors.items()})


@given(TENSORS)
def test_tensors_come_back_with_names_shapes_and_bits(tensors: dict[str, np.ndarray]) -> None:
    content = RecordDict({"update": record_of(tensors), "config": ConfigRecord({"study": "x"})})
    pack_records(content, ArrayRecord, Array)
    assert list(content["update"]) == [PACKED]
    assert content["config"] == ConfigRecord({"study": "x"})
    once = content["update"][PACKED].data
    pack_records(content, ArrayRecord, Array)
    assert content["update"][PACKED].data == once
    unpack_records(content)
    found = {name: array.numpy() for name, array in content["update"].items()}
    assert list(found) == sorted(tensors)
    assert all(found[name].shape == tensors[name].shape for name in tensors)
    assert all(found[name].tobytes() == tensors[name].tobytes() for name in tensors)


@given(TENSORS)
def test_equal_tensors_are_equal_bytes_in_any_order(tensors: dict[str, np.ndarray]) -> None:
    assert pack(tensors).tobytes() == pack(dict(reversed(tensors.items()))).tobytes()


@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "d"]),
        arrays(st.sampled_from([np.float32, np.int8, np.int64, np.dtype(">f4")]), array_shapes(min_dims=0, max_side=4)),
    )
)
def test_packed_bytes_are_those_of_the_library(tensors: dict[str, np.ndarray]) -> None:
    expected = save({name: np.asarray(tensors[name], order="C") for name in sorted(tensors)})
    assert pack(tensors).tobytes() == expected
    assert packed_bytes(tensors) == bytes_of(pack(tensors)) == Array(pack(tensors)).data


def test_tensors_are_read_where_they_lie() -> None:
    packed = pack({"a": np.arange(3, dtype=np.int8), "b": np.ones((2, 2), np.float32)})
    found = unpack(packed)
    assert found is not None
    assert all(np.shares_memory(tensor, packed) and not tensor.flags.writeable for tensor in found.values())


def headed(entries: list[tuple[str, int, int]]) -> np.ndarray:
    """Return sixteen bytes behind a head that says of each name where its tensor of float32 begins and ends."""
    told = (
        f'"{name}":{{"dtype":"F32","shape":[{(end - start) // 4}],"data_offsets":[{start},{end}]}}'
        for name, start, end in entries
    )
    head = f"{{{','.join(told)}}}".encode()
    return np.frombuffer(len(head).to_bytes(8, "little") + head + np.arange(4, dtype=np.float32).tobytes(), np.uint8)


PLACES = st.sampled_from([0, 4, 8, 12, 16])


@given(st.lists(st.tuples(st.sampled_from("abc"), PLACES, PLACES), min_size=1, max_size=4))
@example([("a", 8, 16), ("b", 8, 16), ("a", 0, 8)])
@example([("a", 16, 16), ("a", 0, 16)])
def test_any_head_is_read_or_refused_as_the_library_does(entries: list[tuple[str, int, int]]) -> None:
    packed = headed([(name, min(one, two), max(one, two)) for name, one, two in entries])
    try:
        expected = {name: tensor.tolist() for name, tensor in load(packed.tobytes()).items()}
    except SafetensorError:
        expected = None
    found = unpack(packed)
    assert (found and {name: tensor.tolist() for name, tensor in found.items()}) == expected


GOOD = pack({"weight": np.ones(3, np.float32)})
NOT_PACKED = {
    "nothing": np.zeros(0, np.uint8),
    "cut short": GOOD[:-1],
    "text": np.frombuffer(b"\x80\x04K\x01.not safetensors", np.uint8),
    "another type": GOOD.astype(np.int16),
    "another shape": GOOD[None],
    "a header longer than the bytes": np.frombuffer(b"\xff" * 8 + b"{}", np.uint8),
}


@pytest.mark.parametrize("name", NOT_PACKED)
def test_what_is_not_packed_is_left_for_the_checks_of_names_to_refuse(name: str) -> None:
    assert unpack(NOT_PACKED[name]) is None
    content = RecordDict({"update": ArrayRecord({PACKED: Array(NOT_PACKED[name])})})
    unpack_records(content)
    assert list(content["update"]) == [PACKED]


NO_ARRAYS = {
    "nothing": (b"", "numpy.ndarray"),
    "a pickle": (b"\x80\x04K\x01.", "numpy.ndarray"),
    "an archive": (b"PK\x05\x06" + bytes(18), "numpy.ndarray"),
    "a broken header": (b"\x93NUMPY\x01\x00\x10\x00{'descr': bad   ", "numpy.ndarray"),
    "another way to write": (b"abc", "pickle"),
}


@pytest.mark.parametrize("name", NO_ARRAYS)
def test_bytes_that_are_no_array_neither_raise_nor_unpack(name: str) -> None:
    data, kind = NO_ARRAYS[name]
    content = RecordDict({"update": ArrayRecord({PACKED: Array("uint8", (3,), kind, data)})})
    assert array_of(content["update"][PACKED]) is None
    unpack_records(content)
    assert list(content["update"]) == [PACKED]


@given(st.binary(max_size=200))
def test_any_bytes_behind_the_head_of_an_array_are_an_array_or_none(data: bytes) -> None:
    found = array_of(Array("uint8", (3,), "numpy.ndarray", b"\x93NUMPY\x01\x00" + data))
    assert found is None or isinstance(found, np.ndarray)


@given(
    arrays(st.sampled_from([np.float32, np.float64, np.int64, np.uint8, np.dtype(">f4")]), array_shapes(min_dims=0, max_dims=5))
)
def test_an_array_is_read_without_a_copy_as_flower_reads_it(tensor: np.ndarray) -> None:
    found = array_of(Array(tensor))
    assert found is not None
    assert found.dtype == tensor.dtype
    np.testing.assert_array_equal(found, tensor)
    if tensor.dtype.isnative:
        assert not found.flags.writeable
        assert not found.flags.owndata, "a view of the message"
        assert Array(tensor.dtype.name, tensor.shape, NUMPY, bytes_of(tensor)).data == Array(tensor).data


@pytest.mark.parametrize("cut", [1, 4, 40, 127])
def test_bytes_that_are_too_few_or_too_many_are_no_view(cut: int) -> None:
    whole = Array(np.ones(10, np.float32))
    assert array_of(Array("float32", (10,), NUMPY, whole.data[:-cut])) is None
    longer = array_of(Array("float32", (10,), NUMPY, whole.data + b"1" * cut))
    assert longer is None or longer.shape == (10,), "NumPy's own reader looks no further than the array"


def test_columns_first_and_long_headers_are_read_by_numpy_itself() -> None:
    columns = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    record = np.zeros(3, dtype=[(f"a_long_name_of_a_field_{number}", np.float32) for number in range(9)])
    for tensor in (columns, record):
        found = array_of(Array(tensor))
        assert found is not None
        np.testing.assert_array_equal(found, tensor)


@given(st.integers(0, 200), st.integers(0, 255), st.sampled_from([(3,), (3, 2), (2, 3), ()]), st.booleans())
def test_what_is_plain_to_the_letter_is_read_as_that_array(at: int, value: int, shape: tuple[int, ...], longer: bool) -> None:
    """A byte is changed, or one more is there: what still counts as plain is an array of the type and shape asked for."""
    data = bytearray(bytes_of(np.arange(6, dtype=np.float32).reshape(3, 2)))
    if at < len(data):
        data[at] = value
    item = Array("float32", (3, 2), NUMPY, bytes(data) + b"x" * longer)
    if is_plain(item, np.dtype(np.float32), shape):
        found = array_of(item)
        assert found is not None
        assert plain_view(item, np.dtype(np.float32), shape).tobytes() == found.tobytes()
        assert (found.dtype, found.shape) == (np.dtype(np.float32), shape)
    else:
        assert longer or shape != (3, 2) or at < HEADER_BYTES, "whatever the values are"
