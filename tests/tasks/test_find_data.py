from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from sparseloom.tasks import find_data, get_task, task_names
from sparseloom.tasks.data import find_file, read_bytes, read_text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb" / "ptb.valid.txt").write_text("a b\n")
    return tmp_path


@pytest.mark.usefixtures("no_data")
def test_the_folder_of_all_sets_and_the_sets_own_both_serve(root: Path) -> None:
    files = ("ptb.valid.txt",)
    assert find_data("ptb", root, files=files) == root / "ptb"
    assert find_data("ptb", root / "ptb", files=files) == root / "ptb"
    assert find_data("ptb", root) == root / "ptb"
    assert find_data("ptb", root / "ptb") == root / "ptb"


def test_a_nested_set_is_found_by_its_last_name_too(tmp_path: Path) -> None:
    (tmp_path / "STS-B").mkdir()
    assert find_data("glue/STS-B", tmp_path) == tmp_path / "STS-B"


def test_the_environment_stands_in(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSELOOM_DATA", str(root))
    assert find_data("ptb") == root / "ptb"


@pytest.mark.usefixtures("no_data")
def test_absence_is_one_sentence_that_says_what_to_do(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"'ptb' .*--data or set SPARSELOOM_DATA"):
        find_data("ptb")
    with pytest.raises(FileNotFoundError, match=r"looked in .*imdb, ") as caught:
        find_data("imdb", root, files=("test.tsv",))
    assert str(root) in str(caught.value)
    assert "test.tsv" in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no data set 'imdb'"):
        find_data("imdb", root)


def test_plain_files_go_before_packed_ones(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert read_text(tmp_path, "b.txt", "a.txt") == "packed"
    (tmp_path / "a.txt").write_text("plain")
    assert read_text(tmp_path, "a.txt") == "plain"
    assert find_file(tmp_path, "c.txt") is None


def test_damaged_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.gz").write_bytes(gzip.compress(b"x" * 1000)[:-12])
    (tmp_path / "b").write_bytes(b"\xff\xfe")
    whole = bytearray(gzip.compress(bytes(range(256)) * 8))
    whole[20] ^= 255  # inside the packed data
    (tmp_path / "d.gz").write_bytes(whole)
    with pytest.raises(ValueError, match=r"d\.gz is not a whole gzip file"):
        read_bytes(tmp_path, "d")
    with pytest.raises(ValueError, match=r"a\.gz is not a whole gzip file"):
        read_bytes(tmp_path, "a")
    with pytest.raises(ValueError, match="b is not UTF-8"):
        read_text(tmp_path, "b")
    with pytest.raises(FileNotFoundError, match="holds none of c"):
        read_bytes(tmp_path, "c")


@pytest.mark.parametrize("name", task_names())
def test_every_task_has_the_name_it_is_asked_for_by(name: str) -> None:
    task = get_task(name)
    assert task.name == name
    assert task.metric
    assert isinstance(task.higher_is_better, bool)


def test_an_unknown_task_names_the_ones_there_are() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'std'.*did you mean.*wikitext2"):
        get_task("std")


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize("name", [name for name in task_names() if name != "stdlib"])
def test_tasks_without_data_say_so(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="SPARSELOOM_DATA"):
        get_task(name).load()
    with pytest.raises(FileNotFoundError, match="looked in"):
        get_task(name).load(tmp_path)
