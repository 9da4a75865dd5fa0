"""The command line. Every command takes `--json`: one object on standard output and nothing else there.

A mistake of the user's ends with one line on standard error and exit code 2.
"""

from __future__ import annotations

import os
from typing import Any

import click

from fhopt.errors import FhoptError, PassError
from fhopt.version import __version__


class _Commands(click.Group):
    """Turns FhoptError into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded at run time
        try:
            return super().invoke(ctx)
        except (FhoptError, PassError) as error:
            message = " ".join(str(error).split())
            click.echo(f"fhopt: {message}", err=True)
            ctx.exit(2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fhopt")
def main() -> None:
    """Find attention in any PyTorch model, shrink its cache to latents, and measure what it cost.

    MODEL is `demo`, a Hugging Face folder, a GGUF file, a .pt2 program, or python.module:function.
    """
