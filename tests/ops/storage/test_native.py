"""INT4 initializers."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, numpy_helper

from intaglio.ops.emit import Spec, spec_of
from intaglio.ops.storage.native import INT4_NATIVE
from intaglio.ops.storage.uniform import INT4
from tests.ops.running import emitter_for, normal


def test_codes_take_half_a_byte_in_the_file() -> None:
    array = normal(1, 5, 7)
    emitter = emitter_for(21)
    INT4_NATIVE.emit(emitter, "", INT4_NATIVE.encode(array, 0), spec_of(array))
    codes = numpy_helper.from_array(np.asarray(emitter.initializers["w.q"]), "q")
    assert codes.data_type == TensorProto.INT4
    assert len(codes.raw_data) == 18


def test_values_are_those_of_packed_codes() -> None:
    array = normal(2, 5, 7)
    native, packed = (storage.decode(storage.encode(array, 0), spec_of(array)) for storage in (INT4_NATIVE, INT4))
    np.testing.assert_array_equal(native, packed)


def test_the_type_needs_opset_21() -> None:
    assert INT4_NATIVE.min_opset(Spec((5, 7), np.dtype(np.float32))) == 21
