"""FP8 and NVFP4: values and bytes."""

from __future__ import annotations

import pytest
import torch
from baseline_caches import keys_with_outliers, relative_error

from benchmarks.quality.methods.float_codecs import Fp8, Nvfp4, e2m1, e4m3
from benchmarks.quality.methods.quantized_caches import Codec


def test_e2m1_by_hand() -> None:
    x = torch.tensor([0.2, 0.3, -0.8, 1.6, 2.4, 3.6, 4.9, 5.1, -100.0])
    assert e2m1(x).tolist() == pytest.approx([0, 0.5, -1, 1.5, 2, 4, 4, 6, -6])


def test_e4m3_has_three_bits_of_mantissa_and_no_infinity() -> None:
    assert e4m3(torch.tensor([1.0, 1.1, 17.0, 500.0, -1e9])).tolist() == [1, 1.125, 16, 448, -448]


@pytest.mark.parametrize("codec", [Fp8(32), Nvfp4(32)], ids=lambda codec: codec.name)
@pytest.mark.parametrize("structured", [True, False])
def test_errors_agree_with_the_format(codec: Codec, structured: bool) -> None:
    x = keys_with_outliers() if structured else torch.randn(1, 2, 64, 64)
    found = codec.key(x, 0)
    assert torch.equal(found, codec.value(x, 0)) and found.shape == x.shape
    # relative steps are 2^-3 to 2^-4, an error of 1/8 of a step; in e2m1 1/4 to 1/2
    assert relative_error(found, x) < (2e-3 if isinstance(codec, Fp8) else 2e-2)


@pytest.mark.parametrize("codec", [Fp8(32), Nvfp4(32)], ids=lambda codec: codec.name)
def test_rounding_is_idempotent(codec: Codec) -> None:
    once = codec.key(torch.randn(1, 2, 64, 64), 0)
    torch.testing.assert_close(codec.key(once, 0), once, rtol=1e-5, atol=1e-6)  # float32 scales
    assert torch.equal(codec.key(torch.zeros(1, 2, 32, 64), 0), torch.zeros(1, 2, 32, 64))


def test_blocks_of_tokens_have_separate_scales() -> None:
    x = torch.randn(1, 1, 64, 16)
    x[:, :, :32] *= 1e6
    assert relative_error(Fp8(32).key(x, 0)[:, :, 32:], x[:, :, 32:]) < 2e-3
    assert torch.equal(Fp8(32).key(x, 0)[:, :, 32:], Fp8(32).key(x[:, :, 32:], 0))


def test_bytes_by_hand() -> None:
    x = torch.randn(1, 1, 64, 64)
    codes = x.to(torch.float8_e4m3fn)
    assert Fp8(64).token_bytes(64) * 64 == 2 * (codes.nbytes + 4)  # one scale per block
    assert Nvfp4(64).token_bytes(64) * 64 == 2 * (64 * 64 // 2 + codes[..., ::16].nbytes + 4)
    assert Nvfp4(64).token_bytes(64) * 8 / 128 == pytest.approx(4.5, abs=0.01)
