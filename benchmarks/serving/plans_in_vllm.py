"""Benchmark of vLLM with plans against vLLM without: concurrency, time to first token, decode throughput.

    .venv-serving/bin/python -m benchmarks.serving.plans_in_vllm --plan 4x=PLAN --plan 8x=PLAN [--model MODEL]
    .venv-serving/bin/python -m benchmarks.serving.plans_in_vllm --quick ...  one short case (also QUICK=1)

`make bench-serve` runs it in the environment of `make test-serving`. Every engine has its own process with the same
bytes for keys and values; the engines are interleaved, and each result is the best of all rounds. Concurrency is what
vLLM prints at 8,192 tokens per request and 1 GiB, in bfloat16. A case is a number of concurrent requests with prompts
of one length that fit into every engine, including the one without a plan:

    time_to_first_token_ms     of all requests together, until each has one token
    decode_tokens_per_second   of all requests together, with prompts cached as prefixes: from the time when all have
                               their first token until all have their last

The load is `LOAD` concurrent requests with prompts of `SPREAD` tokens (evenly spaced lengths on a logarithmic scale)
that do not fit at once into the engine without a plan, so that some wait there:

    requests_per_minute        until all have their `ANSWER` tokens
    mean_first_token_ms        from the arrival of a request, waiting included
    mean_token_ms              per token, between a request's first token and its last

The log-likelihood of `TOKENS` tokens of documentation not used for calibration, nats/token in float32, is compared with
that of fhopt's own cache on the same tokens (the baseline), processed in chunks of 64.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.palette import color_of, describe, plain
from benchmarks.recording import ResultsFile, Row, child_environment, is_quick, record

EXACT = "exact"
LENGTH = 8192  # tokens per request for the concurrency
BYTES = 1 << 30  # bytes of keys and values for the concurrency
ROOM = 2 << 30  # bytes of keys and values for the cases
CASES = ((1, 512), (8, 512), (8, 2048), (8, 8000))  # requests, prompt tokens
QUICK = ((2, 300),)
LOAD, SPREAD, ANSWER = 32, (512, 8000), 128  # of the load: requests, shortest and longest prompt, decoded tokens
LOAD_ROOM = 1 << 29  # bytes of keys and values for the load
NEW = 33  # decoded tokens after a prompt, the first of which counts as prefill
ROUNDS = 2
LOAD_CASE = f"{LOAD} x {SPREAD[0]}-{SPREAD[1]}"
TOKENS, TEXT, CALL = 2048, "topics", 64  # of the log-likelihood: tokens, text, chunk size of the own cache


# --------------------------------------------------------------------------------------------------- one process


def measured(folder: str, cases: list[tuple[int, int]]) -> dict[str, Any]:
    """Measure one engine in this process: for each case the seconds of prefill and of decoding."""
    engine = _engine(folder, ROOM)
    config = engine.llm_engine.vllm_config
    most = max(count * (length + NEW) for count, length in cases)
    if most > config.cache_config.kv_cache_size_tokens:
        raise SystemExit(f"{folder}: {most} tokens, and room for {config.cache_config.kv_cache_size_tokens}.")
    return {f"{count} x {length}": _case(engine, count, length) for count, length in cases}


def concurrency(folder: str) -> float:
    """Return how many requests of `LENGTH` tokens an engine in this process reports to hold in `BYTES`."""
    return float(_engine(folder, BYTES).llm_engine.vllm_config.cache_config.kv_cache_max_concurrency)


def _engine(folder: str, size: int) -> Any:
    from vllm import LLM

    return LLM(
        folder, dtype="bfloat16", max_model_len=LENGTH, kv_cache_memory_bytes=size, enforce_eager=True,
        max_num_batched_tokens=2048, disable_log_stats=False,
    )  # fmt: skip


def _case(engine: Any, count: int, length: int) -> dict[str, float]:
    """Time prefill of `length`-token prompts, then decoding."""
    prompts = [_prompt(i, length, engine.llm_engine.vllm_config) for i in range(count)]
    engine.reset_prefix_cache()
    start = time.perf_counter()
    _generated(engine, prompts, 1)
    first = time.perf_counter() - start
    times = [one.metrics for one in _generated(engine, prompts, NEW)]  # the engine's own clock
    decoding = max(t.last_token_ts for t in times) - max(t.first_token_ts for t in times)
    return {"first_ms": 1000 * first, "tokens_per_second": count * (NEW - 1) / decoding}


def load(folder: str) -> dict[str, float]:
    """Time the load in this process."""
    engine = _engine(folder, LOAD_ROOM)
    shortest, longest = SPREAD
    lengths = [round(shortest * (longest / shortest) ** (i / (LOAD - 1))) for i in range(LOAD)]
    mixed = [lengths[7 * i % LOAD] for i in range(LOAD)]  # short and long ones interleaved
    prompts = [_prompt(i, length, engine.llm_engine.vllm_config) for i, length in enumerate(mixed)]
    start = time.perf_counter()
    times = [one.metrics for one in _generated(engine, prompts, ANSWER)]
    seconds = time.perf_counter() - start
    return {
        "requests_per_minute": 60 * LOAD / seconds,
        "mean_first_token_ms": 1000 * sum(t.first_token_latency for t in times) / LOAD,
        "mean_token_ms": 1000 * sum(t.last_token_ts - t.first_token_ts for t in times) / LOAD / (ANSWER - 1),
    }


def _prompt(i: int, length: int, config: Any) -> list[int]:
    """Return tokens of request `i`, which share no prefix with another request."""
    vocabulary = config.model_config.get_vocab_size()
    return [(7919 * (i + 1) * (j + 3)) % (vocabulary - 10) + 5 for j in range(length)]


def _generated(engine: Any, prompts: list[list[int]], tokens: int) -> Any:
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    return engine.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)


# --------------------------------------------------------------------------------------------------- likelihood


def likelihood(folder: str) -> dict[str, float]:
    """Measure the mean log-likelihood of a text in vLLM and in fhopt's own cache, in this process."""
    from vllm import LLM, SamplingParams

    from fhopt.texts import tokens

    engine = LLM(folder, dtype="float32", max_model_len=LENGTH, kv_cache_memory_bytes=BYTES, enforce_eager=True)
    half = tokens.halves(tokens.read_text(TEXT))[1]
    (ids,) = tokens.sequences(engine.get_tokenizer(), half, count=1, length=TOKENS, what=f"the text {TEXT}").tolist()
    parameters = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (one,) = engine.generate([{"prompt_token_ids": ids}], parameters, use_tqdm=False)
    served = [next(iter(token.values())).logprob for token in one.prompt_logprobs[1:]]
    return {"served": sum(served) / len(served), "own": _own_likelihood(Path(folder), ids)}


