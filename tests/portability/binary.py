"""What a compiled kernel says of itself: registers, local memory, and whether loops go through it.

Loops are found in the control flow of the machine code, so a spill before or after them counts for
nothing. Where the tools cannot read a chip's code the answer is None.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import networkx
import triton

Asm = dict[str, bytes | str]


class Usage(NamedTuple):
    """Of one thread."""

    registers: int
    local: int  # bytes of local memory: spilled registers, and arrays
    in_loops: int | None  # instructions within loops that load or store it


class Instruction(NamedTuple):
    """As much of a machine instruction as finding loops takes."""

    place: str  # its address, or the label before it
    local: bool
    target: str  # where it may jump to, "" if nowhere
    falls_through: bool


def usage(asm: Asm) -> Usage:
    """What `CompiledKernel.asm` holds, for either vendor."""
    if "amdgcn" in asm:
        return amd(str(asm["amdgcn"]))
    cubin = asm["cubin"]
    assert isinstance(cubin, bytes)
    return nvidia(cubin)


def amd(text: str) -> Usage:
    counts = dict(re.findall(r"\.(vgpr_count|private_segment_fixed_size): +(\d+)", text))
    local = int(counts["private_segment_fixed_size"])
    return Usage(int(counts["vgpr_count"]), local, local_in_loops(gcn(text)) if local else 0)


def nvidia(cubin: bytes) -> Usage:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        found = re.findall(r"REG:(\d+) STACK:(\d+)", cuobjdump("-res-usage", path))
        registers, local = map(int, found[-1])
        if not local:
            return Usage(registers, 0, 0)
        try:
            code = sass(cuobjdump("-sass", path))
        except subprocess.CalledProcessError:  # a chip newer than this tool
            return Usage(registers, local, None)
    return Usage(registers, local, local_in_loops(code))


def cuobjdump(option: str, path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    done = subprocess.run([tool, option, path], capture_output=True, text=True, check=True)
    return done.stdout


# Some disassemblies end with scheduling hints: `BRA 0x30 &req={0} ?trans6;`.
SASS = re.compile(r"/\*([0-9a-f]{4,})\*/ +(@\S+ +)?([A-Z]\w*)[^\s;]* *([^;&?\n]*?) *[;&?]")


def sass(text: str) -> list[Instruction]:
    """The instructions of a disassembly, which gives every address."""
    code = []
    for place, predicate, name, operands in SASS.findall(text):
        jump = re.search(r"(?:^|, *| )0x([0-9a-f]+)$", operands)
        jumps = name in ("BRA", "CALL", "JMP") and jump is not None
        target = f"{int(jump[1], 16):04x}" if jumps and jump else ""
        alone = not predicate and (not jump or jump.start() == 0)
        ends = alone and name in ("BRA", "JMP", "EXIT", "RET")
        code.append(Instruction(place, name in ("LDL", "STL"), target, not ends))
    return code


GCN = re.compile(r"^(?:(\.LBB\w+):|[ \t]+([a-z]\w+)[ \t]*([^;\n]*))", re.MULTILINE)
SCRATCH = re.compile(r"off, s\[0:3\]")


def gcn(text: str) -> list[Instruction]:
    """The instructions of an assembly listing; only labels have a place."""
    code = []
    for found, name, operands in GCN.findall(text):
        if found:  # as an instruction that does nothing, since two labels may follow each other
            code.append(Instruction(found, False, "", True))
            continue
        local = name.startswith("scratch_") or (
            name.startswith("buffer_") and SCRATCH.search(operands) is not None
        )
        target = re.search(r"\.LBB\w+", operands)
        jumps = name.startswith(("s_branch", "s_cbranch")) and target is not None
        ends = name in ("s_branch", "s_endpgm", "s_setpc_b64")
        code.append(Instruction("", local, target[0] if jumps and target else "", not ends))
    return code


def local_in_loops(code: list[Instruction]) -> int | None:
    """Instructions that touch local memory and can come to run again; None if none touches it.

    Asked of kernels that have local memory, whose code was then not understood.
    """
    if not any(instruction.local for instruction in code):
        return None
    places = {instruction.place: i for i, instruction in enumerate(code) if instruction.place}
    flow = networkx.DiGraph()
    flow.add_edges_from(edges(code, places))
    loops = (c for c in networkx.strongly_connected_components(flow) if len(c) > 1)
    return sum(code[i].local for loop in loops for i in loop)


def edges(code: list[Instruction], places: dict[str, int]) -> Iterable[tuple[int, int]]:
    for i, instruction in enumerate(code):
        if instruction.falls_through and i + 1 < len(code):
            yield i, i + 1
        if instruction.target in places:
            yield i, places[instruction.target]
