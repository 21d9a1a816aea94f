"""User data as feeds: what `--data` and the Python API's `data` may be, and how its samples reach the model.

Accepted sources:

- an `.npz` file, or a mapping, of input name → array. An array of the input's own rank holds samples along axis 0, the batch
  axis; an array with one axis more holds one whole feed per row; a scalar is given to every feed. Other arrays are ignored.
- a folder of `test_data_set_*/input_N.pb`, N counting the model's inputs: each set is one feed.
- a `.py` file with `def samples()`, or an iterable, yielding feeds. The file runs with the user's rights; naming one is the
  opt-in.
- the word `random`: seeded noise of the declared shapes, for trying things out (`Dataset.synthetic`).

Samples are batched as far as the declared shapes allow: a leading 1 means one sample per feed, a fixed k means chunks of k
without the remainder, a dynamic axis takes up to `batch`. Only samples of equal shape share a feed. Whole feeds (an array with
one axis more, a folder, an iterable) are never cut. Those of a folder or an iterable are joined only if the leading axis can be
nothing but the batch: dynamic in every input, of size 1 in every feed, and its name on no other axis.

Padded token batches are trimmed: where an integer input named `*attention_mask*` has two axes, the second dynamic, every sample
loses the positions after its mask's last non-zero, in all inputs that share the axis, and feeds hold samples of one length, so
right padding never enters a statistic. Axes of one name are shared; so is axis 1 of equal size where a name is missing. A whole
feed of several samples is trimmed to the longest. Nothing is trimmed when no other input shares the axis, when one has it as
axis 0, when samples must fill a fixed batch above 1, or with `trim=False`.

Arrays are cast to the declared type only within a kind (float64 → float32, int32 → int64) and only if the values fit.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import re
import runpy
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from google.protobuf.message import DecodeError
from onnx import numpy_helper

from .errors import InputError

Feed = dict[str, npt.NDArray[Any]]
"""One call of the model: input name → array."""

Source = str | os.PathLike[str] | Mapping[str, npt.ArrayLike] | Iterable[Mapping[str, npt.ArrayLike]]
"""Whatever `open_dataset` takes."""

_RANDOM_SAMPLES = 64
_RANDOM_DIM = 32  # a dynamic axis other than the batch: enough for a small image or a short sentence
_RANDOM_BYTES = 2**28  # declared shapes are untrusted: no more memory than this for random data

_UNREADABLE = (OSError, ValueError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class InputSpec:
    """What the model declares about one input; a name or None in `shape` is a dynamic axis."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Splits:
    """Disjoint sample indices, int64, ascending: `fit` gives statistics, `choose` decisions, `verify` the verdict."""

    fit: npt.NDArray[Any]
    choose: npt.NDArray[Any]
    verify: npt.NDArray[Any]


