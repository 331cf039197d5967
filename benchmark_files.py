"""Benchmark files as published: Parquet, JSON, JSON lines, TSV with base64 pictures, folders and zips, hub ids.

A `Source` is one table of rows with the pictures or clips around it. They are found by the end of their path, in
folders and zips alike, and read when they are asked for.
"""

import base64
import csv
import functools
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import data
from data import DataError, reason


@dataclass(frozen=True)
class Cell(data.Embedded):
    """A picture in a column of a table, read when it is asked for."""

    column: str = "image"

    def read(self) -> bytes:
        return self.table[self.row][self.column]["bytes"]


@dataclass(frozen=True)
class InZip(data.Embedded):
    """A picture or clip in a zip (table: its path, row: the name inside), read when it is asked for."""

    def read(self) -> bytes:
        with zipfile.ZipFile(self.table) as archive:
            return archive.read(self.row)

    def __str__(self) -> str:
        return f"{self.table}/{self.row}"


class Files:
    """The files under some folders, and in the zips there, found by the end of their path."""

    def __init__(self, roots: Iterable[Path | None]):
        self.roots = [root for root in roots if root]
        self.torn: list[str] = []

    @functools.cached_property  # a table that holds its pictures needs no search
    def named(self) -> dict[str, list[tuple[tuple[str, ...], data.Media]]]:
        """Last part of a path -> (all its parts, what is there) of each such file."""
        found = defaultdict(list)
        for root in self.roots:
            for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
                for parts, medium in self._inside(file) if file.suffix == ".zip" else [(file.absolute().parts, file)]:
                    if "__MACOSX" not in parts and not parts[-1].startswith("._"):  # macOS's shadow of each file
                        found[parts[-1]].append((parts, medium))
        return found

    def _inside(self, file: Path) -> list[tuple[tuple[str, ...], data.Media]]:
        try:
            with zipfile.ZipFile(file) as archive:
                return [((file.stem, *Path(name).parts), InZip(file, name, None)) for name in archive.namelist()]
        except (OSError, zipfile.BadZipFile) as error:
            self.torn += [] if file.name.startswith("._") else [f"{file.name} cannot be read: {error}"]
            return []

    def find(self, *paths: str) -> data.Media:
        """What the first of these paths that is anywhere names; DataError where none is, or where two files are."""
        for path in paths:
            wanted = Path(path).parts
            hits = [medium for parts, medium in self.named.get(wanted[-1], []) if parts[-len(wanted) :] == wanted]
            hits = [hit for hit in hits if isinstance(hit, Path)] or hits  # unpacked: the zip holds the same
            if len(hits) > 1:
                raise DataError(f"path: {path} is there {len(hits)} times: {', '.join(map(str, hits[:3]))}. Keep one")
            if hits:
                return hits[0]
        where = " and ".join(map(str, self.roots)) or "the dataset, which is not on this disk: give its folder as media"
        raise DataError(f"path: {paths[0]} is missing in {where}" + (f" ({'; '.join(self.torn)})" if self.torn else ""))


@dataclass(frozen=True)
class Source:
    """One table of a benchmark. label: what to call it, the last two parts of its path."""

    label: str
    table: Any
    files: Files
    file: Path | None = None

    def medium(self, raw: dict, number: int, column: str, *paths: str) -> data.Media:
        """The picture in a cell (as `datasets`, PIL or a TSV has it), or the file that one of `paths` names."""
        cell = raw.get(column)
        if isinstance(cell, dict) and cell.get("bytes"):
            return Cell(self.table, number, None, column)
        if self.file and self.file.suffix == ".tsv":
            if len(cell) <= 64:  # a later rotation has the index of the row that has the picture
                cell = self.by_index.get(cell, "")
            try:
                return base64.b64decode(cell, validate=True) if cell else self.files.find("no picture")
            except ValueError as error:
                raise DataError(f"{column}: neither base64 nor the index of a row that has it") from error
        if paths:
            return self.files.find(*paths)
        raise DataError(f"{column}: holds no picture")

    @functools.cached_property
    def by_index(self) -> dict[str, str]:
        return {row["index"]: row["image"] for row in self.table if len(row["image"]) > 64}


def sources(
    name: str, path: str | Path, media: str | Path | None, patterns: Sequence[str], expected: str, hub: Sequence, splits
) -> list[Source]:
    """The tables that a folder, file or hub id stands for.

    patterns: of the files of a folder, those that the first of these finds. hub: ids of one dataset, tried in turn when
    `path` is one of them; splits: its (configuration, split)s. Raises DataError, with what was `expected`.
    """
    path, media = Path(path), None if media is None else Path(media)
    if media and not media.exists():
        raise DataError(f"{name}: media: {media} does not exist")
    if not path.exists():
        return _hub(name, str(path), Files([media]), expected, hub, splits)
    found = [path]
    if path.is_dir():
        inside = {str(f.relative_to(path).as_posix()): f for f in sorted(path.rglob("*")) if f.is_file()}
        hits = ([f for label, f in inside.items() if re.search(pattern, label)] for pattern in patterns)
        found = next(filter(None, hits), [])
        found = [f for f in found if not f.name.startswith("._") and "__MACOSX" not in f.parts]
        if not found:
            some = ", ".join(list(inside)[:5]) or "nothing"
            raise DataError(f"{name}: {path} holds {some}; expected {expected}")
    files = Files([media or (path if path.is_dir() else path.parent)])
    return [Source("/".join(f.parts[-2:]), table(f), files, f) for f in found]


def _hub(name: str, hub: str, files: Files, expected: str, known: Sequence[str], splits) -> list[Source]:
    import datasets

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub):
        raise DataError(f"{name}: {hub} does not exist. Give {expected}, or a hub id")
    if not splits:
        raise DataError(f"{name}: {hub} is not on this disk, and on the hub it is plain files. Download and give them")
    why = []
    for one in dict.fromkeys([hub, *(known if hub in known else ())]):  # it may have moved
        try:
            tables = [(config, split, datasets.load_dataset(one, config, split=split)) for config, split in splits]
        except Exception as error:  # of many kinds, from the hub, the network and the builder
            generic = isinstance(error, datasets.exceptions.DatasetGenerationError)
            why.append(f"{one}: {reason(error.__cause__ or error if generic else error)}")
            continue
        return [Source(f"{one} {config or ''}/{split}", data._undecoded(t), files) for config, split, t in tables]
    raise DataError(f"{name}: {hub} is no file here and cannot be had from the hub ({'; '.join(why)})")


def table(file: Path):
    """The rows of a Parquet, TSV, JSON or JSON-lines file; of objects in objects, with the outer key as `track`."""
    if file.suffix == ".parquet":
        return data._rows(file)
    try:
        if file.suffix == ".tsv":
            csv.field_size_limit(2**31 - 1)  # pictures
            with file.open(encoding="utf-8-sig", newline="") as lines:
                return list(csv.DictReader(lines, delimiter="\t"))
        value = data.json_or_lines(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"data: cannot read {file}: {error}") from error
    if isinstance(value, dict):
        inner = [one for one in value.values() if isinstance(one, dict)]
        if inner and all(isinstance(row, dict) for row in inner[0].values()):
            return [{**row, "track": track} for track, rows in value.items() for row in rows.values()]
        value = list(value.values()) if len(inner) == len(value) else [value]
    if not isinstance(value, list) or not value:
        raise DataError(f"data: {file} must hold rows")
    return value
