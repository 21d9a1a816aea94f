"""Where the weights of a model lie: a walk over its tensors, and a store that reads them one at a time.

A tensor keeps its values embedded in the model, in an external data file beside it, or (a new one, while compressing) in
a temporary spool file. `WeightStore` reads all three and caches nothing, so memory holds one weight at a time.

Models are untrusted input. A tensor is checked before a byte of it is read or allocated: an external location that is not
a plain path below the model's folder, that crosses a symbolic link or names a hard link or anything but a regular file,
and an offset, length or shape that does not fit the real file are refused. A file that someone changes while it is being
read is outside this guarantee.
"""

from __future__ import annotations

import math
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import Message
from onnx import TensorProto

from .errors import InputError

SPOOL_THRESHOLD_BYTES = 1 << 20
ALIGNMENT_BYTES = 64

TENSOR_FIELDS: dict[str, tuple[str, ...]] = {
    "ModelProto": ("graph", "training_info", "functions"),
    "TrainingInfoProto": ("initialization", "algorithm"),
    "FunctionProto": ("node", "attribute_proto"),
    "GraphProto": ("node", "initializer", "sparse_initializer"),
    "NodeProto": ("attribute",),
    "AttributeProto": ("t", "g", "tensors", "graphs", "sparse_tensor", "sparse_tensors"),
    "SparseTensorProto": ("values", "indices"),
}
"""Message name → its fields, in field-number order, through which a tensor can be reached."""

_PACKED_BITS = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2, "FLOAT6E2M3": 6, "FLOAT6E3M2": 6}
_PACKED_IN_FIELDS = {"UINT4", "INT4", "FLOAT4E2M1", "UINT2", "INT2"}  # int32_data holds whole packed bytes
_ENTRIES_PER_COMPLEX = 2  # real and imaginary part, each an entry of float_data or double_data
_MAX_DIMS = 64  # what numpy can hold
_MAX_BYTES = 2**63 - 1
_MAX_DIGITS = 19  # of an offset or length below 2**63


def children(message: Message, field: str) -> list[Message]:
    """The messages in `field` of `message`, whether it is repeated or optional."""
    value = getattr(message, field)
    if not isinstance(value, Message):
        return list(value)
    return [value] if message.HasField(field) else []


def tensors(message: Message) -> Iterator[TensorProto]:
    """Every tensor of a model, graph, function or node, in the order in which they are serialized.

    Covers initializers (dense and sparse) and tensors in attributes, in the main graph, nested graphs, functions and
    training graphs. Yields the tensors themselves, not copies.
    """
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for field in TENSOR_FIELDS[message.DESCRIPTOR.name]:
        for child in children(message, field):
            yield from tensors(child)


