"""A job: a model and its data, opened, checked and searched for sites, with the settings that every pass obeys."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from intaglio.ops.arithmetic import ARITHMETICS
from intaglio.solver import Budget

from .cache import Cache
from .calibrate import Shapes, observe, value_shapes
from .canonicalize import Report as CanonicalReport
from .canonicalize import canonicalize
from .data import Dataset, Source, Splits, input_specs, open_dataset, split
from .divergence import Kind, output_kinds
from .errors import InputError
from .kernels import INTEGERS, Integers, chosen_integers
from .load import load
from .model import Model
from .options import Runtime
from .price import SizePricer
from .propose import Allowed
from .regions import Carrier, find_carriers
from .sensitivity import PROBE_SAMPLES, Probe
from .sites import Sites, Skip, find_sites, without_broken
from .targets import TARGETS
from .units import activation_values


@dataclass(frozen=True)
class Settings:
    """Everything but the budget.

    Attributes:
        target: name of a target.
        runtime: how latency is measured and promised.
        labels: array of the data that holds labels.
        metric: name of the metric that labels are scored by.
        loss: what labels say to improve: "cross-entropy", "mse", or the name of an output; only presets look at it.
        kind: what the first output holds ("auto" reads it off the graph).
        include: regular expressions; only sites that match one are touched.
        exclude: regular expressions; sites that match one are left alone.
        decompositions: names of the forms that may be used; empty for all.
        storages: names of the storages that may be used; empty for those that race by default.
        arithmetics: names of the arithmetics that layers may compute in; empty for all of the target.
        expand: whether stored weights may be expanded when the model is loaded.
        integers: which integers operators compute with: "auto", or a name in `passes.kernels.INTEGERS`; a job's own is never "auto".
        ranges: how the ranges of quantized activations are calibrated: "auto", or a method of `passes.ranges`.
        curvature: what weight errors are measured by: "input" (the second moment of a layer's input) or "both" (also that of the gradient
            at its output, see `passes.curvature`).
        tune: steps of tuning against the original's outputs, or "auto"; None for none.
        augment: random changes of the images that are tuned on; see `passes.augment`.
        tune_labels: weight of the cross-entropy to labels while tuning.
        rounds: in how many steps budgets are approached, each with an analysis and a tuning of its own, or "auto"; None for one.
        samples: most samples used; None for all.
        seed: of every random choice.
        cache: folder of the cache; None for none.
        output_name: of the file that will be written; external data repeats it, so it counts.
    """

    target: str = "cpu"
    runtime: Runtime = field(default_factory=Runtime)
    labels: str | None = None
    metric: str = "accuracy"
    kind: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    decompositions: tuple[str, ...] = ()
    storages: tuple[str, ...] = ()
    samples: int | None = None
    seed: int = 0
    cache: Path | None = None
    output_name: str = "model.onnx"
    arithmetics: tuple[str, ...] = ()
    expand: bool = True
    integers: str = "auto"
    ranges: str = "auto"
    curvature: str = "both"
    loss: str = "cross-entropy"
    tune: str | int | None = None
    augment: tuple[str, ...] = ()
    tune_labels: float = 0.0
    rounds: str | int | None = None

    def allowed(self) -> Allowed:
        """The forms that the user and the target admit.

        Raises:
            InputError: a name is unknown, or the target lacks it.
        """
        allowed = TARGETS[self.target].allowed(self.decompositions, self.storages, self.arithmetics, expand=self.expand)
        return allowed if self.integers == "auto" else replace(allowed, integers=self.integers)


@dataclass
class Clock:
    """Wall seconds spent per phase."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of a block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, eq=False)
