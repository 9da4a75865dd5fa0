"""Generate the pages of exceptions and of reasons from the code: every message for a user, with its fix.

    python docs/error_catalogue.py        writes docs/reference/errors.md and docs/reference/not_rewritten.md

Messages are read from the source text (`ast`), not collected at run time, so every message that can be raised is on
the page. The last sentences of a message are its fix; a test fails for a message without one.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "reference"
PACKAGES = ("fhopt", "passes", "codegen")
ERROR, REASON = "FhoptError", "Miss"


@dataclass(frozen=True, order=True)
class Message:
    """A message in the source.

    module: its file without suffix, such as `fhopt/models/loader`. text: the message, with ⟨names⟩ instead of values.
    """

    module: str
    line: int
    text: str


@dataclass(frozen=True)
class Family:
    """Messages about one subject. modules: patterns of the files that raise them."""

    title: str
    about: str
    modules: tuple[str, ...]


FAMILIES = (
    Family(
        "Opening a model",
        "`MODEL` of a command, and `fhopt.models.loader.load_model`, take `demo`, a folder of Hugging Face, a GGUF "
        "file, a `.pt2` program, or `python.module:function`. Nothing is downloaded.",
         ("fhopt/models/loader", "fhopt/models/gguf_files", "fhopt/models/gguf_header",
         "fhopt/models/converted_models", "fhopt/errors", "fhopt/hf/load",
         "fhopt/models/model_files", "fhopt/models/model_name", "fhopt/models/loaded_model",
          "fhopt/models/model_facts", "fhopt/models/capture", "fhopt/models/example_inputs", "fhopt/models/sites",
          "fhopt/models/transformers_import", "fhopt/cli/demo"),
    ),
    Family(
        "Texts and batches",
        "Values of `--data`, `text=` and `batches=`. Sizes are checked before anything slow starts.",
        ("fhopt/texts/*", "fhopt/calibration/*"),
    ),
    Family(
        "Choosing a plan",
        "Sizes, bits, layouts, devices and limits that cannot be combined.",
        ("fhopt/fitting/*", "fhopt/refine/loss_target", "fhopt/refine/options", "fhopt/hardware/*", "fhopt/cli/fit",
         "fhopt/planning/*",         "fhopt/cli/measure"),
    ),
    Family(
        "Healing, page selection and the retrieval head",
        "Options of `fhopt heal`, `--pages`, `--mass` and `fhopt head`.",
        ("fhopt/refine/*", "fhopt/lm_head/*"),
    ),
    Family(
        "Files of plans, caches and rewritten models",
        "A file is read whole and checked before any of it is used. A damaged or altered file, or one of another "
        "model, is refused; nothing is half loaded.",
        ("fhopt/plan/*", "fhopt/files", "fhopt/hf/prompt_cache", "fhopt/hf/quantizer", "fhopt/models/rewritten_*",
         "fhopt/export/rewrite_folder", "fhopt/cli/arguments"),
    ),
    Family(
        "Running with a plan",
        "`fhopt.apply`, KV caches, and compiled models that use them.",
        ("fhopt/hf/*", "fhopt/cache/*", "fhopt/attention/*", "passes/rewrite/latent_buffers"),
    ),
    Family(
        "The compiler backend",
        'Options of `torch.compile(model, backend="flashhead", options={...})`.',
        ("fhopt/backend/*",),
    ),
    Family(
        "Evaluation and speed",
        "`fhopt eval`, `fhopt bench` and the lm-eval harness.",
        ("fhopt/evaluation/*", "fhopt/cli/options"),
    ),
    Family(
        "Generating text",
        "Prompts and options of `fhopt generate` and `fhopt chat`; a plan beside MODEL.",
        ("fhopt/cli/generate", "fhopt/cli/text_model"),
    ),
    Family("Inspection", "Drawings, graphs, reports.", ("fhopt/inspection/*", "fhopt/cli/inspect")),
    Family(
        "Exporting and verifying",
        "`fhopt rewrite --format pt2`, `fhopt export`, `fhopt verify`.",
        ("fhopt/export/*", "fhopt/cli/export"),
    ),
    Family("Kernels", "Rendering, compiling, tuning.", ("codegen/*",)),
    Family(
        "Several devices",
        "`--device-map`, and plans and caches in processes that share a model.",
        ("fhopt/parallel/*",),
    ),
    Family(
        "Serving with vLLM", "Folders, plans and options with which a plan is not served.", ("fhopt/serving/*",),
    ),
    Family("Others", "", ("*",)),
)  # fmt: skip

REASONS = (
    Family(
        "The attention is not recognized",
        "Passes `decompose`, `functionalize` and `normalize`. The graph is not changed, and runs as it would without "
        "fhopt.",
        ("passes/prepare/*", "passes/graph/*", "passes/recognize/normalize", "passes/recognize/softmax",
         "passes/recognize/scores", "passes/recognize/contraction", "passes/recognize/layout", "passes/recognize/axes",
         "passes/recognize/kv_head_repetition", "passes/recognize/masks", "passes/recognize/canonical*",
         "passes/recognize/readable", "passes/recognize/sum_floor", "passes/recognize/validity",
         "passes/stages"),
    ),
    Family(
        "There are no keys and values to compress",
        "Pass `find_attention`: the attention has no projections or caches that a plan could compress.",
        ("passes/recognize/find_attention", "passes/recognize/node_roles"),
    ),
    Family(
        "The latents that a model keeps are not absorbed",
        "Pass `absorb_projection`: the attention reads expanded keys and values, as it would without fhopt.",
        ("passes/recognize/kept_latents", "passes/recognize/latent_expansion", "passes/rewrite/absorb_projection"),
    ),
    Family(
        "The plan does not fit the attention",
        "Pass `compress`.",
        ("passes/rewrite/compress", "passes/rewrite/absorb", "passes/rewrite/lower"),
    ),
    Family(
        "The buffers cannot become buffers of latents",
        "Pass `latent_buffers`: keys and values that a module writes by index.",
        ("passes/rewrite/latent_buffers", "passes/rewrite/buffer_updates"),
    ),
    Family(
        "There is no language-model head",
        "`fhopt head` reports the reason and stops.",
        ("passes/recognize/find_lm_head",),
    ),
    Family("Others", "", ("*",)),
)  # fmt: skip


def messages(name: str = ERROR) -> list[Message]:
    """Return every message of a class, in the order of files and lines; repeated messages of a file once."""
    unique: dict[tuple[str, str], Message] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            module = path.relative_to(ROOT).with_suffix("").as_posix()
            if module.startswith(("fhopt/passes/", "fhopt/codegen/")):  # links to the packages beside fhopt
                continue
            for line, text in sorted(_raised(path, name)):
                unique.setdefault((module, text), Message(module, line, text))
    return sorted(unique.values())


def _raised(path: Path, name: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and _name(node.func) == name and node.args:
            yield node.lineno, " ".join("".join(_words(node.args[0])).split())


def _words(node: ast.expr) -> Iterator[str]:
    """Yield the text of an argument, with ⟨name⟩ for each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        for part in node.values:
            yield from _words(part.value if isinstance(part, ast.FormattedValue) else part)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and _is_text(node):
        yield from _words(node.left)
        yield from _words(node.right)
    else:
        name = _name(node).strip("_").lower() or "value"
        yield f"⟨{_PLAIN.get(name, name)}⟩"


