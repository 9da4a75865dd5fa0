"""`fhopt rewrite`: a model and its plan as one folder that transformers opens.

The folder opens in three ways: with `fhopt.load(FOLDER)`; with `AutoModelForCausalLM.from_pretrained(FOLDER)` after
`import fhopt`, with a latent cache; and with `from_pretrained` without fhopt, as the exact original. Because of the
last, no basis is folded into a projection: the weights must give the original keys, which attention sinks and recent
window also store. Folding would save nothing, since quantizing a token takes two small matmuls, once.

Weights of a Hugging Face folder are copied byte for byte. Any other model is saved in shards of safetensors.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import token_costs
from fhopt.evaluation.statistics import Comparison
from fhopt.export.model_card import LICENSES, model_card
from fhopt.files import appearing_folder
from fhopt.hf.apply import apply, unapply
from fhopt.models import rewritten_folder
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.model_facts import check_length
from fhopt.models.rewritten_folder import CONFIG, INDEX, MANIFEST, METHOD, PLAN, VERSION
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.plan_files import PLAN_FILES
from fhopt.progress import Progress, silent
from fhopt.texts import tokens
from fhopt.version import __version__

SHARD_SIZE = "5GB"
_COPIED = (".json", ".jinja", ".model", ".spm", ".tiktoken", ".txt")  # tokenizers, vocabularies, settings
_NOT_COPIED = (MANIFEST, CONFIG, INDEX, *rewritten_folder.FORBIDDEN)


@dataclass(frozen=True)
class Rewritten:
    """A written folder: bytes of the weights, of the plan's files, and of everything."""

    path: Path
    weight_bytes: int
    plan_bytes: int
    total_bytes: int
    copied: bool  # whether the weight files are copies of the original's
    losses: Mapping[str, Comparison] = field(default_factory=dict)


def rewrite_folder(
    loaded: LoadedModel, plan: LatentPlan, out: Path | str, source: Path | None = None, shard_size: str = SHARD_SIZE,
    losses: Mapping[str, Comparison] | None = None,
) -> Rewritten:  # fmt: skip
    """Write `loaded` and its plan to the folder `out`, atomically.

    source: the Hugging Face folder of `loaded`, whose files are copied. losses: measured losses by text, for the model
    card. Replaces an older rewritten folder at `out`. Raises FhoptError if the plan does not fit the model, the model
    cannot be written, or `out` contains anything else.
    """
    out = Path(out)
    model = check_rewritable(loaded, plan, out, source)
    with appearing_folder(out) as staging:
        copied = source is not None and stored_dtype(source) == next(model.parameters()).dtype
        if source is not None:
            _copy_settings(source, staging)
        (_copy_weights(source, staging) if copied and source else _save_weights(model, staging, shard_size))
        if loaded.tokenizer is not None and source is None:
            loaded.tokenizer.save_pretrained(staging)
        _write_config(model, source if copied else None, staging)
        plan.save(staging / PLAN)
        _write_manifest(model, plan, staging)
        (staging / "README.md").write_text(model_card(loaded, plan, losses or {}, source), encoding="utf-8")
        for file in staging.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # readable by all users
        return _sizes(staging, out, copied, losses or {})


