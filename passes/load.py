"""Read a model: a path or a `ModelProto` → a checked `Model` whose external weights stay on disk.

Reads the model file, nothing of the weights beside it except to hash them. The model is untrusted: everything that later
steps rely on is checked here, and what is wrong becomes one line that begins with the model's path.

It must not refuse what it need not understand: unknown domains, metadata and functions pass.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError, Message
from onnx import TensorProto, helper

from .errors import InputError
from .graph import STANDARD
from .model import Model
from .save import PROTOBUF_LIMIT_BYTES, Piece, encode
from .session import RUNTIME_VERSION, open_session
from .weights import TENSOR_FIELDS, WeightStore, children, tensors

OLDEST_OPSET = 7
OLDEST_IR_VERSION = 3

_CHUNK_BYTES = 1 << 20
_MESSAGE_LIMIT = 300  # characters of the checker's own words in an error
_LFS_POINTER = b"version https://git-lfs"


def load(source: str | Path | onnx.ModelProto, *, folder: Path | None = None) -> Model:
    """Read and check a model.

    Args:
        source: the path of a binary `.onnx` file, or a model in memory, which is copied.
        folder: where the external data of a model in memory lies; None if it has none. A file's own folder is always used.

    Returns:
        The model. `sha256` of a file without external data is that of the file; every external data file adds its location,
        size and content, in the order of locations. A model in memory counts as its deterministic serialization.

    Raises:
        InputError: there is no such file, it is no complete ONNX model, its opset or IR version is not supported, its graph
            is malformed, or a tensor fails `WeightStore.check`.
    """
    if isinstance(source, onnx.ModelProto):
        path, label, read = None, f"model {source.graph.name!r}", partial(_serialized, source)
    else:
        path, label, read = Path(source), str(source), partial(_read, Path(source))
        folder = path.parent
    weights = WeightStore(folder)
    try:
        content = read()
        proto = _parse(content)
        _check(proto, weights)
        size_bytes, sha256 = _identity(content, weights)
    except UnicodeDecodeError as error:
        raise InputError(f"{label}: a name or string is not UTF-8 ({error.reason}); export the model again") from error
    except InputError as error:
        raise InputError(f"{label}: {error}") from error
    return Model(proto=proto, weights=weights, path=path, size_bytes=size_bytes, sha256=sha256)


def _serialized(proto: onnx.ModelProto) -> bytes:
    try:
        return bytes(proto.SerializeToString(deterministic=True))
    except EncodeError as error:
        raise InputError("is over 2 GB, which protobuf cannot hold; save it with external data and load the file") from error


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise InputError("is a folder, expected an ONNX file; name the .onnx file in it")
        if not stat.S_ISREG(status.st_mode):
            raise InputError("is not a regular file, expected an ONNX file; copy the model to a file")
        if status.st_size > PROTOBUF_LIMIT_BYTES:
            raise InputError(f"has {status.st_size} bytes, expected at most {PROTOBUF_LIMIT_BYTES}; export the model with external data")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"cannot be read: {reason}; check the path and its permissions") from error


def _parse(content: bytes) -> onnx.ModelProto:
    if not content:
        raise InputError("is empty, expected an ONNX model; export or download it again")
    if content.startswith(_LFS_POINTER):
        raise InputError("is a Git LFS pointer, expected the model itself; run 'git lfs pull'")
    try:
        proto: onnx.ModelProto = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise InputError("is no ONNX model, or a truncated one; export or download it again") from error
    if not proto.HasField("graph"):
        raise InputError("holds no graph, expected an ONNX model; export or download it again")
    return proto


def _check(proto: onnx.ModelProto, weights: WeightStore) -> None:
    _check_versions(proto)
    if not proto.graph.output:
        raise InputError(f"graph {proto.graph.name!r} has no outputs, expected at least one; export the model with its outputs")
    for graph in _graphs(proto):
        names = [tensor.name for tensor in graph.initializer] + [sparse.values.name for sparse in graph.sparse_initializer]
        repeated = [name for name, count in Counter(names).items() if count > 1]
        if repeated:
            raise InputError(
                f"graph {graph.name!r} has {names.count(repeated[0])} initializers called {repeated[0]!r}, expected one; "
                "rename them or export the model again"
            )
    for tensor in tensors(proto):
        weights.check(tensor)
    skeleton = _skeleton(proto)
    _check_texts(skeleton)
    _amend(skeleton)
    try:
        onnx.checker.check_model(skeleton)
    except onnx.checker.ValidationError as error:
        reason = " ".join(str(error).split())[:_MESSAGE_LIMIT]
        raise InputError(f"is not valid ONNX: {reason}; repair or export the model again") from error


def _check_versions(proto: onnx.ModelProto) -> None:
    newest_ir = _newest_ir_version()
    if not OLDEST_IR_VERSION <= proto.ir_version <= newest_ir:
        raise InputError(
            f"IR version {proto.ir_version}, expected {OLDEST_IR_VERSION} to {newest_ir} ({_installed()}); "
            f"{_remedy(proto.ir_version > newest_ir)}"
        )
    opsets = {entry.version for entry in proto.opset_import if entry.domain in STANDARD}
    if len(opsets) != 1:
        raise InputError(f"imports {len(opsets)} versions of the default opset {sorted(opsets)}, expected one; export the model again")
    (opset,) = opsets
    newest = newest_opset()
    if not OLDEST_OPSET <= opset <= newest:
        raise InputError(f"opset {opset}, expected {OLDEST_OPSET} to {newest} ({_installed()}); {_remedy(opset > newest)}")


def _check_texts(message: Message) -> None:
    """Refuse names that are not UTF-8: protobuf hands them out as bytes, which nothing after this expects."""
    for descriptor, value in message.ListFields():
        if descriptor.type == descriptor.TYPE_STRING:
            for text in [value] if isinstance(value, (str, bytes)) else value:
                if isinstance(text, bytes):
                    raise InputError(f"{descriptor.full_name} {text[:40]!r} is not UTF-8, expected text; export the model again")
        elif descriptor.type == descriptor.TYPE_MESSAGE:
            for child in [value] if isinstance(value, Message) else value:
                _check_texts(child)


def _installed() -> str:
    return f"onnx {onnx.__version__}, ONNX Runtime {RUNTIME_VERSION}"


def _remedy(too_new: bool) -> str:
    return "update both or export for an older version" if too_new else "convert it with onnx.version_converter"


@cache
def newest_opset() -> int:
    """The newest default-domain opset that both the installed onnx and ONNX Runtime support."""
    return _newest(range(OLDEST_OPSET, onnx.defs.onnx_opset_version() + 1), partial(_probe, OLDEST_IR_VERSION))


@cache
def _newest_ir_version() -> int:
    return _newest(range(OLDEST_IR_VERSION, onnx.IR_VERSION + 1), lambda ir_version: _probe(ir_version, OLDEST_OPSET))


def _newest(versions: range, probe: Callable[[int], onnx.ModelProto]) -> int:
    """The last version whose probe ONNX Runtime loads: it tells its limits in no other way."""
    for version in reversed(versions):
        with suppress(InputError):
            open_session(probe(version), optimize=False)
            return version
    return versions.start


def _probe(ir_version: int, opset: int) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "probe", values[:1], values[1:])
    return helper.make_model(graph, ir_version=ir_version, opset_imports=[helper.make_opsetid("", opset)])


def _graphs(message: Message) -> Iterator[onnx.GraphProto]:
    """Every graph of a model, nested ones included."""
    kind = message.DESCRIPTOR.name
    if kind == "GraphProto":
        yield message
    for field in TENSOR_FIELDS.get(kind, ()):
        for child in children(message, field):
            yield from _graphs(child)


def _skeleton(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose tensors are empty."""
    content = b"".join(bytes(piece.read()) for piece in encode(proto, _empty))
    skeleton: onnx.ModelProto = onnx.ModelProto.FromString(content)
    return skeleton


