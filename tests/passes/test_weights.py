"""The weight store: every dtype and place reads back exactly, and nothing untrusted gets past it."""

from __future__ import annotations

import ntpath
import os
import posixpath
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from intaglio.passes.errors import InputError
from intaglio.passes.weights import (
    SPOOL_THRESHOLD_BYTES,
    TENSOR_FIELDS,
    WeightStore,
    check_location,
    is_external,
    set_external,
    tensors,
)

NUMERIC = sorted(value for name, value in TensorProto.DataType.items() if name not in ("UNDEFINED", "STRING") and "FLOAT6" not in name)
PACKED = {TensorProto.UINT4: 2, TensorProto.INT4: 2, TensorProto.FLOAT4E2M1: 2, TensorProto.UINT2: 4, TensorProto.INT2: 4}

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def values(data_type: int, shape: tuple[int, ...]) -> np.ndarray:
    """Small whole numbers, which every type holds exactly."""
    dtype = helper.tensor_dtype_to_np_dtype(data_type)
    return (np.arange(np.prod(shape, dtype=int)) % 2).reshape(shape).astype(dtype)


def as_typed(raw: TensorProto, array: np.ndarray) -> TensorProto:
    """The same tensor in the typed fields instead of raw data."""
    if raw.data_type in PACKED:
        packed = np.frombuffer(raw.raw_data, np.uint8)
        return TensorProto(name=raw.name, data_type=raw.data_type, dims=raw.dims, int32_data=packed.tolist())
    return helper.make_tensor(raw.name, raw.data_type, raw.dims, array.flatten().tolist())


def external(folder: Path, array: np.ndarray, offset: int = 0, name: str = "w") -> TensorProto:
    """`array` in w.bin of `folder`, between other bytes."""
    tensor = numpy_helper.from_array(array, name)
    payload = tensor.raw_data
    tensor.ClearField("raw_data")
    (folder / "w.bin").write_bytes(bytes(offset) + payload + b"tail")
    set_external(tensor, "w.bin", offset, len(payload))
    return tensor


def altered(tensor: TensorProto, **entries: str | None) -> TensorProto:
    """A copy with some external data entries changed, or removed (None)."""
    copy = TensorProto()
    copy.CopyFrom(tensor)
    known: dict[str, str | None] = {entry.key: entry.value for entry in tensor.external_data} | entries
    del copy.external_data[:]
    for key, value in known.items():
        if value is not None:
            copy.external_data.add(key=key, value=value)
    return copy


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes()
    assert not found.flags.writeable


@given(st.sampled_from(NUMERIC), shapes, st.integers(0, 70))
def test_every_type_reads_the_same_from_every_place(data_type: int, shape: tuple[int, ...], offset: int) -> None:
    array = values(data_type, shape)
    raw = numpy_helper.from_array(array, "w")
    with tempfile.TemporaryDirectory() as folder, WeightStore(Path(folder)) as store:
        for tensor in (raw, as_typed(raw, array), external(Path(folder), array, offset)):
            assert_same(store.read(tensor), array)
            assert store.payload(tensor) == raw.raw_data
            assert store.nbytes(tensor) == len(raw.raw_data)


def test_strings_read_and_have_no_payload() -> None:
    tensor = TensorProto(name="s", data_type=TensorProto.STRING, dims=[2], string_data=[b"ab", "é".encode()])
    store = WeightStore(None)
    assert store.read(tensor).tolist() == ["ab", "é"]
    assert store.nbytes(tensor) == 4
    with pytest.raises(ValueError, match="no raw data"):
        store.payload(tensor)


def test_external_data_is_mapped_and_not_kept(tmp_path: Path) -> None:
    tensor = external(tmp_path, np.arange(6, dtype=np.float32).reshape(2, 3), offset=3)
    array = WeightStore(tmp_path).read(tensor)
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[:3] + np.full(6, 7, np.float32).tobytes())
    assert (array == 7).all(), "a view of the file sees the file change"


