"""Print every reverse rule with how far its gradients are from central differences: python benchmarks/rules.py

Runs the cases of `tests/ops/vjp/cases.py` in float64 under onnx's reference evaluator, and those that it cannot run in float32 under
ONNX Runtime, where differences themselves are only good to three digits. Prints a Markdown table, as in
docs/differentiation.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the cases are part of the tests, which are not installed

from intaglio.ops.vjp import RULES
from tests.ops.vjp.cases import CASES, ELSEWHERE


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("| rule | cases | largest relative error |\n|---|---|---|")
    count = 0
    for name in sorted(RULES):
        cases = CASES.get(name, ())
        count += len(cases)
        if cases:
            where = " (float32)" if any(case.runtime for case in cases) else ""
            print(f"| `{name}` | {len(cases)} | {max(case.error() for case in cases):.1e}{where} |")
        else:
            print(f"| `{name}` | – | {ELSEWHERE.get(name, 'no case')} |")
    print(f"\n{len(RULES)} rules, {count} cases.")


if __name__ == "__main__":
    main()
