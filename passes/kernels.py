"""Which integers operators compute with: eight bits, or fewer where the processor's sums of products would saturate.

Without VNNI, x86 processors add two products of bytes in 16 bits. 2·255·127 does not fit, so ONNX Runtime's kernels for unsigned
activations and signed weights are wrong there for large codes; codes of seven bits fit. Whether a provider saturates is found out by
running extreme codes through the operators as this compiler writes them, against exact integers, and kept in the cache.

- ``full``: unsigned activations, weights within ±127;
- ``reduced``: the same with weights within ±63;
- ``signed``: signed activations, weights within ±127. `DynamicQuantizeLinear` knows unsigned ones only, so behind it weights stay within
  ±63.

``auto`` is ``full`` where that is exact, and for targets whose processor is not this one. Elsewhere it is ``reduced``, unless only
``signed`` is exact, or it is exact too and clearly faster, measured in turns; ``reduced`` where neither is exact. On x86 ONNX Runtime makes
unsigned activations of signed ones before it chooses kernels, and only of values with one reader, unless `session.qdqisint8allowed` is set:
there ``signed`` is neither exact nor fast. It is for processors with signed kernels, like Arm's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from .cache import Cache, digest
from .errors import InputError
from .latency import machine, measure
from .session import RUNTIME_VERSION, open_session

_REVISION = 2
"""Counts up whenever the probe finds out something else on the same machine."""

_NAMESPACE = "kernels"

_TRIED = (16, 64, 32)
_TIMED = (128, 512, 512)
"""Rows, inputs and outputs of the products that are tried and timed. Steps are 1, so that the floats that come out are the sums
themselves: with so few inputs none of them exceeds 2²⁴, from which on floats have gaps."""

_CLEARLY = 0.95
"""The share of the other's time within which ``signed`` is faster: closer ones may change places from run to run."""

_OPERATORS = ("Conv", "MatMul", "dynamic")
"""What is tried: each has kernels of its own."""


@dataclass(frozen=True)
class Integers:
    """Which integers operators compute with.

    Attributes:
        largest: magnitude of codes of weights, where activations have a fixed scale.
        largest_dynamic: the same, where they get one in every run.
        activations: uint8 or int8.
    """

    largest: int
    largest_dynamic: int
    activations: np.dtype[Any]

    def largest_code(self, arithmetic: str) -> int:
        """The largest magnitude of codes of a weight in an arithmetic."""
        return self.largest_dynamic if arithmetic == "dynamic" else self.largest


INTEGERS: dict[str, Integers] = {
    "full": Integers(127, 127, np.dtype(np.uint8)),
    "reduced": Integers(63, 63, np.dtype(np.uint8)),
    "signed": Integers(127, 63, np.dtype(np.int8)),
}
"""Every variant, by the name that users give."""

Run = Callable[[ModelProto, NDArray[np.float32]], NDArray[np.float32]]
"""Runs a model of one input and one output."""


@dataclass(frozen=True)
class Kernels:
    """What a provider's integer kernels do.

    Attributes:
        exact: names of the variants whose results are right.
        fastest: "signed" where that was found to be clearly faster, else "reduced".
    """

    exact: tuple[str, ...]
    fastest: str

    @property
    def choice(self) -> str:
        """The variant that ``auto`` stands for."""
        if "full" in self.exact:
            return "full"
        others = [name for name in ("reduced", "signed") if name in self.exact]
        return self.fastest if self.fastest in others or not others else others[0]


def chosen_integers(asked: str, own_machine: bool, cache: Cache, providers: tuple[str, ...]) -> str:
    """The name of a variant for what a user asks for.

    Args:
        asked: a name, or "auto".
        own_machine: whether the result is for a processor like this one, and may compute in integers at all; nothing is probed elsewhere.
        cache: of measurements.
        providers: execution providers in order of preference.
    """
    if asked != "auto":
        return asked
    return find_kernels(cache, providers).choice if own_machine else "full"