class _Rows(Protocol):
    """Samples in order: each a feed of one sample, or one whole feed. Every row names the inputs in the model's order."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Feed: ...


@dataclass(frozen=True)
class _Trim:
    """Masks over one token axis, and every (input, axis) that shares it."""

    masks: tuple[str, ...]
    axes: tuple[tuple[str, int], ...]

    def apply(self, feed: Feed) -> Feed:
        """The feed without the positions at the end that every mask leaves out; unchanged if its masks differ in width."""
        widths = {feed[mask].shape[1] for mask in self.masks}
        if len(widths) > 1:
            return feed
        width = widths.pop()
        used = np.flatnonzero(np.concatenate([feed[mask] for mask in self.masks]).any(axis=0))
        length = int(used[-1]) + 1 if used.size else 1
        trimmed = dict(feed)
        for name, axis in self.axes:
            if feed[name].shape[axis] == width:
                trimmed[name] = trimmed[name][(slice(None),) * axis + (slice(length),)]
        return trimmed


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples that can be fed to one model; `open_dataset` makes it and has checked every array.

    Attributes:
        rows: the samples as given, each with a batch axis of 1 or as one whole feed.
        per_feed: samples that each feed must hold; None if any number may share one.
        trims: how padding is cut off.
        label_values: (samples, ...), or None without labels.
        synthetic: the data is noise, so nothing may be said about accuracy.
    """

    rows: _Rows
    per_feed: int | None
    trims: tuple[_Trim, ...] = ()
    label_values: npt.NDArray[Any] | None = None
    synthetic: bool = False

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.rows)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) over names, types, shapes and contents as fed, for caches of statistics; labels take no part."""
        digest = hashlib.sha256()
        for index in range(len(self)):
            for name, array in self._row(index).items():
                digest.update(repr((name, str(array.dtype), array.shape)).encode())
                digest.update(repr(array.tolist()).encode() if array.dtype.kind == "O" else array.tobytes())
        return digest.hexdigest()

    def labels(self, indices: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
        """The labels of these samples, (len(indices), ...); None without labels."""
        return None if self.label_values is None else self.label_values[indices]

    def enough(self, count: int) -> int:
        """So many samples, or as many as one feed must hold if that is more."""
        return max(count, self.per_feed or 1)

    def feeds(self, indices: npt.NDArray[Any], batch: int = 32) -> Iterator[tuple[Feed, npt.NDArray[Any]]]:
        """Feed the samples at `indices`, in that order or, where padding is trimmed, from short to long.

        Args:
            indices: (n,), integer.
            batch: most samples in a feed where the model leaves that open.

        Yields:
            A feed and the indices of the samples it holds, (k,), int64. Arrays may be views of the data: never write to them.

        Raises:
            InputError: there are fewer samples than one feed of the model must hold.
        """
        if 0 < len(indices) < (self.per_feed or 1):
            raise InputError(f"data: {len(indices)} samples cannot fill the model's fixed batch of {self.per_feed}; give more samples")
        order = [int(index) for index in indices]
        if self.trims:
            order.sort(key=self._shapes)
        for _, group in itertools.groupby(order, key=self._shapes):
            alike = list(group)
            step = self.per_feed or batch
            for start in range(0, len(alike), step):
                chunk = alike[start : start + step]
                if len(chunk) >= (self.per_feed or 1):
                    yield _join([self._row(index) for index in chunk]), np.array(chunk, dtype=np.int64)

    def first(self, batch: int = 1, trimmed: bool = False) -> Feed:
        """The feed to time the model on: the first `batch` samples, or fewer if the next has another shape.

        A model with a fixed batch gets that many. With `trimmed`, padding that all of them share is cut off.
        """
        count = min(self.per_feed or batch, len(self))
        shapes = _shapes(self.rows[0])
        alike = itertools.takewhile(lambda row: _shapes(row) == shapes, (self.rows[index] for index in range(count)))
        feed = _join(list(alike))
        return self._trim(feed) if trimmed else feed

    def _trim(self, feed: Feed) -> Feed:
        for trim in self.trims:
            feed = trim.apply(feed)
        return feed

    def _row(self, index: int) -> Feed:
        return self._trim(self.rows[index])

    def _shapes(self, index: int) -> tuple[tuple[int, ...], ...]:
        return _shapes(self._row(index))


def input_specs(proto: onnx.ModelProto) -> tuple[InputSpec, ...]:
    """The inputs that a caller must feed, in order: graph inputs that no initializer gives a default.

    Raises:
        InputError: an input is no tensor, or has no known element type or rank.
    """
    defaults = {tensor.name for tensor in proto.graph.initializer}
    defaults |= {tensor.values.name for tensor in proto.graph.sparse_initializer}
    return tuple(_input_spec(value) for value in proto.graph.input if value.name not in defaults)


def open_dataset(source: Source, inputs: Sequence[InputSpec], *, labels: str | None = None, seed: int = 0, trim: bool = True) -> Dataset:
    """Read and check data for a model; the module's docstring says what a source may be.

    Args:
        source: a path, `"random"`, a mapping of arrays, or an iterable of feeds (all of it is kept in memory, so it must end).
        inputs: what the model declares, from `input_specs`.
        labels: the array of an `.npz` or mapping that holds one label per sample along axis 0.
        seed: of random data.
        trim: whether padded token batches are trimmed.

    Raises:
        InputError: the source is missing, unreadable or of no known kind; an array is missing, non-finite, or of the wrong
            type, shape or length.
    """
    if not inputs:
        raise InputError("model: it has no inputs, so data cannot be fed to it; give a model with at least one input")
    trims = _trims(inputs) if trim else ()
    if isinstance(source, Mapping):
        return _columns(source, tuple(source), inputs, "data", labels, trims)
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix == ".npz":
        path = Path(source)
        arrays, present = _read_npz(path, [*(spec.name for spec in inputs), *([labels] if labels else [])])
        return _columns(arrays, present, inputs, str(path), labels, trims)
    if labels is not None:
        raise InputError(f"data: labels {labels!r} need an .npz file or a mapping; put inputs and labels into one")
    if not isinstance(source, (str, os.PathLike)):
        return _whole_feeds(source, inputs, "data", trims)
    if source == "random":
        return _random(inputs, seed)
    path = Path(source)
    if path.is_dir():
        return _whole_feeds(_read_folder(path, inputs), inputs, str(path), trims)
    if path.suffix == ".py":
        return _whole_feeds(_run_samples(path), inputs, str(path), trims)
    if path.suffix == ".npy":
        remedy = "a .npy file does not name its input: save it with numpy.savez(file, INPUT=array)"
    else:
        remedy = "expected an .npz or .py file, a folder of test_data_set_*, or the word random"
    raise InputError(f"{path}: {'not a known kind of data' if path.exists() else 'no such file or folder'}; {remedy}")


def split(count: int, *, seed: int, samples: int | None = None) -> Splits:
    """Deal samples out at random: about half to fit, a quarter to choose, a quarter to verify.

    Args:
        count: the number of samples in the dataset.
        seed: the same one gives the same splits.
        samples: most samples used in total; None for all.

    Raises:
        InputError: fewer than 3 samples, one for each part.
    """
    total = count if samples is None else min(count, samples)
    if total < 3:
        raise InputError(
            f"data: {total} of {count} samples to use, so none can be held out to prove the result; give at least 3, better 100"
        )
    order = np.random.default_rng(seed).permutation(count)[:total].astype(np.int64)
    quarter = max(1, total // 4)
    choose, verify, fit = np.split(order, [quarter, 2 * quarter])
    return Splits(fit=np.sort(fit), choose=np.sort(choose), verify=np.sort(verify))


def _input_spec(value: onnx.ValueInfoProto) -> InputSpec:
    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        found = kind.removesuffix("_type").replace("_", " ") if kind else "unknown"
        raise InputError(f"model: input {value.name!r} has type {found}, but only tensors can be fed; change it to a tensor input")
    tensor = value.type.tensor_type
    if tensor.elem_type not in onnx.TensorProto.DataType.values() or tensor.elem_type == onnx.TensorProto.UNDEFINED:
        raise InputError(f"model: input {value.name!r} has element type {tensor.elem_type}, unknown to onnx {onnx.__version__}")
    if not tensor.HasField("shape"):
        raise InputError(f"model: input {value.name!r} declares no rank; declare its shape, with names for the dynamic axes")
    shape = tuple(_dim(dim) for dim in tensor.shape.dim)
    return InputSpec(value.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return dim.dim_value if dim.dim_value >= 0 else None  # some exporters write -1 for dynamic
    return dim.dim_param or None


# Sources


def _columns(
    arrays: Mapping[str, npt.ArrayLike],
    present: Collection[str],
    inputs: Sequence[InputSpec],
    where: str,
    label: str | None,
    trims: tuple[_Trim, ...],
) -> Dataset:
    """One array per input, the samples side by side; only the arrays needed are looked up, once each."""
    _require([spec.name for spec in inputs], present, where)
    columns = {spec.name: _conform(arrays[spec.name], spec, where) for spec in inputs}
    batched, stacked, fixed = [], False, set()
    for spec in inputs:
        array = columns[spec.name]
        if spec.shape and spec.shape[0] != 0 and _fits(array.shape, (None, *spec.shape[1:])):
            batched.append(spec)
            fixed |= {spec.shape[0]} if isinstance(spec.shape[0], int) else set()
        elif _fits(array.shape, (None, *spec.shape)):
            stacked = True
        elif spec.shape or array.shape:
            expected = [f"samples along axis 0 {_show(('samples', *spec.shape[1:]))}" if spec.shape else "a scalar"]
            expected += [f"one whole feed per row {_show(('feeds', *spec.shape))}"]
            raise InputError(f"{where}: array {spec.name!r} has shape {_show(array.shape)}, expected {' or '.join(expected)}")
    whole = stacked or len(fixed) > 1
    if whole:  # some input's rows are whole feeds: cut the others into whole feeds too
        for spec in batched:
            size = spec.shape[0] if isinstance(spec.shape[0], int) else 1
            array = columns[spec.name]
            feeds = len(array) // size
            columns[spec.name] = array[: feeds * size].reshape(feeds, size, *array.shape[1:])
    counts = {name: len(array) for name, array in columns.items() if array.ndim}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name!r} {count}" for name, count in counts.items())
        unit = "feeds" if whole else "samples"
        raise InputError(f"{where}: the arrays differ in their number of {unit} ({found}); make them equal")
    per_feed = 1 if whole or not counts else next(iter(fixed), None)
    rows = _ColumnRows(columns, 1 if not counts else next(iter(counts.values())), whole)
    if len(rows) < (per_feed or 1):
        raise InputError(f"{where}: {len(rows)} samples, but one feed of the model holds {per_feed or 1}; give more samples")
    values = None if label is None else _labels(arrays, present, label, len(rows), where)
    return Dataset(rows, per_feed, trims if per_feed in (None, 1) else (), values)


@dataclass(frozen=True, eq=False)
class _ColumnRows:
    """Row i of every column (as a batch of 1, unless rows are whole feeds), views all; scalars as they are."""

    columns: Feed
    count: int
    whole: bool

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int, /) -> Feed:
        row = index if self.whole else slice(index, index + 1)
        return {name: array[row, ...] if array.ndim else array for name, array in self.columns.items()}


def _labels(arrays: Mapping[str, npt.ArrayLike], present: Collection[str], key: str, count: int, where: str) -> npt.NDArray[Any]:
    _require([key], present, where)
    values = np.asarray(arrays[key])
    if values.ndim == 0 or len(values) != count:
        raise InputError(f"{where}: labels {key!r} have shape {_show(values.shape)}, expected one for each of {count} samples")
    return values


def _whole_feeds(
    feeds: Iterable[Mapping[str, npt.ArrayLike]], inputs: Sequence[InputSpec], where: str, trims: tuple[_Trim, ...]
) -> Dataset:
    """Feeds exactly as the user composed them."""
    rows: list[Feed] = []
    for number, feed in enumerate(feeds):
        here = f"{where}: feed {number}"
        if not isinstance(feed, Mapping):
            raise InputError(f"{here} is a {type(feed).__name__}, expected a mapping of input name to array")
        _require([spec.name for spec in inputs], feed, here)
        row = {spec.name: _conform(feed[spec.name], spec, here) for spec in inputs}
        for spec in inputs:
            if not _fits(row[spec.name].shape, spec.shape):
                shape = _show(row[spec.name].shape)
                raise InputError(f"{here}: array {spec.name!r} has shape {shape}, expected {_show(spec.shape)}; reshape it")
        rows.append(row)
    if not rows:
        raise InputError(f"{where}: it holds no feeds, expected at least one")
    return Dataset(rows, _per_feed(rows, inputs), trims)


def _per_feed(rows: Sequence[Feed], inputs: Sequence[InputSpec]) -> int | None:
    """None if whole feeds may be joined along axis 0, else 1."""
    inner = {dim for spec in inputs for dim in spec.shape[1:] if isinstance(dim, str)}
    batches = all(spec.shape and not isinstance(spec.shape[0], int) and spec.shape[0] not in inner for spec in inputs)
    return None if batches and all(len(array) == 1 for row in rows for array in row.values()) else 1


def _read_npz(path: Path, wanted: Collection[str]) -> tuple[Feed, tuple[str, ...]]:
    """The wanted arrays that an .npz file has, and the names of all its arrays. Nothing is unpickled."""
    try:
        with path.open("rb") as file:  # numpy.load(path) would leave a corrupt file open
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise InputError(f"{path}: a single array, not an .npz file; save it with numpy.savez(file, INPUT=array)")
            return {name: archive[name] for name in archive.files if name in wanted}, tuple(archive.files)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file; give the path of an .npz file of input name to array") from error
    except _UNREADABLE as error:
        raise InputError(f"{path}: not a readable .npz file of plain arrays ({_brief(error)}); write it again with numpy.savez") from error


def _read_folder(path: Path, inputs: Sequence[InputSpec]) -> Iterator[Feed]:
    """One feed per test_data_set_*, in the order of their numbers."""
    folders = sorted(path.glob("test_data_set_*"), key=lambda folder: (len(folder.name), folder.name))
    if not folders:
        raise InputError(f"{path}: no test_data_set_* in this folder, expected test_data_set_0/input_0.pb and so on")
    for folder in folders:
        surplus = [file.name for file in folder.glob("input_*.pb") if int(re.sub(r"\D", "", file.stem) or 0) >= len(inputs)]
        if surplus:
            raise InputError(f"{folder}: {min(surplus)} is one too many, the model has {len(inputs)} inputs; remove it")
        yield {spec.name: _read_tensor(folder / f"input_{number}.pb", spec) for number, spec in enumerate(inputs)}


def _read_tensor(path: Path, spec: InputSpec) -> npt.NDArray[Any]:
    try:
        tensor = onnx.TensorProto.FromString(path.read_bytes())
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise InputError(f"{path}: the tensor's data lies in another file; save it without external data")
        array = numpy_helper.to_array(tensor)
        if tensor.data_type == onnx.TensorProto.STRING:  # the elements of string tensors may come as bytes
            texts = [element.decode() if isinstance(element, bytes) else element for element in array.ravel()]
            array = np.array(texts, dtype=object).reshape(array.shape)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file, expected the tensor for input {spec.name!r}") from error
    except (OSError, ValueError, TypeError, KeyError, MemoryError, DecodeError) as error:
        raise InputError(f"{path}: no tensor for input {spec.name!r} ({_brief(error)}); write a TensorProto") from error
    return array


def _run_samples(path: Path) -> Iterator[Mapping[str, npt.ArrayLike]]:
    """What `samples()` in the user's file yields. Whatever it raises is the user's to mend, so it becomes one line."""
    if not path.is_file():
        raise InputError(f"{path}: no such file; give a Python file that defines samples()")
    try:
        samples = runpy.run_path(str(path), run_name="intaglio_data").get("samples")
        if not callable(samples):
            raise InputError(f"{path}: it defines no samples(); add a function of that name that yields feeds")
        yield from samples()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{path}: running it failed ({_brief(error)}); mend the file") from error


def _random(inputs: Sequence[InputSpec], seed: int) -> Dataset:
    """Noise: floats N(0, 1), integers 0 or 1, attention masks of ones. A dynamic axis is 1 in front, elsewhere small."""
    front = {spec.shape[0] for spec in inputs if spec.shape}
    shapes = {}
    for spec in inputs:
        sizes = [
            dim if isinstance(dim, int) else 1 if axis == 0 or (dim and dim in front) else _RANDOM_DIM
            for axis, dim in enumerate(spec.shape)
        ]
        shapes[spec.name] = tuple(sizes)
        if _kind(spec.dtype) not in ("float", "integer", "bool"):
            raise InputError(f"data: random values of type {spec.dtype} for input {spec.name!r} cannot be made; give real data")
    size_bytes = sum(8 * math.prod(shape) for shape in shapes.values())
    if 3 * size_bytes > _RANDOM_BYTES:  # one sample for each split
        raise InputError(f"data: one random sample would take {size_bytes} bytes; give real data")
    rng = np.random.default_rng(seed)
    count = min(_RANDOM_SAMPLES, _RANDOM_BYTES // max(1, size_bytes))
    rows = [{spec.name: _noise(spec, shapes[spec.name], rng) for spec in inputs} for _ in range(count)]
    return Dataset(rows, _per_feed(rows, inputs), synthetic=True)


def _noise(spec: InputSpec, shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[Any]:
    if _kind(spec.dtype) == "float":
        return np.asarray(rng.standard_normal(shape, dtype=np.float32)).astype(spec.dtype)
    if "attention_mask" in spec.name:
        return np.ones(shape, dtype=spec.dtype)
    return np.asarray(rng.integers(0, 2, size=shape)).astype(spec.dtype)


# Arrays


def _conform(value: npt.ArrayLike, spec: InputSpec, where: str) -> npt.NDArray[Any]:
    """The value as an array of the declared type; finite if of floats. Its shape is the caller's to check."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise InputError(f"{where}: array {spec.name!r} is ragged ({_brief(error)}); make its rows equally long") from error
    if array.dtype.kind == "V" and spec.dtype.kind == "V" and array.dtype.itemsize == spec.dtype.itemsize:
        array = array.view(spec.dtype)  # .npz files keep the bits of bfloat16 and its like, but not the type
    kind = _kind(spec.dtype)
    if _kind(array.dtype) != kind:
        raise InputError(f"{where}: array {spec.name!r} holds {array.dtype}, the model takes {spec.dtype}; convert it")
    if kind == "string":
        if not all(isinstance(element, str) for element in array.ravel()):
            raise InputError(f"{where}: array {spec.name!r} holds objects other than strings; give strings only")
        return array.astype(object)
    with np.errstate(over="ignore"):  # an overflow becomes an infinity, refused below
        cast = array.astype(spec.dtype, copy=False)
    if kind == "integer" and not np.can_cast(array.dtype, spec.dtype) and not np.array_equal(cast, array):
        raise InputError(f"{where}: array {spec.name!r} holds {array.dtype} values that do not fit the model's {spec.dtype}")
    if kind == "float" and not np.isfinite(cast).all():
        raise InputError(f"{where}: array {spec.name!r} has NaN, infinity or values too large for {spec.dtype}; remove them")
    return cast


