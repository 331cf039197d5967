"""Published files -> checked rows."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import data
from benchmarks.base import Benchmark, Row
from benchmarks.files import InZip, Source, sources
from benchmarks.table import TABLE
from engine import DataError, counted
from engine.media import Media, Size
from engine.media_check import Checked

UNREADABLE = (DataError, KeyError, TypeError, ValueError, AttributeError, IndexError)  # a bad row


def read(
    name: str, path: str | Path, media: str | Path | None = None, on_bad_row="error", say=print
) -> list[Row]:
    """The rows of a benchmark, from a folder, file or hub id (old or new), as published.

    media: folder or zip of the pictures or clips, if they are neither in the file nor beside it.
    Raises DataError with the first ten bad rows, unless on_bad_row is "skip": then `say` gets a
    line for each. `scan` returns these lines instead.
    """
    rows, problems = scan(name, path, media)
    data.refuse(problems, on_bad_row, say)
    if not rows:
        raise DataError(f"{name}: {path} has no usable row")
    if len(rows) != TABLE[name].rows:
        say(f"{name}: {counted(len(rows), 'row')}; the published set has {TABLE[name].rows}")
    return rows


def scan(
    name: str, path: str | Path, media: str | Path | None = None, check=True
) -> tuple[list[Row], list[str]]:
    """All usable rows, and a line for each bad one: media unreadable, bad field, id taken.

    check: open every picture, and the key frames of every clip, as data.py does (a minute for some
    thousand pictures). Raises DataError if there is nothing to read, or another benchmark's file.
    """
    if name not in TABLE:
        raise DataError(f"{name!r} is not one of {', '.join(TABLE)}")
    benchmark = TABLE[name]
    if not check:
        return _scan(benchmark, path, media, None)
    with Checked(name, path, media or "") as checked:
        rows, problems = _scan(benchmark, path, media, checked)
    return _one_cluster_per_picture(rows) if benchmark.pictures_repeat else rows, problems


def _scan(
    benchmark: Benchmark, path, media, checked: Callable[[Media, str], Size] | None
) -> tuple[list[Row], list[str]]:
    rows, problems, seen = [], [], set()
    checked_once = functools.cache(checked) if checked else None

    def size_of(medium: Media) -> Size:
        is_file = isinstance(medium, Path | InZip)  # other media are large to hash
        return (checked_once if is_file else checked)(medium, benchmark.media)

    for source in sources(benchmark, path, media):
        fields = _fields(benchmark, source)
        for number, raw in enumerate(source.table):
            try:
                if not isinstance(raw, dict):
                    raise DataError("not an object")
                if lacking := fields - set(raw):
                    raise DataError(f"{', '.join(sorted(lacking))}: missing")
                made = list(benchmark.read(raw, number, source))
                for row in made:
                    if not isinstance(row.question, str) or not row.question.strip():
                        raise DataError("question: missing or empty")
                    if row.id in seen:
                        raise DataError(f"id: {row.id!r} is already taken")
                if checked:
                    made = [replace(row, sizes=(size_of(row.media),)) for row in made]
                rows += made
                seen |= {row.id for row in made}
            except UNREADABLE as error:
                said = f"cannot be read ({type(error).__name__}: {error})"
                said = error if isinstance(error, DataError) else said
                problems.append(f"{source.label} row {number}, {said}")
    return rows, problems


def _fields(benchmark: Benchmark, source: Source) -> set[str]:
    """The fields of the form that the first rows have. Raises DataError for another file."""
    first = [source.table[i] for i in range(min(10, len(source.table)))]
    held = [set(map(str, row)) for row in first if isinstance(row, dict)]

    def fits(form: str) -> bool:
        return any(set(form.split()) <= fields for fields in held)

    for form in filter(fits, benchmark.forms):
        return set(form.split())
    others = [other for other in TABLE.values() if other.name != benchmark.name]
    likely = " or ".join(other.name for other in others if any(map(fits, other.forms)))
    there = ", ".join(sorted(set().union(*held))) or "no fields"
    expected = ", or ".join(form.replace(" ", ", ") for form in benchmark.forms)
    raise DataError(
        f"{benchmark.name}: {source.label} is not {benchmark.title}: its rows hold {there}; "
        f"expected {expected}" + (f". It looks like {likely}" if likely else "")
    )


def _one_cluster_per_picture(rows: list[Row]) -> list[Row]:
    """Merge clusters that hold the same picture, whatever its name."""
    first, same = {}, {}

    def root(cluster: str) -> str:
        while cluster in same:
            cluster = same[cluster]
        return cluster

    for row in rows:
        content = row.media.read_bytes() if isinstance(row.media, Path) else row.media
        content = content if isinstance(content, bytes) else content.read()
        digest = hashlib.sha1(content).digest()
        a, b = root(row.cluster), root(first.setdefault(digest, row.cluster))
        if a != b:
            same[a] = b
    return [replace(row, cluster=root(row.cluster)) for row in rows]
