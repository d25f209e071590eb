"""Every kernel compiles for every chip without one, fits its shared memory and spills nothing hot.

jit functions are made for the interpreter where these tests run, so each chip is compiled for in
a process of its own: this file, run as a script.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch

from triton_fa.device import DeviceFacts
from triton_fa.normalize import Options, problem
from triton_fa.problem import AttnResult, Lengths, Problem, Tensors
from triton_fa.spec import metadata_entries

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Chip:
    """What a kernel is compiled for, and planned on."""

    arch: int | str
    warp_size: int
    facts: DeviceFacts


CHIPS = {
    "sm_80": Chip(80, 32, DeviceFacts("cuda", (8, 0), 108, 163 << 10)),
    "sm_90": Chip(90, 32, DeviceFacts("cuda", (9, 0), 132, 227 << 10)),
    "sm_100": Chip(100, 32, DeviceFacts("cuda", (10, 0), 148, 227 << 10)),
    "sm_120": Chip(120, 32, DeviceFacts("cuda", (12, 0), 170, 99 << 10)),
    "gfx942": Chip("gfx942", 64, DeviceFacts("hip", (0, 0), 304, 64 << 10)),
    "gfx950": Chip("gfx950", 64, DeviceFacts("hip", (0, 0), 256, 160 << 10)),
}


def paged(
    dtype: torch.dtype,
    heads: int,
    dim: int,
    page_size: int,
    seqlen_q: int = 1,
    num_splits: int = 0,
) -> Problem:
    """Four sequences with a cache; several query tokens are packed, with metadata, on any path."""
    batch, heads_kv = 4, 2
    cache = torch.zeros(8, page_size, heads_kv, dim, dtype=dtype)
    tensors = Tensors(
        torch.zeros(batch, 1, heads, dim, dtype=dtype),
        cache,
        torch.zeros_like(cache),
        page_table=torch.zeros(batch, 4, dtype=torch.int32),
        seqused_k=torch.zeros(batch, dtype=torch.int32),
    )
    if seqlen_q == 1:
        return problem(
            tensors, Options("kvcache", causal=True, num_splits=num_splits, return_lse=True)
        )
    q = torch.zeros(batch * seqlen_q, heads, dim, dtype=dtype)
    cu_seqlens_q = torch.zeros(batch + 1, dtype=torch.int32)
    metadata = torch.zeros(metadata_entries(batch), dtype=torch.int32)
    options = Options("kvcache", causal=True, max_seqlen_q=seqlen_q)
    return problem(
        tensors._replace(q=q, cu_seqlens_q=cu_seqlens_q, scheduler_metadata=metadata), options
    )


def packed(dtype: torch.dtype, dim: int, window: tuple[int, int], softcap: float) -> Problem:
    """Two sequences of up to 256 queries and keys, unsplit: what the prefill kernel computes."""
    heads, heads_kv, seqlen = 8, 2, 256
    q = torch.zeros(2 * seqlen, heads, dim, dtype=dtype)
    k = torch.zeros(2 * seqlen, heads_kv, dim, dtype=dtype)
    cu = torch.zeros(3, dtype=torch.int32)
    tensors = Tensors(
        q,
        k,
        torch.zeros_like(k),
        cu_seqlens_q=cu,
        cu_seqlens_k=cu,
        sinks=torch.zeros(heads, dtype=dtype),
    )
    options = Options(
        "varlen",
        causal=True,
        window_size=window,
        softcap=softcap,
        num_splits=1,
        max_seqlen_q=seqlen,
        max_seqlen_k=seqlen,
        return_lse=True,
    )
    return problem(tensors, options)


SPECS: dict[str, Callable[[], Problem]] = {
    "decode-128": lambda: paged(torch.bfloat16, 16, 128, 64),
    "decode-128-pieces": lambda: paged(torch.bfloat16, 16, 128, 64, num_splits=4),
    "decode-96-two-panels": lambda: paged(torch.bfloat16, 16, 96, 16),
    "decode-256": lambda: paged(torch.bfloat16, 8, 256, 64),
    "mixed-128-page-16": lambda: paged(torch.bfloat16, 8, 128, 16, seqlen_q=128),
    "prefill-128": lambda: packed(torch.bfloat16, 128, (-1, -1), 0.0),
    "prefill-64-window-softcap": lambda: packed(torch.float16, 64, (64, -1), 30.0),
    "mixed-float32": lambda: paged(torch.float32, 8, 64, 16, seqlen_q=128),
}
# Shared memory and registers are shortest here; slow to compile, so on the tightest chips only.
LARGE = {
    "prefill-256": lambda: packed(torch.bfloat16, 256, (-1, -1), 0.0),
    "mixed-256-float32": lambda: paged(torch.float32, 8, 256, 16, seqlen_q=128),
}
# The cases that decide the speed of decode. Others may spill: see the table that is printed.
UNSPILLED = ("decode-128", "decode-128-pieces", "decode-96-two-panels")
TIGHT = ("sm_120", "gfx942")

CASES = [(chip, name) for chip in CHIPS for name in SPECS] + [
    (chip, name) for chip in TIGHT for name in LARGE
]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    case: str
    kernel: str
    tile: str
    described: bool  # through tensor descriptors
    shared: int
    registers: int
    spilled: int  # bytes of local memory a thread, or spilled vector registers
    error: str = ""

    def __str__(self) -> str:
        if self.error:
            return f"{self.case:26} {self.kernel:15} {self.error}"
        return (
            f"{self.case:26} {self.kernel:15} {self.tile:22} {'TMA' if self.described else '':3} "
            f"shared {self.shared:6} registers {self.registers:3} spilled {self.spilled}"
        )


# ---------------------------------------------------------------- in a process of its own


def compile_case(chip: Chip, name: str) -> Iterator[Compiled]:
    """Plan a spec on a chip and compile what was planned."""
    from triton.backends.compiler import GPUTarget

    from triton_fa.kernels.launch import cross_compile
    from triton_fa.kernels.plans import call_tensors, length_tensors, plan, schedule

    target = GPUTarget(chip.facts.kind, chip.arch, chip.warp_size)
    given = (SPECS | LARGE)[name]()
    lse = torch.zeros(1) if given.return_lse else None
    out = torch.zeros(1, dtype=given.spec.dtype)
    planned = plan(given, chip.facts)
    # A workspace that is not needed is not there, which decides what is compiled.
    part = torch.zeros(1) if planned.partial_floats else None
    order = torch.zeros(1, dtype=torch.int32) if planned.plan_entries else None
    tensors = call_tensors(given.tensors, AttnResult(out, lse), part, order)
    steps = [(step, tensors) for step in planned.launches]
    metadata = given.tensors.scheduler_metadata
    if metadata is not None:
        lengths = Lengths(**{name: getattr(given.tensors, name) for name in Lengths._fields})
        step = schedule(given.spec, given.bounds, lengths, chip.facts)
        steps.append((step, length_tensors(lengths, metadata)))
    for step, arguments in steps:
        values, options = step.values, step.options
        tile = f"{values.get('BLOCK_M', '')}x{values['BLOCK_N']}" if "BLOCK_N" in values else ""
        tile += f" warps {options['num_warps']} stages {options.get('num_stages', '-')}"
        about = (name, step.kernel.__name__, tile, step.key_box is not None)
        try:
            made = cross_compile(step.kernel, step.pointers(arguments), values, options, target)
        except Exception as error:  # noqa: BLE001  whatever the compiler raises is the result
            text = f"{type(error).__name__}: {error}"
            yield Compiled(*about, 0, 0, 0, text[-2000:])
        else:
            yield Compiled(*about, made.metadata.shared, *_registers(made.asm))


def _registers(asm: dict[str, bytes | str]) -> tuple[int, int]:
    """(registers, spilled) from the binary itself."""
    if "amdgcn" in asm:
        counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count): +(\d+)", str(asm["amdgcn"])))
        return int(counts["vgpr_count"]), int(counts["vgpr_spill_count"])
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = asm["cubin"]
    assert isinstance(cubin, bytes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        text = subprocess.run(
            [tool, "-res-usage", path], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.findall(r"REG:(\d+) STACK:(\d+)", text)[-1]
    return int(registers), int(stack)


def main(chip: str, names: list[str]) -> None:
    """What a test process reads: a line of JSON for each launch, as soon as it is compiled."""
    for name in names:
        for found in compile_case(CHIPS[chip], name):
            sys.stdout.write(json.dumps(asdict(found)) + "\n")
            sys.stdout.flush()


# ---------------------------------------------------------------- the tests


def compiled(chip: str) -> list[Compiled]:
    """All launches of a chip's cases."""
    names = [name for other, name in CASES if other == chip]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    done = subprocess.run(
        [sys.executable, __file__, chip, *names],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    found = [Compiled(**json.loads(line)) for line in done.stdout.splitlines()]
    if done.returncode:  # an assertion in LLVM ends the process, and the cases that follow
        error = f"exit status {done.returncode}: {done.stderr[-3000:]}"
        missing = names[len({c.case for c in found}) :] or names[-1:]
        found += [Compiled(name, "", "", False, 0, 0, 0, error) for name in missing]
    return found


def expected_kernels(name: str) -> set[str]:
    """The kernels that a case is there for."""
    kernels: set[str] = set()
    if "decode" in name or "mixed" in name:
        kernels |= {"decode_kernel", "combine_kernel"}
    if "prefill" in name or "mixed" in name:
        kernels |= {"prefill_kernel"}
    if "mixed" in name:
        kernels |= {"schedule_kernel"}
    return kernels


@pytest.mark.parametrize("chip", CHIPS)
def test_every_plan_compiles_and_fits(chip: str) -> None:
    """One test for a chip: its cases share a process, and tests may run in several."""
    facts = CHIPS[chip].facts
    found = compiled(chip)
    sys.stdout.write("\n".join(map(str, found)) + "\n")
    problems = [f"does not compile: {c}" for c in found if c.error]
    problems += [f"too much shared memory: {c}" for c in found if c.shared > facts.shared_memory]
    for name in {name for other, name in CASES if other == chip}:
        kernels = {c.kernel for c in found if c.case == name}
        if kernels != expected_kernels(name):
            problems.append(f"{name}: {kernels} were launched")
    problems += [f"spills: {c}" for c in found if c.case in UNSPILLED and c.spilled]
    has_descriptors = facts.kind == "cuda" and facts.arch >= (9, 0)
    problems += [
        f"reads through descriptors, or does not: {c}"
        for c in found
        if c.case == "prefill-128" and c.described != has_descriptors
    ]
    assert not problems, "\n".join(problems)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
