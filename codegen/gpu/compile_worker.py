"""Worker process that compiles Triton kernels: `python -m fhopt.codegen.gpu.compile_worker`.

It is separate because Triton's interpreter and its compiler cannot share a process.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fhopt.codegen.gpu.machine_code import read_resources
from fhopt.codegen.gpu.resources import CompileRequest, Resources


def compile_order() -> None:
    """Load an order from standard input, compile, and write a line per kernel to standard output."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of Triton and its tools goes to stderr
    order = json.load(sys.stdin)
    with tempfile.TemporaryDirectory(prefix="fhopt-") as folder:
        for i, fields in enumerate(order["requests"]):
            resources = _resources(CompileRequest.from_json(fields), order["target"], Path(folder) / f"kernel{i}.py")
            print(json.dumps(dataclasses.asdict(resources)), file=results, flush=True)


def _resources(request: CompileRequest, target: Mapping[str, Any], path: Path) -> Resources:
    """Compile one kernel, whose file is written to `path`."""
    import triton
    from triton.backends.compiler import GPUTarget

    try:
        path.write_text(request.text)  # Triton loads the source of functions from their file
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        assert module_spec is not None and module_spec.loader is not None, path
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        source = triton.compiler.ASTSource(
            getattr(module, request.kernel), dict(request.signature), dict(request.constexprs), dict(request.attrs)
        )
        compiled = triton.compile(source, target=GPUTarget(**target), options=dict(request.options))
        return read_resources(compiled, request.texts)
    except Exception as error:  # a compiler fails in many ways; every failure is a result
        return Resources(error=_message(error))


def _message(error: Exception) -> str:
    """Format an exception in one line."""
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[-1] if lines else 'no message'}"


if __name__ == "__main__":
    compile_order()
