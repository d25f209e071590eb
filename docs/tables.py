"""The README's generated tables: ``python docs/tables.py`` rewrites them, ``--check`` compares.

`env` comes from ``triton_fa.env.VARIABLES``; `refused` from the docstrings of the public functions:
every sentence that says what is refused today; `performance` from a committed result.
"""

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
sys.path.insert(0, str(ROOT))

import triton_fa  # noqa: E402  # the checkout's package, wherever this is run from
from bench.reading import load  # noqa: E402
from bench.report import geometric_mean, ratio_to  # noqa: E402
from bench.variants import BASELINE  # noqa: E402
from triton_fa.env import VARIABLES  # noqa: E402

FUNCTIONS = (
    "flash_attn_with_kvcache",
    "flash_attn_varlen_func",
    "flash_attn_func",
    "get_scheduler_metadata",
    "flash_attn_combine",
)

RESULTS = [
    ROOT / "bench" / "results" / f"2026-11-20-h200-{kind}.json" for kind in ("decode", "prefill")
]
TIMES = "\N{MULTIPLICATION SIGN}"
# What the README calls a row, with × for x, and its name in the result.
DECODE = {
    "1x1024 32/8x128": "1x1024.32/8x128.p16",
    "8x512 32/8x128": "8x512.32/8x128.p16",
    "4x2048 32/8x128": "4x2048.32/8x128.p16",
    "64x512 32/8x128": "64x512.32/8x128.p16",
    "256x64 32/8x128": "256x64.32/8x128.p16",
    "16x8192 32/8x128": "16x8192.32/8x128.p16",
    "64x4096 64/8x64": "64x4096.64/8x64.p16",
    "256…32768 keys, skewed, 32/8x128": "skew32.32/8x128.p16",
    "16x4096 96/96x128": "16x4096.96/96x128.p16",
    "8x4096 64/8x64, 8 query tokens": "8x4096.64/8x64.p16.q8",
}
PREFILL = {
    "1x16384 32/8x128 causal": "1x16384.32/8x128",
    "1x16384 32/8x128 full": "1x16384.32/8x128.full",
    "16x1024 32/8x128 causal": "16x1024.32/8x128",
    "1x16384 64/8x64 causal": "1x16384.64/8x64",
    "1x16384 16/8x256 causal": "1x16384.16/8x256",
    "2x8192 32/8x128, pages of 128": "2x8192.32/8x128.p128",
    "2x8192 32/8x128, pages of 16": "2x8192.32/8x128.p16",
    "8x1024 of 32768 32/8x128": "chunk.8x1024of32768.32/8x128.p64",
    "4x4096 32/8x160 causal": "4x4096.32/8x160",
    "1024 of 8192 and 64 decodes": "mixed.4x1024of8192+64x4096.32/8x128.p16",
}


def env_table() -> str:
    lines = ["| variable | default | meaning |", "|---|---|---|"]
    for variable in VARIABLES:
        default = f"`{variable.default}`" if variable.default else ""
        lines.append(f"| `{variable.name}` | {default} | {variable.meaning} |")
    return "\n".join(lines)


def argument_texts(function: object) -> dict[str, str]:
    """Parameter name to its description, from the docstring's ``Args:`` section."""
    doc = inspect.getdoc(function) or ""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", doc, re.MULTILINE | re.DOTALL)
    texts: dict[str, str] = {}
    for entry in re.split(r"\n(?= {4}\w)", section[1].rstrip()) if section else []:
        names, _, text = entry.partition(":")
        for name in names.split(","):
            texts[name.strip()] = " ".join(text.split())
    return texts


def refusals() -> dict[tuple[str, str], list[str]]:
    """(argument, what is refused) to the functions that refuse it, in the order of FUNCTIONS."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in FUNCTIONS:
        for argument, text in argument_texts(getattr(triton_fa, name, None)).items():
            for sentence in re.split(r"(?<=\.) ", text):
                if re.search(r"\brefused\b.*\btoday\b", sentence, re.IGNORECASE):
                    found.setdefault((argument, said(sentence)), []).append(name)
    return found


def said(sentence: str) -> str:
    """What a sentence refuses, without the words that every one of them has."""
    if match := re.fullmatch(r"Refused today(?: unless (.*))?\.", sentence):
        return f"anything but {match[1]}" if match[1] else "the argument"
    return sentence.rstrip(".").replace("|", "\\|")


def refused_table() -> str:
    lines = ["| argument | what is refused | by |", "|---|---|---|"]
    for (argument, what), functions in refusals().items():
        by = ", ".join(f"`{f.removeprefix('flash_attn_')}`" for f in functions)
        lines.append(f"| `{argument}` | {what} | {by} |")
    return "\n".join(lines) if len(lines) > 2 else "Nothing is."


def performance_table(paths: Sequence[Path] = RESULTS) -> str:
    """Ratios of clean times, medians over bursts, of the rows that stand for the rest."""
    rows: dict[str, float] = {}
    averages = []
    for path in paths:
        result = load(path)
        ratios = {m.row.name: ratio_to(m, "triton", "clean", BASELINE) for m in result.measurements}
        found = {name: ratio for name, ratio in ratios.items() if ratio}
        averages.append(geometric_mean(found.values()))
        rows |= found
    where = result.environment
    decode, prefill = (f"{average:.2f}" for average in averages)
    lines = [
        f"One {where['gpu']}, bf16, Triton {where['triton']}, beside FlashAttention-3",
        "(sglang-kernel 0.4.2 with its own metadata) in one process;",
        "above 1 is faster than FA3. Geometric means over all rows, wins and losses alike: decode",
        f"{decode}, prefill {prefill} ([data and page](bench/results/README.md)).",
        "",
        "| decode (batchxkeys, heads q/kvxdim) | ratio | | prefill | ratio |".replace("x", TIMES),
        "|---|---|---|---|---|",
    ]
    for pair in zip_longest(DECODE.items(), PREFILL.items()):
        cells = [f"{r[0].replace('x', TIMES)} | {rows[r[1]]:.2f}" if r else "|" for r in pair]
        lines.append(f"| {' | | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {"env": env_table, "refused": refused_table, "performance": performance_table}


def rewritten(text: str) -> str:
    """``text`` with every generated table as it should be."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        before, found_begin, rest = text.partition(begin)
        _, found_end, after = rest.partition(end)
        if not (found_begin and found_end):
            raise ValueError(f"{README.name}: expected {begin} and {end} in this order")
        text = f"{before}{begin}\n{table()}\n{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if it is stale")
    options = parser.parse_args()
    old = README.read_text()
    new = rewritten(old)
    if options.check:
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
