"""Units: operators that may run in integers, with the values around them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from intaglio.passes.coupling import Unit
from intaglio.passes.load import load
from intaglio.passes.regions import find_carriers
from intaglio.passes.sites import find_sites
from intaglio.passes.units import activation_values, units_around
from tests.models import Array, normal, parse
from tests.passes.test_sites import nested

W = normal(1, 16, 16)
KERNEL = normal(2, 8, 8, 3, 3)
CONV = "Conv <pads = [1, 1, 1, 1]>"


def units(body: str, weights: Mapping[str, Array], shape: str = "N, 16", outputs: str = "") -> dict[str, Unit]:
    """The units of a model from x to y, carriers included."""
    outputs = outputs or f"float[{shape}] y"
    model = load(parse(f"g (float[{shape}] x) => ({outputs}) {{ {body} }}", weights))
    return units_around(model, find_sites(model), find_carriers(model))


@pytest.mark.parametrize(
    ("body", "weights", "expected"),
    [
        ("y = MatMul (x, w)", {"w": W}, {"w": Unit(("x",), ("y",), True)}),
        ("y = Gemm (x, w, b)", {"w": W, "b": normal(3, 16)}, {"w": Unit(("x",), ("y",), True)}),
        ("h = MatMul (x, w) y = Add (h, b)", {"w": W, "b": normal(3, 16)}, {"w": Unit(("x",), ("y",), True)}),
        ("h = Gemm (x, w) y = Relu (h)", {"w": W}, {"w": Unit(("x",), ("y",), True)}),
        ("h = Gemm (x, w) y = Tanh (h)", {"w": W}, {"w": Unit(("x",), ("h",), True)}),
        (
            "h = MatMul (x, w) y = Sigmoid (h)",
            {"w": W},
            {"w": Unit(("x",), ("h",), True), "y": Unit(("h",), ("y",))},
        ),
        (
            "h = MatMul (x, w) y = Add (h, x)",
            {"w": W},
            {"w": Unit(("x",), ("h",), True), "y": Unit(("h", "x"), ("y",))},
        ),
        ("y = Add (x, x)", {}, {"y": Unit(("x",), ("y",))}),
        ("a = Gemm (x, w) b = Gemm (x, v) y = Mul (a, b)", {"w": W, "v": 2 * W}, None),
    ],
)
def test_matrix_products(body: str, weights: Mapping[str, Array], expected: Mapping[str, Unit] | None) -> None:
    expected = expected or {"w": Unit(("x",), ("a",), True), "v": Unit(("x",), ("b",), True), "y": Unit(("a", "b"), ("y",))}
    assert units(body, weights) == expected


def test_convolutions_yield_bytes() -> None:
    found = units(
        f"a = {CONV} (x, w, b) r = Relu (a) y = MaxPool <kernel_shape = [1, 1]> (r)", {"w": KERNEL, "b": normal(3, 8)}, "N, 8, 4, 4"
    )
    assert found == {"w": Unit(("x",), ("r",)), "y": Unit(("r",), ("y",), follows=True)}


def test_a_product_of_activations_yields_floats_too() -> None:
    found = units("t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (x, t)", {}, "N, 16, 16")
    assert found == {"t": Unit(("x",), ("t",)), "y": Unit(("x", "t"), ("y",), True)}


def test_all_operators_of_a_tied_weight_are_one_unit() -> None:
    found = units("a = MatMul (x, w) t = Tanh (x) b = MatMul (t, w) s = Tanh (b) y = Add (a, s)", {"w": W})
    assert found["w"] == Unit(("x", "t"), ("a", "b"), True)


def test_a_tied_weight_that_reads_what_it_yields_is_no_unit() -> None:
    """Its option would need and provide the same resource."""
    assert units("h = MatMul (x, w) y = MatMul (h, w)", {"w": W}) == {}


def test_weights_in_nested_graphs_are_no_units() -> None:
    model = load(nested())
    assert units_around(model, find_sites(model), ()) == {}


def test_only_the_given_sites_and_carriers_count() -> None:
    text = "g (float[N, 16] x) => (float[N, 16] y) { a = MatMul (x, w) b = Sigmoid (a) y = MatMul (b, v) }"
    model = load(parse(text, {"w": W, "v": np.ascontiguousarray(W.T)}))
    sites = find_sites(model)
    assert set(units_around(model, [site for site in sites if site.name == "v"], ())) == {"v"}
    assert units_around(model, (), ()) == {}


def test_every_value_is_listed_once() -> None:
    text = f"g (float[N, 8, 4, 4] x) => (float[N, 8, 4, 4] y) {{ a = {CONV} (x, w) b = {CONV} (a, v) s = Add (a, b) y = Add (s, x) }}"
    model = load(parse(text, {"w": KERNEL, "v": 2 * KERNEL}))
    values = activation_values(model, find_sites(model).sites, find_carriers(model))
    assert sorted(values) == ["a", "b", "s", "x", "y"]
