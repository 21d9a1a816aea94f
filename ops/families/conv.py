"""Conv in one to three dimensions, and com.microsoft FusedConv."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from ..emit import Emitter
from ..view import MatrixView
from .base import Gram, GramRequest, Shape, Use, as_float32, column_gram, product, reduce_sum, reshape

GEOMETRY = ("auto_pad", "dilations", "kernel_shape", "pads", "strides")
"""The attributes that say where a kernel looks."""


@dataclass(frozen=True)
class Conv:
    """Weight (m, n/groups, *kernel); each output position sees one patch of the input."""

    name: str = "conv"
    op_types: tuple[tuple[str, str], ...] = (("", "Conv"), ("com.microsoft", "FusedConv"))

    def view(self, node: NodeProto, index: int, shape: Shape) -> MatrixView | str:
        """Outputs first, patches in (channel, kernel position) order."""
        if index != 1:
            return "the bias of a Conv" if index == 2 else "a constant image"
        groups = Use(node, index, MatrixView(shape, 1, shape[0], int(np.prod(shape[1:])), True)).int("group", 1)
        return MatrixView(shape, groups, shape[0] // groups, int(np.prod(shape[1:])), True)

    def activation(self, use: Use) -> tuple[str, bool]:
        """The image."""
        return use.node.input[0], False

    def kernel(self, use: Use) -> Shape:
        """Spatial shape of the kernel."""
        return use.view.shape[2:]

    def output_positions(self, use: Use, input_shape: Shape) -> int:
        """Number of output positions per sample."""
        return int(np.prod(self.output_size(use, input_shape[2:])))

    def output_size(self, use: Use, spatial: Shape) -> Shape:
        """Spatial shape of the output (ONNX operator specification of Conv)."""
        kernel = self.kernel(use)
        strides = use.ints("strides", [1] * len(kernel))
        dilations = use.ints("dilations", [1] * len(kernel))
        if use.text("auto_pad", "NOTSET") in ("SAME_UPPER", "SAME_LOWER"):
            return tuple(-(-size // s) for size, s in zip(spatial, strides, strict=True))
        pads = [0] * 2 * len(kernel) if use.text("auto_pad", "NOTSET") == "VALID" else use.ints("pads", [0] * 2 * len(kernel))
        return tuple(
            (size + pads[i] + pads[i + len(kernel)] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1
            for i, size in enumerate(spatial)
        )

    def gram(self, emitter: Emitter, use: Use, value: str, request: GramRequest) -> Gram:
        """Patches come from a depthwise Conv with one-hot kernels and the node's own geometry.

        So padding, strides and dilations agree by construction.
        """
        value = as_float32(emitter, value, request)
        kernel, channels = self.kernel(use), use.view.groups * use.view.shape[1]
        size = int(np.prod(kernel))
        geometry = [a for a in use.node.attribute if a.name in GEOMETRY]
        moves = size > 1 or any(use.ints("pads", [])) or any(stride != 1 for stride in use.ints("strides", []))
        if moves:
            picker = np.tile(np.eye(size, dtype=np.float32), (channels, 1)).reshape(channels * size, 1, *kernel)
            value = emitter.node("Conv", [value, emitter.constant("pick", picker)], attributes={"group": channels})
            emitter.nodes[-1].attribute.extend(geometry)
        patches = reshape(emitter, value, [0, use.view.groups, use.view.n, -1])
        if request.positions is not None:
            patches = self._sample(emitter, patches, request.positions, request.seed)
        columns = emitter.node("Transpose", [patches], attributes={"perm": [1, 2, 0, 3]})
        return column_gram(emitter, reshape(emitter, columns, [use.view.groups, use.view.n, -1]))

    @staticmethod
    def _sample(emitter: Emitter, patches: str, count: int, seed: int) -> str:
        """`count` of the positions along axis 3: a random one from each of as many equal stretches, whatever the size."""
        share = (np.arange(count) + np.random.default_rng(seed).random(count)) / count
        size = emitter.node("Gather", [emitter.node("Shape", [patches]), emitter.ints("axis", [3])], attributes={"axis": 0})
        scaled = emitter.node("Mul", [emitter.node("Cast", [size], attributes={"to": 11}), emitter.constant("share", share)])
        chosen = emitter.node("Cast", [scaled], attributes={"to": 7})
        return emitter.node("Gather", [patches, chosen], attributes={"axis": 3})

    def channel_axis(self, use: Use) -> int:
        """Output channels."""
        return 0

    def contract_reason(self, use: Use) -> str | None:
        """A depthwise kernel has nothing to factor."""
        return "depthwise: one input channel per group" if use.view.shape[1] == 1 and use.view.groups > 1 else None

    def split_views(self, use: Use, rank: int) -> tuple[MatrixView, MatrixView]:
        """The kernel to `rank` channels per group, then 1×1."""
        view, ones = use.view, (1,) * len(self.kernel(use))
        return (
            MatrixView((view.groups * rank, *view.shape[1:]), view.groups, rank, view.n, True),
            MatrixView((view.groups * view.m, rank, *ones), view.groups, view.m, rank, True),
        )

    def split_axes(self, use: Use) -> tuple[int, int]:
        """Output channels of each."""
        return 0, 0

    def emit_split(self, emitter: Emitter, use: Use, first: str, last: str) -> None:
        """The first node has the geometry; the last is 1×1 with bias, fused activation and name of the original."""
        hidden = emitter.node("Conv", [use.node.input[0], first], attributes={"group": use.view.groups})
        emitter.nodes[-1].attribute.extend(a for a in use.node.attribute if a.name in GEOMETRY)
        self.emit_last(emitter, use, hidden, last)

    def emit_last(self, emitter: Emitter, use: Use, value: str, weight: str) -> None:
        """The original node as a 1×1 convolution of another value."""
        ones = {"kernel_shape": [1] * len(self.kernel(use))} if use.has("kernel_shape") else {}
        emitter.copy(use.node, {0: value, 1: weight}, drop=GEOMETRY, attributes=ones)

    def macs(self, use: Use, input_shape: Shape, output_shape: Shape) -> int:
        """Output elements times patch size."""
        return int(np.prod(output_shape)) * use.view.n


@dataclass(frozen=True)
class ConvTranspose:
    """Weight (n, m/groups, *kernel): a 1×1 map to m·kernel values per input position, then an overlap-add."""

    name: str = "conv_transpose"
    op_types: tuple[tuple[str, str], ...] = (("", "ConvTranspose"),)

    def view(self, node: NodeProto, index: int, shape: Shape) -> MatrixView | str:
        """Inputs first; one group."""
        if index != 1:
            return "the bias of a ConvTranspose" if index == 2 else "a constant image"
        if Use(node, index, MatrixView(shape, 1, int(np.prod(shape[1:])), shape[0], False)).int("group", 1) != 1:
            return "a grouped ConvTranspose"
        return MatrixView(shape, 1, int(np.prod(shape[1:])), shape[0], False)

    def activation(self, use: Use) -> tuple[str, bool]:
        """The image."""
        return use.node.input[0], False

    def gram(self, emitter: Emitter, use: Use, value: str, request: GramRequest) -> Gram:
        """Every position of the input is a row."""
        value = reshape(emitter, as_float32(emitter, value, request), [0, use.view.n, -1])
        columns = reshape(emitter, emitter.node("Transpose", [value], attributes={"perm": [1, 0, 2]}), [use.view.n, -1])
        return Gram(product(emitter, columns, columns, trans_right=True), columns, reduce_sum(emitter, columns, 1), columns=True)

    def channel_axis(self, use: Use) -> int:
        """Output channels."""
        return 1

    def contract_reason(self, use: Use) -> str | None:
        """Always possible."""
        return None

    def split_views(self, use: Use, rank: int) -> tuple[MatrixView, MatrixView]:
        """A 1×1 Conv to `rank` channels, then the transposed kernel."""
        view, ones = use.view, (1,) * (len(use.view.shape) - 2)
        return MatrixView((rank, view.n, *ones), 1, rank, view.n, True), MatrixView((rank, *view.shape[1:]), 1, view.m, rank, False)

    def split_axes(self, use: Use) -> tuple[int, int]:
        """Output channels of each."""
        return 0, 1

    def emit_split(self, emitter: Emitter, use: Use, first: str, last: str) -> None:
        """Conv 1×1, then the original node."""
        hidden = emitter.node("Conv", [use.node.input[0], first])
        emitter.copy(use.node, {0: hidden, 1: last})

    def macs(self, use: Use, input_shape: Shape, output_shape: Shape) -> int:
        """Input elements times outputs per position."""
        return int(np.prod(input_shape)) * use.view.m


CONV = Conv()
CONV_TRANSPOSE = ConvTranspose()
