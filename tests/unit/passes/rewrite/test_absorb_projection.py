"""Models that cache latents: attention runs on them, keys and values are never expanded, and results stay."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from absorbed_latents import Absorbing, B, C, H, Mla, N, P, R, T, inputs, plain, with_rotary
from needs import covering
from small_models import found, tiny_gpt2
from torch import Tensor, fx, nn

from fhopt.errors import Miss
from fhopt.models.capture import capture
from fhopt.passes import outcome as passes_outcome
from fhopt.passes import pipeline
from fhopt.passes.graph.evaluate import Evaluator
from fhopt.passes.graph.printing import print_graph
from fhopt.passes.graph.program import copy_program
from fhopt.passes.recognize.node_roles import Roles
from fhopt.passes.rewrite.absorb_projection import AbsorbProjection
from fhopt.plan.latent_plan import LatentPlan

# ------------------------------------------------------------------------------------------- other spellings


def biased(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
    latent, rotary = z.split([R, P], -1)
    both = torch.einsum("btr,hdr->bhtd", latent, module.up) + module.bias[:, None]
    return with_rotary(both[..., :N], rotary), both[..., N:]


def by_heads(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
    """One matmul per head; the rotary part comes first; values are padded to the size of keys and sliced again."""
    latent, rotary = z[..., :R], z[..., R:]
    keys = [torch.cat((rotary, F.linear(latent, module.up[h, :N])), -1) for h in range(H)]
    values = [latent @ module.up[h, N:].T for h in range(H)]
    return torch.stack(keys, 1), torch.stack(values, 1)


@torch.no_grad()
def checked(module: Mla, dynamic: bool | None = None) -> Absorbing:
    """Compile for one token on T, and compare with eager mode."""
    backend, module = Absorbing(), module.double()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend=backend, dynamic=dynamic)
    for tokens in (T + 2, T + 3) if dynamic else (T,):
        torch.testing.assert_close(compiled(*inputs(tokens)), module(*inputs(tokens)), rtol=0, atol=1e-10)
    return backend


@covering(1, expand={f.__name__: f for f in (plain, biased, by_heads)}, dynamic=[True, False])
def test_any_spelling_of_the_expansion_is_absorbed(expand: Any, dynamic: bool) -> None:
    backend = checked(Mla(expand), dynamic)
    assert len(backend.absorbed) == 1 == len(backend.outcomes)
    assert not backend.expanded()


def test_one_latent_for_keys_and_values_is_not_copied() -> None:
    graph = print_graph(checked(Mla(plain)).outcomes[0].program.graph)
    joins = [line for line in graph.splitlines() if f"[{B}, 1, {T}, " in line or f"[{B}, {T}, " in line]
    assert [line.split(" = ")[1].split("(")[0] for line in joins] == ["cat", ".unsqueeze", ".narrow"]


def test_an_offset_of_the_values_is_not_added_to_fully_masked_rows() -> None:
    mask = torch.ones(B, 1, 1, T, dtype=torch.bool)
    mask[0] = False
    backend = checked(Mla(biased, mask=mask))
    assert backend.absorbed


def test_a_long_cache_is_checked_on_few_tokens_and_found_as_well() -> None:
    backend, module = Absorbing(), Mla(plain).double()
    with torch.no_grad():
        long = inputs(300)
        torch.testing.assert_close(torch.compile(module, backend=backend)(*long), module(*long), rtol=0, atol=1e-10)
    assert backend.absorbed and not backend.expanded()


def test_an_ambiguous_size_makes_checks_run_on_all_tokens() -> None:
    backend, module, tokens = Absorbing(), Mla(by_heads).double(), C
    with torch.no_grad():
        same = inputs(tokens)
        torch.testing.assert_close(torch.compile(module, backend=backend)(*same), module(*same), rtol=0, atol=1e-10)
    assert backend.absorbed


def test_a_second_run_of_the_pass_changes_nothing() -> None:
    program = checked(Mla(plain)).outcomes[0].program
    before = print_graph(program.graph)
    outcome = pipeline.absorb_projections(passes_outcome.Outcome(program))
    assert print_graph(program.graph) == before and not outcome.compressed


def test_an_ordinary_model_is_not_changed() -> None:
    captured, outcome = found(tiny_gpt2())
    before = print_graph(captured.program.graph)
    pipeline.absorb_projections(outcome)
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
    """Each key is computed from two tokens."""
    key, value = plain(module, z)
    return key + key.roll(1, 2), value


def read_twice(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
    key, value = plain(module, z)
    module.seen = key.sum()  # a side effect: the graph returns it
    return key, value


def chosen(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
    """An input selects the heads."""
    key, value = plain(module, z)
    return key.index_select(1, module.options["heads"]), value


MISSES: list[tuple[Any, dict[str, Any], str]] = [
    (normed, {}, "keys or values are not affine in a latent: rms_norm_1 is not affine"),
    (wholly_normed, {}, "keys or values are not affine in a latent: normalize is not affine"),
    (all_normed, {}, "no latent is narrower"),
    (mixed, {}, "not the same function of the latent at every token"),
    (plain, {"sinks": True}, "sink logits"),
    (plain, {"dropout": 0.1}, "attention dropout is active"),
    (biased, {"softcap": 5.0}, "keys have an offset, which does not cancel"),
    (read_twice, {}, "sum_1 also reads the expanded keys or values"),
    (chosen, {"heads": torch.tensor([2, 0, 1, 3])}, "besides the latent"),
]


def missed(module: Mla, dynamic: bool | None = None, tokens: int = T) -> str:
    """Return the reason of the pass for the only attention of the module."""
    seen: list[str] = []

    def backend(graph: fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        program = copy_program(graph, given)
        pipeline.find_attentions(program)
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


def test_a_computation_with_a_size_is_a_miss() -> None:
    def by_length(module: Mla, z: Tensor) -> tuple[Tensor, Tensor]:
        key, value = plain(module, z)
        return key / z.shape[1], value

    reason = missed(Mla(by_length), dynamic=True, tokens=T + 2)
    assert reason.endswith("computes with a size, which may change between calls")


def test_queries_of_another_batch_size_are_a_miss() -> None:
    program = checked(Mla(plain)).outcomes[0].program  # any program: the node is made by hand
    graph = fx.Graph()
    query, key = (graph.placeholder(name) for name in ("query", "key"))
    for node, batch in ((query, 3), (key, 1)):
        node.meta["val"] = torch.empty(batch, H, 5, N)
    node = graph.call_function(torch.ops.fhopt.attention.default, (query, key, key), dict(scale=1.0))
    with pytest.raises(Miss, match="different batch sizes"):
        AbsorbProjection().match(node, program, Roles(program), Evaluator(program))


def test_a_site_of_the_plan_is_left_to_the_plan() -> None:
    """Cross attention to an encoder's output fits both the layout `input` and this pass."""

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
    outcome = pipeline.find_attentions(captured.program)
    (site,) = outcome.sites.values()
    plan = SimpleNamespace(sites=[SimpleNamespace(site=site)])
    assert not pipeline.absorb_projections(outcome, cast(LatentPlan, plan)).compressed
    assert pipeline.absorb_projections(outcome).compressed == {site.name: "absorbed"}
    assert not outcome.sites
    with torch.no_grad():
        result = fx.Interpreter(captured.program.module).run(*captured.program.values.values())[captured.result]
        torch.testing.assert_close(result, module(*given), rtol=0, atol=1e-5)
