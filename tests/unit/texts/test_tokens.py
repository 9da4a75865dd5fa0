"""Tokens for calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from text_files import lines, words, written

from fhopt.errors import FhoptError
from fhopt.texts import tokens

# -------------------------------------------------------------------------------------------------- halves


@pytest.mark.parametrize(
    ("text", "calibration"),
    [("1\n2 3\n4", "1\n2 3"), ("one two three four", "one two three"), ("abcd", "ab"), ("", "")],
)
def test_halves_are_cut_at_a_line_or_word_and_lose_nothing(text: str, calibration: str) -> None:
    assert tokens.halves(text) == (calibration, text[len(calibration) :])


# ------------------------------------------------------------------------------------------------ calibration tokens


def test_calibration_alternates_between_the_first_halves_of_the_texts(tmp_path: Path) -> None:
    texts = [
        written(tmp_path / "a.txt", "1 2 3 4 5 6 7 8\n" + "9 " * 8),
        written(tmp_path / "b.jsonl", lines("11 12 13 14", "99 99 99 99")),
    ]
    ids = tokens.calibration_ids(words, texts, count=3, length=4)
    assert ids.tolist() == [[1, 2, 3, 4], [11, 12, 13, 14], [5, 6, 7, 8]]


def test_only_the_start_of_a_long_text_is_tokenized_unless_its_words_are_long() -> None:
    lengths: list[int] = []

    def recording(text: str, **options: Any) -> Any:
        lengths.append(len(text))
        return words(text, **options)

    assert tokens.sequences(recording, "7 " * 5000, count=2, length=4, what="it").tolist() == [[7] * 4] * 2
    assert tokens.sequences(recording, (" " * 99 + "7") * 8, count=2, length=4, what="it").tolist() == [[7] * 4] * 2
    assert lengths == [128, 128, 800]


def test_a_text_too_short_for_its_share_reports_its_tokens_and_a_fix(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "1 2 3\n4 5")
    message = r"first half of '.*a\.txt' has 3 tokens; expected at least 8 \(2 sequences of 4\).*longer text.*fewer"
    with pytest.raises(FhoptError, match=message):
        tokens.calibration_ids(words, [path, path], count=4, length=4)


def test_an_empty_list_of_texts_is_refused() -> None:
    with pytest.raises(FhoptError, match="no text was passed; expected at least one"):
        tokens.calibration_ids(words, [], count=4, length=4)
