"""The student computes what the compressed model computes, whatever its parameters become, and costs no byte more."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from intaglio.ops.form import CARRIED, UNCHANGED, Form
from intaglio.ops.storage import STORAGES, requantized
from intaglio.ops.storage.scaling import BFLOAT16
from intaglio.passes.build import Fitted, finish, fit_forms
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.latent import Levelled, Rounded
from intaglio.passes.learner import units_of
from intaglio.passes.model import Model
from intaglio.passes.rewrite import array_specs, declines
from intaglio.passes.save import serialized_size
from intaglio.passes.student import Student, make_student
from tests.models import Array, assert_close, classifier, normal, optimized, run
from tests.passes.pruning import pruned_plan

WHOLE = ("int3", "int4-b32-asym", "planes2.5", "kmeans3", "vq2x8", "fp16")
LOW = {"lowrank": (6,), "separable": (6,), "tucker2": (4, 6), "channel_svd": (6,), "residual": (3,)}


@cache
def job() -> Job:
    return open_job(*classifier(), Settings())


def plans() -> dict[str, dict[str, Form]]:
    """Every storage of the whole weight, and every decomposition both ways."""
    found = {name: alike(Form("dense", (), name)) for name in WHOLE}
    for name, ranks in LOW.items():
        for execution in ("dense", "contract"):
            found[f"{name}-{execution}"] = alike(Form(name, ranks, "int4", execution))
    found["dynamic"] = alike(Form("dense", (), "int4", "dense", "dynamic"))
    found["nbits"] = alike(Form("dense", (), "nbits4-b32", "dense", "nbits"))
    return {name: forms for name, forms in found.items() if any(form != UNCHANGED for form in forms.values())}


def alike(form: Form) -> dict[str, Form]:
    return {site.name: form if able(site, form) else UNCHANGED for site in job().sites}


def able(site: object, form: Form) -> bool:
    try:
        return declines(site, form) is None  # type: ignore[arg-type]
    except KeyError:  # a decomposition that does not exist both ways
        return False


@cache
def fitted(plan: str) -> Fitted:
    return fit_forms(job(), plans()[plan], keep=True)


def outputs(student: Student, flat: Array) -> list[Array]:
    flat = flat.copy()
    fed = {}
    for name, parameter in student.parameters.items():
        fed[name] = np.zeros(parameter.latent.shape, np.float32)
        parameter.project(flat, fed[name])
    return run(student.model.proto, {"x": job().data.first(40)["x"], **fed})


def built(forms: Mapping[str, Form], what: Fitted) -> tuple[Model, list[Array]]:
    model = finish(job(), forms, what)
    return model, run(model.proto, {"x": job().data.first(40)["x"]})


def moved(student: Student) -> Array:
    return student.start() + 0.3 * units_of(student.parameters, student.count) * normal(3, student.count)


@pytest.mark.parametrize("plan", [name for name in plans() if name not in ("dynamic", "nbits")])
def test_it_computes_what_the_compressed_model_computes(plan: str) -> None:
    """At the start and anywhere else; orders of summation differ, so floats agree to a few units of their last place."""
    forms, student = plans()[plan], make_student(job(), plans()[plan], fitted(plan))
    before, expected = built(forms, fitted(plan))
    assert_close(outputs(student, student.start()), expected, 1e-5, plan)
    flat = moved(student)
    after, changed = built(forms, student.taught(flat))
    assert_close(outputs(student, flat), changed, 1e-5, plan)
    assert np.abs(changed[0] - expected[0]).max() > 1e-2 * np.abs(expected[0]).max()  # or the test says nothing
    assert serialized_size(after) == serialized_size(before)


@pytest.mark.parametrize("plan", plans())
def test_what_is_taught_nothing_is_the_model_as_fitted(plan: str) -> None:
    forms, student = plans()[plan], make_student(job(), plans()[plan], fitted(plan))
    before, after = (finish(job(), forms, what).proto for what in (fitted(plan), student.taught(student.start())))
    assert before.SerializeToString(deterministic=True) == after.SerializeToString(deterministic=True)


def test_packed_arrays_are_kept_only_if_asked_for() -> None:
    forms = plans()["int3"]
    assert not fit_forms(job(), forms).packed
    assert set(fitted("int3").packed) == {name for name, form in forms.items() if form != UNCHANGED}


def test_biases_are_parameters_unless_declined() -> None:
    forms = plans()["int3"]
    assert make_student(job(), forms, fitted("int3")).constants == ("gb",)
    assert make_student(job(), forms, fitted("int3"), constants=False).constants == ()


@pytest.mark.parametrize("plan", ["int3", "kmeans3", "planes2.5"])
def test_scales_are_parameters_unless_declined(plan: str) -> None:
    forms, what = plans()[plan], fitted(plan)
    students = [make_student(job(), forms, what, scales=scales) for scales in (True, False)]
    assert students[0].count > students[1].count
    for student, moves in zip(students, (True, False), strict=True):
        taught = student.taught(moved(student))
        for name, arrays in what.packed.items():
            for before, after in zip(arrays, taught.packed[name], strict=True):
                assert before[-1].dtype == after[-1].dtype == BFLOAT16
                assert np.array_equal(before[-1], after[-1]) != moves


def test_pruned_layers_and_their_biases_are_tuned_in_their_smaller_shapes() -> None:
    forms = pruned_plan(job(), "c2")
    what = fit_forms(job(), forms, keep=True)
    student = make_student(job(), forms, what)
    flat = moved(student)
    _, changed = built(forms, student.taught(flat))
    assert_close(outputs(student, flat), changed, 1e-5)


def test_layers_in_integers_read_rounded_activations_and_weights_as_they_run() -> None:
    """kmeans is rounded once more to int8. Bytes agree but for ties; bias codes, which the student lacks, are finer than activations."""
    opened = job()
    for storage in ("int4", "kmeans4"):
        form = Form("dense", (), storage, "dense", "integer")
        forms = {site.name: form if declines(site, form) is None else UNCHANGED for site in opened.sites}
        forms |= {carrier.name: CARRIED for carrier in opened.carriers}
        what = fit_forms(opened, forms, keep=True)
        student = make_student(opened, forms, what)
        assert sum(node.op_type == "QuantizeLinear" for node in student.model.proto.graph.node) >= 4
        _, expected = built(forms, what)
        (actual,) = outputs(student, student.start())
        floats = run(opened.model.proto, {"x": opened.data.first(40)["x"]})[0]
        # The student is much nearer to the integer model than the model in floats is
        assert np.linalg.norm(actual - expected[0]) < 0.2 * np.linalg.norm(floats - expected[0])
        flat = student.start()
        for parameter in student.parameters.values():
            if isinstance(parameter.latent, (Rounded, Levelled)):  # scales that are a tenth larger
                flat[parameter.part][-parameter.latent.shape[0] :] *= np.float32(1.1)
        _, changed = built(forms, student.taught(flat))
        (actual,) = outputs(student, flat)
        assert np.linalg.norm(actual - changed[0]) < 0.2 * np.linalg.norm(expected[0] - changed[0])


@pytest.mark.parametrize("arithmetic", ["integer", "dynamic"])
@pytest.mark.parametrize("storage", ["int8", "kmeans4"])
def test_fewer_codes_are_taught_as_they_are_written(storage: str, arithmetic: str) -> None:
    """Where operators admit codes within ±63, a projection is the weight that they compute with: codes and scales in the file, decoded."""
    opened = open_job(*classifier(), Settings(integers="reduced"))
    form = Form("dense", (), storage, "dense", arithmetic)
    forms = {site.name: form if declines(site, form) is None else UNCHANGED for site in opened.sites}
    student = make_student(opened, forms, fit_forms(opened, forms, keep=True))
    flat = moved(student)
    taught = student.taught(flat)
    read = [array for array in folded(finish(opened, forms, taught).proto) if array.dtype == np.int8 and array.ndim > 1]
    sites = [site for site in opened.sites if forms[site.name] != UNCHANGED]
    assert len(sites) == len(read) > 0
    for site in sites:
        (name,) = student.arrays[site.name]
        assert name is not None
        parameter, ((spec, axis),) = student.parameters[name], array_specs(site, form)
        projected = np.zeros(parameter.latent.shape, np.float32)
        parameter.project(flat.copy(), projected)
        (packed,) = taught.packed[site.name]
        decoded = np.asarray(STORAGES[storage].decode(packed, spec), np.float32)
        if storage == "int8":
            codes = np.asarray(packed[0], np.int8)
            np.testing.assert_array_equal(projected, decoded)
        else:
            codes, scale = requantized(decoded, axis, 63)
            np.testing.assert_array_equal(projected, codes * scale.reshape([-1 if i == axis else 1 for i in range(codes.ndim)]))
        assert int(np.abs(codes.astype(int)).max()) == 63
        assert any(np.array_equal(np.sort(codes, axis=None), np.sort(array, axis=None)) for array in read)


def folded(proto: onnx.ModelProto) -> list[Array]:
    """The initializers of a model as it is loaded."""
    return [numpy_helper.to_array(tensor) for tensor in optimized(proto).graph.initializer]
