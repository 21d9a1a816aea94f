"""Linear terms of a site's forms: what the gradient says of them, and how far it counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from intaglio.ops.decompositions import DECOMPOSITIONS
from intaglio.ops.decompositions.lowrank import factorize
from intaglio.ops.form import UNCHANGED, Form
from intaglio.ops.moment import Moment
from intaglio.ops.storage import STORAGES
from intaglio.passes.fit import importance
from intaglio.passes.linear import MOST_GAIN, JointFinding, joint_finding
from intaglio.passes.propose import Allowed, propose
from intaglio.passes.recall import Finding
from intaglio.passes.rewrite import array_specs
from intaglio.passes.sensitivity import Curve, Sensitivity
from intaglio.passes.sites import Site
from tests.models import Array, site_of
from tests.passes.labelled import SIDE, TRUE_RANK, harmed, parts

DIVERGENCE = Curve(((0.5, 0.5),))
"""A unit of error is a unit of divergence."""

LOW, NARROW = Form("lowrank", (TRUE_RANK,)), Form("dense", (), "int4")


def site() -> tuple[Site, Array]:
    """The harmed weight's site, and its value."""
    model, found = site_of(harmed(4)[0])
    return found, np.asarray(found.value(model))


def joint(gradients: Array, curve: Curve = DIVERGENCE) -> JointFinding:
    """Linear terms of a few forms for given folds of gradients, in the metric of the identity."""
    where, value = site()
    moment = Moment(np.eye(SIDE)[None], 1000)
    allowed = Allowed(("dense", "lowrank"), ("float", "int4"), arithmetics=("float",))
    finding = Finding(propose(where, value, moment, allowed)[0], Sensitivity(curve, curve))
    return joint_finding(where, value, moment, finding, gradients)


def pulled(strength: float) -> Array:
    """Two equal folds of a gradient along the harmful component, (folds, 1, SIDE, SIDE)."""
    _, harmful = parts()
    return np.repeat(strength * (harmful / np.square(harmful).sum())[None, None], 2, axis=0)


def test_terms_are_inner_products_with_what_changes() -> None:
    rng = np.random.default_rng(1)
    gradients = np.repeat(1e-4 * rng.standard_normal((1, 1, SIDE, SIDE)), 2, axis=0)  # weak, so that no cap applies
    found = joint(gradients)
    where, value = site()
    weight, moment = where.matrix(value), Moment(np.eye(SIDE)[None], 1000)
    if found.slope is not None:
        moment = moment.with_slope(found.slope.astype(np.float64))
    first, last = factorize(weight, moment, TRUE_RANK)
    low = float((gradients[0] * (last @ first - weight)).sum())
    assert found.linear[LOW] == pytest.approx(low, abs=1e-9)  # float64 throughout; the slope was kept in float32
    storage = STORAGES["int4"]
    ((spec, axis),) = array_specs(where, NARROW)
    decoded = storage.decode(storage.encode(value, axis, importance(where, Moment(np.eye(SIDE)[None], 1000))), spec)
    rounded = float((gradients[0] * (where.matrix(decoded) - weight)).sum())
    assert found.linear[NARROW] == pytest.approx(rounded, rel=1e-6)
    assert found.linear[replace(LOW, storage="int4")] == pytest.approx(low + rounded, rel=1e-6)  # a product adds both up
    assert UNCHANGED not in found.linear


def test_a_component_that_harms_is_left_out_though_it_has_energy() -> None:
    true, _ = parts()
    found = joint(pulled(1.0))
    assert found.slope is not None
    where, value = site()
    moment = Moment(np.eye(SIDE)[None], 1000).with_slope(found.slope.astype(np.float64))
    first, last = DECOMPOSITIONS["lowrank", "dense"].fit(where.matrix(value), moment, where.use, (TRUE_RANK,))
    assert last @ first == pytest.approx(true, abs=1e-4)  # float32 weights and slope
    lost = float(np.square(parts()[1]).sum() / np.square(value).sum())
    truncation = next(p.truncation for p in found.finding.proposals if p.form == LOW)
    assert truncation == pytest.approx(lost, rel=1e-4)


def test_energy_decides_where_labels_say_nothing_sure() -> None:
    against = pulled(1.0)
    against[1] *= -1
    found = joint(against)
    assert found.slope is None
    assert found.linear[LOW] == 0.0
    assert found.agreement == 0.0


def test_a_gain_is_worth_little_more_than_its_divergence() -> None:
    found = joint(pulled(100.0))
    for proposal in found.finding.proposals:
        if proposal.form == UNCHANGED:
            continue
        divergence = found.finding.curves.truncation(proposal.truncation) + found.finding.curves.rounding(proposal.rounding)
        assert found.linear[proposal.form] >= -MOST_GAIN * divergence * (1 + 1e-12)  # one rounding
    truncation = next(p.truncation for p in found.finding.proposals if p.form == LOW)
    assert found.linear[LOW] == pytest.approx(-MOST_GAIN * truncation)


def test_harm_is_not_capped() -> None:
    found = joint(pulled(-100.0))
    assert found.slope is None or found.linear[LOW] >= 0.0
    assert found.agreement == pytest.approx(1.0)


def test_a_flat_curve_leaves_the_order_alone() -> None:
    assert joint(pulled(1.0), Curve(())).slope is not None  # an empty curve is the error itself
    assert joint(pulled(1.0), Curve(((0.5, float("inf")),))).slope is None
