"""Python calls on a model in any order: its results depend on its current state, not on its history.

Next to the model with a history there is one without: a copy of the original on which no plan was ever applied, and
whose weights, dtype, mode and attention follow those of the first. A copy of it, with the current plan of the first
applied, gives the expected results.
"""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled_models import forward, with_backend
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rewritten_folders import written
from small_models import MAKERS, FittedModel, cached, numbered, token_ids
from torch import Tensor

import fhopt
from fhopt.decode.programs import STATE, decode_programs
from fhopt.errors import FhoptError
from fhopt.hf.apply import latent_cache
from fhopt.plan.fingerprint import fingerprint, weight_prints
from fhopt.plan.latent_plan import LatentPlan

PROMPT, STEPS = 30, 8  # tokens of the prompt and decode steps: 8 + 8 of the window and the sinks are exact
PLANS: dict[str, dict[str, Any]] = {
    "exact": dict(ratio=1, layout="head", window_bits=16),
    "4x": dict(ratio=4, window_bits=8),
    "4x, 16 bits": dict(ratio=4, layout="head", window_bits=16),
    "8x": dict(ratio=8, layout="auto", window_bits=8),
    "8x, means": dict(ratio=8, window_bits=8, mean_tokens=8),
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True},
    "beam search": {"do_sample": False, "num_beams": 2},
    "static": {"do_sample": False, "cache_implementation": "static"},
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
SITES = {"llama": "model.layers.1.self_attn.v_proj.weight", "gpt2": "transformer.h.1.attn.c_attn.weight"}
OTHERS = {"llama": "model.layers.0.mlp.up_proj.weight", "gpt2": "transformer.h.0.mlp.c_fc.weight"}


def read(model: Any, ids: Tensor) -> Tensor:
    """Return logits of a prompt and of single tokens after it, with the model's own cache: [B, T, V]."""
    torch.manual_seed(0)
    with torch.no_grad():
        output = model(ids[:, :PROMPT], use_cache=True)
        parts = [output.logits, *steps(model, cache_of(output), ids[:, PROMPT:])]
    return torch.cat(parts, 1)


def steps(model: Any, cache: Any, ids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(token, **cached(cache), use_cache=True).logits for token in ids.split(1, 1)]


def runs_programs(model: Any) -> bool:
    """Whether steps run as programs, which need a library that other tests of the process may have built."""
    state = decode_programs(model)
    return state is not None and state.has_program


def cache_of(output: Any) -> Any:
    return output["cache"] if "cache" in output else output["past_key_values"]


def plans_of(fitted: FittedModel) -> dict[str, LatentPlan]:
    """Plans as made by `fhopt.fit`, with fingerprints of their weights."""
    weights = dict(fitted.model.named_parameters())
    plans = {name: fitted.plan(sinks=4, **options) for name, options in PLANS.items()}
    return {name: plan.with_provenance(**prints(plan, weights)) for name, plan in plans.items()}


def prints(plan: LatentPlan, weights: dict[str, Tensor]) -> dict[str, Any]:
    sites = [s.site for s in plan.sites]
    return {"fingerprint": fingerprint(weights, sites), "weights": weight_prints(weights, sites)}


def refused(action: Callable[[], Any]) -> str:
    """Return the message of a FhoptError: one line with the expected value or a fix."""
    with pytest.raises(FhoptError) as caught:
        action()
    message = str(caught.value)
    assert message and "\n" not in message and ". " in message, message
    return message