def test_absent_offset_and_length_are_zero_and_implied(tmp_path: Path) -> None:
    array = np.arange(3, dtype=np.int64)
    assert_same(WeightStore(tmp_path).read(altered(external(tmp_path, array), offset=None, length=None)), array)


def test_a_file_in_a_sub_folder_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "model" / "data").mkdir(parents=True)
    tensor = external(tmp_path / "model" / "data", np.ones(2, np.float32))
    link = tmp_path / "link"
    link.symlink_to("model")  # how the user reached the model's folder is the user's business
    store = WeightStore(link)
    for location in ("data/w.bin", "./data//w.bin"):
        assert_same(store.read(altered(tensor, location=location)), np.ones(2, np.float32))
    assert store.files == {"data/w.bin": tmp_path / "model" / "data" / "w.bin"}


LOCATIONS = [
    *("", ".", "..", "../w.bin", "a/../../w.bin", "a/..", "/etc/passwd", "//host/w.bin", "C:\\w.bin", "C:w.bin", "\\w.bin"),
    *("a\\..\\w.bin", "\\\\host\\share\\w.bin", "w.bin\0", "spool:", "spool:0123456789abcdef", "file:///etc/passwd"),
]


@pytest.mark.parametrize("location", LOCATIONS)
def test_locations_outside_the_folder_are_refused(tmp_path: Path, location: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    external(tmp_path, np.ones(2, np.float32))
    tensor = altered(external(folder, np.ones(2, np.float32)), location=location)
    with WeightStore(folder) as store:
        store.enable_spooling(tmp_path)
        store.spool("big", np.zeros(SPOOL_THRESHOLD_BYTES + 1, np.uint8))
        with pytest.raises(InputError, match=r"tensor 'w': external data location .* stays inside the model's folder"):
            store.check(tensor)


@given(st.lists(st.sampled_from(["..", ".", "/", "\\", ":", "a", "b c", "\0", "\n", "é"]), max_size=6).map("".join))
def test_an_accepted_location_stays_inside(location: str) -> None:
    try:
        check_location(location)
    except InputError:
        return
    for flavour in (posixpath, ntpath):
        inside = flavour.normpath(flavour.join("/model", location))
        assert inside.startswith(("/model/", "\\model\\"))


@pytest.mark.parametrize("kind", ["file", "folder", "dangling"])
def test_symbolic_links_are_refused(tmp_path: Path, kind: str) -> None:
    secret, folder = tmp_path / "secret", tmp_path / "model"
    secret.mkdir()
    folder.mkdir()
    tensor = external(secret, np.ones(2, np.float32))
    if kind == "folder":
        (folder / "data").symlink_to(secret)
    else:
        (folder / "w.bin").symlink_to(secret / ("w.bin" if kind == "file" else "absent"))
    with pytest.raises(InputError, match="symbolic link, expected a real file; copy it there"):
        WeightStore(folder).read(altered(tensor, location="data/w.bin" if kind == "folder" else "w.bin"))


def test_a_symbolic_link_inside_the_folder_is_refused_too(tmp_path: Path) -> None:
    tensor = external(tmp_path, np.ones(2, np.float32))
    (tmp_path / "alias.bin").symlink_to("w.bin")
    with pytest.raises(InputError, match=r"alias\.bin: is or passes a symbolic link"):
        WeightStore(tmp_path).check(altered(tensor, location="alias.bin"))


def test_hard_links_are_refused(tmp_path: Path) -> None:
    tensor = external(tmp_path, np.ones(2, np.float32))
    os.link(tmp_path / "w.bin", tmp_path / "other.bin")
    with pytest.raises(InputError, match=r"w\.bin: has 2 hard links, expected one; copy it there"):
        WeightStore(tmp_path).check(tensor)


def test_a_file_swapped_for_a_link_after_the_check_is_refused_when_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tensor = external(folder, np.ones(2, np.float32))
    store = WeightStore(folder)
    store.check(tensor)
    (folder / "w.bin").rename(tmp_path / "w.bin")
    (folder / "w.bin").symlink_to(tmp_path / "w.bin")
    for read in (store.read, store.payload):
        with pytest.raises(InputError, match="symbolic link"):
            read(tensor)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    tensor = external(tmp_path, np.ones(2, np.float32))
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for a writer, forever
    for location in ("folder", "pipe"):
        with pytest.raises(InputError, match="expected a regular file"):
            WeightStore(tmp_path).check(altered(tensor, location=location))
    for location in ("absent.bin", "w.bin/below", "x" * 300):
        with pytest.raises(InputError, match="expected a regular file; put it beside the model"):
            WeightStore(tmp_path).check(altered(tensor, location=location))


@pytest.mark.parametrize("key", ["offset", "length"])
@pytest.mark.parametrize("text", ["-1", "", "x", "1.0", "0x8", " 8", "+8", "1_0", "８", "9" * 20, "9" * 5000])
def test_offsets_and_lengths_that_are_no_natural_numbers_are_refused(tmp_path: Path, key: str, text: str) -> None:
    tensor = altered(external(tmp_path, np.ones(2, np.float32)), **{key: text})
    with pytest.raises(InputError, match=f"tensor 'w': external data {key} .*expected a whole number >= 0"):
        WeightStore(tmp_path).check(tensor)


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"length": "4"}, r"length 4 in 'w\.bin', expected 8 bytes for FLOAT \[2\]"),
        ({"length": "12"}, r"length 12 in 'w\.bin', expected 8 bytes"),
        ({"offset": "5"}, r"ends at byte 13 of 'w\.bin', expected at most its 12 bytes; fetch the complete"),
        ({"offset": "9223372036854775807"}, "ends at byte 9223372036854775815"),
    ],
)
def test_ranges_that_do_not_fit_are_refused(tmp_path: Path, entries: dict[str, str], match: str) -> None:
    with pytest.raises(InputError, match=match):
        WeightStore(tmp_path).check(altered(external(tmp_path, np.ones(2, np.float32)), **entries))


