"""Intaglio cuts ONNX models down."""

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before anything imports onnxruntime

__version__ = "0.1.0"