class ModelStates(RuleBasedStateMachine):
    """`model` has a history, `plain` has none. applied: plan and options of `apply`, None if no plan is applied."""

    kind: str
    plans: dict[str, LatentPlan]
    strange: LatentPlan  # a plan for another model
    folder: Path

    @initialize(seed=st.integers(0, 99), name=st.sampled_from([None, *PLANS]))
    def start(self, seed: int, name: str | None) -> None:
        torch.manual_seed(seed)
        self.ids = token_ids(2, PROMPT + STEPS)
        self.plain = MAKERS[self.kind]()
        self.model = copy.deepcopy(self.plain)
        self.applied: tuple[LatentPlan, dict[str, bool]] | None = None
        self.own_attention = ""  # set after `apply`
        self.negated = False  # the sign of weights in the fingerprint
        self.held: tuple[Any, LatentPlan, Tensor] | None = None
        self.place = Path(tempfile.mkdtemp(dir=self.folder))
        if name is not None:
            self.put(self.plans[name])

    # ------------------------------------------------------------------------------------------- plans

    @rule(name=st.sampled_from([*PLANS]), products=st.booleans(), programs=st.booleans())
    def apply(self, name: str, products: bool, programs: bool) -> None:
        self.put(self.plans[name], skinny_products=products, decode_program=programs)

    def put(self, plan: LatentPlan, **options: bool) -> None:
        if self.negated:
            assert "not fitted to" in refused(lambda: fhopt.apply(self.model, plan, **options))
            return
        assert fhopt.apply(self.model, plan, **options) is self.model
        if self.own_attention:  # an attention set next to the plan stays when the plan is removed
            self.plain.set_attn_implementation(self.own_attention)
        self.applied, self.own_attention = (plan, options), ""

    @rule()
    def unapply(self) -> None:
        assert fhopt.unapply(self.model) is self.model
        self.forget()

    def forget(self) -> None:
        if self.own_attention:
            self.plain.set_attn_implementation(self.own_attention)
        self.applied, self.own_attention = None, ""

    @rule(name=st.sampled_from([*PLANS]))
    def save_and_load_a_plan(self, name: str) -> None:
        plan = LatentPlan.load(self.plans[name].save(self.place / "plan"))
        assert plan.digest() == self.plans[name].digest()
        self.put(plan)

    @precondition(lambda self: (self.place / "plan").exists())
    @rule(file=st.sampled_from(["plan.json", "plan.safetensors"]), share=st.floats(0, 0.99))
    def load_half_a_plan(self, file: str, share: float) -> None:
        content = (self.place / "plan" / file).read_bytes()
        (self.place / "plan" / file).write_bytes(content[: int(share * len(content))])
        refused(lambda: fhopt.apply(self.model, LatentPlan.load(self.place / "plan")))

    # ------------------------------------------------------------------------------------------- the model

    @rule(seed=st.integers(0, 9))
    def change_a_weight_that_no_plan_knows(self, seed: int) -> None:
        for model in (self.model, self.plain):
            torch.manual_seed(seed)
            weight = model.get_parameter(OTHERS[self.kind])
            with torch.no_grad():
                weight.add_(torch.randn(weight.shape).to(weight.dtype) / 10)
        self.held = None

    @rule(factor=st.sampled_from([0.5, 2.0]))
    def scale_a_weight_of_a_site(self, factor: float) -> None:
        """Plans still accept it: a model may have been trained a little more."""
        self.scale(factor)

    @rule()
    def negate_a_weight_of_a_site(self) -> None:
        self.scale(-1)
        self.negated = not self.negated

    def scale(self, factor: float) -> None:
        for model in (self.model, self.plain):
            with torch.no_grad():
                model.get_parameter(SITES[self.kind]).mul_(factor)
        self.held = None

    @rule()
    def put_parameters_in_place_of_others(self) -> None:
        state = {name: x.clone() * 1.01 for name, x in self.plain.state_dict().items()}
        self.plain.load_state_dict(state)
        self.model.load_state_dict({name: x.clone() for name, x in state.items()}, assign=True)
        self.model.tie_weights()
        self.held = None

    @rule(dtype=st.sampled_from(DTYPES))
    def convert(self, dtype: torch.dtype) -> None:
        self.model.to(dtype)
        self.plain.to(dtype)
        self.held = None

    @rule(mode=st.booleans())
    def train(self, mode: bool) -> None:
        self.model.train(mode)
        self.plain.train(mode)

    @rule(name=st.sampled_from(["eager", "sdpa"]))
    def attend_by(self, name: str) -> None:
        self.model.set_attn_implementation(name)
        if self.applied is None:
            self.plain.set_attn_implementation(name)
        else:
            self.own_attention = name

    # ------------------------------------------------------------------------------------------- copies

    @rule()
    def go_on_with_a_copy(self) -> None:
        before, self.model = self.model, copy.deepcopy(self.model)
        fhopt.unapply(before)
        for weight in before.parameters():
            weight.data.zero_()

    @rule()
    def pickle(self) -> None:
        self.model = pickle.loads(pickle.dumps(self.model))  # noqa: S301  # made here

    @rule()
    def save_and_load_weights(self) -> None:
        """A saved folder contains nothing of a plan."""
        self.model.save_pretrained(self.place / "model")
        self.reload(type(self.plain).from_pretrained, self.place / "model")

    @precondition(lambda self: not self.negated)
    @rule(name=st.sampled_from([*PLANS]))
    def rewrite_and_load(self, name: str) -> None:
        """The plan of a folder is the one it was written with, whatever was applied."""
        out = Path(tempfile.mkdtemp(dir=self.place))
        written(out, copy.deepcopy(self.model), self.plans[name])
        self.reload(fhopt.load, out)
        self.put(LatentPlan.load(out / "plan"))

    def reload(self, load: Callable[..., Any], folder: Path) -> None:
        """Continue with the model in a folder, without a plan, and with the plain weights saved and loaded."""
        mode, attention = self.plain.training, self.own_attention or self.plain.config._attn_implementation
        dtype = self.plain.dtype
        self.plain.save_pretrained(self.place / "plain")
        plain = type(self.plain).from_pretrained(self.place / "plain", dtype=dtype)
        # In newly allocated memory, because tensors mapped from a file have other addresses.
        self.plain, self.model = copy.deepcopy(plain), copy.deepcopy(fhopt.unapply(load(folder, dtype=dtype)))
        for model in (self.plain, self.model):
            model.train(mode)
            model.set_attn_implementation(attention)
        self.applied, self.own_attention, self.held = None, "", None

    # ------------------------------------------------------------------------------------------- use

    @rule(way=st.sampled_from([*WAYS]), tokens=st.integers(1, 12))
    def generate(self, way: str, tokens: int) -> None:
        made = []
        for model in (self.model, self.expected()):
            torch.manual_seed(1)
            options = dict(max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0) | WAYS[way]
            made.append(model.generate(self.ids[:, :PROMPT], **options))
        assert torch.equal(*made)

    @precondition(lambda self: self.applied is not None and not self.plain.training)
    @rule()
    def hold_a_cache(self) -> None:
        assert self.applied is not None
        cache = latent_cache(self.model)
        with torch.no_grad():
            self.model(self.ids[:, :PROMPT], **cached(cache))
        after = torch.cat(steps(self.expected(), copy.deepcopy(cache), self.ids[:, PROMPT:]), 1)
        self.held = cache, self.applied[0], after

    @precondition(lambda self: self.held is not None and not self.plain.training)
    @rule()
    def read_the_held_cache(self) -> None:
        """The contents of a cache were fixed when it was filled."""
        assert self.held is not None
        cache, _, after = self.held
        found = torch.cat(steps(self.model, copy.deepcopy(cache), self.ids[:, PROMPT:]), 1)
        assert self.close(found, after)

    @precondition(lambda self: self.held is not None)
    @rule()
    def save_and_load_the_held_cache(self) -> None:
        assert self.held is not None
        cache, plan, after = self.held
        file = self.place / "cache.safetensors"
        if self.applied is None or self.applied[0].digest() != plan.digest():
            refused(lambda: fhopt.save_cache(self.model, cache, file))
            return
        self.held = fhopt.load_cache(self.model, fhopt.save_cache(self.model, cache, file)), plan, after

    # ------------------------------------------------------------------------------------------- invariants

    def expected(self) -> Any:
        """Return a model with the expected state of `model`, and without a history."""
        model = copy.deepcopy(self.plain)
        if self.applied is not None:
            plan, options = self.applied
            fhopt.apply(model, plan.with_provenance(fingerprint=None), **options)
        if self.own_attention:
            model.set_attn_implementation(self.own_attention)
        return model

    def close(self, found: Tensor, expected: Tensor) -> bool:
        tolerance = 0.1 if self.plain.dtype == torch.bfloat16 else 1e-3  # sums in another order
        return float((found - expected).norm()) <= tolerance * float(expected.norm())

    @invariant()
    def a_plan_for_another_model_is_refused(self) -> None:
        """The refused call changes nothing, as the next results show."""
        refused(lambda: fhopt.apply(self.model, self.strange))

    @invariant()
    def numbers_are_those_of_a_model_without_a_history(self) -> None:
        other = self.expected()
        found, expected = read(self.model, self.ids), read(other, self.ids)
        is_exact = self.applied is None or self.applied[0].sites[0].is_exact
        # A layer program sums in another order than the calls before it was traced, which may change a code.
        has_programs = runs_programs(self.model) or runs_programs(other)
        rounding = 0.1 if self.plain.dtype == torch.bfloat16 else 1e-4 if is_exact else 2e-2
        is_close = has_programs and float((found - expected).norm()) < rounding * float(expected.norm())
        assert torch.equal(found, expected) or is_close
        if is_exact and not self.plain.training:  # dropout draws in another order
            assert self.close(found, read(self.plain, self.ids))

    @invariant()
    def without_a_plan_nothing_is_left_of_one(self) -> None:
        if self.applied is None:
            refused(lambda: latent_cache(self.model))
            assert not hasattr(self.model, "_fhopt_applied") and not self.model._forward_pre_hooks
            assert not [m for m in self.model.modules() if {"forward", STATE} & vars(m).keys()]
            assert self.model.config._attn_implementation == self.plain.config._attn_implementation


