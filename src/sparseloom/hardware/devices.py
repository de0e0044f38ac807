"""Processors that one can buy: rooflines, efficiencies, and an overhead per operator."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, cast

from pydantic import Field, model_validator

from sparseloom.files import user_file
from sparseloom.hardware.attention_core import number
from sparseloom.hardware.config import MachineError, Section, checked, read_yaml
from sparseloom.hardware.energy import EnergyTable
from sparseloom.hardware.machine import Machine, MachineConfig, Options, Roof
from sparseloom.hardware.report import Fidelity, Report, Stage
from sparseloom.trace import Operator, Selection, Trace

Basis = Literal["vendor", "vendor_unverified", "measured", "calibrated", "scenario"]
MEASURE = "python -m sparseloom.experiments.this_machine"


class Processor(Section):
    """Peaks, and the width of operands. None: not known before it is measured."""

    peak_gflops: float | None = Field(default=None, gt=0)
    memory_gbytes_per_second: float | None = Field(default=None, gt=0)
    bits: int = Field(ge=1, le=64)


class Kernel(Section):
    """How much of the peaks a kind of operator reaches, and what each call takes besides."""

    compute_efficiency: float = Field(gt=0, le=1)
    memory_efficiency: float = Field(gt=0, le=1)
    overhead_us: float = Field(ge=0)


class Attention(Kernel):
    """The two products of attention, and the share of attention's time that they take."""

    matmul_share: float = Field(gt=0, le=1)


class Scores(Section):
    """What happens to the scores between the two products, where it is modelled and no share.

    Args:
        passes: how often they are read or written whole besides the products' own traffic: 2 for
            each of scaling, masking and softmax where each is a kernel of its own.
        fused: one kernel does it all and scores never reach memory; `passes` has no part then.
        pairs: those computed: "all", or "allowed", without what causality and padding forbid.
    """

    passes: int = Field(ge=0)
    fused: bool
    pairs: Literal["all", "allowed"]


class Measured(Section):
    """What `python -m sparseloom.experiments.this_machine` writes."""

    schema_: Literal["sparseloom/this_machine/1"] = Field(alias="schema")
    cpu: str
    threads: int = Field(ge=1)
    date: str
    processor: Processor
    gemm: Kernel
    attention: Attention


class DeviceConfig(MachineConfig):
    """A machine file of kind `device`. `basis` says where each number comes from."""

    kind: Literal["device"]  # pyright: ignore[reportIncompatibleVariableOverride]
    processor: Processor
    gemm: Kernel
    attention: Attention
    scores: Scores | None = None
    basis: dict[str, Basis]
    measured: bool = False

    @model_validator(mode="after")
    def _one_account_of_the_scores(self) -> DeviceConfig:
        if self.scores is not None and self.attention.matmul_share < 1:
            raise ValueError(
                "attention.matmul_share must be 1 where scores says what happens between the "
                f"products, got {self.attention.matmul_share}"
            )
        return self


class Cost(NamedTuple):
    """Seconds of an operator, of those in matrix products, and bytes of their operands."""

    component: str
    seconds: float
    products: float
    flops: float
    moved: float


def this_machine_file() -> Path:
    """Where the measurement of this machine lies: $SPARSELOOM_THIS_MACHINE, else
    this_machine.yaml in $XDG_CACHE_HOME/sparseloom (~/.cache/sparseloom)."""
    return user_file("this_machine.yaml", variable="SPARSELOOM_THIS_MACHINE")


