"""Set our models beside what other tools reach: python benchmarks/peers.py DIR --evaluator EVALUATE.py [--only TASK] [--keep OUT]

For each model in DIR a few commands of ours are run, each once, and the results are judged by an evaluator that is not ours, on test data
that no choice has seen. Every row of the peers' table is then compared with our models for that task: it counts as beaten by one that is
smaller, and no slower and no less accurate within the noise that is printed with the table.

What the evaluator has to be is in `judging.py`.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from judging import DATA, NOISE_POINTS, compressed, judged
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

BUDGETS = {
    "cifar_resnet": (("--size", "0.11", "--latency", "0.28"), ("--size", "0.2", "--latency", "0.275")),
    "squeezenet": (("--size", "0.1666", "--latency", "0.48"), ("--size", "0.22", "--latency", "0.46")),
    "minilm": (
        ("--size", "0.125", "--latency", "0.4"),
        ("--size", "0.25", "--latency", "0.4"),
        ("--size", "0.158", "--latency", "0.95"),
        ("--size", "0.2", "--latency", "0.9"),
    ),
    "cifar_vgg16": (("--size", "0.08", "--latency", "0.15"),),
}
"""Budgets of our models for each task."""

NOISE_SPEED = 0.03
"""The original against itself gives speed ratios of 0.97 to 1.03."""

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Ours:
    """One of our models, as the evaluator sees it."""

    budgets: str
    bytes: int
    points: float
    speed_1: float
    speed_2: float

    def short_of(self, peer: Peer) -> list[str]:
        """In what it falls short of a peer, beyond the noise."""
        return [
            *(["larger"] if self.bytes >= peer.bytes else []),
            *(["less accurate"] if self.points < peer.points - NOISE_POINTS[peer.task] else []),
            *(["slower on 1"] if self.speed_1 < peer.speed_1 * (1 - NOISE_SPEED) else []),
            *(["slower on 2"] if self.speed_2 < peer.speed_2 * (1 - NOISE_SPEED) else []),
        ]


@app.command()
def main(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Holds the models and their calibration data.")],
    evaluator: Annotated[Path, typer.Option(help="The judge's script.")],
    only: Annotated[list[str] | None, typer.Option(help="Only this task; may be repeated.")] = None,
    keep: Annotated[Path | None, typer.Option(metavar="OUT", help="Keep the models here.")] = None,
    pairs: Annotated[int, typer.Option(help="Pairs of timings.")] = 25,
    samples: Annotated[int, typer.Option(help="Most calibration samples.")] = 512,
) -> None:
    """Compress each model to each of its budgets and print every peer's row beside ours."""
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as scratch:
        out = keep or Path(scratch)
        out.mkdir(parents=True, exist_ok=True)
        for task in only or BUDGETS:
            ours = []
            for number, budgets in enumerate(BUDGETS[task]):
                model = out / f"{task}{number}.onnx"
                source, data = folder / f"{task}.onnx", folder / DATA[task]
                if compressed(source, model, data, [*budgets, "--samples", str(samples)], console) is not None:
                    found = judged(evaluator, task, model, folder, threads=(1, 2), pairs=pairs)
                    ours.append(Ours(" ".join(budgets), found.bytes, found.points, found.speeds[1], found.speeds[2]))
            console.print(_table(task, ours))


def _table(task: str, ours: list[Ours]) -> Table:
    columns = ("model", "bytes", "points", "1 thread", "2 threads", "compared")
    table = Table(*columns, title=f"{task}: noise of the metric ±{NOISE_POINTS[task]} points, of speed ±{NOISE_SPEED:.0%}")
    for row in (*ours, *(peer for peer in PEERS if peer.task == task)):
        numbers = (f"{row.bytes:,}", f"{row.points:+.2f}", f"{row.speed_1:.2f}×", f"{row.speed_2:.2f}×")
        if isinstance(row, Ours):
            table.add_row(f"intaglio {row.budgets}", *numbers, "", style="bold")
            continue
        beats = min((each for each in ours if not each.short_of(row)), key=lambda each: each.bytes, default=None)
        if beats is not None:
            table.add_row(row.recipe, *numbers, f"{row.bytes / beats.bytes:.2f}× smaller with {beats.budgets}, no worse elsewhere")
        else:
            table.add_row(row.recipe, *numbers, "; ".join(", ".join(each.short_of(row)) for each in ours) or "no model", style="red")
    return table


if __name__ == "__main__":
    app()
