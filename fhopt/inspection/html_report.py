"""Report of a model and its plan: one self-contained HTML file that opens without a network.

    build(loaded, outcome, plan, ...)  ->  Report        facts, drawings, kernels, changes by passes
    write(report, path)                                   the page

The page contains the facts as JSON and shows values from it. Drawings, kernels and changes of graphs are compressed;
the browser decompresses them when they are opened.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from decimal import ROUND_HALF_UP, Context, Decimal
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fhopt.errors import FhoptError
from fhopt.files import appearing
from fhopt.hardware.devices import SHOWN
from fhopt.inspection import charts, drawing
from fhopt.inspection.facts import Inspection, common_form, short_name, site_facts
from fhopt.inspection.kernel_listing import LANGUAGES, Listings, list_kernels, style_sheet
from fhopt.inspection.optional import need
from fhopt.inspection.snapshots import Snapshots, StageChanges
from fhopt.inspection.tables import proofs_text
from fhopt.models.sites import find_sites
from fhopt.passes import pipeline
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site import AttentionSite
from fhopt.plan.site_plan import TIER_QUANTUM
from fhopt.system import cached_file
from fhopt.version import __version__

if TYPE_CHECKING:
    from fhopt.models.loaded_model import LoadedModel


POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class HtmlReport:
    """Contents of a report.

    drawings: SVG, without duplicates. drawn: (before, after) of each site as indices into `drawings`, -1 for none.
    measured: measurements such as those of `fhopt demo`; may be empty.
    """

    inspection: Inspection
    drawings: tuple[str, ...] = ()
    drawn: tuple[tuple[int, int], ...] = ()
    listings: Listings = field(default_factory=Listings)
    stages: tuple[StageChanges, ...] = ()
    measured: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return every value that the page shows, without the texts of drawings, kernels and changes."""
        stages = [asdict(stage) | {"changes": [change.times for change in stage.changes]} for stage in self.stages]
        kernels = [
            {"file": k.file, "language": k.language, "lines": k.lines, "sites": k.sites} for k in self.listings.files
        ]
        more = {"chunk": TIER_QUANTUM, "stages": stages, "kernels": kernels, "measured": dict(self.measured)}
        return {"fhopt": __version__} | self.inspection.as_json() | more


def build_report(loaded: LoadedModel, plan: LatentPlan | None = None, *, devices: Sequence[str] = SHOWN) -> HtmlReport:
    """Collect the report of a model and its plan.

    Raises FhoptError if there is no attention or the plan is for another model.
    """
    snapshots = Snapshots()
    with snapshots.taking():
        result = find_sites(loaded)
        facts = replace(site_facts(loaded, result, plan, devices), proofs=proofs_text(result.proofs))
        if plan is not None:
            pipeline.optimize(result, plan)
    return assemble(facts, plan, tuple(snapshots.changes()))


def assemble(facts: Inspection, plan: LatentPlan | None, stages: tuple[StageChanges, ...] = ()) -> HtmlReport:
    """Build a report from facts, with drawings and kernels.

    Raises FhoptError if the extra `report` is not installed.
    """
    drawings, drawn = _drawings([site.site for site in facts.sites], plan)
    listings = list_kernels(plan) if plan is not None else Listings()
    return HtmlReport(facts, drawings, drawn, listings, stages)


