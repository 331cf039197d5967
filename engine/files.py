"""Tables of rows, JSON lines that grow, and files that are written whole or not at all."""

import glob
import json
import os
import re
import socket
from pathlib import Path
from typing import IO

from engine import ConfigError, DataError, counted


def lock(folder: Path, wait: bool = False) -> IO[str] | None:
    """Keep other processes out of a folder, which is made if needed, until what is returned is
    closed or this process ends, however it ends. wait: for another process that is there. A disk
    or a system that knows no such locks gives None.

    Raises ConfigError, which names the other process, and where nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = (folder / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"cannot write in {folder}: {error.strerror}. Give another folder"
        ) from error
    try:
        import fcntl  # which Windows has not

        # lockf: a worker that is forked does not hold it
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        held.seek(0)
        busy = f"{folder} is in use by another process ({held.read() or 'unknown'})"
        if not wait:
            raise ConfigError(
                f"{busy}. Wait until it has ended, or end it, or give another folder"
            ) from None
        print(f"{busy}: waiting", flush=True)
        fcntl.lockf(held, fcntl.LOCK_EX)
    except (ImportError, OSError):
        return None
    held.truncate(0)
    print(f"{os.getpid()} on {socket.gethostname()}", end="", file=held, flush=True)
    return held


def try_rewrite(option: str, file: Path) -> None:
    """Raises ConfigError where `rewrite` could not write an option's file, and writes nothing."""
    temporary = file.with_name(f".{file.name}.unfinished")
    try:
        temporary.touch()
        temporary.unlink(missing_ok=True)  # another process may try it too
    except OSError as error:
        raise ConfigError(
            f"{option}: cannot write {file}: {error.strerror}. Give another file"
        ) from error
    if file.is_dir():
        raise ConfigError(f"{option}: cannot write {file}: it is a folder. Give a file in it")


def rewrite(file: Path, text: str) -> None:
    """Replace a file's content, whole or not at all."""
    temporary = file.with_name(f".{file.name}.unfinished")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)


def to_jsonl(lines: list[dict]) -> str:
    """One JSON object a line."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def read_jsonl(file: Path, repair: bool = True) -> list[dict]:
    """The complete lines of a file that grows. A last line that a crash cut off is dropped, with
    `repair` from the file too. No file: no lines."""
    if not file.exists():
        return []
    # bytes, because the cut may go through a character; not splitlines, because a response may hold
    # U+2028
    *complete, rest = file.read_bytes().split(b"\n")
    if rest and repair:
        rewrite(file, "".join(line.decode() + "\n" for line in complete))
    return [json.loads(line) for line in complete if line]


def undecoded(table):
    """The table without decoding: pictures and clips stay bytes, lists stay Python lists."""
    import datasets

    table = table.with_format(None)
    for name, feature in table.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.Image | datasets.Video):
            plain = type(inner)(decode=False)
            table = table.cast_column(name, plain if inner is feature else datasets.List(plain))
    return table


def whole(parts: list[Path]) -> list[Path]:
    """The files of a table. DataError where they are parts (NAME-00000-of-00002) and one lacks."""
    if part := re.fullmatch(r"(.*-)\d+(-of-(\d+))", parts[0].stem):
        before, of, n = part.groups()
        names = {f"{before}{i:0{len(n)}}{of}{parts[0].suffix}" for i in range(int(n))}
        if missing := sorted(names - {file.name for file in parts}):
            more = f" and {counted(len(missing) - 1, 'more part')}" if missing[1:] else ""
            raise DataError(f"data: {parts[0].parent} lacks {missing[0]}{more}. Give all parts")
    return parts


def read_rows(file: Path, *more: Path):
    if file.suffix == ".parquet":
        import datasets

        try:
            files = [glob.escape(str(part)) for part in (file, *more)]
            table = datasets.load_dataset("parquet", data_files=files, split="train")
        except Exception as error:  # of many kinds
            raise DataError(f"data: cannot read {file}: {error}") from error
        return undecoded(table)
    if more:
        return [row for part in (file, *more) for row in read_rows(part)]
    try:
        text = file.read_bytes().decode("utf-8-sig")
        if not text.strip() and file.suffix == ".json":
            raise ValueError("it is empty. Write its rows, or take it away")
        if "\0" in text:  # UTF-16 without a byte order mark
            raise ValueError("it is not in UTF-8. Save it as UTF-8")
        rows = json_lines(text) if file.suffix == ".jsonl" else json_or_lines(text)
    except UnicodeDecodeError as error:
        raise DataError(
            f"data: cannot read {file}: it is not in UTF-8 ({error.reason}). Save it as UTF-8"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"data: cannot read {file}: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"data: {file} must hold a list of rows, not a {type(rows).__name__}")
    return rows


def json_lines(text: str) -> list:
    """JSON, a value a line. ValueError with the number of a line that is none."""
    values = []
    for number, line in enumerate(text.replace("\ufeff", "").split("\n"), start=1):
        try:
            values += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return values


def json_or_lines(text: str):
    """JSON, or JSON lines, which are often called .json as well."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data" or "\n" in text[: error.pos].strip():
            raise
        return json_lines(text)