class ThoroughStates(ModelStates):
    """Fit the model as well, which takes seconds."""

    @precondition(lambda self: self.plain.dtype != torch.bfloat16)
    @rule()
    def fit(self) -> None:
        """An applied plan does not affect the fit, nor the fit an applied plan."""
        options: dict[str, Any] = dict(sequences=2, rate_sequences=1, tokens=1024, sinks=4, recent=8, block=8)
        plans = []
        for model in (self.model, self.plain):
            torch.manual_seed(0)
            plans.append(fhopt.fit(model, batches=[batch for _, batch in numbered(3, 64)], **options))
        nats = [plan.provenance["predicted_nats"] for plan in plans]
        assert nats[0] == pytest.approx(nats[1], rel=1e-3)
        assert [s.layout for s in plans[0].sites] == [s.layout for s in plans[1].sites]


class CompiledStates(ModelStates):
    """Call the model also through torch.compile, before and after changes."""

    @initialize()
    def compile_nothing(self) -> None:
        torch._dynamo.reset()
        self.compiled: Any = None

    @rule(name=st.sampled_from([None, "exact"]))
    def compile(self, name: str | None) -> None:
        options: dict[str, Any] = {"ratio": 1} if name is None else {"plan": self.plans[name], "weights": "trust"}
        self.compiled = torch.compile(self.model, backend="flashhead", dynamic=False, options=options)

    @precondition(lambda self: self.compiled is not None and not self.plain.training)
    @rule()
    def call_compiled(self) -> None:
        """The compiled model stays usable after any change."""
        if self.compiled._orig_mod is self.model:
            with torch.no_grad():
                assert self.close(forward(self.compiled, self.ids), forward(self.plain, self.ids))

    @precondition(lambda self: not self.negated and self.plain.dtype == torch.float32 and not self.plain.training)
    @rule(name=st.sampled_from(["4x", "8x"]))
    def compile_with_a_plan(self, name: str) -> None:
        """A plan passed to the compiler depends on an applied one no more than calls without a cache do."""
        outputs = []
        for model in (self.model, copy.deepcopy(self.plain)):
            torch._dynamo.reset()
            with torch.no_grad():
                outputs.append(forward(with_backend(model, plan=self.plans[name]), self.ids))
        self.compiled = None
        assert self.close(*outputs)


