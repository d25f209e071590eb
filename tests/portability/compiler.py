"""Plan calls for a chip that is not here and compile what they would launch.

jit functions are made for the interpreter where tests run, so compiling happens in a process of its
own: ``python -m tests.portability.compiler TARGET KERNEL CASE...`` prints a line for each launch.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.portability.binary import usage
from tests.portability.cases import CASES, HOPPER
from tests.portability.exceptions import EXCEPTIONS
from tests.portability.targets import TARGETS, Target
from triton_fa import api, dispatch
from triton_fa.backends.triton import TritonBackend
from triton_fa.kernels import hopper_plans, submit
from triton_fa.kernels.compat import TRITON_VERSION
from triton_fa.kernels.launch import cross_compile, passed_parameters

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    target: str
    case: str
    kernel: str = ""
    tile: str = ""
    described: bool = False  # through tensor descriptors
    shared: int = 0
    registers: int = 0
    local: int = 0  # bytes a thread
    in_loops: int | None = 0  # local loads and stores within loops; None: the code cannot be read
    seconds: float = 0.0
    misfit: str = ""  # between the parameters that are passed and those that the binary takes
    error: str = ""

    def __str__(self) -> str:
        about = f"{self.target:8} {self.case:26} {self.kernel:16}"
        if self.error:
            return f"{about} {self.error}"
        return (
            f"{about} {self.tile:22} {'TMA' if self.described else '':3} shared {self.shared:6} "
            f"registers {self.registers:3} local {self.local:5} in loops {self.in_loops}"
        )


@dataclass(frozen=True)
class Step:
    """A launch, before anything is compiled for it."""

    kernel: Any
    values: dict[str, Any]  # every argument by name
    options: dict[str, Any]

    @property
    def described(self) -> bool:
        through = [isinstance(value, TensorDescriptor) for value in self.values.values()]
        return any(through) or isinstance(self.kernel, hopper_plans.Described)

    @property
    def tile(self) -> str:
        sizes = self.values | vars(self.values.get("C", SimpleNamespace()))
        blocks = [str(sizes[n]) for n in ("BLOCK_M", "BLOCK_N") if n in sizes]
        warps, stages = (self.options.get(n, "-") for n in ("num_warps", "num_stages"))
        return f"{'x'.join(blocks)} warps {warps} stages {stages}"


@contextlib.contextmanager
def recorded() -> Iterator[list[Step]]:
    """What would be launched while this is open; nothing is."""
    seen: list[Step] = []

    class Launch:
        """In place of the package's own."""

        submittable = None

        def __init__(self, *given: Any) -> None:
            kernel, _, pointers, values, options, _ = given
            named = dict(zip(kernel.arg_names, pointers, strict=False))
            seen.append(Step(kernel, named | values, options))

        def __call__(self, pointers: Sequence[Any]) -> None:
            """Nothing to launch."""

    def run(kernel: Any, *given: Any, grid: Any, warmup: bool, **named: Any) -> None:
        values = {p.name: p.default for p in kernel.params if p.has_default}
        values |= dict(zip(kernel.arg_names, given, strict=False)) | named
        options = {name: values.pop(name) for name in named.keys() - {*kernel.arg_names}}
        seen.append(Step(kernel, values, options))

    with (
        mock.patch("triton_fa.backends.triton.Launch", Launch),
        mock.patch.object(JITFunction, "run", run),
    ):
        yield seen


@contextlib.contextmanager
def planning_for(target: Target) -> Iterator[list[Step]]:
    """Calls with ver="triton" are planned for `target`, on tensors of the CPU."""

    def forget() -> None:
        api._RECORDS.clear()
        api._SCHEDULES.clear()
        dispatch.refusals.cache_clear()

    forget()
    with (
        recorded() as seen,
        mock.patch("triton_fa.device.facts", return_value=target.facts),
        mock.patch("triton_fa.merge.runs_triton", return_value=True),
        mock.patch.object(TritonBackend, "unavailable", return_value=None),
    ):
        yield seen
    forget()


def planned(target: Target, case: str) -> list[Step]:
    """The launches of a case."""
    tried = {TRITON_VERSION.release[:2]} if case in HOPPER else set()
    with mock.patch.object(hopper_plans, "RUN_ON", tried), planning_for(target) as seen:
        CASES[case]()
    return seen


