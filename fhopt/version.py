"""The version of fhopt."""

__version__ = "0.1.0"