def stored_dtype(source: Path) -> torch.dtype | None:
    """Return the dtype in which transformers opens a Hugging Face folder: of its configuration, else of its weights.

    None if it has no safetensors files. Raises FhoptError if the first of them cannot be loaded.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(source.glob("*.safetensors"))
    if not files or not (source / CONFIG).is_file():
        return None
    config = rewritten_folder.read_json(source, CONFIG)
    name = config.get("dtype") or config.get("torch_dtype")
    if isinstance(name, str):
        return _dtype(name.removeprefix("torch."))
    try:
        with safe_open(files[0], "pt") as opened:
            dtypes = [opened.get_tensor(name).dtype for name in opened.keys()]  # noqa: SIM118
    except SafetensorError as error:
        raise FhoptError(f"{files[0]} is not a safetensors file ({error}). Copy the model again.") from error
    return next((dtype for dtype in dtypes if dtype.is_floating_point), None)


def _dtype(name: str) -> torch.dtype | None:
    dtype = getattr(torch, name, None)
    return dtype if isinstance(dtype, torch.dtype) else None


def check_rewritable(loaded: LoadedModel, plan: LatentPlan, out: Path, source: Path | None = None) -> Any:
    """Return the model. Raises FhoptError unless it can be written to `out` with this plan."""
    model: Any = loaded.module
    if not hasattr(model, "save_pretrained") or not getattr(model, "can_generate", lambda: False)():
        raise FhoptError(
            f"{loaded.name} is not a generative transformers model; expected one. Export other modules with "
            "--format pt2."
        )
    quantized = getattr(model.config, "quantization_config", None)
    if quantized is not None:
        raise FhoptError(
            f"{loaded.name} is quantized ({getattr(quantized, 'quant_method', 'unknown')}), and a "
            "configuration can name only one quantizer. Use fhopt.apply(model, plan), or rewrite the "
            "unquantized model."
        )
    if model.is_remote_code():
        raise FhoptError(
            f"{loaded.name} has custom code; expected a model that is part of transformers. Use "
            "fhopt.apply(model, plan)."
        )
    if source is not None and source.resolve() == out.resolve():
        raise FhoptError(f"{out} is the folder of the model. Write to another folder.")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not rewritten_folder.is_rewritten(out))):
        raise FhoptError(
            f"{out} exists and is not a rewritten folder; expected a new folder or a rewritten one. Choose "
            "another folder."
        )
    unapply(apply(model, plan))
    return model


def losses(
    loaded: LoadedModel, plan: LatentPlan, texts: Sequence[str], sequences: int, context: int,
    progress: Progress = silent,
) -> dict[str, Comparison]:  # fmt: skip
    """Measure the loss of the plan on the held-out half of each text; {} for a model without a tokenizer.

    Raises FhoptError if a text is too short or the context too long.
    """
    if loaded.tokenizer is None or not texts:
        return {}
    model, comparisons = loaded.language_model(), {}
    check_length(model, context - 1)
    for number, text in enumerate(texts):
        held_out = tokens.halves(tokens.read_text(text))[1]
        what = f"the second half of {text!r}"
        ids = tokens.sequences(loaded.tokenizer, held_out, count=sequences, length=context, what=what)
        comparisons[text] = token_costs(model, ids, plan).compare()
        progress("loss", number + 1, len(texts))
    return comparisons


# --------------------------------------------------------------------------------------------------- files


def _copy_settings(source: Path, staging: Path) -> None:
    """Copy tokenizer, generation settings and licenses: text files, no code."""
    for file in source.iterdir():
        is_settings = file.suffix in _COPIED and file.name not in _NOT_COPIED and not file.name.endswith(".index.json")
        if file.is_file() and (is_settings or file.name.upper().startswith(LICENSES)):
            shutil.copyfile(file, staging / file.name)


def _copy_weights(source: Path, staging: Path) -> None:
    """Copy the weight files that transformers loads: one, or those that an index names."""
    names = {rewritten_folder.ONE_FILE}
    if not (source / rewritten_folder.ONE_FILE).is_file():
        listed = rewritten_folder.read_json(source, INDEX).get("weight_map")
        names = {Path(str(name)).name for name in listed.values()} if isinstance(listed, dict) else set()
        shutil.copyfile(source / INDEX, staging / INDEX)
    for name in sorted(names):
        shutil.copyfile(source / name, staging / name)


def _save_weights(model: Any, staging: Path, shard_size: str) -> None:
    try:
        model.save_pretrained(staging, max_shard_size=shard_size)
    except (ValueError, RuntimeError) as error:
        raise FhoptError(
            f"{type(model).__name__} could not be saved ({str(error).splitlines()[0]}). Pass the model's "
            "original folder."
        ) from error


def _write_config(model: Any, source: Path | None, staging: Path) -> None:
    """Write the original's configuration with the quantization method that opens it."""
    config = rewritten_folder.read_json(source or staging, CONFIG)
    config["quantization_config"] = {"quant_method": METHOD, "version": VERSION}
    config.setdefault("architectures", [type(model).__name__])
    for name in ("auto_map", "_name_or_path"):
        config.pop(name, None)
    (staging / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_manifest(model: torch.nn.Module, plan: LatentPlan, staging: Path) -> None:
    weights = [file.name for file in staging.glob("*.safetensors")]
    index = [INDEX] if (staging / INDEX).exists() else []
    names = [CONFIG, *index, *weights, *(f"{PLAN}/{name}" for name in PLAN_FILES)]
    manifest = {
        "version": VERSION,
        "fhopt": __version__,
        "plan": plan.digest(),
        "weights": rewritten_folder.weights_print(model),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "files": rewritten_folder.describe_files(staging, names),
    }
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _sizes(staging: Path, out: Path, copied: bool, losses: Mapping[str, Comparison]) -> Rewritten:
    def size(pattern: str) -> int:
        return sum(file.stat().st_size for file in staging.glob(pattern) if file.is_file())

    return Rewritten(out, size("*.safetensors"), size(f"{PLAN}/*"), size("**/*"), copied, losses)
