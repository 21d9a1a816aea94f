"""Settings of the whole suite: no telemetry, and property tests that are the same on every run and machine."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime reads it when it is imported

# No deadline: a loaded machine must not fail a test. No database: what passed once must not depend on what ran before.
settings.register_profile("intaglio", deadline=None, derandomize=True, database=None)
settings.load_profile("intaglio")
