"""Draw the pictures of the explanations with Graphviz and matplotlib, as fhopt draws its reports.

    python docs/drawings.py            writes docs/pictures/*.svg

The two attention sites are drawn from a small model and a plan made by hand; the others from the text below. Numbers in
them are shapes and defaults, not measurements.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import torch

import fhopt
from fhopt.calibration.options import FitOptions
from fhopt.inspection.drawing import COLOURS, Diagram
from fhopt.models.capture import capture
from fhopt.passes import pipeline
from fhopt.plan.latent_plan import LatentPlan
from fhopt.plan.site_plan import BitGroup, SidePlan, SitePlan

FOLDER = Path(__file__).resolve().parent / "pictures"


def small_plan() -> LatentPlan:
    """Make a plan by hand for a small model: 8 query heads on 4 kv heads of size 16, with one latent for all heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = dict(
        vocab_size=64, hidden_size=128, intermediate_size=96, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    model, ids = LlamaForCausalLM(LlamaConfig(**sizes)).eval(), torch.ones(1, 16, dtype=torch.int64)
    (site,) = pipeline.find_attentions(
        capture(model, (), {"input_ids": ids, "use_cache": False}).program
    ).sites.values()
    tiers = (BitGroup(8, 8, 1 / 32), BitGroup(4, 24, 0.3))
    side = SidePlan(torch.zeros(1, 32, 4 * 16), torch.zeros(4, 16, 32), tiers)
    return LatentPlan((SitePlan(site, "freq", side, side),), 4, 128, 64)


def site_drawings() -> dict[str, str]:
    """Draw one attention site without and with a plan."""
    drawing = fhopt.draw(small_plan().sites[0])
    return {"site-before.svg": drawing.before, "site-after.svg": drawing.svg}


def rotation() -> str:
    """Draw why a latent across heads within one frequency may be computed from rotated keys."""
    diagram = Diagram()
    diagram.node("keys", "io", "keys of G heads, frequency f", "G complex numbers")
    for name, texts in {"above": ("rotate", "encode"), "below": ("encode", "rotate")}.items():
        first, second = (
            ("times e^(i theta_f t)", "one number for all heads") if text == "rotate" else ("z = E_f k", "across heads")
            for text in texts
        )
        diagram.node(f"{name}1", "rotation" if texts[0] == "rotate" else "latent", texts[0], *first)
        diagram.node(f"{name}2", "rotation" if texts[1] == "rotate" else "latent", texts[1], *second)
        diagram.edge("keys", f"{name}1", "k_f")
        diagram.edge(f"{name}1", f"{name}2", "G numbers" if texts[0] == "rotate" else "R numbers")
        diagram.edge(f"{name}2", "latent", "R numbers")
    diagram.node("latent", "cache", "the same latent,", "already rotated")
    return diagram.svg


def stages() -> str:
    """Draw the stages of the compiler, and which of them is approximate."""
    diagram = Diagram()
    names = (
        ("capture", "io", "Dynamo or torch.export"),
        ("normalize", "attention", "every spelling becomes one node", "exact, checked by running both"),
        ("find", "attention", "projections, rotation, mask, cache", "reads only"),
        ("fit", "latent", "statistics, bases, bits: a plan", "the only approximate stage"),
        ("compress, absorb", "latent", "keys and values become latents,", "decoders absorbed into query and output"),
        ("lower", "cache", "kernels for attention,", "inductor for the rest"),
    )
    for name, role, *lines in names:
        diagram.node(name, role, name, *lines)
    for (source, *_), (target, *_) in itertools.pairwise(names):
        diagram.edge(source, target)
    return diagram.svg


PASSES: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "as written": (
        ("q", "score", "io", "q"),
        ("k", "score", "io", "k"),
        ("score", "divide", "attention", "matmul"),
        ("divide", "softmax", "attention", "/ sqrt(D)"),
        ("softmax", "mix", "attention", "softmax"),
        ("v", "mix", "io", "v"),
        ("mix", "", "attention", "matmul"),
    ),
    "after normalize": (
        ("q", "attention", "io", "q"),
        ("k", "attention", "io", "k"),
        ("v", "attention", "io", "v"),
        ("attention", "", "attention", "fhopt::attention"),
    ),
    "after compress": (
        ("q", "attention", "io", "q"),
        ("kv", "encode", "io", "k, v"),
        ("encode", "pack", "latent", "encode"),
        ("pack", "unpack", "cache", "pack: the KV cache"),
        ("unpack", "decode", "cache", "unpack"),
        ("decode", "attention", "latent", "decode"),
        ("attention", "", "attention", "fhopt::attention"),
    ),
    "after absorb": (
        ("q", "absorb", "io", "q"),
        ("absorb", "attention", "latent", "absorb"),
        ("kv", "encode", "io", "k, v"),
        ("encode", "pack", "latent", "encode"),
        ("pack", "attention", "cache", "pack: the KV cache"),
        ("attention", "expand", "attention", "fhopt::latent_attention"),
        ("expand", "", "latent", "expand"),
    ),
}  # of each column: node, the node that reads it, role, text


def passes() -> str:
    """Draw one attention as it is written, and in the graph after each of three passes, side by side."""
    diagram = Diagram()
    for name, nodes in PASSES.items():
        for node, target, role, text in nodes:
            diagram.node(f"{name} {node}", role, text)
            diagram.edge(f"{name} {node}", f"{name} {target}")
        diagram.node(f"{name} ", "io", "o", name)
    return diagram.svg


