"""Cut channels out of a model: out of the weights of layers, and out of what lies between these.

Cutting a group to k channels takes rows from its producers, inputs from its consumers, which are refitted (`intaglio.ops.pruning`), and
entries from every constant between.

Before: a float model. After: the same graph with fewer channels; nodes keep their names, and no value outside the group changes its shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from intaglio.ops.moment import Moment
from intaglio.ops.pruning import block_indices, check_kept, refit
from intaglio.ops.view import MatrixView

from .groups import ChannelGroup
from .model import Model
from .rewrite import channel_axes
from .sites import Site

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Cut:
    """A group that is cut.

    Attributes:
        group: the group.
        kept: its channels that stay, ascending int64.
    """

    group: ChannelGroup
    kept: Int64


def pruned_shape(site: Site, block: int, count_in: int | None, count_out: int | None) -> tuple[int, ...]:
    """Shape of a site's weight with fewer channels.

    Args:
        site: a producer or consumer.
        block: inputs per channel, from its `Reader`; any number where `count_in` is None.
        count_in: channels that it reads; None where its inputs stay.
        count_out: channels that it writes; None where its outputs stay.
    """
    shape = list(site.shape)
    in_axis, out_axis = channel_axes(site)
    if count_in is not None:
        shape[in_axis] = shape[in_axis] * block * count_in // site.use.view.n
    if count_out is not None:
        shape[out_axis] = count_out
    return tuple(shape)


def pruned_weight(
    site: Site, value: NDArray[np.generic], moment: Moment, block: int, kept_in: Int64 | None, kept_out: Int64 | None
) -> NDArray[np.generic]:
    """A site's weight with fewer channels, refitted to the inputs that stay.

    Args:
        site: a producer or consumer, or both.
        value: its weight, or an array of the same shape in its place.
        moment: of its input.
        block: inputs per channel, from its `Reader`; any number where `kept_in` is None.
        kept_in: channels that it reads, ascending; None where its inputs stay.
        kept_out: channels that it writes, ascending; None where its outputs stay.

    Returns:
        An array of `pruned_shape` and the site's type.

    Raises:
        ValueError: channels that are not ascending or not there.
    """
    matrix, view = site.matrix(value), site.use.view
    outputs = site.shape[channel_axes(site)[1]]
    if kept_in is not None:
        matrix = refit(matrix, moment, block, kept_in)
    if kept_out is not None:
        check_kept(kept_out, outputs)
        matrix = matrix[:, block_indices(kept_out, view.m // outputs)]
    counts = (None if kept is None else len(kept) for kept in (kept_in, kept_out))
    shape = pruned_shape(site, block, *counts)
    return MatrixView(shape, 1, matrix.shape[1], matrix.shape[2], view.outputs_first).stored(matrix).astype(site.dtype)


def pruned_constants(model: Model, group: ChannelGroup, kept: Int64) -> dict[str, NDArray[np.generic]]:
    """New contents of every initializer between a group's layers, by name: sliced constants, and shapes without numbers of channels.

    Weights of sites are left out, depthwise ones too.

    Args:
        model: the model in which the group was found.
        group: the group.
        kept: its channels that stay, ascending.
    """
    tensors = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    changes: dict[str, NDArray[np.generic]] = {name: np.array(shape, np.int64) for name, shape in group.reshapes.items()}
    for part in group.slices:
        if part.initializer not in group.depthwise:
            value = model.weights.read(tensors[part.initializer])
            changes[part.initializer] = np.take(value, block_indices(kept, part.block), part.axis)
    return changes


def cut_between(model: Model, cuts: Iterable[Cut]) -> Model:
    """A copy of a model whose layers have lost channels already, in which what lies between them loses the same ones.

    Changed are constants, the attribute `group` of depthwise operators and what is written about shapes; the weights of sites are not,
    depthwise ones included. A constant is cut as it is in this model, so biases may have been corrected before.
    """
    changes: dict[str, NDArray[np.generic]] = {}
    attributes: dict[str, int] = {}
    values: set[str] = set()
    for cut in cuts:
        changes |= pruned_constants(model, cut.group, cut.kept)
        attributes |= dict.fromkeys(cut.group.grouped, len(cut.kept))
        values.update(cut.group.values)
    return _changed(model, changes, attributes, values)


def _changed(model: Model, changes: Mapping[str, NDArray[np.generic]], attributes: Mapping[str, int], values: set[str]) -> Model:
    """A copy with other initializers and `group` attributes, and without what was written about the shapes of `values`."""
    proto = ModelProto()
    proto.CopyFrom(model.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in changes:
            tensor.CopyFrom(model.weights.spool(tensor.name, changes[tensor.name]))
    for value in proto.graph.input:  # where initializers are listed as inputs
        if value.name in changes:
            for dim, size in zip(value.type.tensor_type.shape.dim, changes[value.name].shape, strict=True):
                dim.dim_value = size
    for node in proto.graph.node:
        if node.output and node.output[0] in attributes:
            next(a for a in node.attribute if a.name == "group").i = attributes[node.output[0]]
    described = [value for value in proto.graph.value_info if value.name not in values]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(described)
    return replace(model, proto=proto)
