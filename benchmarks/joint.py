"""What labels add to low ranks: python benchmarks/joint.py MODEL --data DATA --labels KEY --test DATA [--sizes 0.7,0.5,0.3]

At each size the model is compressed by low ranks alone, in floats, in four ways: ranks and fits by the energy of the weights (plain SVD),
by the second moment of each layer's input, by that and the gradients at its output (the default), and jointly with the gradient of the
labelled loss. For the joint way two rows are printed: the plan that the linear terms ask for, and what `--preset lossless` keeps after its
step rule. All ways but the first match the original's outputs. Loss and metric are of labelled samples that took part in nothing, with the
standard error of the difference to the original.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated
from unittest.mock import patch

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from intaglio.ops.moment import Moment
from intaglio.passes import analyse as analysis
from intaglio.passes import build as building
from intaglio.passes.budget import Request, resolve
from intaglio.passes.cache import Cache
from intaglio.passes.data import input_specs, open_dataset
from intaglio.passes.errors import InfeasibleError
from intaglio.passes.job import Settings, open_job
from intaglio.passes.model import Model
from intaglio.passes.options import silent
from intaglio.passes.plan import Correction
from intaglio.passes.presets import Attempt, Search, corrected, job_with_more_judges
from intaglio.passes.sites import Site
from intaglio.passes.task import check_task, gain, loss_change, stand

FORMS = ("lowrank", "channel_svd", "separable")


def main(
    model: str,
    data: Annotated[str, typer.Option()],
    test: Annotated[str, typer.Option(help="Labelled samples that take part in nothing.")],
    labels: Annotated[str, typer.Option()] = "y",
    sizes: Annotated[str, typer.Option(help="Shares of the original's bytes.")] = "0.7,0.5,0.3",
    samples: Annotated[int, typer.Option(help="Samples used for statistics.")] = 512,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Print loss and metric at each size, by way."""
    settings = Settings(labels=labels, decompositions=FORMS, storages=("float",), samples=samples, seed=seed)
    job = open_job(model, data, settings)
    check_task(job)
    judge = replace(job, data=open_dataset(test, input_specs(job.original.proto), labels=labels))
    indices = np.arange(len(judge.data))
    original = stand(judge, job.original, indices)
    title = f"{model}: loss {original.loss:.4f}, {settings.metric} {original.score:.2f}"
    table = Table("size", "way", "file", "loss", "metric", "linear", "quadratic", title=title)

    def add(*cells: str) -> None:
        table.add_row(*cells)
        print("  ".join(cells), file=sys.stderr)  # what is done is not lost if the rest is stopped

    def row(size: str, way: str, found: Attempt | None) -> None:
        if found is None:
            add(size, way, "infeasible")
            return
        now = stand(judge, found.model, indices)
        loss, metric = loss_change(original, now), gain(judge, original, now)
        share = job.sizes().total(found.plan.forms) / job.original.size_bytes
        parts = f"{found.plan.linear:+.4f}", f"{found.plan.divergence:.4f}"
        add(size, way, f"{share:.3f}", f"{loss.mean:+.4f} ± {loss.error:.4f}", f"{metric.mean:+.2f} ± {metric.error:.2f}", *parts)

    search = Search.begin(job_with_more_judges(job), silent)
    plain, joint = search.labels(None), search.labels(search.gradients(None))
    one_sided = replace(search, job=replace(search.job, settings=replace(search.job.settings, curvature="input")))
    inputs = one_sided.labels(None)
    blind = replace(one_sided, cache=Cache(None))
    with _energy_only():
        flat = blind.labels(None)
    for size in sizes.split(","):
        budget = resolve(Request(size=size), job.original.size_bytes, plain.menu.base)
        try:
            with _energy_only():
                row(size, "energy", blind.attempt(flat, budget, Correction(), "none"))
            row(size, "input metric", one_sided.attempt(inputs, budget, Correction(), "none"))
            first = search.attempt(plain, budget, Correction(), "none")
            row(size, "both metrics", first)
            second = search.attempt(joint, budget, corrected(first), "original")
            row(size, "joint", second)
            row(size, "lossless", second if second.standing.loss <= first.standing.loss else first)
        except InfeasibleError:
            row(size, "any", None)
    Console().print(table)


def _isotropic(model: Model, sites: Sequence[Site], *_: object, **__: object) -> dict[str, Moment]:
    """In place of `calibrate`: every input counts alike."""
    return {site.name: Moment.isotropic(site.use.view.groups, site.use.view.n) for site in sites}


@contextmanager
def _energy_only() -> Iterator[None]:
    """Analyse and fit without statistics of inputs."""
    with (
        patch.object(analysis, "calibrate", _isotropic),
        patch.object(building, "calibrate", _isotropic),
        patch.object(building, "calibrate_pairs", lambda *_, **__: {}),
    ):
        yield


if __name__ == "__main__":
    typer.run(main)
