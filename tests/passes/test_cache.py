"""The cache keeps what it is given, across processes, and never breaks a run."""

from __future__ import annotations

import logging
import os
import pickle
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from intaglio.passes.cache import Cache, default_folder, digest

REPOSITORY = Path(__file__).parents[2]

json_values = st.recursive(
    st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@settings(deadline=None)
@given(json_values)
def test_json_comes_back_as_it_was(value):
    cache = Cache(None)
    cache.put_json("a", "k", value)
    assert cache.get_json("a", "k") == value


@settings(deadline=None)
@given(hnp.arrays(hnp.scalar_dtypes().filter(lambda dtype: dtype.kind in "biuf"), hnp.array_shapes(min_dims=0, min_side=0)))
def test_arrays_come_back_as_they_were(array):
    cache = Cache(None)
    cache.put_array("a", "k", array)
    back = cache.get_array("a", "k")
    assert back is not None
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


def test_a_file_is_shared_and_later_values_win(tmp_path):
    first, second = Cache(tmp_path / "new" / "cache"), Cache(tmp_path / "new" / "cache")
    first.put_json("latency", "k", 1)
    first.put_json("latency", "k", 2)
    first.put_array("latency", "k", np.arange(3))
    assert second.get_json("latency", "k") == 2
    np.testing.assert_array_equal(second.get_array("latency", "k"), np.arange(3))
    assert second.get_json("spectra", "k") is None
    assert second.get_array("latency", "other") is None


def test_another_process_resumes(tmp_path):
    program = "import pathlib, sys; from intaglio.passes.cache import Cache; Cache(pathlib.Path(sys.argv[1])).put_json('n', 'k', 1.5)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment)
    assert Cache(tmp_path).get_json("n", "k") == 1.5


def test_threads_lose_nothing(tmp_path):
    cache = Cache(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda index: cache.put_json("n", str(index), index), range(24)))
    assert [Cache(tmp_path).get_json("n", str(index)) for index in range(24)] == list(range(24))


def test_pickles_as_its_folder(tmp_path):
    Cache(tmp_path).put_json("n", "k", "v")
    assert pickle.loads(pickle.dumps(Cache(tmp_path))).get_json("n", "k") == "v"


@pytest.mark.parametrize("on_disk", [True, False])
def test_the_oldest_arrays_go_first(tmp_path, on_disk):
    cache = Cache(tmp_path if on_disk else None, limit_bytes=3000)
    cache.put_json("n", "0", "stays" if on_disk else "goes")
    for index in range(4):
        cache.put_array("n", str(index), np.full(100, index, np.float64))  # 800 bytes and a header of 128
    kept = [index for index in range(4) if cache.get_array("n", str(index)) is not None]
    assert kept == [1, 2, 3]
    assert cache.get_json("n", "0") == ("stays" if on_disk else None)


def test_an_array_beyond_the_limit_is_not_kept(tmp_path):
    cache = Cache(tmp_path, limit_bytes=100)
    cache.put_array("n", "k", np.zeros(1000))
    assert cache.get_array("n", "k") is None


@pytest.mark.parametrize("array", [np.array([object()]), np.ones(2, ml_dtypes.bfloat16), np.ones(2, ml_dtypes.float8_e5m2)])
def test_types_that_would_not_come_back_are_refused(array):
    with pytest.raises(ValueError, match="expected one of numpy's own number types"):
        Cache(None).put_array("n", "k", array)


def test_a_corrupt_file_costs_one_warning(tmp_path, caplog):
    Cache(tmp_path).put_json("n", "k", 1)
    (file,) = tmp_path.glob("*.sqlite")
    file.write_bytes(b"this is no database" * 100)
    cache = Cache(tmp_path)
    assert cache.get_json("n", "k") is None
    cache.put_json("n", "k", 2)
    cache.put_array("n", "k", np.arange(2))
    assert cache.get_json("n", "k") == 2
    assert cache.get_array("n", "k") is not None
    (warning,) = warnings_of(caplog)
    assert str(tmp_path) in warning
    assert file.read_bytes().startswith(b"this is no database")  # not ours to delete


def test_a_folder_that_cannot_be_made_costs_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file" / "cache")
    cache.put_json("n", "k", 1)
    assert cache.get_json("n", "k") == 1
    assert len(warnings_of(caplog)) == 1


def test_a_locked_file_costs_one_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("intaglio.passes.cache._BUSY_TIMEOUT_S", 0.05)
    Cache(tmp_path).put_json("n", "k", 1)
    (file,) = tmp_path.glob("*.sqlite")
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    cache = Cache(tmp_path)
    cache.put_json("n", "k", 2)
    assert cache.get_json("n", "k") == 2
    other.execute("ROLLBACK")
    other.close()
    assert "locked" in warnings_of(caplog)[0]
    assert Cache(tmp_path).get_json("n", "k") == 1


def test_a_damaged_entry_is_a_miss(tmp_path, caplog):
    cache = Cache(tmp_path)
    cache.put_json("n", "k", 1)
    cache.put_array("n", "k", np.arange(2))
    (file,) = tmp_path.glob("*.sqlite")
    database = sqlite3.connect(file)
    for table in ("json", "arrays"):
        database.execute(f"UPDATE {table} SET data = ?", (b"\x93junk",))
    database.commit()
    database.close()
    assert cache.get_json("n", "k") is None
    assert cache.get_array("n", "k") is None
    assert len(warnings_of(caplog)) == 2


def test_default_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("INTAGLIO_CACHE", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    monkeypatch.delenv("INTAGLIO_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "intaglio"
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert default_folder() == tmp_path / "local" / "intaglio" / "Cache"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_folder() == Path.home() / "Library" / "Caches" / "intaglio"


def test_digest_depends_on_every_part_and_not_on_the_order_of_keys():
    assert digest("a", {"x": 1, "y": 2}) == digest("a", {"y": 2, "x": 1})
    assert len({digest("a", 1), digest("a", 2), digest("a", "1"), digest(["a", 1]), digest("a1")}) == 5
