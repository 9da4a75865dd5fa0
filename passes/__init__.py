"""The graph compiler: detects attention in a graph and rewrites it, exactly or according to a plan.

`pipeline` runs the passes. `prepare`, `recognize` and `rewrite` contain them, `graph` their shared code. README.md
describes the contract of a pass.
"""

from fhopt.passes.pipeline import find_attentions

__all__ = ["find_attentions"]
