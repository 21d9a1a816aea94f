"""Presets on the command line and from Python: what is printed and written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import intaglio
from intaglio.tools.cli import main

pytestmark = pytest.mark.usefixtures("folder")

FORMS = "--decompositions dense --storages int8,int4 --no-cache"


def test_a_preset_reports_what_it_predicted_and_measured(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = f"compress model.onnx -o out.onnx --data data.npz --size 0.4 --labels y --preset lossless --output-kind logits {FORMS}"
    assert main([*arguments.split(), "--json"]) == 0
    task = json.loads(capfd.readouterr().out)["task"]
    assert Path("out.onnx").stat().st_size <= 0.4 * Path("model.onnx").stat().st_size
    assert task["preset"] == "lossless"
    assert task["loss_name"] == "cross-entropy"
    assert task["declined"] == []
    assert task["loss"]["samples"] == 12
    assert [step["gradients"] for step in task["steps"]][:2] == ["none", "original"]
    assert task["steps"][0]["kept"]
    assert task["steps"][0]["predicted_linear"] == 0.0


def test_a_drop_is_printed_with_its_doubt(capfd: pytest.CaptureFixture[str]) -> None:
    arguments = f"compress model.onnx -o out.onnx --data data.npz --labels y --drop 60 {FORMS}"
    assert main(arguments.split()) == 0
    printed = " ".join(capfd.readouterr().out.split())
    assert "compact: cross-entropy" in printed
    assert "held-out samples" in printed
    assert "kept what they had to" in printed


def test_python_takes_the_same_words() -> None:
    with np.load("data.npz") as arrays:
        data = dict(arrays)
    result = intaglio.compress("model.onnx", data, drop=60.0, labels="y", decompositions=("dense",), storages=("int8", "int4"))
    assert result.report.task is not None
    assert result.report.task.drop == 60.0
    assert result.report.size.ratio < 0.5
    with pytest.raises(intaglio.InputError, match="need labels"):
        intaglio.compress("model.onnx", data, drop=1.0)
