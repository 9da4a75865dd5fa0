"""Prefill attention: when keys and values are reconstructed, and how full-precision tokens are attended to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fhopt.attention import attend, cache_view
from fhopt.codegen.gpu.configs import default_config
from fhopt.hardware.devices import DEVICES
from fhopt.ops import algebra, latent_attention, masks, packing, prefill_attention, registry
from fhopt.plan.kernel_spec import KernelSpec

# --------------------------------------------------------------------------------------------------- cost model


def test_the_cost_of_a_conversion_agrees_with_the_data_sheets() -> None:
    ratios = [DEVICES[name].matrix_tflops / DEVICES[name].vector_tflops for name in ("h100", "a100-80")]
    assert all(abs(ratio - prefill_attention.CONVERSION) < 1.5 for ratio in ratios)


@pytest.mark.parametrize("width", [64, 128, 256, 512])
def test_a_step_unpacks_codes_once_per_tile_of_its_kernel(width: int) -> None:
    tiers = ((4, width, 0.3),)
    tile = default_config(KernelSpec(tiers, tiers, width, width, "bfloat16", False), 4096).block_m
    side = 1, width
    before, after = (
        prefill_attention.absorbed_operations(1, rows, side, side, True) for rows in (4 * tile, 4 * tile + 1)
    )
    assert after - before == 2 * 2 * width + prefill_attention.CONVERSION * 2 * width


def pays_from(heads: int, groups: int, latent_heads: int, size: int, width: int, coded: bool = True) -> int | None:
    """Return the number of queries from which reconstruction is cheaper and stays so."""
    side, decoder = (latent_heads, width), (groups, size, width)
    found = [
        prefill_attention.reconstructed_operations(heads, s, decoder, decoder, coded)
        < prefill_attention.absorbed_operations(heads, s, side, side, coded)
        for s in range(1, 4097)
    ]
    return None if not found[-1] else 4096 - found[::-1].index(False)


def test_wide_latents_are_reconstructed_sooner_and_narrow_16_bit_ones_never() -> None:
    assert pays_from(32, 8, 8, 128, 128, coded=False) is None
    assert pays_from(32, 8, 8, 128, 64, coded=False) is None
    per_head, shared = pays_from(32, 8, 8, 128, 128), pays_from(32, 8, 1, 128, 512)
    assert per_head is not None and shared is not None
    assert 100 < per_head < 200  # M = 4 S: unpacked by each of about 18 tiles, or once
    assert shared < 50
    absorbed = pays_from(32, 32, 32, 128, 128)
    assert absorbed is not None and absorbed > per_head  # fewer rows share a kv head


def test_operations_follow_the_formula() -> None:
    heads, queries, groups, size, width = 8, 64, 2, 32, 48
    m, c = heads // groups * queries, prefill_attention.CONVERSION
    absorbed = prefill_attention.absorbed_operations(heads, queries, (groups, width), (groups, width), True)
    assert absorbed == groups * (2 * m * 2 * width + c * 2 * width * m / 32)
    decoder = groups, size, width
    rebuilt = prefill_attention.reconstructed_operations(heads, queries, decoder, decoder, True)
    assert rebuilt == groups * (2 * m * 2 * size + 2 * 2 * size * width + c * 2 * width)


# --------------------------------------------------------------------------------------------------- the ops


B, H, G, J, S, T, D, E = 2, 6, 3, 1, 33, 40, 24, 24
TIERS = algebra.BitGroups([8, 4, 3], [8, 16, 16], [0.06, 0.4, 0.7])


def sides(dtype: torch.dtype) -> list[Any]:
    """Make rows, scale and decoder of keys and of values."""
    found: list[Any] = []
    for size in (D, E):
        found += torch.ops.fhopt.pack(torch.randn(B, J, T, sum(TIERS[1])), *TIERS)
        found.append((torch.randn(G, size, sum(TIERS[1])) / 6).to(dtype))
    return found


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    assert found.shape == wanted.shape
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


@settings(deadline=None)
@given(kind=st.integers(0, 3), softcap=st.sampled_from([0.0, 3.0]), length=st.sampled_from([None, 0, 17, 99]))
def test_rebuilt_attention_equals_absorbed_attention(kind: int, softcap: float, length: int | None) -> None:
    rows, query = sides(torch.float64), torch.randn(B, H, S, D, dtype=torch.float64)
    mask = [None, torch.rand(S, T) > 0.5, torch.randn(B, 1, S, T).double(), torch.rand(B, 1, 1, T) > 0.5][kind]
    lengths = None if length is None else torch.tensor(length)
    options: Any = {**algebra.group_options(TIERS, TIERS), "scale": 0.3, "softcap": softcap}
    found = torch.ops.fhopt.rebuilt_attention(query, *rows, mask, lengths, **options)
    key, key_scale, key_decode, value, value_scale, value_decode = rows
    output, lse = latent_attention.latent_attention_reference(
        algebra.absorb(query, key_decode), key, key_scale, value, value_scale, mask, lengths=lengths, **options
    )
    near(found[0], algebra.expand(output, value_decode), 1e-9)
    near(found[1], lse, 1e-9)


def test_fakes_have_the_shapes_and_types_of_results() -> None:
    rows, query = sides(torch.float32), torch.randn(B, H, S, D)
    options: Any = {**algebra.group_options(TIERS, TIERS), "scale": 0.3, "softcap": 0.0}
    kinds = torch.library.opcheck(
        torch.ops.fhopt.rebuilt_attention.default, (query, *rows, None, None), options,
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    assert set(kinds.values()) == {"SUCCESS"}
    key, value = torch.randn(B, G, T, D), torch.randn(B, G, T, E)
    kinds = torch.library.opcheck(
        torch.ops.fhopt.open_attention.default, (query, key, value, None), {"scale": 0.3},
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
    assert set(kinds.values()) == {"SUCCESS"}


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Choose as on a GPU, in float32, with the CPU's flash attention; record which ops run."""
    ran: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            ran.append(name)
            return function(*args, **options)

        return call

    monkeypatch.setattr(prefill_attention, "is_gpu_prefill", lambda query, *others: query.shape[2] > 1)
    monkeypatch.setattr(prefill_attention, "is_cpu_prefill", lambda query, *others: False)
    monkeypatch.setattr(prefill_attention, "_has_flash", lambda device: True)
    monkeypatch.setattr(prefill_attention, "_flash", noted("flash", prefill_attention._flash))
    monkeypatch.setattr(
        prefill_attention,
        "rebuilt_attention_reference",
        noted("rebuilt", prefill_attention.rebuilt_attention_reference),
    )
    before = registry.use("latent_attention", "cpu", noted("step", latent_attention.latent_attention_reference))
    rebuilt = registry.use("rebuilt_attention", "cpu", None)
    yield ran
    registry.use("latent_attention", "cpu", before)
    registry.use("rebuilt_attention", "cpu", rebuilt)


