"""``python -m tests.portability``: compile the matrix, write its tables, fail on what is wrong."""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import triton_fa
from bench.environment import kernel_digest
from tests.portability.cases import CASES
from tests.portability.compiler import Compiled, compiled, excused, faults
from tests.portability.targets import TARGETS

COLUMNS = ("case", "kernel", "tile", "TMA", "shared", "registers", "local", "in loops")
SUMMARY = ("target", "launches", "faults", "known", "most shared", "kernel sources")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.portability", description=__doc__)
    parser.add_argument(
        "--target", action="append", choices=TARGETS, help="one or several times  [all]"
    )
    parser.add_argument("--kernel", default="", help="regex searched in kernel names")
    parser.add_argument("--case", default="", help="regex searched in case names")
    parser.add_argument("--processes", type=int, default=2, help="targets compiled side by side")
    parser.add_argument(
        "--output", type=Path, default=Path("portability-report"), help="folder for the tables"
    )
    options = parser.parse_args(arguments)
    options.cases = [name for name in CASES if re.search(options.case, name)]
    if not options.cases:
        parser.error(f"--case: no case matches {options.case!r}")
    return options


def compile_all(options: argparse.Namespace) -> list[Compiled]:
    """Every launch of the chosen cases, printed as it comes."""

    def one(target: str) -> list[Compiled]:
        found = []
        for launch in compiled(target, options.cases, options.kernel):
            sys.stdout.write(f"{launch}\n")
            sys.stdout.flush()
            found.append(launch)
        return found

    with ThreadPoolExecutor(options.processes) as pool:
        return [c for found in pool.map(one, options.target or TARGETS) for c in found]


ONLY_ON_HOPPER = {"hopper.py", "latent.py", "transpose.py"}
NOT_ON_RDNA = {"short.py"}
NEVER_LAUNCHED = {"functions_kernel"}
"""Compiled to see whether a user's functions can be part of a kernel."""


def kernel_names(targets: Sequence[str]) -> set[str]:
    """The kernels of the package for these chips, by the name they are written with."""
    sources = set((Path(triton_fa.__file__).parent / "kernels").glob("*.py"))
    if "sm_90" not in targets:
        sources = {path for path in sources if path.name not in ONLY_ON_HOPPER}
    if all(target.startswith(("gfx11", "gfx12")) for target in targets):
        sources = {path for path in sources if path.name not in NOT_ON_RDNA}
    names = {
        n for path in sources for n in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }
    return names - NEVER_LAUNCHED


def write(found: Sequence[Compiled], folder: Path, arguments: Sequence[str]) -> None:
    """A file for each target, and tables of all targets whose files of this Triton are there.

    So the matrix can be compiled in parts.
    """
    version = metadata.version("triton")
    folder.mkdir(parents=True, exist_ok=True)
    for target in dict.fromkeys(c.target for c in found):
        content = {
            "triton": version,
            "command": shlex.join(["python", "-m", "tests.portability", *arguments]),
            "kernel_digest": kernel_digest(),
            "launches": [asdict(c) for c in found if c.target == target],
        }
        path = folder / f"triton-{version}-{target}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")
    (folder / f"triton-{version}.md").write_text(markdown(version, folder))


def markdown(version: str, folder: Path) -> str:
    """What the files of this Triton say: a table of the targets, then one for each."""
    there: dict[str, tuple[str, list[Compiled]]] = {}
    for target in TARGETS:
        path = folder / f"triton-{version}-{target}.json"
        if path.exists():
            content = json.loads(path.read_text())
            there[target] = content["kernel_digest"], [Compiled(**c) for c in content["launches"]]
    parts = [
        f"# Compiled with Triton {version}, not run",
        "Shared memory in bytes a program; registers and bytes of local memory a thread; local "
        "loads and stores within loops, ? where the code could not be read. Known: such loops "
        "with a reason in `exceptions.py`.",
    ]
    lines: list[tuple[str, ...]] = [SUMMARY, ("---",) * len(SUMMARY)]
    for target, (digest, launches) in there.items():
        wrong = sum(bool(faults(c, version)) for c in launches)
        known = sum(bool(c.in_loops and excused(c, version)) for c in launches)
        counts = (len(launches), wrong, known, max(c.shared for c in launches))
        lines.append((target, *map(str, counts), digest))
    parts.append(table(lines))
    for target, (_, launches) in there.items():
        shared = TARGETS[target].facts.shared_memory >> 10
        parts.append(f"## {target}, {shared} KiB of shared memory")
        parts.append(table([COLUMNS, ("---",) * len(COLUMNS), *map(cells, launches)]))
    return "\n\n".join(parts) + "\n"


def table(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(c: Compiled) -> tuple[str, ...]:
    if c.error:
        return (c.case, c.kernel, c.tile, "**failed**", "", "", "", "")
    numbers = (c.shared, c.registers, c.local, "?" if c.in_loops is None else c.in_loops)
    return (c.case, c.kernel, c.tile, "yes" if c.described else "", *map(str, numbers))


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    found = compile_all(options)
    version = metadata.version("triton")
    write(found, options.output, arguments)
    wrong = [text for c in found for text in faults(c, version)]
    if options.cases == list(CASES) and not options.kernel:
        missed = kernel_names(options.target or [*TARGETS]) - {c.kernel for c in found}
        wrong += [f"no case launches it: {name}" for name in sorted(missed)]
    sys.stdout.write("\n".join([*wrong, f"{len(found)} launches, {len(wrong)} faults\n"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
