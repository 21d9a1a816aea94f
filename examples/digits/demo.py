"""Compress the digits network to 15 % of its size and judge the result on images that the compressor never saw.

Run it with `make demo`, or with the extra `examples` installed: `python examples/digits/demo.py`. The train part of the
data calibrates, the test part judges. Accuracy and size are taken here, from the two files, rather than from the tool's
own report. Everything is written to `build/demo`: the compressed model, `report.json`, `plan.json` and the data. The exit
status is 1 when the promise is not kept, else that of the first command that failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it when it is imported

import numpy as np
from data import Part, load_parts
from onnxruntime import InferenceSession
from rich.console import Console
from rich.table import Table

MODEL = Path(__file__).with_name("digits.onnx")
BUILD = Path(__file__).parents[2] / "build" / "demo"
SIZE_BUDGET = 0.15
ALLOWED_DROP_POINTS = 1.0


@dataclass(frozen=True)
class Row:
    """One line of the table: the value before, after, and after in proportion to before."""

    quantity: str
    before: str
    after: str
    ratio: str


def intaglio(*arguments: str | Path, stdout: int | None = None) -> str:
    """Run one `intaglio` command; without `stdout=subprocess.PIPE` all it prints goes to the terminal.

    Returns:
        What it printed on stdout when that is a pipe, else nothing.

    Raises:
        SystemExit: with the command's own status when that is not 0; the command has said why.
    """
    shown = [os.path.relpath(argument) if isinstance(argument, Path) else argument for argument in arguments]
    Console().print("$ intaglio", *shown, highlight=False, markup=False, soft_wrap=True)
    done = subprocess.run([sys.executable, "-m", "intaglio", *shown], stdout=stdout, text=True, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return done.stdout or ""


def ask(*arguments: str | Path) -> Mapping[str, Any]:
    """The JSON document that one `intaglio` command prints."""
    document: Mapping[str, Any] = json.loads(intaglio(*arguments, "--json", stdout=subprocess.PIPE))
    return document


def write_data(path: Path, part: Part) -> Path:
    """Write `part` as the `.npz` that `--data` takes, its labels under `y`."""
    np.savez(path, image=part.image, y=part.label)
    return path


def accuracy(model: Path, part: Part) -> float:
    """The share of `part` that `model` classifies correctly, 0..1."""
    session = InferenceSession(model, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": part.image})
    return float(np.mean(logits.argmax(axis=1) == part.label))


def show(rows: list[Row]) -> None:
    """Print the table."""
    table = Table("", title="judged on the test part")
    for heading in ("before", "after", "after / before"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row.quantity, row.before, row.after, row.ratio)
    Console().print(table)


def main() -> None:
    """Compress, judge, print the table."""
    BUILD.mkdir(parents=True, exist_ok=True)
    small = BUILD / "digits.small.onnx"
    train, test = load_parts()
    calibration = write_data(BUILD / "calib.npz", train)
    held_out = write_data(BUILD / "test.npz", test)

    inputs = ("compress", MODEL, "-o", small, "--data", calibration, "--labels", "y")
    intaglio(*inputs, "--size", str(SIZE_BUDGET), "--threads", "1", "--report", BUILD)
    divergence = ask("verify", MODEL, small, "--data", held_out)["divergence"]
    latency = ask("bench", MODEL, small, "--data", held_out, "--threads", "1")["candidates"][0]["latency"]
    bytes_before, bytes_after = MODEL.stat().st_size, small.stat().st_size
    accuracy_before, accuracy_after = accuracy(MODEL, test), accuracy(small, test)

    size_ratio = bytes_after / bytes_before
    drop_points = 100 * (accuracy_before - accuracy_after)
    show(
        [
            Row("size", f"{bytes_before:,} B", f"{bytes_after:,} B", f"{size_ratio:.3f}"),
            Row(
                "latency, 1 thread",
                f"{1e3 * latency['reference_s']:.3f} ms",
                f"{1e3 * latency['candidate_s']:.3f} ms",
                f"{latency['ratio']:.3f}",
            ),
            Row("accuracy", f"{accuracy_before:.2%}", f"{accuracy_after:.2%}", f"{accuracy_after / accuracy_before:.3f}"),
            Row(f"divergence, {divergence['unit']}", "0", f"{divergence['measured']:.2e}", "–"),
        ]
    )
    Console().print(f"{os.path.relpath(BUILD)} holds", ", ".join(sorted(path.name for path in BUILD.iterdir())))

    if size_ratio > SIZE_BUDGET:
        sys.exit(f"{small} is {size_ratio:.3f} of the original, more than the {SIZE_BUDGET} asked for")
    if drop_points > ALLOWED_DROP_POINTS:
        sys.exit(f"{small} loses {drop_points:.2f} points of accuracy on the test part, more than {ALLOWED_DROP_POINTS}")


if __name__ == "__main__":
    main()
