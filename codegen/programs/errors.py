"""The exception of graphs that decode programs cannot run."""

from __future__ import annotations


class UnsupportedError(Exception):
    """A decode step does what programs do not support. The message says what."""
