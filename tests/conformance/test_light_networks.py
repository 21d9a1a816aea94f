"""The nine networks that ship with ONNX (`light_*`): all of their weights are rewritten at once.

As shipped, their nodes generate every weight as 0.02, and nearly every expected output is a uniform 0.001, which little could
disturb. So the networks also run with seeded random weights and without its last Softmax, against themselves before the rewrite. The
sites take turns with the forms, one form per site and run. Nothing here goes through calibration: the metric is the identity.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.backend.test.runner import Runner

from intaglio.ops.form import Form
from intaglio.ops.moment import Moment
from intaglio.passes.fit import pack
from intaglio.passes.load import load
from intaglio.passes.model import Model
from intaglio.passes.sites import Site, find_sites
from tests.conformance.backend import (
    Array,
    BackendTest,
    Tally,
    check_close,
    full_rank_forms,
    read_tensor,
    rewritten,
    run,
    with_weights,
)

FLOORS = {
    "test_bvlc_alexnet": 5,
    "test_densenet121": 121,
    "test_inception_v1": 49,
    "test_inception_v2": 51,
    "test_resnet50": 29,
    "test_shufflenet": 50,
    "test_squeezenet": 26,
    "test_vgg19": 8,
    "test_zfnet512": 5,
}
"""Network → fewest sites."""

HEAVY = ("test_vgg19", "test_zfnet512")
"""Networks that run as shipped only: copying their 600 and 350 MB takes longer than all the rest."""

LARGE = 150_000
"""Weights with more entries are sampled: the first `SAMPLE` of each network that have at most `HUGE` entries."""

SAMPLE = 4
HUGE = 2_500_000

ITERATED = 20_000
"""Up to so many entries a site also takes its turn with the decompositions that are fitted by alternating least squares."""

DEPTH_ROUNDING = 1024
"""Units of rounding that a hundred layers may add up to."""

THREADS = 2


@cache
def _networks() -> dict[str, BackendTest]:
    """By name, with the inputs that ONNX's own runner feeds them."""
    found = {}
    for case in load_model_tests(kind="real"):
        path = Path(onnx.__file__).parent.parent / case.url
        proto = onnx.load(path)
        constants = {tensor.name for tensor in proto.graph.initializer}
        feed = {value.name: Runner.generate_dummy_data(value) for value in proto.graph.input if value.name not in constants}
        expected = read_tensor(path.with_name(f"{path.stem}_output_0.pb"))
        found[case.name] = BackendTest(case.name, proto, feed, (expected,), case.rtol, case.atol)
    return found


def _generated(proto: ModelProto) -> dict[str, Array]:
    """Name → value of everything that a `ConstantOfShape` node generates."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    nodes = [node for node in proto.graph.node if node.op_type == "ConstantOfShape"]
    return {node.output[0]: np.full(stored[node.input[0]], numpy_helper.to_array(node.attribute[0].t)) for node in nodes}


def _random(array: Array, generator: np.random.Generator) -> Array:
    """Weights that keep the scale of what passes through them; vectors (scales, variances, biases) around one."""
    if array.ndim < 2:
        return generator.uniform(0.5, 1.5, array.shape).astype(array.dtype)
    inputs = array.size // next(size for size in array.shape if size > 1)
    return generator.standard_normal(array.shape, array.dtype) * array.dtype.type((2 / inputs) ** 0.5)


def _with_initializers(proto: ModelProto, weights: dict[str, Array]) -> ModelProto:
    """`with_weights`, listed as inputs too, as these models' IR version 3 wants it."""
    result = with_weights(proto, weights)
    for name, array in weights.items():
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        result.graph.input.append(helper.make_tensor_value_info(name, kind, array.shape))
    return result


@pytest.mark.parametrize("name", FLOORS)
def test_as_shipped_yields_the_expected_output(name: str, tallies: defaultdict[str, Tally]) -> None:
    test, tally = _networks()[name], tallies[name]
    model = load(_with_initializers(test.proto, _generated(test.proto)))
    sites = _sites(model, tally)
    tally.models += 1
    tally.sites += len(sites)
    assert len(sites) >= FLOORS[name]
    proto, _ = _rewrite(model, [(site, _full_rank(site, turn)) for turn, site in enumerate(sites)], tally)
    for optimize in (False, True):
        test.check(run(model, proto, test.feed, optimize=optimize, threads=THREADS))


@pytest.mark.parametrize("name", [name for name in FLOORS if name not in HEAVY])
def test_random_weights_yield_what_they_did(name: str, tallies: defaultdict[str, Tally]) -> None:
    test, tally, generator = _networks()[name], tallies[name], np.random.default_rng(0)
    weights = {value: _random(array, generator) for value, array in _generated(test.proto).items()}
    model = load(_without_softmax(_with_initializers(test.proto, weights)))
    sites = _sites(model, tally)
    reference = run(model, model.proto, test.feed, optimize=False, threads=THREADS)
    full_rank = [(site, _full_rank(site, turn + 1)) for turn, site in enumerate(sites)]
    narrow = [(site, Form("dense", (), ("fp16", "int8", "int4")[turn % 3])) for turn, site in enumerate(sites)]
    for choices in (full_rank, narrow):
        proto, decoded = _rewrite(model, choices, tally)
        if choices is narrow:
            reference = run(model, with_weights(model.proto, decoded), test.feed, optimize=False, threads=THREADS)
        for optimize in (False, True):
            check_close(run(model, proto, test.feed, optimize=optimize, threads=THREADS), reference, DEPTH_ROUNDING)


def _without_softmax(proto: ModelProto) -> ModelProto:
    """The logits as outputs: a Softmax of large ones would hide all but one."""
    for node in proto.graph.node:
        if node.op_type == "Softmax":
            node.op_type = "Identity"
            del node.attribute[:]
    return proto


def _sites(model: Model, tally: Tally) -> list[Site]:
    """All but the large ones, and a few of those."""
    found = find_sites(model)
    large = [site for site in found if site.elements > LARGE]
    left = set(large) - set([site for site in large if site.elements <= HUGE][:SAMPLE])
    for skip in found.skipped:
        tally.skip("weight", skip.reason)
    for _ in left:
        tally.skip("weight", "large, and not in the sample")
    return [site for site in found if site not in left]


def _full_rank(site: Site, turn: int) -> Form:
    """A full-rank form in the model's own type: another one with every turn."""
    forms, _ = full_rank_forms(site, ("float",))
    if site.elements > ITERATED:
        forms = [form for form in forms if form.decomposition in ("dense", "lowrank", "channel_svd")]
    decomposed = [form for form in forms if form.decomposition != "dense"]
    return (decomposed or forms)[turn % len(decomposed or forms)]


def _rewrite(model: Model, choices: Sequence[tuple[Site, Form]], tally: Tally) -> tuple[ModelProto, dict[str, Array]]:
    """The rewritten model, and the weights that its forms stand for."""
    packed, decoded = [], {}
    for site, form in choices:
        moment = Moment.isotropic(site.use.view.groups, site.use.view.n)
        arrays, matrix = pack(site, form, site.value(model), moment)
        packed.append((site, form, arrays))
        decoded[site.anchor] = site.stored(matrix)
        tally.count(form)
    return rewritten(model, packed), decoded
