"""Peak memory of a training step with all forward values kept, and with few: python benchmarks/recompute.py [MODEL] [--batch N]

Without MODEL a stack of residual blocks is generated (Conv, Relu, Conv, Add on 32 × 32 images). The loss is the mean square of the first
output; gradients are those of all float initializers with two axes or more. Each variant runs in a fresh process, whose peak resident
memory above that of the loaded session is printed beside the seconds of a step.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from intaglio.passes.differentiate import differentiate
from intaglio.passes.loss import SquaredError, with_loss
from intaglio.passes.session import open_session, to_value

CHANNELS, SIDE = 16, 32
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)


def generated(blocks: int) -> onnx.ModelProto:
    """Residual blocks of two convolutions."""
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    for block in range(blocks):
        for half in "ab":
            array = rng.standard_normal((CHANNELS, CHANNELS, 3, 3)).astype(np.float32) / 24
            weights.append(numpy_helper.from_array(array, f"w{half}{block}"))
        nodes += [
            helper.make_node("Conv", [value, f"wa{block}"], [f"a{block}"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"a{block}"], [f"r{block}"]),
            helper.make_node("Conv", [f"r{block}", f"wb{block}"], [f"b{block}"], pads=[1, 1, 1, 1]),
            helper.make_node("Add", [value, f"b{block}"], [f"x{block}"]),
        ]
        value = f"x{block}"
    shape = ["batch", CHANNELS, SIDE, SIDE]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", value)]
    graph = helper.make_graph(nodes, "stack", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def resident(key: str) -> int:
    """Bytes of this process by /proc: VmRSS now, VmHWM at the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def child(path: str, batch: int, recompute: bool, threads: int) -> None:
    """Measure one variant."""
    proto = onnx.load(path)
    entry = proto.graph.input[0]
    shape = [dim.dim_value or (batch if axis == 0 else 1) for axis, dim in enumerate(entry.type.tensor_type.shape.dim)]
    output = proto.graph.output[0].name
    built = with_loss(proto, [SquaredError(output, "teacher", relative=False)], shapes={entry.name: shape})
    wrt = [t.name for t in proto.graph.initializer if t.data_type in _FLOATS and len(t.dims) > 1]
    found = differentiate(built.proto, [built.loss], wrt, shapes={entry.name: shape}, recompute=recompute)
    session = open_session(found.proto, threads=threads)
    like = open_session(proto, threads=threads).run([output], {entry.name: to_value(np.zeros(shape, np.float32))})[0]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    feed = {entry.name: to_value(x), "teacher": like, found.cotangents[built.loss]: to_value(np.ones((), np.float32))}
    names = list(found.gradients.values())
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    results = session.run(names, feed)
    peak = resident("VmHWM") - before
    check = sum(float(np.abs(value.numpy()).sum()) for value in results)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        session.run(names, feed)
        seconds.append(time.perf_counter() - start)
    print(f"{peak / 1e6:9.1f} MB {min(seconds):8.3f} s  {len(found.recomputed):4} values recomputed  Σ|gradients| {check:.6g}")


def main() -> None:
    """Compare the variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=32, help="of the generated model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", choices=["keep", "recompute"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.model, options.batch, options.child == "recompute", options.threads)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = options.model
        if path is None:
            path = str(Path(folder) / "stack.onnx")
            onnx.save(generated(options.blocks), path)
        for variant in ("keep", "recompute"):
            arguments = ["--batch", str(options.batch), "--threads", str(options.threads), "--child", variant]
            done = subprocess.run([sys.executable, __file__, path, *arguments], capture_output=True, text=True, check=False)
            print(f"{variant:10}", done.stdout.strip() or done.stderr.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
