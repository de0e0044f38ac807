"""What a study's results say of the command that made them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from sparseloom import experiments
from sparseloom.experiments.contenders import study_folder
from sparseloom.experiments.study_command import NoSettings, run_command


@dataclass(frozen=True)
class Settings:
    joint_steps: int = 60
    lr: float = 0.1
    only: str = ""


def test_results_name_the_settings_that_were_changed(tmp_path: Path) -> None:
    seen: list[Any] = []

    def run(settings: Settings, out: Path, data: Path | None) -> list[dict[str, Any]]:
        seen.append((settings, out, data))
        return [{"record": "table", "name": "a", "title": "b"}]

    words = ["--joint-steps", "7", "--results", str(tmp_path / "r.json"), "--out", str(tmp_path)]
    run_command("adaptation", "A study.\n\nMore.", Settings(), run, arguments=words)
    assert seen == [(Settings(joint_steps=7), tmp_path, None)]
    command = json.loads((tmp_path / "r.json").read_text())["command"]
    plain = "python -m sparseloom.experiments.adaptation --joint-steps 7"
    assert command == f"{plain} --results {shlex.quote(words[3])}"


def test_a_study_may_write_what_it_has_so_far(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file, row = Path("results/x_7.json"), {"record": "table", "name": "a", "title": "b"}

    def run(*_: Any) -> Iterator[list[dict[str, Any]]]:
        yield [row]
        assert len(json.loads(file.read_text())["rows"]) == 1
        yield [row, row]

    def stored(settings: Settings) -> Path:
        return Path(f"results/x_{settings.joint_steps}.json")

    words = ["--joint-steps", "7"]
    run_command("x", None, Settings(), run, stored=stored, arguments=words)
    found = json.loads(file.read_text())
    assert len(found["rows"]) == 2
    assert found["command"] == "python -m sparseloom.experiments.x --joint-steps 7"


@pytest.mark.parametrize("name", ["lra", "lra_baselines"])
@pytest.mark.parametrize(("word", "value"), [("task", "speech"), ("size", "huge")])
def test_arena_studies_say_what_there_is(
    name: str,
    word: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, f"--{word}", value])
    with pytest.raises(SystemExit) as end:
        import_module(f"sparseloom.experiments.{name}").main()
    assert end.value.code == 2
    assert f"error: unknown {word} '{value}'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@dataclass(frozen=True)
class MachineSettings:
    precision: str = field(default_factory=lambda: "no")


def test_results_name_what_the_machine_decided(tmp_path: Path) -> None:
    rows = [{"record": "table", "name": "a", "title": "b"}]
    words = ["--results", str(tmp_path / "r.json")]
    run_command("adaptation", None, MachineSettings(), lambda *_: rows, arguments=words)
    command = json.loads((tmp_path / "r.json").read_text())["command"]
    assert command.startswith("python -m sparseloom.experiments.adaptation --precision no --res")


def test_results_in_their_usual_place_need_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"record": "table", "name": "a", "title": "b"}]
    run_command("adaptation", None, Settings(), lambda *_: rows, arguments=[])
    stored = json.loads((tmp_path / "results/adaptation.json").read_text())
    assert stored["command"] == "python -m sparseloom.experiments.adaptation"


def test_the_command_can_be_typed_again(tmp_path: Path) -> None:
    words = ["--only", "window 0.25;static 0.4", "--results", str(tmp_path / "r.json")]
    rows = [{"record": "table", "name": "a", "title": "b"}]
    run_command("adaptation", None, Settings(), lambda *_: rows, arguments=words)
    command = json.loads((tmp_path / "r.json").read_text())["command"]
    assert shlex.split(command)[-4:] == words


def test_a_setting_that_is_no_number_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command("x", None, Settings(), lambda *_: [], arguments=["--joint-steps", "many"])
    assert "invalid int value: 'many'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            ValueError("task must be one of imdb,\nbytes, got 'x'"),
            2,
            "task must be one of imdb, bytes",
        ),
        (FileNotFoundError(2, "No such file or directory", "data"), 2, "data: No such file"),
        (KeyboardInterrupt(), 130, "interrupted; the same command goes on"),
    ],
)
def test_an_error_is_one_line(
    error: BaseException,
    code: int,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*_: Any) -> list[dict[str, Any]]:
        raise error

    words = ["--results", str(tmp_path / "r.json")]
    with pytest.raises(SystemExit) as left:
        run_command("x", None, Settings(), run, arguments=words)
    assert left.value.code == code
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {said}")
    assert len(shown.splitlines()) == 1
    assert not (tmp_path / "r.json").exists()
    if code == 2:
        monkeypatch.setenv("SPARSELOOM_DEBUG", "1")
        with pytest.raises(type(error)):
            run_command("x", None, Settings(), run, arguments=words)


def test_help_shows_the_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command("x", "A study of 90 %.", Settings(), lambda *_: [], arguments=["--help"])
    assert "default: 60" in capsys.readouterr().out


COMMANDS = sorted(
    file.stem
    for file in Path(experiments.__path__[0]).glob("*.py")
    if "\ndef main(" in file.read_text("utf-8")
)


def too_early(*_: object, **__: object) -> None:
    raise AssertionError("work began before the words were read")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_study_has_help_and_defaults(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = import_module(f"sparseloom.experiments.{name}")
    for works in {"measure", "run_choice", "run_study", "study"} & set(vars(module)):
        monkeypatch.setattr(module, works, too_early)
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "--" in said
    assert "MISSING" not in said


def test_predictors_run_with_their_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseloom.experiments import predictors

    def run(study: predictors.Study, out: Path) -> list[dict[str, Any]]:
        assert study == predictors.Study()
        study_folder(out, study)
        return []

    monkeypatch.setattr(predictors, "run_study", run)
    monkeypatch.setattr("sys.argv", ["x", "--out", str(tmp_path / "o"), "--results", "r.json"])
    monkeypatch.chdir(tmp_path)
    predictors.main()
    assert "experiments.predictors" in json.loads(Path("r.json").read_text())["command"]


@dataclass(frozen=True)
class Flags:
    quick: bool = False
    steps: int = 3


def test_a_setting_of_yes_or_no_is_a_word(tmp_path: Path) -> None:
    seen: list[Any] = []

    def run(settings: Flags, *_: Any) -> list[dict[str, Any]]:
        seen.append(settings)
        return [{"record": "table", "name": "a", "title": "b"}]

    for words in (["--quick"], []):
        given = [*words, "--results", str(tmp_path / "r.json")]
        run_command("x", None, Flags(), run, arguments=given)
        command = shlex.split(json.loads((tmp_path / "r.json").read_text())["command"])
        assert command[3:] == given
    assert seen == [Flags(quick=True), Flags()]


def test_a_study_without_stages_or_data_has_no_words_for_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for word in ("--out", "--data"):
        with pytest.raises(SystemExit):
            run_command(
                "x", None, NoSettings(), lambda *_: [], keeps=False, reads=False,
                arguments=[word, str(tmp_path)],
            )  # fmt: skip
        assert f"unrecognized arguments: {word}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words", "said"),
    [
        ("static_time", ["--lengths", "512,0"], "lengths must be numbers of 128 or more, got '0'"),
        ("static_time", ["--folders", "nowhere"], "no saved model in nowhere"),
        ("compressors", ["--table-bits", "-1"], "table_bits must be in [8, 28], got -1"),
        ("generation_time", ["--repeats", "0"], "repeats must be 1 or more, got 0"),
        ("generation_time", ["--kv-len", "0"], "kv_len must be an integer of at least 1, got 0"),
        ("thresholds", ["--documents", "0"], "documents must be an integer of at least 1, got 0"),
        ("lengths", ["--data", "nowhere"], "looked in nowhere"),
        ("sentiment", ["--only", "dynamic 80 %"], "unknown only 'dynamic 80 %'"),
        ("sentiment", ["--first", "-1"], "first must be 0 for all contenders or how many run"),
        ("spatten_generation", ["--steps", "0"], "steps must be an integer of at least 1, got 0"),
        ("dota_masks", ["--name", "x", "--task", "speech", "stdlib"], "unknown task 'speech'"),
    ],
)
def test_wrong_words_end_in_one_line_and_leave_nothing(
    name: str,
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = import_module(f"sparseloom.experiments.{name}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [name, *words])
    if name == "lengths":
        monkeypatch.setattr(module, "wordpiece_counter", lambda: len)
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ")
    assert said in shown
    assert len(shown.splitlines()) == 1
    assert not list(tmp_path.iterdir())