STEP = (
    ("tokens", "io", "token ids [B, 1]"),
    ("prologue", "io", "eager stage", "embedding, positions"),
    ("first", "weight", "segment 0", "rotary angles; norm, q, k, v", "and rotation of layer 0"),
    ("attend 0", "attention", "attention of layer 0", "append to the cache, attend"),
    ("middle", "weight", "segment 1", "output projection, norm, MLP;", "norm, q, k, v, rotation of layer 1"),
    ("attend 1", "attention", "attention of layer 1", "append to the cache, attend"),
    ("more", "io", "...", "equal layers share their instructions"),
    ("last", "weight", "last segment", "output projection, norm, MLP;", "last norm, LM head"),
    ("logits", "io", "logits [B, 1, V]"),
)


def decode_step() -> str:
    """Draw the stages of a decode program: what runs eagerly, and what is one native call."""
    diagram = Diagram()
    for name, role, *lines in STEP:
        diagram.node(name, role, *lines)
    for (source, *_), (target, *_) in itertools.pairwise(STEP):
        diagram.edge(source, target, "one native call begins" if target == "first" else "")
    for layer in (0, 1):
        diagram.node(f"cache {layer}", "cache", f"KV cache of layer {layer}", "latents, recent window")
        diagram.edge(f"cache {layer}", f"attend {layer}")
    return diagram.svg


def cache() -> str:
    """Draw the parts of a latent KV cache, and the packed latent of one token."""
    figure = _figure(8.4, 3.3)
    panel = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    panel.set_axis_off()
    panel.set_xlim(0, 100)
    panel.set_ylim(0, 40)
    options = FitOptions()
    recent = options.recent_tokens
    parts = (
        (2, 16, "attention", "attention sinks", f"first {options.sinks}, exact"),
        (19, 54, "cache", "quantized tokens", f"packed latents, blocks of {options.block}"),
        (
            74,
            24,
            "rotation",
            "recent window",
            f"newest {recent} to {recent + options.block}, {options.window_bits} bits",
        ),
    )
    for left, width, role, title, text in parts:
        _box(panel, left, 25, width, 9, role)
        panel.text(left + width / 2, 31, title, ha="center", va="center", weight="bold")
        panel.text(left + width / 2, 27.7, text, ha="center", va="center")
    panel.text(2, 37, "time", color="#52525b")
    panel.annotate("", (98, 37.6), (9, 37.6), arrowprops={"arrowstyle": "->", "color": "#71717a"})
    for top, bottom in ((38, 13), (42, 98)):  # one quantized token, enlarged
        panel.plot([top, bottom], [25, 14], color="#71717a", linewidth=0.8)
    left = 13
    for width, text in ((9, "scale"), (22, "8 bits"), (30, "4 bits"), (14, "2 bits"), (10, "0 bits")):
        role = "io" if text in ("scale", "0 bits") else "latent"
        _box(panel, left, 6, width, 8, role, dashed=text == "0 bits")
        panel.text(left + width / 2, 10, text, ha="center", va="center")
        left += width
    panel.text(
        13,
        2.5,
        "key latent of one token: bit groups of channels, most important first; values likewise",
        color="#52525b",
    )
    return _svg(figure)


def _box(panel: Any, left: float, bottom: float, width: float, height: float, role: str, dashed: bool = False) -> None:
    from matplotlib.patches import Rectangle

    fill, line = COLOURS[role]
    style = "--" if dashed else "-"
    panel.add_patch(Rectangle((left, bottom), width, height, facecolor=fill, edgecolor=line, linestyle=style))


def filling() -> str:
    """Draw reverse water-filling: the cost of each channel, and its bits."""
    figure = _figure(7.0, 3.2)
    panel = figure.subplots()
    power, level = torch.logspace(0, -4, 32), 0.002  # of channels in a basis that orders them
    bits = filled_bits(power, level)
    colours = [COLOURS["latent"][1] if b > 0 else COLOURS["io"][1] for b in bits]
    panel.bar(range(len(power)), power.tolist(), color=colours)
    panel.axhline(level, color=COLOURS["cache"][1])
    panel.set_title("Reverse water-filling: channels above the line get bits", fontsize=9)
    panel.text(32, level * 1.5, "water level", fontsize=8, color=COLOURS["cache"][1], ha="right", va="bottom")
    for at, count in enumerate(bits.int().tolist()):
        panel.text(at, float(power[at]) * 1.15, str(count), ha="center", fontsize=7)
    panel.set_yscale("log")
    panel.set_xlabel("channel of the latent, most important first (number on the bar: its bits)")
    panel.set_ylabel("cost of dropping it")
    panel.set_yticks([])
    panel.set_yticks([], minor=True)
    return _svg(figure)


def filled_bits(power: torch.Tensor, level: float) -> torch.Tensor:
    """Return the bits that bring the error of each channel down to `level`: none for channels below it."""
    return (0.5 * torch.log2(power / level)).clamp_min(0).ceil()


def _figure(width: float, height: float) -> Any:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.hashsalt": "fhopt", "svg.fonttype": "none", "font.family": "sans-serif"})
    return Figure(figsize=(width, height))


def _svg(figure: Any) -> str:
    from io import StringIO

    text = StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None}, bbox_inches="tight", transparent=True)
    return text.getvalue()


def drawings() -> dict[str, str]:
    """Return all drawings by file name."""
    others = {
        "rotation": rotation, "stages": stages, "passes": passes, "decode_step": decode_step, "cache": cache,
        "filling": filling,
    }  # fmt: skip
    return site_drawings() | {f"{name}.svg": draw() for name, draw in others.items()}


def main(folder: Path) -> None:
    """Write the drawings into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in drawings().items():
        (folder / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
