"""The backend of torch.compile: `torch.compile(model, backend="flashhead")`."""

from fhopt.backend.compile import flashhead, last_outcome, reset
from fhopt.backend.settings import Settings

__all__ = ["Settings", "flashhead", "last_outcome", "reset"]
