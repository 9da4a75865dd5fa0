"""Write the files of this folder with the commands of commit 0504013, and the tokens that it generates with them.

README.md says how. Tokens are computed in float64 on torch operations: sums in another order then round no latent to
another code, so that other machines compute the same tokens and logits. All names are those of that commit.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from small_models import VOCABULARY, tiny_llama
from text_models import save_text_model
from torch import Tensor

import fhopt
from fhopt.cli.app import main
from fhopt.export.pt2_step import read_description
from fhopt.export.step_attention import StateTensor
from fhopt.export.step_state import State

PROMPT, NEW = 700, 24  # tokens: pages are selected from 512 quantized tokens on
STEP_PROMPT = 160  # an exported step takes one token at a time; one block of 64 is quantized
SAMPLE = ["--sequences", "8", "--rate-sequences", "2", "--context", "512", "--recent", "64", "--tokens", "4096"]


def call(*arguments: Any) -> None:
    """Run a command of fhopt."""
    print("fhopt", *arguments, flush=True)
    main([str(argument) for argument in arguments], standalone_mode=False)


def write_files(out: Path, scratch: Path) -> None:
    """Write statistics, plans, a rewritten folder and an exported decode step."""
    model = tiny_llama(
        hidden_size=32, intermediate_size=48, head_dim=16, max_position_embeddings=4096, initializer_range=0.3
    )
    save_text_model(scratch / "model", template=None, model=model)
    save_text_model(scratch / "double", template=None, model=model.double())
    call("calibrate", scratch / "model", *SAMPLE, "-o", out / "statistics")
    fit = ("fit", "--statistics", out / "statistics")
    call(*fit, "--ratio", "4", "--device", "cpu", "-o", scratch / "plan")
    call("rewrite", scratch / "model", "--plan", scratch / "plan", "--no-measure", "-o", out / "folder")
    call(*fit, "--ratio", "8", "--code", "trellis", "-o", out / "trellis")
    call(*fit, "--ratio", "1", "-o", out / "exact")
    call("fit", scratch / "model", *SAMPLE, "--pages", "1/4", "-o", out / "pages")
    call("fit", scratch / "model", *SAMPLE, "--mean-tokens", "0", "--segment", "0", "-o", scratch / "step")
    call("rewrite", scratch / "double", "--plan", scratch / "step", "--format", "pt2", "--no-aot", "-o", out / "step")
    for path in (out / "step").glob("*.pt2"):
        path.with_suffix(".pt2.gz").write_bytes(gzip.compress(path.read_bytes(), mtime=0))
        path.unlink()


def model_step(model: Any) -> Callable[[Tensor], Tensor]:
    """Return a function that adds tokens [1, S] to a new cache and computes their logits [1, S, V]."""
    cache = fhopt.latent_cache(model)
    return lambda ids: model(ids, past_key_values=cache).logits


def load_program(path: Path) -> Any:
    """Load a compressed program."""
    return torch.export.load(io.BytesIO(gzip.decompress(path.read_bytes()))).module()


def exported_step(folder: Path) -> Callable[[Tensor], Tensor]:
    """Return the exported step, as a function like that of `model_step` that takes one token at a time."""
    described = read_description(folder)["state"]
    tensors = [StateTensor(t["name"], tuple(t["shape"]), getattr(torch, t["dtype"])) for t in described]
    programs = [load_program(folder / f"{name}.pt2.gz") for name in ("step", "seal")]
    state = State(fhopt.LatentPlan.load(folder / "plan"), tensors, *programs)
    return lambda ids: torch.cat([state.step(one) for one in ids.split(1, 1)], 1)


@torch.no_grad()
def decode(step: Callable[[Tensor], Tensor], prompt: Tensor) -> Tensor:
    """Compute the logits [NEW, V] of greedily chosen tokens after a prompt [1, S]."""
    logits = [step(prompt)[0, -1]]
    while len(logits) < NEW:
        logits.append(step(logits[-1].argmax().view(1, 1))[0, -1])
    return torch.stack(logits)


def write_tokens(out: Path) -> None:
    """Write the prompt, the tokens of each file, and their logits."""
    torch.manual_seed(3)
    prompt, logits = torch.randint(1, VOCABULARY, (1, PROMPT)), {}
    model: Any = fhopt.load(out / "folder", dtype=torch.float64)
    logits["folder"] = decode(model_step(model), prompt)
    for name in ("trellis", "exact", "pages"):
        fhopt.apply(fhopt.unapply(model), fhopt.LatentPlan.load(out / name))
        logits[name] = decode(model_step(model), prompt)
    logits["step"] = decode(exported_step(out / "step"), prompt[:, :STEP_PROMPT])
    save_file({name: x.float() for name, x in logits.items()}, out / "logits.safetensors")
    tokens = {name: x.argmax(-1).tolist() for name, x in logits.items()}
    (out / "tokens.json").write_text(json.dumps({"prompt": prompt[0].tolist(), "tokens": tokens}) + "\n")


if __name__ == "__main__":
    os.environ["PATH"] = ""  # no C++ compiler
    torch.set_num_threads(1)
    written = Path(sys.argv[1]).absolute()
    written.mkdir(parents=True)
    with TemporaryDirectory() as folder:
        write_files(written, Path(folder))
    write_tokens(written)
