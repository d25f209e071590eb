"""`info`: what a bug report starts with."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import click
import torch

from triton_fa import device as device_facts
from triton_fa.dispatch import backends
from triton_fa.dump import versions
from triton_fa.env import cache_dir, in_effect, settings, triton_cache_dir

PEERS = ("sglang-kernel", "sgl-kernel", "kernels", "flash-attn-3", "flash-attn-4")
"""Distributions that hold a FlashAttention binary."""


@click.command("info")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """Versions, GPUs, backends, environment and caches."""
    found = collect()
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    for title, section in found.items():
        click.echo(f"{title}:")
        for line in _lines(section):
            click.echo(f"  {line}")


def collect() -> dict[str, Any]:
    """What `info` prints."""
    status = {str(ver): found for ver, found in backends().items()}
    return {
        "versions": versions(),
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "backends": {
            ver: {"available": s.available, "detail": s.detail, "reason": s.reason}
            for ver, s in status.items()
        },
        "fa3_providers": {
            "order": list(settings().fa3_providers),
            "outcome": status["3"].detail or status["3"].reason,
        },
        "peers": {name: _version(name) for name in PEERS},
        "environment": in_effect(),
        "caches": {
            "triton_fa": _directory(cache_dir()),
            "triton": _directory(triton_cache_dir()),
        },
    }


def _gpu(index: int) -> dict[str, Any]:
    where = torch.device("cuda", index)
    facts = device_facts.facts(where)
    props = torch.cuda.get_device_properties(where)
    return {
        "name": props.name,
        "kind": facts.kind,
        "arch": ".".join(map(str, facts.arch)) if facts.kind == "cuda" else props.gcnArchName,
        "multiprocessors": facts.num_sms,
        "shared_memory_bytes": facts.shared_memory,
        "memory_bytes": props.total_memory,
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _directory(path: Path) -> dict[str, Any]:
    """Its size, of what can be read of it: others may write there meanwhile."""
    files, size = 0, 0
    for file in path.rglob("*") if path.is_dir() else ():
        try:
            if file.is_file():
                files, size = files + 1, size + file.stat().st_size
        except OSError:
            continue
    return {"path": str(path), "files": files, "bytes": size}


def _lines(section: Any) -> list[str]:
    if isinstance(section, list):
        return [", ".join(_lines(item)) for item in section] or ["none"]
    lines = []
    for name, value in section.items():
        if isinstance(value, dict):
            value = ", ".join(_lines(value))
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        if value is not None and value != "":
            lines.append(f"{name}: {value}")
    return lines or ["none"]
