"""Set our models beside what other tools reach: python benchmarks/peers.py DIR --evaluator EVALUATE.py [--only TASK] [--keep OUT]

For each model in DIR one command of ours is run, once, and its result is judged by an evaluator that is not ours, on test data that no
choice has seen. Every row of the peers' table is then compared with our one model for that task: it counts as beaten when our model is
smaller, and no slower and no less accurate within the noise that is printed with the table.

The evaluator is a script that takes TASK MODEL --json --threads 1 2 --pairs N and prints bytes, the task's metric and speed against the
original, measured in alternation with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Peer:
    """What another tool reaches: bytes, points of the metric against the original's, and speed-ups on one and two threads."""

    task: str
    recipe: str
    bytes: int
    points: float
    speed_1: float
    speed_2: float


# onnxruntime 1.31.1, onnxsim 0.8.1, NNCF 3.4.0, each with its best-working recipe; AVX512-VNNI, 2 virtual cores, batch 1.
PEERS = (
    Peer("cifar_resnet", "ort-static-percentile", 2_870_313, +0.05, 3.23, 2.43),
    Peer("cifar_resnet", "ort-static-minmax", 2_870_309, -0.07, 3.10, 2.37),
    Peer("cifar_resnet", "ort-dynamic-quint8", 2_835_147, +0.10, 0.76, 0.56),
    Peer("cifar_resnet", "nncf-ptq", 2_854_375, -0.05, 3.11, 2.35),
    Peer("cifar_resnet", "onnxsim-int4-gptq", 1_772_236, -0.03, 0.30, 0.18),
    Peer("cifar_resnet", "onnxsim-static-percentile", 2_831_333, -0.07, 1.00, 0.70),
    Peer("cifar_resnet", "onnxsim-wo-int8", 2_824_403, +0.00, 0.66, 0.50),
    Peer("cifar_vgg16", "ort-static-percentile", 15_354_766, +0.05, 4.95, 3.78),
    Peer("squeezenet", "ort-static-percentile", 1_344_604, +0.00, 1.98, 1.64),
    Peer("squeezenet", "ort-static-minmax", 1_344_604, +1.00, 2.15, 1.81),
    Peer("squeezenet", "ort-dynamic-quint8", 1_286_658, +0.67, 0.86, 0.71),
    Peer("squeezenet", "nncf-ptq", 1_309_172, +0.67, 1.11, 0.95),
    Peer("squeezenet", "onnxsim-wo-int8", 1_278_053, +0.67, 0.78, 0.69),
    Peer("squeezenet", "onnxsim-int4-gptq", 1_498_420, -4.00, 0.67, 0.55),
    Peer("squeezenet", "onnxsim-static-full", 1_355_794, -0.33, 1.51, 1.14),
    Peer("minilm", "nncf-ptq", 23_207_052, -0.04, 0.84, 0.58),
    Peer("minilm", "nncf-w4-sym-awq-se", 19_201_633, +0.16, 0.82, 0.68),
    Peer("minilm", "nncf-w4-sym", 19_201_633, +0.30, 0.82, 0.66),
    Peer("minilm", "nncf-w8-sym", 23_010_770, -0.00, 0.36, 0.25),
    Peer("minilm", "onnxsim-dynamic-fused", 58_581_825, -0.16, 2.30, 2.10),
    Peer("minilm", "ort-dynamic-qint8-perchannel", 22_903_841, -0.09, 2.30, 2.18),
    Peer("minilm", "ort-nbits4-acc4-block128", 53_539_857, -0.12, 1.40, 1.37),
    Peer("minilm", "ort-nbits8-acc4-gather8", 24_087_785, -0.06, 1.17, 1.11),
    Peer("minilm", "ort-nbits4-acc4-gather", 14_351_852, +0.10, 1.05, 1.02),
    Peer("minilm", "ort-nbits4-acc4-gather-asym", 14_706_937, -0.30, 1.04, 1.01),
)

