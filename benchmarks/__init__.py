"""Programs that measure fhopt: `python -m benchmarks.<package>.<program>` from the root of the repository.

Each writes its rows to benchmarks/results through benchmarks/recording.py; `make help` lists them.
"""