def find_kernels(cache: Cache, providers: tuple[str, ...]) -> Kernels:
    """What these providers do on this machine, measured once.

    Args:
        cache: where that is kept.
        providers: execution providers in order of preference.
    """
    key = digest([_REVISION, RUNTIME_VERSION, machine(), list(providers)])
    known = cache.get_json(_NAMESPACE, key)
    if isinstance(known, list) and len(known) > 1:
        return Kernels(tuple(str(name) for name in known[1:-1]), str(known[-1]))

    def run(model: ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(open_session(model, providers=providers).run(["y"], {"x": x})[0], np.float32)

    exact = exact_variants(run)
    contest = "full" not in exact and {"reduced", "signed"} <= set(exact)
    found = Kernels(exact, _faster(providers) if contest else "reduced")
    cache.put_json(_NAMESPACE, key, ["exact", *found.exact, found.fastest])
    return found


def exact_variants(run: Run) -> tuple[str, ...]:
    """Names of the variants whose products are right for the largest codes that they admit.

    Args:
        run: of the provider.
    """
    return tuple(name for name, integers in INTEGERS.items() if all(_is_exact(run, operator, integers) for operator in _OPERATORS))


def _is_exact(run: Run, operator: str, integers: Integers) -> bool:
    """Whether an operator's sums are right to within its output's step, or to rounding where that is a float; not if it is refused."""
    x, codes = _extremes(operator, integers, _TRIED)
    right = x.astype(np.int64) @ (codes + codes[:, ::-1] if operator == "MatMul" else codes)
    step = float(np.abs(right).max()) / 100
    try:
        found = run(_model(operator, integers, codes, step), _shaped(operator, x))
    except InputError:
        return False
    found = found.reshape(found.shape[1], -1).T if operator == "Conv" else found
    return bool(np.abs(found - right).max() <= (step if operator == "Conv" else 0.5))


def _extremes(operator: str, integers: Integers, sizes: tuple[int, int, int]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Activations (rows, inputs) and codes of weights (inputs, outputs) whose sums are as large as can be, and others at random."""
    rows, inner, outputs = sizes
    rng, limits = np.random.default_rng(0), np.iinfo(np.uint8 if operator == "dynamic" else integers.activations)
    x = rng.choice([float(limits.min), float(limits.max)], (rows, inner)).astype(np.float32)
    x[0], x[1] = limits.max, limits.min
    codes = rng.integers(0, 2, (inner, outputs)) * 2 - 1
    codes[:, 0], codes[:, 1] = 1, -1
    return x, codes * integers.largest_code("dynamic" if operator == "dynamic" else "integer")


def _shaped(operator: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows as a Conv reads them: positions of an image (1, inputs, rows, 1)."""
    return np.ascontiguousarray(x.T[None, :, :, None]) if operator == "Conv" else x


def _model(operator: str, integers: Integers, codes: NDArray[np.int64], step: float) -> ModelProto:
    """One operator as the arithmetics and the placing of quantizers write it; two MatMuls, as values may have two readers."""
    inner, outputs = codes.shape
    kind = "uint8" if integers.activations == np.uint8 or operator == "dynamic" else "int8"
    shape = f"1, {inner}, R, 1" if operator == "Conv" else f"R, {inner}"
    rounded = "q = QuantizeLinear (x, one, zero) d = DequantizeLinear (q, one, zero) v = DequantizeLinear <axis = {}> (w, ones, zeros)"
    body = {
        "Conv": rounded.format(0) + " c = Conv (d, v) r = QuantizeLinear (c, step, middle) y = DequantizeLinear (r, step, middle)",
        "MatMul": rounded.format(1)
        + " u = DequantizeLinear <axis = 1> (b, ones, zeros) m = MatMul (d, v) n = MatMul (d, u) y = Add (m, n)",
        "dynamic": "q, s, z = DynamicQuantizeLinear (x) t = MatMulInteger (q, w, z) f = Cast <to = 1> (t) p = Mul (s, ones) y = Mul (f, p)",
    }[operator]
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 13]> kernels (float[{shape}] x) => (float[{shape}] y) {{ {body} }}'
    )
    model.graph.output[0].type.tensor_type.ClearField("shape")
    weight = codes.T[:, :, None, None] if operator == "Conv" else codes
    middle = 0 if operator != "Conv" or kind == "int8" else 128
    arrays = {
        "w": weight.astype(np.int8),
        "b": codes[:, ::-1].astype(np.int8),
        "ones": np.ones(outputs, np.float32),
        "zeros": np.zeros(outputs, np.int8),
        "one": np.float32(1),
        "zero": np.zeros((), kind),
        "step": np.float32(step),
        "middle": np.asarray(middle, kind),
    }
    read = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items() if name in read)
    return model


def _faster(providers: tuple[str, ...]) -> str:
    """``signed`` if that is clearly faster than ``reduced``, measured in turns on a product with fixed scales."""
    runs = []
    for name in ("reduced", "signed"):
        x, codes = _extremes("MatMul", INTEGERS[name], _TIMED)
        runs.append(open_session(_model("MatMul", INTEGERS[name], codes, 1.0), providers=providers).bind({"x": x}))
    reduced, signed = measure(runs)
    return "signed" if signed.median_s < _CLEARLY * reduced.median_s else "reduced"
