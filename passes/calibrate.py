"""Gather statistics: run the model over data and let the graph itself accumulate each site's second moment.

For every site the model gets a few more nodes that sum x xᵀ over the rows of a feed (a Conv's rows are its patches), so only n×n matrices
leave the graph; they are added up in float64. Sites that read the same value share one sum. When all the moments together are too large
the sites are taken in several runs. Where a Conv has far more output positions than its moment needs, some of them are sampled.

Sites in nested graphs get no measurement and an isotropic metric; so do those whose inputs are not finite or too large to be squared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, helper

from intaglio.ops.emit import Emitter, Target
from intaglio.ops.families import FAMILIES, GramRequest
from intaglio.ops.families.conv import CONV, GEOMETRY
from intaglio.ops.moment import Moment

from .data import Dataset, Feed
from .execute import Executor
from .graph import MAIN, all_names
from .model import Model
from .options import Runtime
from .rewrite import tensor_proto
from .sites import Site, opset

ROWS_PER_INPUT = 16
"""Rows wanted per row of a moment; Convs with more positions than that are sampled."""

MOMENT_LIMIT_BYTES = 1 << 30
"""Most bytes of float64 moments gathered in one run."""

UNSEEN = 0.9
"""Share of an embedding's look-ups that is spread over its rows by length alone, because calibration data never shows every token."""


@dataclass(frozen=True)
class Shapes:
    """What one feed of the latency batch shows a site: shapes of its activation and of its operator's first output."""

    input: tuple[int, ...]
    output: tuple[int, ...]


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
    proto = _copy(model.proto)
    taken = frozenset(all_names(proto))
    grams: dict[tuple[object, ...], tuple[str, ...]] = {}
    keys: dict[str, tuple[object, ...]] = {}
    for number, site in enumerate(sites):
        use, family = site.use, FAMILIES[site.use.key]
        value, own = family.activation(use)
        if own and not value:
            value = _named_output(proto, use.node)
        sampled = sampled_positions(site, shapes[site.name], len(indices))
        geometry = tuple(a.SerializeToString() for a in use.node.attribute if a.name in (*GEOMETRY, "layout", "transA", "transB"))
        kernel = use.view.shape[1:] if family is CONV else ()
        key: tuple[object, ...] = (family.name, value, use.index, use.view.groups, use.view.n, geometry, kernel)
        keys[site.name] = key
        if key in grams:
            continue
        emitter = Emitter(Target(opset(proto), False, f"intaglio.gram{number}", taken))
        request = GramRequest(
            len(shapes[site.name].input), site.uses[0].dtype != np.float32, sampled[0] if sampled else None, seed + number
        )
        gram = family.gram(emitter, use, value, request)
        rows = emitter.node("Size", [gram.rows])
        proto.graph.node.extend(emitter.nodes)
        proto.graph.initializer.extend(tensor_proto(name, array) for name, array in emitter.initializers.items())
        grams[key] = (gram.total, rows, *([] if gram.sums is None else [gram.sums]))
    fetches = [name for names in grams.values() for name in names]
    executor = Executor.of(replace(model, proto=proto), fetches, runtime)
    views = {keys[site.name]: site.use.view for site in sites}
    sums: dict[tuple[object, ...], NDArray[Any]] = {}
    inputs: dict[tuple[object, ...], NDArray[Any]] = {}
    counts = dict.fromkeys(grams, 0)
    for values in executor.run(feed for feed, _ in data.feeds(indices, runtime.batch)):
        fetched = iter(values)
        for key, names in grams.items():
            view, total, size = views[key], next(fetched), next(fetched)
            if len(names) == 3:
                inputs[key] = inputs.get(key, 0.0) + next(fetched).astype(np.float64).reshape(view.groups, view.n)
            if key[0] == "gather":
                index = np.where(total < 0, total + view.n, total)
                part = np.bincount(index, minlength=view.n).astype(np.float64)[None]
                counts[key] += int(size)
            else:
                part = total.astype(np.float64).reshape(view.groups, view.n, view.n)
                counts[key] += int(size) // (view.groups * view.n)
            with np.errstate(invalid="ignore"):  # infinities of both signs; what comes of them is not used
                sums[key] = sums[key] + part if key in sums else part
    moments = {}
    for site in sites:
        key = keys[site.name]
        mean = sums[key] / max(1, counts[key])
        if key[0] == "gather":
            mean = (1 - UNSEEN) * mean + UNSEEN / mean.shape[1]
        known = np.isfinite(mean).all()
        center = inputs[key] / max(1, counts[key]) if key in inputs else None
        moments[site.name] = Moment(mean, counts[key], center) if known else Moment.isotropic(site.use.view.groups, site.use.view.n)
    return moments


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
