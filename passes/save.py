"""Write a model: `Model` → an `.onnx` file, with its weights embedded or in one external data file beside it.

The files appear completely or not at all: they are written to a temporary folder beside the target, flushed to the disk and
renamed into place, the model last; whatever goes wrong, the previous files stay and nothing else is left behind. Weights
stream from where they lie, one tensor at a time, and `model.proto` is not changed. The bytes depend on the model and the
file's name only.

It must not fire on the model it came from: the source file and its external data files are never written.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from onnx import TensorProto

from .errors import InputError
from .model import Model
from .weights import ALIGNMENT_BYTES, TENSOR_FIELDS, WeightStore, check_location, children, is_external, set_external, tensors

PROTOBUF_LIMIT_BYTES = 2**31 - 1
"""The largest file that protobuf, and so every ONNX runtime, parses."""

EXTERNAL_THRESHOLD_BYTES = 1024
"""Tensors up to this size stay in the model file: shapes and scalars that tools want to see without opening the data."""

DATA_SUFFIX = ".data"
"""The external data file is called after the model file, with this suffix."""

_LENGTH_DELIMITED = 2  # protobuf wire type
_RAW_DATA_FIELD = TensorProto.RAW_DATA_FIELD_NUMBER


@dataclass(frozen=True)
class Piece:
    """Consecutive bytes of a file, made only when they are written."""

    size_bytes: int
    read: Callable[[], bytes | memoryview]


Place = Callable[[TensorProto, bool], list[Piece]]
"""Writes a tensor; the flag says whether it may become external (an initializer or the value of a Constant node)."""


@dataclass
class _DataFile:
    """An external data file that grows by aligned tensors; `location` is its name in the model."""

    location: str
    pieces: list[Piece] = field(default_factory=list)
    size_bytes: int = 0

    def append(self, payload: Piece) -> int:
        """Add `payload`; returns its offset."""
        padding_bytes = -self.size_bytes % ALIGNMENT_BYTES
        offset = self.size_bytes + padding_bytes
        self.pieces += [_bytes(bytes(padding_bytes)), payload]
        self.size_bytes = offset + payload.size_bytes
        return offset


@dataclass(frozen=True)
class _Layout:
    """What goes into the model file and into the external data file (empty: no such file)."""

    model: list[Piece]
    data: list[Piece]


def save(
    model: Model,
    path: str | Path,
    *,
    source: Path | None,
    external: bool | None = None,
    limit_bytes: int = PROTOBUF_LIMIT_BYTES,
) -> int:
    """Write `model` to `path`, atomically; returns the total bytes written.

    Args:
        model: stays as it is.
        path: the `.onnx` file; external data goes to `path` + `DATA_SUFFIX`. Existing files are replaced.
        source: a model that must not be overwritten, besides `model.path`; None if there is none.
        external: True: tensors over `EXTERNAL_THRESHOLD_BYTES` go to the data file; False: all are embedded;
            None: embedded unless the file would exceed `limit_bytes`.
        limit_bytes: the largest allowed model file.

    Raises:
        InputError: the target is the source, a folder or not a regular file, cannot be written (permission, missing folder,
            full disk), or the model file would exceed `limit_bytes`; a weight cannot be read.
    """
    path = Path(path)
    data_path = path.with_name(path.name + DATA_SUFFIX) if path.name else path
    layout = _layout(model, external, path.name, limit_bytes)
    targets = [path, data_path] if layout.data else [path]
    protected = {*model.weights.files.values(), *(known for known in (source, model.path) if known is not None)}
    try:
        for target in targets:
            _refuse(target, protected)
        _write(layout, path, data_path)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {error.strerror or error}; free space or choose an output in a folder that can be written"
        ) from error
    return _size_bytes(layout.model) + _size_bytes(layout.data)


def serialized_size(
    model: Model, external: bool | None = None, *, name: str = "model.onnx", limit_bytes: int = PROTOBUF_LIMIT_BYTES
) -> int:
    """Exactly the bytes that `save` would write for a file called `name` (which external references repeat); writes nothing.

    Raises:
        InputError: the model file would exceed `limit_bytes`, or a weight cannot be read.
    """
    layout = _layout(model, external, name, limit_bytes)
    return _size_bytes(layout.model) + _size_bytes(layout.data)


def encode(message: Message, place: Place, may_move: bool = False) -> list[Piece]:
    """The serialization of `message`, as protobuf's own deterministic one, with every tensor in it written by `place`.

    `may_move` is what `place` is told about a tensor directly in `message`.
    """
    kind = message.DESCRIPTOR.name
    if kind == "TensorProto":
        return place(message, may_move)
    if next(tensors(message), None) is None:
        return [_bytes(message.SerializeToString(deterministic=True))]
    pieces = []
    plain = type(message)()  # gathers the fields between two that hold tensors
    for descriptor, value in message.ListFields():
        if descriptor.name not in TENSOR_FIELDS[kind]:
            _copy_field(plain, descriptor.name, value)
            continue
        pieces.append(_bytes(plain.SerializeToString(deterministic=True)))
        plain.Clear()
        for child in children(message, descriptor.name):
            body = encode(child, place, _may_move(message, descriptor.name, may_move))
            pieces += [_prefix(descriptor.number, _size_bytes(body)), *body]
    pieces.append(_bytes(plain.SerializeToString(deterministic=True) + _unknown_fields(message)))
    return pieces


def _may_move(message: Message, field: str, inherited: bool) -> bool:
    """Whether runtimes read external data for a tensor in `field` of `message` (or, for an attribute's, one level up)."""
    if field == "attribute":
        return bool(message.op_type == "Constant" and message.domain in ("", "ai.onnx"))
    return field == "initializer" or (field == "t" and inherited)


def _layout(model: Model, external: bool | None, name: str, limit_bytes: int) -> _Layout:
    weights = model.weights
    if not external:
        layout = _Layout(encode(model.proto, partial(_embed, weights)), [])
        if external is False or _size_bytes(layout.model) <= limit_bytes:
            return _within(layout, limit_bytes)
    data = _DataFile(f"{name}{DATA_SUFFIX}")
    check_location(data.location)
    return _within(_Layout(encode(model.proto, partial(_move, weights, data)), data.pieces), limit_bytes)


def _within(layout: _Layout, limit_bytes: int) -> _Layout:
    size_bytes = _size_bytes(layout.model)
    if size_bytes > limit_bytes:
        remedy = "shrink its attributes and small tensors" if layout.data else "save with external data"
        raise InputError(f"the model file would have {size_bytes} bytes, expected at most {limit_bytes}; {remedy}")
    return layout


def _embed(weights: WeightStore, tensor: TensorProto, may_move: bool) -> list[Piece]:
    """The tensor with its values inside: as it is, or with raw data in place of a reference."""
    weights.check(tensor)
    if not is_external(tensor):
        return [Piece(tensor.ByteSize(), partial(tensor.SerializeToString, deterministic=True))]
    size_bytes = weights.nbytes(tensor)
    return [
        _bytes(_with_fields(tensor, ("dims", "data_type", "name")).SerializeToString(deterministic=True)),
        _prefix(_RAW_DATA_FIELD, size_bytes),
        Piece(size_bytes, partial(weights.payload, tensor)),
        _bytes(_with_fields(tensor, ("doc_string", "metadata_props")).SerializeToString(deterministic=True)),
    ]


def _move(weights: WeightStore, data: _DataFile, tensor: TensorProto, may_move: bool) -> list[Piece]:
    """The tensor as a reference to its values in `data`, appended there; embedded where it is small or cannot move."""
    size_bytes = weights.nbytes(tensor)
    if not may_move or size_bytes <= EXTERNAL_THRESHOLD_BYTES or tensor.data_type == TensorProto.STRING:
        return _embed(weights, tensor, may_move)
    weights.check(tensor)
    offset = data.append(Piece(size_bytes, partial(weights.payload, tensor)))
    reference = _with_fields(tensor, ("dims", "data_type", "name", "doc_string", "metadata_props"))
    set_external(reference, data.location, offset, size_bytes)
    return [_bytes(reference.SerializeToString(deterministic=True))]


def _with_fields(tensor: TensorProto, names: tuple[str, ...]) -> TensorProto:
    copy = TensorProto()
    for descriptor, value in tensor.ListFields():
        if descriptor.name in names:
            _copy_field(copy, descriptor.name, value)
    return copy


def _copy_field(target: Message, name: str, value: Any) -> None:
    if isinstance(value, (str, bytes, int, float)):
        setattr(target, name, value)
    else:
        getattr(target, name).MergeFrom(value)


def _unknown_fields(message: Message) -> bytes:
    """The serialized fields of `message` that the installed ONNX does not know."""
    if not len(UnknownFieldSet(message)):
        return b""
    rest = type(message)()
    rest.CopyFrom(message)
    for known in message.DESCRIPTOR.fields:
        rest.ClearField(known.name)
    return bytes(rest.SerializeToString(deterministic=True))


def _bytes(content: bytes) -> Piece:
    return Piece(len(content), lambda: content)


def _prefix(field_number: int, size_bytes: int) -> Piece:
    """Protobuf's tag and length before a length-delimited field."""
    return _bytes(_varint(field_number << 3 | _LENGTH_DELIMITED) + _varint(size_bytes))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _size_bytes(pieces: list[Piece]) -> int:
    return sum(piece.size_bytes for piece in pieces)


def _refuse(target: Path, protected: Iterable[Path]) -> None:
    """Raise if `target` exists and is one of the protected files, or no regular file."""
    if target.name == "" or target.is_dir():
        raise InputError(f"cannot write {target}: it is a folder, expected a file name; add one such as model.onnx")
    if not target.exists():
        return
    if not stat.S_ISREG(target.stat().st_mode):
        raise InputError(f"cannot write {target}: it is not a regular file; choose another name")
    for known in protected:
        if known.exists() and target.samefile(known):
            raise InputError(f"cannot write {target}: it belongs to the source model, which is kept; choose another name")


def _write(layout: _Layout, path: Path, data_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".intaglio-", dir=path.parent) as scratch:
        new_model, new_data, old_data = (Path(scratch, name) for name in ("model", "data", "old-data"))
        if layout.data:
            _write_file(new_data, layout.data)
        _write_file(new_model, layout.model)
        try:
            if layout.data:
                if data_path.exists():
                    os.replace(data_path, old_data)
                os.replace(new_data, data_path)
            os.replace(new_model, path)
        except BaseException:
            if new_model.exists():  # not published: bring the old data back
                if old_data.exists():
                    os.replace(old_data, data_path)
                elif layout.data and not new_data.exists():
                    data_path.unlink()
            raise
        _flush_folder(path.parent)


def _write_file(path: Path, pieces: Iterable[Piece]) -> None:
    with path.open("xb") as file:
        for piece in pieces:
            file.write(piece.read())
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power failure, where folders can be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
