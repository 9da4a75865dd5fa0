"""Drawings of attention before and after the rewrite."""

from __future__ import annotations

import os
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
from hand_plans import CODED, SITE, random_plan
from seen_plans import SVG, texts
from small_models import FittedModel

import fhopt
from fhopt.errors import FhoptError
from fhopt.inspection import drawing
from fhopt.inspection.drawing import without_font_warnings
from fhopt.plan import display


def test_a_drawing_has_shapes_of_exact_and_of_latent_attention() -> None:
    pytest.importorskip("pygraphviz")
    plan = random_plan("head", CODED)
    drawn = fhopt.draw(SITE, plan)
    assert drawn.after is not None
    exact, latent = (" ".join(texts(svg)) for svg in (drawn.before, drawn.after))
    assert "q [B, 4, S, 16]" in exact and "K, V [B, 2, T, 16 | 8]" in exact and "96 bytes/token" in exact
    assert "q~ [B, 4, S, 16]" in latent and "keys: 8x8 + 8x4" in latent and "56 bytes/token" in latent
    assert "D_K^T [2, 16, 16]" in latent and "4 attention sinks; residual window of 8 in 16 bits" in latent
    assert drawn._repr_html_().count("<svg") == 2


def test_a_plan_of_a_drawing_may_be_the_path_of_one(tmp_path: Path) -> None:
    pytest.importorskip("pygraphviz")
    plan = random_plan("head", CODED)
    assert fhopt.draw(SITE, plan.save(tmp_path / "plan")).after == fhopt.draw(SITE, plan).after
    with pytest.raises(FhoptError, match="plan is a int; expected a LatentPlan or the path of one"):
        fhopt.draw(SITE, 3)  # type: ignore[arg-type]


def test_a_drawing_says_that_keys_are_relative_to_segments(llama: FittedModel) -> None:
    pytest.importorskip("pygraphviz")
    plan = llama.plan(4)
    for segment, shown in ((0, False), (512, True)):
        given = replace(plan, sites=tuple(replace(site, segment=segment) for site in plan.sites))
        drawn = fhopt.draw(plan.sites[0].site, given)
        assert drawn.after is not None
        assert ("keys relative to segments of 512 tokens" in " ".join(texts(drawn.after))) == shown


def test_keys_and_values_in_one_latent_have_one_encoder() -> None:
    drawn = drawing.after(random_plan("input", CODED).sites[0])
    assert "ev" not in drawn.nodes and ("v", "ek", "v [B, 2, S, 8]") in drawn.edges


def test_a_drawing_shows_hostile_names_as_text() -> None:
    pytest.importorskip("pygraphviz")
    name = "<b>&\\N</b>"
    site = replace(SITE, projections=dict.fromkeys("qkvo", (f"{name}.weight",)))
    svg = drawing.before(site).svg
    assert texts(svg).count(name) == 4 and not list(ET.fromstring(svg).iter("b"))


def test_a_drawing_is_saved_only_as_svg(tmp_path: Path) -> None:
    pytest.importorskip("pygraphviz")
    drawn = fhopt.draw(SITE)
    assert ET.parse(drawn.save(tmp_path / "site.svg")).getroot().tag == f"{SVG}svg"
    with pytest.raises(FhoptError, match="is not an SVG file"):
        drawn.save(tmp_path / "site.png")


def test_without_the_extra_a_drawing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pygraphviz", None)
    with pytest.raises(FhoptError, match=r"pip install 'fhopt\[report\]'"):
        fhopt.draw(SITE)
    assert "<svg" not in display.site_html(SITE) and "4 / 2 / 16 and 8" in display.site_html(SITE)


def test_font_warnings_are_suppressed_and_others_are_not(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="no"), without_font_warnings():
        os.write(2, b'Fontconfig warning: "a.conf", line 6: unknown element\nError: a graph\n')
        raise ValueError("no")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "Error: a graph\nafter\n"
