"""Rotation of keys back to the start of their segment before encoding, and of queries to match.

Rotated keys of a long context span more directions than those of a short one: a frequency that rotates little within a
short context completes full turns in a long one, and a basis fitted to all positions must give bits to all of them.
Quantized tokens are therefore divided into segments of S tokens, and a key is encoded as if the first token of its
segment were at position 0:

    x_i = R(-p) k_i,    p = S floor(i / S),    q . k_i = (R(-p) q) . x_i

with i the index of the token after the attention sinks. A basis then sees keys of S positions at any context length,
and a plan's quality does not depend on it. Attention rotates each query once per segment. The rotation is that of
RoFormer (2104.09864, equation 34), as measured in `fhopt.plan.site.Rope`: an error of the angle (1e-7 radians per
position or less) changes no dot product q . k, but makes x_i drift in proportion to p.

Letters: B batch, H query heads, G kv heads, S queries, T tokens, D head size, F frequencies, N segments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fhopt.plan.site import Rope

MAX_TOKENS = 1 << 20  # per served sequence: serving engines rotate queries up to here


@dataclass(frozen=True, eq=False)
class SegmentRotation:
    """The rotation of keys at one site, and the segment length.

    pairs int64 [2,F]: the channels (real, imaginary) of each frequency. angles float64 [F]: radians per position.
    known: cosines and sines of segments as of `phases`, used instead of the angles. slices: the channels, if evenly
    spaced. ahead float64 [B,1,1]: position offset of each sequence, its padding; None: 0.
    """

    segment: int
    pairs: Tensor
    angles: Tensor
    known: Tensor | None = None
    slices: tuple[slice, slice] | None = None
    ahead: Tensor | None = None

    @staticmethod
    def from_phases(segment: int, pairs: Tensor, phases: Tensor) -> SegmentRotation:
        """Return a query-only rotation from the result of `phases`."""
        return SegmentRotation(segment, pairs, phases.new_empty(0), phases)

    @staticmethod
    def on(rope: Rope, segment: int, device: torch.device) -> SegmentRotation:
        """Return the rotation `rope` with its tensors on a device; cached."""
        key = rope, segment, device
        if key not in _made:
            with torch.inference_mode(False):  # so that autograd can use them too
                made = _rotation(rope, segment, device)
            if type(made.angles) is not Tensor:  # fake tensors do not outlive their mode
                return made
            _made[key] = made
        return _made[key]

    def __deepcopy__(self, memo: Any) -> SegmentRotation:
        return self  # immutable

    def after_padding(self, padding: Tensor) -> SegmentRotation:
        """Return the rotation for left-padded sequences. padding: int64 [B].

        Segments of all sequences begin at the same tokens, and keys are relative to the sequence's own position there:
        a basis knows keys of one segment's positions, not of positions shifted by the padding.
        """
        made = replace(self, known=None, ahead=padding.double().view(-1, 1, 1))
        return made if self.known is None else made.with_phases(len(self.known))

    def segments(self, tokens: int) -> int:
        """Return the number of segments of `tokens` tokens."""
        return -(-tokens // self.segment)

    def of_tokens(self, tokens: int) -> tuple[Tensor, Tensor, int]:
        """Return the rotated channels [2,F], `phases` of the segments of `tokens` tokens, and tokens per segment."""
        return self.pairs, self.phases(self.segments(tokens)), self.segment

    def relative(self, keys: Tensor, places: Tensor) -> Tensor:
        """Rotate keys [B,G,T,D] back to the start of their segment. places int64 [T]: token indices after the sinks."""
        return self.rotate(keys, -self._starts(places))

    def absolute(self, keys: Tensor, places: Tensor) -> Tensor:
        """Rotate decoded keys [B,G,T,D] to their positions: the inverse of `relative`."""
        return self.rotate(keys, self._starts(places))

    def rotate_query(self, query: Tensor, segment: int) -> Tensor:
        """Rotate queries [B,H,S,D] to attend to the encoded keys of one segment."""
        if segment == 0 and not self.is_per_sequence:
            return query
        if self.known is not None:
            cos, sin = self.known[..., segment, :, :].unbind(-2)  # [F], or [B, F]
            return self._by(query, cos[..., None, None, :], sin[..., None, None, :])
        return self.rotate(query, -self._starts(torch.full((1,), segment * self.segment, device=query.device)))

    @property
    def is_per_sequence(self) -> bool:
        """Whether each sequence has its own positions."""
        return self.ahead is not None or (self.known is not None and self.known.dim() == 4)

    def rotate_queries(self, query: Tensor, segments: int, sequence: int = 0) -> Tensor:
        """Rotate queries of one sequence [1,H,S,D] to each of the first `segments` segments: [N,H,S,D]."""
        phases = self.phases(segments)
        phases = phases[sequence] if phases.dim() == 4 else phases
        cos, sin = phases[:segments, :, None, None].unbind(1)  # [N, 1, 1, F]
        return self._by(query.expand(segments, -1, -1, -1), cos, sin)

    def phases(self, segments: int) -> Tensor:
        """Return the cosines and sines that rotate queries to each segment, for at least `segments` segments.

        float32 [N,2,F], or [B,N,2,F] with left padding.
        """
        if self.known is not None and self.known.shape[-3] >= segments:
            return self.known
        count = 1 << max(4, (segments - 1).bit_length())
        if torch.compiler.is_compiling():
            return self._phases(count)
        table = _phases.setdefault(self, {})
        if count not in table:
            with torch.inference_mode(False):
                made = self._phases(count)
            if type(made) is not Tensor:
                return made
            table[count] = made
        return table[count]

    def _phases(self, segments: int) -> Tensor:
        starts = self._starts(torch.arange(segments, device=self.angles.device) * self.segment)
        phase = -(starts if self.ahead is None else starts.squeeze(1)).unsqueeze(-1) * self.angles  # [N,F], or [B,N,F]
        return torch.stack([phase.cos(), phase.sin()], -2).float()

    def with_phases(self, segments: int) -> SegmentRotation:
        """Return the rotation with precomputed phases of `segments` segments, for graphs."""
        return replace(self, known=self.phases(segments))

    def _starts(self, places: Tensor) -> Tensor:
        """Return the start positions of the tokens' segments: float64 [T], or [B,1,T]."""
        starts = (places.clamp(min=0) // self.segment * self.segment).double()
        return starts if self.ahead is None else starts - self.ahead

    def rotate(self, x: Tensor, by: Tensor) -> Tensor:
        """Rotate x [B,G,T,D] by positions, float64 [T], [1] or [B,1,T]; computes in float32, or float64 for such x."""
        phase = by.unsqueeze(-1) * self.angles  # [T, F]
        return self._by(x, phase.cos(), phase.sin())

    def _by(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate x [B,G,T,D] by cosines and sines [T,F], [1,F] or [B,1,T,F]."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin, (real, imaginary) = cos.to(dtype), sin.to(dtype), self.slices or tuple(self.pairs)
        a, b = x[..., real].to(dtype), x[..., imaginary].to(dtype)
        out = x.to(dtype, copy=True)
        out[..., real], out[..., imaginary] = a * cos - b * sin, b * cos + a * sin
        return out.to(x.dtype)


# Caches; phases are keyed by the number of segments.
_made: dict[tuple[Rope, int, torch.device], SegmentRotation] = {}
_phases: WeakKeyDictionary[SegmentRotation, dict[int, Tensor]] = WeakKeyDictionary()


def _rotation(rope: Rope, segment: int, device: torch.device) -> SegmentRotation:
    pairs = torch.tensor(rope.pairs, dtype=torch.int64).T.contiguous()
    angles = torch.tensor(rope.angles, dtype=torch.float64)
    return SegmentRotation(segment, pairs.to(device), angles.to(device), slices=_slices(rope))


def _slices(rope: Rope) -> tuple[slice, slice] | None:
    """Return the real and imaginary channels as slices; None if they are not evenly spaced."""
    real, imaginary = zip(*rope.pairs, strict=True)
    step = real[1] - real[0] if len(real) > 1 else 1
    found = slice(real[0], real[-1] + 1, step), slice(imaginary[0], imaginary[-1] + 1, step)
    channels = range(imaginary[-1] + 1)
    return found if (tuple(channels[found[0]]), tuple(channels[found[1]])) == (real, imaginary) else None
