"""Re-estimate stored statistics: a BatchNormalization that stays in the graph gets the mean and variance of what it reads by now.

Most normalizations are folded into the Conv before them. Those in front of a Conv (pre-activation ResNets, DenseNets), after an Add or
Concat, or of a value that others read too, are left. They read x in the original and z in the compressed model, whose mean and variance
per channel are not the same: what the layers before lose is not independent of what they yield. With

    σ'² + ε = (σ² + ε)·Var[z] / Var[x],    μ' = E[z] − (E[x] − μ)·√((σ'² + ε) / (σ² + ε))

the output has the original's mean and variance again, on the samples that both were taken from. Where the stored μ is E[x], as training
leaves it, μ' is E[z]. Statistics of a quantized network are re-estimated after rounding by Sun et al., "Hybrid 8-bit floating point (HFP8)
training and inference for deep neural networks", 2019; that they repair a network whose variances have collapsed is from Jordan et al.,
"REPAIR", arXiv 2211.08403. InstanceNormalization, LayerNormalization and their like take both from what they read,
in every run, and so need nothing.

Before: everything is fitted, and activations are floats. After: the same bytes; only the contents of initializers differ. Normalizations
follow each other in the order of the graph, each on what those before it yield by now. A channel keeps its statistics where one half of the
samples denies what the other suggests, and where it has next to no variance. A stage of normalizations keeps them where the outputs do not
come nearer to the original's.

Must not fire on: statistics of the batch, or that are no float32 initializers of one number per channel, or that something else reads, or
that callers may override or read; nested graphs and functions; what nothing compressed comes before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper

from intaglio.ops.emit import Emitter, Target
from intaglio.ops.families.base import reduce_sum, reshape
from intaglio.ops.pruning import block_indices

from .cuts import Cut
from .execute import Executor
from .frontier import Frontier
from .graph import MAIN, STANDARD, Scope, ValueIndex, all_names, downstream, int_attribute, scopes
from .job import Job
from .match import FOLDS
from .model import Model
from .options import Runtime
from .rewrite import OPTIONAL_INPUT_IR, tensor_proto
from .sites import Skip, opset

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]
Statistics = tuple[NDArray[np.float32], NDArray[np.float32]]
"""μ and σ², (channels,) each."""

STAGES = 16
"""Most groups of normalizations whose effect on the outputs is judged, each by one run over `JUDGES` samples."""

JUDGES = 128
"""Fit samples on which it is judged."""

_EPSILON = 1e-5
"""Of an operator that names none."""

_SILENT = 1e-3
"""Channels with less variance than this share of σ² + ε are left alone: on these samples they say next to nothing."""

_REACH = 16.0
"""Most times that variances are changed by, up or down; what asks for more is left alone."""


@dataclass(frozen=True)
class Normalization:
    """A BatchNormalization whose stored statistics may be changed.

    Attributes:
        name: its output.
        value: what it reads.
        mean: name of the initializer μ.
        variance: name of the initializer σ².
        epsilon: ε.
    """

    name: str
    value: str
    mean: str
    variance: str
    epsilon: float


@dataclass(frozen=True, eq=False)
class Spread:
    """First and second moments of what a normalization reads, per channel, from the stored mean.

    Attributes:
        rows: samples times positions.
        sums: (4, channels) float64: z − μ, its square, x − μ, its square, of the model as it is (z) and of the original (x).
    """

    rows: int
    sums: Float64

    def __add__(self, other: Spread) -> Spread:
        return Spread(self.rows + other.rows, self.sums + other.sums)

    @property
    def means(self) -> tuple[Float64, Float64]:
        """E[z − μ] and E[x − μ]."""
        first, _, second, _ = self.sums / self.rows
        return first, second

    @property
    def variances(self) -> tuple[Float64, Float64]:
        """Var[z] and Var[x]."""
        first, squares, second, others = self.sums / self.rows
        return np.maximum(squares - first**2, 0), np.maximum(others - second**2, 0)


def find_normalizations(model: Model) -> tuple[tuple[Normalization, ...], tuple[Skip, ...]]:
    """The normalizations whose statistics may be changed, in the order of the graph, and the others with the reason."""
    proto = model.proto
    index, tensors = ValueIndex(proto), {tensor.name: tensor for tensor in proto.graph.initializer}
    taken = {value.name for value in proto.graph.output}
    taken.update(value.name for value in proto.graph.input if proto.ir_version >= OPTIONAL_INPUT_IR)
    found: list[Normalization] = []
    skipped: list[Skip] = []
    for scope in scopes(proto):
        for node in scope.body.node:
            if node.op_type != "BatchNormalization" or node.domain not in STANDARD:
                continue
            reason = _refusal(node, scope, index, tensors, taken)
            if reason:
                skipped.append(Skip(node.output[0], reason, node.op_type))
                continue
            epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), _EPSILON)
            found.append(Normalization(node.output[0], node.input[0], node.input[3], node.input[4], epsilon))
    return tuple(found), tuple(skipped)


def _refusal(node: NodeProto, scope: Scope, index: ValueIndex, tensors: Mapping[str, TensorProto], taken: Collection[str]) -> str | None:
    """Why the statistics of a normalization must stay."""
    if scope.path != MAIN:
        return "it lies in a nested graph or function"
    if int_attribute(node, "training_mode", 0) or any(node.output[1:]) or not int_attribute(node, "spatial", 1):
        return "it normalizes by statistics of the batch, or of each position"
    for name in node.input[3:5]:
        tensor = tensors.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT or len(tensor.dims) != 1:
            return f"{name!r} is no float32 initializer of one number per channel"
        if name in taken:
            return f"{name!r} is an input or output of the model"
        if len(index.uses(name)) != 1:
            return f"{name!r} is read by something else too"
    return None


def levels(proto: ModelProto, normalizations: Sequence[Normalization]) -> list[list[Normalization]]:
    """Consecutive normalizations none of which reads what another of the same level computes."""
    found: list[list[Normalization]] = []
    reached: set[str] = set()
    for each in normalizations:
        if not found or each.value in reached:
            found.append([])
            reached = set()
        found[-1].append(each)
        reached |= downstream(proto, {each.name})
    return found


def renormalized(job: Job, current: Model, changed: Collection[str], cuts: Sequence[Cut] = ()) -> dict[str, NDArray[np.float32]]:
    """New contents of the statistics that should change, by initializer name; see the module.

    Args:
        job: whose model the original is.
        current: what has become of it.
        changed: values of the main graph that are not what they are in the original.
        cuts: the channel groups that are cut in it.
    """
    moved = [each for each in find_normalizations(job.model)[0] if each.value in changed]
    if not moved:
        return {}
    return _Renormalizing(job, current, moved, cuts).run()


class _Renormalizing:
    """Walks through both models, from one stage of normalizations to the next."""

    def __init__(self, job: Job, current: Model, moved: Sequence[Normalization], cuts: Sequence[Cut]) -> None:
        self._job, self._current, self._cuts = job, current, cuts
        self._left = list(moved)
        self._found: dict[str, NDArray[np.float32]] = {}
        self._ahead, self._behind = (Frontier(model, job.data, job.splits.fit, job.calibration) for model in (job.model, current))
        self._probe = replace(job, model=job.reference).probe(JUDGES)
        self._divergence = self._probe.divergence(current.proto)

    def run(self) -> dict[str, NDArray[np.float32]]:
        """All stages; what was kept of them."""
        runs = levels(self._job.model.proto, self._left)
        share = -(-len(runs) // STAGES)
        for start in range(0, len(runs), share):
            self._stage(runs[start : start + share])
        return self._found

    def _stage(self, runs: Sequence[Sequence[Normalization]]) -> None:
        """Re-estimate a few levels one after the other, and keep that if the outputs are nearer to the original's for it."""
        model, found = self._current, dict[str, NDArray[np.float32]]()
        for run in runs:
            fresh = self._fresh(model, run)
            found |= fresh
            model = with_contents(model, fresh)
        self._left = self._left[sum(map(len, runs)) :]
        after = self._probe.divergence(model.proto) if found else self._divergence
        if after < self._divergence:
            self._current, self._divergence = model, after
            self._found |= found

    def _fresh(self, model: Model, run: Sequence[Normalization]) -> dict[str, NDArray[np.float32]]:
        """New statistics of a level. What is held at the frontiers does not depend on its stage, which may be taken back."""
        pending, wanted = [each.name for each in self._left], {each.value for each in self._left}
        self._ahead.move(self._job.model, pending, wanted)
        self._behind.move(model, pending, wanted)
        stored = [_statistics(model, each) for each in run]
        kept = [_kept(self._cuts, each) for each in run]
        spreads = measured(self._ahead, self._behind, run, [mean for mean, _ in stored], kept, self._job.calibration)
        fresh: dict[str, NDArray[np.float32]] = {}
        for each, old, folds in zip(run, stored, spreads, strict=True):
            new = restored(old, each.epsilon, folds)
            fresh |= {} if new is None else {each.mean: new[0], each.variance: new[1]}
        return fresh