def is_external(tensor: TensorProto) -> bool:
    """Whether the values of `tensor` lie outside the model: in an external data file or in a spool."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def check_location(location: str | bytes) -> None:
    """Refuse an external data location that is not a plain relative path below the model's folder, on any platform.

    Raises:
        InputError: it is empty or absolute, goes up by '..', holds a backslash, colon or null character, or is not UTF-8
            (protobuf hands that out as bytes).
    """
    if isinstance(location, bytes) or not _is_plain_relative(location):
        raise InputError(
            f"external data location {location!r}: expected a relative path with '/' that stays inside the model's folder; "
            "export the model again with its data file beside it"
        )


def _is_plain_relative(location: str) -> bool:
    path = PurePosixPath(location)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and not set(location) & set("\\:\0")


class WeightStore:
    """Resolves tensors to arrays; knows the model's folder and, once enabled, a spool for new large tensors.

    Attributes:
        folder: the folder against which external data locations are resolved; None refuses external data.
        files: normalized location → path of every external data file that a checked tensor named.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self._spool: BinaryIO | None = None
        self._spool_location = ""
        self._spool_bytes = 0
        self._lock = threading.Lock()

    def __enter__(self) -> WeightStore:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove the spool file; arrays already read from it stay valid, spooled tensors cannot be read any more."""
        with self._lock:
            if self._spool is not None:
                self._spool.close()
                self._spool = None

    def enable_spooling(self, folder: Path) -> None:
        """Let `spool` put large tensors into a nameless temporary file in `folder`, gone with `close` or the process.

        Raises:
            InputError: no file can be made in `folder`.
            RuntimeError: spooling is already enabled.
        """
        if self._spool is not None:
            raise RuntimeError("spooling is already enabled")
        try:
            self._spool = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise InputError(f"temporary folder {folder}: {error.strerror}; name a folder that can be written") from error
        self._spool_location = f"spool:{os.urandom(8).hex()}"  # no model can guess it, and no file can have it
        self._spool_bytes = 0

    def spool(self, name: str, array: npt.NDArray[Any]) -> TensorProto:
        """A tensor called `name` with the values, shape and dtype (native or ml_dtypes) of `array`.

        Above `SPOOL_THRESHOLD_BYTES` the values go to the spool, if enabled, and the tensor only refers to them.

        Raises:
            InputError: the spool's disk is full.
        """
        tensor = onnx.numpy_helper.from_array(array, name)
        if self._spool is None or tensor.data_type == TensorProto.STRING or len(tensor.raw_data) <= SPOOL_THRESHOLD_BYTES:
            return tensor
        payload = tensor.raw_data
        tensor.ClearField("raw_data")
        with self._lock:
            offset = self._spool_bytes + -self._spool_bytes % ALIGNMENT_BYTES
            try:
                self._spool.seek(offset)
                left = memoryview(payload)
                while left:  # one unbuffered write may take a part only
                    left = left[self._spool.write(left) :]
            except OSError as error:
                raise InputError(
                    f"tensor {name!r}: cannot spool {len(payload)} bytes: {error.strerror}; free space in the temporary folder"
                ) from error
            self._spool_bytes = offset + len(payload)
        set_external(tensor, self._spool_location, offset, len(payload))
        return tensor

    def nbytes(self, tensor: TensorProto) -> int:
        """Bytes of the tensor's values as raw data (sub-byte types packed), by its shape and type alone.

        Raises:
            InputError: the shape is negative or overflows, or the type is unknown.
        """
        if tensor.data_type == TensorProto.STRING:
            return sum(len(text) for text in tensor.string_data)
        return (_element_count(tensor) * _element_bits(tensor) + 7) // 8

    def check(self, tensor: TensorProto) -> None:
        """Refuse a tensor whose values cannot be read safely; reads and allocates nothing.

        Raises:
            InputError: see the module's docstring; embedded values that do not fill the shape exactly, too.
        """
        if tensor.HasField("segment"):
            raise InputError(f"tensor {tensor.name!r}: is stored in segments, which no runtime reads; export the model again")
        if is_external(tensor):
            self._external_range(tensor)
        else:
            _check_embedded(tensor, self.nbytes(tensor))

    def read(self, tensor: TensorProto) -> npt.NDArray[Any]:
        """The values of `tensor` as a read-only array of its shape; types numpy lacks come as ml_dtypes.

        External and spooled values are views of the mapped file (sub-byte types are unpacked copies); nothing is cached.

        Raises:
            InputError: as `check`, or a string tensor that is not UTF-8.
        """
        self.check(tensor)
        if is_external(tensor):
            raw = self._mapped(tensor)
            if _type_name(tensor) not in _PACKED_BITS:
                dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
                return raw.view(dtype).reshape(tuple(tensor.dims))
            tensor = TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=raw.tobytes())
        try:
            array: npt.NDArray[Any] = onnx.numpy_helper.to_array(tensor)
        except UnicodeDecodeError as error:
            raise InputError(f"tensor {tensor.name!r}: string is not UTF-8 ({error.reason}); export the model again") from error
        array.setflags(write=False)
        return array

    def payload(self, tensor: TensorProto) -> memoryview:
        """The values of `tensor` as raw data, `nbytes` bytes; strings have none.

        Raises:
            InputError: as `check`.
            ValueError: a string tensor.
        """
        if tensor.data_type == TensorProto.STRING:
            raise ValueError(f"string tensor {tensor.name!r} has no raw data")
        self.check(tensor)
        if is_external(tensor):
            return self._mapped(tensor).data
        if tensor.HasField("raw_data"):
            return memoryview(tensor.raw_data)
        return memoryview(onnx.numpy_helper.from_array(self.read(tensor)).raw_data)

    def open_external(self, location: str) -> BinaryIO:
        """Open the external data file at `location` for reading, after the same checks.

        Raises:
            InputError: the location is unsafe or the file is missing, linked or not regular.
        """
        path = self._external_path(location)
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        try:
            return os.fdopen(os.open(path, flags), "rb")
        except OSError as error:
            raise InputError(f"external data file {path}: {error.strerror}; check that it can be read") from error

    def _mapped(self, tensor: TensorProto) -> npt.NDArray[np.uint8]:
        """The raw bytes of an external or spooled tensor that `check` accepts, as a view of the mapped file."""
        location, offset, length = self._external_range(tensor)
        if length == 0:
            raw = np.empty(0, np.uint8)
            raw.setflags(write=False)
            return raw
        if location == self._spool_location:
            with self._lock:
                return _map(self._live_spool(), offset, length)
        with self.open_external(location) as file:
            return _map(file, offset, length)

    def _live_spool(self) -> BinaryIO:
        if self._spool is None:
            raise RuntimeError("the weight store is closed: its spooled tensors are gone")
        return self._spool

    def _external_range(self, tensor: TensorProto) -> tuple[str, int, int]:
        """(location, offset, length in bytes) of an external or spooled tensor, checked against the real file."""
        name, expected_bytes = tensor.name, self.nbytes(tensor)
        if tensor.data_type == TensorProto.STRING:
            raise InputError(f"tensor {name!r}: strings cannot be external data; export the model with them embedded")
        entries = [(entry.key, entry.value) for entry in tensor.external_data]
        values = dict(entries)
        if len(values) != len(entries):
            raise InputError(f"tensor {name!r}: external data key given twice, expected one of each; export the model again")
        location = values.get("location", "")
        offset = _natural(tensor, "offset", values.get("offset", "0"))
        length = _natural(tensor, "length", values.get("length", str(expected_bytes)))
        try:
            available_bytes = self._available_bytes(location)
        except InputError as error:
            raise InputError(f"tensor {name!r}: {error}") from error
        if length != expected_bytes:
            raise InputError(
                f"tensor {name!r}: external data length {length} in {location!r}, expected {expected_bytes} bytes for "
                f"{_type_name(tensor)} {list(tensor.dims)}; export the model again"
            )
        if offset + length > available_bytes:
            raise InputError(
                f"tensor {name!r}: external data ends at byte {offset + length} of {location!r}, expected at most its "
                f"{available_bytes} bytes; fetch the complete data file"
            )
        return location, offset, length

    def _available_bytes(self, location: str) -> int:
        if self._spool_location and location == self._spool_location:
            return self._spool_bytes
        path = self._external_path(location)
        self.files[str(PurePosixPath(location))] = path
        return path.stat().st_size

    def _external_path(self, location: str) -> Path:
        """The regular file at `location` below the folder, reached without any link."""
        if self.folder is None:
            raise InputError(f"external data location {location!r}: the model came without a folder; load it from its file")
        check_location(location)
        path = Path(os.path.realpath(self.folder), *PurePosixPath(location).parts)
        try:
            status = path.lstat()
        except OSError as error:
            raise InputError(f"external data file {path}: {error.strerror}, expected a regular file; put it beside the model") from error
        if os.path.realpath(path) != str(path):
            raise InputError(f"external data file {path}: is or passes a symbolic link, expected a real file; copy it there")
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"external data file {path}: expected a regular file; export the model again")
        if status.st_nlink > 1:
            raise InputError(f"external data file {path}: has {status.st_nlink} hard links, expected one; copy it there")
        return path


def set_external(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Make `tensor` refer to `length` bytes at `offset` of `location`."""
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def _map(file: BinaryIO, offset: int, length: int) -> npt.NDArray[np.uint8]:
    return np.memmap(file, dtype=np.uint8, mode="r", offset=offset, shape=(length,)).view(np.ndarray)


