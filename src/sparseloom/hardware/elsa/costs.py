"""What ELSA counts and what it is made of: actions, events of table I, bytes, sizes of modules."""

from __future__ import annotations

from sparseloom.hardware.actions import Block
from sparseloom.hardware.attention_core import Priced, Tally
from sparseloom.hardware.elsa.config import ElsaConfig
from sparseloom.hardware.elsa.pipeline import Head, Rates
from sparseloom.hardware.energy import EnergyTable
from sparseloom.hardware.energy_model import EnergyModel
from sparseloom.hashing import Hasher
from sparseloom.trace import Operator

_WIDE = 2  # an intermediate result is twice as wide as its operands
HASH_BITS = 64  # of a selector's comparison

# What an action costs in events of table I.  Norms borrow multipliers of the attention modules.
_EVENTS: dict[tuple[str, str], tuple[str, ...]] = {
    ("hash", "multiply"): ("hash_multiply",),
    ("norm", "multiply"): ("attention_multiply",),
    ("selectors", "multiply"): ("selectors_key",),
    ("attention", "multiply"): ("attention_multiply",),
    ("division", "multiply"): ("division_multiply",),
    ("hash_memory", "sram_read"): ("hash_memory_key",),
    ("hash_memory", "sram_write"): ("hash_memory_key",),
    ("norm_memory", "sram_read"): ("norm_memory_key",),
    ("norm_memory", "sram_write"): ("norm_memory_key", "norm_key"),
    **{
        (f"external_{name}", op): (f"external_{name}_row",)
        for name in ("key", "value", "query", "output")
        for op in ("sram_read", "sram_write")
    },
}


def modules(config: ElsaConfig, keys: int) -> dict[str, int]:
    """Units of every module of table I in one ELSA unit, with memories of so many keys or more."""
    s = config
    rows = max(keys, s.memory.keys)
    words = rows * s.attention.dim * s.numbers.bits
    external = dict.fromkeys(
        ("external_key", "external_value", "external_query", "external_output"), words
    )
    return {
        "hash": s.hashing.multipliers,
        "norm": 1,
        "selectors": s.selection.banks * s.selection.selectors,
        "attention": 2 * s.attention.dim * s.selection.banks,
        "division": s.division.multipliers,
        "hash_memory": rows * HASH_BITS,
        "norm_memory": rows,
        **external,
    }


def moved_bytes(head: Head, operator: Operator, config: ElsaConfig) -> float:
    """Bytes of a head's keys, values, queries and outputs, at the width of an operand."""
    queries, keys = head.kept.shape
    both = operator.head_dim + operator.value_dim
    return (queries + keys) * both * config.numbers.bits / 8


def count(
    head: Head, operator: Operator, config: ElsaConfig, hasher: Hasher, rate: Rates, tally: Tally
) -> None:
    """Add up what one head does.

    Multiplications: 768·(n + queries) of the hash, d·n of the norms, one per key looked at, 2·d
    per candidate and d per output, d being the modules' width.
    """
    s, bits = config, config.numbers.bits
    queries, keys = head.kept.shape
    found = float(head.kept.sum())
    approximate = s.search.mode == "approximate"
    looked = float(head.seen.sum()) if approximate else 0.0
    hashed = float(keys + queries) if approximate else 0.0
    normed = float(keys) if approximate else 0.0
    wide = rate.attend * s.attention.dim
    rows = max(keys, s.memory.keys)
    products = hashed * hasher.multiplications
    act = tally.act
    act("hash", "multiply", products, bits)
    act("hash", "add", products, _WIDE * bits)
    act("norm", "multiply", normed * wide, bits)
    act("norm", "add", normed * wide, _WIDE * bits)
    act("selectors", "add", looked, hasher.bits)
    act("selectors", "multiply", looked, s.numbers.norm_bits)
    act("selectors", "compare", looked, _WIDE * s.numbers.norm_bits)
    act("attention", "multiply", found * 2 * wide, bits)
    act("attention", "add", found * 2 * wide, _WIDE * bits)
    act("exponent", "multiply", found, _WIDE * bits)
    act("division", "multiply", queries * wide, _WIDE * bits)
    lanes = s.selection.banks * s.selection.selectors
    hash_kib = max(1.0, rows * hasher.bits / 8192 / lanes)
    for op, times in (("sram_read", looked), ("sram_write", normed)):
        act("hash_memory", op, times, hasher.bits, hash_kib)
        act("norm_memory", op, times, s.numbers.norm_bits, 1.0)
    row_bits, bank_kib = wide * bits, max(1.0, rows * wide * bits / 8192 / s.selection.banks)
    whole_kib = max(1.0, rows * wide * bits / 8192)
    reads = {"key": found + normed, "value": found}
    for name, times in reads.items():
        act(f"external_{name}", "sram_read", times, row_bits, bank_kib)
        act(f"external_{name}", "sram_write", keys, row_bits, bank_kib)
    for name in ("query", "output"):
        for op in ("sram_read", "sram_write"):
            act(f"external_{name}", op, queries, row_bits, whole_kib)
    bytes_in = (queries + keys) * operator.head_dim + keys * operator.value_dim
    act("dram", "dram_read", bytes_in * bits / 8, 8)
    act("dram", "dram_write", queries * operator.value_dim * bits / 8, 8)
    tally.operations += 2 * found * (operator.head_dim + operator.value_dim)
    units = s.units
    for name, busy in (
        ("hash", hashed * max(rate.hash, 1)),
        ("selectors", looked * rate.compare / lanes),
        ("attention", (found * rate.attend + normed * rate.norm) / s.selection.banks),
        ("division", float(queries * rate.divide)),
    ):
        tally.busy[name] = tally.busy.get(name, 0.0) + busy / units


