"""What output metrics are worth: python benchmarks/curvature.py MODEL --data DATA [--test TEST] [--sizes 0.3,0.15] [--decompositions A,B]

Without --test: every decomposition of every site is fitted at a few ranks, with and without the metric of outputs, and written into the
original model alone. Its divergence is measured on the choose split. Printed are the rank correlations, across sites, of that divergence
with the relative error in the metric of inputs and with ½ tr(G Δ A Δᵀ), for which no curve was measured; and what the metric of outputs
makes of the divergence at equal ranks.

With --test, an .npz with labels y: the model is compressed to each size under both settings. Printed are divergence and metric on data that
took no part.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from intaglio.ops.decompositions import DECOMPOSITIONS
from intaglio.ops.form import Form
from intaglio.ops.moment import relative_error
from intaglio.passes.analyse import analyse, measured_sites
from intaglio.passes.budget import Request
from intaglio.passes.cache import Cache
from intaglio.passes.curvature import CURVATURES, curvatures
from intaglio.passes.data import input_specs, open_dataset
from intaglio.passes.fit import pack
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.pipeline import solve_and_build
from intaglio.passes.rewrite import declines
from intaglio.passes.sensitivity import Probe
from intaglio.passes.sites import Site
from intaglio.passes.verify import compare

SHARES = (0.15, 0.4, 0.8)
"""Which ranks of each grid are tried, from the smallest (0) to the largest (1)."""

LEAST = 1e-5
"""Divergences below it are noise of float32 as much as of the form."""


def main(
    model: str,
    data: Annotated[str, typer.Option()],
    test: Annotated[str | None, typer.Option(help="Data with labels y; compresses and compares.")] = None,
    sizes: Annotated[str, typer.Option(help="Of the compressed model, relative to the original.")] = "0.3,0.15,0.08",
    decompositions: Annotated[str, typer.Option(help="Forms that race; all by default.")] = "",
    metric: Annotated[str, typer.Option()] = "accuracy",
    samples: Annotated[int, typer.Option(help="Samples used.")] = 1024,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Print what output metrics change."""
    names = tuple(filter(None, decompositions.split(",")))
    if test is None:
        _predictions(open_job(model, data, Settings(samples=samples, seed=seed)))
        return
    table = Table("size", *(f"{each}: {what}" for each in CURVATURES for what in ("divergence", metric)), title=model)
    jobs = [
        open_job(model, data, Settings(samples=samples, seed=seed, decompositions=names, curvature=each, metric=metric))
        for each in CURVATURES
    ]
    menus = [analyse(job, Cache(None), latency=False) for job in jobs]
    held_out = open_dataset(test, input_specs(jobs[0].original.proto), labels="y")
    everything, reference = np.arange(len(held_out)), None
    for size in map(float, sizes.split(",")):
        row = [f"{size:g}"]
        for job, menu in zip(jobs, menus, strict=True):
            built = solve_and_build(job, menu, Request(size=size)).model
            found = compare(job.original, built, held_out, everything, job.calibration, metric=metric)
            row += [f"{found.divergence:.4g}", f"{found.candidate_metric:.2f}"]
        table.add_row(*row)
        reference = found.reference_metric
    table.caption = f"{metric} of the original: {reference:.2f}"
    Console(width=120).print(table)


def _predictions(job: Job) -> None:
    """Single-site trials: predicted and measured."""
    known = curvatures(job)
    probe = Probe(job.model, job.kinds, job.data, job.splits.choose[:128], job.calibration)
    rows, kinds, sites = [], [], []
    for site, moment in measured_sites(job):
        value, plain = site.value(job.model), moment.shrunk()
        weight, curvature = site.matrix(value), known[site.name]
        for form in _trials(site):
            row = []
            for metric in (plain, plain.with_outputs(curvature.metric())):
                fitted = pack(site, form, value, metric)[1]
                predicted = relative_error(weight, fitted, plain), curvature.predicted(plain, weight, fitted)
                row += [*predicted, probe.replaced(site, site.stored(fitted))]
            if row[2] > LEAST:
                rows.append(row)
                kinds.append(form.decomposition)
                sites.append(site.name)
    _print(np.array(rows), np.array(kinds), np.array(sites))


def _trials(site: Site) -> Iterator[Form]:
    """A few ranks of every decomposition that the site can take."""
    once = {name: (execution, decomposition) for (name, execution), decomposition in DECOMPOSITIONS.items()}
    for name, (execution, decomposition) in once.items():
        grid = [] if decomposition.declines(site.use) else decomposition.grid(site.use)
        for ranks in dict.fromkeys(grid[round(share * (len(grid) - 1))] for share in SHARES if grid):
            form = Form(name, ranks, "float", execution)
            if name != "residual" and declines(site, form) is None:
                yield form


def _print(found: np.ndarray, kinds: np.ndarray, sites: np.ndarray) -> None:
    """Rank correlations, and ratios of divergences at equal ranks.

    Args:
        found: (trials, 6): relative error, ½ tr(G Δ A Δᵀ) and divergence of forms fitted in the metric of inputs, then in both.
        kinds: (trials,), decompositions.
        sites: (trials,), names.
    """
    console = Console(width=120)
    for start, what in ((0, "inputs"), (3, "both")):
        relative, absolute, measured = found[:, start : start + 3].T
        by_error, by_price = (spearmanr(each, measured).statistic for each in (relative, absolute))
        console.print(
            f"fitted in the metric of {what}: rank correlation of the relative error {by_error:.3f}, of ½ tr(G Δ A Δᵀ) {by_price:.3f}"
        )
        for name, each in (("relative error", relative), ("½ tr(G Δ A Δᵀ)", absolute)):
            ratio = np.log(measured / each)
            within = ratio - np.array([ratio[sites == site].mean() for site in sites])
            spreads = f"e^{ratio.std():.2f}, within a site e^{within.std():.2f}"
            console.print(f"  measured over {name}: geometric mean {np.exp(ratio.mean()):.2f}, spread {spreads}")
    table = Table("decomposition", "trials", "divergence, both over inputs", "less with both", title="at equal ranks")
    for kind in (*np.unique(kinds), None):
        ratio = (found[:, 5] / found[:, 2])[slice(None) if kind is None else kinds == kind]
        table.add_row(kind or "all", str(len(ratio)), f"{np.exp(np.mean(np.log(ratio))):.3f}", f"{np.mean(ratio < 1):.0%}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
