"""Texts from files and folders: plain text, JSON lines, saved data sets, Parquet."""

from __future__ import annotations

import gzip
import importlib.util
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fhopt.errors import FhoptError
from fhopt.files import check_regular, opened

LONGEST_LINE = 64_000_000  # characters of JSON
JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
IN_FOLDERS = (".txt", ".md", ".rst", ".py", ".jsonl", ".jsonl.gz", ".parquet")
KEYS = ("text", "content", "messages")
RECORD = 'a string, or an object with "text", "content" or "messages" (a list of {"role": string, "content": string})'
BUILT_IN = ("topics", "source", "license", "docstrings", "mixture", "scripture")  # fhopt/texts/built_in.py
_CURE = "Write its output to a file, and pass that file."
_SEPARATOR = "\n\n"
_KINDS = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a boolean",
          int: "a number", float: "a number"}  # fmt: skip


def check_text(name: str) -> None:
    """Raise FhoptError if `name` is neither a built-in text nor a regular file or a folder."""
    if name in BUILT_IN:
        return
    path = Path(name).expanduser()
    try:
        if not path.is_dir():
            check_regular(path, cure=_CURE)
    except OSError as error:
        raise FhoptError(
            f"cannot read {name}: {error.strerror}; expected a text file, JSON lines, a Parquet file, a "
            f"folder of them, a folder written by save_to_disk, or one of {', '.join(BUILT_IN)}."
        ) from error


def join_documents(documents: Iterable[str], limit: int) -> str:
    """Join the nonblank documents, up to `limit` characters."""
    kept: list[str] = []
    room = limit
    for document in documents:
        if not document.strip():
            continue
        kept.append(document.strip("\n")[: max(0, room)])
        room -= len(kept[-1]) + len(_SEPARATOR)
        if room <= 0:
            break
    return _SEPARATOR.join(kept)


def read_documents(path: Path, limit: int) -> Iterator[str]:
    """Load the documents of a file, a folder of files or a saved data set."""
    if not path.is_dir():
        return _file(path, limit)
    if any((path / mark).is_file() for mark in ("dataset_dict.json", "dataset_info.json")):
        return _table(path)
    files = sorted(p for p in path.rglob("*") if p.name.lower().endswith(IN_FOLDERS) and p.is_file())
    return itertools.chain.from_iterable(_file(p, limit) for p in files)


def _file(path: Path, limit: int) -> Iterator[str]:
    name = path.name.lower()
    if name.endswith(JSON_LINES):
        return _json_lines(path)
    return _table(path) if name.endswith(".parquet") else _plain(path, limit)


def _plain(path: Path, limit: int) -> Iterator[str]:
    with opened(path, cure=_CURE) as content:
        file = io.TextIOWrapper(content, encoding="utf-8-sig", errors="replace")
        yield _without_nul(file.read(limit), path)


def _without_nul(text: str, path: Path) -> str:
    if "\0" in text:
        raise FhoptError(
            f"{path} is binary: it has NUL bytes; expected UTF-8 text. Pass a text file; convert UTF-16 with: "
            "iconv -f UTF-16 -t UTF-8"
        )
    return text


def _json_lines(path: Path) -> Iterator[str]:
    with opened(path, cure=_CURE) as content:
        unpacked: Any = gzip.GzipFile(fileobj=content) if path.name.lower().endswith(".gz") else content
        file = io.TextIOWrapper(unpacked, encoding="utf-8-sig", errors="replace")
        lines: Iterator[str] = iter(partial(file.readline, LONGEST_LINE), "")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"line {number} of {path}"
                yield _document(_parse(_without_nul(line, path), where), where)


def _parse(line: str, where: str) -> Any:
    cure = "Correct or remove the line; convert a file with one JSON list with: jq -c '.[]'"
    if len(line) == LONGEST_LINE:
        raise FhoptError(f"{where} has {LONGEST_LINE} characters or more; expected {RECORD}. {cure}")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        start = line.strip()[:40]
        raise FhoptError(f"{where} is not JSON ({error}): {start!r}; expected {RECORD}. {cure}") from error
    if not isinstance(record, (str, dict)):
        raise FhoptError(f"{where} is {_describe(record)}; expected {RECORD}. {cure}")
    return record


