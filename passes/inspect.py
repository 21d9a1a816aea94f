"""What is in a model and what could shrink: bytes, work, time and rank of every weight.

With data, work comes from observed shapes, time is measured, and ranks are those of the whitened weight, W·A½ with A the
second moment of its input. Without data, work comes from declared shapes with a leading dynamic axis taken as 1, nothing is
timed, and ranks are those of W.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from intaglio import __version__
from intaglio.ops.decompositions.lowrank import spectrum
from intaglio.ops.families import FAMILIES
from intaglio.ops.moment import Moment

from .analyse import measured_sites
from .calibrate import Shapes
from .canonicalize import canonicalize
from .facts import FileFacts, SampledFacts
from .job import Job
from .load import load
from .model import Model
from .options import Progress, silent
from .report import latency_pricer, sampled_sites
from .session import open_session
from .sites import Site, Sites, Skip, find_sites, opset, without_broken
from .targets import TARGETS

HELD_ENERGY = 0.99
"""Share of a weight's energy that `rank_99` components hold."""


@dataclass(frozen=True)
class SiteProfile:
    """One weight.

    Attributes:
        name: of the site.
        op_type: operator that reads it.
        shape: of the weight.
        dtype: of the weight.
        uses: how many operators read it.
        bytes: of the stored tensors.
        share: bytes / bytes of the model.
        macs: multiply-accumulates of its first use in one run; None where shapes are unknown.
        latency_s: of the operator, scaled down where operators by themselves sum to more than the model; None where not measured.
        latency_share: latency_s / latency of the model.
        rank: the most components it can have.
        effective_rank: exp of the entropy of its normalized energies.
        rank_99: components that hold 99 % of its energy.
    """

    name: str
    op_type: str
    shape: tuple[int, ...]
    dtype: str
    uses: int
    bytes: int
    share: float
    macs: int | None
    latency_s: float | None
    latency_share: float | None
    rank: int
    effective_rank: float
    rank_99: int


@dataclass(frozen=True)
class SkipProfile:
    """A weight that no form may touch."""

    name: str
    op_type: str
    shape: tuple[int, ...]
    bytes: int
    reason: str


@dataclass(frozen=True)
class Inspection:
    """What `inspect` prints.

    Attributes:
        intaglio: version of this program.
        model: the file.
        bytes: of the file and its external data.
        opset: of the default domain.
        whitened: whether ranks are data-aware.
        synthetic: the data was random.
        latency_s: of one run of the model; None without data.
        sites: in the order in which the graph runs.
        skipped: the other weights.
        statistics: convolutions whose statistics are sampled.
    """

    intaglio: str
    model: FileFacts
    bytes: int
    opset: int
    whitened: bool
    synthetic: bool
    latency_s: float | None
    sites: tuple[SiteProfile, ...]
    skipped: tuple[SkipProfile, ...]
    statistics: tuple[SampledFacts, ...]


def inspect_model(
    source: str | Path | onnx.ModelProto,
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    *,
    progress: Progress = silent,
) -> Inspection:
    """Look at a model by itself.

    Raises:
        InputError: the model is bad, or an expression matches nothing.
    """
    original = load(source)
    model, _ = canonicalize(original)
    if original.weights.files:
        original.weights.enable_spooling(Path(tempfile.gettempdir()))
    sites, excluded = TARGETS["cpu"].select(without_broken(model, find_sites(model)), tuple(include), tuple(exclude))
    shapes = declared_shapes(model, sites.sites)
    profiles = []
    for site in progress(sites, "Inspecting", len(sites)):
        view = site.use.view
        energies = spectrum(site.matrix(site.value(model)), Moment.isotropic(view.groups, view.n))
        profiles.append(_profile(site, original, model, shapes, energies, None, None))
    return _inspection(original, sites, excluded, tuple(profiles), latency_s=None, job=None)


