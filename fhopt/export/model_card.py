"""Model card of a rewritten folder: how to open it, its loss, its bytes, its provenance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fhopt.evaluation.statistics import Comparison
from fhopt.models.cache_layers import measured_layers
from fhopt.models.loaded_model import LoadedModel
from fhopt.plan.cache_size import CacheLayer, cache_size, compressed_sites
from fhopt.plan.expected_loss import calibration_warning, expected_loss
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.quality_card import MeasuredText
from fhopt.plan.quality_card import quality_card as card_of
from fhopt.version import __version__

COUNTED_AT = (1024, 8192, 32768)  # tokens
LICENSES = ("LICENSE", "LICENCE", "NOTICE")  # prefixes of the names of license files
_OPENING = """
# {name}, latent cache {ratio:.2f}x

{name} with a plan of fhopt: keys and values are cached as latents. The weights are the original's.

```python
import fhopt
from transformers import AutoTokenizer

model = fhopt.load("FOLDER")  # checked, latent
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
```

After `import fhopt`, `transformers.{auto}.from_pretrained("FOLDER")` opens the same. Without fhopt it
opens the exact original, with a warning that the method `fhopt` is unknown.

`vllm serve FOLDER` serves it with latents where fhopt is installed beside vLLM (`pip install 'fhopt[vllm]'`).
Without fhopt, vLLM refuses it and names the unknown method `fhopt`.
"""


def model_card(loaded: LoadedModel, plan: LatentPlan, losses: Mapping[str, Comparison], source: Path | None) -> str:
    """Return the text of README.md."""
    network: Any = loaded.module
    auto = "AutoModelForSeq2SeqLM" if network.config.is_encoder_decoder else "AutoModelForCausalLM"
    layers = measured_layers(network)
    parts = [
        _metadata(loaded, source),
        _OPENING.format(name=loaded.name, ratio=cache_size(plan, layers=layers).compressed_ratio, auto=auto),
        _loss(plan, losses),
        _bytes(plan, layers),
        _provenance(plan, network),
    ]
    return "\n".join(part.strip() + "\n" for part in parts)


def _metadata(loaded: LoadedModel, source: Path | None) -> str:
    """Return the YAML metadata for hubs, with license and languages of the original card if there is one."""
    from huggingface_hub import ModelCard, ModelCardData

    licence: dict[str, Any] = {}
    if source is not None and (source / "README.md").is_file():
        try:
            known = ModelCard.load(source / "README.md").data.to_dict()
        except Exception:  # a card is free text, and its metadata may be malformed
            known = {}
        licence = {k: known[k] for k in ("license", "license_name", "license_link", "language") if known.get(k)}
    task = "text-generation"
    data = ModelCardData(library_name="transformers", tags=["fhopt", "kv-cache"], pipeline_tag=task, **licence)
    return f"---\n{data.to_yaml()}\n---\n"


def _loss(plan: LatentPlan, losses: Mapping[str, Comparison]) -> str:
    rows = [_loss_row(name, comparison) for name, comparison in losses.items()]
    gate = plan.provenance.get("gate")
    if isinstance(gate, dict) and isinstance(gate.get("texts"), list):
        rows.append(_loss_row(f"{', '.join(map(str, gate['texts']))} (when it was fitted)", _comparison(gate)))
    known = card_of(plan)
    rows += [_measured_row(text) for text in known.texts if text.name not in losses]
    if not rows and not known.tasks:
        return "## What it loses\n\nNot measured. `fhopt eval FOLDER --plan FOLDER/plan` does.\n"
    tasks = "".join(
        f"| {task.name} | {task.items:,} | {task.exact:.1f}% | {task.plan:.1f}% |\n" for task in known.tasks
    )
    if tasks:
        tasks = f"\n| task | items | correct, full precision | correct, with the plan |\n|---|---|---|---|\n{tasks}"
    head = (
        "| text | tokens | perplexity, full precision | with the plan | change (95% CI) | KL, nats/token "
        "|\n|---|---|---|---|---|---|"
    )
    return f"## What it loses\n\nThrough the real cache, on the half of each text that is held out.\n\n{head}\n" + (
        "\n".join(rows) + "\n" + tasks
    )


def _comparison(gate: Mapping[str, Any]) -> Comparison:
    return Comparison(**{name: gate.get(name) for name in Comparison.__dataclass_fields__})  # type: ignore[arg-type]


def _measured_row(text: MeasuredText) -> str:
    interval = text.increase_percent_ci
    return _loss_row(
        text.name,
        Comparison(text.exact, text.plan, text.increase_percent, interval, text.kl, None, text.tokens),
    )


def _loss_row(text: str, loss: Comparison) -> str:
    interval = loss.increase_percent_ci
    between = f" ({interval[0]:+.2f} to {interval[1]:+.2f})" if interval else ""
    return (
        f"| {text} | {loss.tokens:,} | {loss.exact:.4f} | {loss.plan:.4f} | "
        f"{loss.increase_percent:+.2f}%{between} | {loss.kl:.4f} |"
    )


def _bytes(plan: LatentPlan, layers: Sequence[CacheLayer]) -> str:
    compressed = compressed_sites(plan, layers)
    layouts = Counter(site.layout for site in compressed)
    stays_exact = cache_size(plan, COUNTED_AT[0], layers).exact_layers
    kept = f" {stays_exact} layers stay in full precision." if stays_exact else ""
    more = (" whole model, full precision | ratio |", "---|---|") if stays_exact else ("", "")
    kinds = ", ".join(f"{count} `{layout}`" for layout, count in layouts.most_common())
    lines = [
        "## What it holds\n",
        f"{len(compressed)} attentions: {kinds}.{kept} The first {plan.sinks} tokens are stored in full "
        f"precision, the newest {plan.recent} to {plan.window.capacity} in {plan.window_bits} bits. Ratios "
        "count everything, versus a 16-bit KV cache:\n",
        "| tokens | full-precision bytes per token | bytes per token with the plan | ratio "
        f"|{more[0]}\n|---|---|---|---|{more[1]}",
    ]
    for tokens in COUNTED_AT:
        size = cache_size(plan, tokens, layers)
        exact, held = size.compressed_exact_bytes / tokens, size.compressed_bytes / tokens
        row = f"| {tokens:,} | {exact:,.0f} | {held:,.0f} | {size.compressed_ratio:.2f}x |"
        lines.append(row + (f" {size.exact_bytes / 1e6:,.1f} MB | {size.ratio:.2f}x |" if stays_exact else ""))
    return "\n".join(lines) + "\n"


def _provenance(plan: LatentPlan, network: Any) -> str:
    known, expected = plan.provenance, expected_loss(plan)
    rows = {
        "model": known.get("model", type(network).__name__),
        "fingerprint of its projections": known.get("fingerprint", "not taken"),
        "digest of the plan": plan.digest(),
        "calibrated on": f"{', '.join(map(str, known.get('texts', [])))} ({known.get('tokens', 0):,} tokens)",
        "hash of these tokens": known.get("text_sha256", "none"),
        "expected loss": expected.words if expected else "unknown",
        "fitted with": ", ".join(f"{k} {v}" for k, v in sorted(known.get("versions", {}).items())),
        "written with": f"fhopt {__version__}",
    }
    if warning := calibration_warning(plan):
        rows["warning"] = warning
    if "healing" in known:
        rows["healed on"] = f"{known['healing'].get('tokens', 0):,} tokens"
    return "## Where it comes from\n\n| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows.items()) + "\n"
