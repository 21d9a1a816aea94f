"""Gradients of slices and paddings."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from intaglio.passes.differentiate import differentiate

from .checking import check_everywhere, gradient_error, model_of, run_in_runtime

TOLERANCE = 1e-8
"""Both operators are linear: differences are exact but for rounding over the step."""


def _ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def _normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape)


_BOUND = st.one_of(st.integers(-8, 8), st.sampled_from([-(2**63), 2**63 - 1]))


# --- Slice


@settings(max_examples=120, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 5)),
    starts=st.tuples(_BOUND, _BOUND),
    ends=st.tuples(_BOUND, _BOUND),
    axes=st.sampled_from([(0, 1), (1, 0), (-1, 0), (1,), (-2,)]),
    steps=st.tuples(*[st.sampled_from([-3, -2, -1, 1, 1, 2, 3, 7])] * 2),
    known=st.sampled_from([(), ("axes", "steps"), ("starts", "ends", "axes", "steps"), ("axes", "ends")]),
    open_shapes=st.booleans(),
)
def test_slices(
    shape: tuple[int, int],
    starts: tuple[int, ...],
    ends: tuple[int, int],
    axes: tuple[int, ...],
    steps: tuple[int, int],
    known: tuple[str, ...],
    open_shapes: bool,
) -> None:
    """Backward slices do not start before the first entry: ONNX takes that for the first one, the reference evaluator for none."""
    count = len(axes)
    starts = tuple(max(start, -shape[axis]) if step < 0 else start for start, axis, step in zip(starts, axes, steps, strict=False))
    inputs = {"x": _normal(*shape), "starts": _ints(*starts), "ends": _ints(*ends[:count])}
    inputs |= {"axes": _ints(*axes), "steps": _ints(*steps[:count])}
    error = gradient_error("y = Slice(x, starts, ends, axes, steps)", inputs, ["x"], known=known, open_shapes=open_shapes)
    assert error < TOLERANCE


@settings(max_examples=40, deadline=None)
@given(start=_BOUND, end=_BOUND, known=st.booleans(), open_shapes=st.booleans(), narrow=st.booleans())
def test_slices_of_step_one(start: int, end: int, known: bool, open_shapes: bool, narrow: bool) -> None:
    dtype = np.int32 if narrow and max(abs(start), abs(end)) < 2**31 else np.int64
    inputs = {"x": _normal(5, 2), "starts": np.array([start], dtype), "ends": np.array([end], dtype)}
    constants = ["starts", "ends"] if known else []
    assert gradient_error("y = Slice(x, starts, ends)", inputs, ["x"], known=constants, open_shapes=open_shapes) < TOLERANCE


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [
        ((1,), (-1,), (1,), (1,)),
        ((-3, 1), (2**63 - 1, 3), (1, 0), (1, 1)),
        ((1, 0), (2**63 - 1, 2**63 - 1), (-1, -2), (2, 3)),
        ((-1,), (-(2**63),), (1,), (-1,)),
        ((4, 1), (0, 3), (1, 0), (-2, 1)),
        ((2,), (2,), (1,), (1,)),
    ],
)
def test_slices_in_the_runtime(
    starts: tuple[int, ...], ends: tuple[int, ...], axes: tuple[int, ...], steps: tuple[int, ...], known: bool
) -> None:
    arguments = {"starts": _ints(*starts), "ends": _ints(*ends), "axes": _ints(*axes), "steps": _ints(*steps)}
    check_everywhere(
        f"y = Slice(x, {', '.join(arguments)})", {"x": _normal(4, 6), **arguments}, ["x"], known=list(arguments) if known else []
    )


@pytest.mark.parametrize(
    ("start", "step", "emitted"),
    [(1, 1, ["Pad"]), (0, 2, ["Unsqueeze", "Pad", "Reshape"]), (1, 2, ["Unsqueeze", "Pad", "Reshape"]), (-1, -1, ["Slice"])],
)
def test_what_a_slice_emits(start: int, step: int, emitted: list[str]) -> None:
    end = 2**63 - 1 if step > 0 else -(2**63)
    inputs = {"x": _normal(3, 6), "starts": _ints(start), "ends": _ints(end), "axes": _ints(1), "steps": _ints(step)}
    proto = model_of("y = Slice(x, starts, ends, axes, steps)", inputs, ["y"], known=["starts", "ends", "axes", "steps"])
    assert [node.op_type for node in differentiate(proto, ["y"], ["x"]).proto.graph.node] == ["Slice", *emitted, "Identity"]


# --- Pad


@settings(max_examples=60, deadline=None)
@given(
    mode=st.sampled_from(["constant", "reflect", "edge", "wrap"]),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    axes=st.sampled_from([None, (0, 1), (-1, 0), (1,), (-2,)]),
    data=st.data(),
)
def test_pads(mode: str, shape: tuple[int, int], axes: tuple[int, ...] | None, data: st.DataObject) -> None:
    most = {"constant": 3, "edge": 3, "reflect": -1, "wrap": 0}[mode]
    limits = [most if mode in ("constant", "edge") else shape[axis] + most for axis in axes or (0, 1)]
    inputs = {"x": _normal(*shape), "pads": _ints(*(data.draw(st.integers(0, limit)) for limit in limits * 2))}
    node = f'y = Pad<mode="{mode}">(x, pads)'
    known = ["pads"]
    if axes is not None:
        inputs["axes"] = _ints(*axes)
        node = f'y = Pad<mode="{mode}">(x, pads, , axes)'
        known.append("axes")
    hidden = mode != "wrap" and data.draw(st.booleans())
    assert gradient_error(node, inputs, ["x"], opset=19, known=known, open_shapes=hidden) < TOLERANCE


def test_the_constant_of_a_pad() -> None:
    inputs = {"x": _normal(2, 3), "pads": _ints(1, 2), "value": np.array(0.5), "axes": _ints(1)}
    check_everywhere("y = Pad(x, pads, value, axes)", inputs, ["x", "value"], known=["pads", "axes"])
    check_everywhere("y = Pad(x, pads, value)", inputs | {"pads": _ints(0, 1, 2, 0)}, ["value"], known=["pads"])


@pytest.mark.parametrize("mode", ["reflect", "edge"])
def test_copying_pads_in_the_runtime(mode: str) -> None:
    inputs = {"x": _normal(2, 3, 4), "pads": _ints(2, 1, 0, 3), "axes": _ints(1, -1)}
    check_everywhere(f'y = Pad<mode="{mode}">(x, pads, , axes)', inputs, ["x"], known=["pads", "axes"])


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("pads", [(-1, 2, 0, -1), (1, -2, 1, 0), (1, 0, 2, 1)])
def test_pads_that_crop(pads: tuple[int, ...], known: bool) -> None:
    """The reference evaluator refuses negative pads, so the gradient is compared with what a slice of a wide padding gives."""
    x, cotangent = _normal(4, 5).astype(np.float32), _normal(4 + pads[0] + pads[2], 5 + pads[1] + pads[3]).astype(np.float32)
    inputs = {"x": x, "pads": _ints(*pads)}
    found = differentiate(model_of("y = Pad(x, pads)", inputs, ["y"], known=["pads"] if known else []), ["y"], ["x"])
    gradient = run_in_runtime(found, {"x": x} if known else inputs, {"y": cotangent})["x"]
    wide = np.pad(cotangent, 4)
    np.testing.assert_array_equal(gradient, wide[4 + pads[0] : 8 + pads[0], 4 + pads[1] : 9 + pads[1]])


@pytest.mark.parametrize(
    ("node", "pads", "known", "reason"),
    [
        ('y = Pad<mode="wrap">(x, pads)', (5, 0), True, "repeat entries more than once"),
        ('y = Pad<mode="reflect">(x, pads)', (0, 4), True, "repeat entries more than once"),
        ('y = Pad<mode="edge">(x, pads)', (-1, 0), True, "negative pads"),
        ('y = Pad<mode="edge">(x, pads)', (1, 0), False, "'pads') is not constant"),
    ],
)
def test_pads_without_a_gradient(node: str, pads: tuple[int, int], known: bool, reason: str) -> None:
    proto = model_of(node, {"x": _normal(4), "pads": _ints(*pads)}, ["y"], opset=19, known=["pads"] if known else [])
    (stop,) = differentiate(proto, ["y"], ["x"]).stops
    assert reason in stop.reason