@pytest.mark.parametrize("tokens", [S, S + 1, S + 30])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_full_precision_tokens_use_flash_attention_if_only_the_newest_are_masked(
    on_a_gpu: list[str], tokens: int, softcap: float
) -> None:
    query, key, value = torch.randn(B, H, S, D), torch.randn(B, G, tokens, D), torch.randn(B, G, tokens, D)
    mask = masks.causal_mask(S, tokens, query.device)
    options: Any = dict(scale=0.3, softcap=softcap)
    exact = [x.double() for x in (query, key, value)]
    plain: Any = algebra.uncoded_options()
    for causal, given_mask in ((True, mask), (False, None), (False, mask)):
        on_a_gpu.clear()
        found = prefill_attention.open_attention(query, key, value, given_mask, causal=causal, **options)
        flashes = softcap == 0.0 and (causal or given_mask is None)
        ways = 2 if causal and tokens > S else 1
        assert on_a_gpu == (["flash"] * ways if flashes else ["rebuilt"])
        wanted = latent_attention.latent_attention_reference(
            exact[0], exact[1], None, exact[2], None, given_mask, **plain, **options
        )  # fmt: skip
        near(found[0], wanted[0])
        near(found[1], wanted[1])
        assert found[1].dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "way"),
    [
        pytest.param({"size": 20}, "rebuilt", id="odd heads"),
        pytest.param({"value_size": 16}, "rebuilt", id="other values"),
        pytest.param({"queries": 8}, "step", id="few rows"),
        pytest.param({"tokens": 20}, "rebuilt", id="fewer keys than queries"),
    ],
)
def test_calls_that_flash_attention_does_not_support_go_elsewhere(
    on_a_gpu: list[str], change: dict[str, int], way: str
) -> None:
    size = {"queries": S, "tokens": T, "size": D, "value_size": D} | change
    size["value_size"] = change.get("value_size", size["size"])
    query = torch.randn(B, H, size["queries"], size["size"])
    key, value = (torch.randn(B, G, size["tokens"], size[name]) for name in ("size", "value_size"))
    found = prefill_attention.open_attention(query, key, value, None, scale=0.3)
    assert on_a_gpu == [way]
    exact = [x.double() for x in (query, key, value)]
    plain: Any = algebra.uncoded_options()
    near(
        found[0],
        latent_attention.latent_attention_reference(exact[0], exact[1], None, exact[2], None, None, **plain, scale=0.3)[
            0
        ],
    )


