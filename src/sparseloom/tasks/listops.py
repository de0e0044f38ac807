"""ListOps (Nangia and Bowman 2018): nested list operations on digits, written, read, evaluated.

An expression is a list of tokens: an operator opens (`[MIN`, `[MAX`, `[MED`, `[SM`), `]` closes,
digits are values.  Long Range Arena (Tay et al. 2020, `data/listops.py`) draws trees of depth at
most 10 with 2 to 10 arguments per operator and keeps those of 501 to 1999 tokens.

    python -m sparseloom.tasks.listops --out listops --train 96000

writes `basic_train.tsv`, `basic_val.tsv` and `basic_test.tsv` in the published layout.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparseloom.files import fresh_file

END = "]"
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
TOKENS = (*map(str, range(10)), *OPERATORS, END)
"""Every token; its id is its position plus 1, because 0 is padding."""

_VALUE_SHARE = 0.25  # published: a node is a list with this probability, a digit otherwise


def draw(
    source: random.Random, *, depth: int = 1, max_depth: int = 10, max_args: int = 10
) -> list[str]:
    """One random expression; draws in the order of the published generator."""
    if depth >= max_depth or source.random() > _VALUE_SHARE:
        return [str(source.choice(range(10)))]
    arguments: list[str] = []
    for _ in range(source.randint(2, max_args)):
        arguments += draw(source, depth=depth + 1, max_depth=max_depth, max_args=max_args)
    return [source.choice(OPERATORS), *arguments, END]


def generate(
    count: int,
    *,
    seed: int = 0,
    min_length: int = 500,
    max_length: int = 2000,
    max_depth: int = 10,
    max_args: int = 10,
) -> Iterator[tuple[list[str], int]]:
    """`count` different expressions with their values, the same ones for one seed.

    Both length limits are exclusive, as published; brackets count as tokens.
    """
    source, seen = random.Random(seed), set[tuple[str, ...]]()
    while len(seen) < count:
        tokens = draw(source, max_depth=max_depth, max_args=max_args)
        key = tuple(tokens)
        if min_length < len(tokens) < max_length and key not in seen:
            seen.add(key)
            yield tokens, evaluate(tokens)


def evaluate(tokens: Sequence[str]) -> int:
    """The value of an expression.

    MED is the median cut to an integer, SM the sum modulo 10.  Raises ValueError when the tokens
    are not one whole expression.
    """
    lists: list[tuple[str, list[int]]] = []
    value: int | None = None
    for token in tokens:
        if value is not None:
            raise ValueError(f"the expression ends before its token {token!r}")
        if token in OPERATORS:
            lists.append((token, []))
            continue
        if token == END:
            if not lists or not lists[-1][1]:
                raise ValueError("a list is closed that was not opened or is empty")
            found = _apply(*lists.pop())
        elif len(token) == 1 and token.isdecimal():
            found = int(token)
        else:
            raise ValueError(f"token must be a digit, an operator or ']', got {token!r}")
        if lists:
            lists[-1][1].append(found)
        else:
            value = found
    if value is None:
        raise ValueError("the expression is not whole: a list is not closed")
    return value


def _apply(operator: str, values: list[int]) -> int:
    if operator == "[MIN":
        return min(values)
    if operator == "[MAX":
        return max(values)
    if operator == "[SM":
        return sum(values) % 10
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) // 2


def read_listops(raw: bytes, name: str) -> tuple[list[list[str]], list[int]]:
    """Expressions and values of a table, published (`Source`, `Target`) or original (value first).

    Parentheses are dropped: they only say how the original trees branch.  Raises ValueError naming
    the first line that is something else.
    """
    lines = raw.decode("utf-8", errors="replace").replace("\r\n", "\n").rstrip("\n").split("\n")
    published = lines[0].split("\t") == ["Source", "Target"]
    known = frozenset(TOKENS)
    expressions: list[list[str]] = []
    values: list[int] = []
    for number, line in enumerate(lines[published:], 1 + published):
        fields = line.split("\t")
        source, value = (fields if published else fields[::-1]) if len(fields) == 2 else ("", "")
        tokens = [token for token in source.split() if token not in {"(", ")"}]
        if not tokens or not known.issuperset(tokens) or value not in TOKENS[:10]:
            raise ValueError(f"line {number} of {name} is not a ListOps expression and its value")
        expressions.append(tokens)
        values.append(int(value))
    return expressions, values


def write_splits(
    out: Path, *, train: int = 96_000, validation: int = 2_000, test: int = 2_000, seed: int = 0
) -> None:
    """Write the three tables; each file appears whole or not at all."""
    drawn = generate(train + validation + test, seed=seed)
    for name, count in (("train", train), ("val", validation), ("test", test)):
        file = out / f"basic_{name}.tsv"
        with fresh_file(file) as fresh, fresh.open("w", encoding="utf-8") as stream:
            stream.write("Source\tTarget\n")
            for _ in range(count):
                tokens, value = next(drawn)
                stream.write(f"{' '.join(tokens)}\t{value}\n")


def main() -> None:
    """Command line of the generator."""
    parser = argparse.ArgumentParser(description="Write ListOps as Long Range Arena draws it.")
    parser.add_argument("--out", type=Path, required=True)
    for name, default in (("train", 96_000), ("validation", 2_000), ("test", 2_000), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    write_splits(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
