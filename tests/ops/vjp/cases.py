"""A few representative cases of every reverse rule, for the test of all of them together and for `benchmarks/rules.py`.

Families' own tests go further; this table shows that no rule is without a check. Inputs are float64 and away from kinks and ties.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from intaglio.passes.differentiate import differentiate
from intaglio.passes.session import open_session

from .checking import TOLERANCE, gradient_error, model_of, run_in_runtime

Array = np.ndarray

RUNTIME_STEP = 1e-2
RUNTIME_TOLERANCE = 1e-2
"""Differences in float32 along a direction: rounding of 1e-6 over the step, and step² times third derivatives of up to a hundred."""


@dataclass(frozen=True)
class Case:
    """One node and what it reads.

    Attributes:
        text: the node as ONNX text; it gives y.
        inputs: by name; floats are float64.
        wrt: what to differentiate with respect to; None for all float inputs.
        known: inputs that are initializers.
        opset: of the default domain.
        runtime: whether onnx's reference evaluator lacks the operator or computes it in float32, so that ONNX Runtime must do.
    """

    text: str
    inputs: Mapping[str, Array]
    wrt: Sequence[str] | None = None
    known: Sequence[str] = ()
    opset: int = 18
    runtime: bool = False

    @property
    def tolerance(self) -> float:
        """What `error` stays below."""
        return RUNTIME_TOLERANCE if self.runtime else TOLERANCE

    def error(self) -> float:
        """The largest relative error of its gradients against central differences."""
        if self.runtime:
            return self._runtime_error()
        wrt = [name for name, array in self.inputs.items() if array.dtype == np.float64] if self.wrt is None else self.wrt
        known = [*self.known, *(name for name, array in self.inputs.items() if array.dtype != np.float64 and name not in self.known)]
        return gradient_error(self.text, self.inputs, wrt, opset=self.opset, known=known)

    def _runtime_error(self) -> float:
        """The same in float32 under ONNX Runtime, along one random direction for each input, relative to at least one."""
        arrays = {name: array.astype(np.float32) if array.dtype == np.float64 else array for name, array in self.inputs.items()}
        wrt = [name for name, array in arrays.items() if array.dtype == np.float32] if self.wrt is None else list(self.wrt)
        known = [name for name, array in arrays.items() if array.dtype != np.float32 or name in self.known]
        feed = {name: array for name, array in arrays.items() if name not in known}
        proto = model_of(self.text, arrays, ["y"], opset=self.opset, known=known)
        found = differentiate(proto, ["y"], wrt)
        assert not found.stops, [str(stop) for stop in found.stops]
        session = open_session(_declared(proto, found.proto, found.cotangents["y"]))
        rng = np.random.default_rng(0)
        (y,) = session.run(["y"], feed)
        cotangent = rng.standard_normal(y.shape).astype(np.float32)
        gradients = run_in_runtime(found, feed, {"y": cotangent})
        worst = 0.0
        for name in wrt:
            direction = rng.standard_normal(feed[name].shape)
            ends = []
            for sign in (1, -1):
                moved = (feed[name] + sign * RUNTIME_STEP * direction).astype(np.float32)
                ends.append(float(np.sum(cotangent * session.run(["y"], {**feed, name: moved})[0], dtype=np.float64)))
            numeric = (ends[0] - ends[1]) / (2 * RUNTIME_STEP)
            worst = max(worst, abs(float(np.sum(gradients[name] * direction)) - numeric) / max(1.0, abs(numeric)))
        return worst


def _declared(proto: onnx.ModelProto, differentiated: onnx.ModelProto, cotangent: str) -> onnx.ModelProto:
    """The model with the type that its output's cotangent has."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    copy.graph.output[0].CopyFrom(next(value for value in differentiated.graph.input if value.name == cotangent))
    copy.graph.output[0].name = "y"
    return copy


