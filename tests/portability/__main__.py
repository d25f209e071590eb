"""``python -m tests.portability``: compile the matrix, write its tables, fail on what is wrong."""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import triton_fa
from tests.portability.cases import CASES
from tests.portability.compiler import Compiled, compiled, faults
from tests.portability.targets import TARGETS

COLUMNS = ("case", "kernel", "tile", "TMA", "shared", "registers", "local", "in loops")


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


def kernel_names() -> set[str]:
    """The kernels of the package, by the name they are written with."""
    sources = (Path(triton_fa.__file__).parent / "kernels").glob("*.py")
    return {
        n for path in sources for n in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.M)
    }


def markdown(found: Sequence[Compiled], version: str) -> str:
    """A table for each target; ? is a loop that could not be looked at."""
    parts = [
        f"# Compiled with Triton {version}, not run",
        "Shared memory in bytes a program; registers and bytes of local memory a thread; local "
        "loads and stores within loops.",
    ]
    for target in dict.fromkeys(c.target for c in found):
        shared = TARGETS[target].facts.shared_memory
        parts.append(f"## {target}, {shared >> 10} KiB of shared memory")
        rows = [cells(c) for c in found if c.target == target]
        lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def cells(c: Compiled) -> tuple[str, ...]:
    if c.error:
        return (c.case, c.kernel, c.tile, "**failed**", "", "", "", "")
    numbers = (c.shared, c.registers, c.local, "?" if c.in_loops is None else c.in_loops)
    return (c.case, c.kernel, c.tile, "yes" if c.described else "", *map(str, numbers))


def main(arguments: Sequence[str]) -> int:
    options = parse(arguments)
    found = compile_all(options)
    version = metadata.version("triton")
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"triton-{version}"
    content = {"triton": version, "launches": [asdict(c) for c in found]}
    stem.with_name(stem.name + ".json").write_text(json.dumps(content, indent=1) + "\n")
    stem.with_name(stem.name + ".md").write_text(markdown(found, version))
    wrong = [text for c in found for text in faults(c)]
    if options.cases == list(CASES) and not options.kernel:
        missed = kernel_names() - {c.kernel for c in found}
        wrong += [f"no case launches it: {name}" for name in sorted(missed)]
    sys.stdout.write("\n".join([*wrong, f"{len(found)} launches, {len(wrong)} faults\n"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
