"""The verbs: what they write, what they print, and that the promise is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from intaglio import __version__
from intaglio.passes.session import open_session
from intaglio.tools.cli import main
from intaglio.tools.progress import shown

pytestmark = pytest.mark.usefixtures("folder")

COMPRESS = "compress model.onnx -o out.onnx --data data.npz --size 0.4"
VERBS = ("inspect", "compress", "plan", "apply", "verify", "bench")


def run(arguments: str) -> None:
    """Run a command that must work."""
    assert main(arguments.split()) == 0


def document(arguments: str, capfd: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What a command prints with --json: one document on stdout, and nothing on stderr."""
    capfd.readouterr()
    run(f"{arguments} --json")
    out, err = capfd.readouterr()
    assert err == ""
    found: dict[str, Any] = json.loads(out)
    return found


def outputs(path: str) -> np.ndarray:
    """The logits of the first samples."""
    with np.load("data.npz") as data:
        (logits,) = open_session(Path(path)).run(["logits"], {"image": data["image"][:8]})
    return np.asarray(logits)


def edit_plan(**forms: dict[str, object]) -> None:
    """Change forms in plan.json."""
    plan = json.loads(Path("plan.json").read_text(encoding="utf-8"))
    for site, form in forms.items():
        plan["sites"][site] |= form
    Path("plan.json").write_text(json.dumps(plan), encoding="utf-8")


def test_compress_keeps_a_size_budget_and_reports(capfd: pytest.CaptureFixture[str]) -> None:
    source = Path("model.onnx").read_bytes()
    printed = document(f"{COMPRESS} --labels y --report reports/deep", capfd)
    written = json.loads(Path("reports/deep/report.json").read_text(encoding="utf-8"))
    assert written == printed
    assert printed["intaglio"] == __version__
    assert printed["status"] == "met"
    size_bytes = Path("out.onnx").stat().st_size
    assert printed["size"] == {"reference_bytes": len(source), "bytes": size_bytes, "ratio": size_bytes / len(source)}
    assert size_bytes <= 0.4 * len(source)
    assert Path("model.onnx").read_bytes() == source
    assert printed["model"]["path"] == "model.onnx"
    assert printed["output"]["path"] == "out.onnx"
    assert printed["divergence"]["unit"] == "kl_nats"
    assert printed["divergence"]["samples"] == printed["data"]["verify"] == 12
    assert printed["metric"]["name"] == "accuracy"
    assert [site["name"] for site in printed["sites"]] == ["stem", "body", "hidden", "head"]
    assert {site["arithmetic"] for site in printed["sites"]} == {"float"}  # nothing asks for speed
    assert printed["carriers"] == []
    assert set(printed["loading"]) == {"reference_s", "candidate_s", "reference_peak_bytes", "candidate_peak_bytes"}
    assert json.loads(Path("reports/deep/plan.json").read_text(encoding="utf-8"))["model_sha256"] == printed["model"]["sha256"]
    assert np.abs(outputs("out.onnx") - outputs("model.onnx")).max() < 0.1 * np.abs(outputs("model.onnx")).max()


def test_compress_shows_tables_and_progress_stays_off_pipes(capfd: pytest.CaptureFixture[str]) -> None:
    run(COMPRESS)
    out, err = capfd.readouterr()
    assert err == ""
    for words in ("size", "latency, 1 thread", "divergence", "hidden", "wrote out.onnx"):
        assert words in out


def test_two_runs_write_the_same_bytes() -> None:
    run(COMPRESS)
    first = Path("out.onnx").read_bytes()
    run(f"{COMPRESS} --no-cache")
    assert Path("out.onnx").read_bytes() == first


def test_random_data_claims_no_accuracy(capfd: pytest.CaptureFixture[str]) -> None:
    run("compress model.onnx -o out.onnx --data random --size 0.5")
    assert "nothing is said about accuracy" in capfd.readouterr().out


def test_excluded_weights_are_left_alone_and_said_to_be(capfd: pytest.CaptureFixture[str]) -> None:
    found = document(f"{COMPRESS} --exclude body --exclude stem", capfd)
    assert {"name": "body", "reason": "excluded by --include/--exclude"} in found["skipped"]
    before, after = ({t.name: t for t in onnx.load(path).graph.initializer} for path in ("model.onnx", "out.onnx"))
    assert after["body"] == before["body"]


def test_only_the_named_forms_are_used(capfd: pytest.CaptureFixture[str]) -> None:
    found = document(f"{COMPRESS} --decompositions dense --storages fp16,int8", capfd)
    assert {site["form"] for site in found["sites"]} <= {"unchanged", "dense"}
    assert {site["storage"] for site in found["sites"]} <= {"float", "fp16", "int8"}


