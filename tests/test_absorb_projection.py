"""Models that keep latents: attention reads them, expanded keys and values never exist, and the numbers stay."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from small_models import VOCABULARY, found, tiny_gpt2
from torch import Tensor, fx, nn

from fhopt import passes
from fhopt.binding import Binder
from fhopt.capture import capture
from fhopt.errors import Miss
from fhopt.passes.absorb_projection import AbsorbProjection
from fhopt.passes.graph import Evaluator, copy_program, fake, print_graph
from fhopt.passes.roles import Roles
from fhopt.spec import LatentPlan

B, H, N, P, E, R, C, T = 2, 4, 16, 8, 12, 24, 64, 33  # N + P channels of a key: from the latent, and rotated

NORMS = 1e-5  # norms and eager softmax of these models round float64 to float32; logits reach 5


class Absorbing:
    """A backend of torch.compile that absorbs and keeps what it did; the graphs run as they are, without inductor."""

    def __init__(self) -> None:
        self.outcomes: list[passes.Outcome] = []

    def __call__(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        program = copy_program(module, inputs)
        outcome = passes.absorb_projections(passes.find(program))
        self.outcomes.append(passes.lower(outcome))
        bind = Binder(program, len(inputs))
        return lambda *given: program.module(*given, *bind(given))

    @property
    def absorbed(self) -> list[str]:
        return [name for outcome in self.outcomes for name in outcome.compressed]

    @property
    def reasons(self) -> set[str]:
        return {m.reason for outcome in self.outcomes for m in outcome.missed if m.stage == "absorb_projection"}

    def expanded(self) -> list[str]:
        """Nodes with as many rows as there are keys for each of several heads."""
        nodes = [n for outcome in self.outcomes for n in outcome.program.graph.nodes if isinstance(fake(n), Tensor)]
        return [n.name for n in nodes if fake(n).dim() == 4 and fake(n).shape[1] == H and fake(n).shape[2] != 1]


# ---------------------------------------------------------------------------------------------------------- DeepSeek


def deepseek(version: str = "v3", attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    import transformers

    torch.manual_seed(1)
    options: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=C, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=H, num_key_value_heads=H, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=2, q_lora_rank=16, kv_lora_rank=R, qk_rope_head_dim=P,
        qk_nope_head_dim=N, v_head_dim=E, max_position_embeddings=128, bos_token_id=0, eos_token_id=None,
        pad_token_id=0, initializer_range=0.2, attn_implementation=attention,
    )  # fmt: skip
    name = f"Deepseek{version.upper()}"
    config = getattr(transformers, f"{name}Config")(**options)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval().to(dtype)


def filled(model: Any, kind: str, ids: Tensor, mask: Tensor | None = None) -> Any:
    """A cache of these tokens."""
    from transformers import DynamicCache, StaticCache

    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=model.config, max_cache_len=40)
    model(ids, attention_mask=mask, past_key_values=cache)
    return cache


@torch.no_grad()
def decoded(model: Any, kind: str, backend: Any, steps: int = 4, width: int = 1, padded: bool = False) -> Tensor:
    """Logits of some steps of decoding, after a prefill without the backend."""
    ids = torch.randint(1, VOCABULARY, (B, T + steps * width), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    step = torch.compile(model, backend=backend) if backend is not None else model
    cache = filled(model, kind, ids[:, :T], mask[:, :T] if padded else None)
    rows = []
    for start in range(T, ids.shape[1], width):
        stop = start + width
        given = dict(attention_mask=mask[:, :stop]) if padded else {}
        rows.append(step(ids[:, start:stop], past_key_values=cache, **given).logits)
    return torch.cat(rows, 1)


@pytest.mark.parametrize(
    ("version", "kind", "attention"),  # every two of them meet
    [("v2", "dynamic", "sdpa"), ("v2", "static", "eager"), ("v3", "dynamic", "eager"), ("v3", "static", "sdpa")],
)
def test_deepseek_decodes_on_its_latents(version: str, kind: str, attention: str) -> None:
    model, backend = deepseek(version, attention), Absorbing()
    result = decoded(model, kind, backend)
    torch.testing.assert_close(result, decoded(model, kind, None), rtol=0, atol=NORMS)
    assert set(backend.absorbed) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    assert len(backend.outcomes) <= 2  # one graph, and one for any number of tokens
    assert not backend.expanded()
    assert not any(outcome.missed for outcome in backend.outcomes)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_padding_stays_masked(kind: str) -> None:
    model, backend = deepseek(), Absorbing()
    result = decoded(model, kind, backend, padded=True)
    torch.testing.assert_close(result, decoded(model, kind, None, padded=True), rtol=0, atol=NORMS)
    assert len(backend.absorbed) >= 2 and not backend.expanded()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.15)])
def test_the_latents_keep_the_type_of_the_model(dtype: torch.dtype, tolerance: float) -> None:
    """In bfloat16 (8 bits) the absorbed queries are rounded where the keys were; logits reach 5."""
    model, backend = deepseek(dtype=dtype), Absorbing()
    result = decoded(model, "static", backend)
    torch.testing.assert_close(result, decoded(model, "static", None), rtol=0, atol=tolerance)
    assert result.dtype == dtype and len(backend.absorbed) == 2
    bound = backend.outcomes[0].program
    assert {bound.values[name].dtype for name in bound.bound} == {dtype}


def test_weights_that_change_after_compilation_count() -> None:
    model, backend = deepseek(), Absorbing()
    before = decoded(model, "static", backend)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.kv_b_proj.weight.mul_(1.5).add_(0.1)
    after = decoded(model, "static", backend)
    assert (after - before).abs().max() > 0.1
    torch.testing.assert_close(after, decoded(model, "static", None), rtol=0, atol=NORMS)


def test_another_model_of_the_same_class_brings_its_own_weights() -> None:
    def step(module: nn.Module, x: Tensor, cache: Tensor) -> Any:
        return module(x, cache)

    backend = Absorbing()
    compiled = torch.compile(step, backend=backend)
    for module in (Mla(plain).double() for _ in range(3)):
        with torch.no_grad():
            torch.testing.assert_close(compiled(module, *inputs()), module(*inputs()), rtol=0, atol=1e-10)


def test_a_prefill_is_left_alone() -> None:
    model, backend = deepseek(), Absorbing()
    ids = torch.randint(1, VOCABULARY, (B, T))
    compiled: Any = torch.compile(model, backend=backend)
    with torch.no_grad():
        result = compiled(ids, use_cache=False).logits
        torch.testing.assert_close(result, model(ids, use_cache=False).logits, rtol=0, atol=NORMS)
    assert not backend.absorbed and backend.expanded()
    assert backend.reasons == {f"does not pay: {T} queries on {T} tokens; expected fewer queries than tokens"}
    assert any(m.reason.startswith("already latent") for m in backend.outcomes[0].missed)


def test_many_queries_on_a_cache_are_left_alone() -> None:
    model, backend = deepseek(), Absorbing()
    result = decoded(model, "dynamic", backend, steps=1, width=30)
    torch.testing.assert_close(result, decoded(model, "dynamic", None, steps=1, width=30), rtol=0, atol=NORMS)
    assert not backend.absorbed and len(backend.reasons) == 1 and "expected fewer" in backend.reasons.pop()


# ------------------------------------------------------------------------------------------- latents by another hand


class Mla(nn.Module):
    """Latent and rotary part in one cache [B, T, R + P]; `expand` makes keys [B, H, T, D] and values [B, H, T, E]."""

    def __init__(self, expand: Callable[[Any, Tensor], tuple[Tensor, Tensor]], **options: Any) -> None:
        super().__init__()
        self.expand, self.options = expand, options
        self.q, self.down, self.o = nn.Linear(C, H * (N + P)), nn.Linear(C, R + P), nn.Linear(H * E, C)
        self.norm, self.head_norm = nn.RMSNorm(R), nn.RMSNorm(N)
        self.up = nn.Parameter(torch.randn(H, N + E, R) / 4)
        self.bias = nn.Parameter(torch.randn(H, N + E))
        self.sinks = nn.Parameter(torch.randn(H))
        self.seen = torch.zeros(())

    def forward(self, x: Tensor, cache: Tensor) -> Tensor:
        latent, rotary = self.down(x).split([R, P], -1)
        z = torch.cat((cache, torch.cat((self.norm(latent), rotary), -1)), 1)  # [B, T, R + P]
        query = self.q(x).unflatten(-1, (H, N + P)).transpose(1, 2)
        result = attend(self, query, *self.expand(self, z))
        return self.o(result.transpose(1, 2).flatten(2))


def attend(module: Mla, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scale, cap = 0.3, module.options.get("softcap")
    if cap is None and not module.options.get("sinks"):
        mask = module.options.get("mask")
        dropout = module.options.get("dropout", 0.0)
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
    logits = query @ key.transpose(-1, -2) * scale
    if cap is not None:
        return (torch.tanh(logits / cap) * cap).softmax(-1) @ value
    sinks = module.sinks.view(1, H, 1, 1).expand(*logits.shape[:3], 1)
    return torch.cat((logits, sinks), -1).softmax(-1)[..., :-1] @ value


def plain(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
    latent, rotary = z.split([R, P], -1)
    both = torch.einsum("btr,hdr->bhtd", latent, module.up)
    return with_rotary(both[..., :N], rotary), both[..., N:]


def with_rotary(key: Tensor, rotary: Tensor) -> Tensor:
    return torch.cat((key, rotary.unsqueeze(1).expand(-1, H, -1, -1)), -1)


def biased(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
    latent, rotary = z.split([R, P], -1)
    both = torch.einsum("btr,hdr->bhtd", latent, module.up) + module.bias[:, None]
    return with_rotary(both[..., :N], rotary), both[..., N:]


def by_heads(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
    """One product a head; the rotary part comes first; values are padded to the size of keys and cut again."""
    latent, rotary = z[..., :R], z[..., R:]
    keys = [torch.cat((rotary, F.linear(latent, module.up[h, :N])), -1) for h in range(H)]
    values = [latent @ module.up[h, N:].T for h in range(H)]
    return torch.stack(keys, 1), torch.stack(values, 1)


def inputs(tokens: int = T) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, cache = (torch.randn(B, n, w, generator=generator).double() for n, w in ((1, C), (tokens - 1, R + P)))
    return x, cache


@torch.no_grad()
def checked(module: Mla, dynamic: bool | None = None) -> Absorbing:
    """Compiled for one token on T, and compared."""
    backend, module = Absorbing(), module.double()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, dynamic=dynamic)
    for tokens in (T + 2, T + 3) if dynamic else (T,):
        torch.testing.assert_close(compiled(*inputs(tokens)), module(*inputs(tokens)), rtol=0, atol=1e-10)
    return backend


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("expand", [plain, biased, by_heads])
def test_any_spelling_of_the_expansion_is_absorbed(expand: Any, dynamic: bool) -> None:
    backend = checked(Mla(expand), dynamic)
    assert len(backend.absorbed) == 1 == len(backend.outcomes)
    assert not backend.expanded()


def test_one_latent_for_keys_and_values_is_not_copied() -> None:
    graph = print_graph(checked(Mla(plain)).outcomes[0].program.graph)
    joins = [line for line in graph.splitlines() if f"[{B}, 1, {T}, " in line or f"[{B}, {T}, " in line]
    assert [line.split(" = ")[1].split("(")[0] for line in joins] == ["cat", ".unsqueeze", ".narrow"]


def test_an_offset_of_the_values_is_not_added_where_nothing_is_attended_to() -> None:
    mask = torch.ones(B, 1, 1, T, dtype=torch.bool)
    mask[0] = False
    backend = checked(Mla(biased, mask=mask))
    assert backend.absorbed


def test_a_long_cache_is_checked_on_few_tokens_and_found_alike() -> None:
    backend, module = Absorbing(), Mla(plain).double()
    with torch.no_grad():
        long = inputs(300)
        torch.testing.assert_close(torch.compile(module, backend=backend)(*long), module(*long), rtol=0, atol=1e-10)
    assert backend.absorbed and not backend.expanded()


def test_where_a_size_means_two_things_everything_is_run_in_full() -> None:
    backend, module, tokens = Absorbing(), Mla(by_heads).double(), C
    with torch.no_grad():
        same = inputs(tokens)
        torch.testing.assert_close(torch.compile(module, backend=backend)(*same), module(*same), rtol=0, atol=1e-10)
    assert backend.absorbed


def test_the_pass_changes_nothing_the_second_time() -> None:
    program = checked(Mla(plain)).outcomes[0].program
    before = print_graph(program.graph)
    outcome = passes.absorb_projections(passes.Outcome(program))
    assert print_graph(program.graph) == before and not outcome.compressed


def test_an_ordinary_model_is_not_changed() -> None:
    captured, outcome = found(tiny_gpt2())
    before = print_graph(captured.program.graph)
    passes.absorb_projections(outcome)
    assert print_graph(captured.program.graph) == before
    assert len(outcome.sites) == 2 and not outcome.missed and not outcome.compressed


# -------------------------------------------------------------------------------------------------------------- misses


def normed(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
    both = torch.einsum("btr,hdr->bhtd", z[..., :R], module.up)
    return with_rotary(module.head_norm(both[..., :N]), z[..., R:]), both[..., N:]


def wholly_normed(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
    key, value = plain(module, z)
    return F.normalize(key, dim=-1), value


def all_normed(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
    key, value = plain(module, z)
    return F.normalize(key, dim=-1), F.normalize(value, dim=-1)


def mixed(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
    """Each key is made of two tokens."""
    key, value = plain(module, z)
    return key + key.roll(1, 2), value


def read_twice(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
    key, value = plain(module, z)
    module.seen = key.sum()  # a side effect: the graph returns it
    return key, value


def chosen(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
    """Which heads are used is an input."""
    key, value = plain(module, z)
    return key.index_select(1, module.options["heads"]), value


MISSES: list[tuple[Any, dict[str, Any], str]] = [
    (normed, {}, "keys or values are not affine in a latent: rms_norm_1 is not"),
    (wholly_normed, {}, "keys or values are not affine in a latent: normalize is not"),
    (all_normed, {}, "nothing to gain"),
    (mixed, {}, "not the same function of the latent at every token"),
    (plain, {"sinks": True}, "attention sinks"),
    (plain, {"dropout": 0.1}, "attention dropout is active"),
    (biased, {"softcap": 5.0}, "keys have an offset, which a softcap does not let out"),
    (read_twice, {}, "sum_1 reads the expanded keys or values, too"),
    (chosen, {"heads": torch.tensor([2, 0, 1, 3])}, "beside the latent"),
]


def missed(module: Mla, dynamic: bool | None = None, tokens: int = T) -> str:
    """The reason of the pass itself for the only attention of the module."""
    seen: list[str] = []

    def backend(graph: fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        program = copy_program(graph, given)
        passes.find(program)
        stage = AbsorbProjection()
        (node,) = stage.candidates(program)
        before = print_graph(program.graph)
        with pytest.raises(Miss) as miss:
            stage.match(node, program, Roles(program), Evaluator(program))
        assert print_graph(program.graph) == before
        seen.append(miss.value.reason)
        return graph.forward

    with torch.no_grad():
        torch.compile(module.double(), backend=backend, dynamic=dynamic)(*inputs(tokens))
    return seen[0]


@pytest.mark.parametrize(("expand", "options", "reason"), MISSES)
def test_each_miss_has_its_reason(expand: Any, options: dict[str, Any], reason: str) -> None:
    assert reason in missed(Mla(expand, **options))


def test_a_size_that_is_reckoned_with_is_a_miss() -> None:
    def by_length(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
        key, value = plain(module, z)
        return key / z.shape[1], value

    reason = missed(Mla(by_length), dynamic=True, tokens=T + 2)
    assert reason.endswith("reckons with a size, which may be another at the next call")


def test_queries_of_another_batch_size_are_a_miss() -> None:
    program = checked(Mla(plain)).outcomes[0].program  # any program: the node is made by hand
    graph = fx.Graph()
    query, key = (graph.placeholder(name) for name in ("query", "key"))
    for node, batch in ((query, 3), (key, 1)):
        node.meta["val"] = torch.empty(batch, H, 5, N)
    node = graph.call_function(torch.ops.fhopt.attention.default, (query, key, key), dict(scale=1.0))
    with pytest.raises(Miss, match="different batch sizes"):
        AbsorbProjection().match(node, program, Roles(program), Evaluator(program))


def test_a_site_of_the_plan_is_left_to_it() -> None:
    """Cross attention to an encoder's output: both the layout `input` and this pass may take it."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.o = nn.Linear(C, H * N), nn.Linear(H * N, C)
            self.k, self.v = nn.Linear(C, H * N), nn.Linear(C, H * N)

        def forward(self, x: Tensor, encoded: Tensor) -> Tensor:
            projected = (self.q(x), self.k(encoded), self.v(encoded))
            q, k, v = (y.unflatten(-1, (H, N)).transpose(1, 2) for y in projected)
            return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    module, given = Cross(), (torch.randn(B, 1, C), torch.randn(B, T, C))
    captured = capture(module, given)
    outcome = passes.find(captured.program)
    (site,) = outcome.sites.values()
    plan = SimpleNamespace(sites=[SimpleNamespace(site=site)])
    assert not passes.absorb_projections(outcome, cast(LatentPlan, plan)).compressed
    assert passes.absorb_projections(outcome).compressed == {site.name: "absorbed"}
    assert not outcome.sites
    with torch.no_grad():
        result = fx.Interpreter(captured.program.module).run(*captured.program.values.values())[captured.result]
        torch.testing.assert_close(result, module(*given), rtol=0, atol=1e-5)
