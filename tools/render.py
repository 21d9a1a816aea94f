"""Reports as tables for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from intaglio.ops.form import UNCHANGED, Form
from intaglio.passes.facts import DivergenceFacts, LatencyFacts, LoadingFacts, MetricFacts, Report, SizeFacts, TaskFacts, TuningFacts
from intaglio.passes.inspect import Inspection
from intaglio.passes.judge import Benchmark, Verdict
from intaglio.passes.margins import Margin
from intaglio.passes.plan import Plan

NONE = "–"
"""Stands for a number that was not measured."""

UNITS = {"kl_nats": "KL, nats", "relative_mse": "relative MSE"}


def compression(report: Report) -> RenderableType:
    """What `compress` and `apply` print: before and after, then site by site."""
    return Group(
        _comparison(report.size, report.latency, report.divergence, report.agreement, report.metric, report.data.synthetic, report.loading),
        _sites(report),
        _totals(report),
    )


def verdict(found: Verdict) -> RenderableType:
    """What `verify` prints."""
    return _comparison(found.size, None, found.divergence, found.agreement, found.metric, found.synthetic)


def benchmark(found: Benchmark) -> RenderableType:
    """What `bench` prints."""
    table = _table("model", "size", "latency", "ratio", "quartiles")
    table.add_row(found.reference.path or "(in memory)", size_text(found.bytes), time_text(found.latency_s), "1", "")
    for each in found.candidates:
        latency = each.latency
        table.add_row(
            each.model.path or "(in memory)",
            size_text(each.bytes),
            time_text(latency.candidate_s),
            f"{latency.ratio:.3f}",
            f"{latency.ratio_low:.3f} to {latency.ratio_high:.3f}",
        )
    return table


def plan_table(plan: Plan, margins: Sequence[Margin]) -> RenderableType:
    """What `plan` prints: the predicted cost, the form of every site, and what more of a budget would buy."""
    base = plan.menu.base
    totals = _table("predicted", "before", "after", "ratio")
    totals.add_row("size", size_text(base.size_bytes), size_text(plan.size_bytes), f"{plan.size_bytes / base.size_bytes:.3f}")
    totals.add_row("latency", time_text(base.latency_s), time_text(plan.latency_s), f"{plan.latency_s / base.latency_s:.3f}")
    totals.add_row(f"divergence ({UNITS[plan.menu.unit]})", "0", f"{plan.divergence:.3g}", "")
    sites = _table("weight", "saves", "divergence", text=("form",))
    for name, form in plan.forms.items():
        candidate = plan.candidate(name)
        saved = NONE if candidate is None else size_text(-candidate.size_bytes)
        divergence = NONE if candidate is None else f"{candidate.divergence:.2g}"
        sites.add_row(name, form_text(form), saved, divergence)
    return Group(totals, sites, *_margin_lines(margins))


def inspection(found: Inspection) -> RenderableType:
    """What `inspect` prints."""
    timed = found.latency_s is not None
    title = f"{found.model.path or 'model'}: {size_text(found.bytes)}, opset {found.opset}" + _run_time(found)
    headings = ("shape", "size", "of all", "MACs", *(["time"] if timed else []), "rank", "99 %")
    table = _table("weight", *headings, text=("op",))
    table.title, table.caption = title, _rank_note(found)
    for site in found.sites:
        table.add_row(
            site.name,
            site.op_type if site.uses == 1 else f"{site.op_type} ×{site.uses}",
            shape_text(site.shape),
            size_text(site.bytes),
            f"{site.share:.1%}",
            NONE if site.macs is None else count_text(site.macs),
            *([_share_or_none(site.latency_share)] if timed else []),
            f"{site.effective_rank:.1f}/{site.rank}",
            str(site.rank_99),
        )
    parts: list[RenderableType] = [table]
    if found.skipped:
        skipped = _table("weight", "shape", "size", text=("op", "reason"))
        skipped.title = "left alone"
        for skip in found.skipped:
            skipped.add_row(skip.name, skip.op_type, skip.reason, shape_text(skip.shape), size_text(skip.bytes))
        parts.append(skipped)
    return Group(*parts)


def size_text(size_bytes: float) -> str:
    """Bytes in decimal units: "2.24 MB"."""
    return _scaled(size_bytes, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)))


def time_text(seconds: float) -> str:
    """Seconds in the unit that fits: "3.21 ms"."""
    return _scaled(seconds, (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)))


def count_text(count: int) -> str:
    """A large number: "41.2 M"."""
    return _scaled(count, (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))).strip()


def shape_text(shape: tuple[int, ...]) -> str:
    """ "64×3×3×3"."""
    return "×".join(map(str, shape))


def form_text(form: Form) -> str:
    """A form in words: "lowrank 64, int8, contract"."""
    if form == UNCHANGED:
        return "unchanged"
    name = " ".join(filter(None, [form.decomposition, shape_text(form.ranks)]))
    runs = ["contract"] if form.execution == "contract" else []
    return ", ".join([name, form.storage, *runs, *([form.arithmetic] if form.arithmetic != "float" else [])])


def _scaled(value: float, units: tuple[tuple[str, float], ...]) -> str:
    name, unit = next(((name, unit) for name, unit in units if abs(value) >= unit), units[-1])
    return f"{value:.0f} {name}" if unit == 1 and value == int(value) else f"{value / unit:.3g} {name}"


def _table(first: str, *numbers: str, text: tuple[str, ...] = ()) -> Table:
    """A table with columns of text, then of numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left", caption_justify="left")
    for heading in (first, *text):
        table.add_column(heading, overflow="fold", min_width=len(heading))
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _comparison(
    size: SizeFacts,
    latency: LatencyFacts | None,
    divergence: DivergenceFacts,
    agreement: float | None,
    metric: MetricFacts | None,
    synthetic: bool,
    loading: LoadingFacts | None = None,
) -> Table:
    table = _table("", "before", "after", "ratio")
    if synthetic:
        table.caption = "on random data: nothing is said about accuracy"
    table.add_row("size", size_text(size.reference_bytes), size_text(size.bytes), f"{size.ratio:.3f}")
    if latency is not None:
        threads = f"latency, {latency.threads} thread{'s' if latency.threads > 1 else ''}"
        table.add_row(threads, time_text(latency.reference_s), time_text(latency.candidate_s), f"{latency.ratio:.3f}")
    if loading is not None:
        ratio = f"{loading.candidate_s / loading.reference_s:.3f}"
        table.add_row("time to load", time_text(loading.reference_s), time_text(loading.candidate_s), ratio)
        peaks = loading.reference_peak_bytes, loading.candidate_peak_bytes
        table.add_row("memory to load", *map(size_text, peaks), f"{peaks[1] / max(1, peaks[0]):.3f}")
    table.add_row(f"divergence ({UNITS[divergence.unit]}, {divergence.samples} samples)", "0", f"{divergence.measured:.3g}", "")
    if agreement is not None:
        table.add_row("same top class", "100 %", f"{100 * agreement:.4g} %", "")
    if metric is not None:
        ratio = f"{metric.candidate / metric.reference:.3f}" if metric.reference else ""
        table.add_row(metric.name, f"{metric.reference:.4g}", f"{metric.candidate:.4g}", ratio)
    return table