def _document(record: str | dict[str, Any], where: str) -> str:
    """Return the text of a line or row; "" for null. `where` names the line in errors."""
    fields = {"text": record} if isinstance(record, str) else {k: record[k] for k in KEYS if k in record}
    key, value = next(((k, v) for k, v in fields.items() if v is not None), ("text", ""))
    if not fields or not isinstance(value, list if key == "messages" else str):
        raise FhoptError(f"{where} is {_describe(record)}; expected {RECORD}. Correct, rename or remove it.")
    if isinstance(value, list):
        value = _SEPARATOR.join(_turn(m, f"message {i} in {where}") for i, m in enumerate(value, start=1))
    return value.encode(errors="replace").decode()  # JSON can contain lone surrogates, which tokenizers reject


def _turn(message: Any, where: str) -> str:
    """Format one chat turn below a line with its role. A tool call has no content."""
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, (str, type(None))):
        raise FhoptError(
            f'{where} is {_describe(message)}; expected {{"role": string, "content": string}}. Correct or remove it.'
        )
    return f"{role}\n{content or ''}".strip("\n")


def _describe(value: Any) -> str:
    """Describe the type of a JSON value, for an object also its first keys."""
    kind = _KINDS.get(type(value), f"of type {type(value).__name__}")
    if not isinstance(value, dict):
        return kind
    keys = ", ".join(f'"{k}": {_KINDS.get(type(v), type(v).__name__)}' for k, v in itertools.islice(value.items(), 6))
    return f"an object with {keys}" if keys else "an empty object"


def _table(path: Path) -> Iterator[str]:
    """Load the documents of a Parquet file or of a saved data set."""
    path.stat()  # raises OSError for a missing file, as other sources do
    try:
        rows = _saved_rows(path) if path.is_dir() else _parquet_rows(path)
        for number, row in enumerate(rows, start=1):
            yield _document(row, f"row {number} of {path}")
    except FhoptError:
        raise
    except Exception as error:  # the libraries raise anything for a damaged file
        raise FhoptError(
            f"{path} could not be read: {' '.join(str(error).split())}; expected a Parquet file, or a folder "
            "written by save_to_disk of a Dataset or DatasetDict. Write it again."
        ) from error


def _saved_rows(folder: Path) -> Iterator[dict[str, Any]]:
    datasets = _data_library("datasets")
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.parent.name for p in folder.glob("*/dataset_info.json"))
        if "train" not in splits:
            raise FhoptError(
                f"{folder} has the splits {', '.join(splits) or 'none'}; expected one called train. Pass the "
                "folder of one split."
            )
        folder = folder / "train"
    rows = datasets.load_from_disk(str(folder.resolve())).with_format(None)
    yield from rows.select_columns([_column(folder, rows.column_names)])


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    _data_library("datasets")  # it requires a pyarrow version that does not execute code from files
    parquet = _data_library("pyarrow.parquet")
    with opened(path, cure=_CURE) as file:
        table = parquet.ParquetFile(file, buffer_size=1 << 20)
        column = _column(path, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=256, columns=[column]):
            yield from batch.to_pylist()


def _column(path: Path, names: Sequence[str]) -> str:
    column = next((k for k in KEYS if k in names), None)
    if column is None:
        raise FhoptError(
            f"{path} has the columns {', '.join(names) or 'none'}; expected {', '.join(KEYS[:-1])} or {KEYS[-1]}. "
            "Rename the one that holds the text."
        )
    return column


def _data_library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise FhoptError(
            f"{package} cannot be imported ({error}); Parquet files and saved datasets require it. Install it "
            "with: pip install 'fhopt[data]'"
        ) from error
