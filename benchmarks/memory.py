"""Compress a generated model larger than memory should need: python benchmarks/memory.py DIR [--blocks N] [--size R]

Writes a model of N blocks with external data to DIR (48 blocks: 3.2 GB), compresses it in a fresh process, and prints the peak
resident memory of that process beside the sizes. Every block is MatMul 1024 → 16384, Tanh, a mean over 16 heads and a residual
sum; weights have a decaying spectrum, so that there is something to gain.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console

WIDTH, HEADS = 1024, 16

CHILD = """
import resource, sys, time
import intaglio
start = time.perf_counter()
result = intaglio.compress(sys.argv[1], sys.argv[2], size=float(sys.argv[4]), samples=24)
result.save(sys.argv[3])
peak = int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1]) * 1024
print(f"{time.perf_counter() - start:.0f} {peak}")
"""


def generate(folder: Path, blocks: int) -> Path:
    """Write the model, one weight in memory at a time."""
    path, data = folder / "large.onnx", folder / "large.onnx.data"
    rng = np.random.default_rng(0)
    nodes, initializers, value = [], [], "x"
    with data.open("wb") as file:
        for block in range(blocks):
            left = rng.standard_normal((WIDTH, 256), np.float32) * np.linspace(2, 0.1, 256, dtype=np.float32)
            weight = (left @ rng.standard_normal((256, WIDTH * HEADS), np.float32)) / WIDTH
            tensor = TensorProto(name=f"w{block}", dims=weight.shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
            for key, entry in (("location", data.name), ("offset", str(file.tell())), ("length", str(weight.nbytes))):
                tensor.external_data.add(key=key, value=entry)
            file.write(weight.tobytes())
            initializers.append(tensor)
            nodes += [
                helper.make_node("MatMul", [value, f"w{block}"], [f"wide{block}"], name=f"expand{block}"),
                helper.make_node("Tanh", [f"wide{block}"], [f"bent{block}"]),
                helper.make_node("Reshape", [f"bent{block}", "heads"], [f"heads{block}"]),
                helper.make_node("ReduceMean", [f"heads{block}"], [f"mean{block}"], axes=[1], keepdims=0),
                helper.make_node("Add", [value, f"mean{block}"], [f"x{block}"]),
            ]
            value = f"x{block}"
    initializers.append(numpy_helper.from_array(np.array([-1, HEADS, WIDTH]), "heads"))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])]
    outputs = [helper.make_tensor_value_info(value, TensorProto.FLOAT, ["batch", WIDTH])]
    graph = helper.make_graph(nodes, "large", inputs, outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    np.savez(folder / "data.npz", x=rng.standard_normal((32, WIDTH), np.float32))
    return path


def main(
    folder: Path,
    blocks: Annotated[int, typer.Option(help="Blocks of 67 MB each.")] = 48,
    size: Annotated[float, typer.Option(help="Size budget.")] = 0.2,
) -> None:
    """Generate, compress in a fresh process, print sizes and peak memory."""
    folder.mkdir(parents=True, exist_ok=True)
    model, small = generate(folder, blocks), folder / "small.onnx"
    command = [sys.executable, "-c", CHILD, str(model), str(folder / "data.npz"), str(small), str(size)]
    seconds, peak = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.split()[-2:]
    before, after = (sum(f.stat().st_size for f in folder.glob(f"{stem}.onnx*")) for stem in ("large", "small"))
    Console().print(f"{before / 1e9:.2f} GB → {after / 1e9:.2f} GB in {seconds} s; peak resident memory {int(peak) / 1e9:.2f} GB")


if __name__ == "__main__":
    typer.run(main)
