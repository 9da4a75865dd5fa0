"""A decoder that stores its keys and values in its own buffers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hand_plans import CODED
from torch import Tensor, nn

from fhopt.cache.static_layer import StaticLatentLayer
from fhopt.fitting import fit_plan
from fhopt.models.capture import capture
from fhopt.passes import pipeline
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import BitGroup, SidePlan, SitePlan

H, G, D, C, V, SLOTS = 4, 2, 16, 64, 50, 96
CLOSE: dict[str, Any] = dict(rtol=1e-4, atol=1e-4)  # q D . z and q . D z round differently

Write = Callable[[Tensor, Tensor, Tensor, int], Any]  # buffer, new tokens [B,G,S,D], positions [S], first position


def by_index(cache: Tensor, new: Tensor, at: Tensor, start: int) -> None:
    cache[:, :, at] = new


def by_slice(cache: Tensor, new: Tensor, at: Tensor, start: int) -> None:
    cache[:, :, start : start + new.shape[2]] = new


def by_index_copy(cache: Tensor, new: Tensor, at: Tensor, start: int) -> None:
    cache.index_copy_(2, at, new)


def by_copy(cache: Tensor, new: Tensor, at: Tensor, start: int) -> None:
    cache.narrow(2, start, new.shape[2]).copy_(new)


def by_slice_of_tokens(cache: Tensor, new: Tensor, at: Tensor, start: int) -> None:
    cache[:, start : start + new.shape[2]] = new.transpose(1, 2)


def by_index_put(cache: Tensor, new: Tensor, at: Tensor, start: int) -> None:
    cache.index_put_((at,), new.permute(2, 0, 1, 3))


BGTD, BTGD, TBGD = (0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)  # the dimension (B, G, T, D) of each buffer axis
SPELLINGS: dict[str, tuple[tuple[int, ...], Write]] = {
    "index": (BGTD, by_index),
    "slice": (BGTD, by_slice),
    "index_copy_": (BGTD, by_index_copy),
    "copy_": (BGTD, by_copy),
    "slice, [B,T,G,D]": (BTGD, by_slice_of_tokens),
    "index_put_, [T,B,G,D]": (TBGD, by_index_put),
}


class BufferedAttention(nn.Module):
    """Attends to the slots that `read` selects: "all" or "some", with a mask; "no mask" for single tokens."""

    k_cache: Tensor
    v_cache: Tensor

    def __init__(self, spelling: str, read: str, batch: int) -> None:
        super().__init__()
        self.wq, self.wo = nn.Linear(C, H * D), nn.Linear(H * D, C)
        self.wk, self.wv = nn.Linear(C, G * D), nn.Linear(C, G * D)
        self.layout, self.write = SPELLINGS[spelling]
        self.read = read
        sizes = (batch, G, SLOTS, D)
        for name in ("k_cache", "v_cache"):
            self.register_buffer(name, torch.zeros([sizes[i] for i in self.layout]))

    def kept(self, cache: Tensor, new: Tensor, at: Tensor, start: int) -> Tensor:
        """Write the new tokens and return the keys or values [B,G,T,D] to attend to."""
        self.write(cache, new, at, start)
        back = sorted(range(4), key=self.layout.__getitem__)
        cut = cache if self.read == "all" else cache.narrow(self.layout.index(2), 0, start + new.shape[2])
        return cut.permute(back)

    def forward(self, x: Tensor, at: Tensor, start: int, given: Any = None) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, -1, D).transpose(1, 2) for p in (self.wq, self.wk, self.wv))
        k_cache, v_cache = given or (self.k_cache, self.v_cache)
        keys, values = self.kept(k_cache, k, at, start), self.kept(v_cache, v, at, start)
        mask = None if self.read == "no mask" else torch.arange(keys.shape[2]) <= at[:, None]
        y = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        return self.wo(y.transpose(1, 2).reshape(b, s, H * D))


class Decoder(nn.Module):
    """A decoder with learned positions."""

    def __init__(self, spelling: str = "index", read: str = "all", batch: int = 2, layers: int = 1) -> None:
        super().__init__()
        self.words, self.places, self.out = nn.Embedding(V, C), nn.Embedding(SLOTS, C), nn.Linear(C, V)
        self.norms = nn.ModuleList([nn.LayerNorm(C) for _ in range(layers)])
        self.layers = nn.ModuleList([BufferedAttention(spelling, read, batch) for _ in range(layers)])
        self.batch = batch

    def forward(self, ids: Tensor, at: Tensor, start: int, given: Any = None) -> Tensor:
        x = self.words(ids) + self.places(at)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x), at, start, given)
        return self.out(x)


def decoder(*options: Any, **named: Any) -> Any:
    torch.manual_seed(1)
    model: Any = Decoder(*options, **named).eval()
    with torch.no_grad():
        for layer in model.layers:
            for weight in (layer.wq.weight, layer.wk.weight, layer.wv.weight):
                weight.mul_(3)
    return model


def caches(model: Any) -> list[Tensor]:
    return [b for b in model.buffers() if b.dim() == 4]


def call(model: Any, ids: Tensor, start: int, by_number: bool = False) -> Tensor:
    """Return logits of ids [B,S] at slots from `start` on.

    by_number: pass `start` to the model as a number; otherwise pass 0, so that the graph is not specialized.
    """
    at = torch.arange(start, start + ids.shape[1])
    with torch.no_grad():
        logits: Tensor = model(ids, at, start if by_number else 0)
    return logits


def words(count: int, batch: int = 2) -> Tensor:
    return torch.randint(1, V, (batch, count))


def sites_of(model: Any) -> list[Any]:
    """The attention sites of a decoder, which do not depend on how it writes its buffers."""
    return _sites_of(len(model.layers))


@functools.cache
def _sites_of(layers: int) -> list[Any]:
    with torch.no_grad(), torch.random.fork_rng():
        program = capture(decoder(layers=layers), (words(5), torch.arange(5), 0)).program
    return list(pipeline.find_attentions(program).sites.values())


def exact_plan(model: Any) -> LatentPlan:
    return fit_plan.exact_plan(sites_of(model), sinks=3, recent=8, block=8)


def coded_plan(model: Any, tiers: tuple[BitGroup, ...] = CODED, **options: Any) -> LatentPlan:
    """A plan with an orthogonal basis, half of whose channels have 8 bits and half 4."""
    basis = torch.linalg.qr(torch.randn(G, D, D, generator=torch.Generator().manual_seed(5)))[0]
    side = SidePlan(basis, basis.transpose(1, 2).contiguous(), tiers)
    sites = tuple(SitePlan(site, "head", side, side) for site in sites_of(model))
    return LatentPlan(sites, **(dict(sinks=3, recent=8, block=8) | options))


def compiled_with(model: Any, plan: LatentPlan) -> Any:
    options: dict[str, Any] = {"plan": plan}
    return torch.compile(model, backend="flashhead", options=options)


class LatentReference(nn.Module):
    """The module with static latent layers instead of its buffers, uncompiled."""

    def __init__(self, model: Any, plan: LatentPlan) -> None:
        super().__init__()
        self.model = model
        for layer, site in zip(model.layers, plan.sites, strict=True):
            layer.cache = StaticLatentLayer(plan, site, SLOTS, absorb=False)
            layer.forward = functools.partial(self.attend, layer)

    @staticmethod
    def attend(layer: Any, x: Tensor, at: Tensor, start: int, given: Any) -> Tensor:
        b, s, _ = x.shape
        q, k, v = (p(x).view(b, s, -1, D).transpose(1, 2) for p in (layer.wq, layer.wk, layer.wv))
        keys, values = layer.cache.update(k, v)
        mask = torch.arange(SLOTS) <= at[:, None]
        y = F.scaled_dot_product_attention(q, keys, values, mask, enable_gqa=True)
        result: Tensor = layer.wo(y.transpose(1, 2).reshape(b, s, H * D))
        return result

    def forward(self, *args: Any) -> Any:
        return self.model(*args)
