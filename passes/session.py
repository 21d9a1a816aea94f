"""ONNX Runtime sessions: the one place that imports onnxruntime.

A model given as a proto never needs its files: weights are handed over as arrays, so a model beyond protobuf's 2 GB loads,
and ONNX Runtime opens no path that the model names. It copies the arrays: memory maps of external data are read once.
Everything ONNX Runtime refuses becomes an `InputError` of one line that names the node.

Nothing here changes a model, and telemetry is off before onnxruntime is imported unless the user has set the variable.
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import ml_dtypes
import numpy as np
import onnx
from google.protobuf.message import EncodeError
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort  # after the variable above, which it reads while it loads
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from .errors import InputError
from .weights import WeightStore, is_external, tensors

CPU = "CPUExecutionProvider"
RUNTIME_VERSION: str = ort.__version__

Value: TypeAlias = Any
"""What flows between sessions: an `OrtValue`; an ndarray for strings; a list of arrays for a sequence next to strings."""

_INJECTED_BYTES = 1 << 16
"""Weights from this size on are handed to ONNX Runtime as arrays, smaller ones inside the serialized model."""

_INJECTABLE = frozenset(
    (
        TensorProto.FLOAT,
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.DOUBLE,
        TensorProto.INT8,
        TensorProto.UINT8,
        TensorProto.INT16,
        TensorProto.UINT16,
        TensorProto.INT32,
        TensorProto.UINT32,
        TensorProto.INT64,
        TensorProto.UINT64,
        TensorProto.BOOL,
    )
)

_LOG_FATAL_ONLY = 4  # errors come back as exceptions; logged as well they would be reported twice
_MESSAGE_LIMIT = 400  # characters of ONNX Runtime's own words in an error

_REFUSALS = (
    ort_errors.EPFail,
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NoSuchFile,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)

_Message = TypeVar("_Message", onnx.ModelProto, onnx.GraphProto)


@dataclass(frozen=True)
class Session:
    """A model that ONNX Runtime has loaded; its weights are copies that belong to ONNX Runtime.

    Attributes:
        label: what error messages call the model.
        inputs: names of the inputs that every run needs.
        defaulted_inputs: names of the inputs that an initializer stands in for when a run does not feed them.
        outputs: names of the outputs, in the model's order.
        output_types: the outputs' types in ONNX Runtime's notation, for example "tensor(float)".
    """

    label: str
    inputs: tuple[str, ...]
    defaulted_inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output_types: tuple[str, ...]
    _handle: Any

    def run(self, fetches: Sequence[str], values: Mapping[str, Value]) -> list[Value]:
        """Run once and return the named outputs.

        Args:
            fetches: names of outputs.
            values: input name → value (see `to_value`); names the model does not know are dropped.

        Raises:
            InputError: an input is missing, or has a type or shape that the model refuses.
        """
        feed = self._feed(values)
        try:
            if _all_ort_values(feed):
                results: list[Value] = self._handle.run_with_ort_values(list(fetches), feed)
            else:
                results = self._handle.run(list(fetches), feed)
        except _REFUSALS as error:
            raise InputError(f"{self.label} fails when run: {_one_line(error)}; check the data against its inputs") from error
        return results

    def bind(self, feed: Mapping[str, NDArray[Any]]) -> Callable[[], object]:
        """Return a function that runs the model on `feed` with as little overhead as there is, for timing.

        Runs once, to find out whether the feed fits.

        Raises:
            InputError: an input is missing, or has a type or shape that the model refuses.
        """
        values = self._feed({name: to_value(array) for name, array in feed.items()})
        self.run(self.outputs, values)
        if not _all_ort_values(values):
            return functools.partial(self._handle.run, list(self.outputs), values)
        binding = self._handle.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            binding.bind_output(name)
        return functools.partial(_run_bound, self._handle, binding, values)

    def _feed(self, values: Mapping[str, Value]) -> dict[str, Value]:
        missing = [name for name in self.inputs if name not in values]
        if missing:
            raise InputError(
                f"{self.label} needs input {missing[0]!r}, but the data has {', '.join(sorted(values)) or 'nothing'}; "
                f"add an array of that name"
            )
        return {name: values[name] for name in (*self.inputs, *self.defaulted_inputs) if name in values}


def _run_bound(handle: Any, binding: Any, values: Mapping[str, Value]) -> None:
    """Run on what is bound; `values` are only held, because not every version of ONNX Runtime keeps what is bound to it."""
    handle.run_with_iobinding(binding)


def open_session(
    model: onnx.ModelProto | Path,
    *,
    weights: WeightStore | None = None,
    initializers: Iterable[TensorProto] = (),
    threads: int = 1,
    providers: Sequence[str] = (CPU,),
    optimize: bool = True,
    repack: bool = True,
) -> Session:
    """Load a model into ONNX Runtime.

    Args:
        model: a proto, whose external data is read through `weights`, or the path of a file.
        weights: resolves the tensors of a proto; None when all of them are embedded.
        initializers: more initializers for the main graph of a proto, so that a caller need not copy them into it.
        threads: intra-op threads; operators run one after another, and idle threads do not spin between runs.
        providers: execution providers in order of preference.
        optimize: False turns every graph optimisation off, constant folding included.
        repack: False keeps kernels from holding a second copy of their weights in a layout of their own.

    Raises:
        InputError: ONNX Runtime cannot load the model, `threads` is below 1, or a provider is not available.
    """
    check_providers(providers)
    if threads < 1:
        raise InputError(f"threads is {threads}: expected at least 1; give the number of cores to use")
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_FATAL_ONLY
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not repack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL

    injected: dict[str, Any] = {}
    if isinstance(model, Path):
        label = f"model {model.name!r}"
        source: str | bytes = str(model)
    else:
        label = f"model {model.graph.name!r}"
        light, injected = _detach(model, weights, initializers)
        source = _serialize(light, label)
        options.add_external_initializers(list(injected), list(injected.values()))
    try:
        handle = ort.InferenceSession(source, options, providers=list(providers))
    except _REFUSALS as error:
        reason = _one_line(error) + (_culprit(error, model) if isinstance(model, onnx.ModelProto) else "")
        raise InputError(
            f"{label} does not load: {reason}; it needs operators and an opset that ONNX Runtime {RUNTIME_VERSION} supports"
        ) from error
    outputs = handle.get_outputs()
    return Session(
        label=label,
        inputs=tuple(value.name for value in handle.get_inputs()),
        defaulted_inputs=tuple(value.name for value in handle.get_overridable_initializers()),
        outputs=tuple(value.name for value in outputs),
        output_types=tuple(value.type for value in outputs),
        _handle=handle,
    )


def check_providers(providers: Sequence[str]) -> None:
    """Raise `InputError` unless this ONNX Runtime has every one of the named execution providers."""
    available = ort.get_available_providers()
    for provider in providers:
        if provider not in available:
            raise InputError(
                f"provider {provider!r} is not in this ONNX Runtime, which has {', '.join(available)}; "
                f"choose one of these or install a build that has it"
            )


def to_value(array: NDArray[Any]) -> Value:
    """Wrap an array for a session without copying it where its memory is contiguous; strings stay arrays.

    Raises:
        InputError: a type that ONNX Runtime does not take from memory (4-bit and narrower, complex).
    """
    if array.dtype.kind in "OUST":
        return array
    array = np.ascontiguousarray(array).reshape(array.shape)
    data_type = helper.np_dtype_to_tensor_dtype(array.dtype)
    if data_type not in _INJECTABLE:
        raise InputError(f"ONNX Runtime takes no array of {array.dtype}; expected whole-byte integers, floats or bools")
    if data_type == TensorProto.BFLOAT16:
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), data_type)
    return ort.OrtValue.ortvalue_from_numpy(array)


def to_array(value: Value) -> NDArray[Any]:
    """Copy a session's result into an array, bfloat16 included.

    Raises:
        InputError: the value is a sequence or an optional, or of a 4-bit or narrower type.
    """
    if isinstance(value, np.ndarray):
        return value
    kind = value.data_type() if isinstance(value, ort.OrtValue) else "seq"
    if kind == "tensor(bfloat16)":
        count = math.prod(value.shape())
        bits = (ctypes.c_uint16 * count).from_address(value.data_ptr()) if count else ()
        halves: NDArray[Any] = np.array(bits, np.uint16).view(ml_dtypes.bfloat16)
        return halves.reshape(value.shape())
    if not kind.startswith("tensor("):
        raise InputError(f"a value of type {kind} is no array; fetch a tensor instead")
    try:
        return np.array(value.numpy())  # a view of memory that may be a fed array's
    except RuntimeError as error:
        raise InputError(f"a value of type {kind} has no array form; fetch a tensor of a whole-byte type instead") from error


def read_tensor(tensor: TensorProto, weights: WeightStore | None) -> NDArray[Any]:
    """Return the contents of a tensor.

    Raises:
        InputError: its data is external and `weights` is None.
    """
    if weights is not None:
        return weights.read(tensor)
    if is_external(tensor):
        raise InputError(f"tensor {tensor.name!r} has external data, but its folder is unknown; load the model from its file")
    array: NDArray[Any] = numpy_helper.to_array(tensor)
    return array


def array_bytes(data_type: int, dims: Iterable[int]) -> int:
    """Bytes of a tensor of this `TensorProto` type as an array, in which an element narrower than a byte takes a whole one."""
    return math.prod(dims) * int(helper.tensor_dtype_to_np_dtype(data_type).itemsize)


def _embedded(tensor: TensorProto, weights: WeightStore | None) -> TensorProto:
    copy: TensorProto = numpy_helper.from_array(read_tensor(tensor, weights), tensor.name)
    return copy


def _detach(
    model: onnx.ModelProto, weights: WeightStore | None, initializers: Iterable[TensorProto]
) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Split a model into a small proto and the large weights of its main graph, as values by name.

    ONNX Runtime accepts such values only for initializers of the main graph that are marked external; other external
    tensors (nested graphs, `Constant` nodes, functions, types without an array form) are embedded.
    """
    light = onnx.ModelProto()
    copy_fields(model, light, ("graph", "training_info"))
    copy_fields(model.graph, light.graph, ("initializer",))
    for tensor in tensors(light):
        if is_external(tensor):
            tensor.CopyFrom(_embedded(tensor, weights))
    injected: dict[str, Any] = {}
    for tensor in (*model.graph.initializer, *initializers):
        if tensor.data_type in _INJECTABLE and array_bytes(tensor.data_type, tensor.dims) >= _INJECTED_BYTES:
            injected[tensor.name] = to_value(read_tensor(tensor, weights))
            light.graph.initializer.append(_reference(tensor))
        else:
            light.graph.initializer.append(_embedded(tensor, weights) if is_external(tensor) else tensor)
    return light, injected


