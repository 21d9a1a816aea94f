"""What every storage must hold to: layout, reference and emitted program agree, and the program is folded at load."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx

from intaglio.ops.emit import Emitter, spec_of
from intaglio.ops.storage import Storage
from tests.ops.running import Array, assemble, emitter_for, run, run_model

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float16), BFLOAT16, np.dtype(np.float64)]


def check_layout(storage: Storage, array: Array, axis: int) -> None:
    """The priced arrays are the encoded ones, to the byte."""
    packed = storage.encode(array, axis)
    assert storage.accepts(spec_of(array)) is None
    assert storage.layout(spec_of(array), axis) == tuple(spec_of(part) for part in packed)
    assert sum(spec.nbytes for spec in storage.layout(spec_of(array), axis)) == sum(part.nbytes for part in packed)


def emit(storage: Storage, array: Array, axis: int, *, functions: bool) -> tuple[Emitter, Array]:
    """The program with a reader that every type has a kernel for: a Gather of all rows, by indices that are an input."""
    emitter = emitter_for(max(18, storage.min_opset(spec_of(array))), functions=functions)
    packed = storage.encode(array, axis)
    weight = storage.emit(emitter, "", packed, spec_of(array))
    rows = emitter.node("Gather", [weight, "index"], "y")
    if array.dtype == BFLOAT16:  # NumPy, and so ONNX Runtime's Python interface, has no such type
        emitter.node("Cast", [rows], "z", attributes={"to": onnx.TensorProto.FLOAT})
    return emitter, np.asarray(storage.decode(packed, spec_of(array)))


def check_round_trip(storage: Storage, array: Array, axis: int) -> None:
    """ONNX Runtime yields the reference, bit for bit, with and without optimizations, from a function and inlined."""
    feed = {"index": np.arange(array.shape[0])}
    for functions in (True, False):
        emitter, expected = emit(storage, array, axis, functions=functions)
        assert (expected.shape, expected.dtype) == (array.shape, array.dtype)
        for optimize in (True, False):
            (actual,) = run(emitter, feed, ["z" if array.dtype == BFLOAT16 else "y"], optimize=optimize)
            np.testing.assert_array_equal(actual, expected.astype(np.float32) if array.dtype == BFLOAT16 else expected)
            assert actual.dtype == (np.float32 if array.dtype == BFLOAT16 else array.dtype)


def check_integers(storage: Storage, array: Array, axis: int) -> None:
    """int8 codes times scales are the decoded values, exactly: both are one product in float32 of the same two numbers."""
    packed = storage.encode(array, axis)
    for functions in (True, False):
        emitter = emitter_for(max(18, storage.min_opset(spec_of(array))), functions=functions)
        weight = storage.emit_integer(emitter, "", packed, spec_of(array), axis)
        assert weight is not None
        assert weight.axis == axis
        emitter.node("Identity", [weight.codes], "codes")
        emitter.node("Identity", [weight.scale], "scale")
        for optimize in (True, False):
            codes, scale = run(emitter, {}, ["codes", "scale"], optimize=optimize)
            assert (codes.shape, codes.dtype, scale.shape, scale.dtype) == (array.shape, np.int8, (array.shape[axis],), np.float32)
            spread = np.expand_dims(scale, [i for i in range(array.ndim) if i != axis])
            np.testing.assert_array_equal((codes * spread).astype(array.dtype), storage.decode(packed, spec_of(array)))


def check_folds(storage: Storage, array: Array, axis: int, folder: Path) -> None:
    """The optimized graph holds the reader alone, and the decoded weight."""
    feed = {"index": np.arange(array.shape[0])}
    for functions in (True, False):
        emitter, _ = emit(storage, array, axis, functions=functions)
        path = folder / f"optimized_{functions}.onnx"
        run_model(assemble(emitter, feed, ["y"]), feed, save_to=path)
        optimized = onnx.load(path)
        assert [node.op_type for node in optimized.graph.node] == ["Gather"]
        assert [tuple(tensor.dims) for tensor in optimized.graph.initializer] == [array.shape]