def _sites(report: Report) -> Table:
    table = _table("weight", "before", "after", "share", text=("op", "shape", "form"))
    for site in report.sites:
        table.add_row(
            site.name,
            site.op_type,
            shape_text(site.shape),
            form_text(site.chosen),
            size_text(site.reference_bytes),
            size_text(site.bytes),
            f"{site.bytes / report.size.bytes:.1%}",
        )
    return table


def _totals(report: Report) -> str:
    lines = [] if report.task is None else _task_lines(report.task)
    if report.skipped:
        lines.append(f"{len(report.skipped)} other weights are left alone; `intaglio inspect` says why.")
    if report.floors:
        values = "1 value" if len(report.floors) == 1 else f"{len(report.floors)} values"
        lines.append(f"Masked scores are clipped in front of Softmax ({values}): no output changes, and the model is faster for it.")
    for number, each in enumerate(report.rounds, 1):
        note = "; interrupted, so the last round is not tuned" if each.interrupted else ""
        lines.append(f"Round {number}: {each.size_bytes:,} B, divergence {each.before:.3g} → {each.after:.3g} on choose samples{note}.")
    if report.latency is not None and len(report.latency.ratios) > 1:
        ratios = " and ".join(f"{ratio:.3f}" for ratio in report.latency.ratios)
        lines.append(f"It came out late and was measured once more: latency ratios {ratios}; both count.")
    if report.tuning is not None:
        lines.append(_tuning_line(report.tuning))
    if report.solver is not None:
        lines.append(f"The choice is {report.solver.status} within {report.solver.gap:.1g} of the best possible.")
    lines += _margin_lines(report.margins)
    return "\n".join(lines)


