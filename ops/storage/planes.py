"""Codes of variable width: near the entropy of the weights, which a fixed width never is.

A uniform grid with a fine step and a prefix code is the best scalar quantizer at a given rate, within 0.25 bit of the rate-distortion
bound for any density (Gish and Pierce, "Asymptotically efficient quantizing", 1968). A prefix code is usually read bit by bit, which no
program of tensor operators can do. Here it is laid out in *planes*: every inner node of the code tree owns one plane, which holds one bit
for every code that passes the node, in the order of the codes. A plane says which of its codes go on to the right, so codes are merged
from the leaves to the root:

    values(node)[i] = values(right)[ones before i]  where the bit is set,  values(left)[zeros before i]  elsewhere

and the work is the number of bits.

The length of a code is fixed by its level, but how many codes there are of each level is not. A storage therefore has a *capacity*, a
number of bits per entry, and searches for the finest step whose codes fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..emit import Array, Emitter, Program, Spec, float_attribute, ints_attribute
from .base import INTEGER_CODES, Expandable, IntegerWeight, refusal
from .grid import Grid, largest_of, single
from .packing import MODERN_OPSET, Bits
from .scaling import BFLOAT16, LARGEST, SMALLEST, Channels, emit_flat_scale, emit_scaled

Tree: TypeAlias = "int | tuple[Tree, Tree]"
"""A leaf, which is a level, or the children of an inner node for bits 0 and 1."""

_COARSER = 1.01
"""The next larger step, as a multiple."""

_SAMPLE = 1 << 20
"""Entries from which the relative steps of channels are chosen."""

_WIDTHS = 8
"""Steps that are tried for a channel whose largest entries would be clipped."""

_WIDENINGS = 3
"""How often what such channels save is spent on finer steps of all."""

_WIDEST = 1e30
"""Most that a channel's step is widened: float32 holds it still."""

_SHAPES = ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0), (0.5, 0.25), (1.0, 0.25), (1.0, 0.5))
"""Relative steps to try: standard deviation of a channel to the first power, its mean importance to minus the second."""

_ROUNDS = 8
"""Corrections of the step until its codes fill the capacity."""

_SLACK = 0.004
"""Bits per entry that may stay empty."""

_HEADER = "(bits, start, end, left, right) => (v) {"

_GATHER_RIGHT = """
        axis = Constant <value = int32 {0}> ()
        b = Slice (bits, start, end)
        one = Cast <to = 6> (b)
        ones = CumSum <exclusive = 1> (one, axis)
        r = Gather (right, ones)"""
"""The bits of a plane, and for each of its codes what the right child yields there."""

_MERGE = Program(
    "PlaneMerge",
    _HEADER
    + _GATHER_RIGHT
    + """
        n = Not (b)
        zero = Cast <to = 6> (n)
        zeros = CumSum <exclusive = 1> (zero, axis)
        l = Gather (left, zeros)
        v = Where (b, r, l)
    }""",
)

_MERGE_LEAF = Program(
    "PlaneMergeLeaf",
    _HEADER
    + _GATHER_RIGHT
    + """
        v = Where (b, r, left)
    }""",
)

_MERGE_LEAVES = Program(
    "PlaneMergeLeaves",
    _HEADER
    + """
        b = Slice (bits, start, end)
        v = Where (b, right, left)
    }""",
)


