"""Recomputation: the same gradients to the bit, fewer values kept, and copies that ONNX Runtime does not merge away."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.passes.differentiate import Differentiated, differentiate
from intaglio.passes.errors import InputError
from intaglio.passes.graph import reads
from tests.models import normal, operators, optimized, parse, run

Array = np.ndarray


def chain(blocks: int, width: int = 8) -> onnx.ModelProto:
    """Residual blocks x ← x + w·(x·w)², one after another."""
    body = []
    for block in range(blocks):
        source = f"x{block - 1}" if block else "x"
        body.append(f"a{block} = Mul ({source}, w) b{block} = Mul (a{block}, a{block}) c{block} = Mul (b{block}, w)")
        body.append(f"x{block} = Add ({source}, c{block})")
    text = f"g (float[N, {width}] x) => (float[N, {width}] y) {{ {' '.join(body)} y = Mul (x{blocks - 1}, w) }}"
    return parse(text, {"w": 0.3 * normal(1, width)})


def gradients(found: Differentiated, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Outputs by name under ONNX Runtime, the cotangent of y being ones."""
    x = feed["x"]
    results = run(found.proto, {**feed, found.cotangents["y"]: np.ones_like(x)})
    return dict(zip((value.name for value in found.proto.graph.output), results, strict=True))


@settings(max_examples=10)
@given(blocks=st.integers(1, 9), kept=st.sets(st.integers(0, 8)), chosen=st.booleans(), samples=st.integers(0, 3))
def test_gradients_are_the_same_to_the_bit(blocks: int, kept: set[int], chosen: bool, samples: int) -> None:
    proto = chain(blocks)
    feed = {"x": np.random.default_rng(0).standard_normal((samples, 8)).astype(np.float32)}
    plain = differentiate(proto, ["y"], ["x", "w"])
    again = differentiate(proto, ["y"], ["x", "w"], recompute=True if chosen else [f"x{index}" for index in kept if index < blocks])
    expected, found = gradients(plain, feed), gradients(again, feed)
    assert expected.keys() == found.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_the_copies_survive_optimization() -> None:
    proto = chain(8)
    plain = operators(optimized(differentiate(proto, ["y"], ["x", "w"]).proto))
    found = differentiate(proto, ["y"], ["x", "w"], recompute=["x1", "x3", "x5"])
    again = operators(optimized(found.proto))
    # The reverse pass reads a and b of each block, and its result x, of which three are kept.
    assert len(found.recomputed) == 8 * 2 + 5
    # Computed again: a and b of each block, c where x is not kept. A gate's zero is one more product, made from two casts.
    zeros = again["Cast"] // 2
    assert zeros >= 4, "one for each segment, and for each gradient of the weight"
    assert again["Mul"] - plain["Mul"] - zeros == 8 * 2 + 5
    assert again["Add"] > plain["Add"]


def test_nothing_that_is_not_kept_outlives_the_forward_pass() -> None:
    proto = chain(12)
    found = differentiate(proto, ["y"], ["x", "w"], recompute=True)
    forward = {name for node in proto.graph.node for name in node.output}
    originals = {node.output[0] for node in found.proto.graph.node} & forward
    read_late = set()
    for node in found.proto.graph.node:
        if not originals.intersection(node.output):
            read_late |= reads(node) & forward
    assert found.recomputed
    assert not read_late & found.recomputed
    # √n of n blocks, times the values that one block saves, and as many for the last segment: far less than all 12 × 3.
    assert len(read_late) <= 18


def test_a_segment_waits_for_its_cotangent() -> None:
    found = differentiate(chain(6), ["y"], ["x"], recompute=["x2"])
    producers = {name: node for node in found.proto.graph.node for name in node.output}

    def sources(name: str) -> set[str]:
        """Everything that a value is computed from."""
        pending, seen = [name], set()
        while pending:
            name = pending.pop()
            if name not in seen:
                seen.add(name)
                pending.extend(reads(producers[name]) if name in producers else ())
        return seen

    copies = [name for name in producers if name.startswith("again.a") and not name.startswith("again.add")]
    assert copies
    assert all(found.cotangents["y"] in sources(name) for name in copies)


def test_weights_gradients_come_in_turn() -> None:
    found = differentiate(chain(3), ["y"], ["x", "w"], recompute=["x0", "x1"])
    gates = [node for node in found.proto.graph.node if node.output[0].startswith("gate.reshape") and node.attribute]
    gated = [node for node in gates if node.input[0].startswith("grad.")]
    shapes = {value.name: value.type.tensor_type.shape.dim for value in found.proto.graph.value_info}
    assert len(gated) >= 5, "at every product with w but the first, the reverse pass goes on when the gradient of w is done"
    assert all([dim.dim_param or dim.dim_value for dim in shapes[node.output[0]]] == ["N", 8] for node in gated), "types are declared"


def test_random_values_are_kept() -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { r = RandomNormalLike <seed = 1.0> (x) a = Mul (x, r) b = Mul (a, a) y = Mul (b, b) }"
    found = differentiate(parse(text), ["y"], ["x"], recompute=[])
    assert "a" in found.recomputed
    assert "r" not in found.recomputed
    assert operators(found.proto)["RandomNormalLike"] == 1


def test_kept_names_must_exist() -> None:
    with pytest.raises(InputError, match="'nothing' is not a value"):
        differentiate(chain(2), ["y"], ["x"], recompute=["nothing"])
