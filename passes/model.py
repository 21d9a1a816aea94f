"""A model in memory: the graph as a `ModelProto`, its weights wherever they lie."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx

from .weights import WeightStore


@dataclass
class Model:
    """An ONNX model whose external weights stay on disk until someone reads them.

    Attributes:
        proto: the graph. A tensor with external data keeps its reference; read it through `weights` only.
        weights: resolves every `TensorProto` of `proto` to an array.
        path: the file it came from; None for a model given as a proto.
        size_bytes: bytes of the file and of every external data file it names.
        sha256: hex digest over those files, the identity that caches and plans use.
    """

    proto: onnx.ModelProto
    weights: WeightStore
    path: Path | None
    size_bytes: int
    sha256: str
