"""Gradients of attention."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from intaglio.passes.differentiate import differentiate

from .checking import RUNTIME_TOLERANCE, TOLERANCE, gradient_error, model_error, model_of, run_gradients, runtime_error

Array = np.ndarray

_BATCH, _QUERIES, _KEYS, _SIZE, _VALUE = 2, 3, 4, 2, 3


def _inputs(seed: int, heads: tuple[int, int], split: bool, mask: Array | None) -> dict[str, Array]:
    """q, k, v and a mask; heads of queries and of keys, without an axis of their own if `split`."""
    rng = np.random.default_rng(seed)
    shapes = {"q": (heads[0], _QUERIES, _SIZE), "k": (heads[1], _KEYS, _SIZE), "v": (heads[1], _KEYS, _VALUE)}
    arrays = {name: rng.standard_normal((_BATCH, *shape)) for name, shape in shapes.items()}
    if split:
        arrays = {name: array.swapaxes(1, 2).reshape(_BATCH, array.shape[2], -1) for name, array in arrays.items()}
    return arrays if mask is None else {**arrays, "m": mask}


def _text(inputs: dict[str, Array], heads: tuple[int, int], attributes: list[str]) -> str:
    if inputs["q"].ndim == 3:
        attributes = [*attributes, f"q_num_heads = {heads[0]}", f"kv_num_heads = {heads[1]}"]
    given = f"<{', '.join(attributes)}>" if attributes else ""
    return f"y = Attention {given} ({', '.join(inputs)})"


def _mask(seed: int, shape: tuple[int, ...], boolean: bool) -> Array:
    """Additive, or boolean with at least one key for each query."""
    rng = np.random.default_rng(seed)
    if not boolean:
        return rng.standard_normal(shape)
    mask = rng.uniform(size=shape) < 0.6
    mask[..., 0] = True
    return mask


@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (2, 1)]),
    split=st.booleans(),
    mask=st.sampled_from([None, (3, 4), (2, 1, 3, 4), (1, 1, 1, 4), (2, 1, 1, 4)]),
    boolean=st.booleans(),
    causal=st.booleans(),
    softcap=st.booleans(),
    scale=st.booleans(),
    open_shapes=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention(
    heads: tuple[int, int],
    split: bool,
    mask: tuple[int, ...] | None,
    boolean: bool,
    causal: bool,
    softcap: bool,
    scale: bool,
    open_shapes: bool,
    seed: int,
) -> None:
    inputs = _inputs(seed, heads, split, None if mask is None else _mask(seed, mask, boolean))
    causal = causal and (mask is None or mask[-2] == _QUERIES)  # the evaluator takes the number of queries from a mask
    attributes = ["is_causal = 1"] * causal + ["softcap = 0.8"] * softcap + ["scale = 0.7"] * scale
    wrt = [name for name, array in inputs.items() if array.dtype == np.float64]
    if open_shapes and not (split and scale):  # sizes of heads must be known then
        open_shapes = False
    if open_shapes and "m" in wrt:  # and lengths, that a mask spans all keys
        wrt.remove("m")
    assert gradient_error(_text(inputs, heads, attributes), inputs, wrt, opset=23, open_shapes=open_shapes) < TOLERANCE


@pytest.mark.parametrize("name", ["q", "k", "v", "m"])
def test_each_input_by_itself(name: str) -> None:
    inputs = _inputs(0, (2, 1), False, _mask(0, (1, 2, 3, 4), False))
    assert gradient_error("y = Attention(q, k, v, m)", inputs, [name], opset=23) < TOLERANCE


@pytest.mark.parametrize(("left", "right"), [(1, -1), (-1, 0), (1, 1)])
def test_sliding_windows(left: int, right: int) -> None:
    """Of opset 25; no query of these is without a key."""
    inputs = _inputs(0, (2, 2), False, None)
    text = f"y = Attention <left_window_size = {left}, right_window_size = {right}> (q, k, v)"
    assert gradient_error(text, inputs, ["q", "k", "v"], opset=25) < TOLERANCE


def test_a_mask_shorter_than_the_keys_masks_the_rest() -> None:
    inputs = _inputs(0, (2, 2), False, _mask(0, (3, 3), False))
    assert gradient_error("y = Attention(q, k, v, m)", inputs, ["q", "k", "v"], opset=23) < TOLERANCE


def test_the_precision_of_the_softmax() -> None:
    """In double precision, which asked for in double precision changes nothing."""
    inputs = _inputs(0, (2, 2), False, None)
    assert gradient_error("y = Attention <softmax_precision = 11> (q, k, v)", inputs, ["q", "k", "v"], opset=23) < TOLERANCE
    assert runtime_error("y = Attention <softmax_precision = 1> (q, k, v)", inputs, ["q", "k", "v"], opset=23) < RUNTIME_TOLERANCE


def test_a_query_without_keys_has_no_gradient() -> None:
    mask = np.ones((_QUERIES, _KEYS), bool)
    mask[1] = False
    inputs = _inputs(0, (1, 1), False, mask)
    found = differentiate(model_of("y = Attention(q, k, v, m)", inputs, ["y"], opset=23), ["y"], ["q", "k", "v"])
    with np.errstate(invalid="ignore"):  # −∞ − (−∞), which is not selected
        gradients = run_gradients(found, inputs, {"y": np.ones((_BATCH, 1, _QUERIES, _VALUE))})
    assert np.all(gradients["q"][:, :, 1] == 0)
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients.values())
    np.testing.assert_allclose(gradients["v"].sum(axis=2), _QUERIES - 1, rtol=1e-12)  # weights of a query sum to 1


@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize(
    ("attributes", "boolean"), [([], None), (["is_causal = 1"], None), (["softcap = 0.8"], True), (["scale = 0.5"], False)]
)
def test_attention_in_the_runtime(heads: tuple[int, int], split: bool, attributes: list[str], boolean: bool | None) -> None:
    inputs = _inputs(0, heads, split, None if boolean is None else _mask(0, (2, 1, 3, 4), boolean))
    wrt = [name for name, array in inputs.items() if array.dtype == np.float64]
    assert runtime_error(_text(inputs, heads, attributes), inputs, wrt, opset=23) < RUNTIME_TOLERANCE


def test_a_mask_whose_length_has_the_name_of_the_keys() -> None:
    inputs = _inputs(0, (2, 2), False, _mask(0, (2, 1, 3, 4), False))
    proto = model_of("y = Attention <scale = 0.7> (q, k, v, m)", inputs, ["y"], opset=23)
    names = {"q": {0: "batch", 2: "queries"}, "k": {0: "batch", 2: "keys"}, "m": {0: "batch", 2: "queries", 3: "keys"}}
    for value in proto.graph.input:
        for axis, name in names.get(value.name, {}).items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
    assert model_error(proto, inputs, ["q", "k", "v", "m"]) < TOLERANCE
    assert all(node.op_type not in ("Pad", "NonZero") for node in differentiate(proto, ["y"], ["m"]).proto.graph.node)


def _stop(text: str, inputs: dict[str, Array], outputs: tuple[str, ...] = ("y",), opset: int = 24) -> str:
    (stop,) = differentiate(model_of(text, inputs, outputs, opset=opset), outputs, ["q", "k", "v"]).stops
    return stop.reason


def test_what_is_not_covered() -> None:
    inputs = _inputs(0, (2, 2), False, None)
    cache = {"a": np.zeros((_BATCH, 2, 1, _SIZE)), "b": np.zeros((_BATCH, 2, 1, _VALUE))}
    lengths = {"n": np.full(_BATCH, 3)}
    assert _stop("y, c, d = Attention(q, k, v, , a, b)", {**inputs, **cache}) == "it has a cache of past keys and values"
    assert _stop("y = Attention(q, k, v, , , , n)", {**inputs, **lengths}) == "it has lengths of a padded cache"
    assert _stop("y, , , s = Attention(q, k, v)", inputs, ("y", "s")) == "the loss depends on the cache or the scores that it outputs"


def test_the_gradient_of_a_mask_that_may_be_short() -> None:
    inputs = _inputs(0, (2, 2), False, _mask(0, (3, 3), False))
    (stop,) = differentiate(model_of("y = Attention(q, k, v, m)", inputs, ["y"], opset=23), ["y"], ["q", "m"]).stops
    assert stop.reason == "the mask may be shorter than the keys"
