"""What compute-sanitizer reports of the kernels and is no error, each with the reason."""

import re
from dataclasses import dataclass
from pathlib import Path

import triton_fa

KERNELS = Path(triton_fa.__file__).parent / "kernels"


@dataclass(frozen=True)
class Accepted:
    """A finding that is none, and why."""

    tool: str
    pattern: str  # a regular expression that the finding contains
    why: str


def place(file: str, text: str, function: str = "") -> str:
    """A pattern for the one line of a kernels' file, or of a function in it, that begins with
    `text`, as tools name it.
    """
    lines = (KERNELS / file).read_text(encoding="utf-8").splitlines()
    found, inside = [], ""
    for number, line in enumerate(lines, 1):
        if defined := re.match(r"def (\w+)", line):
            inside = defined[1]
        if line.strip().startswith(text) and function in ("", inside):
            found.append(number)
    if len(found) != 1:
        raise ValueError(f"{file}: {len(found)} lines begin with {text!r}, expected one")
    return rf"{re.escape(file)}:{found[0]}"


def race(kernel: str, read: str, *writes: str) -> str:
    """A pattern for a whole finding of racecheck: reads at one place and writes at some others."""
    at = rf"access at {kernel}\+0x[0-9a-f]+ in"
    reads, written = rf"Read {at} {read}", rf"Write {at} (?:{'|'.join(writes)})"
    pairs = (
        rf"{one}(?:\nand {other} \[\d+ hazards\])+"
        for one, other in ((reads, written), (written, reads))
    )
    return rf"\AError: Race reported between (?:{'|'.join(pairs)})\Z"


HANDED_OUT = (
    "Triton's own hand-over to the warps of gl.warp_specialize: a number for each warp, which is "
    "its task or the end, and the arguments. No other access to shared memory has these lines. "
    "All warps of the program meet at barrier 1 after they are written; again when they have been "
    "read; when all tasks are done, only after which the end is written; and once more before "
    "that is read (barrier.sync 1 in the PTX)."
)
HANDED_ON = (
    "Of a buffer that is handed to and fro. All of the writer's warps meet (bar.sync in the PTX) "
    "before one thread arrives at {full}, for which each reading thread waits; all of a reader's "
    "warps meet before one arrives at {empty}, for which each writing thread waits."
)

LEDGER: tuple[Accepted, ...] = (
    Accepted(
        "racecheck",
        race(
            "hopper_kernel",
            place("hopper.py", "def hopper_kernel("),
            place("hopper.py", "def hopper_kernel("),
            place("hopper.py", "if C.CONSUMERS == 2:"),  # around gl.warp_specialize
        ),
        HANDED_OUT,
    ),
    Accepted(
        "racecheck",
        race(
            "latent_kernel",
            place("latent.py", "def latent_kernel("),
            place("latent.py", "def latent_kernel("),
            place("latent.py", "gl.warp_specialize("),
        ),
        HANDED_OUT,
    ),
    Accepted(
        "racecheck",
        race(
            "latent_kernel",
            place("hopper.py", "[acc, factors],", "rescaled"),  # for which they are read
            place("latent.py", "alphas.store(alpha)"),
        ),
        HANDED_ON.format(full="p_full", empty="p_empty"),
    ),
    Accepted(
        "racecheck",
        race(
            "latent_kernel",
            place("latent.py", "factor = factors.load("),
            place("latent.py", "factors.store("),
        ),
        HANDED_ON.format(full="f_full", empty="f_empty"),
    ),
)