# --------------------------------------------------------------------------------------------------- a whole cache


def held(window: int) -> tuple[cache_view.CacheView, Tensor, Tensor]:
    """A cache of 2 sinks, T latents, `window` 8-bit tokens and S new ones, with its full-precision keys and values."""
    rows = sides(torch.float32)
    rounded = [packing.round_rows(torch.randn(B, G, window, n)) if window else None for n in (D, E)]
    key = cache_view.SideRows(TIERS, rows[0], rows[1], rows[2], rounded[0])
    value = cache_view.SideRows(TIERS, rows[3], rows[4], rows[5], rounded[1])
    return cache_view.CacheView(key, value, 2, T), torch.randn(B, G, 2 + S, D), torch.randn(B, G, 2 + S, E)


@pytest.mark.parametrize("window", [0, 7])
@pytest.mark.parametrize("masked", [False, True])
def test_a_chunk_gives_the_same_on_every_path(
    on_a_gpu: list[str], monkeypatch: pytest.MonkeyPatch, window: int, masked: bool
) -> None:
    cache, key, value = held(window)
    query = torch.randn(B, H, S, D)
    mask = torch.rand(B, 1, S, cache.length(key)) > 0.4 if masked else None
    monkeypatch.setattr(prefill_attention, "CONVERSION", 10_000)
    found = attend.attend(query, key, value, cache, mask, scale=0.3)
    codes = ["step"] * bool(window)
    assert on_a_gpu == ["rebuilt", *codes, *(["rebuilt"] if masked else ["flash", "flash"])]
    on_a_gpu.clear()
    monkeypatch.setattr(prefill_attention, "should_reconstruct", lambda *_: False)
    other = attend.attend(query, key, value, cache, mask, scale=0.3)
    assert on_a_gpu[0] == "step"
    monkeypatch.undo()
    on_a_gpu.clear()
    plain = attend.attend(query, key, value, cache, mask, scale=0.3)  # as on a CPU
    assert set(on_a_gpu) <= {"step"}
    near(found, plain)
    near(other, plain)


def test_on_cpus_in_other_dtypes_and_in_training_nothing_changes() -> None:
    query = torch.randn(B, H, S, D)
    rows = sides(torch.float32)
    assert not prefill_attention.should_reconstruct(query, rows[0], rows[2], rows[3], rows[5], None, True)
    assert not prefill_attention.is_gpu_prefill(query.bfloat16())

    class There:
        """A tensor that claims to be on a GPU."""

        is_cuda, shape, requires_grad = True, (B, H, S, D), True

        def __init__(self, dtype: torch.dtype) -> None:
            self.dtype = dtype

    with torch.no_grad():
        assert prefill_attention.is_gpu_prefill(There(torch.bfloat16))  # type: ignore[arg-type]
        assert not prefill_attention.is_gpu_prefill(There(torch.float32))  # type: ignore[arg-type]
    assert not prefill_attention.is_gpu_prefill(There(torch.bfloat16))  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- on a CPU


