"""The graph compiler: it finds attention in a graph and rewrites it, exactly or by a plan.

`pipeline` runs the passes. `prepare`, `recognize` and `rewrite` hold them, `graph` what they share. README.md has their
contract.
"""

from fhopt.passes.pipeline import find

__all__ = ["find"]
