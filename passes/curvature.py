"""Gather output metrics: what a mean square error at each output of a layer does to the model's outputs, to second order.

For every site G = Σ g gᵀ over samples and output positions is summed, where g is the gradient at what the site's operator yields (before a
bias that is added by another operator) of a random projection of the model's outputs. The projection v has the covariance of the
divergence's own curvature, so that ½ tr(G Δ A Δᵀ) is what a change Δ of the weight does to the divergence, in its own unit, as far as
positions and the two sides of a layer are unrelated (Martens and Grosse 2015, arXiv 1503.05671; Grosse and Martens 2016, arXiv 1602.01407
for convolutions):

- class scores, divergence KL: the curvature in the logits is diag(p) − p pᵀ (the Fisher information), and v = √p ∘ ε − p·√pᵀε with normal ε
  has that covariance. The gradient for a label drawn from p has it too, but where p is confident nearly all of it lies in a few rare draws;
- other outputs, divergence relative mean square: v is normal, scaled by √(2 / Σ reference²).

The reverse pass is a graph (`differentiate`), and sums g gᵀ inside itself, so that no gradient leaves it.

Must not fire on: weights in nested graphs; operators between whose product with the weight and whose output something else happens
(recurrent layers, ConvTranspose); sites whose path to the outputs has an operator that cannot be differentiated; models whose weights do
not fit in memory at once. Such sites have no metric, and the reason is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import scipy.special
from numpy.typing import NDArray
from onnx import ModelProto

from intaglio.ops.emit import Emitter, Target
from intaglio.ops.families import FAMILIES, Use
from intaglio.ops.families.base import reduce_sum, reshape
from intaglio.ops.moment import Moment, OutputMetric

from .calibrate import Shapes
from .data import Dataset
from .differentiate import Differentiated, differentiate
from .divergence import Kind
from .errors import InputError
from .execute import Executor
from .graph import MAIN, all_names
from .job import Job
from .model import Model
from .modernize import modernize
from .options import Runtime
from .rewrite import tensor_proto
from .sites import Site, opset
from .values import infer

CURVATURES = ("input", "both")
"""Values of `Settings.curvature`."""

SAMPLES = 512
"""Most fit samples that gradients are taken of."""

TRUST = 0.5
"""Share of G in the metric; the rest is the identity.

G is that of the original model, and the whole model changes: outputs that matter to nobody now do so once what reads them has changed. On
classifiers with all layers at low rank, G alone lowers the divergence of single layers but not reliably that of the model; half of it does.
"""

LARGEST_OUTPUTS = 4096
"""Layers with more outputs per group (those that yield a vocabulary) keep the diagonal of G only."""

PART_BYTES = 1 << 29
"""Most bytes of float64 metrics gathered in one run."""

Float64 = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Curvature:
    """What errors at a layer's outputs cost, or why that is not known.

    Attributes:
        matrix: G, (groups, m, m) float64, or its diagonal (groups, m); a sum over positions and a mean over samples, scaled so that
            ½ tr(G Δ A Δᵀ) is a divergence. Zeros where there is a reason.
        samples: how many stand behind it.
        reason: why there is none; None where there is.
    """

    matrix: Float64
    samples: int
    reason: str | None = None

    @staticmethod
    def unknown(use: Use, reason: str) -> Curvature:
        """No metric."""
        return Curvature(np.zeros((use.view.groups, use.view.m)), 0, reason)

    def metric(self) -> OutputMetric | None:
        """G with a mean diagonal of 1, shrunk towards the identity: t·(1 − λ)·G + (1 − t·(1 − λ))·I, t = `TRUST`.

        As for inputs (`Moment.shrunk`), λ = 0.1·m / (0.1·m + samples), so that directions that few samples never showed are not free. None
        where nothing is known, or where no output of the layer reaches any of the model's.
        """
        known = OutputMetric(self.matrix)
        mean = float(known.diag.mean())
        if self.reason is not None or not mean > 0:
            return None
        m = self.matrix.shape[1]
        share = 1 - TRUST * self.samples / (0.1 * m + self.samples)
        matrix = (1 - share) / mean * self.matrix
        if known.diagonal:
            return OutputMetric(matrix + share)
        index = np.arange(m)
        matrix[:, index, index] += share
        return OutputMetric(matrix)

    def predicted(self, moment: Moment, weight: Float64, other: Float64) -> float:
        """½ tr(G Δ A Δᵀ), Δ = W − other: the predicted divergence when the weight (groups, m, n) alone is replaced."""
        return 0.5 * moment.with_outputs(OutputMetric(self.matrix)).energy(weight, other)


_known: WeakKeyDictionary[Job, dict[str, Curvature]] = WeakKeyDictionary()


def curvatures(job: Job) -> Mapping[str, Curvature]:
    """Of every site, by name; measured once per job and its copies, on the original model and a part of the fit samples."""
    if job in _known:
        return _known[job]
    fit, seed = job.splits.fit, job.settings.seed
    for other, found in _known.items():  # slopes and samples to judge by change nothing
        if other.model is job.model and other.splits.fit is fit and (other.settings.seed, other.kinds) == (seed, job.kinds):
            _known[job] = found
            return found
    indices = np.sort(np.random.default_rng(seed).choice(fit, min(job.data.enough(SAMPLES), len(fit)), replace=False))
    with job.clock.phase("calibrate"):
        _known[job] = measure(job.model, job.kinds, job.sites.sites, job.shapes, job.data, indices, job.calibration, seed=seed)
    return _known[job]


@dataclass(frozen=True)
class OutputMetrics:
    """The output metrics of a job's sites.

    Attributes:
        known: curvatures by site name; none of sites whose outputs count alike.
    """

    known: Mapping[str, Curvature]

    def weigh(self, site: str, moment: Moment) -> Moment:
        """The moment with the metric of a site's outputs, where there is one."""
        return moment.with_outputs(self.known[site].metric()) if site in self.known else moment


