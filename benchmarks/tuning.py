"""What tuning adds at five sizes: python benchmarks/tuning.py DIR --evaluator EVALUATE.py --task cifar_resnet [--steps 300] [--out OUT]

DIR holds the task's model and data. At each size the model is compressed in three ways: in closed form by the metric of inputs alone, in
closed form by both metrics (the default), and tuned for so many steps. Each result is judged by an evaluator that is not ours (see
`judging.py`), on test data that no choice has seen.

OUT gets the models, `table.csv`, `table.md`, and the curves as `curves.svg` and `curves.png`. Rows are written as they come, and a run
skips those that are there with the same options, so it may be made in pieces. `--extra` hands further options to `intaglio compress`.
Curves need the extra `benchmarks`.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from judging import DATA, NOISE_POINTS, compressed, judged
from rich.console import Console
from rich.table import Table

LESSONS = {**DATA, "cifar_resnet": "cifar_tune.npz", "cifar_vgg16": "cifar_tune.npz", "minilm": "minilm_tune.npz"}
"""Data of each task: more than statistics need, for tuning learns from what `--samples` leaves over."""

TICKS = (1.5, 2, 3, 4, 5, 7, 10, 15, 20, 30, 40, 50, 70, 100, 150, 200, 300, 500)
"""Where the axis of sizes is labelled."""

STYLES = (("#999999", "o", "--"), ("#0072b2", "s", "-"), ("#d55e00", "^", "-"))
"""Colour, marker and line of each way: told apart without colours, and by the colour-blind."""


@dataclass(frozen=True)
class Way:
    """A way to compress.

    Attributes:
        name: in the table.
        short: in names of files.
        options: of `intaglio compress`.
    """

    name: str
    short: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
        task: that it is judged on.
        way: name of the way.
        size: budget, as a share of the original.
        options: of `intaglio compress`, the way's own and the common ones.
        bytes: of the model.
        reference_bytes: of the original.
        metric: of the model, on the task.
        points: the metric against the original's.
        divergence: that our verdict measured, on held-out samples of the data.
        speed: times as fast as the original, on one thread.
        seconds: that compressing took.
    """

    task: str
    way: str
    size: float
    options: str
    bytes: int
    reference_bytes: int
    metric: float
    points: float
    divergence: float
    speed: float
    seconds: float

    @property
    def smaller(self) -> float:
        """Times smaller than the original."""
        return self.reference_bytes / self.bytes

    @property
    def key(self) -> tuple[str, str, float, str]:
        """What has to be the same for a row to be skipped."""
        return self.task, self.way, self.size, self.options

    def cells(self) -> tuple[str, ...]:
        """As in `COLUMNS`."""
        return (
            f"{self.size:g}",
            self.way,
            f"{self.bytes:,}",
            f"{self.smaller:.2f}×",
            f"{self.metric:.2f}",
            f"{self.points:+.2f}",
            f"{self.divergence:.4g}",
            f"{self.speed:.2f}×",
            f"{self.seconds:.0f}",
        )


COLUMNS = ("size", "way", "bytes", "smaller", "metric", "points", "divergence", "speed", "seconds")


def ways(steps: int) -> tuple[Way, ...]:
    """The ways that are compared."""
    return (
        Way("inputs' metric", "inputs", ("--curvature", "input")),
        Way("both metrics", "both", ()),
        Way(f"tuned, {steps} steps", f"tuned{steps}", ("--tune", str(steps))),
    )


# --- rows on disk


def read_rows(path: Path) -> list[Row]:
    """The rows of a table of an earlier run; none if there was none."""
    if not path.exists():
        return []
    types = {"size": float, "bytes": int, "reference_bytes": int, "task": str, "way": str, "options": str}
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**{name: types.get(name, float)(text) for name, text in row.items()}) for row in csv.DictReader(file)]


def append_row(path: Path, row: Row) -> None:
    """Add a row to a table on disk."""
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        if fresh:
            writer.writeheader()
        writer.writerow(asdict(row))


# --- what is made of them


def title(rows: Sequence[Row]) -> str:
    """Of a table or picture of one task."""
    first = rows[0]
    noise = f", noise of points ±{NOISE_POINTS[first.task]}" if first.task in NOISE_POINTS else ""
    return f"{first.task}: original {first.reference_bytes:,} bytes, metric {first.metric - first.points:.2f}{noise}"


def table(rows: Sequence[Row]) -> Table:
    """For the terminal."""
    shown = Table(title=title(rows))
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "way" else "right")
    for before, row in zip((None, *rows), rows, strict=False):
        if before is not None and before.size != row.size:
            shown.add_section()
        shown.add_row(*row.cells())
    return shown


