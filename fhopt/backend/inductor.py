"""Compilation of rewritten graphs with inductor, and the keys for its cache of compiled graphs."""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fhopt.codegen.cpu import graph_kernels
from fhopt.passes.graph.transforms import transformed_nodes
from fhopt.version import __version__

Compiled = Callable[..., Any]


def takes_gradients(graph: fx.Graph) -> bool:
    """Return whether gradients are enabled now or somewhere in the graph."""
    turns_on = any(n.target is torch._C._set_grad_enabled and n.args[0] for n in graph.nodes)
    return turns_on or torch.is_grad_enabled()


@dataclass(frozen=True)
class InductorCompiler:
    """Inductor with the user's mode and options. products: whether fhopt's kernels may run matmuls."""

    mode: str | None
    options: Mapping[str, Any]
    products: bool = True

    def now(self, module: fx.GraphModule, example_inputs: list[Any]) -> Compiled:
        """Compile the graph that Dynamo is tracing."""
        from torch._inductor.compile_fx import compile_fx

        if not takes_gradients(module.graph):
            module = graph_kernels.call_kernels(module, self._products(), fixed=transformed_nodes(module.graph))
        compiled: Any = compile_fx(module, example_inputs, config_patches=self._patches(module) or None)
        return compiled

    def later(self, module: fx.GraphModule) -> Compiled:
        """Compile a graph outside of Dynamo's tracing, at its first call."""
        return torch.compile(module, backend="inductor", options=self._patches(module) or None)

    def _products(self) -> bool:
        """Return whether fhopt's kernels may run matmuls: not if inductor is to tune or freeze them."""
        options = self._all_options()
        return self.products and not any(options.get(k) for k in ("max_autotune", "max_autotune_gemm", "freezing"))

    def _all_options(self) -> dict[str, Any]:
        from torch._inductor import list_mode_options

        return {**(list_mode_options(self.mode) if self.mode else {}), **self.options}

    def _patches(self, module: fx.GraphModule) -> dict[str, Any]:
        patches = self._all_options()
        ours = cacheable(module.graph)
        if ours:
            patches["unsafe_marked_cacheable_functions"] = {
                **patches.get("unsafe_marked_cacheable_functions", {}), **ours,
            }  # fmt: skip
        return patches


def cacheable(graph: fx.Graph) -> dict[str, str]:
    """Map fhopt's functions in a graph to cache keys, so that inductor can cache compiled graphs.

    Everything else that depends on the plan is a constant or an input of the graph.
    """
    targets: dict[Any, None] = {n.target: None for n in graph.nodes if n.op == "call_function"}
    ours = [t for t in targets if str(getattr(t, "__module__", "")).startswith("fhopt") and hasattr(t, "__name__")]
    return {f"{t.__module__}.{t.__name__}": f"{__version__}-{_source_digest(t.__module__)}" for t in ours}


@functools.cache
def _source_digest(name: str) -> str:
    """Hash a module and the packages whose code its functions may call."""
    root, own = Path(__file__).parents[1], str(importlib.import_module(name).__file__)
    called = [path for package in ("ops", "attention", "cache") for path in sorted((root / package).glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in (Path(own), *called))).hexdigest()[:16]