def output_metrics(job: Job) -> OutputMetrics:
    """Of every site; none where the settings ask for input metrics alone."""
    return OutputMetrics({} if job.settings.curvature == "input" else curvatures(job))


def measure(
    model: Model,
    kinds: Sequence[Kind],
    sites: Sequence[Site],
    shapes: Mapping[str, Shapes],
    data: Dataset,
    indices: NDArray[Any],
    runtime: Runtime,
    *,
    seed: int = 0,
) -> dict[str, Curvature]:
    """G of every site over some samples, by site name.

    Args:
        model: the model.
        kinds: what its outputs hold.
        sites: whose outputs to look at.
        shapes: from `calibrate.observe`.
        data: the samples.
        indices: which of them, (n,) integer.
        runtime: how to run.
        seed: of the projections.
    """
    if model.size_bytes > runtime.memory_limit_bytes:
        return {site.name: Curvature.unknown(site.use, "the model is too large to be differentiated in memory") for site in sites}
    try:
        reasons = _reasons(model, sites, shapes)
    except InputError as error:
        return {site.name: Curvature.unknown(site.use, str(error)) for site in sites}
    found = {name: Curvature.unknown(site.use, reason) for site in sites if (reason := reasons.get(name := site.name))}
    able = [site for site in sites if site.name not in found]
    if not able:
        return found
    outputs = _Outputs.of(model, kinds, data, indices, runtime)
    for part in _parts(able):
        try:
            found |= _measure_part(model, outputs, part, shapes, data, indices, runtime, seed)
        except InputError as error:
            found |= {site.name: Curvature.unknown(site.use, str(error)) for site in part}
    return found


# --- which sites


def _reasons(model: Model, sites: Sequence[Site], shapes: Mapping[str, Shapes]) -> dict[str, str]:
    """Why sites have no gradient, by site name, as far as that is known before anything runs.

    Raises:
        InputError: the model cannot be brought into the form that is differentiated.
    """
    values = infer(modernize(model.proto, model.weights).proto)
    reasons = {}
    for site in sites:
        family, value = FAMILIES[site.use.key].name, site.use.node.output[0]
        if site.uses[0].scope != MAIN or site.name not in shapes:
            reasons[site.name] = "it is in a nested graph"
        elif family not in _COLUMNS:
            reasons[site.name] = f"{site.op_type} yields something else than the product with this weight"
        elif value not in values or not values[value].is_float:
            reasons[site.name] = f"the type of '{value}' is unknown to onnx's shape inference"
    return reasons


def _parts(sites: Sequence[Site]) -> list[list[Site]]:
    """Consecutive sites whose metrics together stay within `PART_BYTES`; a larger one is a part of its own."""
    parts: list[list[Site]] = []
    size_bytes = 0
    for site in sites:
        own_bytes = 8 * site.use.view.groups * site.use.view.m * (1 if _is_wide(site.use) else site.use.view.m)
        if not parts or size_bytes + own_bytes > PART_BYTES:
            parts.append([])
            size_bytes = 0
        parts[-1].append(site)
        size_bytes += own_bytes
    return parts