def _amend(skeleton: onnx.ModelProto) -> None:
    """Supply what the checker wants and ONNX Runtime does without.

    That is an import for the domains it brings itself, such as com.microsoft, and a name for every graph.
    """
    for scope in (skeleton, *skeleton.functions):
        imported = {entry.domain for entry in scope.opset_import}
        used = {node.domain for node in _nodes(scope)}
        scope.opset_import.extend(helper.make_opsetid(domain, 1) for domain in sorted(used - imported - {*STANDARD}))
    for graph in _graphs(skeleton):
        graph.name = graph.name or "graph"


def _empty(tensor: TensorProto, may_move: bool) -> list[Piece]:
    content = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=[0]).SerializeToString()
    return [Piece(len(content), lambda: content)]


def _nodes(message: Message) -> Iterator[onnx.NodeProto]:
    """Every node below a model or function, but not those of a model's functions."""
    kind = message.DESCRIPTOR.name
    if kind == "NodeProto":
        yield message
    for field in TENSOR_FIELDS.get(kind, ()):
        if field != "functions":
            for child in children(message, field):
                yield from _nodes(child)


def _identity(content: bytes, weights: WeightStore) -> tuple[int, str]:
    """(size in bytes, sha256) over the model file and the external data files that its tensors name."""
    size_bytes, digest = len(content), hashlib.sha256(content)
    for location in sorted(weights.files):
        with weights.open_external(location) as file:
            file_bytes = os.fstat(file.fileno()).st_size
            digest.update(f"{len(location)}:{location}:{file_bytes}:".encode())
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        size_bytes += file_bytes
    return size_bytes, digest.hexdigest()