def published_energy(
    config: ElsaConfig, table: EnergyTable, tally: Tally, cycles: float, keys: int
) -> Priced:
    """Each module's published power while it works, static power of all, and memory outside."""
    joules: dict[str, float] = {}
    for action in tally.actions():
        for event in _EVENTS.get((action.component, action.op), ()):
            component = event.rpartition("_")[0]
            spent = action.count * table.events_pj[event] * 1e-12
            joules[component] = joules.get(component, 0.0) + spent
    seconds = cycles / (config.clock_ghz * 1e9)
    joules["leakage"] = sum(static_power(config, table, keys).values()) * seconds
    model = EnergyModel(memory=config.energy.memory, node_nm=config.technology_nm)
    joules |= model.dynamic([one for one in tally.actions() if one.component == "dram"])
    return Priced(
        joules,
        f"{table.name}, {config.energy.memory}",
        "energy is each module's published power while it is busy and its static power all the "
        "time; what is idle draws no dynamic power, and DRAM is charged per bit",
    )


def static_power(config: ElsaConfig, table: EnergyTable, keys: int) -> dict[str, float]:
    """Static power by module in W, of all units."""
    return {
        name: table.events_pj[f"{name}_static"]
        * 1e-3
        * size
        * config.units
        / table.modules[name].units
        for name, size in modules(config, keys).items()
    }


def blocks(config: ElsaConfig, keys: int) -> list[Block]:
    """Arithmetic and memories of all units, for leakage and area from general tables."""
    s, bits = config, config.numbers.bits
    rows = max(keys, s.memory.keys)
    lanes = s.selection.banks * s.selection.selectors
    attention = 2 * s.attention.dim * s.selection.banks
    row_bits = s.attention.dim * bits
    bank_kib = max(1.0, rows * row_bits / 8192 / s.selection.banks)
    whole_kib = max(1.0, rows * row_bits / 8192)
    one = [
        Block("hash", "multiply", s.hashing.multipliers, bits),
        Block("hash", "add", s.hashing.multipliers, _WIDE * bits),
        Block("selectors", "multiply", lanes, s.numbers.norm_bits),
        Block("selectors", "add", lanes, HASH_BITS),
        Block("selectors", "compare", lanes, _WIDE * s.numbers.norm_bits),
        Block("attention", "multiply", attention, bits),
        Block("attention", "add", attention, _WIDE * bits),
        Block("division", "multiply", s.division.multipliers, _WIDE * bits),
        Block("hash_memory", "sram", lanes, HASH_BITS, max(1.0, rows * HASH_BITS / 8192 / lanes)),
        Block("norm_memory", "sram", lanes, s.numbers.norm_bits, 1.0),
        Block("external_key", "sram", s.selection.banks, row_bits, bank_kib),
        Block("external_value", "sram", s.selection.banks, row_bits, bank_kib),
        Block("external_query", "sram", 1, row_bits, whole_kib),
        Block("external_output", "sram", 1, row_bits, whole_kib),
    ]
    return [Block(b.component, b.op, b.units * s.units, b.bits, b.kib, b.kind) for b in one]