def _own_likelihood(folder: Path, ids: list[int]) -> float:
    """Return transformers' result on the same tokens, with the cache of the folder's plan or the full-precision one."""
    import torch
    from transformers import AutoModelForCausalLM

    from fhopt.cache.latent_cache import LatentCache
    from fhopt.hf.apply import apply
    from fhopt.models.rewritten_folder import is_rewritten, read_folder
    from fhopt.models.rewritten_model import load_exact
    from fhopt.serving.batch import means_from

    options: dict[str, Any] = {}
    first = CALL
    if is_rewritten(folder):
        read = read_folder(folder)
        model: Any = apply(load_exact(read, dtype=torch.float32).eval(), read.plan)
        options, first = {"past_key_values": LatentCache(read.plan)}, max(CALL, means_from(read.plan))
        calls = [ids[:first], *(ids[at : at + CALL] for at in range(first, len(ids) - 1, CALL))]
    else:
        model, calls = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), [ids]
    with torch.inference_mode():
        logits = torch.cat([model(torch.tensor([call]), **options).logits[0] for call in calls])[: len(ids) - 1]
    return float(logits.double().log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None]).mean())


def _called(what: str, folder: str, cases: list[tuple[int, int]]) -> Any:
    """Call the function of this name."""
    if what == "measured":
        return measured(folder, cases)
    return {"concurrency": concurrency, "likelihood": likelihood, "load": load}[what](folder)


# --------------------------------------------------------------------------------------------------- all processes


