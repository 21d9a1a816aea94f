"""Throughput of a tuning step beside PyTorch's: python benchmarks/throughput.py MODEL --data DATA [--size 0.1] [--torch-python PATH]

The model is planned and fitted for the size, and a student is made of the plan as `--tune` does. Our step is what tuning repeats: collect
the batch and the teacher's answers, round the parameters to what can be written, run loss and reverse pass in ONNX Runtime, pull the
gradients back, and move the parameters by Adam. PyTorch's is a step on the same student: its graph is run node by node by the functions
of torch (`torch_nodes.py`), with the same factors, the same fake quantization, the same loss on the same batch, and PyTorch's fused Adam.
It runs in a process of its own (`torch_student.py`), so PyTorch need not be installed beside this package.

First, losses and gradients of the two are compared; then they take turns, and the ratio is the median over pairs of steps.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from threadpoolctl import threadpool_limits

from intaglio.passes.adam import Adam
from intaglio.passes.analyse import analyse
from intaglio.passes.bases import Bases
from intaglio.passes.budget import Request, resolve
from intaglio.passes.build import fit_forms
from intaglio.passes.cache import Cache
from intaglio.passes.course import open_course
from intaglio.passes.errors import IntaglioError
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.latent import Levelled, Plain, Rounded, Tabled
from intaglio.passes.options import Runtime
from intaglio.passes.plan import Correction, Plan
from intaglio.passes.prepare import equalized
from intaglio.passes.scores import floored
from intaglio.passes.student import Parameter, Student, make_student
from intaglio.passes.tune_options import TuneOptions
from intaglio.passes.tuning import lessons_of
from intaglio.passes.within import plan_within

TARGET = 0.7
"""Of PyTorch's throughput."""

LOSS_TOLERANCE = 1e-2
GRADIENT_TOLERANCE = 1e-2
"""Most relative difference of losses, and of gradients in units of the whole gradient's length beyond what `SHAKE` explains. Both halves
compute in float32 and sum in other orders; a wrong rule is off by a tenth and more."""

SHAKE = 1e-6
SHAKEN = 2.0
"""Where activations are rounded, a difference in the last bits takes some to the next level, and these take others. So gradients may differ
by so many times what a relative change of the inputs by `SHAKE` makes of ours."""

SCATTER = 0.3
"""How far parameters are moved before the halves are compared, as a share of each array's root mean square."""

RATE = 1e-3
"""Of our steps, as a share of each array's root mean square: that of usual runs, because codes that change have to be kept within their
bytes."""

Float32 = np.ndarray[Any, np.dtype[np.float32]]


# --- ours


def planned(job: Job, request: Request) -> tuple[Job, Plan]:
    """A plan, and the job that it was made for: with floors and equalized where the budget asks for integers and that helps."""
    timed = request.latency is not None
    if timed:
        job = equalized(floored(job))
    menu = analyse(job, Cache(job.settings.cache), latency=timed)
    budget = resolve(request, job.original.size_bytes, menu.base)
    return job, plan_within(job, menu, budget, Correction(), job.sizes())