def _draw(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def _spread(*shape: int) -> Array:
    """Distinct entries, all at least 0.1 apart and away from zero."""
    count = int(np.prod(shape))
    values = (np.arange(count) - count // 2 + 0.5) * (3.0 / max(count, 1))
    return np.random.default_rng(0).permutation(values).reshape(shape)


def _ints(*numbers: int) -> Array:
    return np.array(numbers, np.int64)


_X = _spread(3, 4)
_POSITIVE = np.abs(_X) + 0.3
_UNIT = _X / 2  # in (−0.75, 0.75)
_IMAGE = _spread(2, 4, 5, 6)
_PAIR = {"a": _draw(1, 2, 3), "b": np.random.default_rng(2).uniform(0.5, 2, (3,))}


def _unary(op_type: str, x: Array = _X, opset: int = 18) -> Case:
    return Case(f"y = {op_type} (x)", {"x": x}, opset=opset)


def _reduction(op_type: str) -> tuple[Case, ...]:
    inputs = {"x": _POSITIVE.reshape(3, 2, 2), "axes": _ints(0, -1)}
    return (
        Case(f"y = {op_type} <keepdims = 0> (x, axes)", inputs),
        Case(f"y = {op_type} (x, axes)", inputs),
        Case(f"y = {op_type} (x)", {"x": _POSITIVE}),
    )


def _recurrent(op_type: str, gates: int, attributes: str = "") -> tuple[Case, ...]:
    both = {"x": _draw(1, 3, 2, 3), "w": _draw(2, 2, gates * 2, 3) / 2, "r": _draw(3, 2, gates * 2, 2) / 2, "b": _draw(4, 2, gates * 4) / 4}
    return (Case(f'y = {op_type} <hidden_size = 2, direction = "bidirectional"{attributes}> (x, w, r, b)', both, runtime=True),)


_UNARY = {
    "Abs": _X,
    "Acos": _UNIT,
    "Acosh": _POSITIVE + 1,
    "Asin": _UNIT,
    "Asinh": _X,
    "Atan": _X,
    "Atanh": _UNIT,
    "Ceil": _X + 0.03,
    "Celu": _X,
    "Cos": _X,
    "Cosh": _X,
    "Dropout": _X,
    "Elu": _X,
    "Exp": _X,
    "Floor": _X + 0.03,
    "HardSigmoid": _X,
    "HardSwish": _X,
    "Identity": _X,
    "LeakyRelu": _X,
    "Log": _POSITIVE,
    "Mish": _X,
    "Neg": _X,
    "Reciprocal": _POSITIVE,
    "Relu": _X,
    "Round": _X + 0.03,
    "Selu": _X,
    "Sigmoid": _X,
    "Shrink": 2 * _X + 0.03,
    "Sign": _X,
    "Sin": _X,
    "Sinh": _X,
    "Softplus": _X,
    "Softsign": _X,
    "Sqrt": _POSITIVE,
    "Tan": _UNIT,
    "Tanh": _X,
    "ThresholdedRelu": 2 * _X + 0.03,
}

_REDUCTIONS = [
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"),
    "ReduceSumSquare",
]

_CONV = {"x": _draw(1, 2, 4, 5, 5), "w": _draw(2, 6, 2, 3, 3), "b": _draw(3, 6)}
_TURNED = {"x": _draw(1, 2, 4, 3, 3), "w": _draw(2, 4, 3, 3, 3), "b": _draw(3, 6)}

CASES: dict[str, tuple[Case, ...]] = {
    **{name: (_unary(name, x),) for name, x in _UNARY.items()},
    **{name: _reduction(name) for name in _REDUCTIONS},
    "Add": (Case("y = Add (a, b)", _PAIR),),
    "Attention": (
        Case("y = Attention (q, k, v)", {"q": _draw(1, 2, 2, 3, 4), "k": _draw(2, 2, 2, 5, 4), "v": _draw(3, 2, 2, 5, 4)}, opset=23),
    ),
    "AveragePool": (Case("y = AveragePool <kernel_shape = [2, 3], strides = [2, 1], pads = [1, 0, 0, 1]> (x)", {"x": _IMAGE}),),
    "BatchNormalization": (
        Case(
            "y = BatchNormalization (x, s, b, m, v)",
            {"x": _draw(1, 2, 3, 4), "s": _draw(2, 3), "b": _draw(3, 3), "m": _draw(4, 3), "v": np.array([0.5, 1.0, 2.0])},
        ),
    ),
    "Cast": (Case("y = Cast <to = 11> (x)", {"x": _X}),),
    "CastLike": (Case("y = CastLike (x, t)", {"x": _X, "t": np.zeros(1)}, wrt=["x"]),),
    "Clip": (Case("y = Clip (x, low, high)", {"x": _X, "low": np.array(-0.8), "high": np.array(0.9)}),),
    "Compress": (Case("y = Compress <axis = 1> (x, keep)", {"x": _X, "keep": np.array([True, False, True, True])}),),
    "Concat": (Case("y = Concat <axis = -1> (a, b)", {"a": _draw(1, 2, 3), "b": _draw(2, 2, 1)}),),
    "Conv": (
        Case("y = Conv <group = 2, pads = [1, 0, 1, 1], strides = [2, 1]> (x, w, b)", _CONV, runtime=True),
        Case("y = Conv (x, w)", {"x": _draw(1, 2, 3, 4, 4), "w": _draw(2, 5, 3, 1, 1)}),
        Case("y = Conv <dilations = [2]> (x, w)", {"x": _draw(1, 2, 3, 7), "w": _draw(2, 4, 3, 2)}),
    ),
    "ConvTranspose": (Case("y = ConvTranspose <group = 2, strides = [2, 2], pads = [1, 0, 0, 1]> (x, w, b)", _TURNED, runtime=True),),
    "CumSum": (Case("y = CumSum <exclusive = 1, reverse = 1> (x, axis)", {"x": _X, "axis": np.array(1)}),),
    "DepthToSpace": (Case('y = DepthToSpace <blocksize = 2, mode = "CRD"> (x)', {"x": _draw(1, 1, 8, 2, 3)}),),
    "Div": (Case("y = Div (a, b)", _PAIR),),
    "Einsum": (Case('y = Einsum <equation = "bij,bjk->bik"> (a, b)', {"a": _draw(1, 2, 3, 4), "b": _draw(2, 2, 4, 2)}),),
    "Erf": (Case("y = Erf (x)", {"x": _X}, runtime=True),),
    "Expand": (Case("y = Expand (x, shape)", {"x": _draw(1, 3, 1), "shape": _ints(2, 1, 4)}),),
    "Flatten": (Case("y = Flatten <axis = 2> (x)", {"x": _draw(1, 2, 3, 2)}),),
    "GRU": _recurrent("GRU", 3, ", linear_before_reset = 1"),
    "Gather": (Case("y = Gather <axis = 1> (x, i)", {"x": _X, "i": np.array([[0, -1], [2, 0]])}),),
    "GatherElements": (Case("y = GatherElements <axis = 1> (x, i)", {"x": _X, "i": np.array([[0, 1, 0], [3, 3, 2], [1, 1, -1]])}),),
    "GatherND": (Case("y = GatherND (x, i)", {"x": _X, "i": np.array([[0, 1], [2, 3], [0, 1]])}),),
    "Gelu": (
        Case("y = Gelu (x)", {"x": _X}, opset=20, runtime=True),
        Case('y = Gelu <approximate = "tanh"> (x)', {"x": _X}, opset=20),
    ),
    "Gemm": (
        Case("y = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (a, b, c)", {"a": _draw(1, 2, 3), "b": _draw(2, 4, 3), "c": _draw(3, 4)}),
        Case("y = Gemm <transA = 1> (a, b)", {"a": _draw(1, 3, 2), "b": _draw(2, 3, 4)}),
    ),
    "GlobalAveragePool": (_unary("GlobalAveragePool", _IMAGE),),
    "GlobalLpPool": (Case("y = GlobalLpPool (x)", {"x": _IMAGE}, runtime=True),),
    "GlobalMaxPool": (_unary("GlobalMaxPool", _IMAGE),),
    "GroupNormalization": (
        Case(
            "y = GroupNormalization <num_groups = 2> (x, s, b)",
            {"x": _draw(1, 2, 4, 3), "s": _draw(2, 4), "b": _draw(3, 4)},
            opset=21,
            runtime=True,
        ),
    ),
    "Hardmax": (_unary("Hardmax"),),
    "InstanceNormalization": (Case("y = InstanceNormalization (x, s, b)", {"x": _draw(1, 2, 3, 4), "s": _draw(2, 3), "b": _draw(3, 3)}),),
    "LRN": (Case("y = LRN <size = 3> (x)", {"x": _draw(1, 2, 4, 2, 2)}, runtime=True),),
    "LSTM": _recurrent("LSTM", 4),
    "LayerNormalization": (
        Case("y = LayerNormalization <axis = -2> (x, s, b)", {"x": _draw(1, 2, 3, 4), "s": _draw(2, 3, 4), "b": _draw(3, 3, 4)}),
    ),
    "LogSoftmax": (Case("y = LogSoftmax <axis = 0> (x)", {"x": _X}),),
    "LpNormalization": (Case("y = LpNormalization (x)", {"x": _X}),),
    "LpPool": (Case("y = LpPool <kernel_shape = [2, 2], strides = [1, 2]> (x)", {"x": _IMAGE}),),
    "MatMul": (
        Case("y = MatMul (a, b)", {"a": _draw(1, 2, 3, 4), "b": _draw(2, 4, 5)}),
        Case("y = MatMul (a, b)", {"a": _draw(1, 4), "b": _draw(2, 3, 4, 2)}),
    ),
    "Max": (Case("y = Max (a, b)", {"a": _X, "b": np.array([0.07])}),),
    "MaxPool": (Case("y = MaxPool <kernel_shape = [3, 2], strides = [1, 2], pads = [1, 0, 1, 0]> (x)", {"x": _IMAGE}),),
    "Mean": (Case("y = Mean (a, b)", _PAIR),),
    "MeanVarianceNormalization": (Case("y = MeanVarianceNormalization (x)", {"x": _draw(1, 2, 3, 2, 2)}, runtime=True),),
    "Min": (Case("y = Min (a, b)", {"a": _X, "b": np.array([0.07])}),),
    "Mod": (Case("y = Mod <fmod = 1> (a, b)", {"a": 3 * _X, "b": np.array([1.03])}),),
    "Mul": (Case("y = Mul (a, b)", _PAIR),),
    "NegativeLogLikelihoodLoss": (Case("y = NegativeLogLikelihoodLoss (x, t)", {"x": _X, "t": _ints(0, 3, 1)}),),
    "OneHot": (Case("y = OneHot (i, n, v)", {"i": _ints(0, 2, 1), "n": np.array(4), "v": np.array([0.5, 2.0])}),),
    "PRelu": (Case("y = PRelu (x, s)", {"x": _X, "s": np.array([0.1, 0.2, 0.3, 0.4])}),),
    "Pad": (
        Case("y = Pad (x, p, v)", {"x": _X, "p": _ints(1, 0, 0, 2), "v": np.array(0.7)}),
        Case('y = Pad <mode = "reflect"> (x, p)', {"x": _X, "p": _ints(1, 2, 0, 1)}),
    ),
    "Pow": (
        Case("y = Pow (a, b)", {"a": _POSITIVE, "b": _draw(1, 4)}),
        Case("y = Pow (a, b)", {"a": _X, "b": np.array(3.0)}, wrt=["a"], known=["b"]),
    ),
    "RMSNormalization": (Case("y = RMSNormalization (x, s)", {"x": _X, "s": _draw(1, 4)}, opset=23),),
    "RNN": _recurrent("RNN", 1),
    "Reshape": (Case("y = Reshape (x, shape)", {"x": _X, "shape": _ints(2, -1)}),),
    "Resize": (
        Case('y = Resize <mode = "linear"> (x, , scales)', {"x": _draw(1, 1, 1, 3, 4), "scales": np.array([1, 1, 2, 1.5], np.float32)}),
        Case('y = Resize <mode = "nearest"> (x, , scales)', {"x": _draw(1, 1, 1, 3, 4), "scales": np.array([1, 1, 2, 2], np.float32)}),
    ),
    "ReverseSequence": (Case("y = ReverseSequence <batch_axis = 0, time_axis = 1> (x, n)", {"x": _X, "n": _ints(1, 3, 4)}),),
    "ScatterElements": (
        Case("y = ScatterElements <axis = 1> (x, i, u)", {"x": _X, "i": np.array([[0, 2], [1, 3], [2, 0]]), "u": _draw(2, 3, 2)}),
        Case('y = ScatterElements <reduction = "add"> (x, i, u)', {"x": _X, "i": np.array([[0, 0, 1, 2]] * 3), "u": _draw(2, 3, 4)}),
    ),
    "ScatterND": (Case("y = ScatterND (x, i, u)", {"x": _X, "i": np.array([[2], [0]]), "u": _draw(2, 2, 4)}),),
    "Slice": (Case("y = Slice (x, s, e, a, t)", {"x": _X, "s": _ints(3), "e": _ints(-9), "a": _ints(1), "t": _ints(-2)}),),
    "Softmax": (Case("y = Softmax <axis = 0> (x)", {"x": _X}),),
    "SoftmaxCrossEntropyLoss": (Case("y = SoftmaxCrossEntropyLoss (x, t)", {"x": _X, "t": _ints(0, 3, 1)}),),
    "SpaceToDepth": (Case("y = SpaceToDepth <blocksize = 2> (x)", {"x": _draw(1, 1, 2, 4, 6)}),),
    "Split": (Case("y, z = Split <axis = 1> (x, n)", {"x": _X, "n": _ints(1, 3)}),),
    "Squeeze": (Case("y = Squeeze (x, a)", {"x": _draw(1, 2, 1, 3), "a": _ints(1)}),),
    "Sub": (Case("y = Sub (a, b)", _PAIR),),
    "Sum": (Case("y = Sum (a, b, c)", {**_PAIR, "c": _draw(3, 2, 1)}),),
    "Swish": (Case("y = Swish <alpha = 1.5> (x)", {"x": _X}, opset=24),),
    "Tile": (Case("y = Tile (x, n)", {"x": _X, "n": _ints(2, 3)}),),
    "TopK": (Case("y, i = TopK <axis = 1> (x, k)", {"x": _X, "k": _ints(2)}),),
    "Transpose": (Case("y = Transpose <perm = [2, 0, 1]> (x)", {"x": _draw(1, 2, 3, 4)}),),
    "Trilu": (Case("y = Trilu <upper = 0> (x, k)", {"x": _X, "k": np.array(1)}),),
    "Unsqueeze": (Case("y = Unsqueeze (x, a)", {"x": _X, "a": _ints(0, -1)}),),
    "Where": (Case("y = Where (c, a, b)", {"c": _X > 0, "a": _X, "b": np.array([0.3, 0.4, 0.5, 0.6])}),),
}
"""Cases by operator type."""

_ROWS = {"x": _draw(1, 2, 3, 4), "s": _draw(2, 4)}
_BIASED = {"x": _draw(1, 2, 3, 4), "b": _draw(2, 4)}


def _contrib(call: str, inputs: Mapping[str, Array]) -> Case:
    return Case(f"y = com.microsoft.{call}", inputs, runtime=True)


CASES |= {
    "SimplifiedLayerNormalization": (Case("y = SimplifiedLayerNormalization (x, s)", _ROWS, runtime=True),),
    "com.microsoft::BiasGelu": (_contrib("BiasGelu (x, b)", _BIASED),),
    "com.microsoft::FastGelu": (_contrib("FastGelu (x)", {"x": _X}), _contrib("FastGelu (x, b)", _BIASED)),
    "com.microsoft::FusedGemm": (
        _contrib(
            'FusedGemm <transB = 1, alpha = 0.5, activation = "Relu"> (a, b, c)',
            {"a": _draw(1, 2, 3), "b": _draw(2, 4, 3), "c": _draw(3, 4)},
        ),
    ),
    "com.microsoft::FusedMatMul": (
        _contrib("FusedMatMul <transA = 1, alpha = 0.5> (a, b)", {"a": _draw(1, 2, 4, 3), "b": _draw(2, 2, 4, 5)}),
    ),
    "com.microsoft::Gelu": (_contrib("Gelu (x)", {"x": _X}),),
    "com.microsoft::QuickGelu": (_contrib("QuickGelu (x)", {"x": _X}),),
    "com.microsoft::SkipLayerNormalization": (
        _contrib("SkipLayerNormalization (x, k, s, b)", {**_ROWS, "k": _draw(3, 2, 3, 4), "b": _draw(4, 4)}),
    ),
    "com.microsoft::SkipSimplifiedLayerNormalization": (
        _contrib("SkipSimplifiedLayerNormalization (x, k, s)", {**_ROWS, "k": _draw(3, 2, 3, 4)}),
    ),
}

_THROUGH = "straight-through, which is not the derivative of rounding"

_SHAPE = "zero: only the shape of the input is read"

ELSEWHERE = {
    "EyeLike": _SHAPE,
    "RandomNormalLike": _SHAPE,
    "RandomUniformLike": _SHAPE,
    "QuantizeLinear": _THROUGH,
    "DequantizeLinear": _THROUGH,
    "com.microsoft::QuantizeLinear": _THROUGH,
    "com.microsoft::DequantizeLinear": _THROUGH,
    "com.microsoft::SimplifiedLayerNormalization": "the same rule as in the default domain",
}
"""Rules that differences cannot check, and why."""
