"""torch.compile backend: `torch.compile(model, backend="flashhead")`."""

from fhopt.backend.compile import flashhead

__all__ = ["flashhead"]