@pytest.fixture
def on_a_cpu() -> Iterator[list[str]]:
    """CPU kernels that record their calls, and compute like the references."""
    ran: list[str] = []

    def opened(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        ran.append("open")
        mask = masks.causal_mask(query.shape[2], key.shape[2], key.device) if options.pop("causal") else mask
        return latent_attention.latent_attention_reference(
            query, key, None, value, None, mask, **algebra.uncoded_options(), **options
        )

    def rebuilt(*args: Any, **options: Any) -> Any:
        ran.append("rebuilt")
        return prefill_attention.rebuilt_attention_reference(*args, **options)

    before = registry.use("open_attention", "cpu", opened), registry.use("rebuilt_attention", "cpu", rebuilt)
    yield ran
    registry.use("open_attention", "cpu", before[0])
    registry.use("rebuilt_attention", "cpu", before[1])


def seen(queries: int, heads: int, window: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Attend to a cache of 40 latents and `window` rounded tokens: by kernels, and in float64."""
    torch.manual_seed(queries)
    key = torch.randn(1, 2, 3 + queries, 24)
    rounded = [packing.round_rows(torch.randn(1, 2, window, 24)) if window else None for _ in "kv"]
    packed = [torch.ops.fhopt.pack(torch.randn(1, 2, 40, 40), *TIERS) for _ in "kv"]
    decoders = torch.randn(2, 2, 24, 40) / 6

    def latents_in(dtype: torch.dtype) -> cache_view.CacheView:
        key, value = (
            cache_view.SideRows(TIERS, codes, scale, decoders[i].to(dtype), rounded[i])
            for i, (codes, scale) in enumerate(packed)
        )
        return cache_view.CacheView(key, value, 3, 40)

    latents, query = latents_in(torch.float32), torch.randn(1, heads, queries, 24)
    mask = None if causal else torch.rand(queries, latents.length(key)) < 0.7
    with torch.no_grad():
        found = attend.attend(query, key, key, latents, mask, scale=0.2)
    wide = latents_in(torch.float64)
    exact = key.double()
    return found, attend.attend(query.double(), exact, exact, wide, mask, scale=0.2)


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "heads", "runs"), [(96, 4, "ro"), (16, 4, "o"), (15, 4, ""), (16, 24, "ro")])
def test_many_queries_use_reconstructed_keys_and_values(
    on_a_cpu: list[str], window: int, causal: bool, queries: int, heads: int, runs: str
) -> None:
    found, wanted = seen(queries, heads, window, causal)
    near(found, wanted, 1e-4)
    rebuilt = ["rebuilt"] * (1 + (window > 0)) if "r" in runs else []
    assert on_a_cpu == rebuilt + (["open"] if "o" in runs else [])


def test_gradients_and_graphs_do_not(on_a_cpu: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    query = torch.randn(1, 2, 20, 8, requires_grad=True)
    options: Any = {"causal": False, "scale": 0.3, "softcap": 0.0}
    assert prefill_attention.attend_on_cpu("open_attention", query, query, query, None, **options) is None
    with torch.no_grad():
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert prefill_attention.attend_on_cpu("open_attention", query, query, query, None, **options) is None
    assert not on_a_cpu


def test_an_unsupported_call_is_left_to_others(on_a_cpu: list[str]) -> None:
    registry.use("open_attention", "cpu", lambda *args, **options: None)
    registry.use("rebuilt_attention", "cpu", lambda *args, **options: None)
    near(*seen(96, 4, 24, True), 1e-4)
    assert not on_a_cpu