def _drawings(
    sites: Sequence[AttentionSite], plan: LatentPlan | None
) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Return the drawings and their indices; equal drawings are shared."""
    planned = {p.site.name: p for p in plan.sites} if plan else {}
    places: dict[str, int] = {}
    known: dict[str, int] = {}

    def place(diagram: drawing.Diagram) -> int:
        key = repr(diagram)
        if key not in known:
            known[key] = places.setdefault(diagram.svg, len(places))
        return known[key]

    drawn = []
    for site in sites:
        after = place(drawing.after(planned[site.name], plan)) if site.name in planned else -1
        drawn.append((place(drawing.before(site)), after))
    return tuple(places), tuple(drawn)


# --------------------------------------------------------------------------------------------------- the page


def check_report_packages() -> None:
    """Raise FhoptError if a package that a report needs is not installed, before anything slow starts."""
    for module in ("jinja2", "pygraphviz", "vl_convert"):
        need(module, "a report")


def page(report: HtmlReport) -> str:
    """Render the HTML page. Raises FhoptError if the extra `report` is not installed."""
    facts = json.loads(json.dumps(report.as_json()))  # as parsed from the JSON
    form = common_form(tuple(site["name"] for site in facts["sites"]))
    shorts = [short_name(site["name"], form) for site in facts["sites"]]
    text: str = template("report.html").render(
        number=lambda path, form: _number(facts, path, form), report=facts,
        form=form, shorts=shorts, languages=LANGUAGES, policy=POLICY, notice=_file("NOTICE.txt"),
        data=for_script(facts | {"shorts": shorts, "drawn": report.drawn, "charts": charts.all_charts()}),
        folded=fold(_compressed_parts(report)), vega=vega(), style=_file("report.css") + _highlighting(),
        script=_file("report.js"),
    )  # fmt: skip
    return text


def template(name: str) -> Any:
    """Load a template of this package, with autoescaping. Raises FhoptError if jinja2 is not installed."""
    jinja2 = need("jinja2", "a page")
    loader = jinja2.PackageLoader("fhopt.inspection")
    undefined = jinja2.StrictUndefined
    return jinja2.Environment(
        loader=loader, autoescape=True, undefined=undefined, trim_blocks=True, lstrip_blocks=True
    ).get_template(name)


def write(report: HtmlReport, path: Path) -> Path:
    """Write the page, atomically. Raises FhoptError if the path is not writable."""
    text = page(report)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with appearing(path) as staging:
            staging.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FhoptError(f"cannot write {path}: {error.strerror}. Choose a writable location.") from error
    return path


def _compressed_parts(report: HtmlReport) -> dict[str, Any]:
    """Return the parts that the page decompresses on demand."""
    return {
        "drawings": report.drawings,
        "pieces": report.listings.pieces,
        "kernels": [kernel.pieces for kernel in report.listings.files],
        "changes": [[change.lines for change in stage.changes] for stage in report.stages],
    }


def for_script(value: Any) -> str:
    """Serialize JSON for a script element, with HTML characters escaped."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def fold(value: Any) -> str:
    """Serialize JSON, deflated, in base64; `unfold` of report.js parses it."""
    squeezed = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = squeezed.compress(json.dumps(value, separators=(",", ":")).encode()) + squeezed.flush()
    return base64.b64encode(data).decode()


def vega() -> str:
    """Return Vega, Vega-Lite and Vega-Embed as one script, bundled by vl-convert and cached in the kernel folder."""
    converter = need("vl_convert", "a report")
    versions = (
        f"{converter.get_vega_version()} {converter.get_vegalite_versions()} {converter.get_vega_embed_version()}"
    )
    name = f"vega-{hashlib.sha256(versions.encode()).hexdigest()[:12]}.js"
    file = cached_file(name, lambda path: _write_vega(converter, path))
    return Path(file).read_text(encoding="utf-8")


def _write_vega(converter: Any, path: Path) -> None:
    script = converter.javascript_bundle().replace("</script", "<\\/script")
    with appearing(path) as staging:
        staging.write_text(script, encoding="utf-8")


def _file(name: str) -> str:
    return (resources.files("fhopt.inspection") / "templates" / name).read_text(encoding="utf-8")


def _highlighting() -> str:
    light, dark = style_sheet(".code", "default"), style_sheet(':root[data-theme="dark"] .code', "github-dark")
    return f"{light}\n@media screen {{\n{dark}\n}}\n"


def _fixed(value: float, digits: int) -> str:
    """Format a number with `digits` decimals, halves away from zero as in JavaScript, thousands grouped."""
    return f"{Decimal(value).quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP):,f}"


def _three_digits(value: float) -> str:
    """Format a number with three digits, small numbers as 1.2e-05."""
    return f"{float(Context(prec=3, rounding=ROUND_HALF_UP).create_decimal(Decimal(value))):.3g}"


FORMS: dict[str, Callable[[Any], str]] = {
    "count": lambda value: _fixed(value, 0),
    "number": lambda value: _fixed(value, 0 if float(value).is_integer() else 1),
    "ratio": lambda value: f"{_fixed(value, 2)}x",
    "fixed4": lambda value: _fixed(value, 4),
    "percent": lambda value: f"{'+' if value >= 0 else ''}{_fixed(value, 2)}%",
    "megabytes": lambda value: f"{_fixed(value / 1e6, 1)} MB",
    "small": _three_digits,
}


def at(facts: Any, path: str) -> Any:
    """Return the value in the JSON at a path such as `sites.3.plan.bytes`."""
    for key in path.split("."):
        facts = facts[int(key)] if isinstance(facts, list) else facts[key]
    return facts


def _number(facts: Any, path: str, form: str) -> Any:
    """Return a number of the JSON as the page shows it, marked with its path."""
    markup = need("markupsafe", "a report").Markup
    return markup('<span data-path="{}" data-form="{}">{}</span>').format(path, form, FORMS[form](at(facts, path)))


__all__ = ["HtmlReport", "assemble", "build_report", "page", "write"]