class OurHalf:
    """A course as `tune` opens it, always at its first step's lessons."""

    def __init__(self, job: Job, student: Student, batch: int) -> None:
        """Open it.

        Args:
            job: runs on the threads of its calibration.
            student: made of the job.
            batch: samples of a step.

        Raises:
            SystemExit: the student cannot be taught.
        """
        self.options = TuneOptions(batch=batch)
        course = open_course(job, student, self.options, lessons_of(job))
        if isinstance(course, str):
            raise SystemExit(f"the student cannot be tuned: {course}")
        self.course = course
        self._adam = Adam(course.flat, course.units, self.options.adam, Bases(course.blocks))

    def scatter(self) -> None:
        """Move all parameters at random: where student and teacher all but agree, gradients are noise that nothing can be compared with."""
        noise = np.random.default_rng(0).standard_normal(len(self.course.flat), np.float32)
        self.course.flat[...] += SCATTER * self.course.units * noise
        self.course.learner.project()  # brings what lies beyond the outermost levels back

    def restart(self) -> None:
        """Put the parameters back."""
        self.course.flat[...] = self.course.student.start()

    def learn(self) -> float:
        """The loss; `course.gradient` holds its gradient."""
        return self.course.learn(0)

    def shaken(self) -> float:
        """How far the gradient goes, in units of its length, when inputs change in their last bits."""
        self.learn()
        gradient = self.course.gradient.copy()
        feeds = []
        for lesson in self.course.lessons.at(0):
            feed = {name: array * array.dtype.type(1 + SHAKE) if array.dtype.kind == "f" else array for name, array in lesson.feed.items()}
            feeds.append(self.course.fed(replace(lesson, feed=feed)))
        self.course.learner.learn(feeds)
        return float(np.linalg.norm(self.course.gradient - gradient) / np.linalg.norm(gradient))

    def step(self) -> float:
        """Make a step; its seconds."""
        start = time.perf_counter()
        self.learn()
        self._adam.step(self.course.gradient, RATE)
        return time.perf_counter() - start


# --- PyTorch's


class TorchHalf:
    """The process that runs the same student in PyTorch."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        """Wait until it is ready.

        Args:
            process: of `torch_student.py`.
            folder: that the student lies in.
        """
        self._process, self._folder = process, folder
        self.version = self._answer()

    def check(self) -> tuple[float, Float32]:
        """The loss and its gradient, flat."""
        self._ask("check")
        with np.load(self._folder / "torch.npz") as file:
            return float(file["loss"]), file["gradient"]

    def step(self) -> float:
        """Make a step; its seconds."""
        return float(self._ask("step"))

    def _ask(self, command: str) -> str:
        assert self._process.stdin is not None  # it was opened with a pipe
        self._process.stdin.write(command + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None  # it was opened with a pipe
        line = self._process.stdout.readline().strip()
        if not line:
            raise SystemExit(self._process.wait() or 1)  # it has said why
        return line


def check_torch(python: str) -> None:
    """Find out whether an interpreter has PyTorch, before anything costly is done.

    Raises:
        SystemExit: it has not, or there is no such interpreter.
    """
    try:
        status = subprocess.run([python, str(Path(__file__).with_name("torch_nodes.py"))], check=False).returncode
    except OSError as error:
        raise SystemExit(f"--torch-python {python}: {error.strerror}") from error
    if status != 0:
        raise SystemExit(status)  # it has said why


@contextmanager
def torch_half(python: str, half: OurHalf, threads: int) -> Iterator[TorchHalf]:
    """Hand our student over to a process with PyTorch.

    Args:
        python: an interpreter that has torch, onnx and NumPy.
        half: ours, scattered.
        threads: of the process.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        hand_over(half, folder)
        command = [python, str(Path(__file__).with_name("torch_student.py")), scratch, "--threads", str(threads)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}  # idle threads must not slow ours
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        try:
            yield TorchHalf(process, folder)
        finally:
            assert process.stdin is not None  # it was opened with a pipe
            process.stdin.close()  # ends it
            process.wait()


def hand_over(half: OurHalf, folder: Path) -> None:
    """Write the student, what its parameters are rounded to, and one step's lessons; `torch_student.py` says how."""
    course, student = half.course, half.course.student
    arrays: dict[str, np.ndarray] = {}

    def kept(prefix: str, parts: dict[str, Any]) -> dict[str, str]:
        arrays.update({f"{prefix}.{part}": np.asarray(array) for part, array in parts.items()})
        return {part: f"{prefix}.{part}" for part in parts}

    parameters = []
    for number, each in enumerate(student.parameters.values()):
        facts, parts = described(each, course.flat[each.part])
        parameters.append({"name": each.name, "rounded_axis": each.axis, **facts, "arrays": kept(f"parameter{number}", parts)})
    lessons = [
        {"feed": kept(f"feed{number}", dict(lesson.feed)), "answers": kept(f"answer{number}", dict(lesson.answers))}
        for number, lesson in enumerate(course.lessons.at(0))
    ]
    outputs = [value.name for value in student.model.proto.graph.output]
    kinds = {name: kind.value for name, kind in zip(outputs, student.job.kinds, strict=True)}
    adam = half.options.adam
    facts = {"parameters": parameters, "lessons": lessons, "kinds": kinds, "momentum": adam.momentum, "memory": adam.memory}
    onnx.save(student.model.proto, folder / "student.onnx")
    np.savez(folder / "arrays.npz", **arrays)  # type: ignore[arg-type]  # its stub takes the arrays for `allow_pickle`
    (folder / "student.json").write_text(json.dumps(facts))


