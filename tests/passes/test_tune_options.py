"""What tuning cannot do is refused before anything is run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from intaglio.passes.errors import InputError
from intaglio.passes.job import Job, Settings, open_job
from intaglio.passes.tune_options import TuneOptions, check_options
from intaglio.passes.tuning import check_tuning
from tests.models import Array, classifier, normal, parse

ROWS = "g (float[N, 16] x) => (float[N, 24] OUT) { OUT = MatMul (x, w) }"


def images(**settings: object) -> Job:
    proto, data = classifier()
    return open_job(proto, data, Settings(**settings))  # type: ignore[arg-type]


def rows(output: str, labels: Array | None = None, **settings: object) -> Job:
    data = {"x": normal(3, 40, 16)} | ({} if labels is None else {"labels": labels})
    proto = parse(ROWS.replace("OUT", output), {"w": normal(1, 16, 24)})
    return open_job(proto, data, Settings(labels=None if labels is None else "labels", **settings))  # type: ignore[arg-type]


def test_what_is_possible_passes() -> None:
    check_options(images(labels="labels"), TuneOptions(augmentations=("flip", "crop"), labels=0.5, loss="cosine"))
    check_options(images(), TuneOptions(augmentations=("mixup",)))
    check_options(rows("logits", np.arange(40) % 24), TuneOptions(labels=1.0))


NUMBERS = np.arange(40) % 24


@pytest.mark.parametrize(
    ("job", "options", "message"),
    [
        (images(), TuneOptions(augmentations=("spin",)), "'spin' is unknown; expected one of flip"),
        (rows("logits"), TuneOptions(augmentations=("flip",)), "'flip' needs one input of images .* has 0"),
        (images(), TuneOptions(loss="huber"), "'huber' is unknown; expected one of auto"),
        (images(), TuneOptions(labels=1.0), "the data has none"),
        (images(labels="labels"), TuneOptions(labels=-1.0), "weight -1, expected a number above 0"),
        (rows("y", NUMBERS), TuneOptions(labels=1.0), "'y' holds no class scores; say with --output-kind"),
        (rows("logits", NUMBERS.astype(str)), TuneOptions(labels=1.0), "expected numbers of classes"),
        (images(labels="labels"), TuneOptions(labels=1.0, augmentations=("mixup",)), "mixed samples have no label"),
    ],
)
def test_what_cannot_be_done_is_refused_with_a_remedy(job: Job, options: TuneOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_options(job, options)


def test_settings_are_checked_only_where_they_ask_for_tuning() -> None:
    bad = rows("logits", augment=("flip",))
    check_tuning(bad)
    with pytest.raises(InputError, match="needs one input of images"):
        check_tuning(replace(bad, settings=replace(bad.settings, tune="auto")))
    with pytest.raises(InputError, match="expected a number of steps"):
        check_tuning(replace(bad, settings=replace(bad.settings, tune="many")))
