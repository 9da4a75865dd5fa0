"""Texts from files, folders, JSON lines and tables."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_files import lines, written

from fhopt.errors import FhoptError
from fhopt.texts import files, tokens

Save = Callable[[dict[str, list[Any]]], str]
CHAT = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody."}]
CHAT_TEXT = "user\nWho?\n\nassistant\nNobody."


# ------------------------------------------------------------------------------------------------- files of text


def test_a_file_of_any_name_is_one_document(tmp_path: Path) -> None:
    assert tokens.read_text(written(tmp_path / "poem", "two\n\n\nparts\n")) == "two\n\n\nparts"


def test_a_byte_order_mark_is_dropped_and_invalid_bytes_are_replaced(tmp_path: Path) -> None:
    assert tokens.read_text(written(tmp_path / "a.txt", b"\xef\xbb\xbfcaf\xe9 noir")) == "caf\ufffd noir"
    record = b'\xef\xbb\xbf{"text": "caf\xe9"}\n'
    assert tokens.read_text(written(tmp_path / "a.jsonl", record)) == "caf\ufffd"


def test_a_folder_is_read_in_the_order_of_names_with_one_blank_line_between(tmp_path: Path) -> None:
    written(tmp_path / "b.md", "\nsecond\n\n")
    written(tmp_path / "a" / "deep.TXT", "first\n")
    written(tmp_path / "blank.rst", " \n")
    written(tmp_path / "c.jsonl", lines("third", {"text": "fourth"}))
    written(tmp_path / "d.jsonl.gz", gzip.compress(lines("fifth").encode()))
    written(tmp_path / "e.py", "sixth")
    written(tmp_path / "config.json", "{}")
    written(tmp_path / "weights.bin", b"\0")
    (tmp_path / "folder.txt").mkdir()
    assert tokens.read_text(str(tmp_path)).split("\n\n") == ["first", "second", "third", "fourth", "fifth", "sixth"]


def test_a_folder_named_like_a_built_in_text_must_be_given_as_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "topics" / "a.txt", "mine")
    monkeypatch.chdir(tmp_path)
    assert tokens.read_text("./topics") == "mine" != tokens.read_text("topics")


@pytest.mark.parametrize("content", [b"\x7fELF\0\0", "text".encode("utf-16")], ids=["program", "UTF-16"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_binary_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    with pytest.raises(FhoptError, match=rf"{name} is binary: it has NUL bytes; expected UTF-8 text.*iconv"):
        tokens.read_text(written(tmp_path / name, content))


@pytest.mark.parametrize(
    "name", ["nowhere", "owner/corpus", "~no-such-user/a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet"]
)
def test_an_unknown_name_gets_the_list_of_options(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = (
        rf"cannot read {name}: No such file.*text file.*one of topics, source, license, docstrings, mixture, scripture"
    )
    with pytest.raises(FhoptError, match=expected):
        tokens.read_text(name)


@pytest.mark.parametrize(("name", "content"), [("a.txt", " \n"), ("a.jsonl", '\n{"text": null}\n""\n'), ("b/a.c", "x")])
def test_a_source_without_text_is_refused(name: str, content: str, tmp_path: Path) -> None:
    source = Path(written(tmp_path / name, content))
    with pytest.raises(FhoptError, match="holds no text; expected a text file"):
        tokens.read_text(str(source.parent if source.suffix == ".c" else source))


# ----------------------------------------------------------------------------------------------------- JSON lines


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.gz", ".json.gz", ".JSONL"])
def test_a_line_is_a_string_or_an_object_or_a_chat(suffix: str, tmp_path: Path) -> None:
    content = lines("a", {"text": "b", "content": "no"}, {"content": "c"}) + "\n  \n" + lines({"messages": CHAT})
    packed = gzip.compress(content.encode()) if suffix.endswith(".gz") else content
    assert tokens.read_text(written(tmp_path / f"x{suffix}", packed)) == f"a\n\nb\n\nc\n\n{CHAT_TEXT}"


def test_null_counts_as_absent(tmp_path: Path) -> None:
    chat = [*CHAT, {"role": "assistant", "content": None, "tool_calls": []}]
    content = lines({"text": None, "messages": chat}, {"text": None}, {"messages": []}, "end")
    assert tokens.read_text(written(tmp_path / "x.jsonl", content)) == f"{CHAT_TEXT}\n\nassistant\n\nend"


def test_half_a_surrogate_pair_is_replaced(tmp_path: Path) -> None:
    assert tokens.read_text(written(tmp_path / "x.jsonl", '{"text": "a\\ud800b"}\n')) == "a?b"


BAD_LINES: dict[str, tuple[str, str]] = {
    "no JSON": ("just words", r"is not JSON \(Expecting value.*\): 'just words'; expected a string, or an object with"),
    "a list over many lines": ("[", r"is not JSON .*jq -c"),
    "nested without end": ("[" * 100_000, "is not JSON"),
    "a list": ('[{"text": "a"}]', "is a list; expected a string.*jq -c"),
    "a number": ("3", "is a number; expected"),
    "null": ("null", "is null; expected"),
    "an empty object": ("{}", "is an empty object; expected"),
    "other keys": ('{"prompt": "a", "n": 1}', 'is an object with "prompt": a string, "n": a number; expected.*rename'),
    "a text that is none": ('{"text": ["a"]}', 'is an object with "text": a list; expected'),
    "messages that are none": ('{"messages": "hello"}', 'is an object with "messages": a string; expected'),
    "a message without role": (lines({"messages": [CHAT[0], {"content": "x"}]}), 'with "content": a string; expected'),
    "a message with parts": (lines({"messages": [{"role": "user", "content": [1]}]}), '"content": a list; expected'),
    "a message that is none": (lines({"messages": ["hello"]}), 'is a string; expected {"role": string, "content"'),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_named_with_its_content_and_the_expected_one(case: str, tmp_path: Path) -> None:
    line, message = BAD_LINES[case]
    path = written(tmp_path / "x.jsonl", f'"good"\n\n{line}\n')
    with pytest.raises(FhoptError, match=message) as caught:
        tokens.read_text(path)
    assert f"line 3 of {path}" in str(caught.value) and "\n" not in str(caught.value)
    assert case != "a message without role" or "message 2 in line 3" in str(caught.value)


def test_an_endless_line_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 100)
    path = written(tmp_path / "x.json", json.dumps(["word"] * 1000))
    with pytest.raises(FhoptError, match=r"line 1 of .* has 100 characters or more.*jq -c"):
        tokens.read_text(path)


@pytest.mark.parametrize("damage", ["cut", "changed", "not packed"])
def test_a_damaged_archive_is_a_user_error(damage: str, tmp_path: Path) -> None:
    packed = gzip.compress(lines(*map(str, range(1000))).encode())
    damaged = {"cut": packed[:200], "changed": packed[:99] + b"\xff" * 99 + packed[198:], "not packed": b'"a"\n'}
    with pytest.raises(FhoptError, match=r"cannot read .*x\.jsonl\.gz"):
        tokens.read_text(written(tmp_path / "x.jsonl.gz", damaged[damage]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lines")


@given(st.lists(st.text().filter(str.strip), min_size=1), st.booleans(), st.integers(1, 60))
def test_text_written_as_json_lines_is_read_unchanged(folder: Path, texts: list[str], plain: bool, limit: int) -> None:
    records = texts if plain else [{"text": t} for t in texts]
    path = written(folder / "x.jsonl", "\n".join(json.dumps(r, ensure_ascii=plain) for r in records))
    expected = "\n\n".join(t.strip("\n") for t in texts)
    assert tokens.read_text(path) == expected
    assert expected.startswith(tokens.read_text(path, limit))
    assert min(limit, len(expected)) - 2 <= len(tokens.read_text(path, limit)) <= limit


# -------------------------------------------------------------------------------------------------- limits


def test_no_more_is_read_than_the_limit(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", lines("x" * 30, "y" * 30) + "neither read nor checked\n")
    assert tokens.read_text(path, limit=50) == "x" * 30 + "\n\n" + "y" * 18
    written(tmp_path / "b.txt", b"\0")
    assert len(tokens.read_text(str(tmp_path), limit=40)) == 40
    assert tokens.read_text(written(tmp_path / "c.txt", "z" * 60), limit=50) == "z" * 50
    assert tokens.read_text("topics", limit=50) == tokens.read_text("topics")[:50]


def test_the_limit_applies_across_the_files_of_a_folder(tmp_path: Path) -> None:
    for name in "abc":
        written(tmp_path / f"{name}.txt", name * 10)
    assert tokens.read_text(str(tmp_path), limit=17) == "a" * 10 + "\n\n" + "b" * 5


# ------------------------------------------------------------------------------------------------ tables of datasets


@pytest.fixture
def datasets() -> Any:
    reason = "datasets is not installed; install it with: pip install 'fhopt[data]'"
    module = pytest.importorskip("datasets", reason=reason)
    module.disable_progress_bars()
    return module


@pytest.fixture(params=["folder", "splits", "Parquet", "folder of Parquet"])
def save(request: pytest.FixtureRequest, datasets: Any, tmp_path: Path) -> Save:
    """Write columns in one of the table formats, and return the file name."""

    def written_as_table(columns: dict[str, list[Any]]) -> str:
        table, path = datasets.Dataset.from_dict(columns), tmp_path / "table"
        if "Parquet" in request.param:
            path.mkdir()
            table.to_parquet(str(path / "x.parquet"))
            return str(path if "folder" in request.param else path / "x.parquet")
        other = datasets.Dataset.from_dict({"text": ["test"]})
        saved = datasets.DatasetDict({"test": other, "train": table}) if request.param == "splits" else table
        saved.save_to_disk(str(path))
        return str(path)

    return written_as_table


@pytest.mark.parametrize("column", ["text", "content"])
def test_a_row_of_a_table_is_a_document(column: str, save: Save) -> None:
    name = save({"number": [1, 2, 3, 4], column: ["a\n", None, "", "b"]})
    assert tokens.read_text(name) == "a\n\nb"
    assert tokens.read_text(name, limit=1) == "a"


def test_a_chat_in_a_table_is_parsed_like_one_in_json(save: Save) -> None:
    assert tokens.read_text(save({"messages": [CHAT, CHAT[:1]]})) == f"{CHAT_TEXT}\n\nuser\nWho?"


def test_a_table_gives_no_more_than_the_limit(save: Save) -> None:
    name = save({"text": [f"{i:05}" for i in range(3000)]})
    assert tokens.read_text(name, limit=12) == "00000\n\n00001"
    assert tokens.read_text(name).endswith("\n\n02999")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["a"], "answer": ["b"]}, "has the columns prompt, answer; expected text, content or messages"),
        ({"text": [1]}, r'row 1 of .* is an object with "text": a number; expected'),
        ({"messages": [CHAT, [{"role": None, "content": "x"}]]}, r"message 1 in row 2 of .* is an object"),
    ],
    ids=["no column", "numbers", "no role"],
)
def test_a_table_without_text_lists_its_columns(columns: dict[str, list[Any]], message: str, save: Save) -> None:
    with pytest.raises(FhoptError, match=message):
        tokens.read_text(save(columns))


def test_the_format_of_a_saved_dataset_does_not_matter(datasets: Any, tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": ["a", "b"], "number": [1, 2]})
    table.with_format("numpy", columns=["number"]).select([1, 0]).save_to_disk(str(tmp_path))
    assert tokens.read_text(str(tmp_path)) == "b\n\na"


def test_splits_without_train_are_listed(datasets: Any, tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict({"text": ["a"]})
    datasets.DatasetDict({"validation": table, "test": table}).save_to_disk(str(tmp_path))
    with pytest.raises(FhoptError, match="has the splits test, validation; expected one called train"):
        tokens.read_text(str(tmp_path))
    assert tokens.read_text(str(tmp_path / "test")) == "a"


@pytest.mark.parametrize("name", ["dataset_info.json", "state.json", "data-00000-of-00001.arrow", "x.parquet"])
@pytest.mark.parametrize("content", [b"", b"[]", b"PAR1 nothing PAR1"])
def test_a_damaged_table_is_a_user_error(name: str, content: bytes, datasets: Any, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path))
    path = written(tmp_path / name, content)
    with pytest.raises(FhoptError, match=r"could not be read: .* Write it again") as caught:
        tokens.read_text(path if name == "x.parquet" else str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_dataset_with_a_missing_file_is_a_user_error(datasets: Any, tmp_path: Path) -> None:
    written(tmp_path / "dataset_info.json", "{}")
    with pytest.raises(FhoptError, match=r"could not be read: .* Write it again"):
        tokens.read_text(str(tmp_path))


@pytest.mark.parametrize("name", ["x.parquet", "dataset_info.json", "dataset_dict.json"])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = written(tmp_path / name, "")
    with pytest.raises(FhoptError, match=r"datasets cannot be imported \(.*pip install 'fhopt\[data\]'"):
        tokens.read_text(path if name == "x.parquet" else str(tmp_path))


def test_text_files_need_no_library_of_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    assert tokens.read_text(written(tmp_path / "x.jsonl", lines("a"))) == "a"
