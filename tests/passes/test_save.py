"""Saving: nothing is lost, the size is known beforehand, and the files appear completely or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from intaglio.passes.errors import InputError
from intaglio.passes.load import load
from intaglio.passes.model import Model
from intaglio.passes.save import EXTERNAL_THRESHOLD_BYTES, save, serialized_size
from intaglio.passes.session import open_session, to_array, to_value
from intaglio.passes.weights import ALIGNMENT_BYTES, SPOOL_THRESHOLD_BYTES, WeightStore, is_external, tensors

NUMERIC = sorted(value for name, value in TensorProto.DataType.items() if name not in ("UNDEFINED", "STRING") and "FLOAT6" not in name)
FLOATS = 600  # values per tensor, more than EXTERNAL_THRESHOLD_BYTES as float32


def weight(seed: int, name: str = "w") -> TensorProto:
    array = np.random.default_rng(seed).standard_normal(FLOATS).astype(np.float32)
    return numpy_helper.from_array(array, name)


def value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [FLOATS])


def everything() -> onnx.ModelProto:
    """A runnable model with a tensor in every place, each larger than the threshold, and all that a writer could lose."""

    def plus(source: str, target: str, seed: int) -> list[onnx.NodeProto]:
        constant = helper.make_node("Constant", [], [f"{target}_c"], value=weight(seed, ""))
        return [constant, helper.make_node("Add", [source, f"{target}_c"], [target], doc_string="node's own")]

    def branch(seed: int) -> onnx.GraphProto:
        nodes = [*plus("b", "p", seed), helper.make_node("Add", ["p", "inner"], ["q"])]
        return helper.make_graph(nodes, "branch", [], [value("q")], [weight(seed + 1, "inner")])

    sparse = helper.make_sparse_tensor(weight(7, "s"), helper.make_tensor("", TensorProto.INT64, [FLOATS], range(FLOATS)), [4096])
    typed = helper.make_tensor("typed", TensorProto.FLOAT, [FLOATS], np.linspace(0, 1, FLOATS).tolist())
    nodes = [
        *plus("x", "a", 1),
        helper.make_node("F", ["a"], ["b"], domain="local"),
        helper.make_node("If", ["cond"], ["d"], then_branch=branch(2), else_branch=branch(4)),
        helper.make_node("Add", ["d", "w"], ["e"]),
        helper.make_node("Add", ["e", "typed"], ["y"]),
    ]
    initializers = [weight(6), typed, numpy_helper.from_array(np.array(True), "cond")]
    initializers[0].doc_string = "tensor's own"
    initializers[0].metadata_props.add(key="origin", value="layer1")
    graph = helper.make_graph(nodes, "g", [value("x")], [value("y")], initializers, sparse_initializer=[sparse])
    graph.value_info.append(value("a"))
    graph.quantization_annotation.add(tensor_name="w")
    function = helper.make_function("local", "F", ["i"], ["o"], plus("i", "o", 8), [helper.make_opsetid("", 21)])
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1), helper.make_opsetid("unused.domain", 3)]
    model = helper.make_model(graph, functions=[function], opset_imports=imports, ir_version=10, doc_string="model's own")
    model.metadata_props.add(key="names", value="{0: 'cat'}")
    model.producer_name = "exporter"
    return model


def old_style() -> onnx.ModelProto:
    """IR 3, where initializers are inputs as well."""
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "old", [value("x"), value("w")], [value("y")], [weight(0)])
    return helper.make_model(graph, ir_version=3, opset_imports=[helper.make_opsetid("", 7)])


def run(path: Path) -> np.ndarray:
    values = {"x": to_value(np.linspace(-1, 1, FLOATS, dtype=np.float32))}
    return to_array(open_session(path).run(["y"], values)[0])


def files(folder: Path) -> dict[str, bytes]:
    """Everything in `folder`: name → content (b"" for a folder)."""
    return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()}


def holder(tensor: TensorProto, weights: WeightStore) -> Model:
    """A model that is only there to hold `tensor`."""
    graph = helper.make_graph([], "g", [], [helper.make_tensor_value_info("w", tensor.data_type, None)], [tensor])
    return Model(proto=helper.make_model(graph), weights=weights, path=None, size_bytes=0, sha256="")


@pytest.mark.parametrize("make", [everything, old_style])
def test_an_unchanged_model_is_written_byte_for_byte(tmp_path: Path, make: Any) -> None:
    source = tmp_path / "in.onnx"
    source.write_bytes(make().SerializeToString(deterministic=True))
    written = save(load(source), tmp_path / "out.onnx", source=source)
    assert files(tmp_path)["out.onnx"] == files(tmp_path)["in.onnx"]
    assert written == source.stat().st_size


@pytest.mark.parametrize("make", [everything, old_style])
def test_going_external_and_back_changes_nothing(tmp_path: Path, make: Any) -> None:
    proto = make()
    proto.graph.initializer[0].doc_string = "survives"
    reference = load(proto)
    written = save(reference, tmp_path / "e.onnx", source=None, external=True)
    assert reference.proto == proto, "saving must not change the model"
    assert set(files(tmp_path)) == {"e.onnx", "e.onnx.data"}
    assert written == sum(map(len, files(tmp_path).values())) == serialized_size(reference, True, name="e.onnx")

    external = load(tmp_path / "e.onnx")
    assert external.size_bytes == written
    before = external.proto.SerializeToString()
    assert save(external, tmp_path / "b.onnx", source=None) == serialized_size(external, False)
    assert external.proto.SerializeToString() == before, "saving must not change the model"

    back = load(tmp_path / "b.onnx").proto
    for found, expected in zip(tensors(back), tensors(proto), strict=True):
        if expected.float_data:  # moving turns typed fields into raw data
            expected.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(expected), expected.name))
        assert found == expected
    assert back == proto
    onnx.save(proto, tmp_path / "reference.onnx")
    np.testing.assert_array_equal(run(tmp_path / "e.onnx"), run(tmp_path / "reference.onnx"))
    np.testing.assert_array_equal(run(tmp_path / "b.onnx"), run(tmp_path / "reference.onnx"))


def test_only_tensors_that_runtimes_read_from_outside_go_there(tmp_path: Path) -> None:
    save(load(everything()), tmp_path / "e.onnx", source=None, external=True)
    proto = onnx.load(tmp_path / "e.onnx", load_external_data=False)
    outside = [tensor for tensor in tensors(proto) if is_external(tensor)]
    inside = [tensor for tensor in tensors(proto) if not is_external(tensor)]
    assert len(outside) == 8
    assert [(tensor.name, list(tensor.dims)) for tensor in inside] == [("cond", []), ("s", [FLOATS]), ("", [FLOATS])]
    end = 0
    for tensor in outside:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries["location"] == "e.onnx.data"
        assert int(entries["offset"]) % ALIGNMENT_BYTES == 0
        assert end <= int(entries["offset"]) < end + ALIGNMENT_BYTES
        end = int(entries["offset"]) + int(entries["length"])
    assert end == (tmp_path / "e.onnx.data").stat().st_size


@pytest.mark.parametrize(("extra_bytes", "names"), [(0, {"m.onnx"}), (1, {"m.onnx", "m.onnx.data"})])
def test_tensors_up_to_the_threshold_stay_in_the_file(tmp_path: Path, extra_bytes: int, names: set[str]) -> None:
    tensor = numpy_helper.from_array(np.zeros(EXTERNAL_THRESHOLD_BYTES + extra_bytes, np.uint8), "w")
    save(holder(tensor, WeightStore(None)), tmp_path / "m.onnx", source=None, external=True)
    assert set(files(tmp_path)) == names


def test_attributes_of_other_operators_stay_embedded(tmp_path: Path) -> None:
    nodes = [helper.make_node(kind, [], [kind], value=weight(1), domain="custom") for kind in ("Constant", "Table")]
    proto = helper.make_model(helper.make_graph(nodes, "g", [], [value("Table")]), ir_version=8)
    proto.opset_import[0].version = 17
    proto.opset_import.append(helper.make_opsetid("custom", 1))
    save(load(proto), tmp_path / "m.onnx", source=None, external=True)
    assert set(files(tmp_path)) == {"m.onnx"}
    assert onnx.load(tmp_path / "m.onnx") == proto


@given(st.sampled_from(NUMERIC), st.integers(0, 2 * EXTERNAL_THRESHOLD_BYTES), st.booleans(), st.sampled_from([None, False, True]))
def test_every_type_and_size_survives(
    tmp_path_factory: pytest.TempPathFactory, data_type: int, count: int, from_external: bool, external: bool | None
) -> None:
    folder = tmp_path_factory.mktemp("m")
    array = (np.arange(count) % 2).astype(helper.tensor_dtype_to_np_dtype(data_type))
    tensor = numpy_helper.from_array(array, "w")
    if from_external:
        payload = tensor.raw_data
        tensor.ClearField("raw_data")
        (folder / "source.bin").write_bytes(b"xyz" + payload)
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="source.bin")
        tensor.external_data.add(key="offset", value="3")
    model = holder(tensor, WeightStore(folder))
    written = save(model, folder / "m.onnx", source=None, external=external)
    sizes = {name: len(content) for name, content in files(folder).items() if name != "source.bin"}
    assert written == sum(sizes.values()) == serialized_size(model, external, name="m.onnx")
    large = model.weights.nbytes(tensor) > EXTERNAL_THRESHOLD_BYTES
    assert ("m.onnx.data" in sizes) == (external is True and large)
    found = numpy_helper.to_array(onnx.load(folder / "m.onnx").graph.initializer[0])
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("external", [False, True])
def test_spooled_tensors_are_written_and_leave_no_trace(tmp_path: Path, external: bool) -> None:
    array = np.arange(SPOOL_THRESHOLD_BYTES, dtype=np.float32)
    (tmp_path / "spool").mkdir()
    (tmp_path / "out").mkdir()
    with WeightStore(None) as weights:
        weights.enable_spooling(tmp_path / "spool")
        model = holder(weights.spool("w", array), weights)
        written = save(model, tmp_path / "out" / "m.onnx", source=None, external=external)
        assert written == serialized_size(model, external, name="m.onnx")
        assert is_external(model.proto.graph.initializer[0])
    content = files(tmp_path / "out")
    assert written == sum(map(len, content.values()))
    assert b"spool" not in content["m.onnx"]
    assert str(tmp_path).encode() not in content["m.onnx"]
    (tensor,) = onnx.load(tmp_path / "out" / "m.onnx").graph.initializer
    assert (numpy_helper.to_array(tensor) == array).all()


def test_equal_models_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        save(load(everything()), tmp_path / name / "m.onnx", source=None, external=True)
    assert files(tmp_path / "first") == files(tmp_path / "second")


def test_over_the_limit_it_goes_external_and_runs_the_same(tmp_path: Path) -> None:
    model = load(everything())
    limit_bytes = model.size_bytes - 1
    save(model, tmp_path / "at.onnx", source=None, limit_bytes=model.size_bytes)
    save(model, tmp_path / "over.onnx", source=None, limit_bytes=limit_bytes)
    assert set(files(tmp_path)) == {"at.onnx", "over.onnx", "over.onnx.data"}
    np.testing.assert_array_equal(run(tmp_path / "at.onnx"), run(tmp_path / "over.onnx"))
    assert serialized_size(model, limit_bytes=limit_bytes, name="over.onnx") == sum(
        (tmp_path / name).stat().st_size for name in ("over.onnx", "over.onnx.data")
    )
    with pytest.raises(InputError, match=f"would have {model.size_bytes} bytes, expected at most {limit_bytes}; save with ext"):
        save(model, tmp_path / "no.onnx", source=None, external=False, limit_bytes=limit_bytes)
    with pytest.raises(InputError, match="shrink its attributes and small tensors"):
        serialized_size(model, True, limit_bytes=1000)


def test_fields_that_onnx_does_not_know_survive(tmp_path: Path) -> None:
    unknown = b"\xfa\x3f\x03abc"  # field 1023, three bytes
    proto = everything()
    for message in (proto, proto.graph, proto.graph.node[0], proto.functions[0]):
        message.MergeFromString(unknown)
    model = load(proto)
    for external in (False, True):
        save(model, tmp_path / "m.onnx", source=None, external=external)
        written = (tmp_path / "m.onnx").read_bytes()
        assert written.count(unknown) == 4
        assert written == onnx.ModelProto.FromString(written).SerializeToString(deterministic=True)
    save(model, tmp_path / "m.onnx", source=None)
    assert (tmp_path / "m.onnx").read_bytes() == proto.SerializeToString(deterministic=True)


class Interruption:
    """Lets the first `allowed` calls of a function pass and raises at the next one; calls after it pass again."""

    def __init__(self, function: Any, allowed: int, error: BaseException) -> None:
        self.function, self.allowed, self.error = function, allowed, error

    def __call__(self, *arguments: Any) -> Any:
        self.allowed -= 1
        if self.allowed == -1:
            raise self.error
        return self.function(*arguments)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("error", [FULL, PermissionError(errno.EACCES, "Permission denied"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize(("call", "allowed"), [("fsync", 0), ("fsync", 1), ("replace", 0), ("replace", 1), ("replace", 2)])
def test_a_failure_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, existing: bool, call: str, allowed: int
) -> None:
    if existing:
        save(load(old_style()), tmp_path / "m.onnx", source=None, external=True)
    elif allowed == 2:
        allowed = 0  # without old data there are two renames
    before = files(tmp_path)
    monkeypatch.setattr(os, call, Interruption(getattr(os, call), allowed, error))
    with pytest.raises((InputError, KeyboardInterrupt)) as raised:
        save(load(everything()), tmp_path / "m.onnx", source=None, external=True)
    if isinstance(error, OSError):
        assert f"m.onnx: {error.strerror}; free space or choose an output" in str(raised.value)
    assert files(tmp_path) == before


@pytest.mark.parametrize("error", [FULL, KeyboardInterrupt()])
@pytest.mark.parametrize("external", [False, True])
def test_a_failure_while_writing_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, external: bool
) -> None:
    save(load(old_style()), tmp_path / "m.onnx", source=None)
    save(load(everything()), tmp_path / "e.onnx", source=None, external=True)
    model = load(tmp_path / "e.onnx")
    before = files(tmp_path)
    monkeypatch.setattr(model.weights, "payload", Interruption(model.weights.payload, 3, error))
    with pytest.raises((InputError, KeyboardInterrupt)):
        save(model, tmp_path / "m.onnx", source=None, external=external)
    assert files(tmp_path) == before


def test_an_interrupt_after_the_last_rename_keeps_the_new_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(load(old_style()), tmp_path / "m.onnx", source=None, external=True)
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        rename(source, target)
        if target.suffix == ".onnx":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save(load(everything()), tmp_path / "m.onnx", source=None, external=True)
    assert set(files(tmp_path)) == {"m.onnx", "m.onnx.data"}
    assert load(tmp_path / "m.onnx").proto.graph.name == "g"


def test_existing_files_are_replaced(tmp_path: Path) -> None:
    for proto, external in ((everything(), True), (old_style(), True), (everything(), False)):
        save(load(proto), tmp_path / "m.onnx", source=None, external=external)
        assert load(tmp_path / "m.onnx").proto.graph.name == proto.graph.name


def test_new_files_get_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    save(load(everything()), tmp_path / "m.onnx", source=None, external=True)
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "usual").stat().st_mode}


def test_the_source_is_never_overwritten(tmp_path: Path) -> None:
    save(load(everything()), tmp_path / "m.onnx", source=None, external=True)
    (tmp_path / "link.onnx").symlink_to("m.onnx")
    os.link(tmp_path / "m.onnx", tmp_path / "twin.onnx")
    (tmp_path / "sub").mkdir()
    before = files(tmp_path)
    model = load(tmp_path / "m.onnx")
    for target in ("m.onnx", "sub/../m.onnx", "link.onnx", "twin.onnx", "m.onnx.data"):
        with pytest.raises(InputError, match="it belongs to the source model, which is kept; choose another name"):
            save(model, tmp_path / target, source=None)
    assert files(tmp_path) == before


def test_the_data_file_may_not_overwrite_a_source_either(tmp_path: Path) -> None:
    save(load(everything()), tmp_path / "m.onnx.data", source=None)
    with pytest.raises(InputError, match=r"cannot write .*m\.onnx\.data: it belongs to the source model"):
        save(load(everything()), tmp_path / "m.onnx", source=tmp_path / "m.onnx.data", external=True)
    save(load(everything()), tmp_path / "m.onnx", source=tmp_path / "m.onnx.data", external=False)


def test_targets_that_are_no_files_are_refused(tmp_path: Path) -> None:
    model = load(everything())
    (tmp_path / "m.onnx.data").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for target, match in (
        (tmp_path, "it is a folder, expected a file name"),
        (tmp_path / "m.onnx", r"m\.onnx\.data: it is a folder"),
        ("", "it is a folder"),
        (tmp_path / "pipe", "it is not a regular file"),
        (tmp_path / "absent" / "m.onnx", "No such file or directory; free space or choose"),
        (tmp_path / "back\\slash.onnx", "external data location"),
    ):
        with pytest.raises(InputError, match=match) as raised:
            save(model, target, source=None, external=True)
        assert "\n" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"m.onnx.data", "pipe"}
