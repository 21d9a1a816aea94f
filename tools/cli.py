"""The command line: one verb each; every verb's docstring is its help.

Nothing heavy is imported before a verb runs. Results go to stdout, as tables or with --json as one JSON document; progress and
errors go to stderr. An error is one line; `INTAGLIO_DEBUG=1` shows where an unexpected one comes from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.console import Console, RenderableType

from intaglio import __version__
from intaglio.passes.errors import InputError, IntaglioError, VerificationError

from .files import check_folder, check_output, write_text
from .options import (
    Arithmetics,
    Augment,
    CacheFolder,
    Curvature,
    Data,
    DataOrNone,
    Decompositions,
    Drop,
    Error,
    Exclude,
    Include,
    Integers,
    Json,
    Labels,
    Latency,
    Loss,
    MetricName,
    Minimize,
    Model,
    NoCache,
    NoExpand,
    OutModel,
    OutPlan,
    OutputKind,
    Preset,
    Providers,
    Ranges,
    ReportFolder,
    RoundsOption,
    Samples,
    Seed,
    Size,
    Storages,
    Target,
    Threads,
    Tune,
    TuneLabels,
)

if TYPE_CHECKING:
    from intaglio.passes.budget import Request
    from intaglio.passes.facts import Report
    from intaglio.passes.job import Settings
    from intaglio.passes.report import Result
    from intaglio.solver import Quantity

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

(_UsageError,) = typer.BadParameter.__bases__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

CPU = "CPUExecutionProvider"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    try:
        status = typer.main.get_command(app).main(args=arguments, prog_name="intaglio", standalone_mode=False)
    except IntaglioError as error:
        return _fail(error.exit_status, str(error))
    except (KeyboardInterrupt, typer.Abort):  # which of them, or a status, depends on Typer's version
        status = INTERRUPTED
    except MemoryError:
        return _fail(1, "out of memory; give fewer --samples, or free memory")
    except Exception as error:
        if isinstance(error, _UsageError):
            return _fail(InputError.exit_status, _usage(error)) if str(error) else InputError.exit_status  # help was printed
        if os.environ.get("INTAGLIO_DEBUG") == "1":
            raise
        text = f"{type(error).__name__}: {error}"
        return _fail(1, f"unexpected: {text[:500]}; set INTAGLIO_DEBUG=1 to see where, and report it")
    if status == INTERRUPTED:
        return _fail(INTERRUPTED, "interrupted; no file was left half-written, and a rerun uses what is cached")
    return int(status or 0)


def _fail(status: int, message: str) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return status


def _usage(error: Exception) -> str:
    """Typer's words about a wrong command line, and where the right ones are."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "intaglio"
    return f"{error.format_message().rstrip('.')}; see `{command} --help`"  # type: ignore[attr-defined]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"intaglio {__version__}")
        raise typer.Exit


