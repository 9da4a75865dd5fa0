"""Plans and compile reports in notebooks."""

from __future__ import annotations

import sample_reports
from hand_plans import SITE

from fhopt.backend.compile_report import CompileReport
from fhopt.plan import display


def test_notebooks_show_plans_and_reports_with_everything_escaped() -> None:
    plan = sample_reports.synthetic_plan(2).with_provenance(model=sample_reports.HOSTILE)
    shown = display.plan_html(plan) + CompileReport(sample_reports.HOSTILE, events=[sample_reports.LINE])._repr_html_()
    assert "<script" not in shown and "<img" not in shown and "model.layers.1.self_attn" in shown
    assert f"{plan.ratio():.2f}x plan" in shown and "<td>56</td>" in shown
    assert plan._repr_html_() == display.plan_html(plan)
    assert plan.sites[0]._repr_html_() == display.site_plan_html(plan.sites[0])
    assert SITE._repr_html_() == display.site_html(SITE)
