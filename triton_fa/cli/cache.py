"""`cache`: the store of tuned tiles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from triton_fa import store
from triton_fa.env import settings


@click.group("cache")
def command() -> None:
    """Show or clear the tiles that `tune` measured."""


@command.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(as_json: bool) -> None:
    """List the entries."""
    found = list(store.entries())
    if as_json:
        kept = [{"path": str(e.path), "key": e.key, "fault": e.fault} | e.value for e in found]
        click.echo(json.dumps({"directory": str(store.directory()), "entries": kept}, indent=2))
        return
    ignored = "" if settings().autotune_cache else " (not read: TRITON_FA_AUTOTUNE_CACHE=0)"
    click.echo(f"{store.directory()}: {len(found)} entries{ignored}")
    for entry in found:
        click.echo(f"unusable: {entry.fault}" if entry.fault else described(entry.key, entry.value))


@command.command()
@click.confirmation_option(prompt="Remove all tuned tiles?")
def clear() -> None:
    """Remove the entries. Compiled kernels are Triton's, and stay."""
    if not settings().autotune_cache:
        raise click.ClickException("TRITON_FA_AUTOTUNE_CACHE=0: the store is not touched")
    try:
        removed = store.clear()
    except OSError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{store.directory()}: {removed} files removed")


def described(key: Mapping[str, Any], value: Mapping[str, Any]) -> str:
    """An entry for people."""
    calls = ", ".join(f"{name} {part}" for name, part in key.items())
    tile, gain = json.dumps(value.get("tile")), value.get("gain")
    return f"{calls}\n  {tile}, {gain} times as fast as the shipped one"
