"""A checkpoint is a whole state or none, and never breaks a run."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest

from intaglio.passes.checkpoint import KEPT, Checkpoint, fingerprint


def test_a_state_comes_back_as_it_was_and_the_last_one_wins(tmp_path: Path) -> None:
    file = Checkpoint(tmp_path / "new" / "state.npz")
    assert file.load() is None
    file.save({"a": np.arange(3)})
    file.save({"a": np.arange(4, dtype=np.float32), "b.c": np.asarray(0.1)})
    found = Checkpoint(file.path).load()
    assert found is not None
    assert set(found) == {"a", "b.c"}
    np.testing.assert_array_equal(found["a"], np.arange(4, dtype=np.float32))
    assert found["b.c"] == 0.1
    assert [path.name for path in file.path.parent.iterdir()] == ["state.npz"]
    file.remove()
    assert file.load() is None
    file.remove()


def test_it_is_due_after_the_given_time() -> None:
    file = Checkpoint(Path("unused"))
    assert file.is_due(0)
    assert not file.is_due(3600)


def test_what_is_damaged_counts_as_absent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = Checkpoint(tmp_path / "state.npz")
    file.save({"a": np.arange(1000)})
    file.path.write_bytes(file.path.read_bytes()[:100])
    assert file.load() is None
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("seed", range(3))
def test_no_damage_breaks_a_run(seed: int, tmp_path: Path) -> None:
    """Flipped bytes, some of which zipfile takes for encryption or for a newer version of its format."""
    file = Checkpoint(tmp_path / "state.npz")
    file.save({"a": np.arange(5)})
    whole, rng = file.path.read_bytes(), np.random.default_rng(seed)
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        file.path.write_bytes(damaged)
        file.load()


def test_a_single_array_counts_as_absent(tmp_path: Path) -> None:
    file = Checkpoint(tmp_path / "state.npz")
    with file.path.open("wb") as stream:
        np.save(stream, np.arange(3))
    assert file.load() is None


def test_a_folder_that_cannot_be_written_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("not a folder")
    file = Checkpoint(tmp_path / "file" / "state.npz")
    with caplog.at_level(logging.WARNING):
        file.save({"a": np.arange(3)})
        file.save({"a": np.arange(3)})
    assert caplog.text.count("cannot write checkpoint") == 1


def test_the_oldest_of_a_kind_make_room(tmp_path: Path) -> None:
    others = [tmp_path / "menu-1.npz", tmp_path / "tune.txt"]
    for other in others:
        other.write_text("of another kind")
    for number in range(KEPT + 3):
        Checkpoint(tmp_path / f"tune-{number}.npz").save({"a": np.arange(3)})
        os.utime(tmp_path / f"tune-{number}.npz", (number, number))
    last = Checkpoint(tmp_path / f"tune-{KEPT + 3}.npz")
    last.save({"a": np.arange(3)})
    expected = [f"tune-{number}.npz" for number in range(4, KEPT + 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*expected, *(other.name for other in others)])


def test_a_save_that_is_broken_off_leaves_the_last_state_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Checkpoint(tmp_path / "state.npz")
    file.save({"a": np.arange(3)})

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", broken)
        with pytest.raises(KeyboardInterrupt):
            file.save({"a": np.arange(4)})
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]
    found = file.load()
    assert found is not None
    np.testing.assert_array_equal(found["a"], np.arange(3))


def test_fingerprints_tell_apart_what_differs() -> None:
    parts = [
        (["a", "b"], []),
        (["ab"], []),
        (["a", "b"], [np.zeros(2)]),
        (["a", "b"], [np.zeros(2, np.float32)]),
        (["a", "b"], [np.ones(2)]),
    ]
    assert len({fingerprint(*part) for part in parts}) == len(parts)
    assert fingerprint(*parts[2]) == fingerprint(*parts[2])