def markdown(rows: Sequence[Row]) -> str:
    """For a document."""
    lines = [COLUMNS, tuple("---" if column == "way" else "--:" for column in COLUMNS), *(row.cells() for row in rows)]
    return f"{title(rows)}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def draw(rows: Sequence[Row], names: Sequence[str], paths: Sequence[Path]) -> None:
    """Draw points of the metric over how many times smaller the models are, one line per way.

    Args:
        rows: of one task.
        names: of the ways, in order.
        paths: files to write; their suffixes name the formats.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.5), layout="constrained")
    axes = figure.subplots()
    noise = NOISE_POINTS.get(rows[0].task)
    if noise is not None:
        axes.axhspan(-noise, noise, color="#000000", alpha=0.07, linewidth=0, label=f"noise, ±{noise} points")
    axes.axhline(0, color="#000000", linewidth=0.8)
    for name, (colour, marker, line) in zip(names, STYLES, strict=True):
        found = sorted((row.smaller, row.points) for row in rows if row.way == name)
        axes.plot(*zip(*found, strict=True) if found else ([], []), color=colour, marker=marker, linestyle=line, label=name)
    low, high = min(row.smaller for row in rows) / 1.15, max(row.smaller for row in rows) * 1.15
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(ticks, [f"{tick:g}×" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("times smaller than the original")
    axes.set_ylabel("metric against the original's, points")
    axes.set_title(rows[0].task)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="lower left", frameon=False)
    for path in paths:
        figure.savefig(path, dpi=150)


# --- the command


def main() -> None:
    """Read the options, fill the table, print and draw it."""
    options = _options()
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("the curves need Matplotlib: install the extra `benchmarks`")
    console = Console(width=150)
    compared, rows = ways(options.steps), _filled(options, console)
    if not rows:
        sys.exit("no model was made")
    console.print(table(rows))
    options.out.joinpath("table.md").write_text(markdown(rows), encoding="utf-8")
    draw(rows, [way.name for way in compared], [options.out / "curves.svg", options.out / "curves.png"])
    console.print(f"wrote {options.out}/ table.csv, table.md, curves.svg, curves.png", soft_wrap=True, highlight=False, markup=False)
    missing = len(options.sizes) * len(compared) - len(rows)
    if missing:
        sys.exit(f"{missing} models were not made; a further run tries them again")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split(":")[0])
    parser.add_argument("folder", metavar="DIR", type=Path, help="holds TASK.onnx and its data")
    parser.add_argument("--evaluator", type=Path, required=True, help="the judge's script")
    parser.add_argument("--task", default="cifar_resnet", help="that the evaluator knows")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.2, 0.1, 0.05, 0.03, 0.02], help="shares of the original's bytes")
    parser.add_argument("--steps", type=int, default=300, help="of tuning")
    parser.add_argument("--samples", type=int, default=512, help="for statistics, choices and verdict; tuning learns from the rest")
    parser.add_argument("--data", help="file in DIR; the task's own by default")
    parser.add_argument("--extra", default="", metavar="OPTIONS", help='of `intaglio compress`, as in --extra "--latency 0.3"')
    parser.add_argument("--pairs", type=int, default=15, help="of the evaluator's timings")
    parser.add_argument("--out", type=Path, default=Path("build/tuning"), help="folder of the results")
    options = parser.parse_args()
    options.data = options.data or LESSONS.get(options.task)
    if options.data is None:
        parser.error(f"the data of task {options.task} is not known; name its file by --data")
    return options


def _filled(options: argparse.Namespace, console: Console) -> list[Row]:
    """Rows by size and way: those that an earlier run left, and new ones for the rest; failures are left out."""
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "table.csv"
    known = {row.key: row for row in read_rows(path)}
    rows = []
    for size in options.sizes:
        for way in ways(options.steps):
            extra = [*way.options, "--samples", str(options.samples), *shlex.split(options.extra)]
            row = known.get((options.task, way.name, size, _named(options, extra))) or _made(options, way, size, extra, console)
            if row is None:
                continue
            if row.key not in known:
                append_row(path, row)
            rows.append(row)
    return rows


def _named(options: argparse.Namespace, extra: Sequence[str]) -> str:
    """Options as rows have them."""
    return shlex.join(["--data", options.data, *extra])


def _made(options: argparse.Namespace, way: Way, size: float, extra: Sequence[str], console: Console) -> Row | None:
    """Compress and ask the judge; None where no model meets the budgets."""
    source, data = options.folder / f"{options.task}.onnx", options.folder / options.data
    model = options.out / f"{options.task}-{way.short}-{size:g}.onnx"
    start = time.perf_counter()
    report = compressed(source, model, data, ["--size", str(size), *extra], console)
    seconds = time.perf_counter() - start
    if report is None:
        return None
    found = judged(options.evaluator, options.task, model, options.folder, threads=(1,), pairs=options.pairs)
    divergence = float(report["divergence"]["measured"])
    return Row(
        options.task,
        way.name,
        size,
        _named(options, extra),
        found.bytes,
        found.reference_bytes,
        found.metric,
        found.points,
        divergence,
        found.speeds[1],
        round(seconds, 1),
    )


if __name__ == "__main__":
    main()
