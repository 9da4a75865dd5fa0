"""The command line `fhopt`: one module for each group of commands."""

from fhopt.cli import bench, chat, demo, export, fit, generate, inspect, measure, plans  # they register their commands
from fhopt.cli.app import main

__all__ = ["bench", "chat", "demo", "export", "fit", "generate", "inspect", "main", "measure", "plans"]
