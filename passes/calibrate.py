"""Gather statistics: run the model over data and let the graph itself accumulate each site's second moment.

For every site the model gets a few more nodes that sum x xᵀ over the rows of a feed (a Conv's rows are its patches), so only n×n matrices
leave the graph; they are added up in float64. Sites that read the same value share one sum. When all the moments together are too large
the sites are taken in several runs. Where a Conv has far more output positions than its moment needs, some of them are sampled.

Sites in nested graphs get no measurement and an isotropic metric; so do those whose inputs are not finite or too large to be squared.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from intaglio.ops.emit import Emitter, Target, onnx_type
from intaglio.ops.families import FAMILIES, GramRequest
from intaglio.ops.families.base import Gram, cross_gram
from intaglio.ops.families.conv import CONV, GEOMETRY
from intaglio.ops.moment import Moment
from intaglio.ops.view import MatrixView

from .data import Dataset, Feed
from .execute import Executor
from .frontier import Frontier
from .graph import MAIN, all_names
from .model import Model
from .options import Runtime
from .rewrite import tensor_proto
from .sites import Site, opset

_Key: TypeAlias = tuple[object, ...]

ROWS_PER_INPUT = 16
"""Rows wanted per row of a moment; Convs with more positions than that are sampled."""

MOMENT_LIMIT_BYTES = 1 << 30
"""Most bytes of float64 moments gathered in one run."""

PAIRED = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "Conv", "FusedConv", "ConvTranspose")
"""Operators whose inputs can be compared with a reference's."""

UNSEEN = 0.9
"""Share of an embedding's look-ups that is spread over its rows by length alone, because calibration data never shows every token."""


@dataclass(frozen=True)
class Shapes:
    """What one feed of the latency batch shows a site: shapes of its activation and of its operator's first output."""

    input: tuple[int, ...]
    output: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PairedSite:
    """A site of a reference model, and what it has become in another.

    Attributes:
        site: in the reference.
        current: in the other model: the same operator, perhaps with fewer channels.
        groups: of a site with several groups, those that are still there, (groups,) int64; None where all are.
    """

    site: Site
    current: Site
    groups: NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False)
class Pair:
    """The inputs z of a layer, and the inputs x of the same layer in a reference model, over the same rows.

    Attributes:
        moment: of z, with its mean.
        cross: E[x zᵀ], (groups, p, n) float64.
        mean: E[x], (groups, p) float64.
    """

    moment: Moment
    cross: NDArray[np.float64]
    mean: NDArray[np.float64]

    @property
    def finite(self) -> bool:
        """Whether it was measured, and nothing was too large for it."""
        known = self.moment.rows > 0 and bool(np.isfinite(self.cross).all())
        return known and bool(np.isfinite(self.mean).all()) and self.moment.mean is not None and bool(np.isfinite(self.moment.mean).all())


def observe(model: Model, sites: Sequence[Site], feed: Feed, runtime: Runtime) -> dict[str, Shapes]:
    """Shapes around each site of the main graph for one feed, by site name."""
    proto = _copy(model.proto)
    names = {}
    for site in _measurable(sites):
        use = site.use
        value, own = FAMILIES[use.key].activation(use)
        output = _named_output(proto, use.node)
        names[site.name] = (output if own else value, output)
    wanted = dict.fromkeys(name for pair in names.values() for name in pair)
    shapes = value_shapes(replace(model, proto=proto), list(wanted), feed, runtime)
    return {name: Shapes(shapes[value], shapes[output]) for name, (value, output) in names.items()}


def value_shapes(model: Model, values: Sequence[str], feed: Feed, runtime: Runtime) -> dict[str, tuple[int, ...]]:
    """Shapes of values of the main graph for one feed."""
    if not values:
        return {}
    proto = _copy(model.proto)
    wanted = {name: f"{name}.shape-of" for name in values}
    proto.graph.node.extend(helper.make_node("Shape", [name], [shape]) for name, shape in wanted.items())
    executor = Executor.of(replace(model, proto=proto), list(wanted.values()), runtime)
    return {name: tuple(int(size) for size in shape) for name, shape in zip(wanted, executor.run_feed(feed), strict=True)}


