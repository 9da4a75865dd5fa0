"""Collection of further texts for perplexity.py from Debian packages, so that anyone can measure the same ones.

    apt-get install debian-reference-{en,fr,de,ja,zh-cn} dict-jargon fortunes perl-modules-5.40 tzdata zlib1g-dev
    python -m benchmarks.quality.debian_texts FOLDER  FOLDER/law.txt, manual.txt, ... and the options to pass them

The packages are those of Debian 13. `ja` and `dictionary` were collected after the method was final, and measured
once. None of the texts calibrates plans. Nothing is downloaded; the texts keep the licenses of their packages and are
not part of fhopt.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import click

DOCS = "usr/share/doc/debian-reference-common/docs"
FEWEST = 8_000  # characters, for at least 1,024 tokens in the measured half


@dataclass(frozen=True)
class TextSource:
    """The location of a text: its Debian package, its file below the root, and its character range."""

    package: str
    file: str
    start: int = 0
    stop: int = 40_000


SOURCES = {
    "law": TextSource("base-files", "usr/share/common-licenses/GPL-3"),
    "manual": TextSource("debian-reference-en", f"{DOCS}/debian-reference.en.txt.gz", 268_000, 308_000),
    "fr": TextSource("debian-reference-fr", f"{DOCS}/debian-reference.fr.txt.gz", 326_000, 366_000),
    "de": TextSource("debian-reference-de", f"{DOCS}/debian-reference.de.txt.gz", 302_000, 342_000),
    "zh": TextSource("debian-reference-zh-cn", f"{DOCS}/debian-reference.zh-cn.txt.gz", 8_000, 24_000),
    "ja": TextSource("debian-reference-ja", f"{DOCS}/debian-reference.ja.txt.gz", 200_000, 216_000),
    "dictionary": TextSource("dict-jargon", "usr/share/dictd/jargon.dict.dz", 200_000, 240_000),
    "chat": TextSource("fortunes", "usr/share/games/fortunes/knghtbrd"),
    "quotations": TextSource("fortunes", "usr/share/games/fortunes/literature"),
    "c": TextSource("zlib1g-dev", "usr/share/doc/zlib1g-dev/examples/gzlog.c"),
    "perl": TextSource("perl-modules-5.40", "usr/share/perl/5.40/perl5db.pl", 60_000, 100_000),
    "numbers": TextSource("tzdata", "usr/share/zoneinfo/zone1970.tab"),
}


def read(source: TextSource, root: Path) -> str:
    """Return a text below `root`. Raises click.ClickException if its package is not installed."""
    path = root / source.file
    if not path.is_file():
        raise click.ClickException(f"there is no {path}; expected the package {source.package} of Debian. Install it.")
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix in (".gz", ".dz") else data).decode("utf-8", errors="replace")
    text = text[source.start : source.stop]
    if len(text) < FEWEST:
        raise click.ClickException(f"{path} has {len(text)} characters; expected {FEWEST} and more.")
    return text


@click.command()
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--root", type=click.Path(exists=True, path_type=Path), default=Path("/"), show_default=True)
def main(folder: Path, root: Path) -> None:
    """Write each text to FOLDER, or none if a package is not installed."""
    texts = {name: read(source, root) for name, source in SOURCES.items()}
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"--texts {folder / name}.txt")


if __name__ == "__main__":
    main()