@dataclass(frozen=True)
class Code:
    """A prefix code for integer levels.

    Attributes:
        up: code lengths in bits of the levels 0, 1, 2, …
        down: the same of −1, −2, …
    """

    up: tuple[int, ...]
    down: tuple[int, ...]

    @property
    def lowest(self) -> int:
        """The smallest level."""
        return -len(self.down)

    @property
    def highest(self) -> int:
        """The largest level."""
        return len(self.up) - 1

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Code lengths of lowest…highest."""
        return np.array([*reversed(self.down), *self.up])

    @cached_property
    def tree(self) -> Tree:
        """The canonical tree: shorter codes to the left, so that the right child of an inner node with a leaf is the deeper one."""
        order = sorted(range(self.lowest, self.highest + 1), key=lambda level: (self.lengths[level - self.lowest], abs(level), level < 0))
        rest = [(int(self.lengths[level - self.lowest]), level) for level in order]

        def grown(depth: int) -> Tree:
            if rest[0][0] == depth:
                return rest.pop(0)[1]
            left = grown(depth + 1)
            return (left, grown(depth + 1))

        return grown(0)

    @cached_property
    def inner(self) -> tuple[tuple[Tree, Tree], ...]:
        """The inner nodes from the root downwards: the order of the planes."""
        found: list[tuple[Tree, Tree]] = []
        queue = [self.tree]
        for node in queue:
            if not isinstance(node, int):
                found.append(node)
                queue += node
        return tuple(found)

    def number(self, node: Tree) -> int:
        """The place of an inner node among the planes."""
        return next(i for i, other in enumerate(self.inner) if other is node)

    @cached_property
    def right(self) -> tuple[NDArray[np.bool_], ...]:
        """For each inner node, which levels (by their distance from `lowest`) lie under its right child."""
        return tuple(np.isin(np.arange(len(self.lengths)) + self.lowest, list(_leaves(node[1]))) for node in self.inner)

    def bits(self, codes: NDArray[np.int16]) -> int:
        """The number of bits that codes take."""
        counts = np.bincount((codes.reshape(-1) - self.lowest), minlength=len(self.lengths))
        return int(counts @ self.lengths)

    def program(self, name: str) -> Program:
        """The program (bytes, starts of the planes) → codes as bytes."""
        planes, levels = len(self.inner), list(range(self.lowest, self.highest + 1))
        value: dict[int, str] = {}

        def named(node: Tree) -> str:
            return f"k{node - self.lowest}" if isinstance(node, int) else value[self.number(node)]

        merges = []
        for i, (left, right) in reversed(list(enumerate(self.inner))):
            kind = _MERGE if not isinstance(left, int) else _MERGE_LEAF if not isinstance(right, int) else _MERGE_LEAVES
            end = f"e{i + 1}" if i else "s1"
            value[i] = f"v{i}"
            merges.append(f"v{i} = intaglio.{kind.name} (bits, s{i}, {end}, {named(left)}, {named(right)})")

        def ones(count: int) -> str:
            return ", ".join(["1"] * count)

        return Program(
            name,
            f"""<shape> (q, starts) => (u) {{
        shifts = Constant <value = uint8[8, 1] {{0, 1, 2, 3, 4, 5, 6, 7}}> ()
        seven = Constant <value = uint8 {{7}}> ()
        flat = Constant <value = int64[1] {{-1}}> ()
        next = Constant <value = int64[1] {{1}}> ()
        each_plane = Constant <value = int64[{planes + 1}] {{{ones(planes + 1)}}}> ()
        each_level = Constant <value = int64[{len(levels)}] {{{ones(len(levels))}}}> ()
        levels = Constant <value = uint8[{len(levels)}] {{{", ".join(str(level % 256) for level in levels)}}}> ()
        dims = Constant <value: tensor = @shape> ()
        moved = BitShift <direction = "LEFT"> (q, shifts)
        low = BitShift <direction = "RIGHT"> (moved, seven)
        line = Reshape (low, flat)
        bits = Cast <to = 9> (line)
        wide = Cast <to = 7> (starts)
        beyond = Add (wide, next)
        {", ".join(f"s{i}" for i in range(planes + 1))} = Split <axis = 0> (wide, each_plane)
        {", ".join(f"e{i}" for i in range(planes + 1))} = Split <axis = 0> (beyond, each_plane)
        {", ".join(f"k{i}" for i in range(len(levels)))} = Split <axis = 0> (levels, each_level)
        """
            + "\n        ".join(merges)
            + """
        u = Reshape (v0, dims)
    }""",
            (_MERGE, _MERGE_LEAF, _MERGE_LEAVES),
        )

    def planes(self, codes: NDArray[np.int16]) -> list[NDArray[np.bool_]]:
        """The bits of every inner node."""
        reaching: dict[int, NDArray[np.int16]] = {0: (codes - self.lowest).reshape(-1)}
        found = []
        for i, node in enumerate(self.inner):
            passing = reaching.pop(i)
            bit = self.right[i][passing]
            found.append(bit)
            for child, taken in zip(node, (~bit, bit), strict=True):
                if not isinstance(child, int):
                    reaching[self.number(child)] = passing[taken]
        return found

    def merged(self, bits: NDArray[np.bool_], starts: NDArray[np.int64]) -> NDArray[np.int8]:
        """The codes of planes that lie one after the other."""
        values: dict[int, NDArray[np.int8]] = {}
        for i, node in reversed(list(enumerate(self.inner))):
            plane = bits[starts[i] : starts[i + 1]]
            merged = np.empty(len(plane), np.int8)
            for child, taken in zip(node, (~plane, plane), strict=True):
                merged[taken] = child if isinstance(child, int) else values.pop(self.number(child))
            values[i] = merged
        return values[0]


def _leaves(node: Tree) -> Iterator[int]:
    if isinstance(node, int):
        yield node
    else:
        yield from _leaves(node[0])
        yield from _leaves(node[1])


_BITS = Bits(1)
"""How bits lie in bytes."""


@dataclass(frozen=True)
class Planes(Expandable):
    """Codes of a prefix code in planes, with one step per channel.

    The packed arrays are the planes, `capacity` bytes of uint8 with bit i in bit 7 − i // capacity of byte i % capacity; the
    bit at which each plane starts, the root's first, and the end of the last, uint16 where that suffices, else int32; and
    bfloat16 scales, 1 on every axis but the channels'.

    Attributes:
        rate: bits per entry.
        code: a Huffman code for a generalized normal density (exponent 1.6, between Gauss and Laplace) whose mean length is `rate`.
    """

    rate: float
    code: Code

    @property
    def name(self) -> str:
        """The rate with one decimal place."""
        return f"planes{self.rate:.1f}"

    @cached_property
    def program(self) -> Program:
        """The program from planes to codes."""
        return self.code.program(f"Planes{round(10 * self.rate)}")

    def min_opset(self, array: Spec) -> int:
        """Modern operators."""
        return MODERN_OPSET

    def accepts(self, array: Spec) -> str | None:
        """Arrays with at least one axis and one entry."""
        return refusal(array)

    @property
    def _reach(self) -> int:
        """The largest code that exists with either sign."""
        return min(self.code.highest, -self.code.lowest)

    def capacity(self, shape: tuple[int, ...]) -> int:
        """Bytes of the planes of an array."""
        return int(np.ceil(self.rate * int(np.prod(shape)) / 8))

    def layout(self, array: Spec, axis: int) -> tuple[Spec, ...]:
        """Planes, their starts, and scales."""
        capacity = self.capacity(array.shape)
        starts = np.dtype(np.uint16 if 8 * capacity < 1 << 16 else np.int32)
        return (
            Spec((capacity,), np.dtype(np.uint8)),
            Spec((len(self.code.inner) + 1,), starts),
            Spec(Channels(array.shape, axis).scales, BFLOAT16),
        )

    def grid(self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None) -> Grid:
        """The finest step whose nearest codes fit, up to `_SLACK` bits per entry; channels share it but for a factor.

        Equal steps would be best for equal importance if each channel had its own code. With one code for all, steps that follow the
        channels' spread can be better, and so can finer ones where errors count more: `_SHAPES` are compared on a sample.
        """
        partition = Channels(array.shape, axis)
        values = single(partition.groups(array)[0]).reshape(array.shape[axis], -1)
        weights = None if importance is None else partition.groups(np.broadcast_to(importance, array.shape))[0].reshape(values.shape)
        base, step = self._relative_steps(values, weights)
        limit, capacity = largest_of(array.dtype), self.capacity(array.shape)
        relative, step = base, self._fitting(values, base, step, limit, capacity)
        for _ in range(_WIDENINGS):
            widened = self._widened(values, weights, base, step)
            if np.array_equal(widened, relative):
                break
            relative, step = widened, self._fitting(values, widened, step, limit, capacity)
        widened = self._widened(values, weights, base, step)  # coarser channels take fewer bits: what fits still does
        return self._grid(widened.reshape(partition.scales), step, axis, limit)

    def _fitting(self, values: NDArray[np.float32], relative: NDArray[np.float64], step: float, limit: float, capacity: int) -> float:
        """About the finest common step whose codes fit into so many bytes, from a guess; the next guess where none was found."""
        room, count = 8 * capacity - 1, values.size
        rows = relative[:, None]
        best = None
        for _ in range(_ROUNDS):
            used = self.code.bits(self._grid(rows, step, 0, limit).nearest(values))
            if used <= room:
                best = step if best is None else min(best, step)
                if room - used <= _SLACK * count:
                    break
            step *= 2.0 ** ((used - room) / count + _SLACK / 4)
            if best is not None and step >= best:
                break
        return step if best is None else best

    def _widened(
        self, values: NDArray[np.float32], weights: NDArray[np.float64] | None, relative: NDArray[np.float64], step: float
    ) -> NDArray[np.float64]:
        """Relative steps, each the best at a common step of some between the given one and one that clips nothing of its channel."""
        peaks = np.abs(values).max(axis=1).astype(np.float64)
        wanted = np.minimum(peaks / max(self._reach * step, np.finfo(np.float64).tiny), _WIDEST)
        widened = relative.copy()
        for i in np.flatnonzero((wanted > relative) & (relative > 0)):
            counts = np.ones(values.shape[1]) if weights is None else weights[i]
            trials = np.geomspace(relative[i], wanted[i], _WIDTHS)
            widened[i] = min(trials, key=lambda trial: self._loss(values[i], trial * step, counts))
        return widened

    def _loss(self, values: NDArray[np.float32], step: float, weights: NDArray[np.float64]) -> float:
        """Weighted squared error of one channel at a step."""
        codes = np.clip(np.rint(values / np.float64(step)), -self._reach, self._reach)
        return float(np.square(codes * step - values) @ weights)

    def _grid(self, relative: NDArray[np.float64], step: float, axis: int, limit: float) -> Grid:
        """The grid of channels' relative steps times a common one, with no level beyond `limit`: next to it, fewer levels, or 0 alone."""
        stored = np.clip(relative * step, SMALLEST, LARGEST / 2).astype(BFLOAT16)
        scale = stored.astype(np.float32)
        top = int(min(limit / float(relative.max()) / step, limit / float(scale.max())))
        levels = max(self.code.lowest, -top), min(self.code.highest, top)
        return Grid(
            scale,
            np.zeros((1,) * scale.ndim, np.float32),
            *levels,
            axis,
            (stored,),
            lambda: self._grid(relative, step * _COARSER, axis, limit),
        )

    def _relative_steps(self, values: NDArray[np.float32], weights: NDArray[np.float64] | None) -> tuple[NDArray[np.float64], float]:
        """The best of `_SHAPES` for channels (c, entries), at most 1, and the common step that goes with it."""
        peak = float(np.abs(values).max()) or 1.0
        spread = np.sqrt(np.einsum("ij,ij->i", values / peak, values / peak, dtype=np.float64) / values.shape[1])
        spread = np.maximum(spread / spread.max(), 1e-4) if spread.any() else np.ones_like(spread)
        mean = np.ones(len(values)) if weights is None else weights.mean(axis=1) + 1e-4 * weights.mean() + np.finfo(np.float64).tiny
        rows, columns = self._sample(values.shape)
        sample = np.abs(values[rows, columns] / peak).astype(np.float64)
        share = np.ones_like(sample) if weights is None else weights[rows, columns] / max(float(weights.max()), np.finfo(np.float64).tiny)
        trials = []
        for power, caution in _SHAPES if weights is not None else _SHAPES[:3]:
            relative = spread**power * mean**-caution
            relative /= relative.max()
            error, step = self._finest(sample, relative[rows], share)
            trials.append((error, step, relative))
        _, step, relative = min(trials, key=lambda trial: trial[0])
        return relative.astype(np.float32).astype(np.float64), step * peak

    @staticmethod
    def _sample(shape: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows and columns of at most `_SAMPLE` entries, evenly spread."""
        count = shape[0] * shape[1]
        places = np.linspace(0, count - 1, min(count, _SAMPLE)).astype(np.int64)
        return places // shape[1], places % shape[1]

    def _finest(self, sample: NDArray[np.float64], relative: NDArray[np.float64], share: NDArray[np.float64]) -> tuple[float, float]:
        """Weighted squared error and step of the finest grid for which a sample's codes have the right mean length."""
        if not sample.any():
            return 0.0, 1.0
        scaled = sample / relative
        unit = float(np.sqrt(np.mean(scaled**2))) / 128
        places = np.minimum(scaled / unit, 1 << 14).astype(np.int64)
        counts = np.bincount(places)
        middles = np.arange(len(counts)) * unit + unit / 2
        size = self._reach
        ahead = np.arange(size + 1)
        mean_lengths = (self.code.lengths[ahead - self.code.lowest] + self.code.lengths[-ahead - self.code.lowest]) / 2
        low, high = unit, unit * (1 << 14)
        for _ in range(24):
            step = float(np.sqrt(low * high))
            levels = np.minimum(np.rint(middles / step), size).astype(np.int64)
            low, high = (step, high) if counts @ mean_lengths[levels] > self.rate * len(sample) else (low, step)
        error = np.minimum(np.rint(scaled / high), size) * high - scaled
        return float(np.sum(share * np.square(error * relative))), high

    def pack(self, codes: NDArray[np.int16], grid: Grid) -> tuple[NDArray[np.generic], ...] | None:
        """Planes, their starts, and scales; None where the codes do not fit."""
        capacity = self.capacity(codes.shape)
        if self.code.bits(codes) >= 8 * capacity:  # every merge reads one bit beyond its plane
            return None
        planes = self.code.planes(codes)
        starts = np.cumsum([0, *map(len, planes)])
        bits = np.zeros(8 * capacity, np.int16)
        bits[: starts[-1]] = np.concatenate(planes)
        return (_BITS.pack(bits), starts.astype(np.uint16 if 8 * capacity < 1 << 16 else np.int32), *grid.stored)

    def encode(
        self, array: NDArray[np.generic], axis: int, importance: NDArray[np.float64] | None = None
    ) -> tuple[NDArray[np.generic], ...]:
        """Round to nearest on the finest grid whose codes fit."""
        grid = self.grid(array, axis, importance)
        while (packed := self.pack(grid.nearest(array), grid)) is None:
            grid = grid.coarser()
        return packed

    def decode(self, packed: tuple[NDArray[np.generic], ...], spec: Spec) -> NDArray[np.generic]:
        """code · scale in float32, then the model's type."""
        bits = _BITS.unpack(packed[0], (8 * len(packed[0]),)) != 0
        codes = self.code.merged(bits, packed[1].astype(np.int64)).reshape(spec.shape)
        return np.asarray((codes.astype(np.float32) * packed[2].astype(np.float32)).astype(spec.dtype))

    def emit(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, output: str | None = None) -> str:
        """Three initializers and two calls."""
        codes = self._emit_codes(emitter, suffix, packed, spec)
        scale = emitter.constant(f"{suffix}.s", packed[2])
        return emit_scaled(emitter, codes, None, scale, Channels.read(spec.shape, packed[2].shape), spec.dtype, output)

    def emit_integer(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec, axis: int) -> IntegerWeight | None:
        """The codes as they are."""
        codes = self._emit_codes(emitter, suffix, packed, spec)
        codes = emitter.call(INTEGER_CODES, [codes], emitter.name("c"), {"unit": float_attribute(1.0)})
        scale = emitter.constant(f"{suffix}.s", packed[2])
        return IntegerWeight(codes, emit_flat_scale(emitter, scale, 1), axis)

    def _emit_codes(self, emitter: Emitter, suffix: str, packed: tuple[Array, ...], spec: Spec) -> str:
        inputs = [emitter.constant(f"{suffix}.q", packed[0]), emitter.constant(f"{suffix}.n", packed[1])]
        return emitter.call(self.program, inputs, emitter.name("u"), {"shape": ints_attribute(spec.shape)})


PLANES: tuple[Planes, ...] = tuple(
    Planes(rate, Code(up, down))
    for rate, up, down in (
        (2.0, (1, 2, 4, 6, 8, 10, 14, 14, 14, 14), (3, 5, 7, 9, 11, 14, 14, 14, 14)),
        (2.5, (2, 2, 3, 5, 7, 9, 11, 13, 15, 19, 18, 18), (2, 4, 6, 8, 10, 12, 14, 16, 19, 19, 19)),
        (3.0, (2, 2, 3, 5, 5, 7, 9, 11, 13, 15, 17, 19, 22, 22), (3, 3, 5, 6, 8, 10, 12, 14, 16, 18, 20, 22, 22)),
        (
            3.5,
            (3, 3, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11, 11, 13, 15, 17, 19, 21),
            (3, 3, 4, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 16, 18, 20, 21),
        ),
        (
            4.0,
            (3, 3, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 18),
            (3, 4, 4, 4, 5, 6, 6, 7, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 18),
        ),
    )
)
"""Every rate that has a name."""
