"""The Python API does what the command line does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import intaglio

pytestmark = pytest.mark.usefixtures("folder")


def test_importing_is_light_and_turns_telemetry_off_first() -> None:
    root = Path(__file__).parents[2]
    code = (
        "import os, sys; os.environ.pop('ORT_DISABLE_TELEMETRY', None); import intaglio;"
        "assert not {'onnx', 'onnxruntime', 'numpy', 'cvxpy'} & set(sys.modules);"
        "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_every_public_name_is_there() -> None:
    assert all(getattr(intaglio, name) for name in intaglio.__all__)
    assert set(intaglio.__all__) <= set(dir(intaglio))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = intaglio.nonsense


def test_compress_from_memory() -> None:
    model = onnx.load("model.onnx")
    before = model.SerializeToString(deterministic=True)
    with np.load("data.npz") as data:
        arrays = {"image": data["image"], "y": data["y"]}
    result = intaglio.compress(model, arrays, size=0.4, labels="y")
    assert model.SerializeToString(deterministic=True) == before
    assert result.meets_budget
    assert result.report.status == "met"
    assert result.report.output.path is None
    onnx.checker.check_model(result.model, full_check=True)
    report = result.save("small.onnx")
    assert report.output.path == "small.onnx"
    assert report.size.bytes == Path("small.onnx").stat().st_size


def test_plan_reuse_and_apply() -> None:
    plan = intaglio.plan("model.onnx", "data.npz", size=0.4)
    tight = intaglio.plan("model.onnx", reuse=plan, size=0.2)
    result = intaglio.apply("model.onnx", tight, "data.npz")
    assert result.report.size.ratio <= 0.2
    assert result.plan is tight


def test_judging() -> None:
    verdict = intaglio.verify("model.onnx", "model.onnx", "data.npz")
    assert verdict.divergence.measured == 0
    assert intaglio.bench(["model.onnx"], "random", pairs=3).latency_s > 0
    assert len(intaglio.inspect("model.onnx").sites) == len(intaglio.inspect("model.onnx", "data.npz").sites) == 4


def test_mistakes_raise() -> None:
    with pytest.raises(intaglio.InputError, match="no budget"):
        intaglio.compress("model.onnx", "data.npz")
    with pytest.raises(intaglio.InfeasibleError, match="nearest feasible"):
        intaglio.compress("model.onnx", "data.npz", size=0.01)
    with pytest.raises(TypeError, match="needs data"):
        intaglio.plan("model.onnx", size=0.4)
