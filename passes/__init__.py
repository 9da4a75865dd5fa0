"""The compiler on one page.

    decompose        composites (nn.MultiheadAttention, flex, checkpoints) -> their parts     exact
    functionalize    in-place changes -> new values, written back at the end                  exact
    normalize        every spelling of attention -> fhopt::attention          exact, checked by execution
    find_attention   who projects, rotates, caches -> AttentionSite           reads only
    absorb_projection  attention of models that keep latents reads these      exact, where it pays, inference only
    compress         keys, values -> decode(encode(.)) by the plan            approximate only where the plan says so
    latent_buffers   K/V buffers of a module -> a cache of latents            likewise
    absorb           decode moves onto q and o -> fhopt::latent_attention     exact
    lower            canonical ops -> torch ops for inductor                  exact

Every pass works on a private copy of the graph (a `Program`), has `candidates`, `match` (raises `Miss` with a reason)
and `rewrite` (cannot fail). The pipeline here is the only place that times, dumps and verifies.
"""

from fhopt.passes.graph.program import Program
from fhopt.passes.outcome import Explanation, Outcome
from fhopt.passes.pipeline import absorb_projections, find, merge, optimize
from fhopt.passes.stages import watched

__all__ = ["Explanation", "Outcome", "Program", "absorb_projections", "find", "merge", "optimize", "watched"]
