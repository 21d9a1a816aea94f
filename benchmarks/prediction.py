"""Compare predicted with measured divergence, site by site: python benchmarks/prediction.py MODEL --data DATA [--forms N] [--samples N]

For every site a few candidate forms are drawn at random. Each is fitted and written into the original model alone; its
divergence is measured on the choose split, which took no part in the prediction. Printed are the rank correlation over sites
(the mean over draws of one form per site) and over all pairs.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from intaglio.passes.analyse import analyse, measured_sites
from intaglio.passes.cache import Cache
from intaglio.passes.fit import pack
from intaglio.passes.job import Settings, open_job
from intaglio.passes.sensitivity import Probe


def main(
    model: str,
    data: Annotated[str, typer.Option()],
    forms: Annotated[int, typer.Option(help="Forms drawn per site.")] = 5,
    samples: Annotated[int, typer.Option(help="Samples used.")] = 1024,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Print predicted and measured divergence per site and their rank correlation."""
    job = open_job(model, data, Settings(samples=samples, seed=seed))
    menu = analyse(job, Cache(None), latency=False)
    probe = Probe(job.model, job.kinds, job.data, job.splits.choose[:128], job.calibration)
    rng = np.random.default_rng(seed)
    pairs: dict[str, list[tuple[float, float]]] = {}
    for site, moment in measured_sites(job):
        options = [c for c in menu.candidates[site.name] if c.divergence > 1e-9]
        for index in rng.choice(len(options), min(forms, len(options)), replace=False):
            _, weight = pack(site, options[index].form, site.value(job.model), moment, integers=job.integers)
            pairs.setdefault(site.name, []).append((options[index].divergence, probe.replaced(site, site.stored(weight))))
    table = Table("site", "predicted", "measured", "ratio", title=f"{model}: divergence of one form per site ({menu.unit})")
    for name, found in pairs.items():
        predicted, measured = found[0]
        table.add_row(name, f"{predicted:.3g}", f"{measured:.3g}", f"{measured / predicted:.2f}")
    console = Console()
    console.print(table)
    draws = min(len(found) for found in pairs.values())
    per_draw = [spearmanr(*zip(*(found[draw] for found in pairs.values()), strict=True)).statistic for draw in range(draws)]
    everything = np.array([pair for found in pairs.values() for pair in found])
    console.print(f"rank correlation over {len(pairs)} sites, mean of {draws} draws: {np.mean(per_draw):.3f}")
    console.print(f"rank correlation over all {len(everything)} pairs: {spearmanr(everything[:, 0], everything[:, 1]).statistic:.3f}")


if __name__ == "__main__":
    typer.run(main)
