"""Every kind of file that fhopt writes, written once in a folder."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from command_models import save_tiny_model
from hand_plans import random_plan
from lm_heads import made, weights
from small_models import FittedModel, token_ids

import fhopt
from fhopt.calibration.checkpoint import MOMENTS, Checkpoint
from fhopt.export import rewrite_folder
from fhopt.hf.apply import latent_cache
from fhopt.lm_head.head import Head
from fhopt.models.loader import load_model
from fhopt.models.rewritten_folder import PLAN
from fhopt.plan.latent_plan import LatentPlan


@dataclass(frozen=True)
class Write:
    """A write to `place`. number: 0 for the existing version, 1 for the new one."""

    place: Path
    write: Callable[[int], Any]
    read: Callable[[], int | None]  # returns the number of the stored version; raises if it is neither


def plan_write(folder: Path, _: FittedModel) -> Write:
    plans = [random_plan("head", sinks=n) for n in range(2)]
    place = folder / "plan"

    def read() -> int | None:
        return LatentPlan.load(place).sinks if place.exists() else None

    return Write(place, lambda n: plans[n].save(place), read)


def head_write(folder: Path, _: FittedModel) -> Write:
    weight = weights("random", 40, 8)
    heads = [made(weight, bits="8", iterations=n + 1) for n in range(2)]
    heads = [replace(head, about={"number": n}) for n, head in enumerate(heads)]
    place = folder / "head"

    def read() -> int | None:
        return int(Head.load(place).about["number"]) if place.exists() else None

    return Write(place, lambda n: heads[n].save(place), read)


def cache_write(folder: Path, llama: FittedModel) -> Write:
    applied = fhopt.apply(copy.deepcopy(llama.model), llama.plan(4))
    caches = []
    for tokens in (40, 60):
        caches.append(latent_cache(applied))
        with torch.no_grad():
            applied(token_ids(1, tokens), past_key_values=caches[-1])
    place = folder / "prefix.safetensors"

    def read() -> int | None:
        if not place.exists():
            return None
        return {40: 0, 60: 1}[fhopt.load_cache(applied, place).get_seq_length()]

    return Write(place, lambda n: fhopt.save_cache(applied, caches[n], place), read)


def rewritten_write(folder: Path, llama: FittedModel) -> Write:
    source = folder.parent / f"{folder.name}-source"
    save_tiny_model(source)
    loaded = load_model(str(source))
    place = folder / "model"

    def write(number: int) -> None:
        rewrite_folder.rewrite_folder(loaded, llama.plan(4, sinks=number), place, source if number else None)

    def read() -> int | None:
        if not place.exists():
            return None
        assert load_model(str(place)).module is not None
        return LatentPlan.load(place / PLAN).sinks

    return Write(place, write, read)


def checkpoint_write(folder: Path, _: FittedModel) -> Write:
    place = folder / "state.moments"
    checkpoint = Checkpoint(folder / "state", {"model": "x"}, MOMENTS)

    def read() -> int | None:
        return checkpoint.restore({"sum": torch.zeros(50, 50)}) if place.exists() else None

    return Write(place, lambda n: checkpoint.save({"sum": torch.full((50, 50), float(n))}, n), read)


WRITES = {
    "plan": plan_write,
    "head": head_write,
    "cache": cache_write,
    "rewritten model": rewritten_write,
    "checkpoint": checkpoint_write,
}
