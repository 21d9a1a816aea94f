"""What loading costs: measured in fresh processes, which see the memory that a model takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from intaglio.passes.errors import InputError
from intaglio.passes.loading import measure_loading
from tests.models import normal, parse

WEIGHT_BYTES = 4 * 4096 * 2048


def saved(path: Path, weight: np.ndarray) -> Path:
    rows, columns = weight.shape
    onnx.save(parse(f"g (float[N, {rows}] x) => (float[N, {columns}] y) {{ y = MatMul (x, w) }}", {"w": weight}), path)
    return path


def test_the_weights_of_a_model_show_in_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one copy of the weights is in memory; the small model takes less than half of that. From any folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    large = measure_loading(saved(tmp_path / "large.onnx", normal(1, 4096, 2048)))
    small = measure_loading(saved(tmp_path / "small.onnx", normal(1, 16, 16)), threads=2)
    assert large.seconds > 0
    assert small.seconds > 0
    assert large.peak_bytes >= WEIGHT_BYTES
    assert 0 <= small.peak_bytes < WEIGHT_BYTES // 2


@pytest.mark.parametrize("content", [b"not a model", None], ids=["garbage", "missing"])
def test_a_file_that_does_not_load_is_named_in_one_line(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.onnx: a fresh process cannot load it \(.+\); check memory and the file") as caught:
        measure_loading(path)
    assert "\n" not in str(caught.value)
