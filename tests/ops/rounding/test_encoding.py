"""Encoding in a metric, through storages."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from intaglio.ops.emit import Spec
from intaglio.ops.moment import Moment, OutputMetric
from intaglio.ops.rounding import Problem, Rounding, compensates, encode, feedback
from intaglio.ops.storage import STORAGES, Grid
from intaglio.ops.view import MatrixView
from tests.ops.running import Array, moment_of, normal

SUMS = 1 + 1e-12
"""The two errors that are compared are summed in double precision, here in another order."""

TABLES = ("kmeans4", "kmeans2", "vq2x8", "vq4x8", "vq2x4", "vq4x4")

LAYOUTS = {
    "outputs first": (MatrixView((6, 20), 1, 6, 20, True), 0),
    "inputs first": (MatrixView((20, 6), 1, 6, 20, False), 1),
    "kernel": (MatrixView((6, 5, 2, 2), 1, 6, 20, True), 0),
    "groups": (MatrixView((6, 5, 2, 2), 3, 2, 20, True), 0),
    "scales on another axis": (MatrixView((6, 5, 2, 2), 1, 6, 20, True), 1),
}


def problem(layout: str, seed: int, moment: Moment | None = None, dtype: str = "float32") -> Problem:
    view, axis = LAYOUTS[layout]
    known = moment_of(seed, view.groups, view.n) if moment is None else moment
    importance = view.stored(np.broadcast_to(known.diag[:, None, :], (view.groups, view.m, view.n)).copy())
    return Problem(normal(seed, *view.shape).astype(dtype), axis, view, known, importance)


def error(name: str, task: Problem, packed: tuple[Array, ...]) -> float:
    decoded = STORAGES[name].decode(packed, Spec(task.array.shape, task.array.dtype))
    return task.moment.energy(task.reading.matrix(task.array), task.reading.matrix(decoded))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(
        ["int8", "int4", "int3", "int2", "ternary", "int4-asym", "int3-b32", "int4-pow2", "int2-b32-dq", "fp16", "sparse50-int3", *TABLES]
    ),
    st.sampled_from(["float32", "float16", "float64"]),
    st.integers(0, 2**16),
)
def test_it_never_loses_against_rounding_to_nearest(layout: str, name: str, dtype: str, seed: int) -> None:
    """In the metric, for any layout, partition, scale format and type; and what it packs has the storage's layout."""
    task, storage = problem(layout, seed, dtype=dtype), STORAGES[name]
    found, plain = (encode(storage, task, Rounding(compensate)) for compensate in (True, False))
    assert error(name, task, found) <= error(name, task, plain) * SUMS
    specs = storage.layout(Spec(task.array.shape, task.array.dtype), task.axis)
    assert [(a.shape, a.dtype) for a in found] == [(spec.shape, spec.dtype) for spec in specs]


