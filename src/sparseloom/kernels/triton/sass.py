"""Spills inside loops, found in the machine code that cuobjdump prints.

The assembler says how many bytes a kernel spills, not where: what it puts away once before a loop
costs nothing, what it puts away in every round costs the kernel its speed.
"""

from __future__ import annotations

import re
from collections import defaultdict

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+ +)?([A-Z][\w.]*)([^;]*);", re.M)
_TARGET = re.compile(r"0x[0-9a-f]+")
_BARRIER = re.compile(r"\bB\d+\b")
_SPILL = re.compile(r"(?:STL|LDL)(?:\.|$)")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def loop_spill_bytes(sass: str) -> int:
    """Bytes that one thread moves to or from local memory by instructions inside loops.

    Each instruction counts once, however often its loop runs. An instruction is inside a loop if
    control can come back to it.

    Args:
        sass: one kernel as ``cuobjdump -sass`` prints it.
    """
    code = [
        (int(address, 16), guard is not None, name, rest)
        for address, guard, name, rest in (m.groups() for m in _INSTRUCTION.finditer(sass))
    ]
    order = {address: i for i, (address, *_) in enumerate(code)}
    reconverges = defaultdict[str, list[int]](list)
    for _, _, name, rest in code:
        if name.startswith("BSSY"):
            reconverges[_BARRIER.findall(rest)[0]].append(order[_target(rest)])

    successors: list[list[int]] = []
    for i, (_, guarded, name, rest) in enumerate(code):
        kind = name.split(".")[0]
        following = [i + 1] if i + 1 < len(code) else []
        if kind in ("BRA", "JMP"):
            # A predicate may also stand in front of the target: BRA P1, 0x…; BRA.DIV UR4, 0x….
            always = not guarded and rest.strip().startswith("0x")
            following = [order[_target(rest)]] + ([] if always else following)
        elif kind in ("EXIT", "RET") and not guarded:
            following = []
        elif kind == "BSYNC":
            following = [*reconverges[_BARRIER.findall(rest)[0]], *following]
        successors.append(following)

    spills = [i for i, (_, _, name, _) in enumerate(code) if _SPILL.match(name)]
    return sum(_width(code[i][2]) for i in spills if _comes_back(i, successors))


def _target(operands: str) -> int:
    return int(_TARGET.findall(operands)[-1], 16)


def _width(name: str) -> int:
    return next((_WIDTHS[part] for part in name.split(".")[1:] if part in _WIDTHS), 4)


def _comes_back(start: int, successors: list[list[int]]) -> bool:
    seen = set[int]()
    todo = list(successors[start])
    while todo:
        here = todo.pop()
        if here == start:
            return True
        if here not in seen:
            seen.add(here)
            todo += successors[here]
    return False
