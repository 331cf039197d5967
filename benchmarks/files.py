"""Benchmark files as published: Parquet, JSON, JSON lines, TSV, folders, zips and hub ids.

A `Source` is one table of rows with the pictures or clips around it. These are found by the end of
their path, in folders and zips alike, and read on demand.
"""

import base64
import csv
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.base import Benchmark
from engine import DataError, reason
from engine.files import json_or_lines, read_rows, undecoded
from engine.media import Embedded, Media


@dataclass(frozen=True)
class Cell(Embedded):
    """A picture in a column of a table, read on demand."""

    column: str = "image"

    def read(self) -> bytes:
        return self.table[self.row][self.column]["bytes"]


@dataclass(frozen=True)
class InZip(Embedded):
    """A picture or clip in a zip (table: its path, row: the name inside), read on demand."""

    def read(self) -> bytes:
        with zipfile.ZipFile(self.table) as archive:
            return archive.read(self.row)

    def __str__(self) -> str:
        return f"{self.table}/{self.row}"


class Files:
    """The files under some folders, and in the zips there, found by the end of their path."""

    def __init__(self, roots: Iterable[Path | None]):
        self.roots = [root for root in roots if root]
        self.unreadable: list[str] = []

    @cached_property  # lazy, because a table that holds its pictures needs no search
    def by_name(self) -> dict[str, list[tuple[tuple[str, ...], Media]]]:
        """Last part of a path -> (all its parts, the file) of each such file."""
        found = defaultdict(list)
        for root in self.roots:
            for file in sorted(root.rglob("*")) if root.is_dir() else [root]:
                plain = [(file.absolute().parts, file)]
                for parts, medium in self._inside(file) if file.suffix == ".zip" else plain:
                    # macOS stores a shadow of each file
                    if "__MACOSX" not in parts and not parts[-1].startswith("._"):
                        found[parts[-1]].append((parts, medium))
        return found

    def _inside(self, file: Path) -> list[tuple[tuple[str, ...], Media]]:
        try:
            with zipfile.ZipFile(file) as archive:
                names = archive.namelist()
        except (OSError, zipfile.BadZipFile) as error:
            if not file.name.startswith("._"):
                self.unreadable.append(f"{file.name} cannot be read: {error}")
            return []
        return [((file.stem, *Path(name).parts), InZip(file, name, None)) for name in names]

    def find(self, *paths: str) -> Media:
        """The file of the first path that exists. Raises DataError for none, or for two files."""
        for path in paths:
            wanted = Path(path).parts
            candidates = self.by_name.get(wanted[-1], [])
            hits = [medium for parts, medium in candidates if parts[-len(wanted) :] == wanted]
            # unpacked files win: the zip holds the same
            hits = [hit for hit in hits if isinstance(hit, Path)] or hits
            if len(hits) > 1:
                some = ", ".join(map(str, hits[:3]))
                raise DataError(f"path: {path} is there {len(hits)} times: {some}. Keep one")
            if hits:
                return hits[0]
        if not self.roots:
            raise DataError(
                f"path: {paths[0]} is not on this disk, because the rows come from the hub. Give "
                "the folder or zip that holds it as media"
            )
        where = " and ".join(map(str, self.roots))
        why = f" ({'; '.join(self.unreadable)})" if self.unreadable else ""
        raise DataError(f"path: {paths[0]} is missing in {where}{why}")


@dataclass(frozen=True)
class Source:
    """One table of a benchmark. label: the last two parts of its path."""

    label: str
    table: Any
    files: Files
    file: Path | None = None

    def medium(self, raw: dict, number: int, column: str, *paths: str) -> Media:
        """The picture in a cell (of `datasets`, PIL or a TSV), or the file of one of `paths`.

        Raises DataError if there is neither.
        """
        cell = raw.get(column)
        if isinstance(cell, dict) and cell.get("bytes"):
            return Cell(self.table, number, None, column)
        if self.file and self.file.suffix == ".tsv":
            if len(cell) <= 64:  # a later rotation has the index of the row with the picture
                cell = self.by_index.get(cell, "")
            try:
                content = base64.b64decode(cell, validate=True)
            except ValueError:
                content = b""
            if not content:
                raise DataError(f"{column}: neither base64 nor the index of a row that has it")
            return content
        if paths:
            return self.files.find(*paths)
        raise DataError(f"{column}: holds no picture")

    @cached_property
    def by_index(self) -> dict[str, str]:
        return {row["index"]: row["image"] for row in self.table if len(row["image"]) > 64}


