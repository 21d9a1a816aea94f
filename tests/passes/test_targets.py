"""Targets: which forms may be emitted, and which sites the user's expressions leave."""

from __future__ import annotations

import pytest

from intaglio.ops.decompositions import DECOMPOSITIONS
from intaglio.ops.storage import STORAGES
from intaglio.passes.errors import InputError
from intaglio.passes.load import load
from intaglio.passes.sites import Sites, find_sites
from intaglio.passes.targets import TARGETS, Target
from tests.models import normal, parse

CPU = TARGETS["cpu"]


def sites() -> Sites:
    text = "g (float[N, 16] x) => (float[N, 16] y) { a = MatMul (x, enc.fc1) b = MatMul (a, enc.fc2) y = MatMul (b, head) }"
    names = {"enc.fc1": "e1", "enc.fc2": "e2", "head": "head"}
    for name, plain in names.items():
        text = text.replace(name, plain)
    proto = parse(text, {plain: normal(i, 16, 16) for i, plain in enumerate(names.values())})
    return find_sites(load(proto))


def test_by_default_everything_is_allowed() -> None:
    allowed = CPU.allowed((), ())
    assert set(allowed.decompositions) == {"dense", *(name for name, _ in DECOMPOSITIONS)}
    assert allowed.storages == tuple(STORAGES)


def test_the_user_narrows_the_choice() -> None:
    allowed = CPU.allowed(("lowrank",), ("int8", "fp16"))
    assert (allowed.decompositions, allowed.storages) == (("lowrank",), ("int8", "fp16"))


@pytest.mark.parametrize(
    ("target", "decompositions", "storages", "words"),
    [
        (CPU, ("svd",), (), "--decompositions svd"),
        (CPU, (), ("int3",), "--storages int3"),
        (Target("narrow", ("float",)), (), ("int8",), "not available for target narrow"),
    ],
)
def test_unknown_names_are_refused(target: Target, decompositions: tuple[str, ...], storages: tuple[str, ...], words: str) -> None:
    with pytest.raises(InputError, match=words):
        target.allowed(decompositions, storages)


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