def copy_fields(source: _Message, target: _Message, omitted: Iterable[str]) -> None:
    """Copy what is set in a message into another one, but for the omitted fields."""
    for field, value in source.ListFields():
        if field.name in omitted:
            continue
        if isinstance(value, (str, bytes, int)):
            setattr(target, field.name, value)
        else:
            getattr(target, field.name).MergeFrom(value)


def _reference(tensor: TensorProto) -> TensorProto:
    reference = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, data_location=TensorProto.EXTERNAL)
    reference.external_data.add(key="location", value="injected")
    return reference


def _serialize(light: onnx.ModelProto, label: str) -> bytes:
    try:
        return bytes(light.SerializeToString())
    except EncodeError as error:
        raise InputError(f"{label} has over 2 GB besides its initializers; move the constants of its nodes to initializers") from error


def _all_ort_values(values: Mapping[str, Value]) -> bool:
    return all(isinstance(value, ort.OrtValue) for value in values.values())


def _one_line(error: Exception) -> str:
    """ONNX Runtime's message without error codes, C++ source positions, signatures and line breaks."""
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error))
    text = re.sub(r"\S+\.(?:cc|h):\d+ .*?\)\s", "", text, flags=re.DOTALL)
    return " ".join(text.split())[:_MESSAGE_LIMIT].rstrip(".;")


def _culprit(error: Exception, model: onnx.ModelProto) -> str:
    """Name the node behind a message that names only its operator, as for operators that nobody has registered."""
    match = re.search(r"Fatal error: (\S*):(\w+)\(-?\d+\)", str(error))
    if match is None:
        return ""
    domain, op_type = match.groups()
    names = [node.name or node.output[0] for node in model.graph.node if (node.domain, node.op_type) == (domain, op_type)]
    return f" (node {names[0]!r})" if names else ""
