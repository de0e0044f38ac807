"""What the compiler makes of a Triton kernel: registers, spills, shared memory, tensor cores.

No GPU is needed: Triton brings the assembler for every architecture along.

A module of kernels says what there is to compile in one function::

    def compiled_variants() -> Iterator[Variant]:
        yield Variant("forward 64x1 d128 bf16", _forward, {"q": "*bf16:16", …, "D": "constexpr"},
                      {"D": 128}, {"num_warps": 4, "num_stages": 3})

``python -m sparseloom.kernels.triton.compile_report`` prints the reports of all modules of the
backend as a JSON list, ``reports_of`` runs that command. It takes a process of its own where
TRITON_INTERPRET is set, for there kernels are interpreted and cannot be compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sparseloom.kernels.triton.occupancy import multiprocessor, warps_per_multiprocessor
from sparseloom.kernels.triton.sass import loop_spill_bytes

ARCHS = (80, 90)
_PACKAGE = "sparseloom.kernels.triton"
# Hopper's own instructions need sm_90a.
_TARGETS = {80: "sm_80", 90: "sm_90a"}
_TENSOR_CORES = re.compile(
    r"\b(wgmma)\.mma_async\.(?:sp\.)?sync\.aligned\.(m\d+n\d+k\d+)((?:\.\w+)+)"
    r"|\b(mma)\.sync\.aligned\.(m\d+n\d+k\d+)\.row\.col(?:\.satfinite)?((?:\.\w+)+)"
)


class Variant(NamedTuple):
    """One kernel with everything that its machine code depends on."""

    name: str
    kernel: Any
    """A function decorated with ``triton.jit``."""
    signature: Mapping[str, str]
    """Every argument's type, as "*bf16", "i32" or "constexpr", in order. ":16" behind it says that
    the value is divisible by 16, which Triton finds out at each launch: pointers of tensors are."""
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any] = {}
    """``num_warps``, ``num_stages``, ``maxnreg`` and other options of the compiler."""
    archs: Sequence[int] = ARCHS
    """Architectures it is made for."""


@dataclass(frozen=True)
class CompileReport:
    """What one kernel takes on one architecture."""

    name: str
    arch: int
    registers: int
    """Of one thread, 255 at most."""
    spill_store_bytes: int
    """Moved out to local memory by one thread, each instruction counted once."""
    spill_load_bytes: int
    loop_spill_bytes: int
    """The part of both that lies inside loops: 0 in a kernel that is fit to run."""
    stack_bytes: int
    shared_bytes: int
    """Of one block."""
    threads: int
    """Of one block."""
    tensor_cores: tuple[str, ...]
    """Its tensor-core instructions: kind, tile and types, as "wgmma.m64n128k16.f32.bf16.bf16" (the
    types are those of the result and both operands) or "mma.m16n8k16.f32.bf16.bf16.f32"."""
    serialized: bool
    """wgmma instructions wait for each other, which the assembler warns of: never in a kernel that
    is fit to run."""
    warps_per_multiprocessor: int
    """Resident at once, as registers and shared memory bound it; 64 is full, 0 does not run."""


def compile_report(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    arch: int = 90,
    num_warps: int = 4,
    num_stages: int = 3,
    name: str | None = None,
    **options: Any,
) -> CompileReport:
    """Compile a kernel for an architecture and read what it takes.

    Args:
        kernel: a function decorated with ``triton.jit``.
        signature: see ``Variant``.
        constexprs: values of the arguments that are "constexpr".
        arch: compute capability times ten, 80 or 90.
        num_warps: of one block.
        num_stages: of the software pipeline.
        name: of the report, by default the kernel's.
        options: further options of the compiler, as ``maxnreg``.

    Raises:
        ValueError: ``arch`` is not known, or an argument is missing in ``signature``.
        RuntimeError: the kernel was made while TRITON_INTERPRET was set, or a tool failed.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    multiprocessor(arch)
    if not isinstance(kernel, triton.JITFunction):
        raise RuntimeError(
            f"kernel {getattr(kernel, '__name__', kernel)} must be one that triton.jit compiles: "
            "where TRITON_INTERPRET is set it is interpreted; reports_of starts a process without"
        )
    missing = [n for n in kernel.arg_names if n not in signature]
    if missing:
        raise ValueError(f"signature must name every argument of the kernel, {missing} are missing")
    types = {n: signature[n].removesuffix(":16") for n in kernel.arg_names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if signature[n].endswith(":16")
    }
    source = ASTSource(kernel, types, dict(constexprs), divisible)
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages, **options},
    )
    log = _assemble(compiled.asm["ptx"], arch)
    registers = _number(r"Used (\d+) registers", log)
    threads = compiled.metadata.num_warps * 32
    shared = compiled.metadata.shared
    return CompileReport(
        name=name or kernel.__name__,
        arch=arch,
        registers=registers,
        spill_store_bytes=_number(r"(\d+) bytes spill stores", log),
        spill_load_bytes=_number(r"(\d+) bytes spill loads", log),
        loop_spill_bytes=loop_spill_bytes(_disassemble(compiled.asm["cubin"])),
        stack_bytes=_number(r"(\d+) bytes stack frame", log),
        shared_bytes=shared,
        threads=threads,
        tensor_cores=tensor_core_instructions(compiled.asm["ptx"]),
        serialized="wgmma.mma_async instructions are serialized" in log,
        warps_per_multiprocessor=warps_per_multiprocessor(
            arch, threads=threads, registers=registers, shared_bytes=shared
        ),
    )


