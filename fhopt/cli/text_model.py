"""MODEL and --plan of commands that generate text, checked as far as possible before the model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fhopt.cli.options import INTERRUPTED, busy, progress_bar
from fhopt.errors import FhoptError

if TYPE_CHECKING:
    import torch

    from fhopt.hf.sampling import Sampling
    from fhopt.hf.streaming import Generated
    from fhopt.models.loaded_model import LoadedModel
    from fhopt.plan.latent_plan import LatentPlan
    from fhopt.progress import Progress

LOADING_BLOCKS = {"loading": 1.0, "kernels": 4.0}  # stages, and shares of the time of the first run


@dataclass(frozen=True)
class TextModel:
    """A model with its tokenizer, and the plan applied to it; None for the full-precision KV cache."""

    name: str
    network: Any
    tokenizer: Any
    plan: LatentPlan | None

    @property
    def cache_words(self) -> str:
        """Description of the KV cache."""
        return "full-precision KV cache" if self.plan is None else f"{self.plan.ratio():.1f}x plan"


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options for the plan, the number of generated tokens, and sampling."""
    options = (
        click.option(
            "--plan", "plan_path", type=click.Path(path_type=Path),
            help="Plan to apply. [default: the plan of a rewritten folder, else the full-precision KV cache]",
        ),
        click.option("--exact", is_flag=True, help="Use the full-precision KV cache even if the folder has a plan."),
        click.option(
            "--max-new-tokens", type=int,
            help="Max number of tokens to generate. [default: 256, or up to the model's limit]",
        ),
        click.option("--temperature", type=float, default=0.0, show_default=True, help="Temperature; 0 is greedy."),
        click.option(
            "--top-p", type=float, default=1.0, show_default=True,
            help="Nucleus (top-p) sampling threshold; requires --temperature > 0.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Random seed."),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def read_sampling(
    model: str, max_new_tokens: int | None, temperature: float, top_p: float, seed: int, needs_template: bool
) -> Sampling:
    """Check MODEL by its files, and the sampling options, without loading anything. Raises FhoptError."""
    from fhopt.hf.sampling import Sampling
    from fhopt.models.model_name import check_text_model, no_chat_template, stored_facts

    check_text_model(model)
    facts = stored_facts(model)
    chosen = Sampling(max_new_tokens, temperature, top_p, seed)
    chosen.check(facts.positions)
    if needs_template and facts.has_chat_template is False:
        raise no_chat_template(model)
    return chosen


def read_model_plan(model: str, plan_path: Path | None, exact: bool = False) -> LatentPlan | None:
    """Load the plan for MODEL, by default that of a rewritten folder, and check it against stored weights.

    Returns None for the full-precision KV cache. Raises FhoptError.
    """
    from fhopt.models.model_name import folder_of

    if exact:
        if plan_path is not None:
            raise FhoptError("--exact and --plan are mutually exclusive. Drop one of them.")
        return None
    folder = folder_of(model)
    if plan_path is None and (folder is None or not (folder / "fhopt.json").is_file()):
        return None
    path = plan_path if plan_path is not None else folder
    assert path is not None
    if not path.is_dir():
        raise FhoptError(
            f"{path} is not a plan: there is no such folder; expected a folder with plan.json and "
            "plan.safetensors. Write one with: fhopt fit MODEL -o FOLDER."
        )
    from fhopt.models.rewritten_folder import PLAN, is_rewritten
    from fhopt.models.stored_weights import check_stored
    from fhopt.plan.latent_plan import LatentPlan

    plan = LatentPlan.load(path / PLAN if is_rewritten(path) else path)
    if folder is not None:
        check_stored(plan, folder)
    return plan


def load_text_model(
    name: str, dtype: str, device_map: str | None, plan: LatentPlan | None, as_json: bool = False,
    keep_blocks: bool = False,
) -> TextModel:  # fmt: skip
    """Load MODEL, with a transient bar, and apply the plan. Raises FhoptError.

    keep_blocks: leave the weights of a GGUF file in their quantized blocks.
    """
    import torch

    from fhopt.hf.apply import apply
    from fhopt.models.loader import load_model
    from fhopt.parallel.device_map import placement

    if keep_blocks:
        with progress_bar(as_json, LOADING_BLOCKS, transient=True) as progress:
            loaded = _load_blocks(name, getattr(torch, dtype), device_map, progress)
    else:
        with busy("loading", as_json):
            loaded = load_model(name, getattr(torch, dtype), placement(device_map))
    network = loaded.language_model()
    if plan is not None:
        apply(network, plan)
    return TextModel(loaded.name, network, loaded.tokenizer, plan)


def _load_blocks(name: str, dtype: torch.dtype, device_map: str | None, progress: Progress) -> LoadedModel:
    """Load a GGUF file's model with weights in their quantized blocks. Raises FhoptError for any other model."""
    from fhopt.hf.gguf import load_gguf
    from fhopt.models.loaded_model import LoadedModel
    from fhopt.models.loader import DEMO_NAME, gguf_file

    path = gguf_file(name)
    if path is None:
        raise FhoptError(f"--keep-blocks requires a GGUF file, but {name} is not one. Drop it, or pass a .gguf file.")
    if device_map not in (None, "cpu"):
        raise FhoptError("--keep-blocks runs only on CPUs, but --device-map names another device. Drop one of them.")
    model, tokenizer = load_gguf(path, dtype, progress)
    return LoadedModel(DEMO_NAME if name == "demo" else path.stem, model, tokenizer)


@contextmanager
def interruptible() -> Iterator[None]:
    """Exit with code 130 and without a traceback on Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo("stopped", err=True)
        raise SystemExit(INTERRUPTED) from None


def statistics(done: Generated, kind: str, dtype: str, prompt_form: str = "") -> list[str]:
    """Return speed and bytes of a generation in lines. kind: of KV cache. dtype: of full-precision keys and values."""
    from fhopt.plan.display import quantity, rate

    values = done.as_json()
    read = f"{done.prompt_tokens:,} prompt tokens" + (f" ({prompt_form})" if prompt_form else "")
    if done.prefill_tokens < done.prompt_tokens:
        read += f", {done.prefill_tokens:,} of them prefilled"
    if not done.times:
        return [f"{read}: stopped before the first token"]
    rates = f"first token after {quantity(done.times[0], 's')}, prefill {rate(done.prefill_rate or 0)} tok/s"
    decode = "" if done.decode_rate is None else f", decode {rate(done.decode_rate)} tok/s"
    lines = [f"{read}: {rates}", f"{len(done.ids):,} tokens{decode}"]
    if values["cache_bytes"]:
        size, exact = (quantity(values[name], "B") for name in ("cache_bytes", "exact_cache_bytes"))
        words = _size_words(values["ratio"])
        than = f", full precision {exact} in {dtype}: {words}" if kind != "full-precision KV cache" else ""
        lines.append(f"{kind}: {size}{than}")
    return lines


def _size_words(ratio: float) -> str:
    """Compare a KV cache with the full-precision one. ratio: how many times smaller it is."""
    from fhopt.plan.display import times

    if ratio >= 1:
        return f"{times(ratio)} smaller"
    return f"{times(1 / ratio)} larger, because few tokens are latents yet"
