"""The pages of measured results and their sections: title, command, conditions and table of each results file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from quality_tables import means
from results_tables import (
    Results,
    attention,
    by_case,
    compiled_zoo,
    contexts,
    coverage,
    decode,
    engines,
    head,
    tasks,
    zoo,
    zoo_plans,
    zoo_programs,
    zoo_wide,
)


@dataclass(frozen=True)
class Section:
    """Describe how one results file is shown."""

    title: str
    command: str
    about: str
    table: Callable[[Results], str]


@dataclass(frozen=True)
class ResultsPage:
    """Describe one page: its title, what it is about, and its sections by results file."""

    title: str
    about: str
    sections: Mapping[str, Section]


QUALITY_COMMAND = "python -m benchmarks.quality.perplexity --model FOLDER"
CODES_COMMAND = "python -m benchmarks.quality.plan_codes --plan uniform@8x=PLAN --plan trellis@8x=PLAN --text FILE"

QUALITY = {
    "quality-SmolLM2-135M-Instruct": Section(
        "SmolLM2-135M: default plans and other methods",
        f"{QUALITY_COMMAND} --ratio 4 --ratio 8 --context 1024 --baseline NAME --texts FILE",
        "Plans with default options, 1,024 tokens of each text. All other methods have the same attention sinks and "
        "recent window, in 16 bits ([what each is written after](../comparison.md)).",
        means,
    ),
    "quality": Section(
        "SmolLM2-135M: calibrated on one domain, all methods", "make bench-quality",
        "Plans calibrated on `topics` only; FP32, 2,048 tokens of each text. Bytes are counted at 8,192 tokens, "
        "everything included. `QuantizedCache` (quanto, hqq) has its own recent window.",
        means,
    ),
    "quality-Qwen2.5-Coder-0.5B-Instruct": Section(
        "Qwen2.5-Coder-0.5B", f"{QUALITY_COMMAND} --baseline kivi-3bit --context 1024 --texts FILE",
        "FP32, plans without segments, 1,024 tokens of each text.", means,
    ),
    "quality-Qwen2.5-Coder-1.5B-Instruct": Section(
        "Qwen2.5-Coder-1.5B in BF16",
        f"{QUALITY_COMMAND} --dtype bfloat16 --baseline kivi-3bit --context 1024 --texts FILE",
        "Plans with uniform quantization. Part of every value is BF16 rounding of the model: the compressed and the "
        "full-precision cache add up in different orders.", means,
    ),
    "quality-Qwen2.5-Coder-1.5B-Instruct-float32": Section(
        "Qwen2.5-Coder-1.5B in FP32, plans fitted for a CPU",
        f"{QUALITY_COMMAND} --plans PLANS --baseline kivi-3bit --context 1024 --texts FILE",
        "Plans of `fhopt fit --device cpu`, which trades quality for attention speed; calibrated in BF16.", means,
    ),
    "quality-SmolLM2-135M-Instruct-codes": Section(
        "Trellis codes: SmolLM2-135M", CODES_COMMAND,
        "Uniform and [trellis codes](../explanation/algebra.md#trellis-codes) from one calibration; FP32, 1,024 tokens "
        "of each text.", means,
    ),
    "quality-Qwen2.5-Coder-1.5B-Instruct-codes": Section(
        "Trellis codes: Qwen2.5-Coder-1.5B", f"{CODES_COMMAND} --model FOLDER",
        "Default plans without a device: uniform codes at 4x, trellis codes at 8x. Calibrated in BF16, measured in "
        "FP32. `en` and `prose` are from another calibration.", means,
    ),
    "quality_contexts": Section(
        "Quality by context length while decoding", "make bench-quality-contexts",
        "Default plans compared with the full-precision cache. Scored tokens of held-out text are decoded one by one "
        "after contexts of each length; they are the same at every length. In parentheses: 95% intervals.", contexts,
    ),
    "calibration_curve": Section(
        "Calibration tokens", "make bench-calibration",
        "Plans fitted to different numbers of built-in tokens, evaluated on 1,024 tokens each of other domains. Three "
        "of five sequences fit the bases. Times are of one thread, with other work on the machine.", by_case,
    ),
    "healing": Section(
        "Healing", "make bench-heal",
        "The 8x plan before and after `fhopt heal` on `topics`; `source` is held out. `kl left`: remaining share of "
        "the KL divergence.", by_case,
    ),
    "retrieval": Section(
        "Page selection: one page in eight", "make bench-retrieval",
        "SmolLM2, 4x plan, compared with the same plan attending to all pages.", by_case,
    ),
}  # fmt: skip

TASKS = {
    "tasks": Section(
        "HumanEval, long-context tasks, generated text", "make bench-tasks",
        "The full-precision cache and plans on the same items, BF16. Task names end in the context length. McNemar "
        "tests are in the file.", tasks,
    ),
    "retrieval_tasks": Section(
        "Page selection: long-context questions", "make bench-retrieval",
        "Errors are standard errors of the change over texts. `gained`, `lost`: questions answered only with page "
        "selection, or only with all pages.", by_case,
    ),
}  # fmt: skip

SPEED = {
    "decode": Section(
        "Decode step at an 8,192-token context", "make bench-decode",
        "SmolLM2-135M on a CPU, interleaved runs. In parentheses: speedup over the fastest implementation in "
        "transformers.", decode,
    ),
    "decode-contexts": Section(
        "Decode step at shorter contexts",
        "python -m benchmarks.cpu.decode --dtype float32 --tokens 640 --tokens 2048",
        "SmolLM2-135M on a CPU, interleaved runs, contexts of 640 and 2,048 tokens.", decode,
    ),
    "attention": Section(
        "Single-token attention", "make bench-attention",
        "One query token, interleaved runs; ms. In parentheses: speedup over the fastest implementation in PyTorch.",
        attention,
    ),
    "memory": Section(
        "Process memory", "make bench-memory",
        "SmolLM2-135M in BF16 over 8,192 tokens, one process per cache.", by_case,
    ),
    "retrieval_operator": Section(
        "Page selection: attention only", "make bench-retrieval",
        "One query token at a 32,768-token context, random quantized values, interleaved runs. In parentheses: "
        "relative to all pages. `listed`: without the time of page selection itself.", by_case,
    ),
    "retrieval_head": Section(
        "Retrieval head", "make bench-retrieval",
        "From hidden states to the argmax, interleaved runs. In parentheses: speedup over the fastest dense head, "
        "fhopt's included.", head,
    ),
}  # fmt: skip

ENGINES = {
    "peers": Section(
        "CPU inference engines", "make bench-peers",
        "Each engine in its own environment and process, interleaved, with the same tokens and threads "
        "([method](../howto/compare_engines.md)). In parentheses: fhopt relative to the fastest other engine with "
        "16-bit weights, or to the fastest of all for small weights. `SmolLM2-135M-32K` is SmolLM2 with 32,768 "
        "positions instead of 8,192: it measures speed only.", engines,
    ),
}  # fmt: skip

SERVING = {
    "serving": Section(
        "Plans in vLLM", "make bench-serve",
        "vLLM on CPU, SmolLM2-135M in BF16, 1 GiB of KV cache, one process per engine: concurrent 8,192-token requests "
        "as vLLM reports them, and throughput for `requests x prompt tokens`. `32 x 512-8000` is a load of 32 requests "
        "in 512 MiB. In parentheses: relative to vLLM without a plan ([setup](../howto/serve_with_vllm.md)).", by_case,
    ),
}  # fmt: skip

DETECTION = {
    "zoo": Section(
        "The curated zoo", "make zoo",
        "Tiny random models; [every forward pass](zoo.md). Not rewritten: softmaxes that are not attention, or that "
        "fhopt does not support, each with a reason.", zoo,
    ),
    "zoo_wide": Section(
        "Every model class of transformers, timm, diffusers and others", "make zoo-wide",
        "Every class is built small, with random weights, and called once; its attentions are counted from what it "
        "computes ([class by class](zoo_wide.md)). Attentions that are not found have a reason, or are counted under "
        "missed silently.", zoo_wide,
    ),
    "zoo_plans": Section(
        "Plans on every decoder of transformers", "make zoo-plans",
        "A plan is fitted to random tokens, applied and decoded, and compared with the original model "
        "([refusals with their reasons](zoo_plans.md)).", zoo_plans,
    ),
    "zoo_programs": Section(
        "Decode programs on every decoder of transformers", "make zoo-programs",
        "How the decode step of each class with a 4x plan runs, compared with the original forward "
        "([reasons](zoo_programs.md)).", zoo_programs,
    ),
    "compiled-zoo-traced": Section(
        "The zoo through torch.compile", "make compiled-zoo",
        "Tasks that eager mode and Inductor complete, with `ratio: 1`. Differences are relative to eager mode, which "
        "in 16 bits rounds as well.", compiled_zoo,
    ),
    "fuzz_graphs": Section(
        "Random attention programs", "make fuzz-graphs",
        "Random programs, each compiled once and compared with eager mode in three calls with other values: outputs, "
        "gradients, NaN ([what else is checked](../explanation/exactness.md)). Not rewritten: the reason is one of "
        "[these](../reference/not_rewritten.md). Repeated: drawn before.", by_case,
    ),
    "finding": Section("Detection time", "make bench-find", "Seconds and graph nodes.", by_case),
}  # fmt: skip

RELIABILITY = {
    "soak": Section(
        "Long runs", "make soak",
        "Small models compared with a reference that stores every token, in FP64.", by_case,
    ),
    "endurance": Section(
        "Memory over time", "make soak MINUTES=60",
        "The variants of the long runs, mixed with every mode of `generate()`, repeatedly: process bytes after each "
        "lap.", by_case,
    ),
    "matrix": Section(
        "Versions", "make test-matrix",
        "Version-dependent tests in each environment ([which, and why](../versions.md)). Tests are skipped if their "
        "requirements are not installed.", by_case,
    ),
    "coverage": Section("Test coverage", "make coverage", "Of the tests that are not slow, without a GPU.", coverage),
}  # fmt: skip

PAGES = {
    "quality": ResultsPage(
        "Quality",
        "Change in perplexity, and KL divergence from the model with the full-precision cache, on held-out texts: "
        "domains that did not calibrate the plan. Texts from calibration domains are in the CSV files only.",
        QUALITY,
    ),
    "tasks": ResultsPage("Tasks", "Accuracy on tasks, with the number of items and 95% confidence intervals.", TASKS),
    "speed": ResultsPage("Speed and memory", "Latency and memory on CPUs.", SPEED),
    "engines": ResultsPage("Other inference engines", "Decode and prompt throughput, by engine.", ENGINES),
    "serving": ResultsPage("Serving", "Plans in vLLM.", SERVING),
    "detection": ResultsPage(
        "Detection", "Which attentions fhopt finds, and how exactly the rewritten graphs compute.", DETECTION
    ),
    "reliability": ResultsPage("Reliability", "Long runs, versions and test coverage.", RELIABILITY),
}  # fmt: skip
