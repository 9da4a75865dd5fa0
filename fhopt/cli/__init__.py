"""The command line `fhopt`: one module for each group of commands."""

from fhopt.cli import demo, export, fit, inspect, measure, plans  # they register their commands
from fhopt.cli.app import main

__all__ = ["demo", "export", "fit", "inspect", "main", "measure", "plans"]