def in_a_process(what: str, folder: str, cases: list[tuple[int, int]] | None = None) -> Any:
    """Call the function `what` of this file in a separate process."""
    environment = child_environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", HF_HUB_OFFLINE="1")
    words = ["--what", what, "--one", folder, "--cases", json.dumps(cases or [])]
    command = [sys.executable, "-m", "benchmarks.serving.plans_in_vllm", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def folders_of(model: str, plans: dict[str, str], at: Path) -> dict[str, str]:
    """Write the folder of each implementation: the original, and one per plan."""
    from fhopt.export import rewrite_folder
    from fhopt.models.loader import load_model
    from fhopt.models.model_name import folder_of
    from fhopt.plan.latent_plan import LatentPlan

    source, loaded = folder_of(model), load_model(model)
    if source is None:
        raise click.UsageError("--model must be a folder of a Hugging Face model, which vLLM opens.")
    folders = {EXACT: str(source)}
    for name, path in plans.items():
        folders[f"fhopt@{name}"] = str(at / name)
        rewrite_folder.rewrite_folder(loaded, LatentPlan.load(path), at / name, source)
    return folders


def rows_of(results: dict[str, list[dict[str, Any]]], held: dict[str, float]) -> list[Row]:
    """Return the rows of each implementation, with the best of its rounds, and of concurrent requests."""
    rows = []
    for name, turns in results.items():
        ratio = held[name] / held[EXACT]
        rows.append(Row(f"{LENGTH} tokens", name, "concurrency", held[name], "requests", held[EXACT], ratio))
        for case in turns[0]:
            speeds = {n: max(t[case]["tokens_per_second"] for t in results[n]) for n in (EXACT, name)}
            firsts = {n: min(t[case]["first_ms"] for t in results[n]) for n in (EXACT, name)}
            rows.append(Row(case, name, "decode_tokens_per_second", speeds[name], "tokens/s", speeds[EXACT],
                            speeds[name] / speeds[EXACT]))  # fmt: skip
            rows.append(Row(case, name, "time_to_first_token_ms", firsts[name], "ms", firsts[EXACT],
                            firsts[EXACT] / firsts[name]))  # fmt: skip
    return rows


def likelihood_rows(found: dict[str, dict[str, float]]) -> list[Row]:
    """Return a row per implementation: log-likelihood in vLLM, with the own cache as baseline."""
    return [
        Row(f"{TOKENS} tokens of text", name, "log_likelihood_nats", one["served"], "nats", one["own"],
            one["served"] / one["own"])
        for name, one in found.items()
    ]  # fmt: skip


def load_rows(found: dict[str, dict[str, float]]) -> list[Row]:
    """Return a row for each metric of the load, per implementation."""
    rows = []
    for name, one in found.items():
        for metric, value in one.items():
            exact = found[EXACT][metric]
            more = metric == "requests_per_minute"
            unit = "requests/min" if more else "ms"
            rows.append(Row(LOAD_CASE, name, metric, value, unit, exact, value / exact if more else exact / value))
    return rows


PANELS = {
    "concurrency": "concurrent requests of 8,192 tokens\nin 1 GiB of KV cache",
    "requests_per_minute": "requests/min under load\n(32 requests of 512 to 8,000 tokens, 512 MiB)",
}


def draw(figure: Any, results: ResultsFile) -> None:
    """Plot how many requests fit, and how many are served per minute under load."""
    shown = {metric: results.of(metric) for metric in PANELS if results.of(metric)}
    figure.set_size_inches(10, 2.8)
    for axes, (metric, rows) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        names = ["vLLM, full precision" if row.impl == EXACT else row.impl.replace("@", " ") for row in rows]
        bars = axes.barh(names, [row.value for row in rows], color=[color_of(name) for name in names])
        axes.bar_label(bars, [f"{row.value:.1f}" for row in rows], padding=3, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlabel(PANELS[metric], fontsize=8)
        axes.tick_params(labelsize=8)
        axes.margins(x=0.12)
        plain(axes)
    gain = max(row.ratio or 0.0 for row in results.of("concurrency"))
    about = "vLLM for CPUs, SmolLM2-135M-Instruct, bfloat16; 4x-cpu: a 4x plan fitted for this CPU"
    describe(figure, f"Up to {gain:.1f}x more requests fit into the same memory", about, results)


@click.command()
@click.option("--model", default="", help="Folder of the original.")
@click.option("--plan", "plans", multiple=True, help="NAME=FOLDER of a plan, such as 4x=demo/plan; repeatable.")
@click.option("--quick", is_flag=True, default=is_quick, help="One short case, one turn.")
@click.option("--rounds", default=ROUNDS, show_default=True, help="Turns of each engine.")
@click.option("--what", default="", hidden=True)
@click.option("--one", default="", hidden=True)
@click.option("--cases", default="", hidden=True)
def main(model: str, plans: tuple[str, ...], quick: bool, rounds: int, what: str, one: str, cases: str) -> None:
    """Measure all engines, interleaved, and write benchmarks/results/serving.json."""
    if one:
        print(json.dumps(_called(what, one, json.loads(cases))))
        return
    named = dict(plan.split("=", 1) for plan in plans)
    chosen = list(QUICK if quick else CASES)
    with tempfile.TemporaryDirectory() as folder:
        folders = folders_of(model, named, Path(folder))
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in folders}
        for _ in range(1 if quick else rounds):
            for name, path in folders.items():
                results[name].append(in_a_process("measured", path, chosen))
        held = {name: in_a_process("concurrency", path) for name, path in folders.items()}
        loads = {} if quick else {name: in_a_process("load", path) for name, path in folders.items()}
        likelihoods = {} if quick else {name: in_a_process("likelihood", path) for name, path in folders.items()}
    rows = rows_of(results, held) + load_rows(loads) + likelihood_rows(likelihoods)
    record("serving", rows, draw)


if __name__ == "__main__":
    main()
