"""What the command line does, from Python. Paths may be given as text; a model may also be a `ModelProto`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from intaglio.passes.apply import apply_plan
from intaglio.passes.budget import Request
from intaglio.passes.check import check_request, check_settings, check_together
from intaglio.passes.data import Source
from intaglio.passes.inspect import Inspection, inspect_job, inspect_model
from intaglio.passes.job import Settings, open_job
from intaglio.passes.judge import Benchmark, Verdict, bench_models, verify_models
from intaglio.passes.options import Runtime
from intaglio.passes.plan import Plan, read_plan
from intaglio.passes.presets import compress as compress_job
from intaglio.passes.replan import plan_job, replan
from intaglio.passes.report import Result
from intaglio.passes.session import CPU
from intaglio.solver import Quantity

ModelSource = str | Path | onnx.ModelProto


def compress(
    model: ModelSource,
    data: Source,
    *,
    size: float | str | None = None,
    latency: float | str | None = None,
    error: float | None = None,
    minimize: Quantity | None = None,
    preset: str | None = None,
    drop: float | None = None,
    target: str = "cpu",
    providers: Sequence[str] = (CPU,),
    threads: int = 1,
    labels: str | None = None,
    metric: str = "accuracy",
    loss: str = "cross-entropy",
    kind: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    decompositions: Sequence[str] = (),
    storages: Sequence[str] = (),
    arithmetics: Sequence[str] = (),
    expand: bool = True,
    integers: str = "auto",
    ranges: str = "auto",
    curvature: str = "both",
    tune: int | str | None = None,
    augment: Sequence[str] = (),
    tune_labels: float = 0.0,
    rounds: int | str | None = None,
    samples: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
) -> Result:
    """Shrink a model within a budget; at least one of size, latency and error is needed, or minimize, or with labels drop or a preset.

    Args:
        model: a file, or a model in memory.
        data: an `.npz` file, a mapping of input name to array, an iterable of feeds, a folder of test data sets, or "random".
        size: a ratio (0.25), a percentage ("25%") or bytes ("4MB").
        latency: a ratio (0.5), a percentage or a time ("3ms") of one run.
        error: most divergence of the outputs on held-out samples: KL in nats for class scores, else relative mean square error.
        minimize: "size", "latency" or "error"; by default the error if a size or latency is given, else the size.
        preset: with labels, "lossless" (the best held-out loss at `size`) or "compact" (the smallest model within `drop`).
        drop: points that the metric may fall by; alone it means "compact".
        target: what kind of runtime the result is for.
        providers: execution providers that latency is measured on.
        threads: intra-op threads that latency is measured with.
        labels: name of the array of labels in the data.
        metric: what labels are scored by: "accuracy" or "mse".
        loss: what presets improve: "cross-entropy", "mse", or the name of an output that holds a loss.
        kind: what the first output holds: "auto", "logits", "probabilities", "log-probabilities" or "values".
        include: regular expressions of names of weights that may change; all if there are none.
        exclude: regular expressions of names of weights that may not.
        decompositions: which may be used; all if there are none.
        storages: which may be used; those that race by default if there are none.
        arithmetics: which layers may compute in; all of the target if there are none.
        expand: whether stored weights may be expanded when the model is loaded.
        integers: which integers operators compute with: "full", "reduced" (weights of seven bits, for processors that saturate), "signed"
            (activations), or "auto": "full" unless this machine is the target and saturates.
        ranges: how ranges of quantized activations are calibrated: "auto", "minmax", "percentile", "mse" or "entropy".
        curvature: what weight errors are measured by: "input", or "both" sides of a layer.
        tune: steps of tuning the result against the original's outputs, or "auto"; kept only if it helps.
        augment: random changes of tuned images: "flip", "shift", "crop", "mixup".
        tune_labels: weight of the cross-entropy to labels while tuning, against 1 for the original's outputs.
        rounds: in how many steps `size` and `latency` are approached, each with an analysis and a tuning of its own, or "auto".
        samples: most samples that choices are made on; tuning has those left over too. All by default.
        seed: of every random choice.
        cache: folder of measured latencies; None keeps them in memory. `default_folder()` is the command line's.

    Returns:
        The compressed model with its plan and report; nothing is written before `save`.

    Raises:
        InputError: an argument, the model or the data is bad.
        InfeasibleError: no choice meets the budgets; the message names the nearest feasible ones.
        VerificationError: the budgets do not hold on held-out data.
    """
    request = Request(size, latency, error, minimize, preset, drop)
    settings = Settings(
        target,
        Runtime(tuple(providers), threads),
        labels,
        metric,
        kind,
        tuple(include),
        tuple(exclude),
        tuple(decompositions),
        tuple(storages),
        samples,
        seed,
        _folder(cache),
        arithmetics=tuple(arithmetics),
        expand=expand,
        integers=integers,
        ranges=ranges,
        curvature=curvature,
        loss=loss,
        tune=tune,
        augment=tuple(augment),
        tune_labels=tune_labels,
        rounds=rounds,
    )
    check_settings(settings)
    check_request(request)
    check_together(request, settings)
    return Result(compress_job(open_job(model, data, settings), request))


def plan(
    model: ModelSource,
    data: Source | None = None,
    *,
    reuse: Plan | str | Path | None = None,
    size: float | str | None = None,
    latency: float | str | None = None,
    error: float | None = None,
    minimize: Quantity | None = None,
    settings: Settings | None = None,
) -> Plan:
    """Choose a form for every weight without building the model.

    Args:
        model: the model.
        data: as for `compress`; not needed with `reuse`.
        reuse: a plan of the same model, to be solved again for another budget without measuring anything.
        size: as for `compress`.
        latency: as for `compress`.
        error: as for `compress`.
        minimize: as for `compress`.
        settings: everything else.

    Raises:
        InputError: an argument, the model or the data is bad.
        InfeasibleError: no choice meets the budgets.
    """
    request = Request(size, latency, error, minimize)
    check_request(request)
    if reuse is not None:
        return replan(model, _plan(reuse), request)
    if data is None:
        raise TypeError("plan() needs data, or a plan to reuse")
    settings = settings or Settings()
    check_settings(settings)
    return plan_job(open_job(model, data, settings), request)


def apply(model: ModelSource, plan: Plan | str | Path, data: Source, *, settings: Settings | None = None) -> Result:
    """Fit and rewrite by a plan, which may have been edited by hand.

    Raises:
        InputError: the plan is another model's, names an unknown form, or the data is bad.
        VerificationError: a plan that was not edited does not keep its budget on held-out data.
    """
    settings = settings or Settings()
    check_settings(settings)
    known = _plan(plan)
    settings = replace(settings, integers=known.menu.integers)
    return Result(apply_plan(open_job(model, data, settings), known))


def verify(
    reference: ModelSource, model: ModelSource, data: Source, *, error: float | None = None, settings: Settings | None = None
) -> Verdict:
    """Compare two models' outputs, size and, with `settings.labels`, metric on all samples.

    Raises:
        InputError: a model or the data is bad, or the models' interfaces differ.
    """
    settings = settings or Settings()
    check_settings(settings)
    return verify_models(reference, model, data, settings, error=error)


def bench(
    models: Sequence[ModelSource], data: Source, *, providers: Sequence[str] = (CPU,), threads: int = 1, pairs: int = 25
) -> Benchmark:
    """Time every model after the first against the first.

    Raises:
        InputError: a model or the data is bad.
    """
    return bench_models(models, data, Runtime(tuple(providers), threads), pairs=pairs)


def inspect(model: ModelSource, data: Source | None = None, *, settings: Settings | None = None) -> Inspection:
    """Bytes, work and rank of every weight; with data also latency, and ranks in the metric of the data.

    Raises:
        InputError: the model or the data is bad.
    """
    settings = settings or Settings()
    check_settings(settings)
    if data is None:
        return inspect_model(model, settings.include, settings.exclude)
    return inspect_job(open_job(model, data, settings))


def _folder(path: str | Path | None) -> Path | None:
    return None if path is None else Path(path)


def _plan(plan: Plan | str | Path) -> Plan:
    return plan if isinstance(plan, Plan) else read_plan(Path(plan))
