"""Quality by context length: costs of tokens that are decoded one by one after a context."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from matplotlib.figure import Figure
from small_models import FittedModel, tiny_llama, token_ids
from text_models import save_text_model

from benchmarks import recording
from benchmarks.quality.contexts import able_contexts, decoded_costs, draw, main, rows_of
from fhopt.errors import FhoptError
from fhopt.evaluation.perplexity import token_costs
from fhopt.evaluation.statistics import TokenCosts
from fhopt.fitting.fit_plan import exact_plan

CONTEXT = 40


@pytest.mark.parametrize("chunk", [1, 3])
def test_tokens_after_the_context_are_decoded_in_chunks(llama: FittedModel, chunk: int) -> None:
    # float64: calls of other lengths round differently
    plan, model, ids = llama.plan(8), copy.deepcopy(llama.model).double(), token_ids(2, 120)
    lengths: list[int] = []
    hook = model.register_forward_pre_hook(lambda m, args, kwargs: lengths.append(args[0].shape[1]), with_kwargs=True)
    decoded = decoded_costs(model, ids, CONTEXT, plan, chunk)
    hook.remove()
    assert sum(lengths[-2 * len(range(CONTEXT, 119, chunk)) :]) == 2 * (119 - CONTEXT)
    assert max(lengths[-2 * len(range(CONTEXT, 119, chunk)) :]) == chunk
    blocks = token_costs(model, ids, plan)
    assert decoded.kl.shape == (2, 119 - CONTEXT)
    torch.testing.assert_close(decoded.exact, blocks.exact[:, CONTEXT:], rtol=1e-4, atol=5e-6)
    assert float(decoded.kl.mean()) == pytest.approx(float(blocks.kl[:, CONTEXT:].mean()), rel=0.3)


def test_an_exact_plan_costs_nothing_at_any_context(llama: FittedModel) -> None:
    plan = exact_plan([s.site for s in llama.plan(8).sites], sinks=2, recent=8, block=8)
    for context in (20, 90):
        costs = decoded_costs(llama.model, token_ids(1, context + 30), context, plan)
        assert float(costs.kl.max()) < 1e-6


def test_rows_have_the_mean_and_its_interval() -> None:
    kl = torch.tensor([[0.0] * 64 + [0.2] * 64])
    rows = rows_of("model, float32/600", "fhopt 4x", TokenCosts(torch.ones(1, 128), torch.ones(1, 128), kl))
    found = {row.metric: row.value for row in rows}
    assert found["kl"] == pytest.approx(0.1) and found["kl_low"] == 0 and found["kl_high"] == pytest.approx(0.2)
    assert (found["windows"], found["tokens"], found["increase_percent"]) == (1, 128, 0)


def test_a_context_beyond_the_positions_is_named_and_left_out(
    llama: FittedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    positions = llama.model.config.max_position_embeddings
    assert able_contexts(llama.model, (100, positions), 10) == [100]
    assert f"a {positions:,}-token context is left out" in capsys.readouterr().out
    with pytest.raises(FhoptError, match="no context fits"):
        able_contexts(llama.model, (positions,), 10)


def test_the_quick_form_writes_results_that_the_plot_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "RESULTS", tmp_path)
    folder = save_text_model(tmp_path / "model", model=tiny_llama(max_position_embeddings=1024))
    done = CliRunner().invoke(main, ["--quick", "--model", str(folder), "--text", "source"])
    assert done.exit_code == 0, done.output
    results = recording.read("quality_contexts-quick")
    assert {row.case.rpartition("/")[2] for row in results.of("kl")} == {"336", "600"}
    assert {row.impl for row in results.of("kl")} == {"fhopt 4x"}
    assert (tmp_path / "quality_contexts-quick.png").exists()
    figure = Figure()
    draw(figure, results)
    assert [axes.get_ylabel() for axes in figure.axes] == ["KL divergence, nats/token", "perplexity increase, %"]
