"""Sizes: predicted bytes are the bytes that are written."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.arithmetic import ARITHMETICS
from intaglio.ops.emit import Spec
from intaglio.ops.form import CARRIED, UNCHANGED, Form
from intaglio.passes.load import load
from intaglio.passes.model import Model
from intaglio.passes.price import SizePricer, noise, packed_noise, skeleton
from intaglio.passes.save import save, serialized_size
from intaglio.passes.sites import Sites, find_sites
from tests.models import CASES, compress, forms_of, mocked, narrow_forms, normal, parse, site_of
from tests.passes.test_sites import nested

VARINT_BYTES = 5
"""The lengths of the graph and of the model are each written in at most five bytes; everything else is priced exactly."""


def network(ir_version: int, opset: int) -> onnx.ModelProto:
    """Weights below and above the size from which payloads are left out of a skeleton, of several operators."""
    text = """g (float[N, 6, 8, 8] x) => (float[N, 33] y) {
        a = Conv <pads = [1, 1, 1, 1]> (x, c1, b1)
        r = Relu (a)
        b = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (r, c2)
        f = Flatten (b)
        h = Gemm <transB = 1> (f, g1, b2)
        i = MatMul (h, m1)
        y = MatMul (i, m1t)
    }"""
    weights = {
        "c1": normal(1, 16, 6, 3, 3),
        "b1": normal(2, 16),
        "c2": normal(3, 8, 16, 3, 3),
        "g1": normal(4, 40, 128),
        "b2": normal(5, 40),
        "m1": normal(6, 40, 33),
        "m1t": normal(7, 33, 33),
    }
    return parse(text, weights, opset=opset, ir_version=ir_version)


@cache
def opened(ir_version: int) -> tuple[Model, Sites, dict[str, list[Form]]]:
    model = load(network(ir_version, 8 if ir_version < 8 else 18))
    sites = find_sites(model)
    return model, sites, {site.name: [UNCHANGED, *forms_of(site)] for site in sites}


def written(model: Model, folder: Path, external: bool | None = None) -> int:
    path = folder / "model.onnx"
    return save(model, path, source=None, external=external)


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("ir_version", [3, 7, 8])
def test_predicted_bytes_are_the_bytes_on_disk(ir_version: int, external: bool, tmp_path: Path) -> None:
    model, _, forms = opened(ir_version)
    pricer = SizePricer(model, external=external)
    assert pricer.base_bytes == written(model, tmp_path, external)
    for number in range(3):
        plan = {name: options[(7 * number + 3 * i) % len(options)] for i, (name, options) in enumerate(forms.items())}
        compressed, _ = compress(model, plan)
        assert pricer.total(plan) == written(compressed, tmp_path, external), plan


def plans(ir_version: int) -> st.SearchStrategy[dict[str, Form]]:
    return st.fixed_dictionaries({name: st.sampled_from(options) for name, options in opened(ir_version)[2].items()})


@settings(max_examples=40)
@given(st.data(), st.sampled_from([3, 8]), st.booleans())
def test_random_plans_are_priced_to_the_byte(data: st.DataObject, ir_version: int, external: bool) -> None:
    """The total is exact; the sum of what the solver adds up is exact but for the varint lengths of graph and model."""
    model, sites, _ = opened(ir_version)
    plan = data.draw(plans(ir_version))
    pricer = SizePricer(model, external=external)
    total = pricer.total(plan)
    assert total == serialized_size(mocked(model, plan), external)
    prices = [pricer.price(site, plan[site.name]) for site in sites]
    shared = {name for price in prices for name in price.shared}
    added = pricer.base_bytes + sum(price.size_bytes for price in prices) + sum(pricer.shared[name] for name in shared)
    slack = VARINT_BYTES if not external else VARINT_BYTES + _external_slack(len(sites))
    assert abs(added - total) <= slack


def _external_slack(sites: int) -> int:
    """An external tensor costs alignment and a reference where an embedded one costs none: bounded per array, at most 3 a site."""
    return 3 * sites * (64 + 128)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.sites])
def test_every_form_of_every_family_is_priced_to_the_byte(name: str, tmp_path: Path) -> None:
    model = load(CASES[name].proto())
    pricer = SizePricer(model, external=False)
    for site in find_sites(model):
        for form in forms_of(site):
            compressed = mocked(model, {site.name: form})
            size = written(compressed, tmp_path)
            assert pricer.total({site.name: form}) == size, form
            price = pricer.price(site, form)
            own = pricer.base_bytes + price.size_bytes + sum(pricer.shared[part] for part in price.shared)
            assert abs(own - size) <= VARINT_BYTES, form


@pytest.mark.parametrize("name", ["matmul", "gemm", "conv2d", "conv2d_groups", "gather"])
@pytest.mark.parametrize("ir_version", [7, 9])
def test_narrow_arithmetics_are_priced_to_the_byte(name: str, ir_version: int, tmp_path: Path) -> None:
    """Of a form that couples activations, the price leaves out what lies around the operator; the total does not."""
    model = load(CASES[name].proto(ir_version=ir_version))
    (site,) = find_sites(model)
    pricer = SizePricer(model, external=False)
    found = narrow_forms(site)
    assert found
    for form in found:
        size = written(mocked(model, {site.name: form}), tmp_path)
        assert pricer.total({site.name: form}) == size, form
        if not ARITHMETICS[form.arithmetic].coupled:
            price = pricer.price(site, form)
            own = pricer.base_bytes + price.size_bytes + sum(pricer.shared[part] for part in price.shared)
            assert abs(own - size) <= VARINT_BYTES, form


@pytest.mark.parametrize("ir_version", [7, 9])
def test_weights_that_one_operator_reads_as_integers_are_priced_to_the_byte_together(ir_version: int, tmp_path: Path) -> None:
    model = load(CASES["lstm"].proto(ir_version=ir_version))
    sites = find_sites(model)
    pricer = SizePricer(model, external=False)
    found = {site.name: [form for form in narrow_forms(site) if form.arithmetic == "dynamic"] for site in sites}
    assert {form.execution for form in found["w"]} == {"dense", "contract"}
    assert {form.execution for form in found["r"]} == {"dense"}
    overlap_bytes = pricer.overlap_bytes(dict.fromkeys(("w", "r"), Form("dense", (), "int8", "dense", "dynamic")))
    for number, form in enumerate(found["w"]):
        forms = {"w": form, "r": found["r"][number % len(found["r"])]}
        size = written(mocked(model, forms), tmp_path)
        assert pricer.total(forms) == size, forms
        prices = [pricer.price(site, forms[site.name]) for site in sites]
        shared = {name for price in prices for name in price.shared}
        own = pricer.base_bytes + sum(price.size_bytes for price in prices) + sum(pricer.shared[name] for name in shared) - overlap_bytes
        assert abs(own - size) <= 2 * VARINT_BYTES, forms


def test_a_pair_of_quantizers_is_priced_about_right() -> None:
    """Only names are not known in advance: one of them is a little longer for every pair."""
    text = "g (float[N, 8, 6, 6] x) => (float[N, 8, 6, 6] y) { y = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x) }"
    model = load(parse(text))
    pricer = SizePricer(model, external=False)
    added = pricer.total({"y": CARRIED}) - pricer.base_bytes
    assert abs(added - pricer.pair_bytes("x") - pricer.pair_bytes("y")) <= 128


def test_nested_and_tied_weights_are_priced_to_the_byte(tmp_path: Path) -> None:
    tied = "g (int64[N, S] x) => (float[N, S, 40] y) { e = Gather (w, x) t = Transpose (w) y = MatMul (e, t) }"
    for proto in (nested(), parse(tied, {"w": normal(1, 40, 16)})):
        model = load(proto)
        pricer = SizePricer(model, external=False)
        for site in find_sites(model):
            for form in forms_of(site):
                assert pricer.total({site.name: form}) == written(mocked(model, {site.name: form}), tmp_path), form


def test_unchanged_costs_nothing() -> None:
    model, site = site_of(CASES["conv2d"].proto())
    price = SizePricer(model, external=False).price(site, UNCHANGED)
    assert (price.size_bytes, price.shared) == (0, ())


def test_weight_bytes_count_payloads() -> None:
    model, site = site_of(CASES["gemm"].proto())
    pricer = SizePricer(model, external=False)
    assert pricer.weight_bytes(site, UNCHANGED) == 4 * 16 * 24
    assert pricer.weight_bytes(site, Form("dense", (), "int8")) == 16 * 24 + 2 * 24
    assert pricer.weight_bytes(site, Form("dense", (), "int4")) == 16 * 24 // 2 + 2 * 24
    assert pricer.weight_bytes(site, Form("lowrank", (4,), "fp16", "contract")) == 2 * 4 * (16 + 24)


def test_a_skeleton_has_the_size_of_the_model_and_none_of_its_payload() -> None:
    model = load(network(8, 18))
    before = model.proto.SerializeToString(deterministic=True)
    light = skeleton(model)
    assert serialized_size(light, False) == len(before)
    assert light.proto.ByteSize() < len(before) / 2
    assert model.proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
def test_noise_is_spread_over_bytes_like_quantized_weights(dtype: type[np.integer[Any]]) -> None:
    codes = noise(Spec((64, 64), np.dtype(dtype)), np.random.default_rng(0))
    centred = codes.astype(int) - (128 if dtype is np.uint8 else 0)
    assert codes.dtype == dtype
    assert abs(centred.mean()) < 2
    assert 28 < centred.std() < 36
    assert np.abs(centred).max() <= 127


def test_other_noise() -> None:
    rng = np.random.default_rng(0)
    assert not noise(Spec((8,), np.dtype(np.int64)), rng).any()
    assert 0.05 < noise(Spec((64, 100), np.dtype(np.float32)), rng).std() < 0.2


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_codes_and_scales_of_noise_decode_to_something_like_weights(dtype: type[np.floating[Any]]) -> None:
    rng = np.random.default_rng(0)
    codes, scales = packed_noise((Spec((100, 64), np.dtype(np.int8)), Spec((64,), np.dtype(dtype))), rng)
    assert codes.dtype == np.int8
    assert scales.dtype == dtype
    assert 0.05 < (codes * scales.astype(np.float32)).std() < 0.2
    (dense,) = packed_noise((Spec((64, 100), np.dtype(dtype)),), rng)
    assert 0.05 < dense.astype(np.float32).std() < 0.2