COMMANDS = {
    "cifar_resnet": ("cifar_calib.npz", "--size", "0.109", "--latency", "0.31"),
    "cifar_vgg16": ("cifar_calib.npz", "--size", "0.08", "--latency", "0.2"),
    "squeezenet": ("squeezenet_calib.npz", "--size", "0.165", "--latency", "0.46"),
    "minilm": ("minilm_calib.npz", "--size", "0.123", "--latency", "0.4"),
}
"""Data and budgets of our model for each task."""

NOISE_POINTS = {"cifar_resnet": 0.3, "cifar_vgg16": 0.3, "squeezenet": 1.2, "minilm": 0.2}
"""Standard error of the difference to the original's metric on each task's test data, in points."""

NOISE_SPEED = 0.03
"""The original against itself gives speed ratios of 0.97 to 1.03."""

app = typer.Typer(add_completion=False)


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Holds the models and their calibration data.")],
    evaluator: Annotated[Path, typer.Option(help="The judge's script.")],
    only: Annotated[list[str] | None, typer.Option(help="Only this task; may be repeated.")] = None,
    keep: Annotated[Path | None, typer.Option(metavar="OUT", help="Keep the models here.")] = None,
    pairs: Annotated[int, typer.Option(help="Pairs of timings.")] = 25,
) -> None:
    """Compress each model once and print every peer's row beside ours."""
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as scratch:
        out = keep or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        for task in only or COMMANDS:
            model = _compress(task, folder, out, console)
            result = _evaluate(task, model, folder, evaluator, pairs)
            console.print(_table(task, result))


def _compress(task: str, folder: Path, out: Path, console: Console) -> Path:
    data, *budgets = COMMANDS[task]
    output = out / f"{task}.onnx"
    arguments = ["compress", str(folder / f"{task}.onnx"), "-o", str(output), "--data", str(folder / data), *budgets]
    console.print("$ intaglio " + " ".join(arguments), soft_wrap=True, highlight=False)
    subprocess.run([sys.executable, "-m", "intaglio", *arguments], check=True, stdout=subprocess.DEVNULL)
    return output


def _evaluate(task: str, model: Path, folder: Path, evaluator: Path, pairs: int) -> dict[str, Any]:
    command = [sys.executable, str(evaluator), task, str(model), "--json", "--threads", "1", "2", "--pairs", str(pairs)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "INTAGLIO_DATA": str(folder)})
    found: dict[str, Any] = json.loads(answer.stdout)
    return found


def _table(task: str, result: dict[str, Any]) -> Table:
    (metric,) = result["metric"].values()
    (reference,) = result["reference_metric"].values()
    size, points = int(result["size"]["bytes"]), metric - reference
    speeds = [float(result["latency"][f"{threads}_threads"]["speedup"]) for threads in (1, 2)]
    ours = [f"{size:,}", f"{points:+.2f}", *(f"{speed:.2f}×" for speed in speeds)]
    noise = NOISE_POINTS[task]
    title = f"{task}: ours {size:,} B ({result['size_ratio']:.2f}× smaller), {metric:.2f} ({points:+.2f} ± {noise})"
    table = Table("tool and recipe", "bytes", "points", "1 thread", "2 threads", "ours is", title=title)
    table.add_row("intaglio", *ours, "", style="bold")
    for peer in (peer for peer in PEERS if peer.task == task):
        short = [
            *(["larger"] if size >= peer.bytes else []),
            *(["less accurate"] if points < peer.points - noise else []),
            *(["slower on 1"] if speeds[0] < peer.speed_1 * (1 - NOISE_SPEED) else []),
            *(["slower on 2"] if speeds[1] < peer.speed_2 * (1 - NOISE_SPEED) else []),
        ]
        verdict = f"{peer.bytes / size:.2f}× smaller, no worse elsewhere" if not short else ", ".join(short)
        table.add_row(
            peer.recipe, f"{peer.bytes:,}", f"{peer.points:+.2f}", f"{peer.speed_1:.2f}×", f"{peer.speed_2:.2f}×", verdict,
            style=None if not short else "red",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    app()
