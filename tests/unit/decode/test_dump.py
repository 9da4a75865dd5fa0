"""The text of a decode program: every node and instruction, reasons, and equal segments in short."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from decoded_steps import PROMPT, decoded, filled, prepared
from latent_caches import coded, plans
from needs import needs_compiler
from small_models import tiny_llama, token_ids
from torch import nn

from fhopt.codegen.programs.schedule import NativeSegment
from fhopt.decode.dump import program_text
from fhopt.decode.program import DecodeProgram
from fhopt.decode.programs import decode_programs

pytestmark = needs_compiler


def three_layers() -> Any:
    return tiny_llama(num_hidden_layers=3)


def program_of(model: Any, make: Any = three_layers) -> DecodeProgram:
    """Return the program of the second token after a prompt."""
    prepared(model, coded(plans(make, 8)))
    ids = token_ids(1, PROMPT + 2)
    decoded(model, ids, filled(model, ids[:, :PROMPT]), PROMPT)
    state = decode_programs(model)
    assert state is not None
    (program,) = state.programs
    return program


def test_every_node_and_instruction_is_shown_once_and_equal_segments_in_short() -> None:
    model = three_layers()
    program = program_of(model)
    text = program_text(model, program)
    segments = [item for item in program.schedule.items if isinstance(item, NativeSegment)]
    assert len(segments) == 4 and segments[1].program is segments[2].program
    parts = re.split(r"^segment \d+: ", text, flags=re.M)[1:]
    for index, part in enumerate(parts):
        numbers = sorted(int(found) for found in re.findall(r"^ {4} *(\d+) \w+ +\[", part, re.M))
        wanted = range(len(segments[index].program.instructions)) if index != 2 else range(0)
        assert numbers == list(wanted)
        shown = re.findall(r"^  %(\w+)(?:: .*)? = ", part.partition("\n\n")[0], re.M)
        assert shown == [node.name for node in segments[index].nodes] * (index != 2)
    assert parts[2].startswith("the instructions of segment 1, with\n")
    assert "model.layers.0.mlp.down_proj.weight: float32[64, 96]" in parts[1]
    assert "model.layers.1.mlp.down_proj.weight: float32[64, 96]" in parts[2]


def test_eager_nodes_have_their_reasons() -> None:
    model = three_layers()
    text = program_text(model, program_of(model))
    assert text.startswith("# LlamaForCausalLM: 1 native call per step\n")
    assert "eager: embedding has no instructions\n  %embedding" in text


def test_instructions_name_their_operands() -> None:
    model = three_layers()
    text = program_text(model, program_of(model))
    assert re.search(r"linear +\[1, 64, 32\]  @\d+ <- @\d+, x\d+ \(float32\), 3 in one loop", text)
    assert re.search(r"fill +\[1\]  @\d+ <- 1e-06", text)
    assert re.search(r"copy +\[4, 8\]  @\d+\(16, 1\) <- @\d+", text), "a part of a head: rows 16 floats apart"
    assert re.search(r"store +\[64\]  x\d+ <- @\d+", text)


def test_types_of_weights_are_named() -> None:
    model = three_layers()
    for layer in model.model.layers:
        layer.mlp.down_proj.bias = nn.Parameter(torch.ones(64))
    text = program_text(model, program_of(model.bfloat16()))
    assert re.search(r"linear +\[1, 96, 64\]  @\d+ <- @\d+, x\d+ \(bfloat16\), bias x\d+", text)


def test_captured_programs_are_written_to_the_dump_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = three_layers()
    prepared(model, coded(plans(three_layers, 8)))
    monkeypatch.setenv("FHOPT_DUMP", str(tmp_path / "dump"))
    for batch in (1, 2):
        ids = token_ids(batch, PROMPT + 2)
        decoded(model, ids, filled(model, ids[:, :PROMPT]), PROMPT)
    state = decode_programs(model)
    assert state is not None
    wanted = {program_text(model, program) for program in state.programs}
    assert {path.read_text() for path in (tmp_path / "dump").glob("decode-*.txt")} == wanted and len(wanted) == 2