def _is_wide(use: Use) -> bool:
    return use.view.m > LARGEST_OUTPUTS


# --- projections of the model's outputs


def projection(kind: Kind, output: NDArray[np.generic], rng: np.random.Generator) -> Float64:
    """v, shaped like an output: normal, with the divergence's curvature as its covariance, but for a factor that `totals` gives.

    For probabilities and log-probabilities it is what makes the gradient at the logits that of a projection of logits.

    Args:
        kind: what the output holds.
        output: from the original model.
        rng: draws v.
    """
    values = np.asarray(output, np.float64)
    if kind == Kind.VALUES:
        return np.asarray(np.where(np.isfinite(values), rng.standard_normal(values.shape), 0.0))
    axis = _class_axis(values)
    scores = np.moveaxis(np.atleast_1d(values), axis, -1)
    shares = scores if kind == Kind.PROBABILITIES else scipy.special.softmax(scores, -1)
    shares = np.where(np.isfinite(shares), np.maximum(shares, 0.0), 0.0)
    roots, noise = np.sqrt(shares), rng.standard_normal(shares.shape)
    v = roots * noise - shares * (roots * noise).sum(-1, keepdims=True)
    if kind == Kind.PROBABILITIES:
        v = np.divide(v, shares, out=np.zeros_like(v), where=shares > np.finfo(np.float32).tiny)
    return np.asarray(np.moveaxis(v, -1, axis).reshape(values.shape), np.float64)


def total(kind: Kind, output: NDArray[np.generic]) -> float:
    """What an output adds to the divisor of the divergence: rows of scores, or half the sum of squares."""
    values = np.asarray(output, np.float64)
    if kind == Kind.VALUES:
        return 0.5 * float(np.square(values[np.isfinite(values)]).sum())
    return float(values.size / max(1, int(np.atleast_1d(values).shape[_class_axis(values)])))


def _class_axis(values: Float64) -> int:
    """Where classes lie, by the convention of `divergence`."""
    if values.ndim <= 1:
        return 0
    return 1 if values.ndim > 3 or values.size == values.shape[0] * values.shape[1] else values.ndim - 1


