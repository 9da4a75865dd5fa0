"""The operands of attention on a KV cache are those of both schemas and of the function in C++."""

from __future__ import annotations

import re

import torch

from fhopt.codegen.cpu import graph_kernels as graph_kernels  # defines the op of the kernel
from fhopt.ops.cache_operands import CPP_OPERANDS, CacheOperands


def test_schemas_have_the_operands_in_their_order() -> None:
    names = list(CacheOperands._fields)
    for op, before in ((torch.ops.fhopt.attend_latents, 0), (torch.ops.fhopt.attend_kernel, 3)):
        arguments = [argument.name for argument in op.default._schema.arguments]
        assert arguments[before : before + len(names)] == names
    assert re.findall(r"(\w+)(?:,|$)", CPP_OPERANDS) == names


def test_operands_that_may_be_missing_are_optional_in_c() -> None:
    assert "Tensor query, " in CPP_OPERANDS and "std::optional<Tensor> key_scale, " in CPP_OPERANDS
    assert CPP_OPERANDS.endswith("int64_t segment")
