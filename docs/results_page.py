"""Generate the page of measured results from benchmarks/results/*.json.

    python docs/results_page.py        writes docs/results.md

Nothing is measured here, and every figure on the page is in a file. Tables: results_tables.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from results_tables import (
    RESULTS,
    ROOT,
    Results,
    attention,
    by_case,
    compiled_zoo,
    contexts,
    coverage,
    decode,
    engines,
    head,
    quality,
    quality_and_kl,
    tasks,
    zoo,
    zoo_plans,
    zoo_wide,
)

PAGE = ROOT / "docs" / "results.md"


@dataclass(frozen=True)
class Section:
    """Describe how one results file is shown."""

    title: str
    command: str
    about: str
    table: Callable[[Results], str]


# --------------------------------------------------------------------------------------------------- sections


QUALITY_COMMAND = "python -m benchmarks.quality.perplexity --model FOLDER"
CODES_COMMAND = "python -m benchmarks.quality.plan_codes --plan uniform@8x=PLAN --plan trellis@8x=PLAN --text FILE"

SECTIONS = {
    "quality": Section(
        "Loss against bytes", "make bench-quality",
        "The increase of SmolLM2-135M-Instruct's perplexity with each KV cache, bytes counted at 8,192 tokens. Only "
        "`topics` is of the kind of text used for calibration. Intervals, means, KL divergence: "
        "[loss against bytes](quality.md).",
        quality,
    ),
    "quality-SmolLM2-135M-Instruct": Section(
        "Loss against bytes: SmolLM2 with the default calibration, more methods, more texts",
        f"{QUALITY_COMMAND} --ratio 4 --ratio 5.3 --ratio 8 --ratio 12 --context 1024 --baseline NAME ... "
        "--texts FILE ...",
        "Plans of the default options (four kinds of text, 16 attention sinks, means over 256 tokens, a window of 256 "
        "tokens), 1,024 tokens of each text. Other methods have the same attention sinks and window in 16 bits: "
        "KIVI, QuaRot, TurboQuant, llama.cpp's q4_0 with a Hadamard rotation, OSCAR, AATC, KVTC (what each was written "
        "after: [comparison](comparison.md)). `source`, `docstrings`, `topics` and `mixture` are of the kinds that "
        "calibrate; `law` is the GNU GPL, `chat` a FAQ of Python in a chat template, `fr` and `de` are manuals.",
        quality_and_kl,
    ),
    "quality_contexts": Section(
        "Quality by context length while decoding", "make bench-quality-contexts",
        "Default plans compared with the full-precision cache. The scored tokens of held-out text are decoded one by "
        "one after contexts of each length, and are the same at every length of a model. In parentheses: 95% "
        "intervals.", contexts,
    ),
    "calibration_curve": Section(
        "How many tokens calibrate", "make bench-calibration",
        "Plans fitted to few and to many tokens of the built-in texts, on texts of 1,024 tokens of other kinds (law, a "
        "licence, scripture, C, French, chat, numbers): the mean of their KL, the largest, and the increase of "
        "perplexity. Seconds are of one thread beside other work. Three of five sequences fitted the bases. The "
        "default is 16,384 tokens, half of them for the bases; `fhopt demo` takes 12,288.", by_case,
    ),
    "quality-Qwen2.5-Coder-0.5B-Instruct": Section(
        "Loss against bytes: Qwen2.5-Coder-0.5B-Instruct",
        f"{QUALITY_COMMAND} --ratio 4 --ratio 8 --baseline kivi-3bit --context 1024 --texts FILE",
        "The same of another model, with plans of the default options, on 12 texts of 1,024 tokens, of kinds that did "
        "not calibrate, and four that did (`source`, `docstrings`, `topics`, `mixture`). KIVI has the same attention "
        "sinks and residual window, in 16 bits. `law` is the GNU GPL, `chat` a FAQ of Python in a chat template, `zh`, "
        "`de`, `fr` are manuals; `python` is from the half of `source` that calibrates.",
        quality_and_kl,
    ),
    "quality-Qwen2.5-Coder-1.5B-Instruct": Section(
        "Loss against bytes: Qwen2.5-Coder-1.5B-Instruct",
        f"{QUALITY_COMMAND} --dtype bfloat16 --ratio 4 --ratio 8 --baseline kivi-3bit --context 1024 --texts FILE",
        "The same of a larger model, in bfloat16: exact cache and plans add up in other orders, and what that rounds "
        "differently is part of every figure. `law` is the GNU GPL; `de`, `fr`, `zh`, `it` are manuals of Debian; "
        "`prose` and `chat` are quotations; `numbers` is a table of stocks. Unlike the smaller model's, these plans "
        "have segments.",
        quality_and_kl,
    ),
    "quality-Qwen2.5-Coder-1.5B-Instruct-float32": Section(
        "Loss against bytes: Qwen2.5-Coder-1.5B-Instruct in float32",
        f"{QUALITY_COMMAND} --plans PLANS --ratio 4 --ratio 8 --ratio 12 --baseline kivi-3bit --context 1024 "
        "--texts FILE",
        "Plans that were calibrated on the model in bfloat16 and fitted for a CPU (`fhopt fit --device cpu`), which "
        "gives loss for time: attention takes 0.59 and 0.64 of the time of the plans in the section on [trellis "
        "codes](#trellis-codes-qwen25-coder-15b-instruct), which lose least. The model in float32, which shows what "
        "caches lose, without what bfloat16 rounds differently; texts of `benchmarks/quality/debian_texts.py`.",
        quality_and_kl,
    ),
    "quality-SmolLM2-135M-Instruct-codes": Section(
        "Trellis codes: SmolLM2", CODES_COMMAND,
        "Plans of one calibration with uniform and with [trellis codes](explanation/algebra.md#trellis-codes), the "
        "model in float32, 1,024 tokens of texts of kinds that did not calibrate, but for `docstrings`.",
        quality_and_kl,
    ),
    "quality-Qwen2.5-Coder-1.5B-Instruct-codes": Section(
        "Trellis codes: Qwen2.5-Coder-1.5B-Instruct", CODES_COMMAND + " --model FOLDER",
        "Plans of today's defaults without a device: uniform codes at 4x, trellis codes at 8x; calibrated on the model "
        "in bfloat16, the model in float32. `en` and `prose` are of an earlier calibration.",
        quality_and_kl,
    ),
    "decode": Section(
        "A decode step at a context of 8,192 tokens", "make bench-decode",
        "SmolLM2 on a CPU, measured alternately. In brackets: speed-up over the fastest implementation in "
        "transformers.", decode,
    ),
    "decode-contexts": Section(
        "A decode step at shorter contexts",
        "python -m benchmarks.cpu.decode --dtype float32 --tokens 640 --tokens 2048",
        "SmolLM2 on a CPU, measured alternately, at contexts of 640 and 2,048 tokens.", decode,
    ),
    "peers": Section(
        "Other engines on a CPU", "make bench-peers",
        "Each engine in an environment and processes of its own, in turns, with the same tokens and threads: "
        "[how](howto/compare_engines.md). In brackets: fhopt against the best of all others "
        "whose weights have 16 bits or more, or of all where its own have fewer. `SmolLM2-135M-32K` is SmolLM2 that "
        "may read 32,768 tokens in place of 8,192: it says how fast, not what.", engines,
    ),
    "serving": Section(
        "Plans in vLLM", "make bench-serve",
        "vLLM for CPUs, SmolLM2 in bfloat16, 1 GiB for keys and values, a process for each engine: requests of 8,192 "
        "tokens that vLLM says fit at once, and the speed of `requests x tokens of a prompt`. `32 x 512-8000` is a "
        "load of requests in 512 MiB, where the exact engine lets most of them wait. In brackets: against exact vLLM; "
        "[how](howto/serve_with_vllm.md).", by_case,
    ),
    "attention": Section(
        "Attention of one token", "make bench-attention",
        "One query token, measured alternately. In brackets: speed-up over the fastest implementation in torch. With "
        "GB/s: [attention of one token](attention.md).", attention,
    ),
    "memory": Section(
        "Memory of the process", "make bench-memory",
        "SmolLM2 in bfloat16 over 8,192 tokens, each cache in a process of its own.",
        by_case,
    ),
    "tasks": Section(
        "Tasks", "make bench-tasks",
        "The exact cache and plans on the same items: HumanEval's problems whose completion passes its tests, KL on "
        "the exact model's own text by the number of generated tokens (`generation@N`: up to N), tasks after RULER. "
        "McNemar's tests and confidence intervals are in the file.", tasks,
    ),
    "healing": Section(
        "Healing", "make bench-heal",
        "The 8x plan before and after `fhopt heal` on `topics`; `source` was not read. `kl left` is the share of the "
        "KL divergence that remains.", by_case,
    ),
    "soak": Section(
        "Long runs", "make soak", "Small models compared with a reference that keeps every token, in float64.", by_case
    ),
    "endurance": Section(
        "Memory over time", "make soak MINUTES=60",
        "The variants of the long runs, mixed with every mode of `generate()`, repeatedly: bytes of the process after "
        "each lap.",
        by_case,
    ),
    "zoo": Section(
        "Finding attention", "make zoo", "Tiny random models; each forward pass is listed in [the zoo](zoo.md).", zoo
    ),
    "zoo_wide": Section(
        "Finding attention in every class of transformers", "make zoo-wide",
        "Every class is made small, with random weights, and called once; its attentions are counted from what it "
        "computes. Class by class: [the wide zoo](zoo_wide.md).", zoo_wide,
    ),
    "zoo_plans": Section(
        "Plans on every decoder of transformers", "make zoo-plans",
        "Fitted to random tokens, applied, decoded; compared with the model alone. Refusals with their sentences: "
        "[plans on every decoder](zoo_plans.md).", zoo_plans,
    ),
    "compiled-zoo-traced": Section(
        "The zoo through torch.compile", "make compiled-zoo",
        "Tasks that eager and inductor complete, with `ratio: 1`. Differences are relative to eager; in 16 bits eager "
        "mode rounds as well, in other places.", compiled_zoo,
    ),
    "retrieval": Section(
        "Page selection: one page in eight", "make bench-retrieval",
        "SmolLM2, 4x plan, compared with the same plan reading all pages.",
        by_case,
    ),
    "retrieval_tasks": Section(
        "Page selection: answers to questions", "make bench-retrieval",
        "Errors are standard errors of the change, over texts. `gained`, `lost`: questions that are answered only with "
        "page selection, only with all pages.", by_case,
    ),
    "retrieval_operator": Section(
        "Page selection: attention alone", "make bench-retrieval",
        "One query token at a context of 32,768, random quantized values, measured alternately. In brackets: relative "
        "to all pages. `listed`: without the time of page selection itself.", by_case,
    ),
    "retrieval_head": Section(
        "The retrieval head", "make bench-retrieval",
        "From hidden states to the arg-max, measured alternately. In brackets: speed-up over the fastest dense head, "
        "fhopt's included.", head,
    ),
    "matrix": Section(
        "Versions", "make test-matrix",
        "Tests that depend on versions, in each environment: [which, and why](versions.md). Tests are skipped where "
        "what they need is not installed.", by_case,
    ),
    "coverage": Section(
        "Test coverage", "make coverage", "Of the tests that are not slow, without a GPU.", coverage
    ),
    "finding": Section("Cost of finding attention", "make bench-find", "Seconds and nodes.", by_case),
}  # fmt: skip

HEAD = """<!-- Made by docs/results_page.py from benchmarks/results. Do not edit. -->

