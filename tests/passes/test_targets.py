"""Targets: which forms may be emitted, that their runtimes have the operators, and which sites the user's expressions leave."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
from onnx import ModelProto

from intaglio.ops.arithmetic import ARITHMETICS
from intaglio.ops.decompositions import DECOMPOSITIONS
from intaglio.ops.emit import DOMAIN
from intaglio.ops.form import UNCHANGED, Form
from intaglio.ops.storage import STORAGES, readers
from intaglio.passes.errors import InputError
from intaglio.passes.load import load
from intaglio.passes.propose import expands
from intaglio.passes.rewrite import declines
from intaglio.passes.sites import Sites, find_sites
from intaglio.passes.targets import RACE, TARGETS, Target
from intaglio.passes.weights import tensors
from tests.models import CASES, mocked, normal, optimized, parse, site_of

CPU = TARGETS["cpu"]

KINDS = {type(storage).__name__: name for name, storage in reversed(STORAGES.items()) if not name.endswith("-native")}
"""One storage of each kind."""

LAYERS = ("matmul", "gemm", "conv2d", "gather")
"""Cases whose operators compute in narrow arithmetics."""


def sites() -> Sites:
    text = "g (float[N, 16] x) => (float[N, 16] y) { a = MatMul (x, enc.fc1) b = MatMul (a, enc.fc2) y = MatMul (b, head) }"
    names = {"enc.fc1": "e1", "enc.fc2": "e2", "head": "head"}
    for name, plain in names.items():
        text = text.replace(name, plain)
    proto = parse(text, {plain: normal(i, 16, 16) for i, plain in enumerate(names.values())})
    return find_sites(load(proto))


def test_by_default_all_forms_are_allowed_in_the_storages_that_race() -> None:
    allowed = CPU.allowed()
    assert set(allowed.decompositions) == {"dense", *(name for name, _ in DECOMPOSITIONS)}
    assert allowed.storages == RACE
    assert set(RACE) <= set(STORAGES)
    assert allowed.arithmetics == ("float", *ARITHMETICS)
    assert allowed.expand


def test_the_user_narrows_the_choice() -> None:
    allowed = CPU.allowed(("lowrank",), ("int8", "fp16"), ("integer",), expand=False)
    assert (allowed.decompositions, allowed.storages) == (("lowrank",), ("int8", "fp16"))
    assert allowed.arithmetics == ("float", "integer")
    assert not allowed.expand


def test_the_user_can_leave_floats_only() -> None:
    assert CPU.allowed(arithmetics=("float",)).arithmetics == ("float",)


def test_a_target_that_cannot_expand_never_does() -> None:
    assert not Target("plain", ("int8",), ("integer",), expands=False).allowed().expand


@pytest.mark.parametrize(
    ("target", "chosen", "words"),
    [
        (CPU, {"decompositions": ("svd",)}, "--decompositions svd: unknown; expected some of dense, "),
        (CPU, {"storages": ("int7",)}, "--storages int7: not available for target cpu; expected some of float, "),
        (CPU, {"arithmetics": ("analog",)}, "--arithmetics analog: not available for target cpu; expected some of float, integer"),
        (Target("narrow", ("float",), ()), {"storages": ("int8",)}, "--storages int8: not available for target narrow"),
        (TARGETS["mobile"], {"storages": ("nbits4-b32",)}, "--storages nbits4-b32: not available for target mobile"),
        (TARGETS["mobile"], {"arithmetics": ("dynamic",)}, "not available for target mobile; expected some of float, integer, rows"),
        (TARGETS["cuda"], {"arithmetics": ("integer",)}, "--arithmetics integer: not available for target cuda"),
        (TARGETS["web"], {"arithmetics": ("nbits",)}, "--arithmetics nbits: not available for target web"),
    ],
)
def test_names_that_are_not_available_are_refused(target: Target, chosen: dict[str, tuple[str, ...]], words: str) -> None:
    with pytest.raises(InputError, match=words):
        target.allowed(**chosen)  # type: ignore[arg-type]  # every key is one of names


@pytest.mark.parametrize(
    ("target", "form", "reason"),
    [
        ("cpu", Form("dense", (), "nbits4-b32", "dense", "nbits"), None),
        ("cuda", Form("dense", (), "int8", "dense", "integer"), "target cuda does not compute in integer"),
        ("mobile", Form("dense", (), "int8", "dense", "dynamic"), "target mobile does not compute in dynamic"),
        ("mobile", Form("dense", (), "nbits4-b32"), "target mobile has no nbits4-b32"),
        ("web", Form("dense", (), "int8", "dense", "dynamic"), None),
        ("web", UNCHANGED, None),
    ],
)
def test_which_forms_a_target_declines(target: str, form: Form, reason: str | None) -> None:
    assert TARGETS[target].declines(form) == reason


@cache
def made(layer: str, form: Form) -> tuple[ModelProto, ModelProto] | None:
    """A case's model with this form of its weight, before and after ONNX Runtime's optimizations; None where the site declines it."""
    model, site = site_of(CASES[layer].proto(opset=21, ir_version=10))
    if declines(site, form) is not None:
        return None
    proto = mocked(model, {site.name: form}).proto
    return proto, optimized(proto)


def forms_for(target: Target, *, expand: bool) -> Iterator[Form]:
    """One storage of each kind that the target has, in each of its arithmetics, for whole weights and products."""
    kinds = tuple(name for name in KINDS.values() if name in target.storages)
    allowed = target.allowed(storages=kinds, expand=expand)
    shapes = (("dense", (), "dense"), ("lowrank", (4,), "dense"), ("lowrank", (4,), "contract"))
    for storage in allowed.storages:
        for arithmetic in allowed.arithmetics:
            for decomposition, ranks, execution in shapes:
                form = Form(decomposition, ranks, storage, execution, arithmetic)
                if allowed.admits(form):
                    yield form


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_what_a_target_admits_uses_only_operators_that_it_has_and_loads(target: Target, layer: str) -> None:
    known = {"", DOMAIN, *target.domains}
    found = [form for form in forms_for(target, expand=True) if made(layer, form) is not None]
    for form in found:
        proto, _ = made(layer, form) or (ModelProto(), None)
        assert {node.domain for node in proto.graph.node} <= known, form
        assert {node.domain for function in proto.functions for node in function.node} <= {"", DOMAIN}, form
        assert {entry.domain for entry in proto.opset_import} <= known, form
    narrow = {"matmul": {"integer", "dynamic", "nbits"}, "gemm": {"integer", "dynamic", "nbits"}, "conv2d": {"integer"}}
    expected = narrow.get(layer, {"nbits", "rows"}) & set(target.arithmetics)
    assert {form.arithmetic for form in found} == {"float", *expected}  # none of them is refused by oversight


@pytest.mark.parametrize("layer", LAYERS)
def test_without_expansion_no_constant_takes_more_memory_than_in_the_file(layer: str) -> None:
    """But for what ONNX Runtime adds to the original model too (padded kernels), and half a kilobyte for scales that are spelt out."""
    original = CASES[layer].proto(opset=21, ir_version=10)
    slack = constant_bytes(optimized(original)) - constant_bytes(original) + 512
    expanding = set()
    for form in forms_for(CPU, expand=True):
        models = made(layer, form)
        if models is None:
            continue
        stored_bytes, loaded_bytes = map(constant_bytes, models)
        if not expands(form):
            assert loaded_bytes <= stored_bytes + slack, form
        elif loaded_bytes > stored_bytes + slack:
            expanding.add(form.storage)
    assert expanding  # or the slack hides everything


def constant_bytes(proto: ModelProto) -> int:
    """Payload of a model's constants."""
    return sum(len(tensor.raw_data) for tensor in tensors(proto))


