"""Proposals: which forms a site is offered, and how well their predicted errors match what fitting gives."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from intaglio.ops.form import UNCHANGED, Form
from intaglio.ops.moment import Moment, relative_error
from intaglio.ops.storage import STORAGES, is_tabular
from intaglio.ops.storage.codebook import Codebook
from intaglio.ops.storage.sparse import Sparse
from intaglio.ops.storage.vector import Vectors
from intaglio.passes.fit import pack
from intaglio.passes.load import load
from intaglio.passes.propose import _GAIN_STORAGES, WORST_ERROR, Allowed, expands, propose
from intaglio.passes.rewrite import declines
from intaglio.passes.sites import find_sites
from tests.models import CASES, moments, normal, parse, site_of


def smooth(*shape: int) -> np.ndarray:
    """A weight whose spectrum falls, as trained ones do."""
    flat = normal(1, shape[0], int(np.prod(shape[1:]))).astype(np.float64)
    u, s, v = np.linalg.svd(flat, full_matrices=False)
    return np.asarray(((u * np.geomspace(1, 0.01, len(s))) @ v).reshape(shape), np.float32)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.sites])
def test_every_proposal_can_be_made_and_unchanged_comes_first(name: str) -> None:
    case = CASES[name]
    model = load(case.proto())
    sites = find_sites(model)
    known = moments(model, sites, case.data())
    for site in sites:
        proposals, _ = propose(site, site.value(model), known[site.name], Allowed())
        assert proposals[0].form == UNCHANGED
        assert len({p.form for p in proposals}) == len(proposals)
        assert any(p.form.decomposition == "dense" for p in proposals)
        for proposal in proposals[1:]:
            assert declines(site, proposal.form) is None
            assert 0 <= proposal.truncation + proposal.rounding <= WORST_ERROR


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("g (float[N, 48] x) => (float[N, 64] y) { y = MatMul (x, w) }", smooth(48, 64)),
        ("g (float[N, 16, 6, 6] x) => (float[N, 32, 6, 6] y) { y = Conv <pads = [1, 1, 1, 1]> (x, w) }", smooth(32, 16, 3, 3)),
    ],
)
def test_predicted_errors_are_what_fitting_gives(text: str, weight: np.ndarray) -> None:
    """Truncation from spectra alone: exact for low rank up to the ridge of the fit, an upper bound where the fit alternates.

    Rounding of factors is known at one rank and taken for all: within a factor of three. Codebooks are an exception: the few groups of a
    small factor lie closer to their codewords than those of the weight that the prediction comes from. So are storages that drop entries:
    factors of a smooth weight have more small ones.
    """
    model, site = site_of(parse(text, {"w": weight}))
    n = site.use.view.n
    root = np.random.default_rng(0).standard_normal((1, n, 3 * n))
    moment = Moment(root @ root.transpose(0, 2, 1) / (3 * n), 3 * n)
    value = site.value(model)
    proposals, _ = propose(site, value, moment, Allowed())
    for proposal in proposals[1::3]:
        measured = relative_error(site.matrix(value), pack(site, proposal.form, value, moment)[1], moment)
        predicted = proposal.truncation + proposal.rounding
        if proposal.form.decomposition in ("dense", "lowrank", "channel_svd") and proposal.form.storage in ("float", "int8", "fp16"):
            assert measured == pytest.approx(predicted, rel=0.1, abs=1e-6), proposal
        elif proposal.form.storage == "float":
            assert measured <= 1.02 * predicted, proposal
        elif isinstance(STORAGES[proposal.form.storage], (Codebook, Sparse, Vectors)):
            assert measured <= 3 * predicted + 1e-6, proposal
        else:
            assert predicted / 3 <= measured <= 3 * predicted + 1e-6, proposal


def test_every_table_has_a_storage_that_its_gain_is_measured_in() -> None:
    tables = {name: storage for name, storage in STORAGES.items() if is_tabular(storage)}
    assert _GAIN_STORAGES.keys() == tables.keys()
    for name, stand_in in _GAIN_STORAGES.items():
        one, other = (tables[each].runs((64, 64), 0).layout for each in (name, stand_in))
        assert one == other


@pytest.mark.parametrize("storage", ["sparse50-int1", "sparse50-int3", "sparse75-int2", "int2", "int2-b32-asym", "ternary"])
def test_errors_of_few_codes_are_predicted_with_what_compensation_does_to_each(storage: str) -> None:
    """Channels count more or less, inputs are correlated; gains are measured on some outputs, so prices are right within a quarter."""
    model, site = site_of(parse("g (float[N, 96] x) => (float[N, 160] y) { y = MatMul (x, w) }", {"w": normal(1, 96, 160)}))
    rng = np.random.default_rng(0)
    root = rng.standard_normal((1, 96, 60)) * np.geomspace(1, 10, 96)[:, None]
    moment = Moment(root @ root.transpose(0, 2, 1) / 60, 60)
    value = site.value(model)
    (form,) = (
        p for p in propose(site, value, moment, Allowed(("dense",), (storage,), arithmetics=("float",)))[0] if p.form.storage == storage
    )
    measured = relative_error(site.matrix(value), pack(site, form.form, value, moment)[1], moment)
    assert measured == pytest.approx(form.rounding, rel=0.25)


def test_truncation_falls_with_the_rank_and_rounding_with_the_bits() -> None:
    model, site = site_of(parse("g (float[N, 64] x) => (float[N, 64] y) { y = MatMul (x, w) }", {"w": smooth(64, 64)}))
    proposals, _ = propose(site, site.value(model), Moment.isotropic(1, 64), Allowed())
    ranked = sorted((p.form.ranks, p.truncation) for p in proposals if p.form.storage == "float" and p.form.execution == "contract")
    assert len(ranked) > 2
    assert all(a > b for (_, a), (_, b) in pairwise(ranked))
    dense = {p.form.storage: p.rounding for p in proposals if p.form.decomposition == "dense"}
    assert dense["fp16"] < dense["int8"] < dense["int4"]


@pytest.mark.parametrize(
    "allowed",
    [
        Allowed(decompositions=("dense",)),
        Allowed(decompositions=("lowrank",)),
        Allowed(storages=("int8",)),
        Allowed(executions=("dense",)),
        Allowed(decompositions=("lowrank",), storages=("float",), executions=("contract",)),
        Allowed(decompositions=()),
    ],
)
def test_only_what_is_allowed_is_proposed(allowed: Allowed) -> None:
    model, site = site_of(parse("g (float[N, 64] x) => (float[N, 64] y) { y = MatMul (x, w) }", {"w": smooth(64, 64)}))
    proposals, _ = propose(site, site.value(model), Moment.isotropic(1, 64), allowed)
    for proposal in proposals[1:]:
        assert proposal.form.decomposition in allowed.decompositions
        assert proposal.form.storage in allowed.storages
        assert proposal.form.execution in allowed.executions
    every, _ = propose(site, site.value(model), Moment.isotropic(1, 64), Allowed())
    assert len(proposals) < len(every)
    assert len(proposals) == (1 if not allowed.decompositions else len(proposals))


def test_kinds_of_forms_that_do_not_apply_are_named_with_their_reason() -> None:
    model, site = site_of(CASES["lstm"].proto(), "r")
    _, reasons = propose(site, site.value(model), Moment.isotropic(2, 8), Allowed())
    assert "lowrank/contract: the recurrent weight is applied inside the operator" in reasons
    assert "tucker2/contract: not a convolution kernel" in reasons
    model, site = site_of(parse("g (float[N, 17] x) => (float[N, 33] y) { y = MatMul (x, w) }", {"w": normal(1, 17, 33)}))
    _, reasons = propose(site, site.value(model), Moment.isotropic(1, 17), Allowed())
    assert "int4-native: needs opset 21, the model has 18" in reasons


def test_a_weight_of_zeros_is_offered_exact_forms() -> None:
    model, site = site_of(parse("g (float[N, 32] x) => (float[N, 32] y) { y = MatMul (x, w) }", {"w": np.zeros((32, 32), np.float32)}))
    proposals, _ = propose(site, site.value(model), Moment.isotropic(1, 32), Allowed())
    assert all(p.truncation + p.rounding == 0 for p in proposals)


def test_a_branch_races_where_it_cannot_be_folded_into_its_base() -> None:
    """MatMulNBits takes no product of factors; floats and bytes do."""
    model, site = site_of(parse("g (float[N, 128] x) => (float[N, 256] y) { y = MatMul (x, w) }", {"w": smooth(128, 256)}))
    proposals, _ = propose(site, site.value(model), Moment.isotropic(1, 128), Allowed())
    beside = [p.form for p in proposals if p.form.decomposition == "residual" and p.form.execution == "contract"]
    assert {(form.ranks, form.arithmetic) for form in beside} == {((8,), "nbits")}
    assert {form.storage for form in beside} == {p.form.storage for p in proposals if p.form.arithmetic == "nbits"}
    assert {p.form.arithmetic for p in proposals if p.form.decomposition == "residual"} >= {"float", "dynamic", "integer"}
    assert all(declines(site, Form("residual", (8,), "int4", "contract", name)) is None for name in ("float", "dynamic", "integer"))


def test_a_branch_leaves_its_base_packed() -> None:
    """So it takes part where nothing may expand."""
    model, site = site_of(parse("g (float[N, 128] x) => (float[N, 256] y) { y = MatMul (x, w) }", {"w": smooth(128, 256)}))
    proposals, _ = propose(site, site.value(model), Moment.isotropic(1, 128), Allowed(expand=False))
    assert Form("residual", (8,), "nbits4-b32", "contract", "nbits") in [p.form for p in proposals]
    assert not expands(Form("residual", (8,), "nbits4-b32", "contract", "nbits"))
    assert expands(Form("residual", (8,), "int4", "dense"))
    assert expands(Form("residual", (8,), "int4", "contract"))


@pytest.mark.parametrize("spikes", [0, 3])
def test_what_a_correction_leaves_of_rounding_is_known_at_every_rank(spikes: int) -> None:
    """Within a tenth where a weight has no large directions. A base that is spared some has finer steps: then the price is a bound."""
    left, right = (np.random.default_rng(seed).standard_normal(shape) for seed, shape in ((1, (256, 3)), (2, (3, 384))))
    weight = (normal(3, 256, 384) + spikes * left @ right).astype(np.float32)
    model, site = site_of(parse("g (float[N, 256] x) => (float[N, 384] y) { y = MatMul (x, w) }", {"w": weight}))
    root = np.random.default_rng(0).standard_normal((1, 256, 512)) * np.geomspace(1, 0.05, 256)[:, None]
    moment = Moment(root @ root.transpose(0, 2, 1) / 512, 512)
    proposals, _ = propose(site, site.value(model), moment, Allowed(storages=("int4", "nbits4-b32", "nbits4-b128")))
    prices = {p.form: p.truncation + p.rounding for p in proposals}
    alone = prices[Form("dense", (), "nbits4-b32", "dense", "nbits")]
    before = alone
    for form in [Form("residual", (rank,), "nbits4-b32", "contract", "nbits") for rank in (8, 16)]:
        measured = relative_error(site.matrix(site.value(model)), pack(site, form, site.value(model), moment)[1], moment)
        assert prices[form] < before
        before = prices[form]
        assert measured <= 1.1 * prices[form]
        assert spikes or measured >= 0.8 * prices[form]