def described(parameter: Parameter, values: Float32) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a parameter is rounded to, as numbers and names, and as arrays.

    Args:
        parameter: of the student.
        values: of its latent, within the outermost levels.

    Raises:
        SystemExit: PyTorch's half does not know its kind.
    """
    latent = parameter.latent
    if isinstance(latent, Plain):
        return {"kind": "plain", "dtype": latent.dtype.name}, {"values": values.reshape(latent.shape)}
    if isinstance(latent, Rounded):
        grid, start = latent.grid, _unshortened(latent, values)
        return {"kind": "grid", "lowest": grid.lowest, "highest": grid.highest}, {"values": start, "scale": grid.scale, "zero": grid.zero}
    if isinstance(latent, Levelled):
        levels = latent.packed[1].astype(np.float32)
        return {"kind": "levels"}, {"values": values.reshape(latent.shape), "levels": levels, "scale": latent.scale}
    if isinstance(latent, Tabled):
        return {"kind": "table"}, {"values": values, "places": latent.places, "scale": latent.scale}
    raise SystemExit(f"PyTorch's half does not know how {parameter.name} is rounded: {type(latent).__name__}")


def _unshortened(latent: Rounded, values: Float32) -> Float32:
    """Values that plain rounding takes to where the latent takes the given ones: codes that were shortened to fit start at their levels."""
    shaped, projected = values.reshape(latent.shape).copy(), np.empty(latent.shape, np.float32)
    latent.project(values.copy(), projected)
    nearest = latent.grid.values(latent.grid.nearest(shaped))
    return np.where(nearest == projected, shaped, projected)


# --- both


@dataclass(frozen=True)
class Agreement:
    """How far two halves are apart.

    Attributes:
        loss: of ours.
        loss_off: relative difference of the losses.
        gradient_off: length of the difference of the gradients, in units of the gradient's length.
        shaken: the same of our gradient and ours at inputs that differ in their last bits.
        worst: name of the parameter with the greatest share in the difference.
    """

    loss: float
    loss_off: float
    gradient_off: float
    shaken: float
    worst: str

    @staticmethod
    def of(ours: OurHalf, torch: TorchHalf) -> Agreement:
        """Of scattered halves, before the first step of either."""
        shaken, loss, gradient = ours.shaken(), ours.learn(), ours.course.gradient
        other, found = torch.check()
        off = {each.name: np.linalg.norm(found[each.part] - gradient[each.part]) for each in ours.course.student.parameters.values()}
        gradient_off = float(np.linalg.norm(found - gradient) / np.linalg.norm(gradient))
        return Agreement(loss, abs(other - loss) / abs(loss), gradient_off, shaken, max(off, key=lambda name: off[name]))

    @property
    def holds(self) -> bool:
        """Whether they compute the same; not if anything is no number."""
        return self.loss_off <= LOSS_TOLERANCE and self.gradient_off <= GRADIENT_TOLERANCE + SHAKEN * self.shaken


def timed_pairs(ours: OurHalf, torch: TorchHalf, pairs: int) -> Float32:
    """(pairs, 2): seconds of our step and of PyTorch's, which take turns in going first; after one of each to warm up."""
    steps = (ours.step, torch.step)
    found = np.zeros((pairs + 1, 2), np.float32)
    for pair, row in enumerate(found):
        for half in (0, 1) if pair % 2 else (1, 0):
            row[half] = steps[half]()
    return found[1:]