def test_no_expand_admits_nothing_that_expands() -> None:
    for target in TARGETS.values():
        admitted = list(forms_for(target, expand=False))
        assert not [form for form in admitted if expands(form)]
        assert all(expands(form) for form in set(forms_for(target, expand=True)) - set(admitted))


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (UNCHANGED, False),
        (Form("dense", (), "int8"), True),
        (Form("dense", (), "int8", "dense", "integer"), False),
        (Form("dense", (), "int8", "dense", "dynamic"), False),
        (Form("dense", (), "int4", "dense", "integer"), True),
        (Form("dense", (), "nbits4-b32", "dense", "nbits"), False),
        (Form("dense", (), "int4-rows", "dense", "rows"), False),
        (Form("dense", (), "int4-rows"), True),
        (Form("lowrank", (4,), "float", "contract"), False),
        (Form("lowrank", (4,), "float", "dense"), True),
        (Form("lowrank", (4,), "fp16", "contract"), True),
        (Form("lowrank", (4,), "int8", "contract", "dynamic"), False),
        (Form("lowrank", (4,), "int8", "dense", "integer"), True),
    ],
    ids=str,
)
def test_what_expands(form: Form, expected: bool) -> None:
    assert expands(form) == expected


def test_portable_targets_have_no_storage_that_needs_another_domain() -> None:
    for target in TARGETS.values():
        if not target.domains:
            assert all(readers(STORAGES[name]) is None for name in target.storages)


@pytest.mark.parametrize(
    ("include", "exclude", "kept"),
    [
        ((), (), ["e1", "e2", "head"]),
        (("^e",), (), ["e1", "e2"]),
        (("1$", "head"), (), ["e1", "head"]),
        ((), ("head",), ["e1", "e2"]),
        (("^e",), ("2",), ["e1"]),
        ((), ("e1", "e2"), ["head"]),
        ((), (".",), []),
    ],
)
def test_selection(include: tuple[str, ...], exclude: tuple[str, ...], kept: list[str]) -> None:
    found = sites()
    chosen, left = CPU.select(found, include, exclude)
    assert [site.name for site in chosen] == kept
    assert {skip.name for skip in left} == {site.name for site in found} - set(kept)
    assert all(skip.reason == "excluded by --include/--exclude" and skip.size_bytes == 1024 for skip in left)


@pytest.mark.parametrize(
    ("include", "exclude", "words"),
    [
        (("decoder",), (), "--include 'decoder': matches none of the 3 sites; names look like e1, e2, head"),
        ((), ("decoder",), "--exclude 'decoder': matches none"),
        (("(",), (), r"--include '\(': not a regular expression"),
    ],
)
def test_expressions_that_do_nothing_are_refused(include: tuple[str, ...], exclude: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        CPU.select(sites(), include, exclude)