def _statistics(model: Model, each: Normalization) -> Statistics:
    """Those that are stored."""
    tensors = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    mean, variance = (np.asarray(model.weights.read(tensors[name]), np.float32) for name in (each.mean, each.variance))
    return mean, variance


def _kept(cuts: Sequence[Cut], each: Normalization) -> Int64 | None:
    """The original's channels that are still there; None where all are."""
    for cut in cuts:
        for part in cut.group.slices:
            if part.initializer == each.mean:
                return block_indices(cut.kept, part.block)
    return None


def with_contents(model: Model, contents: Mapping[str, NDArray[np.float32]]) -> Model:
    """A copy of a model in which some initializers hold something else; the model itself where none does."""
    if not contents:
        return model
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in contents:
            tensor.CopyFrom(model.weights.spool(tensor.name, contents[tensor.name]))
    return replace(model, proto=proto)


def measured(
    original: Frontier,
    current: Frontier,
    normalizations: Sequence[Normalization],
    means: Sequence[NDArray[np.float32]],
    kept: Sequence[Int64 | None],
    runtime: Runtime,
) -> list[tuple[Spread, ...]]:
    """What normalizations read in two models, for each of them on every fold of the samples that has any rows.

    The original is run first, and what it gives them is fed into the other model's graph, which sums over rows.

    Args:
        original: the original, on some samples.
        current: what has become of it, on the same.
        normalizations: whose inputs are final, and wanted, in both.
        means: μ of each, (channels,) of those that are there in the current model.
        kept: the original's channels that are still there, (channels,) each; None where all are.
        runtime: how to run.
    """
    rest = current.rest()
    proto = ModelProto()
    proto.CopyFrom(rest.proto)
    taken, fed, fetches = frozenset(all_names(proto)), list[str](), list[list[str]]()
    for number, (each, mean, channels) in enumerate(zip(normalizations, means, kept, strict=True)):
        emitter = Emitter(Target(opset(proto), False, f"intaglio.spread{number}", taken))
        fed.append(emitter.name("reference"))
        proto.graph.input.append(helper.make_tensor_value_info(fed[-1], TensorProto.FLOAT, None))
        fetches.append(_summed(emitter, each.value, fed[-1], mean, channels))
        proto.graph.node.extend(emitter.nodes)
        proto.graph.initializer.extend(tensor_proto(name, array) for name, array in emitter.initializers.items())
    inputs = Executor.of(original.rest(), [each.value for each in normalizations], runtime).run(original.feeds())
    feeds = (
        {**feed, **{name: array.astype(np.float32) for name, array in zip(fed, arrays, strict=True)}}
        for feed, arrays in zip(current.feeds(), inputs, strict=True)
    )
    found: list[dict[int, Spread]] = [{} for _ in normalizations]
    for number, arrays in enumerate(
        Executor.of(replace(rest, proto=proto), [name for names in fetches for name in names], runtime).run(feeds)
    ):
        values = iter(arrays)
        for names, folds in zip(fetches, found, strict=True):
            size, *sums = (next(values) for _ in names)
            spread = Spread(int(size) // len(sums[0]), np.stack(sums).astype(np.float64))
            fold = number % FOLDS
            folds[fold] = folds[fold] + spread if fold in folds else spread
    return [tuple(folds.values()) for folds in found]


def _summed(emitter: Emitter, value: str, reference: str, mean: NDArray[np.float32], channels: Int64 | None) -> list[str]:
    """Names of the number of entries of a value, and of the rows of `Spread.sums`; both values are (N, channels, ...)."""
    center = emitter.constant("center", mean[:, None])
    own = emitter.node("Cast", [value], attributes={"to": TensorProto.FLOAT})
    if channels is not None:
        kept = emitter.ints("kept", [int(channel) for channel in channels])
        reference = emitter.node("Gather", [reference, kept], attributes={"axis": 1})
    names = [emitter.node("Size", [own])]
    for operand in (own, reference):
        shifted = emitter.node("Sub", [reshape(emitter, operand, [0, len(mean), -1]), center])
        names += [reduce_sum(emitter, reduce_sum(emitter, each, 2), 0) for each in (shifted, emitter.node("Mul", [shifted, shifted]))]
    return names


def restored(stored: Statistics, epsilon: float, folds: Sequence[Spread]) -> Statistics | None:
    """Statistics by which outputs have the original's mean and variance again; None where no channel changes.

    Args:
        stored: μ and σ².
        epsilon: ε.
        folds: what is read, on parts of the samples; with fewer than two nothing can be held out.
    """
    if len(folds) < FOLDS:
        return None
    mean, variance = (np.asarray(array, np.float64) for array in stored)
    scale = np.sqrt(variance + epsilon)
    with np.errstate(all="ignore"):  # what is not finite, or has no variance, is sorted out by `usable`
        usable = np.logical_and.reduce([_usable(fold, scale**2) for fold in (*folds, folds[0] + folds[1])])
        gains = [_distance(judge, scale) - _distance(judge, scale, *_aim(fit, scale)) for fit, judge in (folds, folds[::-1])]
        factor, shift = _aim(folds[0] + folds[1], scale)
        moved = mean - shift * scale / factor, (scale / factor) ** 2 - epsilon
        changes = usable & (np.minimum(*gains) > 0) & (moved[1] > 0)
    if not changes.any():
        return None
    first, second = (np.where(changes, new, old).astype(np.float32) for new, old in zip(moved, stored, strict=True))
    return first, second


def _usable(fold: Spread, squares: Float64) -> NDArray[np.bool_]:
    """Which channels vary enough in both models to say anything, and not too differently."""
    ours, theirs = fold.variances
    varied = (np.minimum(ours, theirs) > _SILENT * squares) & (np.abs(np.log(ours / theirs)) < np.log(_REACH))
    return np.asarray(np.isfinite(fold.sums).all(0) & varied)


def _aim(fold: Spread, scale: Float64) -> tuple[Float64, Float64]:
    """Factor a and shift b by which a·(z − μ)/σ + b has the mean and variance of (x − μ)/σ."""
    (ours, theirs), (variance, wanted) = fold.means, fold.variances
    factor = np.sqrt(wanted / variance)
    return factor, (theirs - factor * ours) / scale


def _distance(fold: Spread, scale: Float64, factor: Float64 | float = 1.0, shift: Float64 | float = 0.0) -> Float64:
    """How far a·(z − μ)/σ + b is from (x − μ)/σ: squared difference of means plus that of standard deviations.

    The squared Wasserstein distance of two normal distributions (Dowson and Landau, 1982).
    """
    (ours, theirs), (variance, wanted) = fold.means, fold.variances
    means = factor * ours / scale + shift - theirs / scale
    return np.asarray(means**2 + ((factor * np.sqrt(variance) - np.sqrt(wanted)) / scale) ** 2)