@dataclass(frozen=True, eq=False)
class _Outputs:
    """The model's outputs that have gradients.

    Attributes:
        names: of the float ones.
        kinds: what they hold.
        scales: what their projections are multiplied by: 1 over the root of the outputs' number and their totals.
        executor: runs the original model and fetches them.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    scales: Float64
    executor: Executor

    @staticmethod
    def of(model: Model, kinds: Sequence[Kind], data: Dataset, indices: NDArray[Any], runtime: Runtime) -> _Outputs:
        """Run the model once to see how large its outputs are."""
        declared = [value.name for value in model.proto.graph.output]
        executor = Executor.of(model, declared, runtime)
        sums, floats = np.zeros(len(declared)), np.zeros(len(declared), bool)
        for values in executor.run(feed for feed, _ in data.feeds(indices, runtime.batch)):
            for number, (kind, value) in enumerate(zip(kinds, values, strict=True)):
                floats[number] = value.dtype.kind == "f"
                sums[number] += total(kind, value) if floats[number] else 0.0
        kept = [number for number in range(len(declared)) if floats[number] and sums[number] > 0]
        names = tuple(declared[number] for number in kept)
        scales = 1 / np.sqrt(len(declared) * sums[kept])
        return _Outputs(names, tuple(kinds[number] for number in kept), scales, Executor.of(model, names, runtime))


# --- the reverse pass


def _measure_part(
    model: Model,
    outputs: _Outputs,
    sites: Sequence[Site],
    shapes: Mapping[str, Shapes],
    data: Dataset,
    indices: NDArray[Any],
    runtime: Runtime,
    seed: int,
) -> dict[str, Curvature]:
    """Curvatures of some sites.

    Raises:
        InputError: the model cannot be differentiated.
    """
    values = {site.name: site.use.node.output[0] for site in sites}
    found = differentiate(model.proto, outputs.names, list(dict.fromkeys(values.values())), weights=model.weights)
    reasons = {site.name: reason for site in sites if (reason := _missing(found, values[site.name]))}
    able = [site for site in sites if site.name not in reasons]
    proto, fetches = _with_sums(found, able, shapes)
    sums = {site.name: np.zeros(_shape(site.use)) for site in able}
    if able:
        executor = Executor.of(replace(model, proto=proto), fetches, runtime)
        for fetched in executor.run(_fed(found, outputs, data, indices, runtime, seed)):
            for site, part in zip(able, fetched, strict=True):
                with np.errstate(invalid="ignore"):  # what is not finite is found below
                    sums[site.name] += part.astype(np.float64)
    largest = float(outputs.scales.max(initial=0.0))
    for site in able:
        sums[site.name] *= (largest * _alpha(site.use)) ** 2
        if not np.isfinite(sums[site.name]).all():
            reasons[site.name] = "its gradients are not finite"
    return {
        site.name: Curvature.unknown(site.use, reasons[site.name]) if site.name in reasons else Curvature(sums[site.name], len(indices))
        for site in sites
    }


def _missing(found: Differentiated, value: str) -> str | None:
    """Why a value has no gradient, or none that is whole."""
    if value in found.gradients and value not in found.partial:
        return None
    return "; ".join(str(stop) for stop in found.stops) or "no output depends on it"


def _fed(
    found: Differentiated, outputs: _Outputs, data: Dataset, indices: NDArray[Any], runtime: Runtime, seed: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """Feeds with projections in proportion; the largest scale counts as 1, so that gradients in half precision do not vanish."""
    rng = np.random.default_rng(seed)
    scales = outputs.scales / outputs.scales.max(initial=np.finfo(np.float64).tiny)
    for feed, _ in data.feeds(indices, runtime.batch):
        fed = dict(feed)
        for name, kind, scale, value in zip(outputs.names, outputs.kinds, scales, outputs.executor.run_feed(feed), strict=True):
            fed[found.cotangents[name]] = (scale * projection(kind, value, rng)).astype(value.dtype)
        yield fed


def _with_sums(found: Differentiated, sites: Sequence[Site], shapes: Mapping[str, Shapes]) -> tuple[ModelProto, list[str]]:
    """The model with gradients that also sums their products, and the names of the sums, in the order of the sites."""
    proto = ModelProto()
    proto.CopyFrom(found.proto)
    taken = frozenset(all_names(proto))
    fetches = []
    for number, site in enumerate(sites):
        emitter = Emitter(Target(opset(proto), False, f"intaglio.curvature{number}", taken))
        gradient = emitter.node("Cast", [found.gradients[site.use.node.output[0]]], attributes={"to": 1})
        columns = _columns(emitter, site.use, gradient, len(shapes[site.name].output))
        fetches.append(_squared(emitter, columns, _is_wide(site.use)))
        proto.graph.node.extend(emitter.nodes)
        proto.graph.initializer.extend(tensor_proto(name, array) for name, array in emitter.initializers.items())
    return proto, fetches


def _squared(emitter: Emitter, columns: str, diagonal: bool) -> str:
    """(groups, m, k) → Σ g gᵀ over columns, (groups, m, m), or its diagonal."""
    if diagonal:
        return reduce_sum(emitter, emitter.node("Mul", [columns, columns]), 2)
    return emitter.node("MatMul", [columns, emitter.node("Transpose", [columns], attributes={"perm": [0, 2, 1]})])


def _columns(emitter: Emitter, use: Use, gradient: str, rank: int) -> str:
    """The gradient at a layer's output as (groups, m, k), k positions."""
    view = use.view
    layout = _COLUMNS[FAMILIES[use.key].name]
    if layout == "channels":
        split = reshape(emitter, gradient, [0, view.groups, view.m, -1])
        return reshape(emitter, emitter.node("Transpose", [split], attributes={"perm": [1, 2, 0, 3]}), [view.groups, view.m, -1])
    if layout == "operand" and use.index == 0 and rank > 1:  # W·x: outputs along the second-to-last axis
        gradient = emitter.node("Transpose", [gradient], attributes={"perm": [*range(rank - 2), rank - 1, rank - 2]})
    return emitter.node("Transpose", [reshape(emitter, gradient, [1, -1, view.m])], attributes={"perm": [0, 2, 1]})


# How each family's output holds its m outputs per group.
_COLUMNS: Mapping[str, str] = {"conv": "channels", "matmul": "operand", "gemm": "operand", "gather": "last"}


def _shape(use: Use) -> tuple[int, ...]:
    return (use.view.groups, use.view.m) if _is_wide(use) else (use.view.groups, use.view.m, use.view.m)


def _alpha(use: Use) -> float:
    """What the operator multiplies the product with."""
    return next((attribute.f for attribute in use.node.attribute if attribute.name == "alpha"), 1.0)
