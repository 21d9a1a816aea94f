"""Outputs: refused early, written completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

from intaglio.passes.errors import InputError
from intaglio.tools.files import check_folder, check_output, write_text


def refuse(*_: object) -> NoReturn:
    """Stands for a rename that fails."""
    raise OSError(28, "No space left on device")


def test_text_appears_whole_in_a_new_folder(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "report.json", "{}")
    assert (tmp_path / "a" / "b" / "report.json").read_text(encoding="utf-8") == "{}\n"
    assert os.listdir(tmp_path / "a" / "b") == ["report.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("old", encoding="utf-8")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(InputError, match=r"cannot write .*report\.json: No space left"):
        write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_link_to_an_input_is_recognized(tmp_path: Path) -> None:
    source, link = tmp_path / "model.onnx", tmp_path / "link.onnx"
    source.write_bytes(b"")
    link.symlink_to(source)
    with pytest.raises(InputError, match="input of this command"):
        check_output(link, ".onnx", [source])


def test_good_places_are_accepted_and_nothing_is_made(tmp_path: Path) -> None:
    check_output(tmp_path / "out.onnx", ".onnx", [tmp_path / "model.onnx"])
    check_folder(tmp_path / "not" / "yet")
    assert os.listdir(tmp_path) == []
