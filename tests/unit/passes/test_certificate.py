"""Certificates as text, and groups of layers that share one."""

from __future__ import annotations

from dataclasses import replace

from fhopt.passes.certificate import Certificate, Checked, ReplacedNode, by_kind

STEPS = (
    ReplacedNode("matmul", "matmul", "analytic: checked at random points", "model.py:41"),
    ReplacedNode("softmax", "softmax", "analytic: checked at random points", "model.py:43"),
)
CERTIFICATE = Certificate(
    (("q", "[s0, 9, s1, 64]"), ("k", "[s0, 3, s1, 64]"), ("v", "[s0, 3, s1, 64]")), STEPS, "NaN", (), Checked(3, 1e-15)
)


def test_a_certificate_is_printed_as_a_table_of_its_steps() -> None:
    lines = CERTIFICATE.lines("layers.0.self_attn")
    assert lines[0] == "layers.0.self_attn: q [s0, 9, s1, 64], k [s0, 3, s1, 64], v [s0, 3, s1, 64]"
    assert lines[1] == "  matmul   matmul   analytic: checked at random points  model.py:41"
    assert lines[3:] == ["  rows without keys give NaN", "  3 sets of random values: outputs to 1e-15"]


def test_a_summary_states_how_many_nodes_were_proved_and_the_assumptions() -> None:
    assert CERTIFICATE.summary == "2 nodes proved; 3 sets of random values: outputs to 1e-15"
    assumed = replace(CERTIFICATE, conditions=("no overflow",), checked=Checked(2, 1e-15, 2e-15))
    assert assumed.summary.endswith("outputs to 1e-15, gradients to 2e-15; no overflow")
    assert Certificate(()).summary == "a call that is canonical already"


def test_layers_that_differ_only_in_names_and_lines_share_a_certificate() -> None:
    moved = replace(CERTIFICATE, steps=tuple(replace(s, node=s.node + "_1", source="model.py:99") for s in STEPS))
    other = replace(CERTIFICATE, rows="zero")
    assert by_kind({"0": CERTIFICATE, "1": moved, "2": other}) == {"0": ["0", "1"], "2": ["2"]}
