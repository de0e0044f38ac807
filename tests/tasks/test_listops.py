"""ListOps: the published procedure, labels by an independent evaluator, files there and back."""

from __future__ import annotations

import random
import statistics
from itertools import islice
from pathlib import Path

import pytest

from sparseloom.tasks import listops
from sparseloom.tasks.data import read_bytes


def by_recursion(tokens: list[str]) -> int:
    """Another evaluator: recursive descent with the library's median."""

    def parse(at: int) -> tuple[int, int]:
        if not tokens[at].startswith("["):
            return int(tokens[at]), at + 1
        operator, values = tokens[at], []
        at += 1
        while tokens[at] != "]":
            value, at = parse(at)
            values.append(value)
        function = {"[MIN": min, "[MAX": max, "[MED": statistics.median, "[SM": sum}[operator]
        return int(function(values)) % 10, at + 1

    value, end = parse(0)
    assert end == len(tokens)
    return value


def depth(tokens: list[str]) -> int:
    level = deepest = 0
    for token in tokens:
        level += token.startswith("[") - (token == "]")
        deepest = max(deepest, level)
    return deepest


def most_arguments(tokens: list[str]) -> int:
    counts, most = [0], 0
    for token in tokens:
        if token == "]":
            most = max(most, counts.pop())
        else:
            counts[-1] += 1
            if token.startswith("["):
                counts.append(0)
    return most


def test_drawn_expressions_keep_the_published_limits_and_values() -> None:
    drawn = list(listops.generate(60, seed=3))
    assert all(value == by_recursion(tokens) for tokens, value in drawn)
    assert all(500 < len(tokens) < 2000 for tokens, _ in drawn)
    assert max(depth(tokens) for tokens, _ in drawn) == 9  # digits stand one level deeper
    assert max(most_arguments(tokens) for tokens, _ in drawn) == 10
    assert {token for tokens, _ in drawn for token in tokens} == set(listops.TOKENS)
    assert len({tuple(tokens) for tokens, _ in drawn}) == 60


def test_one_seed_gives_one_data_set() -> None:
    first = [value for value, _ in islice(listops.generate(5, seed=1), 5)]
    assert first == [value for value, _ in listops.generate(5, seed=1)]
    assert first != [value for value, _ in listops.generate(5, seed=2)]


def test_draws_come_in_the_published_order() -> None:
    source = random.Random(5)
    ours = listops.draw(source, max_depth=4)

    def published(depth: int) -> list[str]:  # a list's operator is drawn after its arguments
        r = draws.random() if depth < 4 else 1
        if r > 0.25:
            return [str(draws.choice(range(10)))]
        inner: list[str] = []
        for _ in range(draws.randint(2, 10)):
            inner += published(depth + 1)
        return [draws.choice(["[MIN", "[MAX", "[MED", "[SM"]), *inner, "]"]

    draws = random.Random(5)
    assert ours == published(1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MED 1 2 ]", 1),  # 1.5 is cut
        ("[MED 9 1 5 ]", 5),
        ("[SM 9 9 9 ]", 7),
        ("[MAX 2 [MIN 8 3 ] [SM 5 6 ] ]", 3),
    ],
)
def test_values_worked_by_hand(text: str, value: int) -> None:
    assert listops.evaluate(text.split()) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[MED 1 2", "not whole"),
        ("1 2", "ends before its token '2'"),
        ("[SM ]", "not opened or is empty"),
        ("[AVG 1 ]", "got '\\[AVG'"),
    ],
)
def test_broken_expressions_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listops.evaluate(text.split())


def test_written_files_are_read_back(tmp_path: Path) -> None:
    listops.write_splits(tmp_path, train=4, validation=2, test=3)
    names = [f"basic_{part}.tsv" for part in ("train", "val", "test")]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)
    read = [listops.read_listops(read_bytes(tmp_path, name), name) for name in names]
    assert [len(values) for _, values in read] == [4, 2, 3]
    expected = list(listops.generate(9))
    together = [pair for tokens, values in read for pair in zip(tokens, values, strict=True)]
    assert together == expected


def test_damaged_files_name_their_line() -> None:
    good = b"Source\tTarget\n( ( ( [MIN 3 ) 4 ) ] )\t3\n"
    assert listops.read_listops(good, "x.tsv") == ([["[MIN", "3", "4", "]"]], [3])
    for bad in (b"Source\tTarget\n[MIN 3 ]\n", b"Source\tTarget\n[AVG 3 ]\t3\n", b"12\t3\n"):
        with pytest.raises(ValueError, match=r"x\.tsv is not a ListOps expression"):
            listops.read_listops(bad, "x.tsv")


def test_the_original_test_set_has_the_values_it_says(real_data: Path) -> None:
    raw = read_bytes(real_data / "listops", "test_d20s.tsv")
    expressions, values = listops.read_listops(raw, "test_d20s.tsv")
    assert len(values) == 10_000
    assert [listops.evaluate(tokens) for tokens in expressions] == values
