"""The emitter: names, copies, and decode programs as functions or inlined."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest

from intaglio.ops.emit import DOMAIN, Spec, onnx_type, spec_of
from intaglio.ops.storage import STORAGES, readers
from tests.ops.running import Array, assemble, emitter_for, node_of, normal, run

OPSETS = [7, 9, 11, 13, 18, 21]

EXPANDED = [name for name, storage in STORAGES.items() if readers(storage) is None]
"""Storages that can be expanded to floats."""


def decode(storage_name: str, opset: int, *, functions: bool) -> Array:
    """A weight that has been through a storage, as ONNX Runtime sees it."""
    emitter = emitter_for(opset, functions=functions)
    storage, weight = STORAGES[storage_name], normal(1, 6, 4)
    storage.emit(emitter, "", storage.encode(weight, 0), spec_of(weight), "w")
    emitter.node("Add", ["x", "w"], "y")
    return run(emitter, {"x": np.zeros((6, 4), np.float32)}, ["y"])[0]


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_a_program_yields_the_same_as_a_function_and_inlined(storage: str, opset: int) -> None:
    np.testing.assert_array_equal(decode(storage, opset, functions=True), decode(storage, opset, functions=False))


@pytest.mark.parametrize("functions", [True, False])
def test_a_call_is_one_node_where_models_carry_functions_and_standard_nodes_where_not(functions: bool) -> None:
    emitter = emitter_for(functions=functions)
    STORAGES["int4"].emit(emitter, "", STORAGES["int4"].layout(Spec((4, 4), np.dtype(np.float32)), 0), Spec((4, 4), np.dtype("f4")))
    domains = {node.domain for node in emitter.nodes}
    assert domains == ({DOMAIN} if functions else {""})
    assert set(emitter.programs) == ({"Unpack4", "Scale"} if functions else set())


@pytest.mark.parametrize("opset", OPSETS)
def test_programs_pass_the_checker(opset: int) -> None:
    emitter = emitter_for(opset)
    for name in ("int8", "int4"):
        weight = normal(1, 4, 2)
        STORAGES[name].emit(emitter, name, STORAGES[name].encode(weight, 0), spec_of(weight), f"w.{name}")
    emitter.node("Add", ["w.int8", "w.int4"], "sum")
    emitter.node("Add", ["x", "sum"], "y")
    model = assemble(emitter, {"x": np.zeros((4, 2), np.float32)}, ["y"])
    model.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", 1, (4, 2)))
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("functions", [True, False])
@pytest.mark.parametrize("storage", EXPANDED)
def test_specs_and_arrays_emit_the_same(storage: str, functions: bool) -> None:
    weight = normal(2, 6, 3, 5)
    if STORAGES[storage].accepts(spec_of(weight)):  # a storage for matrices
        weight = weight.reshape(6, 15)
    spec, axis = spec_of(weight), weight.ndim - 1
    priced, written = emitter_for(functions=functions), emitter_for(functions=functions)
    STORAGES[storage].emit(priced, "0", STORAGES[storage].layout(spec, axis), spec)
    STORAGES[storage].emit(written, "0", STORAGES[storage].encode(weight, axis), spec)
    assert [node.SerializeToString() for node in priced.nodes] == [node.SerializeToString() for node in written.nodes]
    assert priced.initializers == {name: spec_of(array) for name, array in written.initializers.items()}
    assert priced.programs == written.programs


@pytest.mark.parametrize("functions", [True, False])
def test_names_never_collide(functions: bool) -> None:
    plain = emitter_for(functions=functions)
    weight = normal(3, 4, 4)

    def emit_all(emitter: object) -> None:
        for number, storage in enumerate(map(STORAGES.__getitem__, EXPANDED)):
            storage.emit(emitter, str(number % 2), storage.encode(weight, 0), spec_of(weight))  # type: ignore[arg-type]

    emit_all(plain)
    made = [*plain.initializers, *(name for node in plain.nodes for name in node.output)]
    assert max(Counter(made).values()) == 1
    other = emitter_for(functions=functions, taken=frozenset(made))
    emit_all(other)
    assert not set(made) & {*other.initializers, *(name for node in other.nodes for name in node.output)}


def test_stems_that_begin_alike_make_different_names() -> None:
    factor, dense = emitter_for(stem="w"), emitter_for(stem="w.0")
    assert factor.name("0.q") != dense.name(".q")
    assert factor.name("0.q") != factor.name("0.q")


def test_a_copy_keeps_name_outputs_and_attributes_that_are_not_replaced() -> None:
    original = node_of('[n] y = Conv <group = 2, pads = [1, 1], auto_pad = "NOTSET"> (x, w, b)')
    emitter = emitter_for()
    emitter.copy(original, {0: "h", 1: "u"}, drop=["auto_pad"], attributes={"pads": [0, 0], "strides": [2]})
    (copy,) = emitter.nodes
    assert (copy.name, list(copy.input), list(copy.output)) == ("n", ["h", "u", "b"], ["y"])
    assert {a.name: onnx.helper.get_attribute_value(a) for a in copy.attribute} == {"group": 2, "pads": [0, 0], "strides": [2]}
    assert list(original.input) == ["x", "w", "b"]


def test_payload_of_a_spec() -> None:
    spec = Spec((3, 4), np.dtype(np.float16))
    assert spec.nbytes == 24
    assert spec_of(np.zeros((3, 4), np.float16)) == spec
    assert onnx_type(spec.dtype) == onnx.TensorProto.FLOAT16
