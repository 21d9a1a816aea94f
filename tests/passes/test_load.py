"""Loading: what ONNX Runtime loads passes untouched, and every kind of bad model is one line that begins with its path."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from intaglio.passes.errors import InputError
from intaglio.passes.load import load, newest_opset
from intaglio.passes.save import PROTOBUF_LIMIT_BYTES
from intaglio.passes.session import open_session
from intaglio.passes.weights import set_external, tensors

W = np.arange(4, dtype=np.float32)


def value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4])


def model(*nodes: onnx.NodeProto, opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
    """y = x + w, or `nodes` from x to y."""
    body = nodes or (helper.make_node("Add", ["x", "w"], ["y"]),)
    graph = helper.make_graph(body, "g", [value("x")], [value("y")], [numpy_helper.from_array(W, "w")])
    return helper.make_model(graph, ir_version=ir_version, opset_imports=[helper.make_opsetid("", opset)])


def write(folder: Path, proto: onnx.ModelProto, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def externalized(folder: Path, proto: onnx.ModelProto) -> onnx.ModelProto:
    """`proto` with w in w.bin of `folder`."""
    tensor = proto.graph.initializer[0]
    (folder / "w.bin").write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    set_external(tensor, "w.bin", 0, W.nbytes)
    return proto


def message_for(source: str | Path | onnx.ModelProto) -> str:
    with pytest.raises(InputError) as raised:
        load(source)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    proto = model()
    path = write(tmp_path, proto)
    for source in (path, str(path)):
        loaded = load(source)
        assert loaded.proto == proto
        assert loaded.path == path
        assert loaded.size_bytes == path.stat().st_size
        assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_external_weights_stay_outside_and_count(tmp_path: Path) -> None:
    path = write(tmp_path, externalized(tmp_path, model()))
    loaded = load(path)
    (tensor,) = tensors(loaded.proto)
    assert not tensor.HasField("raw_data")
    assert (loaded.weights.read(tensor) == W).all()
    assert loaded.size_bytes == path.stat().st_size + W.nbytes
    assert load(path).sha256 == loaded.sha256
    (tmp_path / "w.bin").write_bytes((W + 1).tobytes())
    assert load(path).sha256 != loaded.sha256
    (tmp_path / "w.bin").write_bytes(W.tobytes() + b"more")
    assert load(path).size_bytes == loaded.size_bytes + 4


def test_a_shared_external_file_counts_once(tmp_path: Path) -> None:
    proto = externalized(tmp_path, model())
    twin = proto.graph.initializer.add()
    twin.CopyFrom(proto.graph.initializer[0])
    twin.name = "v"
    set_external(twin, "./w.bin", 0, W.nbytes)
    path = write(tmp_path, proto)
    assert load(path).size_bytes == path.stat().st_size + W.nbytes


def test_a_model_in_memory_is_copied() -> None:
    proto = model()
    loaded = load(proto)
    assert loaded.proto == proto
    assert loaded.path is None
    assert loaded.size_bytes == proto.ByteSize()
    assert loaded.sha256 == hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    loaded.proto.graph.name = "changed"
    assert proto.graph.name == "g"


def test_a_model_in_memory_needs_a_folder_for_external_data(tmp_path: Path) -> None:
    proto = externalized(tmp_path, model())
    assert message_for(proto).startswith("model 'g': tensor 'w': external data location 'w.bin': the model came without a folder")
    loaded = load(proto, folder=tmp_path)
    assert (loaded.weights.read(loaded.proto.graph.initializer[0]) == W).all()
    assert loaded.size_bytes == proto.ByteSize() + W.nbytes


def initializer_as_input() -> onnx.ModelProto:
    proto = model(opset=7, ir_version=3)
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4]))
    return proto


def unknown_domain() -> onnx.ModelProto:
    proto = model(helper.make_node("Mystery", ["x", "w"], ["y"], domain="my.domain", level=3))
    proto.opset_import.append(helper.make_opsetid("my.domain", 9))
    return proto


def runtime_domain_without_import() -> onnx.ModelProto:
    return model(helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft"))


def runtime_domain_in_a_nested_graph() -> onnx.ModelProto:
    inner = helper.make_graph([helper.make_node("FastGelu", ["x"], ["z"], domain="com.microsoft")], "b", [], [value("z")])
    condition = numpy_helper.from_array(np.array(True), "c")
    proto = model(helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner))
    proto.graph.initializer.append(condition)
    return proto


def unnamed_graph() -> onnx.ModelProto:
    proto = model()
    proto.graph.name = ""
    return proto


def spelled_out_domain() -> onnx.ModelProto:
    proto = model()
    proto.opset_import[0].domain = "ai.onnx"
    return proto


def with_function() -> onnx.ModelProto:
    body = [helper.make_node("FastGelu", ["a"], ["b"], domain="com.microsoft")]
    proto = model(helper.make_node("F", ["x"], ["y"], domain="d"))
    proto.functions.append(helper.make_function("d", "F", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))
    proto.opset_import.append(helper.make_opsetid("d", 1))
    return proto


@pytest.mark.parametrize(
    "make",
    [
        initializer_as_input,
        unknown_domain,
        runtime_domain_without_import,
        runtime_domain_in_a_nested_graph,
        unnamed_graph,
        spelled_out_domain,
        with_function,
    ],
)
def test_unusual_but_valid_models_pass(tmp_path: Path, make: Callable[[], onnx.ModelProto]) -> None:
    proto = make()
    assert load(write(tmp_path, proto)).proto == proto


@pytest.mark.parametrize("opset", [7, newest_opset()])
def test_the_limits_of_the_opset_pass(opset: int) -> None:
    assert load(model(opset=opset)).proto.opset_import[0].version == opset


def test_the_newest_opset_is_the_newest_that_runs() -> None:
    open_session(model(opset=newest_opset()))
    assert newest_opset() <= onnx.defs.onnx_opset_version()
    assert newest_opset() >= 21


def test_files_that_are_no_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.onnx")
    assert message_for(tmp_path / "absent.onnx").endswith("cannot be read: No such file or directory; check the path and its permissions")
    assert "is a folder, expected an ONNX file" in message_for(tmp_path)
    assert "is not a regular file" in message_for(tmp_path / "pipe.onnx")
    assert "cannot be read: embedded null byte" in message_for("a\0b")


def test_files_beyond_the_protobuf_limit_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.onnx"
    path.touch()
    os.truncate(path, PROTOBUF_LIMIT_BYTES + 1)  # sparse: takes no disk
    assert "has 2147483648 bytes, expected at most 2147483647; export the model with external data" in message_for(path)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is empty, expected an ONNX model"),
        (b"PK\x03\x04 a zip file", "is no ONNX model, or a truncated one"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a Git LFS pointer"),
        (b"\x08\x07", "holds no graph"),
        (model().SerializeToString()[:-20], "is no ONNX model, or a truncated one"),
        (model().SerializeToString().replace(b"Add", b"\xff\xfe\xfd"), "is not UTF-8"),
        (model().SerializeToString().replace(b"\x12\x01n", b"\x12\x01\xff"), r"dim_param b'\\xff' is not UTF-8"),
        (model().SerializeToString().replace(b"\x12\x01g", b"\x12\x01\xff"), "is not UTF-8"),
    ],
)
def test_contents_that_are_no_model_are_refused(tmp_path: Path, content: bytes, match: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(InputError, match=match):
        load(path)
    assert message_for(path).startswith(f"{path}: ")


def no_graph_outputs(proto: onnx.ModelProto) -> None:
    del proto.graph.output[:]


def no_opset(proto: onnx.ModelProto) -> None:
    del proto.opset_import[:]


def two_opsets(proto: onnx.ModelProto) -> None:
    proto.opset_import.append(helper.make_opsetid("ai.onnx", 13))


def old_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = 6


def new_opset(proto: onnx.ModelProto) -> None:
    proto.opset_import[0].version = newest_opset() + 1


def old_ir(proto: onnx.ModelProto) -> None:
    proto.ir_version = 2


def new_ir(proto: onnx.ModelProto) -> None:
    proto.ir_version = onnx.IR_VERSION + 1


def duplicate(proto: onnx.ModelProto) -> None:
    proto.graph.initializer.append(numpy_helper.from_array(W, "w"))


def duplicate_in_a_nested_graph(proto: onnx.ModelProto) -> None:
    twins = [numpy_helper.from_array(W, "v")] * 2
    inner = helper.make_graph([helper.make_node("Identity", ["v"], ["z"])], "inner", [], [value("z")], twins)
    proto.graph.node.append(helper.make_node("If", ["c"], ["u"], then_branch=inner, else_branch=inner))


def truncated_weight(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].raw_data = b"123"


def escaping_weight(proto: onnx.ModelProto) -> None:
    set_external(proto.graph.initializer[0], "../w.bin", 0, W.nbytes)


def escaping_constant_in_a_function(proto: onnx.ModelProto) -> None:
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(W, "hidden"))
    set_external(constant.attribute[0].t, "/etc/passwd", 0, W.nbytes)
    proto.functions.append(helper.make_function("d", "F", [], ["c"], [constant], [helper.make_opsetid("", 17)]))
    proto.opset_import.append(helper.make_opsetid("d", 1))


def unknown_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].op_type = "Ad"


def undefined_value(proto: onnx.ModelProto) -> None:
    proto.graph.node[0].input[1] = "nothing"


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (no_graph_outputs, "graph 'g' has no outputs, expected at least one"),
        (no_opset, r"imports 0 versions of the default opset \[\], expected one"),
        (two_opsets, r"imports 2 versions of the default opset \[13, 17\], expected one"),
        (old_opset, rf"opset 6, expected 7 to {newest_opset()} \(onnx .*, ONNX Runtime .*\); convert it"),
        (new_opset, rf"opset {newest_opset() + 1}, expected 7 to {newest_opset()} .*update both or export"),
        (old_ir, "IR version 2, expected 3 to .*; convert it"),
        (new_ir, f"IR version {onnx.IR_VERSION + 1}, expected 3 to .*; update both"),
        (duplicate, "graph 'g' has 2 initializers called 'w', expected one"),
        (duplicate_in_a_nested_graph, "graph 'inner' has 2 initializers called 'v', expected one"),
        (truncated_weight, r"tensor 'w': 3 raw_data bytes, expected 16 for FLOAT \[4\]; the file is truncated or corrupt"),
        (escaping_weight, r"tensor 'w': external data location '\.\./w\.bin'"),
        (escaping_constant_in_a_function, "tensor 'hidden': external data location '/etc/passwd'"),
        (unknown_operator, "is not valid ONNX: No Op registered for Ad with domain_version of 17"),
        (undefined_value, "is not valid ONNX: .*input 'nothing' of node"),
    ],
)
def test_malformed_models_are_refused(tmp_path: Path, damage: Callable[[onnx.ModelProto], None], match: str) -> None:
    proto = model()
    damage(proto)
    path = write(tmp_path, proto)
    with pytest.raises(InputError, match=match):
        load(path)
    assert message_for(path).startswith(f"{path}: ")


def test_missing_external_data_is_refused_when_loading(tmp_path: Path) -> None:
    path = write(tmp_path, externalized(tmp_path, model()))
    (tmp_path / "w.bin").unlink()
    assert "tensor 'w': external data file" in message_for(path)
    assert "put it beside the model" in message_for(path)


@given(st.data())
def test_damaged_bytes_load_or_are_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("m")
    content = bytearray(externalized(folder, with_function()).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "m.onnx"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))] if data.draw(st.booleans()) else content)
    try:
        loaded = load(path)
    except InputError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017 (both outcomes are right)
        assert "\n" not in str(error)  # noqa: PT017
    else:
        for tensor in tensors(loaded.proto):
            assert loaded.weights.read(tensor).shape == tuple(tensor.dims)
