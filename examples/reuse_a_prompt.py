"""Read a long prompt once, save its latents to a file, and ask about it later.

python examples/reuse_a_prompt.py
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

import fhopt
from fhopt.hf.apply import latent_cache
from fhopt.models.loader import load_model
from fhopt.models.model_facts import cache_argument


def main() -> None:
    loaded = load_model("demo")
    plan = fhopt.fit(loaded.module, loaded.tokenizer, ratio=4, sequences=4, rate_sequences=4)
    model, tokenizer = loaded.language_model(), loaded.tokenizer
    fhopt.apply(model, plan)
    prompt = "The with statement wraps a block in methods of a context manager. " * 100
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        start, cache = time.perf_counter(), latent_cache(model)
        with torch.no_grad():
            model(ids, **{cache_argument(model): cache})
        read = time.perf_counter() - start
        file = fhopt.save_cache(model, cache, Path(folder) / "prompt.safetensors")
        start = time.perf_counter()
        again = fhopt.load_cache(model, file)
        loading, size = time.perf_counter() - start, file.stat().st_size
    print(f"{ids.shape[1]} tokens: read in {read:.1f} s, loaded in {loading:.2f} s from {size / 1e6:.1f} MB")
    question = tokenizer("It is used to", return_tensors="pt")["input_ids"]
    whole = torch.cat([ids, question], 1)
    output = model.generate(whole, **{cache_argument(model): again}, max_new_tokens=24, do_sample=False)  # type: ignore[operator]
    print(tokenizer.decode(output[0, ids.shape[1] :]))


if __name__ == "__main__":
    main()