def test_truncated_data_files_are_refused(tmp_path: Path) -> None:
    tensor = external(tmp_path, np.ones(2, np.float32))
    os.truncate(tmp_path / "w.bin", 7)
    with pytest.raises(InputError, match="ends at byte 8 of"):
        WeightStore(tmp_path).read(tensor)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    tensor = external(tmp_path, np.ones(2, np.float32))
    tensor.external_data.add(key="location", value="../w.bin")
    with pytest.raises(InputError, match="key given twice"):
        WeightStore(tmp_path).check(tensor)


def test_external_data_without_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="came without a folder; load it from its file"):
        WeightStore(None).check(external(tmp_path, np.ones(2, np.float32)))


def test_external_strings_are_refused(tmp_path: Path) -> None:
    tensor = external(tmp_path, np.ones(2, np.float32))
    tensor.data_type = TensorProto.STRING
    with pytest.raises(InputError, match="strings cannot be external data"):
        WeightStore(tmp_path).check(tensor)


HUGE: list[list[int]] = [[2**62, 8], [2**31, 2**31, 2**31], [-1], [2**62, 2**62, 0], [1] * 65]


@pytest.mark.parametrize("dims", HUGE)
def test_impossible_shapes_are_refused(tmp_path: Path, dims: list[int]) -> None:
    embedded = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=b"1234")
    outside = external(tmp_path, np.ones(2, np.float32))
    outside.dims[:] = dims
    for tensor in (embedded, outside):
        with pytest.raises(InputError, match=r"tensor 'w': shape .* the file is corrupt"):
            WeightStore(tmp_path).check(tensor)


def test_a_huge_declared_size_is_refused_without_allocation(tmp_path: Path) -> None:
    outside = altered(external(tmp_path, np.ones(2, np.float32)), length=None)
    outside.dims[:] = [2**40]
    embedded = TensorProto(name="w", data_type=TensorProto.INT8, dims=[2**40], raw_data=b"1234")
    for tensor in (outside, embedded):
        with pytest.raises(InputError, match=r"tensor 'w'.*expected"):
            WeightStore(tmp_path).read(tensor)


