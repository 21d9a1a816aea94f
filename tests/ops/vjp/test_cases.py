"""Every rule has a case, and passes it."""

from __future__ import annotations

import pytest

from intaglio.ops.vjp import RULES

from .cases import CASES, ELSEWHERE


def test_every_rule_has_a_case() -> None:
    checked = {*CASES, *ELSEWHERE}
    assert not [name for name in RULES if name not in checked]
    assert not [name for name in checked if name not in RULES], "cases of operators without a rule"


@pytest.mark.parametrize("name", CASES)
def test_gradients_agree_with_differences(name: str) -> None:
    for case in CASES[name]:
        assert case.error() < case.tolerance, case.text
