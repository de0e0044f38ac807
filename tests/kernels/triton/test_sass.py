"""Spills in loops, told from hand-written machine code."""

from __future__ import annotations

from sparseloom.kernels.triton.sass import loop_spill_bytes


def sass(*lines: str) -> str:
    """As cuobjdump prints it: an address, the instruction and its encoding."""
    return "\n".join(
        f"        /*{16 * i:04x}*/  {line} ;  /* 0x000000{i:04x} */\n        /* 0x00000fff */"
        for i, line in enumerate(lines)
    )


def test_outside_of_loops_nothing_counts():
    assert loop_spill_bytes(sass("STL [R1], R0", "LDL R0, [R1]", "EXIT", "BRA 0x30")) == 0


def test_every_width_in_a_loop():
    code = sass(
        "STL.64 [R1], R2", "LDL.128 R4, [R1]", "LDL R3, [R1+0x8]", "STL.U8 [R1], R3",
        "LDL.LU.64 R8, [R1]", "@P0 BRA 0x10", "STL [R1], R2", "EXIT", "BRA 0x80",
    )  # fmt: skip
    assert loop_spill_bytes(code) == 16 + 4 + 1 + 8


def test_a_branch_backward_is_no_loop_by_itself():
    # The rare case lies behind the end and comes back.
    code = sass("@P0 BRA 0x40", "STL [R1], R2", "LDL R2, [R1]", "EXIT", "MOV R2, R3", "BRA 0x20")
    assert loop_spill_bytes(code) == 0


def test_a_loop_through_a_block_behind_the_end():
    code = sass("LDL R2, [R1]", "@P0 BRA 0x30", "EXIT", "STL [R1], R2", "BRA 0x0")
    assert loop_spill_bytes(code) == 8


def test_what_always_branches_does_not_fall_through():
    code = sass("BRA 0x20", "STL [R1], R2", "@!P1 BRA 0x0", "EXIT")
    assert loop_spill_bytes(code) == 0  # nothing leads to the store


def test_branches_with_the_condition_behind_the_name_may_fall_through():
    assert loop_spill_bytes(sass("LDL R2, [R1]", "BRA P1, 0x30", "BRA 0x0", "EXIT")) == 4
    assert loop_spill_bytes(sass("LDL R2, [R1]", "@P0 EXIT", "BRA 0x0")) == 4
    assert loop_spill_bytes(sass("LDL R2, [R1]", "EXIT", "BRA 0x0")) == 0


def test_reconvergence_leads_back_into_a_loop():
    code = sass(
        "BSSY B0, 0x30", "@P0 BRA 0x60", "BSYNC B0", "LDL R2, [R1]", "@P1 BRA 0x0", "EXIT",
        "STL [R1], R2", "BSYNC B0",
    )  # fmt: skip
    assert loop_spill_bytes(code) == 8
