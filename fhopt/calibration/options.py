"""Options of calibration and fitting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fhopt.errors import FhoptError
from fhopt.fitting.choices import AUTO, BITS, check_options
from fhopt.fitting.codes import AUTO as AUTO_CODE
from fhopt.fitting.codes import chosen
from fhopt.hardware.devices import find_device
from fhopt.plan.site_plan import MAX_SEGMENT, MIN_SEGMENT
from fhopt.plan.window import DEFAULT_WINDOW, ResidualWindow

DEFAULT_TEXTS = ("topics", "source", "docstrings", "mixture")  # available on every machine, see `fhopt.texts.tokens`
RECENT_SHARE, MIN_RECENT, MAX_RECENT = 32, 64, 1024  # default recent window: share of the context, and its limits
SEGMENT = 512  # tokens; more than `mean_tokens` plus the sinks, so the first segment holds all tokens that means are of
DECIDED_BY_STATISTICS = (  # fixed by a statistics file; plans for more than its `tokens` are refused
    "texts", "sequences", "rate_sequences", "context", "recent", "sinks", "mean_tokens", "segment", "seed",
)  # fmt: skip
MIN_FAR_TOKENS = 512  # with fewer, the moments reflect the sample more than the model


@dataclass(frozen=True)
class FitOptions:
    """Options of calibration and fitting, without the model.

    texts: calibration texts, interleaved. sequences, rate_sequences: number of calibration sequences of `context`
    tokens for fitting the bases, and of further ones for choosing the bits. tokens: target context length; the plan's
    size is counted at this length. recent: None for a share of `tokens` (`recent_tokens`). device: what the plan will
    run on; decides between layouts that differ in arithmetic. mean_tokens: of the plan (see `LatentPlan`). segment:
    encode keys relative to segments of this many tokens (fhopt/plan/segment_rotation.py); 0: do not; None: see
    `segment_tokens`. kernel_shapes: max number of different kernels for the sites of a plan (None: few on a GPU,
    otherwise unlimited). code: how bit groups are quantized, one of `fhopt.fitting.codes.CHOICES`; auto: trellis codes
    at a ratio of 5 and above, for KV caches on CPUs, but uniform with `mean_tokens` 0, as in plans for export.
    checkpoint: file from which an interrupted calibration resumes. The other options are those of `fhopt.fitting.fit`.
    """

    texts: tuple[str, ...] = DEFAULT_TEXTS
    ratio: float = 4.0
    layout: str = AUTO
    bits: tuple[int, ...] = BITS
    sequences: int = 8
    rate_sequences: int = 8
    context: int = 1024
    sinks: int = DEFAULT_WINDOW.sinks
    recent: int | None = None
    block: int = DEFAULT_WINDOW.block
    window_bits: int = DEFAULT_WINDOW.bits
    tokens: int = 8192
    seed: int = 0
    device: str | None = None
    checkpoint: Path | None = None
    mean_tokens: int = 256
    segment: int | None = None
    kernel_shapes: int | None = None
    code: str = AUTO_CODE

    def check(self) -> None:
        """Raise FhoptError for invalid values, before anything slow starts."""
        self.check_sizes()
        far = self.sequences * max(0, self.context - self.sinks - self.near_tokens)
        if far < MIN_FAR_TOKENS or self.rate_sequences < 1:
            raise FhoptError(
                f"{self.sequences} + {self.rate_sequences} sequences of {self.context} tokens leave {far} "
                f"tokens after sinks and residual window to calibrate on; expected at least {MIN_FAR_TOKENS}, "
                "and one more sequence for the bit allocation. Use more or longer sequences."
            )

    def check_sizes(self) -> None:
        """Check what does not depend on the sample: sizes, layout, device. Raises FhoptError."""
        if self.device is not None:
            find_device(self.device)
        check_options(self.ratio, self.layout, self.bits, self.device, chosen(self.code, self.ratio, is_read=False))
        if self.mean_tokens < 0:
            raise FhoptError(f"mean_tokens is {self.mean_tokens}; expected 0 (none) or more. Try 256.")
        if not 0 <= self.segment_tokens <= MAX_SEGMENT or self.segment_tokens % MIN_SEGMENT:
            raise FhoptError(
                f"segment is {self.segment}; expected 0 (none) or a multiple of {MIN_SEGMENT} up to "
                f"{MAX_SEGMENT}. Try {SEGMENT}."
            )
        if self.kernel_shapes is not None and self.kernel_shapes < 1:
            raise FhoptError(f"kernel_shapes is {self.kernel_shapes}; expected at least 1. Try 4.")
        if self.window.quantized_tokens(self.tokens) == 0:
            raise FhoptError(
                f"a context of {self.tokens} tokens is covered by sinks and residual window; expected at "
                f"least {self.window.first_length}. Raise --tokens."
            )

    @property
    def window(self) -> ResidualWindow:
        """Which tokens of a sequence are not quantized. Raises FhoptError for invalid sizes."""
        return ResidualWindow(self.sinks, self.recent_tokens, self.block, self.window_bits)

    @property
    def recent_tokens(self) -> int:
        """Number of newest tokens in the recent window: `recent`, else `tokens` / 32 in whole blocks, from 64 to 1,024.

        The default at 8,192 tokens is 256; with an 8-bit window this is 1/8 of the bytes of an 8x plan.
        """
        if self.recent is not None:
            return self.recent
        share = self.tokens // RECENT_SHARE // self.block * self.block
        return max(MIN_RECENT, min(MAX_RECENT, share))

    @property
    def near_tokens(self) -> int:
        """Newest tokens that calibration treats as exact: the window, by default at most a quarter of a sequence."""
        return self.recent if self.recent is not None else min(self.recent_tokens, max(1, self.context // 4))

    @property
    def segment_tokens(self) -> int:
        """Tokens per segment: `segment` if given, else 512.

        0 for plans without means or without bits, which run inside graphs, and for GPUs, which have no kernel that
        rotates queries per segment. Calibration data with image positions have no segments either
        (`CalibrationData.has_segments`).
        """
        if self.segment is not None:
            return self.segment
        on_gpu = self.device is not None and find_device(self.device).kind == "gpu"
        return 0 if on_gpu or not self.mean_tokens or self.is_lossless else SEGMENT

    @property
    def is_lossless(self) -> bool:
        """Whether the plan quantizes nothing."""
        return self.ratio == 1 or (self.layout == "input" and self.ratio <= 2)