_PLAIN = {"strerror": "reason", "hf": "version", "numel": "number"}


def _is_text(node: ast.expr) -> bool:
    """Return whether an expression contains a string."""
    return any(isinstance(n, ast.JoinedStr) or isinstance(getattr(n, "value", None), str) for n in ast.walk(node))


def _name(node: ast.AST | None) -> str:
    """Name an expression as a reader would: mostly by its last identifier."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Call(func=ast.Name(id="type"), args=[inner])):  # type(x).__name__
            return f"kind of {_name(inner)}" if _name(inner) == "error" else _name(inner)
        case ast.Attribute(value=inner, attr=name):
            return _name(inner) if name.startswith("__") else name
        case ast.Call():
            return _called(node)
        case ast.Subscript(value=inner, slice=ast.Constant(value=str(key))):
            return key or _name(inner)
        case ast.Subscript(value=inner) | ast.Starred(value=inner) | ast.UnaryOp(operand=inner):
            return _name(inner)
        case ast.GeneratorExp(generators=[first, *_]) | ast.ListComp(generators=[first, *_]):
            return _name(first.iter)
        case ast.BoolOp(values=values):
            return next(filter(None, map(_name, values)), "")
        case ast.BinOp(left=left, right=right) | ast.IfExp(body=left, orelse=right):
            return _name(left) or _name(right)
        case ast.Constant(value=str(text)) if text.isidentifier():
            return text
    return ""


def _called(call: ast.Call) -> str:
    """Name a call by its last named argument, or by the object whose method it is."""
    name = _name(call.func)
    named = [a for a in call.args if not isinstance(a, ast.Constant) or isinstance(a.value, str)]
    described = next(filter(None, map(_name, reversed(named))), "")
    if not described and isinstance(call.func, ast.Attribute):
        described = _name(call.func.value)
    return f"number of {described}" if name in ("len", "numel") else described or name


# --------------------------------------------------------------------------------------------------- the pages

_CUT = re.compile(r"[;,:.] (?=[eE]xpected )|; (?=give |choose )|\. (?=[A-Z⟨`'-]|fhopt )|(?<=⟩) (?=(?:Fit|Install) )")


def split(text: str) -> tuple[str, str]:
    """Split a message into the problem, and what was expected with the fix; the second is empty without a fix."""
    depth = 0
    for at, letter in enumerate(text):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if depth == 0 and (cut := _CUT.match(text, at)):
            return text[:at], _sentence(text[cut.end() :])
    return text.rstrip("."), ""


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def grouped(results: list[Message], families: tuple[Family, ...]) -> dict[Family, list[Message]]:
    """Group messages by family, each in the first family that names its module."""
    groups: dict[Family, list[Message]] = {}
    for message in results:
        family = next(f for f in families if any(fnmatch(message.module, m) for m in f.modules))
        groups.setdefault(family, []).append(message)
    return {f: groups[f] for f in families if f in groups}


ERRORS_HEAD = """# Exceptions raised by fhopt

