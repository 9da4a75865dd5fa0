"""Facts about the sites of a plan."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import sample_reports
import torch
from encoder_decoders import model_of
from hand_plans import SITE
from rich.console import Console
from small_models import FittedModel

from fhopt.errors import FhoptError
from fhopt.hardware import cost_model
from fhopt.hardware.devices import find_device
from fhopt.inspection.facts import common_form, inspect_sites, short_name, site_facts
from fhopt.inspection.prospects import prospects
from fhopt.inspection.tables import inspection_tables
from fhopt.models.capture import capture
from fhopt.models.loaded_model import LoadedModel
from fhopt.models.sites import find_sites
from fhopt.passes import pipeline


def test_facts_agree_with_the_plan_and_the_cost_model(llama: FittedModel) -> None:
    plan = llama.plan(4)
    found = site_facts(
        sample_reports.loaded(llama), find_sites(sample_reports.loaded(llama)), plan, devices=("h100",), tokens=2048
    )
    assert found.plan is not None
    assert (found.plan.ratio, found.plan.bytes_per_token) == (plan.ratio(2048), plan.cache_bytes(2048) / 2048)
    assert found.exact_bytes == plan.exact_token_bytes()
    assert found.parameters == sum(p.numel() for p in llama.model.parameters())
    for site, planned in zip(found.sites, plan.sites, strict=True):
        assert site.site == planned.site and site.plan is not None
        assert site.plan.bytes == planned.token_bytes() == sum(side.bytes for side in site.plan.sides)
        open_tokens = plan.sinks + plan.recent + plan.block // 2
        window: dict[str, int] = dict(open_tokens=open_tokens, window_bits=plan.window_bits, sinks=plan.sinks)
        latent = cost_model.site_cost(planned.site, planned, **window)
        assert site.plan.formulas.bytes == cost_model.pretty(latent.bytes)
        expected = cost_model.break_even(cost_model.site_cost(planned.site), latent, find_device("h100"))
        assert (site.plan.pays[0].verdict, site.plan.pays[0].tokens) == (expected.verdict, expected.tokens)


def test_means_and_segments_are_shown_if_a_plan_has_them(llama: FittedModel) -> None:
    fitted, loaded = llama.plan(4), sample_reports.loaded(llama)
    for mean_tokens, segment in ((0, 0), (256, 512)):
        sites = tuple(replace(site, segment=segment) for site in fitted.sites)
        plan = replace(fitted, sites=sites, mean_tokens=mean_tokens)
        found = site_facts(loaded, find_sites(loaded), plan)
        assert found.plan is not None and (found.plan.mean_tokens, found.plan.segment) == (mean_tokens, segment)
        shown = io.StringIO()
        Console(width=160, file=shown).print(inspection_tables(found))
        assert ("relative to segments of 512 tokens" in shown.getvalue()) == bool(segment)
        assert ("of the first 256 tokens of a sequence" in shown.getvalue()) == bool(mean_tokens)


def test_sites_of_one_shape_are_computed_once_and_those_of_two_separately(llama: FittedModel) -> None:
    other = replace(SITE, name="layers.1", heads=8)
    found = inspect_sites("two", [SITE, other])
    assert [s.formulas.operations for s in found.sites] == ["192⋅B⋅S⋅T", "384⋅B⋅S⋅T"]


def test_a_plan_of_another_model_is_refused(llama: FittedModel, gpt2: FittedModel) -> None:
    loaded = sample_reports.loaded(llama)
    plan = gpt2.plan(4).with_provenance(fingerprint="another")
    with pytest.raises(FhoptError, match="not fitted to"):
        site_facts(loaded, find_sites(loaded), plan)


def test_a_site_is_found_by_its_name_in_full_or_as_tables_shorten_it(llama: FittedModel) -> None:
    found = site_facts(sample_reports.loaded(llama), find_sites(sample_reports.loaded(llama)), devices=("h100",))
    assert found.site("1") is found.site(found.sites[1].site.name) is found.sites[1]
    with pytest.raises(FhoptError, match=r"site '7' does not exist; found 2 sites, the first is 'model\.layers\.0"):
        found.site("7")
    with pytest.raises(FhoptError, match=r"found 0 sites\. Run fhopt inspect"):
        replace(found, sites=()).site("1")


def test_common_prefixes_of_names_are_cut_at_dots() -> None:
    names = ("model.layers.0.self_attn", "model.layers.10.self_attn")
    form = common_form(names)
    assert form == ("model.layers", "self_attn")
    assert [short_name(name, form) for name in names] == ["0", "10"]
    assert common_form(("alone",)) == ("", "") and short_name("alone", ("", "")) == "alone"
    form = common_form(("a.b", "a.b.c"))
    assert [short_name(name, form) for name in ("a.b", "a.b.c")] == ["b", "b.c"]


def test_a_miss_has_the_text_of_its_line() -> None:
    from command_models import encoder

    from fhopt.models.loaded_model import LoadedModel

    model, arguments = encoder()
    loaded = LoadedModel("encoder", model, inputs=(arguments, {}))
    missed = site_facts(loaded, find_sites(loaded)).missed
    assert [m.code for m in missed] == ["return y * self.gate(x).softmax(-1)[..., :1]"]


def test_an_encoder_caches_nothing() -> None:
    model = model_of("bart")
    ids = {"input_ids": torch.ones(1, 12, dtype=torch.int64), "decoder_input_ids": torch.ones(1, 9, dtype=torch.int64)}
    outcome = pipeline.find_attentions(capture(model, (), ids | {"use_cache": False}).program)
    loaded, sites = LoadedModel("bart", model), list(outcome.sites.values())
    inner = [site for site in sites if ".encoder." in site.name]
    outer = [site for site in sites if site not in inner]
    found = site_facts(loaded, outcome, devices=("h100",))
    assert inner and found.exact_bytes == 2 * sum(site.exact_numbers_per_token for site in outer)
    assert {one.site.name for one in found.sites if not one.exact_bytes} == {site.name for site in inner}
    assert found.rooflines == inspect_sites("bart", outer, devices=("h100",), parameters=found.parameters).rooflines
    assert prospects(loaded, outcome, ()).sites == len(outer)