def run_states(
    fitted: FittedModel, strange: FittedModel, folder: Path, examples: int, states: type[ModelStates] = ModelStates
) -> None:
    kind = "llama" if "Llama" in type(fitted.model).__name__ else "gpt2"
    about = {"kind": kind, "plans": plans_of(fitted), "strange": strange.plan(4), "folder": folder}
    machine: Any = type("Machine", (states,), about)
    machine.TestCase.settings = settings(
        max_examples=examples, stateful_step_count=10, deadline=None, suppress_health_check=[*HealthCheck]
    )
    machine.TestCase().runTest()


@pytest.mark.slow
@pytest.mark.hypothesis
@pytest.mark.usefixtures("without_compiling")
def test_the_results_of_a_model_depend_on_its_current_state(
    llama: FittedModel, gpt2: FittedModel, tmp_path: Path
) -> None:
    run_states(llama, gpt2, tmp_path, 40)


@pytest.mark.slow
@pytest.mark.hypothesis
@pytest.mark.usefixtures("without_compiling")
def test_so_do_those_of_a_model_with_fused_projections(llama: FittedModel, gpt2: FittedModel, tmp_path: Path) -> None:
    run_states(gpt2, llama, tmp_path, 10)


@pytest.mark.slow
@pytest.mark.hypothesis
def test_so_do_those_of_kernels(llama: FittedModel, gpt2: FittedModel, tmp_path: Path) -> None:
    run_states(llama, gpt2, tmp_path, 10, ThoroughStates)


@pytest.mark.slow
@pytest.mark.hypothesis
@pytest.mark.usefixtures("without_compiling", "traced_only")
def test_so_do_those_of_a_compiled_model(llama: FittedModel, gpt2: FittedModel, tmp_path: Path) -> None:
    run_states(llama, gpt2, tmp_path, 15, CompiledStates)