@app.callback()
def intaglio(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    """Shrink ONNX models within a size, latency or error budget.

    Exit status: 0 done and verified · 1 internal error · 2 bad input · 3 infeasible budget · 4 verification failed.
    With 2, 3 and 4 nothing is written.
    """


@app.command()
def inspect(
    model: Model,
    data: DataOrNone = None,
    providers: Providers = CPU,
    threads: Threads = 1,
    include: Include = None,
    exclude: Exclude = None,
    samples: Samples = None,
    seed: Seed = 0,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    json: Json = False,
) -> None:
    """Show what is compressible, and where bytes, work and time go.

    With data, latency is measured and ranks are those of the weights as the data sees them.
    """
    from intaglio.passes.inspect import inspect_job, inspect_model
    from intaglio.passes.job import open_job

    from . import render
    from .progress import shown

    settings = _settings(
        providers=providers, threads=threads, include=include, exclude=exclude, samples=samples, seed=seed,
        cache=cache, no_cache=no_cache,
    )  # fmt: skip
    with shown(f"Inspecting {model.name}", enabled=not json) as progress:
        if data is None:
            found = inspect_model(model, settings.include, settings.exclude, progress=progress)
        else:
            found = inspect_job(open_job(model, data, settings), progress=progress)
    _emit(found, render.inspection(found), json)


@app.command()
def compress(
    model: Model,
    output: OutModel,
    data: Data,
    size: Size = None,
    latency: Latency = None,
    error: Error = None,
    minimize: Minimize = None,
    preset: Preset = None,
    drop: Drop = None,
    target: Target = "cpu",
    include: Include = None,
    exclude: Exclude = None,
    decompositions: Decompositions = None,
    storages: Storages = None,
    arithmetics: Arithmetics = None,
    no_expand: NoExpand = False,
    integers: Integers = "auto",
    ranges: Ranges = "auto",
    curvature: Curvature = "both",
    tune: Tune = None,
    augment: Augment = None,
    tune_labels: TuneLabels = 0.0,
    rounds: RoundsOption = None,
    providers: Providers = CPU,
    threads: Threads = 1,
    labels: Labels = None,
    metric: MetricName = "accuracy",
    loss: Loss = "cross-entropy",
    output_kind: OutputKind = "auto",
    samples: Samples = None,
    seed: Seed = 0,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    report: ReportFolder = None,
    json: Json = False,
) -> None:
    """Shrink MODEL within a budget and write it to OUT.

    Budgets hold on the written file and on samples that took no part in any choice; otherwise nothing is written.

    Example: `intaglio compress model.onnx -o small.onnx --data calib.npz --size 0.25`
    """
    from intaglio.passes.check import check_together
    from intaglio.passes.job import open_job
    from intaglio.passes.presets import compress as compress_job
    from intaglio.passes.report import Result

    from .progress import shown

    request = _request(size, latency, error, minimize, preset, drop)
    settings = _settings(
        target=target, providers=providers, threads=threads, labels=labels, metric=metric, loss=loss, kind=output_kind,
        include=include, exclude=exclude, decompositions=decompositions, storages=storages, arithmetics=arithmetics,
        no_expand=no_expand, integers=integers, ranges=ranges, curvature=curvature, tune=tune, augment=augment, tune_labels=tune_labels,
        rounds=rounds,
        samples=samples, seed=seed, cache=cache, no_cache=no_cache, output=output,
    )  # fmt: skip
    check_together(request, settings)
    _check_outputs(output, report, [model, Path(data)])
    with shown(f"Compressing {model.name}", enabled=not json) as progress:
        result = Result(compress_job(open_job(model, data, settings), request, progress=progress))
        written = result.save(output)
    _finish(result, written, output, report, json)


@app.command()
def plan(
    model: Model,
    output: OutPlan,
    data: DataOrNone = None,
    reuse: Annotated[
        Path | None,
        typer.Option(metavar="PLAN", help="Solve this plan of the same model again for another budget; needs no data."),
    ] = None,
    size: Size = None,
    latency: Latency = None,
    error: Error = None,
    minimize: Minimize = None,
    target: Target = "cpu",
    include: Include = None,
    exclude: Exclude = None,
    decompositions: Decompositions = None,
    storages: Storages = None,
    arithmetics: Arithmetics = None,
    no_expand: NoExpand = False,
    integers: Integers = "auto",
    ranges: Ranges = "auto",
    curvature: Curvature = "both",
    providers: Providers = CPU,
    threads: Threads = 1,
    output_kind: OutputKind = "auto",
    samples: Samples = None,
    seed: Seed = 0,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    json: Json = False,
) -> None:
    """Choose a form for every weight of MODEL and write the choice to PLAN, without building anything.

    A plan is JSON: it can be read, edited, applied, and with `--reuse` solved again for another budget in no time.
    """
    from intaglio.passes.job import open_job
    from intaglio.passes.margins import margins
    from intaglio.passes.plan import read_plan, to_json
    from intaglio.passes.replan import plan_job, replan

    from . import render
    from .progress import shown

    request = _request(size, latency, error, minimize)
    settings = _settings(
        target=target, providers=providers, threads=threads, kind=output_kind, include=include, exclude=exclude,
        decompositions=decompositions, storages=storages, arithmetics=arithmetics, no_expand=no_expand, integers=integers, ranges=ranges,
        curvature=curvature, samples=samples, seed=seed, cache=cache, no_cache=no_cache,
    )  # fmt: skip
    check_output(output, ".json", [model, *([reuse] if reuse else [])])
    with shown(f"Planning {model.name}", enabled=not json) as progress:
        if reuse is not None:
            if any((include, exclude, decompositions, storages, arithmetics, no_expand)) or (target, integers) != ("cpu", "auto"):
                raise InputError(
                    "plan: --reuse solves a plan's own menu again; --target, --integers and what may change have no effect, leave them out"
                )
            solved = replan(model, read_plan(reuse), request)
        elif data is not None:
            solved = plan_job(open_job(model, data, settings), request, progress=progress)
        else:
            raise InputError("plan: neither --data nor --reuse is given; give samples, or a plan to solve again")
    write_text(output, to_json(solved))
    if json:
        print(to_json(solved))
    else:
        console = Console()
        console.print(render.plan_table(solved, margins(solved)))
        console.print(f"wrote {output}", highlight=False, soft_wrap=True, markup=False)


@app.command()
def apply(
    model: Model,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A plan of this model, perhaps edited.", show_default=False)],
    output: OutModel,
    data: Data,
    ranges: Ranges = "auto",
    curvature: Curvature = "both",
    providers: Providers = CPU,
    threads: Threads = 1,
    labels: Labels = None,
    metric: MetricName = "accuracy",
    output_kind: OutputKind = "auto",
    samples: Samples = None,
    seed: Seed = 0,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    report: ReportFolder = None,
    json: Json = False,
) -> None:
    """Rewrite MODEL by PLAN, fit it to the data, verify it, and write it to OUT.

    A plan as it was solved must keep its budget; one whose forms were edited is written as it is, and the report tells.
    """
    from intaglio.passes.apply import apply_plan
    from intaglio.passes.job import open_job
    from intaglio.passes.plan import read_plan
    from intaglio.passes.report import Result

    from .progress import shown

    settings = _settings(
        ranges=ranges, curvature=curvature, providers=providers, threads=threads, labels=labels, metric=metric, kind=output_kind,
        samples=samples, seed=seed, cache=cache, no_cache=no_cache, output=output,
    )  # fmt: skip
    _check_outputs(output, report, [model, plan, Path(data)])
    chosen = read_plan(plan)
    with shown(f"Applying {plan.name}", enabled=not json) as progress:
        result = Result(apply_plan(open_job(model, data, settings), chosen, progress=progress))
        written = result.save(output)
    _finish(result, written, output, report, json)


@app.command()
def verify(
    reference: Annotated[Path, typer.Argument(metavar="REFERENCE", help="The original.", show_default=False)],
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The model to judge.", show_default=False)],
    data: Data,
    error: Annotated[str | None, typer.Option(metavar="0.01", help="Most divergence; exit status 4 if there is more.")] = None,
    providers: Providers = CPU,
    threads: Threads = 1,
    labels: Labels = None,
    metric: MetricName = "accuracy",
    output_kind: OutputKind = "auto",
    samples: Samples = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Compare the outputs, size and metric of MODEL with those of REFERENCE on all samples."""
    from intaglio.passes.judge import verify_models

    from . import render
    from .progress import shown

    limit = None if error is None else float(cast(str, _request(None, None, error, None).error))
    settings = _settings(
        providers=providers, threads=threads, labels=labels, metric=metric, kind=output_kind, samples=samples, seed=seed,
        no_cache=True,
    )  # fmt: skip
    with shown(f"Verifying {model.name}", enabled=not json) as progress:
        found = verify_models(reference, model, data, settings, error=limit, progress=progress)
    _emit(found, render.verdict(found), json)
    if found.status == "missed":
        measured = found.divergence
        raise VerificationError(
            f"{model}: divergence {measured.measured:.4g} {measured.unit} on {measured.samples} samples "
            f"is over --error {error}; compress with a smaller --error, or allow more"
        )


@app.command()
def bench(
    models: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL", help="The reference, and models with its inputs.", show_default=False),
    ],
    data: Data,
    providers: Providers = CPU,
    threads: Threads = 1,
    pairs: Annotated[int, typer.Option(metavar="N", help="How often each two are measured after one another.")] = 25,
    json: Json = False,
) -> None:
    """Time every further MODEL against the first, in alternation and in fresh sessions, on the first sample."""
    from intaglio.passes.judge import bench_models

    from . import render
    from .progress import shown

    settings = _settings(providers=providers, threads=threads, no_cache=True)
    with shown("Timing", enabled=not json) as progress:
        found = bench_models(models, data, settings.runtime, pairs=pairs, progress=progress)
    _emit(found, render.benchmark(found), json)


def _request(
    size: str | None,
    latency: str | None,
    error: str | None,
    minimize: str | None,
    preset: str | None = None,
    drop: str | None = None,
) -> Request:
    from intaglio.passes.budget import Request
    from intaglio.passes.check import check_request

    request = Request(size, latency, error, cast("Quantity | None", minimize), preset, drop)
    check_request(request)
    return request


def _settings(
    *,
    target: str = "cpu",
    providers: str = CPU,
    threads: int = 1,
    labels: str | None = None,
    metric: str = "accuracy",
    loss: str = "cross-entropy",
    kind: str = "auto",
    include: list[str] | None = None,
    exclude: list[str] | None = None,
    decompositions: str | None = None,
    storages: str | None = None,
    arithmetics: str | None = None,
    no_expand: bool = False,
    integers: str = "auto",
    ranges: str = "auto",
    curvature: str = "both",
    tune: str | None = None,
    augment: str | None = None,
    tune_labels: float = 0.0,
    rounds: str | None = None,
    samples: int | None = None,
    seed: int = 0,
    cache: Path | None = None,
    no_cache: bool = False,
    output: Path | None = None,
) -> Settings:
    from intaglio.passes.cache import default_folder
    from intaglio.passes.check import check_settings
    from intaglio.passes.job import Settings
    from intaglio.passes.options import Runtime

    settings = Settings(
        target=target,
        runtime=Runtime(_names(providers), threads),
        labels=labels,
        metric=metric,
        loss=loss,
        kind=kind,
        include=tuple(include or ()),
        exclude=tuple(exclude or ()),
        decompositions=_names(decompositions),
        storages=_names(storages),
        arithmetics=_names(arithmetics),
        expand=not no_expand,
        integers=integers,
        ranges=ranges,
        curvature=curvature,
        tune=tune,
        augment=_names(augment),
        tune_labels=tune_labels,
        rounds=rounds,
        samples=samples,
        seed=seed,
        cache=None if no_cache else cache or default_folder(),
        output_name=output.name if output is not None else Settings.output_name,
    )
    check_settings(settings)
    return settings


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in (text or "").split(","))))


def _check_outputs(output: Path, report: Path | None, inputs: Sequence[Path]) -> None:
    check_output(output, ".onnx", inputs)
    if report is not None:
        check_folder(report)


def _finish(result: Result, written: Report, output: Path, folder: Path | None, json: bool) -> None:
    """Write the reports of a model that is written, and print."""
    from intaglio.passes.facts import to_json
    from intaglio.passes.plan import to_json as plan_json

    from . import render

    if folder is not None:
        write_text(folder / "report.json", to_json(written))
        write_text(folder / "plan.json", plan_json(result.plan))
    _emit(written, render.compression(written), json)
    if not json:
        Console().print(f"wrote {output}", highlight=False, soft_wrap=True, markup=False)
    if not result.meets_budget:
        print("warning: the edited plan does not keep its budget; see the report", file=sys.stderr)


def _emit(document: object, tables: RenderableType, json: bool) -> None:
    from intaglio.passes.facts import to_json

    if json:
        print(to_json(document))
    else:
        Console().print(tables)
