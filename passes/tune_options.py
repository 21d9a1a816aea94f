"""How a model is tuned, and which requests make no sense."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .adam import AdamOptions
from .augment import AUGMENTATIONS, image_input
from .divergence import Kind
from .errors import InputError
from .job import Job

LOSSES = ("auto", "mse", "cosine", "cosine+mse")
"""Values of `TuneOptions.loss`."""


@dataclass(frozen=True)
class TuneOptions:
    """How a model is tuned.

    Attributes:
        batch: samples per step; models of a fixed, smaller batch are run several times per step, and so are those whose reverse pass
            would not fit in memory.
        rate: how far a parameter may move per step, as a share of its array's root mean square; None to try `rates`.
        rates: to try.
        bold: whether the highest of them is taken that does no harm at first, or, in a long run, little; else the one that is best at
            once.
        warmup: share of the steps over which the rate rises.
        adam: how gradients are averaged.
        constants: whether biases and normalizations are tuned too.
        scales: whether scales of codes, and levels of scalar codebooks, are tuned too.
        augmentations: random changes of images; see `AUGMENTATIONS`.
        loss: of outputs that hold values: "mse", relative to their mean square; "cosine", the distance in direction; or "cosine+mse", the
            sum of both. "auto" is "mse". Class scores have the Kullback-Leibler divergence.
        temperature: at which class probabilities are compared.
        labels: weight of the cross-entropy to the data's labels; 0 leaves them unused.
        matched: names of values that exist in both models and are matched too.
        matching: weight of the relative mean square error of all `matched` values together.
        block_steps: steps that each block is taught by itself before the whole model is; 0 for none. All blocks together take about as
            long as so many steps of the whole model.
        block_rate: the highest rate of these, as `rate`.
        evaluations: how often the divergence on choose samples is measured.
        patience: evaluations without a better one after which tuning ends; None for no end.
        samples: choose samples on which it is measured, at most.
        save_s: seconds between checkpoints, which lie in the job's cache folder if that has one.
    """

    batch: int = 64
    rate: float | None = None
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    bold: bool = True
    warmup: float = 0.05
    adam: AdamOptions = field(default_factory=AdamOptions)
    constants: bool = True
    scales: bool = True
    augmentations: tuple[str, ...] = ()
    loss: str = "auto"
    temperature: float = 1.0
    labels: float = 0.0
    matched: tuple[str, ...] = ()
    matching: float = 0.0
    block_steps: int = 0
    block_rate: float = 3e-3
    evaluations: int = 20
    patience: int | None = None
    samples: int = 2048
    save_s: float = 30.0


def check_options(job: Job, options: TuneOptions) -> None:
    """Refuse what cannot be done for a job; runs no model.

    Raises:
        InputError: an augmentation or a loss is unknown, the data holds no images to be changed, or labels are asked for where there are
            none, where the first output is no class scores, or together with mixtures of samples.
    """
    unknown = [name for name in options.augmentations if name not in AUGMENTATIONS]
    if unknown:
        raise InputError(f"augmentation {unknown[0]!r} is unknown; expected one of {', '.join(AUGMENTATIONS)}")
    if options.augmentations:
        image_input(job.data.first(1), options.augmentations[0])
    if options.loss not in LOSSES:
        raise InputError(f"tuning: loss {options.loss!r} is unknown; expected one of {', '.join(LOSSES)}")
    if options.labels:
        _check_labels(job, options)


def _check_labels(job: Job, options: TuneOptions) -> None:
    """Refuse labels that no cross-entropy can be had to.

    Raises:
        InputError: see `check_options`.
    """
    if not options.labels > 0:
        raise InputError(f"tuning: labels have weight {options.labels:g}, expected a number above 0, or 0 to leave them unused")
    values = job.data.label_values
    if values is None:
        raise InputError("tuning: labels have a weight, but the data has none; name the array that holds them")
    output = job.model.proto.graph.output[0].name
    if job.kinds[0] == Kind.VALUES:
        raise InputError(
            f"tuning: labels have a weight, but the first output '{output}' holds no class scores; "
            "say with --output-kind what it holds, or leave out the weight"
        )
    if np.asarray(values).dtype.kind not in "biuf":
        raise InputError(f"tuning: labels are of type {np.asarray(values).dtype}, expected numbers of classes; give these")
    if "mixup" in options.augmentations:
        raise InputError("augmentation 'mixup': mixed samples have no label; leave out mixup or the labels")