@given(st.sampled_from(NUMERIC), st.lists(st.integers(1, 5), max_size=2), st.booleans(), st.booleans())
def test_embedded_values_must_fill_the_shape_exactly(data_type: int, shape: list[int], typed: bool, longer: bool) -> None:
    array = values(data_type, tuple(shape))
    tensor = numpy_helper.from_array(array, "w")
    if typed:
        tensor = as_typed(tensor, array)
        field: Any = getattr(tensor, helper.tensor_dtype_to_field(data_type))
        field[:] = [*field, field[0]] if longer else field[:-1]
    else:
        tensor.raw_data = tensor.raw_data + b"x" if longer else tensor.raw_data[:-1]
    with pytest.raises(InputError, match=r"tensor 'w': \d+ .*, expected \d+ for .* truncated or corrupt"):
        WeightStore(None).read(tensor)


@pytest.mark.parametrize("data_type", [TensorProto.UNDEFINED, 999])
def test_unknown_types_are_refused(data_type: int) -> None:
    tensor = TensorProto(name="w", dims=[1], raw_data=b"1", data_type=data_type)
    with pytest.raises(InputError, match="tensor 'w': element type"):
        WeightStore(None).check(tensor)


def test_segments_and_broken_strings_are_refused() -> None:
    tensor = numpy_helper.from_array(np.ones(2, np.float32), "w")
    tensor.segment.begin = 0
    with pytest.raises(InputError, match="stored in segments"):
        WeightStore(None).check(tensor)
    with pytest.raises(InputError, match="tensor 's': string is not UTF-8"):
        WeightStore(None).read(TensorProto(name="s", data_type=TensorProto.STRING, dims=[1], string_data=[b"\xff"]))


def test_error_messages_stay_on_one_line(tmp_path: Path) -> None:
    tensor = altered(external(tmp_path, np.ones(2, np.float32), name="a\nb"), location="c\n/../d")
    with pytest.raises(InputError) as raised:
        WeightStore(tmp_path).check(tensor)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("data_type", [TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.INT4, TensorProto.BOOL])
def test_spooled_tensors_read_back(tmp_path: Path, data_type: int) -> None:
    large = values(data_type, (3, SPOOL_THRESHOLD_BYTES))
    with WeightStore(None) as store:
        store.enable_spooling(tmp_path)
        spooled = [store.spool(f"w{index}", large[:, ::step]) for index, step in enumerate((1, -1))]
        assert all(is_external(tensor) and not tensor.HasField("raw_data") for tensor in spooled)
        for tensor, array in zip(spooled, (large, large[:, ::-1]), strict=True):
            assert_same(store.read(tensor), np.ascontiguousarray(array))
            assert store.payload(tensor) == numpy_helper.from_array(array).raw_data
        assert not store.files
        kept = store.read(spooled[0])
    assert_same(kept, large)
    assert not list(tmp_path.iterdir())


def test_small_arrays_and_stores_without_a_spool_embed(tmp_path: Path) -> None:
    small, large = (np.zeros(SPOOL_THRESHOLD_BYTES + more, np.uint8) for more in (0, 1))
    with WeightStore(None) as store:
        assert store.spool("w", large) == numpy_helper.from_array(large, "w")
        store.enable_spooling(tmp_path)
        assert store.spool("w", small) == numpy_helper.from_array(small, "w")
        assert is_external(store.spool("w", large))


def test_one_store_cannot_read_what_another_spooled(tmp_path: Path) -> None:
    with WeightStore(tmp_path) as first, WeightStore(tmp_path) as second:
        first.enable_spooling(tmp_path)
        second.enable_spooling(tmp_path)
        tensor = first.spool("w", np.zeros(SPOOL_THRESHOLD_BYTES + 1, np.uint8))
        second.spool("w", np.zeros(SPOOL_THRESHOLD_BYTES + 1, np.uint8))
        with pytest.raises(InputError, match="external data location"):
            second.read(tensor)


