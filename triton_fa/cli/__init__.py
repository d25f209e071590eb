"""The command line. Each command is a module; what it does without a terminal is elsewhere."""

from __future__ import annotations

from typing import Any

import click

import triton_fa
from triton_fa.cli import cache, check, info, replay, tune, warmup
from triton_fa.errors import TritonFAError


class Commands(click.Group):
    """Commands whose errors on purpose are one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except TritonFAError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(triton_fa.__version__, prog_name="triton_fa")
def main() -> None:
    """Attention for LLM inference in Triton: what is here, does it work, make it ready."""


for _module in (info, check, warmup, tune, cache, replay):
    main.add_command(_module.command)