def _margin_lines(found: Sequence[Margin]) -> list[str]:
    """What a little more of each budget would buy; nothing where that is not known."""
    if not found:
        return []
    names = {"size": "size", "latency": "latency", "error": "divergence"}
    offers = [f"{each.factor - 1:.0%} more {names[each.budget]}: {names[each.minimized]} {_lower(each.ratio)}" for each in found]
    return [f"Predicted, of what it takes: {'; '.join(offers)}."]


def _lower(ratio: float) -> str:
    """A ratio below 1 in words."""
    return "as it is" if ratio > 0.995 else f"{1 - ratio:.0%} lower"


def _tuning_line(found: TuningFacts) -> str:
    """What tuning reached, and why it was not more."""
    first = found.unrounded
    in_floats = first is not None and first.improved
    outcome = (
        "kept" if found.improved else f"not kept: {'what was taught in floats is' if in_floats else 'the untuned weights are'} written"
    )
    reason = f" ({found.reason})" if found.reason else ""
    floats = "" if first is None else f"{first.steps} steps in floats, {'then rounded' if in_floats else 'not kept'}; "
    if found.before is None or found.after is None:
        return f"Tuning: {floats}{outcome}{reason}."
    return f"Tuning: {floats}{found.steps} steps, divergence {found.before:.3g} → {found.after:.3g} on choose samples; {outcome}{reason}."


def _task_lines(task: TaskFacts) -> list[str]:
    """What a preset predicted and measured."""
    loss, metric = task.loss, task.metric
    lines = [
        f"{task.preset}: {task.loss_name} {loss.mean:+.3g} ± {loss.error:.2g}, predicted {task.predicted_linear:+.3g} to first order "
        f"and {task.predicted_quadratic:+.3g} by the divergence.",
        f"Metric {metric.mean:+.3g} ± {metric.error:.2g} on {metric.samples} held-out samples.",
        f"{sum(step.kept for step in task.steps)} of {len(task.steps)} plans kept what they had to on the choose split.",
    ]
    if task.declined:
        lines.append(f"{len(task.declined)} weights have no first-order term: {task.declined[0].name}: {task.declined[0].reason}.")
    return lines


def _rank_note(found: Inspection) -> str:
    weights = "weights as the data sees them" if found.whitened else "weights; with --data, as the data sees them"
    noise = ", which was random" if found.synthetic else ""
    return f"rank: effective and largest possible; 99 %: rank that holds 99 % of the energy, of the {weights}{noise}"


def _run_time(found: Inspection) -> str:
    return "" if found.latency_s is None else f", {time_text(found.latency_s)} a run"


def _share_or_none(share: float | None) -> str:
    return NONE if share is None else f"{share:.1%}"