class Device(Machine):
    """A CPU or a GPU that runs every operator of a trace dense, one after another.

    An operator takes max(FLOP / reached peak, bytes / reached bandwidth) and its overhead.  The
    two products of attention are such operators. What lies between them is charged as the rest of
    attention's time, its products being `matmul_share` of it; or, where the file has `scores`, as
    so many passes over the scores in memory, or as one fused kernel.
    """

    fidelities: ClassVar[tuple[Fidelity, ...]] = ("analytic",)
    Config: ClassVar[type[MachineConfig]] = DeviceConfig

    def __init__(self, config: MachineConfig, table: EnergyTable) -> None:
        settings = cast("DeviceConfig", config)
        file = this_machine_file()
        if settings.measured and settings.processor.peak_gflops is None and file.is_file():
            found = checked(Measured, read_yaml(file), str(file))
            parts = {name: getattr(found, name) for name in ("processor", "gemm", "attention")}
            settings = settings.model_copy(update=parts)
        super().__init__(settings, table)

    @property
    def settings(self) -> DeviceConfig:
        """The checked machine file, with what was measured where that is its source."""
        return cast("DeviceConfig", self.config)

    def area(self) -> dict[str, float]:
        """Area of the die in mm² (0 where it is not known)."""
        return self.table.area({"processor": 1})

    def power(self) -> dict[str, float]:
        """Dynamic power in W (0 where it is not known)."""
        return self.table.power({"processor": 1})

    def roof(self) -> Roof | None:
        """The peaks, where they are known."""
        processor = self.settings.processor
        peak, bandwidth = processor.peak_gflops, processor.memory_gbytes_per_second
        return None if peak is None or bandwidth is None else Roof(1e9 * peak, 1e9 * bandwidth)

    def cost(self, operator: Operator, allowed: int | None = None) -> Cost:
        """What one operator takes, all its sequences together.

        Args:
            operator: of a workload.
            allowed: pairs of an attention call that causality and padding allow, over sequences
                and heads; None: all. Devices that compute every pair have no use for it.

        Raises:
            MachineError: the peaks of this machine are not known.
        """
        s = self.settings
        width = s.processor.bits / 8
        if operator.is_attention:
            return self._attention(operator, allowed)
        if operator.kind == "gemm":
            flops = 2.0 * operator.macs
            tokens = operator.batch * operator.rows
            elements = tokens * (operator.inner + operator.columns)
            moved = (elements + operator.inner * operator.columns) * width
            seconds = self._seconds(s.gemm, flops, moved)
            return Cost("linear", seconds, seconds, flops, moved)
        moved = 2.0 * operator.elements * width
        kernel = s.gemm.model_copy(update={"overhead_us": 0.0})
        return Cost("elementwise", self._seconds(kernel, 0.0, moved), 0.0, 0.0, moved)

    def _attention(self, op: Operator, allowed: int | None) -> Cost:
        s = self.settings
        width = s.processor.bits / 8
        pairs = op.batch * op.heads * op.q_len * op.kv_len
        if allowed is not None and s.scores is not None and s.scores.pairs == "allowed":
            pairs = allowed
        fused = s.scores is not None and s.scores.fused
        works: list[float] = []
        sizes: list[float] = []
        for dim in (op.head_dim, op.value_dim):
            keys = op.batch * op.kv_heads * op.kv_len * dim
            queries = op.batch * op.heads * op.q_len * dim
            works.append(2.0 * pairs * dim)
            sizes.append((keys + queries + (0 if fused else pairs)) * width)
        flops, moved = sum(works), sum(sizes)
        if fused:
            seconds = self._seconds(s.attention, flops, moved)
            return Cost("attention", seconds, seconds, flops, moved)
        products = sum(
            self._seconds(s.attention, work, size) for work, size in zip(works, sizes, strict=True)
        )
        if s.scores is None:
            return Cost("attention", products / s.attention.matmul_share, products, flops, moved)
        # A kernel reads the scores and writes them.
        one = self._seconds(s.attention, 0.0, 2.0 * pairs * width)
        between = one * s.scores.passes / 2
        moved += s.scores.passes * pairs * width
        return Cost("attention", products + between, products, flops, moved)

    def _seconds(self, kernel: Kernel, flops: float, moved: float) -> float:
        processor = self.settings.processor
        peak, bandwidth = processor.peak_gflops, processor.memory_gbytes_per_second
        if peak is None or bandwidth is None:
            raise MachineError(
                f"{self.name} has no measurement: run `{MEASURE}`, or set processor.peak_gflops "
                "and processor.memory_gbytes_per_second"
            )
        compute = flops / (peak * 1e9 * kernel.compute_efficiency)
        memory = moved / (bandwidth * 1e9 * kernel.memory_efficiency)
        return max(compute, memory) + kernel.overhead_us * 1e-6

    def _simulate(self, trace: Trace, selection: Selection, options: Options) -> Report:
        s, workload = self.settings, trace.workload
        stages: list[Stage] = []
        moved = products = flops = 0.0
        hertz = s.clock_ghz * 1e9
        for operator in workload.operators:
            allowed = None
            if operator.is_attention:
                allowed = int(workload.allowed_pairs(operator).sum())
            cost = self.cost(operator, allowed)
            moved, products, flops = (
                moved + cost.moved,
                products + cost.products,
                flops + cost.flops,
            )
            facts = {"role": operator.role, "microseconds": cost.seconds * 1e6, "flops": cost.flops}
            if cost.component == "attention":
                facts["products_microseconds"] = cost.products * 1e6
            stages.append(
                Stage(
                    component=cost.component,
                    cycles=cost.seconds * hertz,
                    layer=operator.layer,
                    step=operator.step,
                    facts=facts,
                )
            )
        seconds = sum(stage.cycles for stage in stages) / hertz
        power = {name: watts for name, watts in self.power().items() if watts > 0}
        peak = (s.processor.peak_gflops or 1.0) * 1e9 * seconds
        bandwidth = (s.processor.memory_gbytes_per_second or 1.0) * 1e9 * seconds
        return Report(
            machine=self.name,
            trace=workload.name,
            selection=selection.name,
            scope=workload.scope,
            fidelity=options.fidelity,
            clock_ghz=s.clock_ghz,
            stages=tuple(stages),
            energy={name: watts * seconds for name, watts in power.items()},
            energy_table=self.table.name,
            area=self.area(),
            actions={"operators": len(stages), "flops": flops, "dram bytes": moved},
            utilisation={
                "arithmetic": flops / peak if seconds else 0.0,
                "dram": moved / bandwidth if seconds else 0.0,
            },
            dram_preset=f"{self.name}_peak",
            dram_bytes=round(moved),
            useful_bytes=round(moved),
            config_hash=self.config_hash,
            assumptions=self._assumptions(selection, known_power=bool(power)),
            value=number(selection.quality, "value"),
            dense_value=number(selection.quality, "dense_value"),
            operations=flops,
        )

    def _assumptions(self, selection: Selection, *, known_power: bool) -> tuple[str, ...]:
        s = self.settings
        found = [
            "operators run dense and one after another in "
            f"{s.processor.bits} bits: selection {selection.name!r} saves nothing here",
            "an operator takes the longer of its arithmetic and its traffic at fixed efficiencies, "
            "and a fixed overhead",
        ]
        if s.attention.matmul_share < 1:
            found.append(
                f"the two products are {s.attention.matmul_share:.0%} of attention's time at every "
                "length, as published for GPT-2 on a TITAN Xp; bytes count the products alone"
            )
        if s.scores is not None:
            found.append(
                "attention is one fused kernel: scores never reach memory"
                if s.scores.fused
                else f"attention is unfused: beside the two products {s.scores.passes} passes over "
                "the scores in memory"
            )
            if s.scores.pairs == "allowed":
                found.append("pairs that causality or padding forbids cost nothing")
        for basis, text in (
            ("calibrated", "fitted to one published time each"),
            ("vendor_unverified", "vendor data that we could not check"),
            ("measured", "measured"),
            ("scenario", "our choice"),
        ):
            keys = [key for key, known in s.basis.items() if known == basis]
            if keys:
                found.append(f"{basis} ({text}): {', '.join(keys)}")
        found.append(
            "energy is dynamic power times time"
            if known_power
            else "no power is known: no energy is reported"
        )
        return tuple(found)
