"""Pruned forms: which ones a site can take, and that all layers around a group of channels agree on how many stay.

A pruned form says how much of a weight's input axis and of its output axis stays. It is one choice of a site, but the channels between
two layers belong to both: a *channel group* (`passes.groups`) keeps one number of channels, which its members (producers, consumers and
depthwise layers) all have to name. The solver sees that as required resources: the group's first member, its *leader*, provides
``channels:g:k`` when it leaves k channels, and every other member requires it. Layers that keep everything take part as well, with k the
size of the group, so a mix never comes out.

Which channels stay is not part of a form: it is found from data, in `passes.refit`. Nothing here looks at values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from intaglio.ops.form import PRUNED, UNCHANGED, Form
from intaglio.solver import Cost

from .channels import find_channel_groups
from .cuts import Cut
from .errors import InputError
from .groups import ChannelGroup
from .model import Model
from .rewrite import channel_axes, declines
from .sites import Site

FRACTIONS = (0.875, 0.75, 0.625, 0.5)
"""Shares of a group's channels that are offered."""

MIN_CHANNELS = 8
"""Smaller groups are left whole."""

WIDE_CHANNELS = 32
"""Groups of this size or more keep multiples of `_MULTIPLE` channels, which vector units like."""

MAX_INPUTS = 6144
"""Of a consumer: choosing channels takes the cube of this."""

_MULTIPLE = 8

Orders: TypeAlias = Mapping[str, NDArray[np.int64]]
"""Group name → its channels, the first to be given up first."""


@dataclass(frozen=True)
class PrunedTerms:
    """How an option of a site is coupled to the other members of its channel groups, and what cutting the constants between saves."""

    provides: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    saved_bytes: int = 0


