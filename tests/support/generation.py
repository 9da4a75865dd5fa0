"""All generation modes of transformers, for tests of caches."""

from __future__ import annotations

from typing import Any

import torch
from model_zoo import has_transformers
from small_models import tiny_llama
from torch import Tensor

from fhopt.models.model_facts import cache_argument


def contrastive_search(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
) -> Any:
    """Su et al. 2022: pick the likely token least similar to the context; repeats and selects sequences."""
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    name = cache_argument(model)
    top, alpha, cache, batch = 4, 0.6, kwargs[name], input_ids.shape[0]
    out = model(input_ids, output_hidden_states=True, **{name: cache})
    scores, past, rows = [], out.hidden_states[-1], out.logits[:, -1]
    while True:
        scores.append(rows)
        likely, tokens = rows.softmax(-1).topk(top, -1)
        cache.batch_repeat_interleave(top)
        out = model(tokens.reshape(-1, 1), output_hidden_states=True, **{name: cache})
        states = out.hidden_states[-1]  # [B*top, 1, d]
        before = past.repeat_interleave(top, 0)
        likeness = torch.cosine_similarity(before, states, dim=-1).amax(-1).view(batch, top)
        best = ((1 - alpha) * likely - alpha * likeness).argmax(-1)  # [B]
        chosen = best + torch.arange(batch) * top
        cache.batch_select_indices(chosen)
        past, rows = torch.cat([past, states[chosen]], 1), out.logits[chosen, -1]
        input_ids = torch.cat([input_ids, tokens.gather(1, best[:, None])], 1)
        if stopping_criteria(input_ids, None).all():
            return GenerateDecoderOnlyOutput(sequences=input_ids, logits=tuple(scores), **{name: cache})


def group_beam_search(
    model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **kwargs: Any
) -> Any:
    """Vijayakumar et al. 2016: two groups of two beams; the second avoids the first's tokens. Reorders beams."""
    from transformers.generation.utils import GenerateDecoderOnlyOutput

    name = cache_argument(model)
    groups, beams, cache, batch = 2, 2, kwargs[name], input_ids.shape[0]
    width = groups * beams
    ids = input_ids.repeat_interleave(width, 0)
    totals = torch.tensor([0.0, -1e9]).repeat(batch * groups)
    rows, scores = model(ids, **{name: cache}).logits[:, -1], []
    while True:
        scores.append(rows)
        steps = rows.log_softmax(-1) + totals[:, None]  # [B*width, vocabulary]
        vocabulary = steps.shape[-1]
        order, tokens = torch.empty(len(ids), dtype=torch.long), torch.empty(len(ids), 1, dtype=torch.long)
        for b in range(batch):
            used: list[int] = []
            for g in range(groups):
                first = b * width + g * beams
                candidates = steps[first : first + beams].clone()
                candidates[:, used] -= 0.5
                best, index = candidates.flatten().topk(beams)
                group = slice(first, first + beams)
                order[group], tokens[group, 0] = first + index // vocabulary, index % vocabulary
                totals[group] = best
                used += (index % vocabulary).tolist()
        ids = torch.cat([ids[order], tokens], 1)
        if stopping_criteria(ids, None).all():
            return GenerateDecoderOnlyOutput(sequences=ids, logits=tuple(scores), **{name: cache})
        cache.reorder_cache(order)
        rows = model(tokens, **{name: cache}).logits[:, -1]


def _assistant() -> Any:
    model = tiny_llama(num_hidden_layers=1)
    model.generation_config.num_assistant_tokens = 5
    return model


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 1.5},
    "beam search": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "num_return_sequences": 2},
    "group beam search": {"custom_generate": group_beam_search},
    "contrastive search": {"custom_generate": contrastive_search},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 3},
    "assisted": {"do_sample": False, "assistant_model": _assistant},
    "assisted sampling": {"do_sample": True, "assistant_model": _assistant},
    "chunked prefill": {"do_sample": False, "prefill_chunk_size": 13},
    "static": {"do_sample": False, "cache_implementation": "static"},
    "static beam search": {"do_sample": False, "cache_implementation": "static", "num_beams": 3},
    "static chunked prefill": {"do_sample": False, "cache_implementation": "static", "prefill_chunk_size": 13},
    "static assisted": {"do_sample": False, "cache_implementation": "static", "assistant_model": _assistant},
}
if not has_transformers(5, 24):  # older versions refuse it
    del MODES["static assisted"]
ONE_SEQUENCE = (
    "prompt lookup",
    "assisted",
    "assisted sampling",
    "chunked prefill",
    "static chunked prefill",
    "static assisted",
)


def batch_of(mode: str) -> int:
    """Batch size of the mode in these tests."""
    return 1 if mode.removeprefix("static ") in ONE_SEQUENCE else 2


def generate(model: Any, mode: dict[str, Any], ids: Tensor, **extra: Any) -> Any:
    """Generate 24 tokens by a mode, with further options; return tokens, logits and cache."""
    torch.manual_seed(3)
    options: dict[str, Any] = dict(
        max_new_tokens=24, min_new_tokens=24, return_dict_in_generate=True, output_logits=True, pad_token_id=0
    )
    options |= mode | extra
    if callable(options.get("assistant_model")):
        options["assistant_model"] = options["assistant_model"]()
        torch.manual_seed(3)
    return model.generate(ids, **options)


def cache_of(output: Any) -> Any:
    """The cache in the output of `generate`, under either of its names."""
    return output["cache"] if "cache" in output else output["past_key_values"]