def _type_name(tensor: TensorProto) -> str:
    try:
        return str(TensorProto.DataType.Name(tensor.data_type))
    except ValueError:
        return str(tensor.data_type)


def _element_bits(tensor: TensorProto) -> int:
    name = _type_name(tensor)
    if name in _PACKED_BITS:
        return _PACKED_BITS[name]
    try:
        return onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    except KeyError as error:
        raise InputError(f"tensor {tensor.name!r}: element type {name}, expected one that onnx knows; update onnx") from error


def _element_count(tensor: TensorProto) -> int:
    """Product of the dims; refuses what numpy could not shape, even where a zero makes the tensor empty."""
    dims = list(tensor.dims)
    extent_bytes = math.prod(dim or 1 for dim in dims) * 16  # 16: the widest element, complex128
    if len(dims) > _MAX_DIMS or any(dim < 0 for dim in dims) or extent_bytes > _MAX_BYTES:
        raise InputError(
            f"tensor {tensor.name!r}: shape {dims[:_MAX_DIMS]}, expected at most {_MAX_DIMS} dims >= 0 and fewer than 2**63 "
            "bytes; the file is corrupt, export the model again"
        )
    return math.prod(dims)


def _natural(tensor: TensorProto, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise InputError(f"tensor {tensor.name!r}: external data {key} {text[:40]!r}, expected a whole number >= 0; export the model again")
    return int(text)


def _check_embedded(tensor: TensorProto, expected_bytes: int) -> None:
    name = _type_name(tensor)
    if tensor.HasField("raw_data") and tensor.data_type != TensorProto.STRING:
        field, found, expected = "raw_data bytes", len(tensor.raw_data), expected_bytes
    else:
        field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
        found, expected = len(getattr(tensor, field)), _element_count(tensor)
        if name in _PACKED_IN_FIELDS:
            expected = expected_bytes
        elif tensor.data_type in (TensorProto.COMPLEX64, TensorProto.COMPLEX128):
            expected *= _ENTRIES_PER_COMPLEX
    if found != expected:
        raise InputError(
            f"tensor {tensor.name!r}: {found} {field}, expected {expected} for {name} {list(tensor.dims)}; "
            "the file is truncated or corrupt, export the model again"
        )
