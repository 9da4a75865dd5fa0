"""Command line `fhopt`: one module per group of commands."""

from fhopt.cli import (  # importing them registers their commands
    bench,
    chat,
    demo,
    doctor,
    export,
    fit,
    generate,
    head,
    heal,
    inspect,
    measure,
    models,
    plans,
)
from fhopt.cli.app import main

__all__ = [
    "bench",
    "chat",
    "demo",
    "doctor",
    "export",
    "fit",
    "generate",
    "head",
    "heal",
    "inspect",
    "main",
    "measure",
    "models",
    "plans",
]