# Measured results

All figures on this page were written by benchmarks of the repository into `benchmarks/results`; `make docs` generates
the page from these files. Each command measures again on your machine. How to read them:
[what the measurements say](measurements.md). For what they do not show, see the [limits](limits.md): above all, quality
was measured on models of 135M to 1.5B parameters and on one encoder, and the other methods were run as published, not
tuned.
"""


def page(folder: Path = RESULTS) -> str:
    """Return docs/results.md, known benchmarks first, in the order of `SECTIONS`."""
    results = {path.stem: Results.read(path) for path in sorted(folder.glob("*.json"))}
    order = [name for name in SECTIONS if name in results] + [name for name in results if name not in SECTIONS]
    return "\n".join([HEAD, *(section(results[name], folder) for name in order)])


def section(results: Results, folder: Path) -> str:
    """Format a section: title, command, table, picture, and what it was measured on."""
    shown = SECTIONS.get(results.name) or Section(results.name, "make help", "", by_case)
    parts = [f"## {shown.title}", f"{shown.about} `{shown.command}`".strip(), shown.table(results)]
    if (folder / f"{results.name}.png").exists():
        parts.append(f"![{shown.title.lower()}](../benchmarks/results/{results.name}.png)")
    return "\n\n".join([*parts, made_on(results)]) + "\n"


def made_on(results: Results) -> str:
    """Return machine, versions and commit in one sentence."""
    on, versions = results.machine, results.versions
    device = on.get("gpu") or f"{on['cpu']} ({on['cpu_capability']}), {on['cores']} cores, {on['threads']} threads"
    known = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "transformers") if name in versions)
    commit, _, dirty = results.commit.partition("-")
    state = " with changes" if dirty else ""
    file = f"[{results.name}.json](../benchmarks/results/{results.name}.json)"
    return f"*Measured on {device}; {known}; commit {commit[:12]}{state}. All figures: {file}.*"


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
