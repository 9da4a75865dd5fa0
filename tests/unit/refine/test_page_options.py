"""Page options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_models import tiny_llama

from fhopt.errors import FhoptError
from fhopt.models.loaded_model import LoadedModel
from fhopt.refine.page_options import PagingOptions, for_model, read_page_share

pytestmark = pytest.mark.usefixtures("small_pieces")

SMALL: dict[str, Any] = dict(tokens=4, sketch=4, context=480, sequences=1, least=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 0.0}, "expected shares above 0"),
        ({"mass": 1.5}, "expected shares above 0"),
        ({"tokens": 3}, "expected a divisor of the plan's block"),
        ({"sketch": 6}, "a multiple of 4"),
        ({"sketch": 0}, "a multiple of 4"),
        ({"context": 64}, "Use longer sequences"),
        ({"sequences": 0}, "Use longer sequences"),
    ],
)
def test_invalid_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FhoptError, match=message):
        PagingOptions(**(SMALL | options)).check(8, 20)


@pytest.mark.parametrize(("text", "share"), [("1/8", 0.125), ("0.125", 0.125), ("12.5%", 0.125), ("1", 1.0)])
def test_shares_are_parsed_from_three_notations(text: str, share: float) -> None:
    assert read_page_share(text) == share


@pytest.mark.parametrize("text", ["0", "1/0", "9/8", "-1", "all", "nan", ""])
def test_invalid_shares_are_refused(text: str) -> None:
    with pytest.raises(FhoptError, match="is not a share"):
        read_page_share(text)


def test_sequences_are_as_long_as_the_model_and_the_texts_allow(lettered: Any) -> None:
    """4,096 tokens by default, fewer if the model has fewer positions; too few are refused."""
    exact = 20
    needed = PagingOptions().needed(exact, 64)
    for positions, context in ((8192, 4096), (needed, needed)):
        loaded = LoadedModel("tiny", tiny_llama(max_position_embeddings=positions), lettered)
        assert for_model(loaded, PagingOptions(), 16, exact).context == context
        with pytest.raises(FhoptError, match="tokens"):
            for_model(loaded, PagingOptions(sequences=10_000), 16, exact)
    short = LoadedModel("short", tiny_llama(max_position_embeddings=needed - 1), lettered)
    with pytest.raises(FhoptError, match=f"short has {needed - 1} positions; expected at least {needed}"):
        for_model(short, PagingOptions(), 16, exact)


def test_the_command_refuses_a_mass_above_one(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from fhopt.cli.app import main

    result = CliRunner().invoke(main, ["fit", "demo", "--mass", "2", "-o", str(tmp_path / "plan")])
    assert result.exit_code == 2 and "is not a share" in result.stderr
    assert not (tmp_path / "plan").exists()