def test_arithmetics_are_offered_as_they_are_allowed(capfd: pytest.CaptureFixture[str]) -> None:
    options = "--decompositions dense --storages int8,int4 --size 0.9"
    offered = {}
    for allowed in ("float", "integer", "dynamic", "integer,dynamic"):
        found = document(f"plan model.onnx -o plan.json --data data.npz {options} --arithmetics {allowed}", capfd)
        offered[allowed] = {row[4] for name in ("stem", "body", "hidden", "head") for row in found["candidates"][name]}
    assert offered == {
        "float": {"float"},
        "integer": {"float", "integer"},
        "dynamic": {"float", "dynamic"},
        "integer,dynamic": {"float", "integer", "dynamic"},
    }


def test_without_expansion_only_bytes_that_are_computed_with_are_offered(capfd: pytest.CaptureFixture[str]) -> None:
    found = document("plan model.onnx -o plan.json --data data.npz --decompositions dense --no-expand --size 0.99", capfd)
    forms = {tuple(row[2:5:2]) for name in ("stem", "body", "hidden", "head") for row in found["candidates"][name]}
    assert {arithmetic for _, arithmetic in forms} >= {"float", "integer"}
    assert {storage for storage, arithmetic in forms if arithmetic in ("integer", "dynamic")} == {"int8"}
    assert {storage for storage, arithmetic in forms if arithmetic == "float"} == {"float"}


def test_without_expansion_a_size_budget_alone_is_met_with_arithmetic() -> None:
    run("compress model.onnx -o small.onnx --data data.npz --decompositions dense --no-expand --size 0.9")
    assert Path("small.onnx").stat().st_size <= 0.9 * Path("model.onnx").stat().st_size


def test_the_range_method_is_obeyed() -> None:
    plan_options = "--data data.npz --decompositions dense --arithmetics integer --size 0.9"
    run(f"plan model.onnx -o plan.json {plan_options}")
    integers = {"decomposition": "dense", "ranks": [], "storage": "int8", "execution": "dense", "arithmetic": "integer"}
    edit_plan(stem=integers, body=integers)
    models = []
    for method in ("minmax", "percentile", "mse"):
        run(f"apply model.onnx plan.json -o {method}.onnx --data data.npz --ranges {method}")
        models.append(Path(f"{method}.onnx").read_bytes())
    assert len(set(models)) == 3
    assert len({len(model) for model in models}) == 1


def test_plan_then_apply_writes_what_the_plan_says(capfd: pytest.CaptureFixture[str]) -> None:
    printed = document("plan model.onnx -o plan.json --data data.npz --size 0.4", capfd)
    assert json.loads(Path("plan.json").read_text(encoding="utf-8")) == printed
    assert printed["solver"]["status"] == "optimal"
    report = document("apply model.onnx plan.json -o out.onnx --data data.npz", capfd)
    assert report["status"] == "met"
    assert report["solver"]["gap"] <= 1e-4
    chosen = {name: (form["decomposition"], form["arithmetic"]) for name, form in printed["sites"].items()}
    sites = {site["name"]: (site["form"], site["arithmetic"]) for site in report["sites"]}
    carriers = {name: form for name, form in chosen.items() if name not in sites}
    assert sites.items() <= chosen.items()
    assert report["carriers"] == [name for name, form in carriers.items() if form == ("unchanged", "integer")]
    assert set(carriers.values()) <= {("unchanged", "float"), ("unchanged", "integer")}
    assert Path("out.onnx").stat().st_size <= 0.4 * Path("model.onnx").stat().st_size


def test_what_more_of_a_budget_would_buy_is_told_and_reported(capfd: pytest.CaptureFixture[str]) -> None:
    run("plan model.onnx -o plan.json --data data.npz --size 0.4")
    assert "Predicted, of what it takes: 10% more size: divergence" in capfd.readouterr().out
    (margin,) = document("apply model.onnx plan.json -o out.onnx --data data.npz", capfd)["margins"]
    assert (margin["budget"], margin["minimized"]) == ("size", "error")
    assert 0 <= margin["ratio"] <= 1


def test_a_plan_is_solved_again_without_data(capfd: pytest.CaptureFixture[str]) -> None:
    run("plan model.onnx -o plan.json --data data.npz --size 0.4")
    Path("data.npz").unlink()
    tight = document("plan model.onnx --reuse plan.json -o tight.json --size 0.2", capfd)
    loose = document("plan model.onnx --reuse plan.json -o loose.json --size 0.6", capfd)
    assert tight["candidates"] == loose["candidates"]
    assert tight["solver"]["objective"] > loose["solver"]["objective"]


def test_an_edited_plan_is_applied_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    run("plan model.onnx -o plan.json --data data.npz --size 0.4")
    edit_plan(hidden={"decomposition": "lowrank", "ranks": [7], "storage": "fp16", "execution": "contract", "arithmetic": "float"})
    report = document("apply model.onnx plan.json -o out.onnx --data data.npz", capfd)
    hidden = next(site for site in report["sites"] if site["name"] == "hidden")
    assert (hidden["form"], hidden["parameters"], hidden["storage"]) == ("lowrank", {"rank": 7}, "fp16")
    assert hidden["bytes"] == 2 * 7 * (32 + 512)
    assert hidden["reason"] == "written into the plan by hand"
    assert report["solver"] is None
    assert report["divergence"]["predicted"] is None