@dataclass(frozen=True, eq=False)
class Channels:
    """The channel groups of a model that can be cut.

    Attributes:
        groups: by name.
        sites: their members, by name.
        reads: member → name of the group that it reads, and inputs of its matrix view per channel.
        writes: member → name of the group that it writes; for a depthwise layer, of the only group it has.
        slice_bytes: group name → bytes of the constants between its layers, per channel.
    """

    groups: Mapping[str, ChannelGroup] = field(default_factory=dict)
    sites: Mapping[str, Site] = field(default_factory=dict)
    reads: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    writes: Mapping[str, str] = field(default_factory=dict)
    slice_bytes: Mapping[str, int] = field(default_factory=dict)

    @staticmethod
    def find(model: Model, sites: Sequence[Site], excluded: Iterable[str] = ()) -> Channels:
        """The groups all of whose members are among the given sites and can lose channels.

        Args:
            model: the model.
            sites: its sites.
            excluded: initializers that must stay as they are.
        """
        by_name, fixed = {site.name: site for site in sites}, set(excluded)
        usable = [group for group in find_channel_groups(model, sites) if _usable(group, by_name, fixed)]
        reads = {reader.site: (group.name, reader.block) for group in usable for reader in group.consumers}
        writes = {name: group.name for group in usable for name in (*group.producers, *group.depthwise)}
        members = {name: by_name[name] for name in (*reads, *writes)}
        slices = {group.name: _slice_bytes(model, group) for group in usable}
        return Channels({group.name: group for group in usable}, members, reads, writes, slices)

    def levels(self, group: str) -> tuple[int, ...]:
        """Numbers of channels that a group may keep, the most first, all of them included."""
        size = self.groups[group].size
        multiple = _MULTIPLE if size >= WIDE_CHANNELS else 1
        counts = (math.ceil(share * size / multiple) * multiple for share in FRACTIONS)
        return tuple(dict.fromkeys((size, *counts)))

    def leader(self, group: str) -> str:
        """The member that says how many channels stay."""
        return self.groups[group].producers[0]

    def ranks(self, site: Site) -> Iterator[tuple[int, int]]:
        """The ranks of every pruned form that a site is offered."""
        if site.name not in self.sites:
            return
        axis_in, axis_out = channel_axes(site)
        read, written = self.reads.get(site.name), self.writes.get(site.name)
        size_in, size_out = site.shape[axis_in], site.shape[axis_out]
        for kept in self.levels(read[0]) if read else (0,):
            inputs = size_in * kept // self.groups[read[0]].size if read else size_in
            for outputs in self.levels(written) if written else (size_out,):
                agrees = read is None or read[0] != written or kept == outputs
                if agrees and (inputs, outputs) != (size_in, size_out):
                    yield inputs, outputs

    def counts(self, site: Site, form: Form) -> list[tuple[str, int]]:
        """How many channels of each of its groups a site of this form has: (group, channels), at most two.

        Raises:
            InputError: the form cuts what is no group's, or a part of a channel.
        """
        found = []
        read, written = self.reads.get(site.name), self.writes.get(site.name)
        pruned = form.decomposition == PRUNED
        full = [site.shape[axis] for axis in channel_axes(site)]
        inputs, outputs = form.ranks if pruned else full
        if read is not None:
            count, rest = divmod(inputs * self.groups[read[0]].size, full[0])
            if rest:
                raise InputError(f"plan: site {site.name!r} cannot take {form}: {inputs} of {full[0]} inputs are no whole channels")
            found.append((read[0], count))
        if written is not None:
            found.append((written, outputs))
        for name, known, kept, size in (("inputs", read, inputs, full[0]), ("outputs", written, outputs, full[1])):
            if known is None and kept != size:
                raise InputError(f"plan: site {site.name!r} cannot take {form}: its {name} cannot be cut; keep all {size}")
        return found

    def cuts(self, forms: Mapping[str, Form], orders: Orders | None = None) -> tuple[Cut, ...]:
        """The groups that forms cut, and which channels stay.

        Args:
            forms: by site name; members without one stay whole.
            orders: from `passes.refit`; without, the first channels stay, which is as large and as fast.

        Raises:
            InputError: members of a group disagree, or a form cannot be.
        """
        counts: dict[str, dict[int, str]] = {name: {} for name in self.groups}
        for name, form in forms.items():
            if form.decomposition == PRUNED and name not in self.sites:
                raise InputError(f"plan: site {name!r} cannot take {form}: its channels cannot be cut; choose another form")
        for name, site in self.sites.items():
            for group, count in self.counts(site, forms.get(name, UNCHANGED)):
                counts[group].setdefault(count, name)
        return tuple(Cut(self.groups[group], kept) for group, kept in self._kept(counts, orders))

    def _kept(self, counts: Mapping[str, Mapping[int, str]], orders: Orders | None) -> Iterator[tuple[str, NDArray[np.int64]]]:
        for group, named in counts.items():
            if len(named) > 1:
                said = " and ".join(f"{site!r} {count}" for count, site in list(named.items())[:2])
                raise InputError(f"plan: layers disagree about the channels of {group!r}: {said}; prune all of them alike")
            (count,) = named
            size = self.groups[group].size
            if count < size:
                yield group, np.arange(count) if orders is None else np.sort(orders[group][size - count :])

    def terms(self, site: Site, form: Form) -> PrunedTerms:
        """What an option of a site provides and requires, pruned or not."""
        provides: list[str] = []
        requires: list[str] = []
        saved = 0
        for group, count in self.counts(site, form) if site.name in self.sites else ():
            leads = site.name == self.leader(group)
            (provides if leads else requires).append(_resource(group, count))
            saved += (self.groups[group].size - count) * self.slice_bytes[group] if leads else 0
        own = set(provides)
        return PrunedTerms(tuple(dict.fromkeys(provides)), tuple(name for name in dict.fromkeys(requires) if name not in own), saved)

    def resources(self) -> dict[str, Cost]:
        """All names that `terms` uses for offered forms; nobody pays for them."""
        return {_resource(group, count): Cost(0, 0.0, 0.0) for group in self.groups for count in self.levels(group)}


def _resource(group: str, count: int) -> str:
    return f"channels:{group}:{count}"


def _usable(group: ChannelGroup, sites: Mapping[str, Site], fixed: set[str]) -> bool:
    """Whether a group is worth cutting and everything it takes is allowed to change."""
    if not group.prunable or group.size < MIN_CHANNELS or not fixed.isdisjoint(part.initializer for part in group.slices):
        return False
    names = (*group.producers, *(reader.site for reader in group.consumers), *group.depthwise)
    if not all(name in sites and _can_lose(sites[name]) for name in names):
        return False
    return all(sites[reader.site].use.view.n <= MAX_INPUTS for reader in group.consumers)


def _can_lose(site: Site) -> bool:
    """Whether a site's weight can be cut at all."""
    return any(
        declines(site, Form(PRUNED, ranks, "float", "contract")) is None
        for ranks in ((1, site.shape[channel_axes(site)[1]]), (site.shape[channel_axes(site)[0]], 1))
    )


def _slice_bytes(model: Model, group: ChannelGroup) -> int:
    """Bytes per channel of the constants between a group's layers that are no sites."""
    tensors = {tensor.name: tensor for tensor in model.proto.graph.initializer}
    total = 0
    for name in {part.initializer for part in group.slices} - set(group.depthwise):
        item_bytes = helper.tensor_dtype_to_np_dtype(tensors[name].data_type).itemsize
        total += item_bytes * math.prod(tensors[name].dims)
    return total // group.size