An error that a user can correct raises `fhopt.FhoptError`. Its message says what was found, what was expected, and how
to fix it; the command line prints it as one line, `fhopt: ...`, and ends with exit code 2. This page lists every such
message. Values that depend on the case are in ⟨angle brackets⟩.

Any other exception is a defect of fhopt: a `PassError` names the pass that broke its contract and the node, and
`FHOPT_DUMP=FOLDER` writes the graph after each pass, for a bug report. A graph that a pass does not recognize is not an
error: it is not rewritten, for [a reason](not_rewritten.md).
"""
REASONS_HEAD = """# Reasons not to rewrite an attention

An attention that fhopt does not recognize is not rewritten, runs unchanged, and is reported with a reason: by
`fhopt explain MODEL`, by `fhopt.report(compiled)`, and in an HTML report, together with the source line of the model's
code. This page lists all reasons. Values that depend on the case are in ⟨angle brackets⟩.
"""


def errors_page() -> str:
    """Return the text of docs/reference/errors.md."""
    parts = [_GENERATED, ERRORS_HEAD]
    for family, result in grouped(messages(ERROR), FAMILIES).items():
        rows = [f"| {_cell(problem)} | {_cell(fix)} |" for problem, fix in map(split, _texts(result))]
        parts += [
            f"## {family.title}\n",
            f"{family.about}\n",
            "| message | expected, and the fix |",
            "|---|---|",
            *rows,
            "",
        ]
    return "\n".join(parts)


def reasons_page() -> str:
    """Return the text of docs/reference/not_rewritten.md."""
    parts = [_GENERATED, REASONS_HEAD]
    for family, result in grouped(messages(REASON), REASONS).items():
        rows = [
            f"- {_cell(_sentence(text))}" for text in _texts(result) if re.search("[a-z]{3}", re.sub("⟨.*?⟩", "", text))
        ]
        parts += [f"## {family.title}\n", f"{family.about}\n", *rows, ""]
    return "\n".join(parts)


_GENERATED = "<!-- Made by docs/error_catalogue.py from the code. Do not edit. -->\n"
PAGES = {"errors.md": errors_page, "not_rewritten.md": reasons_page}


def _texts(results: list[Message]) -> list[str]:
    return list(dict.fromkeys(message.text for message in results))


def _cell(text: str) -> str:
    """Escape the text of a message for a Markdown table, except in backticks."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([\\*_|<>\[\]`~#$^{}])", r"\\\1", p) for p in parts)


def main() -> None:
    """Write the pages."""
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