@pytest.mark.parametrize("name", ["int3", "kmeans3", "vq2x4", "vq4x4"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_it_wins_where_inputs_are_correlated(layout: str, name: str) -> None:
    """Over some weights at least a tenth of the error goes, however the weight lies; but for runs of several outputs."""
    tasks, storage = [problem(layout, seed) for seed in range(4)], STORAGES[name]
    found, plain = (sum(error(name, task, encode(storage, task, Rounding(each))) for task in tasks) for each in (True, False))
    if layout == "scales on another axis" and name.startswith("vq"):
        assert not compensates(storage, tasks[0])
        assert found == plain
    else:
        assert compensates(storage, tasks[0])
        assert found < 0.9 * plain


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(TABLES), st.sampled_from(sorted(LAYOUTS)), st.sampled_from(["float32", "float16"]), st.integers(0, 2**16))
def test_levels_ascend_and_no_decoded_value_overflows(name: str, layout: str, dtype: str, seed: int) -> None:
    """Weights next to the end of their type, whose refitted centroids may not leave it; tuning searches levels in order."""
    task = problem(layout, seed, dtype=dtype)
    share = task.array / np.abs(task.array).max()
    task = replace(task, array=(share * np.finfo(dtype).max).astype(dtype))
    with np.errstate(over="ignore", invalid="ignore"):  # errors of float32's largest values overflow, which decides for the nearest
        packed = encode(STORAGES[name], task, Rounding())
    assert np.isfinite(STORAGES[name].decode(packed, Spec(task.array.shape, task.array.dtype))).all()
    if packed[1].ndim == 1:
        assert (np.diff(packed[1].astype(np.float32)) >= 0).all()


def test_a_brief_codebook_is_between_nearest_and_thorough() -> None:
    tasks = [problem("outputs first", seed) for seed in range(8)]
    ways = (Rounding(compensate=False), Rounding(thorough=False), Rounding())
    plain, brief, thorough = (sum(error("kmeans2", task, encode(STORAGES["kmeans2"], task, way)) for task in tasks) for way in ways)
    assert thorough < brief < plain


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sparse_weights_win_too(layout: str) -> None:
    """What is dropped is made up for, with a metric of outputs as well; as many entries stay as may."""
    found = plain = 0.0
    for seed in range(4):
        task, storage = problem(layout, seed), STORAGES["sparse50-int3"]
        costs = np.random.default_rng(seed).uniform(0.1, 10, task.reading.matrix(task.array).shape[:2])
        task = replace(task, moment=task.moment.with_outputs(OutputMetric(costs)))
        packed = encode(storage, task, Rounding())
        assert np.count_nonzero(storage.decode(packed, Spec(task.array.shape, task.array.dtype))) == task.array.size / 2
        found += error("sparse50-int3", task, packed)
        plain += error("sparse50-int3", task, encode(storage, task, Rounding(compensate=False)))
    assert found < 0.8 * plain


def test_layouts_of_the_same_weight_get_the_same_values() -> None:
    weight, moment = normal(1, 6, 20), moment_of(2, 1, 20)
    across = Problem(weight, 0, LAYOUTS["outputs first"][0], moment, moment.diag)
    along = Problem(weight.T.copy(), 1, LAYOUTS["inputs first"][0], moment, moment.diag.T)
    one, other = (
        STORAGES["int4"].decode(encode(STORAGES["int4"], each, Rounding()), Spec(each.array.shape, each.array.dtype))
        for each in (across, along)
    )
    np.testing.assert_array_equal(one, other.T)


def test_a_diagonal_metric_is_the_storage_s_own_business() -> None:
    task = problem("kernel", 1, Moment(moment_of(1, 1, 20).diag.copy(), 9))
    for found, plain in zip(
        encode(STORAGES["int3"], task, Rounding()), STORAGES["int3"].encode(task.array, task.axis, task.importance), strict=True
    ):
        np.testing.assert_array_equal(found, plain)


def test_known_feedback_changes_nothing() -> None:
    task, storage = problem("groups", 3), STORAGES["int3"]
    for one, other in zip(encode(storage, task, Rounding()), encode(storage, task, Rounding(), feedback(task.moment)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("value", [0.0, 1e300, -1e300, 1e-300])
def test_extreme_weights(value: float) -> None:
    """Zeros, and doubles beyond float32: finite values come out."""
    task = replace(problem("outputs first", 1), array=np.full((6, 20), value))
    with np.errstate(over="ignore", invalid="ignore"):  # the errors themselves overflow, which decides for rounding to nearest
        packed = encode(STORAGES["int4"], task, Rounding())
    assert np.isfinite(STORAGES["int4"].decode(packed, Spec((6, 20), np.dtype(np.float64)))).all()


@pytest.mark.parametrize("name", ["int8", "int4", "sparse50-int4", "sparse75-int2"])
def test_weights_next_to_the_end_of_half_precision_stay_finite(name: str) -> None:
    """Compensated codes that decode to infinities lose against those that do not."""
    task = problem("outputs first", 1, dtype="float16")
    task = replace(task, array=(task.array / np.abs(task.array).max() * np.float16(65000)).astype(np.float16))
    with np.errstate(over="ignore", invalid="ignore"):
        packed = encode(STORAGES[name], task, Rounding())
        decoded = STORAGES[name].decode(packed, Spec(task.array.shape, task.array.dtype))
    assert np.isfinite(decoded).all()


@dataclass(frozen=True)
class _Cramped:
    """Integers that only fit while their magnitudes sum up to no more than `room`: stands for a code of variable width."""

    room: int
    ratio: float = 1.25

    def grid(self, array: Array, axis: int, importance: Array | None = None, scale: float = 0.25) -> Grid:
        step = np.full((1, 1), scale, np.float32)
        zero = np.zeros((1, 1), np.float32)
        return Grid(step, zero, -7, 7, axis, (step,), lambda: self.grid(array, axis, importance, self.ratio * scale))

    def pack(self, codes: Array, grid: Grid) -> tuple[Array, ...] | None:
        return (codes, *grid.stored) if np.abs(codes).sum() <= self.room else None

    def encode(self, array: Array, axis: int, importance: Array | None = None) -> tuple[Array, ...]:
        grid = self.grid(array, axis)
        while (packed := self.pack(grid.nearest(array), grid)) is None:
            grid = grid.coarser()
        return packed

    def decode(self, packed: tuple[Array, ...], spec: Spec) -> Array:
        return np.asarray(packed[0] * packed[1], spec.dtype)


def test_codes_of_variable_width_move_to_coarser_grids_until_they_fit() -> None:
    task = problem("outputs first", 5)
    roomy = encode(_Cramped(10**6), task, Rounding())  # type: ignore[arg-type]  # only what encoding needs
    assert roomy[1].item() == 0.25
    room = int(np.abs(roomy[0]).sum() * 0.8)
    found = encode(_Cramped(room), task, Rounding())  # type: ignore[arg-type]
    assert 0 < np.abs(found[0]).sum() <= room
    assert found[1].item() > 0.25


def test_codes_that_fit_nowhere_are_rounded_to_nearest() -> None:
    """Room for so little that compensated codes are given up before the storage's own search ends."""
    task = problem("outputs first", 5)
    storage = _Cramped(2, 1.01)
    found, plain = encode(storage, task, Rounding()), storage.encode(task.array, task.axis)  # type: ignore[arg-type]
    for one, other in zip(found, plain, strict=True):
        np.testing.assert_array_equal(one, other)