def calibrate(
    model: Model,
    sites: Sequence[Site],
    shapes: Mapping[str, Shapes],
    data: Dataset,
    indices: NDArray[Any],
    runtime: Runtime,
    *,
    seed: int = 0,
) -> dict[str, Moment]:
    """Second moment of every site's input over some samples, by site name.

    Args:
        model: the model, or a partly compressed one in which these sites' operators are still there.
        sites: whose moments to gather.
        shapes: from `observe`.
        data: the samples.
        indices: which of them, (n,) integer.
        runtime: how to run.
        seed: of the sampled positions.
    """
    moments = {site.name: Moment.isotropic(site.use.view.groups, site.use.view.n) for site in sites if site.name not in shapes}
    for part in moment_parts([site for site in sites if site.name in shapes], MOMENT_LIMIT_BYTES):
        moments |= _calibrate_part(model, part, shapes, data, indices, runtime, seed)
    return moments


def calibrate_pairs(
    reference: Frontier,
    current: Frontier,
    sites: Sequence[PairedSite],
    shapes: Mapping[str, Shapes],
    runtime: Runtime,
    *,
    seed: int = 0,
    folds: int = 1,
) -> dict[str, tuple[Pair, ...]]:
    """How the inputs of layers in a model go with those of the same layers in a reference, by site name.

    The reference is run first and its inputs are fed into the model's graph, which sums the products: besides what frontiers hold, at most
    one feed's inputs are in memory for models that run in one piece. Positions of a Conv are sampled in both at the same places.

    Args:
        reference: the model that the sites were found in; what they read must be wanted of it.
        current: what has become of it, on the same samples; the same must be wanted.
        sites: with what they have become; all of the main graph, and of operators in `PAIRED`.
        shapes: from `observe`, of the reference.
        runtime: how to run.
        seed: of the sampled positions.
        folds: feeds are dealt out to as many parts of the samples.

    Returns:
        One pair per fold that has any rows; sites whose inputs are not finite are left out.
    """
    found: dict[str, tuple[Pair, ...]] = {}
    by_name = {each.site.name: each for each in sites}
    limit_bytes = MOMENT_LIMIT_BYTES // (2 * folds)
    for part in moment_parts([each.site for each in sites], limit_bytes):
        pairs = [by_name[site.name] for site in part]
        found |= _calibrate_pairs_part(reference, current, pairs, shapes, runtime, seed, folds)
    return found


def moment_parts(sites: Sequence[Site], limit_bytes: int = 1 << 28) -> list[list[Site]]:
    """Consecutive sites whose moments together stay within a number of bytes; a larger one is a part of its own."""
    parts: list[list[Site]] = []
    size_bytes = 0
    for site in sites:
        own_bytes = _moment_bytes(site)
        if not parts or size_bytes + own_bytes > limit_bytes:
            parts.append([])
            size_bytes = 0
        parts[-1].append(site)
        size_bytes += own_bytes
    return parts


