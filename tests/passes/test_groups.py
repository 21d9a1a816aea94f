"""Groups as wholes: a refusal reaches all of a group, and constants that others read stay."""

from __future__ import annotations

import pytest
from onnx import helper

from tests.models import parse
from tests.passes.pruning import FIRST, HEAD, LAST, MORE, OTHERS, PAD, WEIGHTS, network, reason_of_the_first, trace

REFUSED = {
    "shared constant": (
        f"{FIRST} b = Conv <{PAD}> (x, c4, b1) p = Conv (a, c3) q = Conv (b, c3b) y = Add (p, q)",
        "constant 'b1' is read elsewhere too",
    ),
    "shared shape": (
        f"{FIRST} f = Reshape (a, row) m = Gemm <transB = 1> (f, head) v = Reshape (x, row) y = Mul (m, v)",
        "shape 'row' is read elsewhere too",
    ),
    "nobody": (f"{FIRST} y = Conv (x, c11)", "no layer reads it"),
}
"""Text, and why the group that c1 writes stays."""


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    body, reason = REFUSED[name]
    assert reason in reason_of_the_first(body)


def test_a_refusal_reaches_every_part_of_a_group() -> None:
    """The residual stream is refused because of what reads its last sum; what was followed no further is refused too."""
    body = f"""{FIRST} b = Conv <{PAD}> (a, c2) q = Add (a, b) t = Transpose (q) u = Transpose (t)
        v = Conv <{PAD}> (x, c4) z = Add (u, v) {LAST}"""
    groups = network(body, extra=OTHERS).groups
    assert (groups["a"].producers, groups["a"].reason) == (("c1", "c2"), "read by Transpose")
    assert groups["v"].reason == "Add meets 'u', whose channels are not known; no layer reads it"


def test_a_constant_that_callers_may_override_stays() -> None:
    proto = parse(f"{HEAD} {{ {FIRST} z = Mul (a, slope) {LAST} }}", {k: WEIGHTS[k] for k in ("c1", "b1", "slope", "c3")})
    assert trace(proto).groups["a"].prunable
    proto.graph.input.append(helper.make_tensor_value_info("slope", 1, [12, 1, 1]))
    assert trace(proto).groups["a"].reason == "'slope' is no initializer of its own; no layer reads it"


def test_a_single_channel_is_no_choice() -> None:
    found = network(f"{FIRST} p = Conv (a, c7) q = Sigmoid (p) z = Mul (q, a) {LAST}", extra=MORE)
    assert found.groups["p"].reason == "a single channel; no layer reads it"