def test_an_edited_plan_over_its_budget_is_written_with_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    run("plan model.onnx -o plan.json --data data.npz --size 0.2")
    edit_plan(hidden={"decomposition": "unchanged", "ranks": [], "storage": "float", "execution": "dense", "arithmetic": "float"})
    run("apply model.onnx plan.json -o out.onnx --data data.npz --report .")
    assert "does not keep its budget" in capfd.readouterr().err
    assert json.loads(Path("report.json").read_text(encoding="utf-8"))["status"] == "missed"


def test_a_solved_plan_that_breaks_its_budget_is_not_written(capfd: pytest.CaptureFixture[str]) -> None:
    run("plan model.onnx -o plan.json --data data.npz --size 0.4")
    plan = json.loads(Path("plan.json").read_text(encoding="utf-8"))
    plan["budget"]["divergence"] = 1e-12
    Path("plan.json").write_text(json.dumps(plan), encoding="utf-8")
    capfd.readouterr()
    assert main(["apply", "model.onnx", "plan.json", "-o", "out.onnx", "--data", "data.npz"]) == 4
    assert "over the budget of 1e-12" in capfd.readouterr().err
    assert not Path("out.onnx").exists()


def test_verify_measures_all_samples(capfd: pytest.CaptureFixture[str]) -> None:
    same = document("verify model.onnx model.onnx --data data.npz --labels y", capfd)
    assert same["divergence"] == {"unit": "kl_nats", "predicted": None, "measured": 0.0, "samples": 48}
    assert same["agreement"] == 1.0
    assert same["size"]["ratio"] == 1.0
    assert same["metric"]["reference"] == same["metric"]["candidate"]
    assert same["status"] == "measured"


def test_verify_fails_above_its_limit_and_still_tells(capfd: pytest.CaptureFixture[str]) -> None:
    run(COMPRESS)
    assert document("verify model.onnx out.onnx --data data.npz --error 1", capfd)["status"] == "met"
    assert main(["verify", "model.onnx", "out.onnx", "--data", "data.npz", "--error", "1e-12", "--json"]) == 4
    out, err = capfd.readouterr()
    assert json.loads(out)["status"] == "missed"
    assert "over --error 1e-12" in err


def test_bench_times_every_model_against_the_first(capfd: pytest.CaptureFixture[str]) -> None:
    found = document("bench model.onnx model.onnx model.onnx --data random --pairs 5", capfd)
    assert [each["model"]["path"] for each in found["candidates"]] == ["model.onnx"] * 2
    for each in found["candidates"]:
        assert each["latency"]["pairs"] == 5
        assert 0 < each["latency"]["ratio_low"] <= each["latency"]["ratio_high"]
    alone = document("bench model.onnx --data data.npz --pairs 5", capfd)
    assert alone["latency_s"] > 0
    assert alone["candidates"] == []


@pytest.mark.parametrize("data", ["", " --data data.npz"], ids=["declared", "measured"])
def test_inspect_lists_every_weight(data: str, capfd: pytest.CaptureFixture[str]) -> None:
    found = document(f"inspect model.onnx{data}", capfd)
    sites = {site["name"]: site for site in found["sites"]}
    assert list(sites) == ["stem", "body", "hidden", "head"]
    assert sites["stem"]["macs"] == 16 * 8 * 8 * 27
    assert sites["body"]["macs"] == 32 * 4 * 4 * 144
    assert sites["hidden"]["bytes"] == 4 * 32 * 512
    assert (sites["hidden"]["latency_s"] is None) == (data == "")
    assert found["whitened"] == (data != "")
    assert 1 <= sites["hidden"]["effective_rank"] <= sites["hidden"]["rank"] == 32
    run(f"inspect model.onnx{data}")
    assert "hidden" in capfd.readouterr().out


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    run(f"{verb} --help")
    out, err = capfd.readouterr()
    assert f"intaglio {verb}" in out
    assert "--json" in out
    assert err == ""


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    run("--version")
    assert capfd.readouterr().out == f"intaglio {__version__}\n"


def test_progress_passes_everything_on_when_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    with shown("Working") as progress:
        assert list(progress(iter("abc"), "Spelling", 3)) == ["a", "b", "c"]


def start(arguments: str) -> subprocess.Popen[str]:
    """A command in a process of its own, which listens to Ctrl-C even where the tests run in the background and ignore it."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "intaglio", *arguments.split()],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTAGLIO_CACHE", "cache")
    before = sorted(os.listdir())
    with start(f"{COMPRESS} --report reports") as process:
        deadline = time.monotonic() + 60
        while not Path("cache").exists() and process.poll() is None:  # made when the first latency is kept
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    assert err.count("\n") == 1
    assert sorted({*os.listdir()} - {"cache"}) == before
    run(COMPRESS)


def test_a_closed_pipe_is_no_reason_for_a_traceback() -> None:
    with start("inspect model.onnx --json") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
