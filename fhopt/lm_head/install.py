"""Installation of a retrieval head in a model, and its removal."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fhopt.codegen.cpu import lm_head as cpu_lm_head
from fhopt.errors import FhoptError
from fhopt.lm_head.head import Head, head_fingerprint
from fhopt.lm_head.intercept import HeadHooks
from fhopt.lm_head.module import HeadReport, RetrievalHead
from fhopt.passes.recognize.find_lm_head import HeadSite

KEPT = "_fhopt_head"  # attribute of a model with a head applied
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Replaced:
    """A linear layer and the retrieval head that replaces it."""

    parent: nn.Module
    name: str
    layer: nn.Module
    head: RetrievalHead

    def remove(self) -> None:
        """Restore the linear layer."""
        setattr(self.parent, self.name, self.layer)


def apply_head(model: nn.Module, head: Head, **options: Any) -> nn.Module:
    """Make `model` compute its logits with a `RetrievalHead`, created with these options. Returns the model.

    The retrieval head replaces the linear layer; if a module computes logits in its own forward, matmuls with the
    weight are intercepted there. Greedy decoding gives the tokens of the dense head, and so does sampling with a
    `top_k` of at most `keep`. Beam search and sampling without top-k also need `estimates`, and their results differ by
    these. Weights are not copied. Applying another head replaces the first. Raises FhoptError if the head was fitted
    for another weight, or the bias is added outside of the linear layer.
    """
    unapply_head(model)
    site = head.site
    weight, bias = (_parameter(model, name) for name in (site.weight, site.bias))
    owner = _owner(model, site.module)
    assert weight is not None
    if head.fingerprint != head_fingerprint(weight, bias):
        raise FhoptError(
            f"the head was fitted for another {site.weight} ({head.dtype}, {head.site.vocabulary} rows) than "
            f"the model's ({str(weight.dtype).removeprefix('torch.')}). Fit one for these weights with: fhopt "
            "head"
        )
    if isinstance(owner, nn.Linear) and owner.weight is weight and owner.bias is not bias:
        raise FhoptError(
            f"{site.bias} is added to the output of {site.module} by a separate operation; expected it as the "
            "bias of that layer. Move it there."
        )
    if cpu_lm_head.LIBRARY.load() is None:
        log.warning("No C++ compiler was found: the head stays dense. Install g++ (or clang++) and restart.")
    module = RetrievalHead(head, weight, bias, **options)
    setattr(model, KEPT, _install(model, owner, site, module))
    return model


def _install(model: nn.Module, owner: nn.Module, site: HeadSite, head: RetrievalHead) -> _Replaced | HeadHooks:
    """Install the head where `owner` computes the logits: as a replacement, or as hooks on its forward."""
    head.train(owner.training)
    if isinstance(owner, nn.Linear) and owner.weight is head.weight:
        parent, _, name = site.module.rpartition(".")
        replaced = _Replaced(model.get_submodule(parent), name, owner, head)
        setattr(replaced.parent, name, head)
        return replaced
    own = {id(weight): name for name, weight in owner.named_parameters(remove_duplicate=False)}
    if id(head.weight) not in own:  # the weight belongs to another module: intercept matmuls in the whole model
        return _install(model, model, replace(site, module=""), head)
    return HeadHooks(owner, own[id(head.weight)], head)


def _owner(model: nn.Module, path: str) -> nn.Module:
    """Return the module that computes the matmul in its forward. Raises FhoptError."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise FhoptError(
            f"the head was fitted for a model with the module {path}, which {type(model).__name__} does not "
            "have. Fit one for this model with: fhopt head"
        ) from error


def unapply_head(model: nn.Module) -> nn.Module:
    """Undo `apply`, if it was called. Returns the model."""
    applied: _Replaced | HeadHooks | None = getattr(model, KEPT, None)
    if applied is not None:
        applied.remove()
        delattr(model, KEPT)
    return model


def applied_head(model: nn.Module) -> RetrievalHead:
    """Return the module that `apply` installed in the model. Raises FhoptError without one."""
    applied: _Replaced | HeadHooks | None = getattr(model, KEPT, None)
    if applied is None:
        raise FhoptError(
            f"no head is applied to {type(model).__name__}. Call fhopt.lm_head.apply_head(model, head) first."
        )
    return applied.head


def head_report(model: nn.Module) -> HeadReport:
    """Return counts and bytes of the applied head so far. Raises FhoptError without one."""
    return applied_head(model).report()


def _parameter(model: nn.Module, name: str) -> Tensor | None:
    if not name:
        return None
    try:
        return model.get_parameter(name)
    except AttributeError as error:
        raise FhoptError(
            f"the head was fitted for a model with the parameter {name}, which {type(model).__name__} does "
            "not have. Fit one for this model with: fhopt head"
        ) from error
