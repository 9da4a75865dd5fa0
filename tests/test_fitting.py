"""Bases, bits and plans."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import Fitted, found, tiny_llama

from fhopt import calibrate, fitting, ops
from fhopt.errors import FhoptError
from fhopt.spec import LatentPlan, write_folder


@pytest.mark.parametrize("layout", fitting.LAYOUTS)
def test_full_width_latents_give_back_keys_and_values(fitted: Fitted, layout: str) -> None:
    for site in fitted.plan(1, layout).sites:
        x = torch.randn(2, site.site.kv_heads, 5, site.site.key_dim)
        for side in (site.key, site.value):
            back = ops.decode(ops.encode(x, side.encode), side.decode)
            torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)


def test_absorbed_queries_give_the_same_products(fitted: Fitted) -> None:
    site = fitted.plan(1).sites[0]
    heads, groups, dim = site.site.heads, site.site.kv_heads, site.site.key_dim
    q, k = torch.randn(1, heads, 3, dim), torch.randn(1, groups, 5, dim)
    direct = q @ k.repeat_interleave(heads // groups, 1).mT
    latent = ops.absorb(q, site.key.decode) @ ops.encode(k, site.key.encode).repeat_interleave(heads, 1).mT
    torch.testing.assert_close(latent, direct, rtol=1e-4, atol=1e-3)


def test_a_frequency_basis_commutes_with_the_rotation(llama: Fitted) -> None:
    """Encoding a rotated key is rotating the encoded key: per frequency, by the same angle (DESIGN: RoPE commutes)."""
    site = llama.plan(1).sites[0]
    rope = site.site.rope
    assert rope is not None
    dim = site.site.key_dim

    def rotate(x: torch.Tensor, position: float) -> torch.Tensor:
        angle = torch.tensor(rope.angles, dtype=torch.float64) * position
        real, imaginary = x[..., : dim // 2].double(), x[..., dim // 2 :].double()
        turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)

    side = site.key
    k = torch.randn(1, site.site.kv_heads, 1, dim, dtype=torch.float64)
    # truncate to half of the latent channels, kept as pairs: a map that mixed frequencies would not commute
    norms = []
    for position in (0.0, 3.0, 500.0):
        z = ops.encode(rotate(k, position), side.encode.double())[0, 0, 0]
        norms.append(z.square().unflatten(0, (-1, 2)).sum(-1))  # |z|^2 of neighbouring channels
    for other in norms[1:]:
        torch.testing.assert_close(other, norms[0], rtol=1e-4, atol=1e-6)  # bases are float32, angles measured


@pytest.mark.parametrize("ratio", [2.0, 4.0, 6.0])
@pytest.mark.parametrize("layout", fitting.LAYOUTS)
def test_the_whole_cache_is_as_small_as_asked(fitted: Fitted, layout: str, ratio: float) -> None:
    plan = fitted.plan(ratio, layout)
    assert ratio <= plan.ratio(2048) < ratio * 1.25  # small sites have few chunks to give away


def test_a_larger_budget_never_predicts_a_larger_loss(llama: Fitted) -> None:
    losses = [llama.plan(r).provenance["predicted_nats"] for r in (2.0, 3.0, 4.0, 6.0)]
    assert losses == sorted(losses)


def test_transform_coding_predicts_no_more_loss_than_plain_rounding(fitted: Fitted) -> None:
    for ratio in (3.0, 4.0):
        fine = fitted.plan(ratio).provenance["predicted_nats"]
        plain = fitted.plan(ratio, "identity").provenance["predicted_nats"]
        assert fine <= plain * 1.01


def test_the_predicted_loss_is_what_rounding_costs(llama: Fitted) -> None:
    """KL of the compressed graph against the exact one, on tokens not used to calibrate, within a factor of three."""
    from small_models import run

    from fhopt import passes

    captured, outcome = found(llama.model, 96)
    exact = run(captured).log_softmax(-1)
    plan = llama.plan(4)
    passes.optimize(outcome, plan)
    with torch.no_grad():
        coded = run(captured).log_softmax(-1)
    kl = float((exact.exp() * (exact - coded)).sum(-1).mean())
    assert plan.provenance["predicted_nats"] / 3 < kl < plan.provenance["predicted_nats"] * 3


def test_calibration_sums_over_batches(llama: Fitted) -> None:
    batches = [{"input_ids": torch.randint(1, 97, (1, 96))} for _ in range(2)]

    def moments(part: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        stats = calibrate.collect(llama.captured, llama.outcome, part, sinks=4, recent=8)
        return stats["model.layers.1.self_attn"].key.moments[0]

    torch.testing.assert_close(moments(batches), moments(batches[:1]) + moments(batches[1:]))


def test_the_metric_is_the_fisher_information_of_the_far_keys(llama: Fitted) -> None:
    """Against automatic differentiation of the same sampled likelihood through an explicit perturbation."""
    q, k, v = torch.randn(1, 4, 20, 16), torch.randn(1, 2, 20, 16), torch.randn(1, 2, 20, 16)
    mask = torch.ones(20, 20, dtype=torch.bool).tril()
    _, far = ops.split_mask(q, k, None, False, 2, 5)
    seen: list[torch.Tensor] = []
    leaf = torch.zeros((), requires_grad=True)
    attention: Any = calibrate._ProbedAttention
    out = attention.apply(q + leaf, k, v, ops.additive(mask, q.dtype), far, 0.3, 4.0, lambda a, b: seen.extend((a, b)))
    weight = torch.randn_like(out)
    torch.autograd.grad((out * weight).sum(), leaf)
    dk, dv = torch.zeros_like(k, requires_grad=True), torch.zeros_like(v, requires_grad=True)

    def rep(t: torch.Tensor) -> torch.Tensor:
        return t.repeat_interleave(2, 1)

    logits = torch.where(far, q @ rep(k + dk).mT, q @ rep(k).mT) * 0.3
    p = (4 * torch.tanh(logits / 4)).masked_fill(~mask, float("-inf")).softmax(-1)
    expected = (p * far) @ rep(v + dv) + (p * ~far) @ rep(v)
    torch.testing.assert_close(out, expected.detach(), rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad((expected * weight).sum(), (dk, dv))
    for found_gradient, gradient in zip(seen, grads, strict=True):
        torch.testing.assert_close(found_gradient, gradient, rtol=1e-4, atol=1e-5)


# ---- files


def test_the_same_statistics_give_the_same_plan_byte_for_byte(llama: Fitted, tmp_path: Path) -> None:
    files = [llama.plan(4).save(tmp_path / name) for name in "ab"]
    for name in ("plan.json", "plan.safetensors"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()


def test_a_plan_comes_back_whole(fitted: Fitted, tmp_path: Path) -> None:
    plan = fitted.plan(4).with_provenance(text="topics")
    again = LatentPlan.load(plan.save(tmp_path / "plan"))
    assert again.digest() == plan.digest()
    assert [s.site for s in again.sites] == [s.site for s in plan.sites]
    assert again.provenance["text"] == "topics"


def _damage(folder: Path, how: str) -> None:
    if how == "no folder":
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    elif how == "cut short":
        blob = (folder / "plan.safetensors").read_bytes()
        (folder / "plan.safetensors").write_bytes(blob[: len(blob) // 2])
    elif how == "a changed number":
        altered = bytearray((folder / "plan.safetensors").read_bytes())
        altered[-2] ^= 1
        (folder / "plan.safetensors").write_bytes(bytes(altered))
    else:
        description = json.loads((folder / "plan.json").read_text())
        description["version" if how == "a newer version" else "sinks"] = 99
        (folder / "plan.json").write_text(json.dumps(description))


@pytest.mark.parametrize(
    ("how", "message"),
    [("no folder", "is not a plan"), ("cut short", "damaged"), ("a changed number", "altered"),
     ("a changed option", "altered"), ("a newer version", "plan version 99")],
)  # fmt: skip
def test_a_damaged_plan_is_refused_with_the_reason(llama: Fitted, tmp_path: Path, how: str, message: str) -> None:
    folder = llama.plan(4).save(tmp_path / "plan")
    _damage(folder, how)
    with pytest.raises(FhoptError, match=message):
        LatentPlan.load(folder)


def test_a_folder_with_other_things_is_not_overwritten(llama: Fitted, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FhoptError, match="holds other things"):
        llama.plan(4).save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(FhoptError, match="No space left"):
        write_folder(tmp_path / "plan", {"plan.json": b"{}"})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("ratio", [0, -3, 0.5, float("nan"), 5000])
def test_an_impossible_ratio_is_refused(llama: Fitted, ratio: float) -> None:
    with pytest.raises(FhoptError, match="ratio"):
        llama.plan(ratio)


def test_a_ratio_that_leaves_no_bits_says_what_the_least_is(llama: Fitted) -> None:
    with pytest.raises(FhoptError, match="least possible"):
        llama.plan(60)


def test_a_plan_knows_its_model_in_any_dtype_and_refuses_another(llama: Fitted) -> None:
    sites = [s.site for s in llama.plan(4).sites]
    own = dict(llama.model.named_parameters())
    plan = llama.plan(4).with_provenance(fingerprint=fitting.fingerprint(own, sites))
    fitting.check_model(plan, {n: p.to(torch.bfloat16) for n, p in own.items()}, "the same in bfloat16")
    torch.manual_seed(5)
    other = tiny_llama()
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter)
    with pytest.raises(FhoptError, match="another model"):
        fitting.check_model(plan, dict(other.named_parameters()), "another")
