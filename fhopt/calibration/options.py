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

DEFAULT_TEXTS = ("topics", "source", "docstrings", "mixture")  # what every machine has: see `fhopt.texts.tokens`
RECENT_SHARE, LEAST_RECENT, MOST_RECENT = 32, 64, 1024  # of the context: a residual window's size where none is given
SEGMENT = 512  # tokens of a segment: as the first that means are of, more than `mean_tokens` and the sinks
DECIDED_BY_STATISTICS = (  # options that a file of statistics has decided; it was made for `tokens`, no more
    "texts", "sequences", "rate_sequences", "context", "recent", "sinks", "mean_tokens", "segment", "seed",
)  # fmt: skip
LEAST_FAR_TOKENS = 512  # with fewer, the moments say more about the sample than about the model


@dataclass(frozen=True)
class FitOptions:
    """Options of calibration and fitting, beside the model.

    texts: calibration texts, read in turn. sequences, rate_sequences: how many calibration sequences of `context`
    tokens the bases are fitted to, and how many more the bits. tokens: length of context that the plan is made for, at
    which its size is counted. recent: None for a share of these (`recent_tokens`). device: what the plan will run on,
    for layouts that differ in arithmetic. mean_tokens: of the plan (see `LatentPlan`). segment: keys are encoded
    relative to segments of that many tokens (fhopt/plan/segment_rotation.py); 0: they are not; None: as
    `segment_tokens` says.
    kernel_shapes: how many different kernels the sites of a plan need, at most (None: few on a GPU, else any).
    code: how bit groups are quantized, one of `fhopt.fitting.codes.CHOICES`; auto: trellis
    codes from a ratio of 5 on, in KV caches on CPUs; uniformly with `mean_tokens` 0, as plans to be exported have it.
    checkpoint: file that lets an interrupted calibration go on. The other options are those of `fhopt.fitting.fit`.
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
        """Raise FhoptError for values that cannot work, before anything slow starts."""
        self.check_sizes()
        far = self.sequences * max(0, self.context - self.sinks - self.near_tokens)
        if far < LEAST_FAR_TOKENS or self.rate_sequences < 1:
            raise FhoptError(
                f"{self.sequences} + {self.rate_sequences} sequences of {self.context} tokens leave {far} beyond sinks "
                f"and recent tokens to calibrate on; expected at least {LEAST_FAR_TOKENS}, and one more sequence to "
                "choose bits by. Use more or longer sequences."
            )

    def check_sizes(self) -> None:
        """Check what does not depend on the sample: sizes, layout, device. Raises FhoptError."""
        if self.device is not None:
            find_device(self.device)
        check_options(self.ratio, self.layout, self.bits, self.device, chosen(self.code, self.ratio, is_read=False))
        if self.mean_tokens < 0:
            raise FhoptError(f"means of {self.mean_tokens} tokens; expected 0, for none, or more. Try 256.")
        if not 0 <= self.segment_tokens <= MAX_SEGMENT or self.segment_tokens % MIN_SEGMENT:
            raise FhoptError(
                f"segments of {self.segment} tokens; expected 0, for none, or a multiple of {MIN_SEGMENT} up to "
                f"{MAX_SEGMENT}. Try {SEGMENT}."
            )
        if self.kernel_shapes is not None and self.kernel_shapes < 1:
            raise FhoptError(f"{self.kernel_shapes} kernel shapes; expected 1 or more. Try 4.")
        if self.window.quantized_tokens(self.tokens) == 0:
            raise FhoptError(
                f"a context of {self.tokens} tokens has none beyond sinks and window; expected at least "
                f"{self.window.first_length}. Make the plan for a longer context."
            )

    @property
    def window(self) -> ResidualWindow:
        """Which tokens of a sequence are not quantized. Raises FhoptError for sizes that cannot be."""
        return ResidualWindow(self.sinks, self.recent_tokens, self.block, self.window_bits)

    @property
    def recent_tokens(self) -> int:
        """Newest tokens in the residual window: as given, else `tokens` / 32 in whole blocks, between 64 and 1,024.

        256 at 8,192 tokens: in 8 bits, an eighth of the bytes of a plan of 8x.
        """
        if self.recent is not None:
            return self.recent
        share = self.tokens // RECENT_SHARE // self.block * self.block
        return max(LEAST_RECENT, min(MOST_RECENT, share))

    @property
    def near_tokens(self) -> int:
        """Newest tokens that calibration takes for exact: those of the window, but at most a quarter of a sequence."""
        return self.recent if self.recent is not None else min(self.recent_tokens, max(1, self.context // 4))

    @property
    def segment_tokens(self) -> int:
        """Tokens of a segment: as given, else 512.

        0 for plans without means or bits, which stand in graphs, and for GPUs, where no kernel turns queries. Where
        positions are those in images a calibration has none, either.
        """
        if self.segment is not None:
            return self.segment
        on_gpu = self.device is not None and find_device(self.device).kind == "gpu"
        return 0 if on_gpu or not self.mean_tokens or self.is_lossless else SEGMENT

    @property
    def is_lossless(self) -> bool:
        """Whether no bits are to be chosen."""
        return self.ratio == 1 or (self.layout == "input" and self.ratio <= 2)
