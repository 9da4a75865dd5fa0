"""Other KV-cache quantization methods: values and bytes."""

from __future__ import annotations

from typing import Any, ClassVar

import baseline_caches
import pytest
import torch
from baseline_caches import SCHEDULE, exact_logits
from small_models import tiny_llama, token_ids
from torch import Tensor

from benchmarks.quality.methods.quantized_caches import (
    CacheShape,
    Codec,
    Kivi,
    QuantizedBlocks,
    RoundToNearest,
    Schedule,
    Transformers,
    asymmetric,
)

SMOLLM2 = CacheShape(layers=30, kv_heads=3, head_dim=64)
AT = 8192
SEALED, OPEN = 8064, 128  # 126 blocks of 64 after 4 sinks and before at least 64 recent tokens


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


def read(model: Any, codec: Codec, ids: Tensor, schedule: Schedule = SCHEDULE) -> tuple[Tensor, Any]:
    return baseline_caches.read(model, QuantizedBlocks(codec, schedule), ids, schedule)


@pytest.mark.parametrize("codec", [Kivi(12), RoundToNearest(14)])
def test_many_bits_change_almost_nothing(llama: Any, codec: Codec) -> None:
    ids = token_ids(1, 170)
    expected = exact_logits(llama, ids)
    found, _ = read(llama, codec, ids)
    # a 12-bit step is 1.2e-4 of the range, float16 scales err by 5e-4 of the code: logits of size 5 move by about 2e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-2)
    assert not torch.equal(found, expected)


def test_a_codec_computes_in_float32_for_any_model_dtype() -> None:
    class Seen(Kivi):
        dtypes: ClassVar[set[torch.dtype]] = set()

        def key(self, x: Tensor, layer: int) -> Tensor:
            self.dtypes.add(x.dtype)
            return super().key(x, layer)

    _, cache = read(tiny_llama().bfloat16(), Seen(4), token_ids(1, 170))
    assert Seen.dtypes == {torch.float32}
    assert {x.dtype for layer in cache.layers for x in (layer.keys, layer.values)} == {torch.bfloat16}


@pytest.mark.parametrize("make", [Kivi, RoundToNearest])
def test_fewer_bits_increase_the_loss(llama: Any, make: Any) -> None:
    ids = token_ids(1, 170)
    expected = exact_logits(llama, ids)
    errors = [float((read(llama, make(bits), ids)[0] - expected).square().mean()) for bits in (2, 4, 8)]
    assert errors[0] > 2 * errors[1] > 8 * errors[2] > 0


def test_sinks_and_window_are_exact_and_quantized_tokens_are_not(llama: Any) -> None:
    ids = token_ids(1, 170)
    _, cache = read(llama, Kivi(2), ids)
    _, exact = read(llama, Kivi(2), ids, Schedule(recent=1000))
    quantized = SCHEDULE.quantized(170)
    assert quantized == 128 and cache.layers[0].quantized == quantized and exact.layers[0].quantized == 0
    for side in ("keys", "values"):
        found, expected = (
            getattr(cache.layers[0], side),
            getattr(exact.layers[0], side),
        )  # the first layer's inputs do not depend on a cache
        close = (found - expected).abs().amax((0, 1, 3)) < 1e-5  # float32, calls of other sizes
        assert close[: SCHEDULE.sinks].all() and close[SCHEDULE.sinks + quantized :].all()
        assert not close[SCHEDULE.sinks : SCHEDULE.sinks + quantized].any()


def test_a_call_attends_to_its_own_tokens_exactly(llama: Any) -> None:
    ids = token_ids(1, 170)
    found, _ = read(llama, Kivi(2), ids)
    expected = exact_logits(llama, ids)
    first = SCHEDULE.first_step
    torch.testing.assert_close(found[:, :first], expected[:, :first], rtol=1e-4, atol=1e-4)  # float32 sums
    assert float((found[:, first:] - expected[:, first:]).abs().max()) > 1e-2


def test_asymmetric_rounding_by_hand() -> None:
    x = torch.tensor([1.0, 2.0, 3.5, 4.0])
    assert asymmetric(x, 2, 0).tolist() == [1.0, 2.0, 3.0, 4.0]  # levels 1, 2, 3, 4; 2.5 rounds to the even code 2
    assert asymmetric(torch.full((4,), 0.5), 2, 0).tolist() == [0.5] * 4


def test_kivi_groups_keys_over_tokens_and_values_over_channels() -> None:
    x = torch.randn(1, 1, 64, 64)
    x[..., 5] *= 1000  # one large channel, like outlier channels of real keys
    by_channel, by_token = (function(x, 0) - x for function in (Kivi(4).key, Kivi(4).value))
    others = torch.arange(64) != 5
    assert float(by_channel[..., others].abs().max()) < 0.5 < float(by_token[..., others].abs().max())


@pytest.mark.parametrize(
    ("codec", "token_bytes", "ratio"),
    [
        (Kivi(4), 80, 3.09),  # 128 elements of 5 bits
        (Kivi(3), 64, 3.82),
        (Kivi(2), 48, 5.00),
        (RoundToNearest(8), 132, 1.91),  # 128 one-byte codes, two scales
        (RoundToNearest(4), 68, 3.61),
    ],
)
def test_bytes_of_a_codec_by_hand(codec: Codec, token_bytes: int, ratio: float) -> None:
    baseline = QuantizedBlocks(codec, Schedule())
    expected = 90 * (SEALED * token_bytes + OPEN * 256)  # 30 layers of 3 heads
    assert baseline.cache_bytes(SMOLLM2, AT) == expected
    assert AT * SMOLLM2.exact_token_bytes / expected == pytest.approx(ratio, abs=5e-3)


@pytest.mark.parametrize(("bits", "token_bytes"), [(4, 72), (2, 40)])
def test_bytes_of_transformers_own_cache_by_hand(bits: int, token_bytes: int) -> None:
    baseline = Transformers("quanto", bits, first_step=132)
    exact = 124  # 8192 - 132 = 62 * 128 + 124
    assert baseline.cache_bytes(SMOLLM2, AT) == 90 * ((AT - exact) * token_bytes + exact * 256)


def test_short_caches_are_exact() -> None:
    assert QuantizedBlocks(Kivi(2), Schedule()).cache_bytes(SMOLLM2, 131) == 131 * 23_040


def test_a_missing_package_is_named_with_a_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.quality.methods.quantized_caches.PACKAGES", {"quanto": "no-such-package"})
    message = Transformers("quanto", 4, first_step=132).missing
    assert message is not None and "no-such-package" in message and "pip install" in message
