"""Activations that may be quantized: which values they are, who is on either side of them, and what rounding each of them costs.

The cost is measured like that of a weight: one value at a time is rounded to eight bits in the model, and the outputs are compared with
the original's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from onnx import ModelProto

from intaglio.ops.arithmetic import ARITHMETICS
from intaglio.ops.families import FAMILIES
from intaglio.ops.form import Form
from intaglio.solver import Cost

from .coupling import Unit
from .graph import MAIN, all_names, nested_graphs, output_names, reads
from .integer import fake_quantized
from .job import Job
from .partners import Group, partners_of
from .ranges import calibrated
from .recall import Finding, Findings
from .regions import KEEPING, Carrier
from .rewrite import array_specs, fragment, rewrite, written_storages
from .sites import Site
from .units import units_around

RANGE_SAMPLES = 64
"""Fit samples from which the ranges of single values are taken while forms are priced."""


@dataclass(frozen=True)
class Activations:
    """What the solver has to know about activations.

    Attributes:
        units: operators that may run in integers, sites and carriers, by name.
        carriers: those without weights.
        divergence: of the outputs when one value is rounded to eight bits, by value.
        outside: values that something else reads too, as floats.
        inputs: by site name, the value that its operator reads, where that may be quantized while the model runs; the name of the
            site's group where the operator quantizes more than that.
    """

    units: Mapping[str, Unit] = field(default_factory=dict)
    carriers: tuple[Carrier, ...] = ()
    divergence: Mapping[str, float] = field(default_factory=dict)
    outside: frozenset[str] = frozenset()
    inputs: Mapping[str, str] = field(default_factory=dict)

    def dynamic_needs(self, site: Site) -> tuple[str, ...]:
        """The shared resource that an operator with dynamic quantization needs: rounding its input is paid once for all its readers."""
        return (f"dynamic:{self.inputs[site.name]}",) if site.name in self.inputs else ()

    def dynamic_costs(self) -> dict[str, Cost]:
        """Cost of those resources."""
        return {f"dynamic:{value}": Cost(0, 0.0, self.divergence[value]) for value in self.inputs.values()}


def measure_activations(
    job: Job, findings: Mapping[str, Finding], known: Findings, worthwhile: Callable[[Carrier], bool] = lambda _: True
) -> Activations:
    """Find the units and measure what rounding the values around them costs.

    Args:
        job: the job.
        findings: of the sites; those to which no integer form was proposed are no units.
        known: remembers the measurements.
        worthwhile: whether a carrier may become a unit.
    """
    narrow = {name: {p.form.arithmetic for p in finding.proposals} for name, finding in findings.items()}
    coupled = {name for name, arithmetic in ARITHMETICS.items() if arithmetic.coupled}
    sites = [site for site in job.sites if narrow[site.name] & coupled]
    inputs = {
        site.name: FAMILIES[site.use.key].activation(site.use)[0]
        for site in job.sites
        if "dynamic" in narrow[site.name] and len(site.uses) == 1 and site.uses[0].scope == MAIN
    }
    partners = partners_of(job)
    groups = dict.fromkeys(group for name, group in partners.groups.items() if group.arithmetic in narrow[name])
    inputs |= {site.name: group.name for group in groups for site in group.sites}
    carriers = tuple(filter(worthwhile, job.carriers)) if sites else ()
    units = units_around(job.model, sites, carriers)
    joint = {group.name: group for group in groups}
    read = (value for value in inputs.values() if value not in joint)
    values = list(dict.fromkeys([*(name for unit in units.values() for name in (*unit.inputs, *unit.outputs)), *read]))
    divergence = known.activations()
    if divergence is None or not all(value in divergence for value in (*values, *joint)):
        divergence = _divergence(job, values) | {name: _inside(job, group) for name, group in joint.items()}
        known.put_activations(divergence)
    divergence |= {carrier.output: 0.0 for carrier in carriers if carrier.node.op_type in KEEPING}  # rounded where it was written
    broken = {value for value in (*values, *joint) if value not in divergence or not math.isfinite(divergence[value])}
    usable = {name: unit for name, unit in units.items() if broken.isdisjoint((*unit.inputs, *unit.outputs))}
    used = tuple(carrier for carrier in carriers if carrier.name in usable)
    inputs = {name: value for name, value in inputs.items() if value not in broken}
    return Activations(usable, used, divergence, _outside(job.model.proto, usable, job.sites.sites, used), inputs)


def _divergence(job: Job, values: Sequence[str]) -> dict[str, float]:
    """Divergence of the outputs when each value alone is rounded; values that cannot be rounded are left out."""
    ranges = calibrated(job.model, values, job.data, job.splits.fit[: job.data.enough(RANGE_SAMPLES)], job.calibration, "mse")
    probe = job.probe()
    return {value: _lost(probe.divergence(fake_quantized(job.model, [value], ranges).proto)) for value in values if value in ranges}


def _inside(job: Job, group: Group) -> float:
    """Divergence of the outputs when one operator rounds what it reads and what it keeps from step to step: computing with integers against
    computing in floats with the same weights, which are rounded to bytes; infinite where either breaks the model."""
    probe, taken = job.probe(), frozenset(all_names(job.model.proto))
    (storage,) = written_storages(group.form, 1, job.integers)

    def measured(form: Form) -> float:
        parts = {}
        for site in group.sites:
            ((_, axis),) = array_specs(site, form)
            packed = (storage.encode(site.value(job.model), axis),)
            parts[site.name] = fragment(site, form, packed, job.model.proto, taken, job.integers)
        return probe.divergence(rewrite(job.model, parts, group.sites).proto)

    return _lost(measured(group.form), measured(replace(group.form, arithmetic="float")))


def _lost(divergence: float, before: float = 0.0) -> float:
    """What a divergence adds to the one before; infinite where either is not finite, as `max` takes 0 for what is no number."""
    return max(0.0, divergence - before) if math.isfinite(divergence) and math.isfinite(before) else math.inf


def _outside(proto: ModelProto, units: Mapping[str, Unit], sites: Sequence[Site], carriers: Sequence[Carrier]) -> frozenset[str]:
    """Values that an operator reads that is no unit, or that the model yields."""
    inside = {id(use.use.node) for site in sites if site.name in units for use in site.uses} | {id(carrier.node) for carrier in carriers}
    read = {name for node in proto.graph.node if id(node) not in inside or list(nested_graphs(node)) for name in reads(node)}
    return frozenset(read | set(output_names(proto.graph)))
