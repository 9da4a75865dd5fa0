"""Command group and errors of the command line. Every command takes `--json`: only one object on standard output.

A user error prints one line on standard error and exits with code 2.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

from fhopt.errors import FhoptError, PassError
from fhopt.version import __version__

EXTRAS = {  # packages that `pip install fhopt` does not install, and the extra that does
    "transformers": "hf", "tokenizers": "hf", "huggingface_hub": "hf", "accelerate": "hf", "gguf": "hf",
    "pygraphviz": "report", "vl_convert": "report", "starlette": "view", "uvicorn": "view", "matplotlib": "plot",
    "model_explorer": "explorer", "datasets": "data", "lm_eval": "evaluation", "torch_mlir": "mlir", "iree": "mlir",
}  # fmt: skip

FOREIGN = {  # loggers of other libraries, and the start of a message that is useless to a user of fhopt
    "torch.utils.cpp_extension": "No CUDA runtime is found",  # a machine may have CUDA's compiler and no GPU
    "matplotlib.font_manager": "Matplotlib is building the font cache",
    "torch.utils._pytree": "%s is an Enum subclass",  # from torchao, which transformers imports if installed
}


COMMANDS = {  # as `fhopt --help` lists them, in lines of at most 80 columns
    "First": {
        "demo": "Fit, use and measure a plan for SmolLM2-135M, in minutes",
        "doctor": "Check hardware, compiler and kernels, and suggest fixes",
    },
    "Plans": {
        "fit": "Calibrate MODEL on text and write a plan",
        "calibrate": "Collect statistics, from which plans are fitted in seconds",
        "heal": "Refit a plan's decoder matrices to reduce its error",
        "head": "Fit a retrieval head (reads only candidate rows)",
        "plans": "Manage plans on this machine: list, fit, add, find, prune",
    },
    "Use": {
        "generate": "Generate text from a prompt, streaming",
        "chat": "Chat with MODEL, reusing one KV cache",
        "rewrite": "Write MODEL and plan as one folder, also for vLLM",
        "export": "Export a decode step to MLIR or IREE",
        "verify": "Prove that an exported step never reconstructs K/V",
        "models": "Manage models converted from GGUF files: list, prune",
    },
    "Measure": {
        "eval": "Perplexity and tasks, full-precision KV cache vs. a plan",
        "bench": "Throughput and KV cache size over contexts and batches",
        "cost": "Estimate decode time per device (roofline)",
        "device": "Measure this machine's CPU, for `--device here`",
    },
    "See": {
        "inspect": "List the attention sites of MODEL, with a plan's bits",
        "explain": "Explain why attention in MODEL is not rewritten",
        "report": "Write a report of MODEL and plan as one HTML file",
        "view": "Show the report in a browser, and the progress of a fit",
        "kernels": "Write the generated kernels of a plan",
    },
}


class _Commands(click.Group):
    """Command group that converts FhoptError, or a missing extra, into one line and exit code 2."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands by purpose."""
        for title, lines in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(name, line) for name, line in lines.items() if name in self.commands])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no downloads at run time
        for name in FOREIGN:
            logging.getLogger(name).addFilter(_is_our_matter)  # addFilter ignores a duplicate
        try:
            with warnings.catch_warnings():
                warnings.showwarning = partial(_show_warning, warnings.showwarning)
                return super().invoke(ctx)
        except (FhoptError, PassError) as error:
            message = " ".join(str(error).split())
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in EXTRAS:
                raise
            message = f"{package} is not installed. Install it with: pip install 'fhopt[{EXTRAS[package]}]'"
        click.echo(f"fhopt: {message}", err=True)
        raise click.exceptions.Exit(2)


def _show_warning(show: Callable[..., None], message: Any, category: type, filename: str, *where: Any) -> None:
    """Write a warning of fhopt itself as one line; pass others to `show`."""
    if category is RuntimeWarning and Path(filename).is_relative_to(Path(__file__).parent.parent):
        click.echo(f"fhopt: warning: {' '.join(str(message).split())}", err=True)
    else:
        show(message, category, filename, *where)


def _is_our_matter(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(FOREIGN[record.name])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fhopt")
def main() -> None:
    """Find attention in any PyTorch model, compress its KV cache to latents, and measure the loss.

    MODEL is `demo`, a Hugging Face folder, a GGUF file, a .pt2 program, or python.module:function.
    """
