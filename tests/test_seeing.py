"""What is told of sites and plans: facts, drawings, graph files, changes of passes, notebooks."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import sample_reports
from click.testing import CliRunner, Result
from hand_plans import CODED, SITE, random_plan
from small_models import Fitted

import fhopt
from fhopt import cost, fitting, passes
from fhopt.cli import main
from fhopt.codegen import render
from fhopt.errors import FhoptError
from fhopt.evidence import Evidence, evidence_of
from fhopt.journal import Journal
from fhopt.kernels import kernels_of
from fhopt.machine import find_device
from fhopt.pipeline import find_sites
from fhopt.seeing import drawing, graphs, inspect, notebook
from fhopt.seeing.inspection import common_form, inspect_sites, short_name
from fhopt.seeing.kernel_listing import list_kernels
from fhopt.seeing.snapshots import Snapshots, write_graphs
from fhopt.spec import TIER_QUANTUM, LatentPlan

SVG = "{http://www.w3.org/2000/svg}"


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


# --------------------------------------------------------------------------------------------------- evidence


def seen(llama: Fitted, ratio: float = 4, **options: Any) -> tuple[LatentPlan, Evidence]:
    plan = llama.plan(ratio, **options)
    evidence = evidence_of(plan)
    assert evidence is not None
    return plan, evidence


def test_losses_of_the_sites_add_up_to_the_loss_that_the_plan_predicts(llama: Fitted) -> None:
    plan, evidence = seen(llama)
    total = sum(evidence.nats(site.site.name) for site in plan.sites)
    assert total == pytest.approx(plan.provenance["predicted_nats"], rel=1e-3)  # four digits are kept


def test_bits_of_the_evidence_are_the_tiers_of_the_plan(llama: Fitted) -> None:
    plan, evidence = seen(llama)
    for site in plan.sites:
        for side, kept in zip((site.key, site.value), evidence.sites[site.site.name], strict=True):
            widths = {t.bits: t.width for t in side.tiers}
            assert {b: TIER_QUANTUM * kept.bits.count(b) for b in set(kept.bits) - {0}} == widths


def test_the_spectrum_falls_and_two_bits_everywhere_lose_more_than_a_plan_of_more_bits(llama: Fitted) -> None:
    plan, evidence = seen(llama, ratio=3)
    for side in (side for sides in evidence.sites.values() for side in sides):
        assert list(side.spectrum) == sorted(side.spectrum, reverse=True)
    totals = [
        sum(getattr(s, of) for sides in evidence.sites.values() for s in sides) for of in ("nats", "sensitivity_nats")
    ]
    assert plan.ratio(2048) < 8 and totals[0] < totals[1]


def test_the_curve_holds_the_losses_of_plans_fitted_to_other_ratios(llama: Fitted) -> None:
    _, evidence = seen(llama)
    sizes = {size.ratio: size for size in evidence.curve}
    assert list(sizes) == sorted(sizes) and {2.0, 4.0} <= set(sizes)
    for ratio in (2.0, 4.0):
        assert sizes[ratio].nats == pytest.approx(llama.plan(ratio).provenance["predicted_nats"], rel=1e-3)
        assert sizes[ratio].bytes_per_token == pytest.approx(llama.plan(ratio).exact_token_bytes() / ratio)


def test_evidence_survives_a_file_and_is_no_part_of_the_digest(llama: Fitted, tmp_path: Path) -> None:
    plan, evidence = seen(llama)
    assert evidence_of(LatentPlan.load(plan.save(tmp_path / "plan"))) == evidence
    assert plan.with_provenance(evidence=None).digest() == plan.digest()


def test_plans_for_a_gpu_and_plans_without_measurements_have_evidence_or_none(llama: Fitted) -> None:
    _, evidence = seen(llama, ratio=2, device="h100", tokens=8192)
    assert {b for sides in evidence.sites.values() for s in sides for b in s.bits} <= {0, *fitting.GPU_BITS}
    assert evidence_of(random_plan("head", CODED)) is None


# --------------------------------------------------------------------------------------------------- facts


def test_facts_of_a_plan_are_those_that_the_plan_and_the_cost_model_tell(llama: Fitted) -> None:
    plan = llama.plan(4)
    found = inspect(
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
        latent = cost.site_cost(planned.site, planned, **window)
        assert site.plan.formulas.bytes == cost.pretty(latent.bytes)
        expected = cost.break_even(cost.site_cost(planned.site), latent, find_device("h100"))
        assert (site.plan.pays[0].verdict, site.plan.pays[0].tokens) == (expected.verdict, expected.tokens)


def test_sites_of_one_shape_are_worked_out_once_and_those_of_two_apart(llama: Fitted) -> None:
    other = replace(SITE, name="layers.1", heads=8)
    found = inspect_sites("two", [SITE, other])
    assert [s.formulas.operations for s in found.sites] == ["192⋅B⋅S⋅T", "384⋅B⋅S⋅T"]


def test_a_plan_of_another_model_is_refused(llama: Fitted, gpt2: Fitted) -> None:
    loaded = sample_reports.loaded(llama)
    plan = gpt2.plan(4).with_provenance(fingerprint="another")
    with pytest.raises(FhoptError, match="another model"):
        inspect(loaded, find_sites(loaded), plan)


def test_what_names_share_is_cut_at_dots() -> None:
    names = ("model.layers.0.self_attn", "model.layers.10.self_attn")
    form = common_form(names)
    assert form == ("model.layers", "self_attn")
    assert [short_name(name, form) for name in names] == ["0", "10"]
    assert common_form(("alone",)) == ("", "") and short_name("alone", ("", "")) == "alone"
    form = common_form(("a.b", "a.b.c"))
    assert [short_name(name, form) for name in ("a.b", "a.b.c")] == ["b", "b.c"]


def test_a_miss_keeps_the_text_of_its_line() -> None:
    from test_cli import encoder

    from fhopt.models import LoadedModel

    model, arguments = encoder()
    loaded = LoadedModel("encoder", model, inputs=(arguments, {}))
    missed = inspect(loaded, find_sites(loaded)).missed
    assert [m.code for m in missed] == ["return y * self.gate(x).softmax(-1)[..., :1]"]


# --------------------------------------------------------------------------------------------------- drawings


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


def test_a_drawing_has_shapes_of_exact_and_of_latent_attention() -> None:
    pytest.importorskip("pygraphviz")
    plan = random_plan("head", CODED)
    drawn = fhopt.draw(SITE, plan)
    assert drawn.after is not None
    exact, latent = (" ".join(texts(svg)) for svg in (drawn.before, drawn.after))
    assert "q [B, 4, S, 16]" in exact and "K, V [B, 2, T, 16 | 8]" in exact and "96 bytes/token" in exact
    assert "q~ [B, 4, S, 16]" in latent and "keys: 8x8 + 8x4" in latent and "56 bytes/token" in latent
    assert "D_K^T [2, 16, 16]" in latent and "first 4 exact, newest 8 in 16 bits" in latent
    assert drawn._repr_html_().count("<svg") == 2


def test_keys_and_values_in_one_latent_have_one_encoder() -> None:
    drawn = drawing.after(random_plan("input", CODED).sites[0])
    assert "ev" not in drawn.nodes and ("v", "ek", "v [B, 2, S, 8]") in drawn.edges


def test_a_drawing_shows_hostile_names_as_text() -> None:
    pytest.importorskip("pygraphviz")
    name = "<b>&\\N</b>"
    site = replace(SITE, projections=dict.fromkeys("qkvo", (f"{name}.weight",)))
    svg = drawing.before(site).svg
    assert texts(svg).count(name) == 4 and not list(ET.fromstring(svg).iter("b"))


def test_a_drawing_is_saved_as_svg_and_as_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("pygraphviz")
    drawn = fhopt.draw(SITE)
    assert ET.parse(drawn.save(tmp_path / "site.svg")).getroot().tag == f"{SVG}svg"
    with pytest.raises(FhoptError, match="no SVG file"):
        drawn.save(tmp_path / "site.png")


def test_without_the_extra_a_drawing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pygraphviz", None)
    with pytest.raises(FhoptError, match=r"pip install 'fhopt\[view\]'"):
        fhopt.draw(SITE)
    assert "<svg" not in notebook.site_html(SITE) and "4 / 2 / 16 and 8" in notebook.site_html(SITE)


def test_notebooks_show_plans_and_journals_with_everything_escaped() -> None:
    plan = sample_reports.synthetic_plan(2).with_provenance(model=sample_reports.HOSTILE)
    shown = notebook.plan_html(plan) + Journal(sample_reports.HOSTILE, events=[sample_reports.LINE])._repr_html_()
    assert "<script" not in shown and "<img" not in shown and "model.layers.1.self_attn" in shown
    assert f"{plan.ratio():.2f}x plan" in shown and "<td>56</td>" in shown
    assert plan._repr_html_() == notebook.plan_html(plan)
    assert plan.sites[0]._repr_html_() == notebook.site_plan_html(plan.sites[0])
    assert SITE._repr_html_() == notebook.site_html(SITE)


# --------------------------------------------------------------------------------------------------- graphs


@pytest.fixture(scope="module")
def snapshots(llama: Fitted) -> tuple[Snapshots, LatentPlan]:
    taken, plan = Snapshots(keep_networks=True), llama.plan(4)
    with taken.taking():
        outcome = find_sites(sample_reports.loaded(llama))
        passes.optimize(outcome, plan)
    return taken, plan


STAGES = ("input", "decompose", "functionalize", "normalize", "find_attention", "compress", "absorb", "lower")


def test_a_snapshot_is_taken_after_every_pass_and_none_outside(
    snapshots: tuple[Snapshots, LatentPlan], llama: Fitted
) -> None:
    taken, _ = snapshots
    assert taken.stages == STAGES and len(taken.taken) == len(STAGES)
    find_sites(sample_reports.loaded(llama))
    assert len(taken.taken) == len(STAGES)


def test_changes_give_one_text_from_the_other_and_count_what_layers_share(
    snapshots: tuple[Snapshots, LatentPlan],
) -> None:
    taken, _ = snapshots
    changes = {stage.stage: stage for stage in taken.changes()}
    normalize = changes["normalize"]
    assert normalize.nodes[0] - normalize.removed + normalize.added == normalize.nodes[1]
    (twice,) = (c for c in normalize.changes if any("fhopt.attention" in line for line in c.lines))
    assert twice.times == 2  # one for each layer
    assert changes["find_attention"].changes == ()


def test_the_nodes_of_a_site_are_those_between_its_projections_in_every_stage(
    snapshots: tuple[Snapshots, LatentPlan],
) -> None:
    taken, plan = snapshots
    first, second = (plan.sites[i].site.name for i in (0, 1))
    for stage in STAGES:
        graph = taken.after(stage).network
        inside = graphs.site_nodes(graph, first)
        assert inside and not inside & graphs.site_nodes(graph, second)
        assert sum(graph.nodes[n]["op"] == "linear" for n in inside) == 4
    ops = {graph.nodes[n]["op"] for n in graphs.site_nodes(taken.after("absorb").network, first)}
    assert "latent_attention" in ops


@pytest.mark.parametrize("ending", graphs.FORMATS)
def test_a_graph_file_holds_the_nodes_and_shapes_of_the_program(
    ending: str, snapshots: tuple[Snapshots, LatentPlan], tmp_path: Path, llama: Fitted
) -> None:
    pytest.importorskip("pygraphviz")
    taken, plan = snapshots
    name = plan.sites[1].site.name
    facts = inspect_sites("tiny", [p.site for p in plan.sites], plan)
    (path,) = write_graphs(taken, tmp_path / f"graph{ending}", facts, "normalize", name)
    wanted = graphs.site_graph(taken.after("normalize").network, name)
    readers = {
        ".json": lambda: nx.node_link_graph(json.loads(path.read_text()), edges="edges"),
        ".graphml": lambda: nx.read_graphml(path),
        ".dot": lambda: nx.nx_agraph.read_dot(path),
    }
    if ending == ".svg":
        assert {"attention", "[1, 4, 16, 16]", name, "tiny, after normalize"} <= set(texts(path.read_text()))
        return
    read = readers[ending]()
    assert set(read.nodes) == set(wanted.nodes) and len(read.edges) == len(wanted.edges)
    if ending != ".dot":
        assert {n: d["shape"] for n, d in read.nodes(data=True)} == dict(wanted.nodes(data="shape"))
        assert sum(site == name for _, site in read.nodes(data="site")) == len(graphs.site_nodes(wanted, name))


def test_one_file_is_written_for_each_stage(snapshots: tuple[Snapshots, LatentPlan], tmp_path: Path) -> None:
    taken, plan = snapshots
    facts = inspect_sites("tiny", [p.site for p in plan.sites], plan)
    written = write_graphs(taken, tmp_path / "g.json", facts, "all")
    assert [path.name for path in written] == [f"g.{i:02d}-{stage}.json" for i, stage in enumerate(STAGES)]


def test_graph_files_that_cannot_be_are_refused(snapshots: tuple[Snapshots, LatentPlan], tmp_path: Path) -> None:
    taken, _ = snapshots
    with pytest.raises(FhoptError, match="expected all or one of input, decompose"):
        taken.after("dream")
    with pytest.raises(FhoptError, match="no graph file"):
        graphs.check_format(tmp_path / "graph.png")
    with pytest.raises(FhoptError, match="cannot be cut out"):
        graphs.site_graph(taken.after("input").network, "elsewhere")


# --------------------------------------------------------------------------------------------------- kernels


def test_a_listing_is_the_text_of_the_kernel(llama: Fitted) -> None:
    plan, found = llama.plan(4), list_kernels(llama.plan(4))
    specs = {kernel[0].name: kernel[0] for kernel in kernels_of(plan, "bfloat16")}
    assert {f.file for f in found.files} == {f"{name}{end}" for name in specs for end in (".cpp", ".py")}
    for listing in found.files:
        name, _, _ = listing.file.rpartition(".")
        plain = "".join(ET.fromstring(f"<pre>{found.html(listing)}</pre>").itertext())
        assert plain.strip() == render(specs[name], listing.language).strip()
        assert set(listing.sites) <= {p.site.name for p in plan.sites}


# --------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return "test_cli:encoder"


def test_inspect_tells_one_site_and_writes_its_graph(importable: str, tmp_path: Path) -> None:
    (site,) = json.loads(call("inspect", importable, "--json").stdout)["sites"]
    result = call("inspect", importable, "--site", site["name"], "--graph", str(tmp_path / "g.json"))
    assert result.exit_code == 0, result.output
    assert site["formulas"]["bytes"].replace("⋅", "") in result.output.replace("⋅", "")
    graph = nx.node_link_graph(json.loads((tmp_path / "g.json").read_text()), edges="edges")
    assert "attention" in {op for _, op in graph.nodes(data="op")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--stage", "input"), "expected both, or --graph alone"),
        (("--graph", "graph.png"), "no graph file"),
        (("--site", "nowhere"), "there is no site named 'nowhere'"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_inspect_refuses_what_it_cannot_show(options: tuple[str, ...], message: str, importable: str) -> None:
    result = call("inspect", importable, *options)
    assert result.exit_code == 2 and message in result.stderr, result.output