def sources(
    benchmark: Benchmark, path: str | Path, media: str | Path | None = None
) -> list[Source]:
    """The tables of a folder, file or hub id. media: folder or zip of pictures or clips.

    Raises DataError with the files that are expected.
    """
    path, media = Path(path), None if media is None else Path(media)
    if media and not media.exists():
        raise DataError(f"{benchmark.name}: media: {media} does not exist")
    if not path.exists():
        return _from_hub(benchmark, str(path), Files([media]))
    found = [path]
    if path.is_dir():
        inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
        inside = {file.relative_to(path).as_posix(): file for file in inside}
        hits = (
            [file for label, file in inside.items() if re.search(pattern, label)]
            for pattern in benchmark.files
        )
        found = next(filter(None, hits), [])
        found = [f for f in found if not f.name.startswith("._") and "__MACOSX" not in f.parts]
        if not found:
            some = ", ".join(list(inside)[:5]) or "nothing"
            raise DataError(f"{benchmark.name}: {path} holds {some}; expected {benchmark.source}")
    files = Files([media or (path if path.is_dir() else path.parent)])
    return [Source("/".join(f.parts[-2:]), read_table(f), files, f) for f in found]


def _from_hub(benchmark: Benchmark, hub: str, files: Files) -> list[Source]:
    """The splits of a dataset, under the given id or the one it moved to."""
    import datasets

    name = benchmark.name
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", hub):
        raise DataError(f"{name}: {hub} does not exist. Give {benchmark.source}, or a hub id")
    if not benchmark.splits:
        raise DataError(
            f"{name}: {hub} is not on this disk, and on the hub it is plain files. Download them "
            "and give their folder"
        )
    why = []
    for one in dict.fromkeys([hub, *(benchmark.hub if hub in benchmark.hub else ())]):
        try:
            tables = [
                (config, split, datasets.load_dataset(one, config, split=split))
                for config, split in benchmark.splits
            ]
        except Exception as error:  # of many kinds, from the hub, the network and the builder
            is_generic = isinstance(error, datasets.exceptions.DatasetGenerationError)
            why.append(f"{one}: {reason(error.__cause__ or error if is_generic else error)}")
            continue
        return [
            Source(f"{one} {config or ''}/{split}", undecoded(table), files)
            for config, split, table in tables
        ]
    raise DataError(
        f"{name}: {hub} is not on this disk and could not be loaded from the hub ({'; '.join(why)})"
    )


def read_table(file: Path):
    """The rows of a Parquet, TSV, JSON or JSON-lines file.

    Objects inside objects become rows with the outer key as `track`. Raises DataError.
    """
    if file.suffix == ".parquet":
        return read_rows(file)
    try:
        if file.suffix == ".tsv":
            csv.field_size_limit(2**31 - 1)  # pictures
            with file.open(encoding="utf-8-sig", newline="") as lines:
                return list(csv.DictReader(lines, delimiter="\t"))
        value = json_or_lines(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"data: cannot read {file}: {error}") from error
    if isinstance(value, dict):
        inner = [one for one in value.values() if isinstance(one, dict)]
        if inner and all(isinstance(row, dict) for row in inner[0].values()):
            return [
                {**row, "track": track} for track, rows in value.items() for row in rows.values()
            ]
        value = list(value.values()) if len(inner) == len(value) else [value]
    if not isinstance(value, list) or not value:
        raise DataError(f"data: {file} must hold rows")
    return value