def sampled_positions(site: Site, shapes: Shapes, samples: int) -> tuple[int, int] | None:
    """(positions used, positions there are) per sample of a Conv whose moment is sampled; None where all are used."""
    if site.op_type not in ("Conv", "FusedConv"):
        return None
    there = CONV.output_positions(site.use, shapes.input)
    used = max(1, -(-ROWS_PER_INPUT * site.use.view.n // max(1, samples)))
    return (used, there) if used < there else None


def _calibrate_part(
    model: Model,
    sites: Sequence[Site],
    shapes: Mapping[str, Shapes],
    data: Dataset,
    indices: NDArray[Any],
    runtime: Runtime,
    seed: int,
) -> dict[str, Moment]:
    graph = _Summing(model, shapes, len(indices), seed)
    for site in sites:
        graph.add(site)
    (sums,) = graph.run((feed for feed, _ in data.feeds(indices, runtime.batch)), runtime)
    return {site.name: sums[graph.keys[site.name]].moment(site) for site in sites}


def _calibrate_pairs_part(
    reference: Frontier,
    current: Frontier,
    sites: Sequence[PairedSite],
    shapes: Mapping[str, Shapes],
    runtime: Runtime,
    seed: int,
    folds: int,
) -> dict[str, tuple[Pair, ...]]:
    graph = _Summing(current.rest(), shapes, current.samples, seed)
    for each in sites:
        graph.add(each.current, each)
    inputs = Executor.of(reference.rest(), list(graph.fed), runtime).run(reference.feeds())
    feeds = ({**feed, **dict(zip(graph.fed.values(), found, strict=True))} for feed, found in zip(current.feeds(), inputs, strict=True))
    folded = [sums for sums in graph.run(feeds, runtime, folds) if sums]
    pairs = {each.site.name: tuple(sums[graph.keys[each.site.name]].pair(each.current) for sums in folded) for each in sites}
    return {name: found for name, found in pairs.items() if all(pair.finite for pair in found)}


@dataclass(frozen=True)
class _Names:
    """Fetched values of one gram: as in `Gram`, the number of entries of its rows, and what a reference's input adds."""

    total: str
    size: str
    sums: str | None
    cross: str | None = None
    reference: str | None = None

    @property
    def fetched(self) -> list[str]:
        """Those that are there."""
        return [name for name in (self.total, self.size, self.sums, self.cross, self.reference) if name is not None]


@dataclass
class _Sums:
    """What one gram has summed up so far, in float64, with the number of rows behind it."""

    rows: int = 0
    total: NDArray[Any] | float = 0.0
    inputs: NDArray[Any] | float = 0.0
    cross: NDArray[Any] | float = 0.0
    reference: NDArray[Any] | float = 0.0

    def add(self, names: _Names, values: Mapping[str, NDArray[Any]], view: MatrixView, counted: bool) -> None:
        """Add what one feed yields; `counted` says that the total is a list of rows of an embedding."""
        total, size = values[names.total], int(values[names.size])
        with np.errstate(invalid="ignore"):  # infinities of both signs; what comes of them is not used
            if counted:
                index = np.where(total < 0, total + view.n, total)
                self.total = self.total + np.bincount(index, minlength=view.n).astype(np.float64)[None]
                self.rows += size
                return
            self.total = _added(self.total, total.reshape(view.groups, view.n, view.n))
            self.rows += size // (view.groups * view.n)
            if names.sums is not None:
                self.inputs = _added(self.inputs, values[names.sums].reshape(view.groups, view.n))
            if names.cross is not None and names.reference is not None:
                self.cross = _added(self.cross, values[names.cross].reshape(view.groups, -1, view.n))
                self.reference = _added(self.reference, values[names.reference].reshape(view.groups, -1))

    def moment(self, site: Site) -> Moment:
        """The second moment; an isotropic one where there is none that is finite."""
        view, rows = site.use.view, max(1, self.rows)
        mean = np.asarray(self.total / rows)
        if site.op_type == "Gather":
            return Moment((1 - UNSEEN) * mean + UNSEEN / mean.shape[1], self.rows)
        if not np.isfinite(mean).all():
            return Moment.isotropic(view.groups, view.n)
        return Moment(mean, self.rows, np.asarray(self.inputs / rows))

    def pair(self, site: Site) -> Pair:
        """The inputs and the reference's."""
        rows = max(1, self.rows)
        return Pair(self.moment(site), np.asarray(self.cross / rows), np.asarray(self.reference / rows))


def _added(total: NDArray[Any] | float, part: NDArray[Any]) -> NDArray[Any]:
    """A float64 sum with a part added: in its own memory, once there is some, for the largest moments fill hundreds of megabytes."""
    if isinstance(total, float):
        return part.astype(np.float64)
    return np.asarray(np.add(total, part, out=total))


class _Summing:
    """A copy of a model whose graph sums the second moments of sites' inputs; sites that read the same value alike share a sum.

    Attributes:
        keys: which sum a site has, by site name.
        fed: value of a reference model → the input of the copy that takes it.
    """

    def __init__(self, model: Model, shapes: Mapping[str, Shapes], samples: int, seed: int) -> None:
        self._model = replace(model, proto=_copy(model.proto))
        self._shapes, self._samples, self._seed = shapes, samples, seed
        self._taken = frozenset(all_names(model.proto))
        self._names: dict[_Key, _Names] = {}
        self._sites: dict[_Key, Site] = {}
        self.keys: dict[str, _Key] = {}
        self.fed: dict[str, str] = {}

    def add(self, site: Site, paired: PairedSite | None = None) -> None:
        """Sum the second moment of a site's input, and its products with the input of the same layer in a reference."""
        use, family, number = site.use, FAMILIES[site.use.key], len(self.keys)
        value, own = family.activation(use)
        if own and not value:
            value = _named_output(self._model.proto, use.node)
        geometry = tuple(a.SerializeToString() for a in use.node.attribute if a.name in (*GEOMETRY, "layout", "transA", "transB"))
        kernel = use.view.shape[1:] if family is CONV else ()
        groups = b"" if paired is None or paired.groups is None else paired.groups.tobytes()
        key: _Key = (family.name, value, use.index, use.view.groups, use.view.n, geometry, kernel, groups)
        self.keys[site.name] = key
        if key in self._names:
            return
        proto = self._model.proto
        emitter = Emitter(Target(opset(proto), False, f"intaglio.gram{number}", self._taken))
        whole, shapes = paired.site if paired else site, self._shapes[site.name]
        sampled = sampled_positions(whole, shapes, self._samples)
        request = GramRequest(len(shapes.input), site.uses[0].dtype != np.float32, sampled[0] if sampled else None, self._seed + number)
        gram = family.gram(emitter, use, value, request)
        names = _Names(gram.total, emitter.node("Size", [gram.rows]), gram.sums)
        if paired is not None:
            names = self._against(emitter, gram, names, paired, request)
        proto.graph.node.extend(emitter.nodes)
        proto.graph.initializer.extend(tensor_proto(name, array) for name, array in emitter.initializers.items())
        self._names[key], self._sites[key] = names, site

    def _against(self, emitter: Emitter, gram: Gram, names: _Names, paired: PairedSite, request: GramRequest) -> _Names:
        """Products of a gram's rows with those of the reference, which is read in the same way."""
        site = paired.site
        family = FAMILIES[site.use.key]
        value, _ = family.activation(site.use)
        if value not in self.fed:
            self.fed[value] = emitter.name("reference")
            declared = helper.make_tensor_value_info(self.fed[value], onnx_type(site.uses[0].dtype), None)
            self._model.proto.graph.input.append(declared)
        other = family.gram(emitter, site.use, self.fed[value], request)
        if paired.groups is not None:
            kept = emitter.ints("groups", [int(group) for group in paired.groups])
            rows, sums = (emitter.node("Gather", [name, kept], attributes={"axis": 0}) for name in (other.rows, str(other.sums)))
            other = replace(other, rows=rows, sums=sums)
        return replace(names, cross=cross_gram(emitter, other, gram), reference=other.sums)

    def run(self, feeds: Iterable[Feed], runtime: Runtime, folds: int = 1) -> list[dict[_Key, _Sums]]:
        """The sums of each fold of the feeds, by key; nothing in folds that no feed falls into."""
        fetches = [name for names in self._names.values() for name in names.fetched]
        found: list[dict[_Key, _Sums]] = [{} for _ in range(folds)]
        for number, arrays in enumerate(Executor.of(self._model, fetches, runtime).run(feeds)):
            values = dict(zip(fetches, arrays, strict=True))
            for key, names in self._names.items():
                sums = found[number % folds].setdefault(key, _Sums())
                sums.add(names, values, self._sites[key].use.view, self._sites[key].op_type == "Gather")
        return found


def _measurable(sites: Sequence[Site]) -> list[Site]:
    return [site for site in sites if site.uses[0].scope == MAIN]


def _moment_bytes(site: Site) -> int:
    view = site.use.view
    return 8 * view.groups * view.n * (1 if site.op_type == "Gather" else view.n)


def _named_output(proto: ModelProto, node: NodeProto) -> str:
    """Give the node's first output a name in the copy `proto` if it has none, and return it."""
    if node.output[0]:
        return str(node.output[0])
    known = next(name for name in node.output if name)
    twin = next(other for other in proto.graph.node if known in other.output)
    twin.output[0] = f"intaglio.{known}.sequence"
    return str(twin.output[0])


def _copy(proto: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(proto)
    return copy
