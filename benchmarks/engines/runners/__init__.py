"""One measurement with one engine: `python -m benchmarks.engines.runners.run_<engine> REQUEST` in its environment.

Names begin with `run_`: a module with the name of the library that it imports would hide it from a program beside it.
What is imported of benchmarks here imports nothing but the standard library.
"""
