"""The zoo: every site is found or explained, and neither outputs nor gradients change. `make zoo` runs all of it.

Here every spelling, look-alike, handwritten model and torch module runs, and each transformers model in one of its
implementations and steps: a tenth of them in `make test`, the others in `make test-slow`. The other steps, and all
exported graphs, run in `make zoo`.
"""

from __future__ import annotations

import pytest
from model_zoo import Entry
from model_zoo.checking import check, entries
from needs import sampled

ZOO = entries()
EXPORTED = ["llama", "gpt2", "bloom", "falcon", "t5"]
SAME_NAMES = ["llama", "gpt2", "gemma3"]


def _chosen() -> list[Entry]:
    """Return all small entries, and one of each transformers model, alternating implementations and steps."""
    names = dict.fromkeys(e.name for e in ZOO if e.family == "huggingface")
    models = [[e for e in ZOO if e.name == name and not e.slow] for name in names]
    taken = [each[i % len(each)] for i, each in enumerate(models) if each]
    return [e for e in ZOO if e.family != "huggingface"] + taken


@pytest.mark.parametrize("entry", sampled(_chosen(), 10), ids=lambda e: e.label)
def test_every_site_is_found_or_explained_and_no_value_changes(entry: Entry) -> None:
    result = check(entry)
    assert result.ok, "\n".join([*result.failures, *(f"{m.reason} ({m.source})" for m in result.missed)])


@pytest.mark.parametrize("name", sampled(EXPORTED, 2))
def test_the_same_passes_run_on_exported_graphs(name: str) -> None:
    entry = next(e for e in ZOO if e.name == name and e.step in {"forward", "prefill"})
    result = check(entry, exported=True)
    assert result.ok, "\n".join([*result.failures, *(f"{m.reason} ({m.source})" for m in result.missed)])


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME_NAMES)
def test_prefill_decode_and_export_agree_on_the_names_of_sites(name: str) -> None:
    steps = {e.step: e for e in ZOO if e.name == name and not e.slow}
    results = [check(e) for e in steps.values()] + [check(steps["prefill"], exported=True)]
    found = {tuple(s.name for s in r.sites) for r in results}
    assert len(steps) > 1 and len(found) == 1 and found != {()}


def test_the_zoo_has_the_documented_families() -> None:
    names = {e.name for e in ZOO}
    promised = (
        "llama qwen2 qwen3 gemma2 gemma3 mistral mixtral phi3 gpt2 gpt_neox gptj opt bloom falcon mpt stablelm cohere "
        "olmo2 gpt_oss deepseek_v3 t5 bart whisper bert distilbert roberta deberta_v2 vit swin detr wav2vec2"
    )
    assert set(promised.split()) <= names
    assert sum(e.family == "spelling" for e in ZOO) >= 40 and sum(e.family == "look-alike" for e in ZOO) >= 15