def compile_case(name: str, case: str, kernels: str = "") -> Iterator[Compiled]:
    """Compile the launches of a case whose kernel's name matches."""
    target = TARGETS[name]
    chip = GPUTarget(target.facts.kind, target.arch, target.warp_size)
    for step in planned(target, case):
        kernel = step.kernel.__name__
        if not re.search(kernels, kernel):
            continue
        begin = time.perf_counter()
        about = (name, case, kernel, step.tile, step.described)
        try:
            own = getattr(step.kernel, "cross_compile", None)
            if own is None:
                made = cross_compile(step.kernel, (), step.values, step.options, chip)
            else:
                made = own(step.values, step.options, chip)
        except Exception as error:  # noqa: BLE001  whatever the compiler raises is the result
            yield Compiled(*about, error=f"{type(error).__name__}: {error}"[-2000:])
        else:
            took = round(time.perf_counter() - begin, 2)
            figures = made.metadata.shared, *usage(made.asm), took
            yield Compiled(*about, *figures, parameter_misfit(step, made))


def parameter_misfit(step: Step, made: Any) -> str:
    """How what a launch passes to the driver differs from what the binary takes; NVIDIA's only."""
    by_dispatcher = any(isinstance(v, (TensorDescriptor, tuple)) for v in step.values.values())
    if "ptx" not in made.asm or by_dispatcher:
        return ""
    given = ((name, step.values[name]) for name in step.kernel.arg_names)
    named = [name if isinstance(value, torch.Tensor) else value for name, value in given]
    passed = passed_parameters(step.kernel, made, named)
    if passed is None:
        return f"not known how to pass {made.src.signature}"
    taken, sizes = submit.sizes_in(made.asm["ptx"]), submit.sizes_of(passed)
    return "" if sizes == taken else f"passes parameters of {sizes} bytes, it takes {taken}"


def main(target: str, kernels: str, *cases: str) -> None:
    for case in cases:
        for found in compile_case(target, case, kernels):
            sys.stdout.write(json.dumps(asdict(found)) + "\n")
        # The end of a case, which may have launched nothing that was asked for.
        sys.stdout.write(json.dumps(case) + "\n")
        sys.stdout.flush()


# ---------------------------------------------------------------- from another process


def compiled(target: str, cases: Sequence[str], kernels: str = "") -> Iterator[Compiled]:
    """Compile cases for a target, case by case; a compiler that dies costs the case it was at."""
    left = [case for case in cases if case not in HOPPER or target == "sm_90"]
    while left:
        with tempfile.TemporaryFile("w+") as log:
            process = worker(target, left, kernels, log)
            assert process.stdout is not None
            for line in process.stdout:
                found = json.loads(line)
                if isinstance(found, dict):
                    yield Compiled(**found)
                else:
                    left.remove(found)
            if process.wait():
                log.seek(0)
                error = f"exit status {process.returncode}: {log.read()[-3000:]}"
                yield Compiled(target, left.pop(0), error=error)


def worker(
    target: str, cases: Sequence[str], kernels: str, log: IO[str]
) -> "subprocess.Popen[str]":
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [str(ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.portability.compiler", target, kernels, *cases],
        cwd=ROOT,
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )


def misfits(found: Compiled) -> list[str]:
    """Why a launch cannot run on its chip."""
    if found.misfit:
        return [f"{found.misfit}: {found}"]
    limit = TARGETS[found.target].facts.shared_memory
    if found.error:
        return [f"does not compile: {found}"]
    return [f"too much shared memory: {found}"] if found.shared > limit else []


def faults(found: Compiled, triton: str) -> list[str]:
    """Why a launch cannot run on its chip, or not well, but for what is known of this Triton."""
    slow = found.in_loops and not excused(found, triton)
    return misfits(found) + ([f"local memory in a loop: {found}"] if slow else [])


def excused(found: Compiled, triton: str) -> str:
    """Why local memory in loops of this launch is no fault; empty if it is one."""
    about = (found.target, found.case, found.kernel, triton)
    return next((e.why for e in EXCEPTIONS if e.covers(*about)), "")


if __name__ == "__main__":
    main(*sys.argv[1:])
