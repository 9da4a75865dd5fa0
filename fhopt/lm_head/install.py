"""Putting a retrieval head into a model, and taking it out."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fhopt.codegen.cpu import lm_head as cpu_lm_head
from fhopt.errors import FhoptError
from fhopt.lm_head.head import Head, fingerprint
from fhopt.lm_head.intercept import HeadHooks
from fhopt.lm_head.module import Report, RetrievalHead
from fhopt.passes.recognize.find_lm_head import HeadSite

KEPT = "_fhopt_head"  # attribute of a model with a head applied
log = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------- models


@dataclass(frozen=True)
class _Replaced:
    """A head in the place of a linear layer."""

    parent: nn.Module
    name: str
    before: nn.Module
    after: RetrievalHead

    def remove(self) -> None:
        """Put the layer back."""
        setattr(self.parent, self.name, self.before)


def apply(model: nn.Module, head: Head, **options: Any) -> nn.Module:
    """Let `model` compute its logits by a `RetrievalHead` (see there for the options); returns the model.

    It takes the place of the linear layer of the head; where a module makes logits in its own forward, products with
    the weight are searched there. Greedy decoding gives the tokens of the dense head, and so does sampling with `top_k`
    where `keep` is no less. Beams and sampling without top-k also need `estimates`, and differ by those. Weights stay
    where they are. Applying another head replaces the first. Raises FhoptError when the model has another head, or one
    whose bias is added in a call of its own.
    """
    unapply(model)
    site = head.site
    weight, bias = (_parameter(model, name) for name in (site.weight, site.bias))
    owner = _owner(model, site.module)
    assert weight is not None
    if head.fingerprint != fingerprint(weight, bias):
        raise FhoptError(
            f"the head was coded for another {site.weight} ({head.dtype}, {head.site.vocabulary} rows) than this "
            f"{str(weight.dtype).removeprefix('torch.')} one. Make one for these weights with: fhopt head"
        )
    if isinstance(owner, nn.Linear) and owner.weight is weight and owner.bias is not bias:
        raise FhoptError(
            f"{site.bias} is added to what {site.module} gives in a call of its own. Expected it as the bias of that "
            "layer, where a search knows of it."
        )
    if cpu_lm_head.library() is None:
        log.warning("No C++ compiler was found: the head stays dense. Install g++ (or clang++) and start again.")
    after = RetrievalHead(head, weight, bias, **options)
    setattr(model, KEPT, _put(model, owner, site, after))
    return model


def _put(model: nn.Module, owner: nn.Module, site: HeadSite, after: RetrievalHead) -> _Replaced | HeadHooks:
    """The head where `owner` makes the logits: in its place, or in its forward."""
    after.train(owner.training)
    if isinstance(owner, nn.Linear) and owner.weight is after.weight:
        parent, _, name = site.module.rpartition(".")
        replaced = _Replaced(model.get_submodule(parent), name, owner, after)
        setattr(replaced.parent, name, after)
        return replaced
    own = {id(weight): name for name, weight in owner.named_parameters(remove_duplicate=False)}
    if id(after.weight) not in own:  # the weight is of a module beside: watch the whole model
        return _put(model, model, replace(site, module=""), after)
    return HeadHooks(owner, own[id(after.weight)], after)


def _owner(model: nn.Module, path: str) -> nn.Module:
    """The module in whose forward the product is. Raises FhoptError."""
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise FhoptError(
            f"the head is of a model with the module {path}, which {type(model).__name__} has not. Make one for this "
            "model with: fhopt head"
        ) from error


def unapply(model: nn.Module) -> nn.Module:
    """Take `apply` back; a model without it is left as it is. Returns the model."""
    applied: _Replaced | HeadHooks | None = getattr(model, KEPT, None)
    if applied is not None:
        applied.remove()
        delattr(model, KEPT)
    return model


def applied_head(model: nn.Module) -> RetrievalHead:
    """The module that `apply` put into the model. Raises FhoptError without one."""
    applied: _Replaced | HeadHooks | None = getattr(model, KEPT, None)
    if applied is None:
        raise FhoptError(f"no head is applied to {type(model).__name__}. Call fhopt.head.apply(model, head) first.")
    return applied.after


def report(model: nn.Module) -> Report:
    """What the applied head has done so far. Raises FhoptError without one."""
    return applied_head(model).report()


def _parameter(model: nn.Module, name: str) -> Tensor | None:
    if not name:
        return None
    try:
        return model.get_parameter(name)
    except AttributeError as error:
        raise FhoptError(
            f"the head is of a model with the parameter {name}, which {type(model).__name__} has not. "
            "Make one for this model with: fhopt head"
        ) from error