def inspect_job(job: Job, *, progress: Progress = silent) -> Inspection:
    """Look at a model with data.

    Raises:
        InputError: the model does not run on the data.
    """
    runtime = job.settings.runtime
    model = job.model
    session = open_session(model.proto, weights=model.weights, threads=runtime.threads, providers=runtime.providers)
    timer = latency_pricer(job)
    total_s = timer.calibrate(job.sites.sites, session.bind(job.data.first(1)))
    profiles = []
    for site, moment in progress(measured_sites(job), "Inspecting", len(job.sites)):
        energies = spectrum(site.matrix(site.value(model)), moment)
        latency_s = timer.reference(site) if timer.measurable(site) else None
        profiles.append(_profile(site, job.original, model, job.shapes, energies, latency_s, total_s))
    return _inspection(job.original, job.sites, job.excluded, tuple(profiles), latency_s=total_s, job=job)


def effective_rank(energies: NDArray[np.float64]) -> float:
    """exp of the entropy of normalized energies (Roy and Vetterli 2007, with squared singular values); 0 for a weight of zeros.

    Args:
        energies: (k,) float64, non-negative.
    """
    total = energies.sum()
    if total <= 0:
        return 0.0
    shares = energies[energies > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def rank_holding(energies: NDArray[np.float64], share: float) -> int:
    """The fewest leading components that hold a share of the energy.

    Args:
        energies: (k,) float64, descending.
        share: from 0 to 1.
    """
    total = energies.sum()
    return int(np.searchsorted(np.cumsum(energies), share * total * (1 - 1e-12)) + 1) if total > 0 else 0


def declared_shapes(model: Model, sites: Iterable[Site]) -> dict[str, Shapes]:
    """Shapes around sites as far as the model declares them, a leading dynamic axis of an input taken as 1; by site name."""
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    for value in proto.graph.input:
        leading = value.type.tensor_type.shape.dim[:1]
        if leading and not leading[0].HasField("dim_value"):
            leading[0].dim_value = 1
    for value in (*proto.graph.value_info, *proto.graph.output):
        value.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph
    known = {value.name: _static(value) for value in (*graph.input, *graph.value_info, *graph.output)}
    found = {}
    for site in sites:
        activation, own = FAMILIES[site.use.key].activation(site.use)
        output = site.use.node.output[0]
        shapes = known.get(output if own else activation), known.get(output)
        if shapes[0] is not None and shapes[1] is not None:
            found[site.name] = Shapes(shapes[0], shapes[1])
    return found


def _static(value: onnx.ValueInfoProto) -> tuple[int, ...] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape") or not all(dim.HasField("dim_value") for dim in tensor.shape.dim):
        return None
    return tuple(dim.dim_value for dim in tensor.shape.dim)


def _profile(
    site: Site,
    original: Model,
    model: Model,
    shapes: Mapping[str, Shapes],
    energies: NDArray[np.float64],
    latency_s: float | None,
    total_s: float | None,
) -> SiteProfile:
    size = sum(model.weights.nbytes(tensor) for tensor in site.sources)
    seen = shapes.get(site.name)
    macs = None if seen is None else FAMILIES[site.use.key].macs(site.use, seen.input, seen.output)
    pooled = energies.sum(0)
    return SiteProfile(
        name=site.name,
        op_type=site.op_type,
        shape=site.shape,
        dtype=str(site.dtype),
        uses=len(site.uses),
        bytes=size,
        share=size / original.size_bytes,
        macs=macs,
        latency_s=latency_s,
        latency_share=None if latency_s is None or not total_s else latency_s / total_s,
        rank=len(pooled),
        effective_rank=effective_rank(pooled),
        rank_99=rank_holding(pooled, HELD_ENERGY),
    )


def _inspection(
    original: Model,
    sites: Sites,
    excluded: tuple[Skip, ...],
    profiles: tuple[SiteProfile, ...],
    *,
    latency_s: float | None,
    job: Job | None,
) -> Inspection:
    return Inspection(
        intaglio=__version__,
        model=FileFacts.of(original),
        bytes=original.size_bytes,
        opset=opset(original.proto),
        whitened=job is not None,
        synthetic=job is not None and job.data.synthetic,
        latency_s=latency_s,
        sites=profiles,
        skipped=tuple(SkipProfile(s.name, s.op_type, s.shape, s.size_bytes, s.reason) for s in (*sites.skipped, *excluded)),
        statistics=() if job is None else sampled_sites(job),
    )
