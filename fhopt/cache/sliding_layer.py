"""The cache layer of a sliding window or chunk: packed latents are dropped once no query can see them.

fhopt/plan/window.py says what is held when, and when attention sinks are quantized. transformers' masks for its own
sliding layers fit: attention gets the newest `sliding_window` - 1 tokens, followed by the new ones.

Letters: B batch, G kv heads, S new tokens, D head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fhopt.cache.base_layer import check_crop
from fhopt.cache.dynamic_layer import LatentLayer
from fhopt.errors import FhoptError
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import SitePlan

DROPPED, SLIDES = "dropped", "slides"  # counters in files


class SlidingLatentLayer(LatentLayer):
    """A layer in which attention uses the newest `sliding_window` - 1 tokens and the new ones.

    dropped: number of tokens no longer held. slides: a token has left the window, and there are no attention sinks.
    record_past: only `crop` drops tokens (`activate_past_recording`).
    """

    is_sliding = True

    def __init__(self, plan: LatentPlan, site: SitePlan, sliding_window: int, absorb: bool = True) -> None:
        if site.segment:
            raise FhoptError(
                f"{site.site.name}: the plan encodes keys relative to segments; expected none in "
                "sliding-window attention. Fit the plan for this model again."
            )
        self.whole_window = plan.window.within(sliding_window)
        self.sliding_window, self.record_past = sliding_window, False
        self.dropped, self.slides = 0, False
        super().__init__(plan, site, absorb, self.whole_window)
        self._window_without_sinks = self.whole_window.without_sinks()

    def _use_pages(self, make: Any) -> None:
        """Store no sketches: attention uses all of a sliding window."""
        self.share = 1.0

    def activate_past_recording(self) -> None:
        """Hold all new tokens until `crop` is called, so that it can remove any of them."""
        self.record_past = True

    @property
    def hidden(self) -> int:
        """Number of oldest quantized tokens that attention skips."""
        return max(0, self.held - (self.sliding_window - 1)) if self.slides else 0

    def _take(self, new_keys: Tensor, new_values: Tensor) -> None:
        """Store new tokens that later queries can see."""
        length = self.get_seq_length()
        dropped = 0 if self.record_past else self.whole_window.dropped(length + new_keys.shape[2], self.sliding_window)
        if dropped <= length:
            super()._take(new_keys, new_values)
            self._slide()
            return
        if self.padding.expected is not None:  # for the means; the tokens stay in position order
            self.padding.begin(new_keys, new_values)
        if self.means is not None:
            self.means.see(new_keys, new_values, length, self.padding)
        self._hold_nothing_and_slide()
        self.dropped = dropped
        self._keep(new_keys[:, :, dropped - length :], new_values[:, :, dropped - length :])

    def _slide(self) -> None:
        """Quantize the attention sinks once the first token has left the window, and drop blocks outside of it."""
        if self.get_seq_length() < self.sliding_window:
            return
        if not self.slides and self.padding.parts:
            keys, values = self._reconstructed()
            self._hold_nothing_and_slide()
            self._keep(keys, values)
        elif not self.slides:
            self._encode(self.window_keys.take_sinks(), self.window_values.take_sinks(), self._insert)
            self.quantized += self.window.sinks
            self._begin_to_slide()
        if not self.record_past:
            self._drop()

    def _drop(self) -> None:
        """Drop blocks without a token that later queries can see."""
        leaving = self.whole_window.dropped(self.get_seq_length(), self.sliding_window) - self.dropped
        if leaving > 0:
            for packed in dict.fromkeys((self.packed_keys, self.packed_values)):
                packed.drop(leaving, self.quantized)
            self.quantized -= leaving
            self.dropped += leaving

    def _insert(self, side: str, x: Tensor) -> None:
        self._packed(side).insert(x, self.quantized)

    def _hold_nothing_and_slide(self) -> None:
        """Drop the held tokens and their padding, but not the token count, and start sliding."""
        self._hold_nothing()
        self._begin_to_slide()
        self.padding.forget()

    def _begin_to_slide(self) -> None:
        self.slides, self.window = True, self._window_without_sinks
        self.window_keys.sinks = self.window_values.sinks = 0

    def get_seq_length(self) -> int:
        """Return the number of tokens seen, held or not."""
        return self.dropped + self.held

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of the mask: the tokens that attention uses, in position order."""
        seen = self.get_seq_length()
        offset = max(0, seen - (self.sliding_window - 1))
        return seen - offset + query_length, offset

    def get_max_length(self) -> int:
        """Return the size of the sliding window."""
        return self.sliding_window

    def reset(self) -> None:
        """Drop all tokens."""
        super().reset()
        self.dropped, self.slides, self.window = 0, False, self.whole_window
        self.window_keys.sinks = self.window_values.sinks = self.window.sinks

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest -`tokens_to_remove` tokens, as `LatentLayer.crop` does.

        Raises FhoptError also if the next query would see a token that was dropped.
        """
        self.check_crop(tokens_to_remove)
        super().crop(tokens_to_remove)
        self._slide()
        self._drop()

    def check_crop(self, tokens_to_remove: int) -> None:
        """Raise FhoptError if `crop` would, without changing anything."""
        length = self.get_seq_length()
        check_crop(tokens_to_remove, length)
        first = max(0, length + tokens_to_remove - (self.sliding_window - 1))
        if tokens_to_remove and first < self.dropped:
            raise FhoptError(
                f"crop({tokens_to_remove}) of {length} tokens needs tokens from {first} on for a window of "
                f"{self.sliding_window}, but those before {self.dropped} were dropped. Call "
                "cache.activate_past_recording() before adding tokens that may be removed again."
            )

    def _counters(self) -> dict[str, Any]:
        return super()._counters() | {DROPPED: self.dropped, SLIDES: self.slides}

    def _count(self, counters: dict[str, Any]) -> None:
        self.dropped = int(counters[DROPPED])
        if counters[SLIDES]:
            self._begin_to_slide()
        super()._count(counters)
        if self.dropped < 0 or (self.dropped and not self.slides):
            raise ValueError(f"{self.dropped} tokens dropped of a window that slides: {self.slides}")
