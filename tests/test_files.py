"""Files and folders that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparseloom.files import fresh_file, fresh_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_file_takes_the_place_of_another_when_it_is_done(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.txt"
    with fresh_file(file) as fresh:
        fresh.write_text("one")
        assert not file.exists()
    with fresh_file(file) as fresh:
        fresh.write_text("two")
        assert file.read_text() == "one"
    assert file.read_text() == "two"
    assert names(tmp_path) == ["a.txt", "new"]


def test_a_file_stays_as_it_was_after_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    with pytest.raises(UnicodeEncodeError), fresh_file(file) as fresh:
        fresh.write_text("half of t\u00fc", encoding="ascii")
    assert file.read_text() == "one"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_takes_the_place_of_another_with_all_it_holds(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    for name in ("one", "two"):
        with fresh_folder(folder) as fresh:
            (fresh / name).touch()
    assert names(tmp_path) == ["a", "two"]
    with pytest.raises(IsADirectoryError), fresh_folder(folder) as fresh:
        fresh.write_text("")
    assert names(tmp_path) == ["a", "two"]


def test_the_old_folder_comes_back_where_the_new_one_cannot_take_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rename = tmp_path / "a", Path.rename
    folder.mkdir()

    def fails_once(self: Path, target: Path) -> Path:
        if self.suffix == ".part":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(OSError, match="no"), fresh_folder(folder) as fresh:
        (fresh / "new").touch()
    assert names(tmp_path) == ["a"]