def _kind(dtype: np.dtype[Any]) -> str:
    """What a type holds; casts stay within a kind. The extension types of ml_dtypes say so only through what they cast to."""
    kinds = {"b": "bool", "i": "integer", "u": "integer", "f": "float", "U": "string", "O": "string"}
    if dtype.kind == "V" and np.can_cast(dtype, np.int64):
        return "integer"
    if dtype.kind == "V" and np.can_cast(dtype, np.float64):
        return "float"
    return kinds.get(dtype.kind, str(dtype))


def _trims(inputs: Sequence[InputSpec]) -> tuple[_Trim, ...]:
    """One entry per token axis that has an attention mask and another input to trim along with it."""
    front = {spec.shape[0] for spec in inputs if spec.shape and spec.shape[0] is not None}
    masks: dict[str | None, list[str]] = {}
    for spec in inputs:
        token_mask = "attention_mask" in spec.name and len(spec.shape) == 2 and _kind(spec.dtype) in ("integer", "bool")
        if token_mask and not isinstance(spec.shape[1], int) and spec.shape[1] not in front:
            masks.setdefault(spec.shape[1], []).append(spec.name)
    trims = []
    for symbol, names in masks.items():
        axes = tuple(
            (spec.name, axis)
            for spec in inputs
            for axis, dim in enumerate(spec.shape)
            if not isinstance(dim, int) and (dim == symbol if dim and symbol else axis == 1)
        )
        if {name for name, _ in axes} - set(names):
            trims.append(_Trim(tuple(names), axes))
    return tuple(trims)


def _join(rows: Sequence[Feed]) -> Feed:
    """Rows of equal shapes as one feed, along axis 0; scalars are the same in all of them."""
    if len(rows) == 1:
        return rows[0]
    return {name: np.concatenate([row[name] for row in rows]) if array.ndim else array for name, array in rows[0].items()}


def _shapes(feed: Feed) -> tuple[tuple[int, ...], ...]:
    return tuple(array.shape for array in feed.values())


def _fits(shape: tuple[int, ...], declared: tuple[int | str | None, ...]) -> bool:
    return len(shape) == len(declared) and all(want == got for want, got in zip(declared, shape, strict=True) if isinstance(want, int))


def _show(shape: tuple[int | str | None, ...]) -> str:
    return f"[{', '.join('?' if dim is None else str(dim) for dim in shape)}]"


def _require(names: Sequence[str], present: Collection[str], where: str) -> None:
    for name in names:
        if name not in present:
            found = ", ".join(map(repr, present)) or "nothing"
            raise InputError(f"{where}: no array {name!r}, it holds {found}; add or rename one")


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