class Job:
    """A model with data, opened, checked and searched for sites.

    Attributes:
        original: the model as given.
        model: the canonical model that plans start from.
        canonicalization: how it became canonical.
        sites: its weights.
        excluded: sites that the user's expressions leave out.
        data: the samples.
        splits: which samples fit, choose and verify.
        kinds: what the outputs hold.
        shapes: around each site at the latency batch.
        carriers: operators without weights that may run in integers.
        value_shapes: of the activations around sites and carriers, at the latency batch.
        settings: the settings.
        calibration: how models are run while statistics are gathered.
        equalized: whether channels of `model` are rescaled for integers.
        floors: by value, below which `model` lifts the scores that a Softmax reads.
        slopes: by site name, first-order terms of the labelled loss by which low ranks choose what they keep: (groups, m, n) as in
            `ops.moment.Moment.slope`.
        teacher: the canonical original, where `model` has been compressed and tuned already; None where `model` is that itself.
        lineage: digest of how `model` was made from the canonical original; empty where it is that itself.
    """

    original: Model
    model: Model
    canonicalization: CanonicalReport
    sites: Sites
    excluded: tuple[Skip, ...]
    data: Dataset
    splits: Splits
    kinds: tuple[Kind, ...]
    shapes: Mapping[str, Shapes]
    carriers: tuple[Carrier, ...]
    value_shapes: Mapping[str, tuple[int, ...]]
    settings: Settings
    calibration: Runtime
    clock: Clock
    equalized: bool = False
    floors: Mapping[str, float] = field(default_factory=dict)
    slopes: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    teacher: Model | None = None
    lineage: str = ""

    @property
    def reference(self) -> Model:
        """The model whose outputs are right, with the values of the canonical one."""
        return self.teacher or self.model

    @property
    def integers(self) -> Integers:
        """Which integers operators compute with."""
        return INTEGERS[self.settings.integers]

    @property
    def external(self) -> bool:
        """Whether the result keeps its weights beside the model file, as the original does."""
        return bool(self.original.weights.files)

    @property
    def small(self) -> bool:
        """Whether two copies of the model may be held in memory for nothing but a measurement."""
        return self.original.size_bytes <= self.settings.runtime.memory_limit_bytes

    def probe(self, count: int = PROBE_SAMPLES) -> Probe:
        """Measures damage to the model's outputs on a few of the fit samples."""
        rng = np.random.default_rng(self.settings.seed)
        chosen = rng.choice(self.splits.fit, min(self.data.enough(count), len(self.splits.fit)), replace=False)
        return Probe(self.model, self.kinds, self.data, np.sort(chosen), self.calibration)

    def sizes(self) -> SizePricer:
        """Prices of forms and plans in bytes of the file that will be written."""
        domains = TARGETS[self.settings.target].domains
        return SizePricer(self.model, self.integers, external=self.external, name=self.settings.output_name, domains=domains)

    def times(self, budget: Budget) -> bool:
        """Whether the result's latency is measured: always for a latency budget, else where the model is small."""
        return budget.latency_s is not None or self.small


def open_job(source: str | Path | onnx.ModelProto, data: Source, settings: Settings, *, clock: Clock | None = None) -> Job:
    """Load a model and its data and find the sites.

    Raises:
        InputError: the model, the data or a setting is bad.
    """
    clock = clock or Clock()
    if settings.target not in TARGETS:
        raise InputError(f"--target {settings.target}: unknown; expected one of {', '.join(TARGETS)}")
    with clock.phase("load"):
        original = load(source)
        dataset = open_dataset(data, input_specs(original.proto), labels=settings.labels, seed=settings.seed)
        splits = split(len(dataset), seed=settings.seed, samples=settings.samples)
    with clock.phase("canonicalize"):
        model, canonicalization = canonicalize(original)
        if original.weights.files:
            original.weights.enable_spooling(Path(tempfile.gettempdir()))
    kinds = output_kinds(original.proto, settings.kind)
    found = without_broken(model, find_sites(model))
    sites, excluded = TARGETS[settings.target].select(found, settings.include, settings.exclude)
    own = settings.target == "cpu" and _has_integers(sites, settings.allowed().arithmetics)
    settings = replace(settings, integers=chosen_integers(settings.integers, own, Cache(settings.cache), settings.runtime.providers))
    calibration = replace(settings.runtime, threads=max(settings.runtime.threads, os.cpu_count() or 1))
    if original.size_bytes > calibration.memory_limit_bytes:  # sessions copy and repack weights: leave room for that
        calibration = replace(calibration, memory_limit_bytes=calibration.memory_limit_bytes // 4)
    with clock.phase("calibrate"):
        shapes = observe(model, sites.sites, dataset.first(1), calibration)
        carriers = find_carriers(model) if "integer" in settings.allowed().arithmetics else ()
        values = value_shapes(model, activation_values(model, sites.sites, carriers), dataset.first(1), calibration)
    return Job(
        original, model, canonicalization, sites, excluded, dataset, splits, kinds, shapes, carriers, values, settings, calibration, clock
    )


def _has_integers(sites: Sites, arithmetics: Collection[str]) -> bool:
    """Whether any operator that reads a site can compute with bytes in an arithmetic that is allowed."""
    allowed = [ARITHMETICS[name] for name in ("integer", "dynamic") if name in arithmetics]
    return any(each.declines(use.use, site.opset) is None for each in allowed for site in sites for use in site.uses)
