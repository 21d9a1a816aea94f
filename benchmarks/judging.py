"""What `peers.py` and `tuning.py` share: models are compressed by the command line and judged by an evaluator that is not ours.

The evaluator is a script that takes TASK MODEL --json --threads N… --pairs N and prints JSON: bytes and the task's metric of model and
original, and the model's speed against the original's, measured in alternation with it. It finds its data in the folder INTAGLIO_DATA.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

DATA = {
    "cifar_resnet": "cifar_calib.npz",
    "cifar_vgg16": "cifar_calib.npz",
    "squeezenet": "squeezenet_calib.npz",
    "minilm": "minilm_calib.npz",
}
"""Calibration data of each task."""

NOISE_POINTS = {"cifar_resnet": 0.3, "cifar_vgg16": 0.3, "squeezenet": 1.2, "minilm": 0.2}
"""Standard error of the difference to the original's metric on each task's test data, in points."""


@dataclass(frozen=True)
class Verdict:
    """What the evaluator says.

    Attributes:
        bytes: of the model.
        reference_bytes: of the original.
        metric: of the model on the task.
        reference_metric: of the original.
        speeds: threads → how many times faster than the original.
    """

    bytes: int
    reference_bytes: int
    metric: float
    reference_metric: float
    speeds: Mapping[int, float]

    @property
    def points(self) -> float:
        """The metric against the original's."""
        return self.metric - self.reference_metric


def compressed(source: Path, model: Path, data: Path, options: Sequence[str], console: Console) -> Mapping[str, Any] | None:
    """Compress by the command line and show the command.

    Args:
        source: the original.
        model: to be written.
        data: to calibrate on.
        options: budgets and all else.
        console: shows the command.

    Returns:
        The report, or None where the command failed; it has said why.
    """
    arguments = ["compress", str(source), "-o", str(model), "--data", str(data), *options]
    console.print("$ intaglio " + " ".join(arguments), soft_wrap=True, highlight=False, markup=False)
    answer = subprocess.run([sys.executable, "-m", "intaglio", *arguments, "--json"], check=False, stdout=subprocess.PIPE)
    if answer.returncode != 0:
        return None
    report: Mapping[str, Any] = json.loads(answer.stdout)
    return report


def judged(evaluator: Path, task: str, model: Path, folder: Path, *, threads: Sequence[int], pairs: int) -> Verdict:
    """Ask the evaluator.

    Args:
        evaluator: its script.
        task: that it knows.
        model: to be judged.
        folder: of its data.
        threads: to measure speed on.
        pairs: of timings.
    """
    command = [sys.executable, str(evaluator), task, str(model), "--json", "--threads", *map(str, threads), "--pairs", str(pairs)]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, env={**os.environ, "INTAGLIO_DATA": str(folder)})
    found: Mapping[str, Any] = json.loads(answer.stdout)
    (metric,), (reference,) = found["metric"].values(), found["reference_metric"].values()
    speeds = {count: float(found["latency"][f"{count}_threads"]["speedup"]) for count in threads}
    return Verdict(int(found["size"]["bytes"]), int(found["reference_size"]["bytes"]), float(metric), float(reference), speeds)
