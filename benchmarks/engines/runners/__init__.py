"""Runners of one engine each: `python -m benchmarks.engines.runners.run_<engine> REQUEST` in its environment.

Names begin with `run_`: a module named like the library it imports would shadow that library for programs in this
folder. Modules of benchmarks imported here import only the standard library.
"""