def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = WeightStore(None)
    store.enable_spooling(tmp_path)
    with pytest.raises(RuntimeError, match="already enabled"):
        store.enable_spooling(tmp_path)
    tensor = store.spool("w", np.zeros(SPOOL_THRESHOLD_BYTES + 1, np.uint8))
    store.close()
    store.close()
    with pytest.raises(RuntimeError, match="closed"):
        store.read(tensor)


def test_a_spool_folder_that_cannot_be_used_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file or directory; name a folder that can be written"):
        WeightStore(None).enable_spooling(tmp_path / "absent")


def test_a_full_disk_is_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("/dev/full").open("r+b", buffering=0) as full, WeightStore(None) as store:
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: full)
        store.enable_spooling(tmp_path)
        with pytest.raises(InputError, match=r"tensor 'w': cannot spool 1048577 bytes: No space left.*; free space"):
            store.spool("w", np.zeros(SPOOL_THRESHOLD_BYTES + 1, np.uint8))


def test_the_registry_of_fields_covers_the_format() -> None:
    """Every path from a model to a tensor, as the installed onnx declares it."""
    reaches = {"TensorProto"}
    declared: dict[str, list[tuple[str, str]]] = {}
    stack = [onnx.ModelProto.DESCRIPTOR]
    while stack:
        descriptor = stack.pop()
        if descriptor.name not in declared:
            below = [field for field in sorted(descriptor.fields, key=lambda field: field.number) if field.message_type]
            declared[descriptor.name] = [(field.name, field.message_type.name) for field in below]
            stack += [field.message_type for field in below]
    while grown := {name for name, below in declared.items() if reaches & {kind for _, kind in below}} - reaches:
        reaches |= grown
    expected = {
        name: tuple(field for field, kind in below if kind in reaches)
        for name, below in declared.items()
        if name in reaches and name != "TensorProto"
    }
    assert expected == TENSOR_FIELDS


def test_tensors_are_found_everywhere() -> None:
    def tensor(name: str) -> TensorProto:
        return numpy_helper.from_array(np.zeros(1, np.float32), name)

    def sparse(name: str) -> onnx.SparseTensorProto:
        return helper.make_sparse_tensor(tensor(name), helper.make_tensor("", TensorProto.INT64, [1], [0]), [1])

    def constant(name: str) -> onnx.NodeProto:
        return helper.make_node("Constant", [], ["c"], value=tensor(name))

    inner = helper.make_graph([constant("nested node")], "inner", [], [], [tensor("nested initializer")])
    nodes = [constant("node"), helper.make_node("If", ["c"], ["y"], then_branch=inner), helper.make_node("F", [], ["z"])]
    nodes[2].attribute.append(helper.make_attribute("list", [tensor("list item")]))
    nodes[2].attribute.append(helper.make_attribute("graphs", [inner]))
    nodes[2].attribute.append(helper.make_attribute("sparse", sparse("sparse attribute")))
    graph = helper.make_graph(nodes, "g", [], [], [tensor("initializer")], sparse_initializer=[sparse("sparse initializer")])
    function = helper.make_function("d", "F", [], ["c"], [constant("function node")], [helper.make_opsetid("", 21)])
    function.attribute_proto.append(helper.make_attribute("default", tensor("function default")))
    model = helper.make_model(graph, functions=[function])
    model.training_info.add().algorithm.initializer.append(tensor("training"))
    names = [found.name for found in tensors(model)]
    assert names == [
        *("node", "nested node", "nested initializer", "list item", "nested node", "nested initializer"),
        *("sparse attribute", "", "initializer", "sparse initializer", "", "training", "function node", "function default"),
    ]
    assert [found.name for found in tensors(inner)] == ["nested node", "nested initializer"]
    next(tensors(model)).name = "renamed"
    assert model.graph.node[0].attribute[0].t.name == "renamed", "the tensors themselves, not copies"