def tensor_core_instructions(ptx: str) -> tuple[str, ...]:
    """The different tensor-core instructions in a kernel, see ``CompileReport.tensor_cores``."""
    found = (m.groups() for m in _TENSOR_CORES.finditer(ptx))
    return tuple(sorted({f"{a or d}.{b or e}{c or f}" for a, b, c, d, e, f in found}))


def variants_of(module: str) -> list[Variant]:
    """What a module has to compile: nothing if it has no ``compiled_variants``."""
    listed = getattr(importlib.import_module(module), "compiled_variants", None)
    return [] if listed is None else [Variant(*variant) for variant in listed()]


def backend_modules() -> list[str]:
    """Every module of the Triton backend."""
    package = importlib.import_module(_PACKAGE)
    return sorted(f"{_PACKAGE}.{found.name}" for found in pkgutil.iter_modules(package.__path__))


def reports_of(
    modules: Sequence[str] = (), *, archs: Iterable[int] = ARCHS, only: str = ""
) -> list[CompileReport]:
    """The reports of all kernels of some modules, made in a process that does not interpret.

    Args:
        modules: names to import; none means every module of the backend.
        archs: architectures to compile for.
        only: a regular expression that the names of the variants must contain.

    Raises:
        ValueError: an architecture is not known.
        RuntimeError: a kernel did not compile; the message ends in what the compiler said.
    """
    archs = list(archs)
    for arch in archs:
        multiprocessor(arch)
    words = [sys.executable, "-m", f"{_PACKAGE}.compile_report", *modules, "--only", only]
    words += [word for arch in archs for word in ("--arch", str(arch))]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"compiling the kernels failed:\n{ran.stderr[-4000:]}")
    rows = json.loads(ran.stdout)
    return [CompileReport(**row | {"tensor_cores": tuple(row["tensor_cores"])}) for row in rows]


def assembler_version() -> str:
    """The version of ptxas that Triton calls, as "12.8.93"."""
    found = re.search(r"V(\d[\d.]*)", _run([_tool("ptxas"), "--version"]))
    assert found is not None, "ptxas says its version"
    return found[1]


def _assemble(ptx: str, arch: int) -> str:
    """What ptxas says of a kernel, under the options that Triton sets."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx, encoding="utf-8")
        options = ["-v", f"--gpu-name={_TARGETS[arch]}", str(file), "-o", str(file) + ".cubin"]
        return _run([_tool("ptxas"), *options])


def _disassemble(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return _run([_tool("cuobjdump"), "-sass", str(file)])


def _tool(name: str) -> str:
    from triton import knobs

    return getattr(knobs.nvidia, name).path


def _run(words: Sequence[str]) -> str:
    ran = subprocess.run(list(words), capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"{Path(words[0]).name} failed: {ran.stderr.strip()}")
    return ran.stdout + ran.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"ptxas did not say {pattern!r} but: {text.strip()}")
    return int(found[1])


def main(words: Sequence[str] | None = None) -> None:
    """Print the reports of the modules named, or of the whole backend, as a JSON list."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("modules", nargs="*", help="default: every module of the backend")
    parser.add_argument(
        "--arch", type=int, choices=ARCHS, action="append", help="may be repeated; default: all"
    )
    parser.add_argument("--only", default="", help="regular expression that names must contain")
    asked = parser.parse_args(words)
    rows = [
        dataclasses.asdict(
            compile_report(v.kernel, v.signature, v.constexprs, arch=arch, name=v.name, **v.options)
        )
        for module in asked.modules or backend_modules()
        for v in variants_of(module)
        if re.search(asked.only, v.name)
        for arch in asked.arch or ARCHS
        if arch in v.archs
    ]
    print(json.dumps(rows, indent=1))  # noqa: T201


if __name__ == "__main__":
    main()
