"""The options of the commands: how each is written, and what its help says. What the commands share stands here once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_BUDGETS = "Budgets (at least one)"
_WHAT = "What may change"
_HOW = "How it is measured"
_OUTPUT = "Output"

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX file; it is never changed.", show_default=False)]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="D",
        help="Samples: an .npz of input name → array, a folder of test_data_set_*, a .py file with samples(), or `random`.",
        show_default=False,
    ),
]
DataOrNone = Annotated[str | None, typer.Option("--data", metavar="D", help="Samples; see `intaglio compress --help`.", show_default=False)]
OutModel = Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="The .onnx file to write.", show_default=False)]
OutPlan = Annotated[Path, typer.Option("-o", "--output", metavar="PLAN", help="The .json file to write.", show_default=False)]
Size = Annotated[str | None, typer.Option(metavar="0.25|25%|4MB", help="Most bytes of the result.", rich_help_panel=_BUDGETS)]
Latency = Annotated[str | None, typer.Option(metavar="0.5|50%|3ms", help="Most time of one run.", rich_help_panel=_BUDGETS)]
Error = Annotated[
    str | None,
    typer.Option(
        metavar="0.01",
        help="Most divergence of the outputs on held-out samples: KL in nats for class scores, else relative MSE.",
        rich_help_panel=_BUDGETS,
    ),
]
Minimize = Annotated[
    str | None,
    typer.Option(
        metavar="size|latency|error",
        help="What to minimise within the budgets.  [default: error if a size or latency is given, else size]",
        rich_help_panel=_BUDGETS,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="lossless|compact",
        help="With --labels: the best held-out loss at --size, or the smallest model whose metric falls by at most --drop.",
        rich_help_panel=_BUDGETS,
    ),
]
Drop = Annotated[
    str | None,
    typer.Option(metavar="0.5", help="Most points that the metric of held-out --labels may fall by.", rich_help_panel=_BUDGETS),
]
Target = Annotated[str, typer.Option(metavar="cpu|cuda|mobile|web", help="Runtime that the result is for.", rich_help_panel=_WHAT)]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX", help="Change only weights whose name matches; may be repeated.", rich_help_panel=_WHAT),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="REGEX", help="Leave weights alone whose name matches; may be repeated.", rich_help_panel=_WHAT),
]
Decompositions = Annotated[
    str | None,
    typer.Option(metavar="A,B,…", help="Only these, e.g. `dense,lowrank`.  [default: all]", rich_help_panel=_WHAT),
]
Storages = Annotated[
    str | None,
    typer.Option(metavar="A,B,…", help="Only these, e.g. `int8,int4,planes3.0`.  [default: a choice of all]", rich_help_panel=_WHAT),
]
Arithmetics = Annotated[
    str | None,
    typer.Option(metavar="A,B,…", help="Besides float only these: integer, dynamic, nbits, rows.  [default: all]", rich_help_panel=_WHAT),
]
NoExpand = Annotated[
    bool, typer.Option("--no-expand", help="No weight that takes more memory once it is loaded than in the file.", rich_help_panel=_WHAT)
]
Integers = Annotated[
    str,
    typer.Option(
        metavar="auto|full|reduced|signed",
        help="Codes in integer kernels: 8 bits, weights of 7 (for processors that saturate), or signed activations.",
        rich_help_panel=_WHAT,
    ),
]
Ranges = Annotated[
    str,
    typer.Option(metavar="METHOD", help="Of quantized activations: auto, minmax, percentile, mse or entropy.", rich_help_panel=_WHAT),
]
Curvature = Annotated[
    str,
    typer.Option(metavar="SIDES", help="What weight errors are measured by: input, or both sides of a layer.", rich_help_panel=_WHAT),
]
Tune = Annotated[
    str | None,
    typer.Option(metavar="STEPS|auto", help="Tune the result against the original's outputs; kept only if it helps.", rich_help_panel=_HOW),
]
Augment = Annotated[
    str | None, typer.Option(metavar="A,B,…", help="Random changes of tuned images: flip, shift, crop, mixup.", rich_help_panel=_HOW)
]
TuneLabels = Annotated[
    float, typer.Option(metavar="W", help="Weight of --labels while tuning, against 1 for the original.", rich_help_panel=_HOW)
]
RoundsOption = Annotated[
    str | None,
    typer.Option("--rounds", metavar="N|auto", help="Approach --size and --latency in rounds, each with --tune.", rich_help_panel=_HOW),
]
Providers = Annotated[
    str, typer.Option(metavar="A,B,…", help="ONNX Runtime execution providers, in order of preference.", rich_help_panel=_HOW)
]
Threads = Annotated[int, typer.Option(metavar="N", help="Intra-op threads that latency is measured with.", rich_help_panel=_HOW)]
Labels = Annotated[str | None, typer.Option(metavar="KEY", help="The array of the data that holds labels.", rich_help_panel=_HOW)]
MetricName = Annotated[str, typer.Option("--metric", metavar="accuracy|mse", help="What labels are scored by.", rich_help_panel=_HOW)]
Loss = Annotated[
    str,
    typer.Option(metavar="NAME", help="What presets improve: cross-entropy, mse, or an output that holds a loss.", rich_help_panel=_HOW),
]
OutputKind = Annotated[
    str,
    typer.Option(metavar="auto|logits|probabilities|values", help="What the model's first output holds.", rich_help_panel=_HOW),
]
Samples = Annotated[int | None, typer.Option(metavar="N", help="Use at most this many samples.  [default: all]", rich_help_panel=_HOW)]
Seed = Annotated[int, typer.Option(metavar="N", help="Seed of every random choice.", rich_help_panel=_HOW)]
CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="DIR",
        help="Where measurements are kept.  [default: the user's cache folder]",
        rich_help_panel=_HOW,
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Keep no measurements between runs.", rich_help_panel=_HOW)]
ReportFolder = Annotated[
    Path | None,
    typer.Option("--report", metavar="DIR", help="Also write report.json and plan.json there.", rich_help_panel=_OUTPUT),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.", rich_help_panel=_OUTPUT)]
