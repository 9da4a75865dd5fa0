"""Command `fhopt generate`."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fhopt.cli.app import main
from fhopt.cli.options import INTERRUPTED, blocks_option, busy, json_option, placement_options, print_json
from fhopt.cli.text_model import (
    TextModel,
    interruptible,
    load_text_model,
    read_model_plan,
    read_sampling,
    sampling_options,
    statistics,
)
from fhopt.errors import FhoptError

if TYPE_CHECKING:
    from fhopt.hf.sampling import Sampling
    from fhopt.hf.streaming import Generated


@main.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option(
    "--file",
    "prompt_file",
    type=click.Path(path_type=Path),
    help="Prompt file; - reads standard input.",
)
@click.option(
    "--chat/--raw",
    "chat",
    default=None,
    help="Apply the chat template, or continue the prompt as plain text. [default: --chat if the model has a template]",
)
@sampling_options
@placement_options
@blocks_option
@json_option
def generate(
    model: str, prompt: str | None, prompt_file: Path | None, chat: bool | None, plan_path: Path | None, exact: bool,
    max_new_tokens: int | None, temperature: float, top_p: float, seed: int, device_map: str | None, dtype: str,
    keep_blocks: bool, as_json: bool,
) -> None:  # fmt: skip
    """Generate text from PROMPT with MODEL, streamed to standard output, with or without a plan.

    A PROMPT of - reads standard input. Throughput and bytes follow on standard error, also after Ctrl-C.
    """
    with interruptible():
        sampling = read_sampling(model, max_new_tokens, temperature, top_p, seed, needs_template=bool(chat))
        text = _read_prompt(prompt, prompt_file)
        plan = read_model_plan(model, plan_path, exact)
        _check_prompt(model, text, chat, sampling)
        opened = load_text_model(model, dtype, device_map, plan, as_json, keep_blocks)
        ids, used = _tokens(opened.tokenizer, text, chat, model)
        done = run_generation(opened, ids, sampling, silent=as_json)
    if as_json:
        about = {"model": opened.name, "prompt_form": used, "dtype": dtype, "sampling": asdict(sampling)}
        print_json(about | {"plan_ratio": plan.ratio() if plan else None} | done.as_json())
    else:
        for line in statistics(done, opened.cache_words, dtype, used):
            click.echo(line, err=True)
    if done.interruptions:
        raise SystemExit(INTERRUPTED)


def run_generation(opened: TextModel, ids: list[int], sampling: Sampling, *, silent: bool) -> Generated:
    """Generate after token ids, streamed to standard output unless `silent`. Raises FhoptError."""
    import torch

    from fhopt.hf.streaming import generate_text

    torch.manual_seed(sampling.seed)
    with ExitStack() as reading:
        reading.enter_context(busy("reading the prompt", silent))

        def write(text: str) -> None:
            reading.close()
            if not silent:
                click.echo(text, nl=False)

        done = generate_text(opened.network, opened.tokenizer, ids, sampling, write=write)
    if not silent and not done.text.endswith("\n"):
        click.echo()
    return done


def _check_prompt(model: str, text: str, chat: bool | None, sampling: Sampling) -> None:
    """Raise FhoptError if the prompt has no tokens or too many, before the model of a folder is loaded."""
    from fhopt.models.loader import load_tokenizer
    from fhopt.models.model_name import stored_facts

    tokenizer = load_tokenizer(model)
    if tokenizer is not None:
        sampling.room(len(_tokens(tokenizer, text, chat, model)[0]), stored_facts(model).positions)


def _tokens(tokenizer: Any, text: str, chat: bool | None, model: str) -> tuple[list[int], str]:
    """Return the token ids of the prompt, and whether the chat template was applied. Raises FhoptError."""
    from fhopt.hf.chat import chat_tokens

    if chat is None:
        chat = bool(tokenizer.chat_template)
    if chat:
        return chat_tokens(tokenizer, [{"role": "user", "content": text}], model), "chat template"
    return [int(token) for token in tokenizer(text)["input_ids"]], "raw"


def _read_prompt(prompt: str | None, file: Path | None) -> str:
    """Return the text of the prompt. Raises FhoptError for none, two, or an empty one."""
    if (prompt is None) == (file is None):
        found = "no prompt" if prompt is None else "a PROMPT and --file"
        raise FhoptError(f"found {found}; expected one prompt. Pass PROMPT, --file FILE, or - for standard input.")
    text = prompt if prompt is not None and prompt != "-" else _read_file(file or Path("-"))
    if not text.strip():
        raise FhoptError("the prompt is empty; expected text. Pass a PROMPT.")
    return text


def _read_file(file: Path) -> str:
    try:
        return sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise FhoptError(
            f"cannot read the prompt {file}: {reason}; expected a UTF-8 text file. Pass another file."
        ) from error
