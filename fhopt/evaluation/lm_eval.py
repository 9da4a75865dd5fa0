"""lm-eval harness model `fhopt`, which processes all tokens in steps through a latent KV cache.

    python -m fhopt.evaluation.lm_eval --model fhopt --model_args pretrained=demo,plan=PLAN --tasks TASK

takes the options of `lm_eval`. `pretrained` is a MODEL of fhopt's commands; without `plan` a full-precision KV cache is
used in the same steps. From Python:

    lm_eval.simple_evaluate(harness_model()(pretrained="demo", plan="PLAN"), tasks=[...])

lm-eval itself would prefill a context in one call, in which tokens attend to each other in full precision: every plan
would seem lossless. All tokens are therefore processed in the steps of `fhopt.evaluation.perplexity`, as token-by-token
decoding would.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import new_cache, read_steps
from fhopt.hf.apply import apply
from fhopt.models.loader import load_model
from fhopt.models.model_facts import cache_argument
from fhopt.plan.latent_plan import PlanOrPath, as_plan


@cache
def harness_model() -> Any:
    """Register the model class with lm-eval as `fhopt`, and return it. Raises FhoptError without lm-eval."""
    try:
        from lm_eval.api.registry import register_model
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise FhoptError(
            "lm-eval is not installed; the harness requires the extra evaluation. Install it with: pip "
            "install 'fhopt[evaluation]'"
        ) from error

    class LatentLM(HFLM):  # type: ignore[misc]
        """Causal language model with a latent KV cache; further options are those of lm-eval's HFLM."""

        def __init__(self, pretrained: Any, plan: PlanOrPath | None = None, **options: Any) -> None:
            if isinstance(pretrained, str):
                loaded = load_model(pretrained, _dtype(options.pop("dtype", "float32")))
                pretrained = loaded.language_model().to(options.get("device") or "cpu")
                options = {"tokenizer": loaded.tokenizer} | options
            super().__init__(pretrained=pretrained, **(options | {"backend": "causal"}))
            self.latent_plan = None if plan is None else as_plan(plan)
            if self.latent_plan is not None:
                apply(self.model, self.latent_plan)

        def _model_call(self, inps: Tensor, attn_mask: None = None, labels: None = None) -> Tensor:
            """Return logits [B, S, V] of token ids [B, S], padded at their ends."""
            with torch.no_grad():
                steps = self._steps(inps, new_cache(self.model, self.latent_plan))
                return torch.cat([logits for _, (logits,) in steps], 1)

        def _model_generate(
            self, context: Tensor, max_length: int, stop: list[str], attention_mask: Tensor | None = None, **kwargs: Any
        ) -> Tensor:
            """Generate [B, S + new] from token ids [B, S], row by row: left padding would shift the steps."""
            rows = []
            for index, row in enumerate(context):
                padding = 0 if attention_mask is None else int((attention_mask[index] == 0).sum())
                alone, held = row[None, padding:], new_cache(self.model, self.latent_plan)
                with torch.no_grad():
                    for _ in self._steps(alone[:, :-1], held, first=alone.shape[1] - 2):
                        pass
                caches = {cache_argument(self.model): held}
                out = super()._model_generate(alone, max_length - padding, stop, **caches, **kwargs)
                rows.append(torch.cat([row[:padding], out[0]]))
            value = self.tokenizer.pad_token_id or 0
            return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

        def _steps(self, ids: Tensor, held: Any, first: int = 0) -> Iterator[tuple[int, list[Tensor]]]:
            """Process token ids [B, S] in steps from an empty cache; no steps if there are no tokens."""
            return read_steps(self.model, ids, [held], self.latent_plan, first) if ids.numel() else iter(())

    return register_model("fhopt")(LatentLM)


def _dtype(name: str | torch.dtype) -> torch.dtype:
    """Resolve lm-eval's option `dtype`; `auto` is float32, the dtype for measuring plans. Raises FhoptError."""
    dtype = torch.float32 if name == "auto" else getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise FhoptError(f"dtype {name!r} is unknown; expected float32, bfloat16, float16 or auto. Set one of them.")
    return dtype


def run_lm_eval() -> None:
    """Run lm-eval's own command line, with the model `fhopt` registered."""
    try:
        harness_model()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except FhoptError as error:
        print(f"fhopt: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    run_lm_eval()
