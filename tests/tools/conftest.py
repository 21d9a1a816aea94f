"""A small convolutional network with structured weights, its data, and the folder that a command works in."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from intaglio.passes.latency import measure

NETWORK = """
<ir_version: 8, opset_import: ["" : 17]>
network (float[batch, 3, 8, 8] image) => (float[batch, 10] logits) {
    a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (image, stem)
    b = Relu (a)
    c = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (b, body)
    d = Relu (c)
    e = Flatten (d)
    f = Gemm <transB = 1> (e, hidden, bias)
    g = Relu (f)
    logits = MatMul (g, head)
}
"""


def structured(shape: tuple[int, ...], inputs: int, rng: np.random.Generator) -> np.ndarray:
    """Weights whose spectrum falls like that of a trained layer's, scaled to keep the size of activations."""
    matrix = rng.standard_normal((shape[0], int(np.prod(shape[1:]))))
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    decayed = left * (values * 0.8 ** np.arange(len(values))) @ right
    scale = np.sqrt(2 / inputs) / decayed.std()
    return np.asarray(scale * decayed, np.float32).reshape(shape)


def network(seed: int = 0) -> onnx.ModelProto:
    """Two convolutions and two dense layers, 46 kB."""
    rng = np.random.default_rng(seed)
    model = parser.parse_model(NETWORK)
    weights = {
        "stem": structured((16, 3, 3, 3), 27, rng),
        "body": structured((32, 16, 3, 3), 144, rng),
        "hidden": structured((32, 512), 512, rng),
        "bias": np.zeros(32, np.float32),
        "head": structured((32, 10), 32, rng),
    }
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.fixture(scope="session")
def latencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that all tests share, so that each latency is measured once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def folder(tmp_path: Path, latencies: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with `model.onnx` and `data.npz` (48 samples, labels under y)."""
    rng = np.random.default_rng(1)
    onnx.save(network(), tmp_path / "model.onnx")
    image = rng.standard_normal((48, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=image, y=rng.integers(0, 10, 48))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("intaglio.passes.timing.measure", partial(measure, rounds=3))  # quick: no test asks how long things take
    monkeypatch.setenv("INTAGLIO_CACHE", str(latencies))
    return tmp_path
