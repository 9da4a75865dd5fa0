"""Rotate keys back to the start of their segment before they are encoded, and queries to match.

Rotated keys of a long context fill more directions than those of a short one: a frequency that rotates little within a
short context goes all the way round in a long one, and a basis that is fitted to all positions has to give bits to all
of them. So quantized tokens are cut into segments of S tokens, and a key is encoded as it would be if the first token
of its segment were at position 0:

    x_i = R(-p) k_i,    p = S floor(i / S),    q . k_i = (R(-p) q) . x_i

with i the number of the token after the attention sinks. A basis then sees keys of S positions, however long the
context is, and a plan is as good in a long context as in a short one. Attention rotates each query once per segment.
The rotation is that of RoFormer (2104.09864, equation 34), as `fhopt.plan.site.Rope` has measured it: what is missing
of an angle (1e-7 radians a position and less) changes no product q . k, but lets x_i drift as far as p is.

Letters: B batch, H query heads, G kv heads, S queries, T tokens, D head size, F frequencies, N segments.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fhopt.plan.site import Rope

MAX_TOKENS = 1 << 20  # of a served sequence: queries of a serving engine are rotated up to here


@dataclass(frozen=True, eq=False)
class SegmentRotation:
    """The rotation of keys at one site, and the tokens of a segment.

    pairs int64 [2,F]: the channels (real, imaginary) of each frequency. angles float64 [F]: radians a position, or
    known: cosines and sines of segments, as of `phases`. slices: the channels, where they lie evenly. ahead float64
    [B,1,1]: by how many positions tokens of each sequence are behind their places, which is its padding; None: by none.
    """

    segment: int
    pairs: Tensor
    angles: Tensor
    known: Tensor | None = None
    slices: tuple[slice, slice] | None = None
    ahead: Tensor | None = None

    @staticmethod
    def from_phases(segment: int, pairs: Tensor, phases: Tensor) -> SegmentRotation:
        """Return a rotation for queries only, from what `phases` returned."""
        return SegmentRotation(segment, pairs, phases.new_empty(0), phases)

    @staticmethod
    def on(rope: Rope, segment: int, device: torch.device) -> SegmentRotation:
        """Return the rotation `rope` with its numbers on a device, made once."""
        key = rope, segment, device
        if key not in _made:
            with torch.inference_mode(False):  # others may train with them
                made = _rotation(rope, segment, device)
            if type(made.angles) is not Tensor:  # of a fake mode, which ends
                return made
            _made[key] = made
        return _made[key]

    def __deepcopy__(self, memo: Any) -> SegmentRotation:
        return self  # what is frozen needs no copies

    def after_padding(self, padding: Tensor) -> SegmentRotation:
        """Return the same for sequences that begin with padding: int64 [B].

        A segment of a sequence begins where it begins for the batch, and its keys are relative to that position of
        their own: a basis knows keys of the positions of one segment, not of those that are `padding` ahead of it.
        """
        made = replace(self, known=None, ahead=padding.double().view(-1, 1, 1))
        return made if self.known is None else made.with_phases(len(self.known))

    def segments(self, tokens: int) -> int:
        """Return how many segments so many tokens are in."""
        return -(-tokens // self.segment)

    def of_tokens(self, tokens: int) -> tuple[Tensor, Tensor, int]:
        """Return the rotated channels [2,F], `phases` of the segments of that many tokens, and tokens of a segment."""
        return self.pairs, self.phases(self.segments(tokens)), self.segment

    def relative(self, keys: Tensor, places: Tensor) -> Tensor:
        """Rotate keys [B,G,T,D] back to the start of their segment. places int64 [T]: their numbers after the sinks."""
        return self.rotate(keys, -self._starts(places))

    def absolute(self, keys: Tensor, places: Tensor) -> Tensor:
        """Rotate decoded keys [B,G,T,D] to their positions: the inverse of `relative`."""
        return self.rotate(keys, self._starts(places))

    def rotate_query(self, query: Tensor, segment: int) -> Tensor:
        """Rotate queries [B,H,S,D] to attend to the encoded keys of segment number `segment`."""
        if segment == 0 and not self.is_per_sequence:
            return query
        if self.known is not None:
            cos, sin = self.known[..., segment, :, :].unbind(-2)  # [F], or [B, F]
            return self._by(query, cos[..., None, None, :], sin[..., None, None, :])
        return self.rotate(query, -self._starts(torch.full((1,), segment * self.segment, device=query.device)))

    @property
    def is_per_sequence(self) -> bool:
        """Return whether each sequence has positions of its own."""
        return self.ahead is not None or (self.known is not None and self.known.dim() == 4)

    def rotate_queries(self, query: Tensor, segments: int, sequence: int = 0) -> Tensor:
        """Rotate queries of one sequence [1,H,S,D] of a batch to each of the first segments: [N,H,S,D]."""
        phases = self.phases(segments)
        phases = phases[sequence] if phases.dim() == 4 else phases
        cos, sin = phases[:segments, :, None, None].unbind(1)  # [N, 1, 1, F]
        return self._by(query.expand(segments, -1, -1, -1), cos, sin)

    def phases(self, segments: int) -> Tensor:
        """Return the cosines and sines that rotate queries to each of at least `segments` segments.

        float32 [N,2,F], or [B,N,2,F] of sequences that begin with padding.
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
        """Return the same with the phases of `segments` segments, for a graph that does not compute them."""
        return replace(self, known=self.phases(segments))

    def _starts(self, places: Tensor) -> Tensor:
        """Return the positions at which the segments of places begin: float64 [T], or [B,1,T]."""
        starts = (places.clamp(min=0) // self.segment * self.segment).double()
        return starts if self.ahead is None else starts - self.ahead

    def rotate(self, x: Tensor, by: Tensor) -> Tensor:
        """Rotate x [B,G,T,D] by positions, float64 [T], [1] or [B,1,T]; computes in float32, or float64 like x."""
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


# What is made once; phases by how many segments they are of.
_made: dict[tuple[Rope, int, torch.device], SegmentRotation] = {}
_phases: WeakKeyDictionary[SegmentRotation, dict[int, Tensor]] = WeakKeyDictionary()


def _rotation(rope: Rope, segment: int, device: torch.device) -> SegmentRotation:
    pairs = torch.tensor(rope.pairs, dtype=torch.int64).T.contiguous()
    angles = torch.tensor(rope.angles, dtype=torch.float64)
    return SegmentRotation(segment, pairs.to(device), angles.to(device), slices=_slices(rope))


def _slices(rope: Rope) -> tuple[slice, slice] | None:
    """Return the real and the imaginary channels as slices; None where they are no two even rows."""
    real, imaginary = zip(*rope.pairs, strict=True)
    step = real[1] - real[0] if len(real) > 1 else 1
    found = slice(real[0], real[-1] + 1, step), slice(imaginary[0], imaginary[-1] + 1, step)
    channels = range(imaginary[-1] + 1)
    return found if (tuple(channels[found[0]]), tuple(channels[found[1]])) == (real, imaginary) else None
