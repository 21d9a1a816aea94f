"""Bad input, one row a kind: the exit status, one line that says what, where and what to do, no traceback, nothing written."""

from __future__ import annotations

import errno
import functools
import json
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from intaglio.tools.cli import main


@dataclass(frozen=True)
class Bad:
    """A mistake.

    Attributes:
        name: of the row.
        arguments: of the command, split at blanks.
        said: what the line on stderr must contain.
        prepare: makes the mistake in the current folder.
        status: the expected exit status.
    """

    name: str
    arguments: str
    said: tuple[str, ...]
    prepare: Callable[[], None] = lambda: None
    status: int = 2


COMPRESS = "compress model.onnx -o out.onnx --data data.npz --size 0.5"


PRESET = COMPRESS.replace(" --size 0.5", "")


def truncate() -> None:
    content = Path("model.onnx").read_bytes()
    Path("model.onnx").write_bytes(content[: len(content) // 2])


def scribble() -> None:
    Path("model.onnx").write_bytes(b"not a model at all")


def store_externally(location: str, *, keep: bool) -> None:
    """Move the weights to a file, and let the model name that file by `location`."""
    model = onnx.load("model.onnx")
    onnx.save(model, "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=64)
    model = onnx.load("model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    Path("model.onnx").write_bytes(model.SerializeToString())
    if not keep:
        Path("weights.bin").unlink()


def lose_external_data() -> None:
    store_externally("weights.bin", keep=False)


def point_outside() -> None:
    store_externally("../weights.bin", keep=True)


def raise_opset() -> None:
    model = onnx.load("model.onnx")
    model.opset_import[0].version = 999
    Path("model.onnx").write_bytes(model.SerializeToString())


def replace_image(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[], None]:
    """Change the images of the data file."""

    def prepare() -> None:
        with np.load("data.npz") as data:
            arrays = {"image": change(data["image"]), "y": data["y"]}
        np.savez("data.npz", **arrays)

    return prepare


def poison(image: np.ndarray) -> np.ndarray:
    image[3, 0, 2, 2] = np.nan
    return image


def rename_input() -> None:
    with np.load("data.npz") as data:
        arrays = {"picture": data["image"]}
    np.savez("data.npz", **arrays)


def shorten_labels() -> None:
    with np.load("data.npz") as data:
        arrays = {"image": data["image"], "y": data["y"][:5]}
    np.savez("data.npz", **arrays)


def pickle_image() -> None:
    np.savez("data.npz", image=np.array([{"code": os.getcwd}], dtype=object))


def other_data() -> None:
    Path("data.txt").write_text("1 2 3", encoding="utf-8")


@functools.cache
def solved_plan() -> str:
    """A plan of the model, which is the same in every test."""
    assert main(["plan", "model.onnx", "-o", "plan.json", "--data", "data.npz", "--size", "0.5"]) == 0
    return Path("plan.json").read_text(encoding="utf-8")


def make_plan(edit: Callable[[dict[str, object]], None] = lambda plan: None) -> Callable[[], None]:
    """Write a plan of the model, edited."""

    def prepare() -> None:
        plan = json.loads(solved_plan())
        edit(plan)
        Path("plan.json").write_text(json.dumps(plan), encoding="utf-8")

    return prepare


def unknown_form(plan: dict[str, object]) -> None:
    plan["sites"]["body"]["decomposition"] = "magic"  # type: ignore[index]


def unknown_storage(plan: dict[str, object]) -> None:
    plan["sites"]["body"]["storage"] = "int7"  # type: ignore[index]


def unknown_arithmetic(plan: dict[str, object]) -> None:
    plan["sites"]["body"]["arithmetic"] = "analog"  # type: ignore[index]


def impossible_arithmetic(plan: dict[str, object]) -> None:
    plan["sites"]["body"] = {"decomposition": "dense", "ranks": [], "storage": "int8", "execution": "dense", "arithmetic": "rows"}  # type: ignore[index]


def unknown_site(plan: dict[str, object]) -> None:
    plan["sites"]["nobody"] = plan["sites"]["body"]  # type: ignore[index]


def other_version(plan: dict[str, object]) -> None:
    plan["intaglio_plan"] = 99


def change_model() -> None:
    make_plan()()
    model = onnx.load("model.onnx")
    model.doc_string = "another"
    onnx.save(model, "model.onnx")


def write_garbage_plan() -> None:
    Path("plan.json").write_text("{", encoding="utf-8")


def make_output_folder() -> None:
    Path("out.onnx").mkdir()


def add_output() -> None:
    model = onnx.load("model.onnx")
    model.graph.output[0].name = "scores"
    model.graph.node[-1].output[0] = "scores"
    onnx.save(model, "other.onnx")


def make_text_input() -> None:
    model = onnx.load("model.onnx")
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.STRING
    Path("model.onnx").write_bytes(model.SerializeToString())


def occupy_report() -> None:
    Path("report").write_text("a file", encoding="utf-8")


ROWS = [
    Bad("model missing", COMPRESS.replace("model", "absent"), ("absent.onnx", "No such file", "check the path")),
    Bad("model corrupt", COMPRESS, ("model.onnx", "no ONNX model", "export or download"), scribble),
    Bad("model truncated", COMPRESS, ("model.onnx", "truncated", "export or download"), truncate),
    Bad("model is a folder", COMPRESS.replace("model.onnx", "."), ("is a folder", "expected an ONNX file", "name the .onnx")),
    Bad("external data missing", COMPRESS, ("model.onnx", "weights.bin"), lose_external_data),
    Bad("external data outside", COMPRESS, ("model.onnx", "../weights.bin"), point_outside),
    Bad("opset unknown", COMPRESS, ("model.onnx", "opset 999", "expected 7 to"), raise_opset),
    Bad("text input", COMPRESS, ("'image'", "float32", "convert"), make_text_input),
    Bad("data missing", COMPRESS.replace("data.npz", "no.npz"), ("no.npz", "no such file", "give the path")),
    Bad("data of no kind", COMPRESS.replace("data.npz", "data.txt"), ("data.txt", "expected an .npz"), other_data),
    Bad("input misnamed", COMPRESS, ("data.npz", "'image'", "'picture'", "rename"), rename_input),
    Bad("wrong type", COMPRESS, ("'image'", "int64", "float32", "convert"), replace_image(lambda i: i.astype(np.int64))),
    Bad("wrong rank", COMPRESS, ("'image'", "[48, 192]", "expected"), replace_image(lambda i: i.reshape(48, -1))),
    Bad("wrong size", COMPRESS, ("'image'", "[48, 3, 8, 4]", "expected"), replace_image(lambda i: i[..., :4])),
    Bad("not finite", COMPRESS, ("data.npz", "'image'", "NaN", "remove"), replace_image(poison)),
    Bad("too few samples", COMPRESS, ("2 of 2 samples", "at least 3"), replace_image(lambda i: i[:2])),
    Bad("pickled data", COMPRESS, ("data.npz", "plain arrays", "numpy.savez"), pickle_image),
    Bad("labels missing", f"{COMPRESS} --labels z", ("data.npz", "'z'", "'y'")),
    Bad("labels short", f"{COMPRESS} --labels y", ("'y'", "[5]", "48 samples"), shorten_labels),
    Bad("metric unknown", f"{COMPRESS} --labels y --metric taste", ("--metric taste", "accuracy, mse")),
    Bad("kind unknown", f"{COMPRESS} --output-kind smell", ("smell", "auto", "logits")),
    Bad("provider unknown", f"{COMPRESS} --providers Abacus", ("'Abacus'", "CPUExecutionProvider", "choose")),
    Bad("target unknown", f"{COMPRESS} --target toaster", ("--target toaster", "expected one of cpu")),
    Bad("decomposition unknown", f"{COMPRESS} --decompositions magic", ("--decompositions magic", "expected some of", "lowrank")),
    Bad("storage unknown", f"{COMPRESS} --storages int8,int7", ("--storages int7", "expected some of", "int8")),
    Bad(
        "storage of another target", f"{COMPRESS} --target mobile --storages nbits4-b32", ("--storages nbits4-b32", "target mobile", "int8")
    ),
    Bad("arithmetic unknown", f"{COMPRESS} --arithmetics integer,analog", ("--arithmetics analog", "expected some of float, integer")),
    Bad(
        "arithmetic of another target", f"{COMPRESS} --target cuda --arithmetics integer", ("--arithmetics integer", "target cuda", "nbits")
    ),
    Bad("ranges unknown", f"{COMPRESS} --ranges widest", ("--ranges widest", "expected one of auto, minmax")),
    Bad(
        "ranges unknown to apply",
        "apply model.onnx plan.json -o out.onnx --data data.npz --ranges widest",
        ("--ranges widest", "expected one of auto, minmax"),
        make_plan(),
    ),
    Bad("curvature unknown", f"{COMPRESS} --curvature output", ("--curvature output", "expected input or both")),
    Bad("no-expand takes no value", f"{COMPRESS} --no-expand=yes", ("--no-expand", "does not take a value", "intaglio --help")),
    Bad(
        "no-expand leaves nothing",
        f"{COMPRESS} --no-expand --decompositions dense --storages int4 --arithmetics float",
        ("no plan meets size", "nearest feasible: --size"),
        status=3,
    ),
    Bad("include matches nothing", f"{COMPRESS} --include zzz", ("--include 'zzz'", "none of the 4", "stem")),
    Bad("include malformed", f"{COMPRESS} --include (", ("--include '('", "not a regular expression")),
    Bad("threads", f"{COMPRESS} --threads 0", ("--threads 0", "at least 1")),
    Bad("samples", f"{COMPRESS} --samples 0", ("--samples 0", "at least 1")),
    Bad("seed", f"{COMPRESS} --seed -1", ("--seed -1", "from 0")),
    Bad("no budget", COMPRESS.replace("--size 0.5", ""), ("no budget", "--size, --latency, --error", "for example")),
    Bad("budget unreadable", COMPRESS.replace("0.5", "half"), ("--size half", "expected a ratio", "kib")),
    Bad("budget negative", COMPRESS.replace("0.5", "0"), ("--size 0", "positive")),
    Bad("ratio above 1", COMPRESS.replace("0.5", "1.5"), ("--size 1.5", "at most 1", "unit")),
    Bad("error no number", COMPRESS.replace("--size 0.5", "--error low"), ("--error low", "positive number")),
    Bad("minimize unknown", f"{COMPRESS} --minimize regret", ("--minimize regret", "size, latency or error")),
    Bad("tune no number", f"{COMPRESS} --tune many", ("--tune many", "number of steps", "auto")),
    Bad("tune with a preset", f"{PRESET} --labels y --drop 1 --tune 5", ("--tune", "does not go with --preset")),
    Bad("augment unknown", f"{COMPRESS} --tune 5 --augment blur", ("--augment blur", "flip")),
    Bad("augment without tuning", f"{COMPRESS} --augment flip", ("belong to tuning", "--tune")),
    Bad("tune labels without labels", f"{COMPRESS} --tune 5 --tune-labels 1", ("--tune-labels", "--labels")),
    Bad("preset unknown", f"{COMPRESS} --labels y --preset tiny", ("--preset tiny", "lossless or compact")),
    Bad("preset without labels", f"{COMPRESS} --preset lossless", ("--preset", "need labels", "--labels")),
    Bad("drop without labels", f"{PRESET} --drop 1", ("--drop", "need labels", "--labels")),
    Bad("drop no number", f"{PRESET} --labels y --drop few", ("--drop few", "a number from 0", "for example")),
    Bad("drop negative", f"{PRESET} --labels y --drop -1", ("--drop -1", "a number from 0", "for example")),
    Bad("drop with a size", f"{COMPRESS} --labels y --drop 1", ("--preset compact", "leave --size out")),
    Bad("lossless without a size", f"{PRESET} --labels y --preset lossless", ("--preset lossless", "needs a size", "--size 0.3")),
    Bad("lossless with a drop", f"{COMPRESS} --labels y --preset lossless --drop 1", ("--drop", "--preset compact", "give --size")),
    Bad("preset with a latency", f"{PRESET} --labels y --drop 1 --latency 0.5", ("does not go with --latency", "leave them out")),
    Bad(
        "preset with a size unreadable",
        f"{COMPRESS} --labels y --preset lossless".replace("0.5", "half"),
        ("--size half", "expected a ratio"),
    ),
    Bad("loss unknown", f"{PRESET} --labels y --drop 1 --loss regret", ("--loss regret", "cross-entropy, mse", "logits")),
    Bad(
        "lossless infeasible",
        f"{COMPRESS} --labels y --preset lossless".replace("0.5", "0.01"),
        ("no plan meets size", "nearest"),
        status=3,
    ),
    Bad("size infeasible", COMPRESS.replace("0.5", "0.01"), ("no plan meets size", "nearest feasible: --size"), status=3),
    Bad(
        "two budgets infeasible",
        COMPRESS.replace("0.5", "0.15") + " --error 1e-12",
        ("error 1e-12", "nearest feasible: --size", "or --error"),
        status=3,
    ),
    Bad("output is the source", COMPRESS.replace("out.onnx", "model.onnx"), ("model.onnx", "input of this command", "choose")),
    Bad("output is the data", COMPRESS.replace("out.onnx", "data.npz"), ("data.npz", "ends in .onnx", "rename")),
    Bad("output folder missing", COMPRESS.replace("out", "no/out"), ("no/out.onnx", "no folder no", "create it")),
    Bad("output is a folder", COMPRESS, ("out.onnx", "is a folder", "name a file"), make_output_folder),
    Bad("output folder not writable", COMPRESS.replace("out.onnx", "/proc/out.onnx"), ("/proc", "cannot be written", "choose")),
    Bad("report is a file", f"{COMPRESS} --report report", ("--report report", "not a folder"), occupy_report),
    Bad("option unknown", f"{COMPRESS} --fast", ("No such option: --fast", "intaglio compress --help")),
    Bad("option missing", "compress model.onnx --data data.npz --size 0.5", ("Missing option", "intaglio compress --help")),
    Bad("verb unknown", "squash model.onnx", ("squash", "intaglio --help")),
    Bad("number malformed", f"{COMPRESS} --threads two", ("'--threads'", "integer", "intaglio compress --help")),
    Bad(
        "reuse with what may change", "plan model.onnx -o out.json --reuse plan.json --size 0.5 --no-expand", ("--reuse", "leave them out")
    ),
    Bad("plan without data", "plan model.onnx -o out.json --size 0.5", ("--data nor --reuse", "give samples")),
    Bad("plan missing", "apply model.onnx plan.json -o out.onnx --data data.npz", ("plan.json", "intaglio plan")),
    Bad("plan not JSON", "apply model.onnx plan.json -o out.onnx --data data.npz", ("plan.json", "not JSON"), write_garbage_plan),
    Bad(
        "plan of another model",
        "apply model.onnx plan.json -o out.onnx --data data.npz",
        ("plan", "SHA-256", "model.onnx", "solve again"),
        change_model,
    ),
    Bad(
        "reused plan of another model",
        "plan model.onnx -o out.json --reuse plan.json --size 0.5",
        ("plan", "SHA-256", "model.onnx", "solve again"),
        change_model,
    ),
    Bad(
        "plan with an unknown form",
        "apply model.onnx plan.json -o out.onnx --data data.npz",
        ("plan.json", "site body", "magic", "lowrank"),
        make_plan(unknown_form),
    ),
    Bad(
        "plan with an unknown storage",
        "apply model.onnx plan.json -o out.onnx --data data.npz",
        ("plan.json", "site body", "int7", "int8"),
        make_plan(unknown_storage),
    ),
    Bad(
        "plan with an unknown arithmetic",
        "apply model.onnx plan.json -o out.onnx --data data.npz",
        ("plan.json", "site body", "analog", "integer"),
        make_plan(unknown_arithmetic),
    ),
    Bad(
        "plan with an impossible arithmetic",
        "apply model.onnx plan.json -o out.onnx --data data.npz",
        ("'body' cannot take dense/int8/dense/rows", "Conv looks no rows up", "choose another form"),
        make_plan(impossible_arithmetic),
    ),
    Bad(
        "plan with an unknown site",
        "apply model.onnx plan.json -o out.onnx --data data.npz",
        ("'nobody'", "not in the model"),
        make_plan(unknown_site),
    ),
    Bad(
        "plan of another version",
        "apply model.onnx plan.json -o out.onnx --data data.npz",
        ("plan.json", "version 99", "intaglio plan"),
        make_plan(other_version),
    ),
    Bad("pairs", "bench model.onnx --data data.npz --pairs 0", ("--pairs 0", "at least 1")),
    Bad("unlike models", "verify model.onnx other.onnx --data data.npz", ("scores", "logits", "like models"), add_output),
]


def contents() -> dict[str, bytes]:
    """Every file of the current folder."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in Path().rglob("*")}


def one_line(capfd: pytest.CaptureFixture[str]) -> str:
    """The only line on stderr, when stdout is empty."""
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("bad", ROWS, ids=lambda bad: bad.name.replace(" ", "-"))
def test_bad_input_gets_one_line(bad: Bad, capfd: pytest.CaptureFixture[str]) -> None:
    bad.prepare()
    capfd.readouterr()
    before = contents()
    status = main(bad.arguments.split())
    line = one_line(capfd)
    assert status == bad.status, line
    for words in bad.said:
        assert words in line
    assert contents() == before


def test_the_table_is_long_enough_and_its_names_differ() -> None:
    assert len({bad.name for bad in ROWS}) == len(ROWS) >= 20


def fail_with(error: BaseException) -> Callable[..., NoReturn]:
    """A function that raises."""

    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("place", "error", "status", "said"),
    [
        ("intaglio.passes.save._write", OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device"),
        ("intaglio.passes.pipeline.analyse", MemoryError(), 1, "out of memory"),
        ("intaglio.passes.pipeline.analyse", ZeroDivisionError("division"), 1, "INTAGLIO_DEBUG=1"),
        ("intaglio.passes.pipeline.analyse", KeyboardInterrupt(), 130, "interrupted"),
        ("intaglio.passes.save._write_file", KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=["disk-full", "out-of-memory", "unexpected", "interrupted", "interrupted-while-writing"],
)
def test_trouble_leaves_nothing_and_the_next_run_works(
    place: str, error: BaseException, status: int, said: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents()
    with monkeypatch.context() as broken:
        broken.setattr(place, fail_with(error))
        assert main(COMPRESS.split()) == status
    out, err = capfd.readouterr()
    assert out == ""
    assert said in err
    assert err.strip().count("\n") == 0
    assert contents() == before
    assert main(COMPRESS.split()) == 0
    assert Path("out.onnx").stat().st_size <= 0.5 * Path("model.onnx").stat().st_size


@pytest.mark.usefixtures("folder")
def test_debug_shows_where_an_unexpected_error_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAGLIO_DEBUG", "1")
    monkeypatch.setattr("intaglio.passes.pipeline.analyse", fail_with(ZeroDivisionError("division")))
    with pytest.raises(ZeroDivisionError, match="division"):
        main(COMPRESS.split())


@pytest.mark.usefixtures("folder")
def test_pickled_plans_are_not_unpickled(capfd: pytest.CaptureFixture[str]) -> None:
    Path("plan.json").write_bytes(pickle.dumps({"intaglio_plan": 1}))
    assert main(["apply", "model.onnx", "plan.json", "-o", "out.onnx", "--data", "data.npz"]) == 2
    assert "plan.json" in one_line(capfd)
