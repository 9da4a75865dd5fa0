"""Random attention programs, compiled once and called with other values, agree with eager mode.

Programs that were once wrong are in tests/support/found_programs.py.
"""

from __future__ import annotations

import operator
from typing import Any

import pytest
from found_programs import FOUND
from graph_programs import AttentionProgram, Call, CallSizes, Input
from program_checks import Invalid, WrongProgram, check
from program_runs import Tally, run
from torch import fx

SEED = 20261202
ROUNDS = 4  # of 200 draws each: every machine runs the same programs
ATTENTION = """
def program(q, k, v, factor):
    s = q @ k.mT * 0.5
    p = s.softmax(-1)
    return p @ v * factor
"""
INPUTS = (
    Input("q", "B H S D"), Input("k", "B H T D"), Input("v", "B H T D"),
    Input("factor", "H 1 1", values=("ones", "normal")),
)  # fmt: skip


def _passed(tally: Tally) -> None:
    assert tally.failure == "", tally.failure
    assert tally.rewritten > 0.1, tally.outcomes


def test_random_programs_agree_with_eager_mode() -> None:
    _passed(run(SEED, seconds=5.0, rounds=1))


@pytest.mark.slow
def test_five_minutes_of_random_programs_agree_with_eager_mode() -> None:
    _passed(run(SEED + 1, seconds=300.0, rounds=ROUNDS))


@pytest.mark.parametrize("name", FOUND)
def test_a_program_that_was_wrong_once_agrees_with_eager_mode(name: str) -> None:
    check(FOUND[name])


def test_a_plain_attention_is_rewritten_and_right() -> None:
    assert check(AttentionProgram(ATTENTION, INPUTS)).sites == 1


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad", "inference", "autocast", "autocast no_grad"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_plain_attention_is_right_in_every_mode_and_dtype(mode: str, dtype: str) -> None:
    if mode.startswith("autocast") and dtype == "float64":
        pytest.skip("autocast is for lower precision")
    check(AttentionProgram(ATTENTION, INPUTS, calls=(Call(mode=mode),) * 3, dtype=dtype))


def test_sizes_may_differ_from_call_to_call() -> None:
    calls = (Call(CallSizes(S=5, T=6)), Call(CallSizes(B=3, S=7, T=4)), Call(CallSizes(S=2, T=9)))
    check(AttentionProgram(ATTENTION, INPUTS, calls=calls, dynamic=True))


def test_a_program_that_cannot_run_in_eager_mode_is_invalid() -> None:
    with pytest.raises(Invalid, match="eager: "):
        check(AttentionProgram("def program(q):\n    return q @ q", INPUTS[:1], calls=(Call(CallSizes(S=5, D=4)),)))


def test_a_wrong_backend_is_noticed_in_the_call_in_which_values_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """This backend omits a multiplication by an input that is one in the first call."""

    def compile_without_factor(module: fx.GraphModule, *_: object) -> Any:
        product = next(n for n in module.graph.nodes if n.target is operator.mul and isinstance(n.args[1], fx.Node))
        product.replace_all_uses_with(product.args[0])
        return fx.GraphModule(module, module.graph).forward

    monkeypatch.setattr("fhopt.backend.compile._compile_exactly", compile_without_factor)
    with pytest.raises(WrongProgram, match=r"call 2 of 3: outputs\[0\]: differs by"):
        check(AttentionProgram(ATTENTION, INPUTS, calls=(Call(mode="no_grad"),) * 3))


def test_a_program_prints_source_that_recreates_it() -> None:
    program = AttentionProgram(
        ATTENTION, INPUTS, calls=(Call(CallSizes(S=3)), Call()), dtype="float64", dynamic=True, seed=4
    )
    names: dict[str, Any] = {one.__name__: one for one in (AttentionProgram, Input, Call, CallSizes)}
    exec(f"again = {program}", names)
    again = names["again"]
    assert (again.inputs, again.calls, again.dtype, again.seed) == (program.inputs, program.calls, "float64", 4)
    assert str(again) == str(program)