def main(
    model: str,
    data: Annotated[str, typer.Option(help="Samples, as `intaglio compress --data` takes them.")],
    batch: Annotated[int, typer.Option(help="Samples of a step.")] = 64,
    threads: Annotated[int, typer.Option(help="Of each half.")] = 1,
    size: Annotated[str, typer.Option(help="Budget of the plan.")] = "0.1",
    latency: Annotated[str | None, typer.Option(help="Budget of the plan; brings layers in integers, and so fake quantization.")] = None,
    decompositions: Annotated[str, typer.Option(help="Forms that race; all by default.")] = "",
    storages: Annotated[str, typer.Option(help="Storages that race; a choice of all by default.")] = "",
    samples: Annotated[int, typer.Option(help="Samples that the plan is made of.")] = 512,
    pairs: Annotated[int, typer.Option(help="Pairs of steps that are timed.")] = 15,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps measurements for the next run.")] = None,
    torch_python: Annotated[str, typer.Option(help="A Python that has torch, onnx and NumPy.")] = sys.executable,
) -> None:
    """Print both throughputs and their ratio."""
    check_torch(torch_python)
    settings = Settings(
        runtime=Runtime(threads=threads),
        decompositions=tuple(filter(None, decompositions.split(","))),
        storages=tuple(filter(None, storages.split(","))),
        samples=samples,
        cache=cache,
        curvature="input",  # the cost of a step does not depend on it
    )
    try:
        job, plan = planned(open_job(model, data, settings), Request(size=size, latency=latency))
        if job.external:
            raise SystemExit(f"{model} keeps its weights in other files: give a model that is one file")
        fitted = fit_forms(job, plan.forms, keep=True)
    except IntaglioError as error:
        raise SystemExit(f"error: {error}") from error
    job = replace(job, calibration=replace(job.calibration, threads=threads))
    student = make_student(job, plan.forms, fitted, scales=False)  # PyTorch's half keeps the grids
    with threadpool_limits(limits=threads, user_api="blas"):
        half = OurHalf(job, student, batch)
        half.scatter()
        with torch_half(torch_python, half, threads) as torch:
            report(half, torch, batch, pairs)


def report(half: OurHalf, torch: TorchHalf, batch: int, pairs: int) -> None:
    """Check, time and print.

    Raises:
        SystemExit: the halves do not compute the same.
    """
    student = half.course.student
    rounded = sum(node.op_type == "QuantizeLinear" for node in student.model.proto.graph.node)
    print(f"student          {student.count:,} entries, {len(student.parameters)} parameters, {rounded} fake quantizations; batch {batch}")
    found = Agreement.of(half, torch)
    print(f"loss             {found.loss:.6g}, relative difference {found.loss_off:.1e}")
    print(f"gradients        relative difference {found.gradient_off:.1e}, most of it in {found.worst}")
    print(f"                 ours with inputs changed by {SHAKE:g}: {found.shaken:.1e}")
    if not found.holds:
        allowed = GRADIENT_TOLERANCE + SHAKEN * found.shaken
        raise SystemExit(f"the halves differ by more than {LOSS_TOLERANCE:g} of the loss or {allowed:.2g} of the gradient")
    half.restart()
    seconds = timed_pairs(half, torch, pairs)
    for name, value in zip(("Intaglio", torch.version), np.median(seconds, axis=0), strict=True):
        print(f"{name:16} {value:.4f} s a step, {batch / value:.1f} samples/s")
    low, ratio, high = np.percentile(seconds[:, 1] / seconds[:, 0], (25, 50, 75))
    verdict = "reached" if ratio >= TARGET else "missed"
    print(f"throughput ratio {ratio:.2f} of PyTorch's (quartiles {low:.2f} to {high:.2f}, {pairs} pairs); target {TARGET:g}: {verdict}")


if __name__ == "__main__":
    typer.run(main)
