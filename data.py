"""Rows on disk -> checked samples; images and clips -> chat messages.

The schema is the official one, one JSON object per row:

    data_type     "image" or "video"
    problem_type  one of `reasoning.PROBLEM_TYPES`
    problem       the question, or a chat with one turn, the user's. Pictures are placed at its marks <image> (a clip at
                  <video>), or before the text where it has none
    options       ["A. red", "B. green"], empty where there are none. "A) red", "(a) red" and "a: red" are shown as
                  "A. red", and options without letters get them in their order
    path          the picture or clip, relative to the file ("./images/0.png"); a list of them for several images. In
                  place of a path: the bytes, a PIL image, or what `datasets` makes of them, {"bytes": ..., "path": ...}
    solution      "<answer>A</answer>" (a bare "A" is taken too), a number, or a list of accepted answers; among options
                  without letters also the words of one
    problem_id    unique
    process       optional: a reference response with all its stages, for the cold start

and, optional, for evaluation: `category` (groups the accuracy), `pair` (two rows of one pair share it), `objects`
(what the picture holds, for caption hallucination) and `relevant` (those of them that the question is about).

The columns that users of TRL have will do: `image` or `images` (or `video`) for `path`, `prompt` for `problem` and
`answer` for `solution`. What such a row leaves out is decided, and said: its number is its id; multiple choice is told
by options, by lettered options in the question or by a capital letter as solution, numerical by a number; else it is
free-form.

A dataset is a folder of such files, its splits named by file: `cold_start`, `train`, `validation` (to choose among RL's
checkpoints) and any `test*`; or one file; or a folder written by `datasets` (save_to_disk); or a hub id. Every row is
checked, and every picture and clip opened, before a model is loaded; the same check alone:

    python data.py check SOURCE               # counts, sizes, and one line for each bad row
    python data.py check SOURCE --model M     # prompt lengths in M's tokens as well
"""

import argparse
import glob
import hashlib
import json
import math
import re
import string
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwen_vl_utils.vision_process import smart_resize

import answers
import reasoning
from media import (
    Checked,
    DataError,
    Embedded,
    Media,
    Size,
    _check_media,
    frames_taken,
    medium_of,
    read_image,
    read_video,
    trace,
)

SUFFIXES = (".json", ".jsonl", ".parquet")
FIELDS = (
    "data_type problem_type problem options path solution problem_id process process_and_answer data_source category "
    "pair objects relevant"
).split()

COLUMNS = {  # ours, and what it may be called elsewhere
    "path": ("image", "images", "video", "videos"),
    "problem": ("prompt",),
    "solution": ("answer",),
}
MARK, NUMBERED = re.compile(r"<(?:image|video)>"), re.compile(r"<(image|video)[ _]?(\d+)>")
FOREIGN = [  # marks of other families: ours
    (re.compile(pattern, re.IGNORECASE), ours)
    for pattern, ours in (
        (r"<\|vision_start\|><\|(image|video)_pad\|><\|vision_end\|>", r"<\1>"),  # Qwen2-VL's template
        (r"(?:Picture ?\d+: ?)?<img>[^<]*</img>", r"<image>"),  # Qwen-VL, the first
        (r"\(<(image|video)>\./</\1>\)", r"<\1>"),  # MiniCPM-V
        (r"<\|(image|video)_(\d+)\|>", r"<\1_\2>"),  # Phi-3.5-vision
        (r"<(image|video)(?:here|_placeholder|_soft_token)>", r"<\1>"),  # InternLM-XComposer, DeepSeek-VL, Gemma
        (r"<image>", r"<image>"),  # in capitals
        (r"<video>", r"<video>"),
    )
]
# a letter with its mark, such as "A.", "(A)", "a:", "A - ", "**A.**", and no abbreviation ("a.m.")
LABEL = (
    r"(?:\*\*)?[(\[（]?\s*([A-Za-zＡ-Ｚａ-ｚ])(?:\*\*)?\s*"
    r"(?:\.\)|\.(?![A-Za-z]\.)|[:)\]．：）、]|(?<=\s)[-–—](?=\s)|(?<=\*\*)(?=\s))(?:\*\*)?"
)
OPTION = re.compile(rf"{LABEL}\s*(.*)", re.DOTALL)
LISTED = re.compile(rf"^[ \t]*{LABEL}[ \t]*", re.MULTILINE), re.compile(rf"(?<!\S){LABEL}\s*")  # on lines; in a row
# how mathematical sets write a whole solution
WRAPPED = re.compile(r"\$?\\boxed\{([^{}$]+)\}\$?|\$([-+]?[\d.,]+|[A-Z])\$")


@dataclass(frozen=True)
class Sample:
    """One checked row. Media stay on disk until `messages` is asked for them. `answer` is an `answers.Answers` where
    several are accepted."""

    id: str
    data_type: str
    media: tuple[Media, ...]
    problem: str
    options: tuple[str, ...]
    problem_type: str
    answer: str
    process: str | None = None
    category: str = ""
    pair: str | None = None
    objects: tuple[str, ...] | None = None
    relevant: tuple[str, ...] | None = None
    sizes: tuple[Size, ...] = ()

    @property
    def question(self) -> str:
        """What the judge reads, without marks; several among the words are "picture 1", "picture 2", ..."""
        *before, last = MARK.split(reasoning.question(self.problem, self.options))
        words = "".join(before)
        if len(before) > 1 and words.strip():
            return "".join(f"{text}picture {i}" for i, text in enumerate(before, 1)) + last
        if not words.strip():
            return last.lstrip() if before else last
        return (words if last[:1].isalnum() else words.rstrip()) + last


def length(sample: Sample) -> tuple[int, int]:
    """Sorts prompts by how long they are, nearly: pixels first, then text."""
    return sum(size.frames * size.height * size.width for size in sample.sizes), len(sample.question)


def visual_tokens(sample: Sample, min_pixels: int, max_pixels: int, fps: float, max_frames: int) -> int:
    """How many tokens its pictures or clip take in Qwen2.5-VL: one for 28 x 28 pixels, of two frames in a clip."""
    total = 0
    for size in sample.sizes:
        height, width = smart_resize(size.height, size.width, min_pixels=min_pixels, max_pixels=max_pixels, factor=28)
        frames = 1 if sample.data_type == "image" else frames_taken(size.frames, size.rate, fps, max_frames)
        total += math.ceil(frames / 2) * (height // 28) * (width // 28)
    return total


def load(source: str | Path, on_bad_row: str = "error", say=print) -> dict[str, list[Sample]]:
    """All splits of a dataset folder or hub id, or {"train": rows} of one file.

    Raises DataError, with a line for each of the first ten bad rows, unless `on_bad_row` is "skip": then `say` gets a
    line for each.
    """
    samples, problems = _read(source, say)
    refuse(problems, on_bad_row, say)
    for name, rows in samples.items():
        if not rows:
            raise DataError(f"data: {source}, {name} has no usable row")
    return samples


def refuse(problems: list[str], on_bad_row: str, say) -> None:
    """The one way to treat bad rows, a line for each: DataError with the first ten, or with "skip" all of them said."""
    if problems and on_bad_row == "error":
        more = f"\n... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError("\n".join(problems[:10]) + more + "\nMend these rows, or leave them out with --on_bad_row skip")
    for line in problems:
        say(f"skipped: {line}")


def _read(source: str | Path, say) -> tuple[dict[str, list[Sample]], list[str]]:
    """The splits, and a line for each bad row."""
    tables, root = _tables(source, say)
    if "train" not in tables and not any(name.startswith("test") for name in tables):
        names = ", ".join(tables) or "no split"
        raise DataError(f"data: {source} holds {names}; expected train.json (and cold_start.json, test*.json)")
    samples, problems = {}, []
    with Checked(source) as checked:
        for name, (label, rows) in tables.items():
            samples[name], bad = _split(label, rows, root, checked, say)
            problems += bad
    return samples, problems


def _split(label: str, rows, root: Path | None, checked: Checked, say) -> tuple[list[Sample], list[str]]:
    """`_read` of one split."""
    found, problems, calls, seen, unknown, decided = [], {}, [], Counter(), Counter(), Counter()

    def is_bad(number: int, row, error: DataError) -> None:
        named = f" ({row['problem_id']})" if isinstance(row, dict) and "problem_id" in row else ""
        field, _, what = str(error).partition(":")
        said = f"{label} row {number}{named}, {calls[number].get(field, field)}:{what}"
        problems[number] = said.encode(errors="backslashreplace").decode()

    for number, row in enumerate(rows):
        called, choices = _columns(row), []
        calls.append(called)
        try:
            sample = _sample(row, root, rows, number, called, choices, check=None)
            found.append((number, sample))
            unknown.update(set(row) - set(FIELDS) - set(called.values()))
            decided.update(choices)
        except DataError as error:
            is_bad(number, row, error)
    samples = []
    for (number, sample), sizes in zip(found, checked.each([(s.media, s.data_type) for _, s in found]), strict=True):
        seen[sample.id] += not isinstance(sizes, DataError)
        if isinstance(sizes, DataError):
            is_bad(number, rows[number], sizes)
        elif seen[sample.id] > 1:
            is_bad(number, rows[number], DataError(f"problem_id: {sample.id!r} is already taken. Make ids unique"))
        else:
            samples.append(replace(sample, sizes=sizes))
    if unknown:
        counted = ", ".join(f"{field} ({count} rows)" for field, count in sorted(unknown.items()))
        say(f"data: {label}: fields left alone: {counted}. Is one misspelt? Known: {', '.join(FIELDS)}")
    if decided:
        say(f"data: {label}: decided: " + "; ".join(f"{what} ({n} rows)" for what, n in sorted(decided.items())))
    return samples, [problems[number] for number in sorted(problems)]


def _tables(source: str | Path, say) -> tuple[dict[str, tuple[str, Any]], Path | None]:
    """Split name -> (what to call it, its rows), and the folder that paths are relative to (None: they may be none)."""
    path = Path(source)
    if not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise DataError(
                f"data: {source} does not exist. Give a folder with train.json, or one JSON/JSONL/Parquet file, or a "
                "hub id"
            )
        import datasets

        try:
            found = datasets.load_dataset(str(source))
        except Exception as error:  # of many kinds, from the hub, the network and the builder
            raise DataError(f"data: {source} is no file here and cannot be had from the hub ({error})") from error
        return {name: (f"{source} {name}", _undecoded(table)) for name, table in found.items()}, None
    if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        import datasets

        try:
            found = datasets.load_from_disk(str(path))
        except Exception as error:  # of many kinds
            raise DataError(f"data: cannot read {path}: {error}") from error
        found = found if isinstance(found, dict) else {"train": found}
        return {name: (f"{path.name} {name}", _undecoded(table)) for name, table in found.items()}, path
    if not path.is_dir():
        if path.suffix not in SUFFIXES:
            raise DataError(f"data: {path.name} is none of {', '.join(SUFFIXES)}. Convert it")
        return {"train": (path.name, _rows(path))}, path.parent
    files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES)
    if others := [f.name for f in files if not f.stem.startswith(("train", "cold_start", "validation", "test"))]:
        say(f"data: not a split, left alone: {', '.join(others)}")
    files = [f for f in files if f.name not in others]
    splits = defaultdict(list)
    for f in files:
        splits[re.sub(r"-\d+-of-\d+$", "", f.stem)].append(f)  # a table of the hub may lie in several files
    if len({f.stem for f in files}) < len(files):
        raise DataError(f"data: {path} holds a split twice: {', '.join(f.name for f in files)}. Keep one of each name")
    if not files:
        raise DataError(
            f"data: {path} holds {', '.join(others) or 'no data file'}; expected train.json (and cold_start.json, "
            "test*.json)"
        )
    return {name: (parts[0].name, _rows(*parts)) for name, parts in splits.items()}, path


def _undecoded(table):
    """Pictures stay bytes until they are opened, and lists lists."""
    import datasets

    table = table.with_format(None)
    for name, feature in table.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.Image | datasets.Video):
            plain = type(inner)(decode=False)
            table = table.cast_column(name, plain if inner is feature else datasets.List(plain))
    return table


def _rows(file: Path, *more: Path):
    if file.suffix == ".parquet":
        import datasets

        try:
            files = [glob.escape(str(part)) for part in (file, *more)]
            table = datasets.load_dataset("parquet", data_files=files, split="train")
        except Exception as error:  # of many kinds
            raise DataError(f"data: cannot read {file}: {error}") from error
        return _undecoded(table)
    if more:
        return [row for part in (file, *more) for row in _rows(part)]
    try:
        text = file.read_bytes().decode("utf-8-sig")
        if "\0" in text:  # UTF-16 without a byte order mark
            raise ValueError("it is not in UTF-8. Save it as UTF-8")
        rows = json_lines(text) if file.suffix == ".jsonl" else json_or_lines(text)
    except UnicodeDecodeError as error:
        raise DataError(f"data: cannot read {file}: it is not in UTF-8 ({error.reason}). Save it as UTF-8") from error
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


def reason(error: BaseException) -> str:
    """The first line of an error that has words: nltk's errors begin with a line of stars, some have no text."""
    return next((line.strip() for line in str(error).splitlines() if re.search(r"\w", line)), type(error).__name__)


def _columns(row) -> dict[str, str]:
    """Ours -> theirs, for what a row has under another name of COLUMNS only."""
    row = row if isinstance(row, dict) else {}
    found = {ours: [name for name in theirs if not _missing(row.get(name))] for ours, theirs in COLUMNS.items()}
    return {ours: names[0] for ours, names in found.items() if names and _missing(row.get(ours))}


def _missing(value) -> bool:
    """Nothing, or what stands for it: blanks, an empty list, pandas' not-a-number."""
    if isinstance(value, float | str):
        return value != value or not str(value).strip()
    return value is None or (isinstance(value, list) and not value)


def _sample(row: dict, root: Path | None, table=None, number=0, called=None, decided=None, check=_check_media):
    """One row, checked; DataError("field: what is wrong. What to do"). called: its `_columns`. decided: gets a few
    words for each thing that the row leaves open."""
    if not isinstance(row, dict):
        raise DataError(f"row: must be an object, got {type(row).__name__}")
    called, decided = called or {}, [] if decided is None else decided
    decided += [f"{theirs} is read as {ours}" for ours, theirs in called.items()]
    row = {name: value if isinstance(value, list) or not _missing(value) else None for name, value in row.items()}
    row |= {ours: row[theirs] for ours, theirs in called.items()}
    if "path" in called:
        if row.get("problem_id") is None:
            row["problem_id"] = number
            decided.append("the row's number is read as problem_id")
        row["data_type"] = row.get("data_type") or ("video" if called["path"].startswith("video") else "image")
    for name in ("path", "data_type", "problem_type", "problem", "solution", "problem_id"):
        if _missing(row.get(name)) and not ("path" in called and name == "problem_type"):
            other = f" (or {', '.join(COLUMNS[name])})" if name in COLUMNS else ""
            raise DataError(f"{name}: missing or empty. Every row needs one{other}")
    if row["data_type"] not in ("image", "video"):
        raise DataError(f"data_type: {row['data_type']!r} is neither 'image' nor 'video'")
    if row.get("problem_type") not in (*reasoning.PROBLEM_TYPES, None):
        raise DataError(f"problem_type: {row['problem_type']!r} is not one of {', '.join(reasoning.PROBLEM_TYPES)}")
    for name in ("options", "objects", "relevant"):
        value = row.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise DataError(f'{name}: must be a list of strings such as ["A. red", "B. green"]')
    cells = row["path"] if isinstance(row["path"], list) else [row["path"]]
    if row["data_type"] == "video" and len(cells) > 1:
        raise DataError("path: a row has one clip. Give one path")
    problem, *options = _marked([_question(row["problem"], decided), *(row.get("options") or ())], row, len(cells))
    process = row.get("process") or row.get("process_and_answer")
    if process is not None and not isinstance(process, str):
        raise DataError(f"process: must be a string, got {type(process).__name__}")
    if process and not any(reasoning.format_reward(process, four_stage) for four_stage in (True, False)):
        raise DataError("process: lacks a stage, or holds text outside them. Give all four, once each, in order")
    golds = _golds(row["solution"])
    problem_type, names = _type(row.get("problem_type"), problem, options, golds, decided)
    if problem_type == "multiple choice":
        if not isinstance(row["solution"], str | list):
            raise DataError(f"solution: {row['solution']} is a number, a place or a text. Give the option's letter")
        if options:
            shown, names = _lettered(options, decided)
            if process and shown != options:  # the letter is what is taught, however the row writes it
                letter = _letter(reasoning.parse(process).answer, names, "process")
                process = re.sub(r"<answer>.*</answer>", f"<answer>{letter}</answer>", process, flags=re.DOTALL)
            options = shown
        golds = list(dict.fromkeys(_letter(gold, names, "solution") for gold in golds))
        if len(golds) > 1:
            raise DataError(f"solution: holds the letters {', '.join(golds)}. Give one, or leave the row out")
    for gold in golds if problem_type in ("numerical", "regression") else ():
        if answers.to_number(gold) is None:
            raise DataError(f"solution: {gold!r} is not a number")
        if not answers.NUMBER.fullmatch(gold.removesuffix(".")):
            raise DataError(f"solution: {gold!r} may be several numbers. Write one, such as 1,200 or 1.5")
    try:
        "".join([problem, *options, *golds, process or ""]).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"problem: it, or another text of the row, holds half a character ({error})") from error
    places = range(len(cells)) if isinstance(row["path"], list) else [None]
    column = called.get("path", "path")
    media = tuple(medium_of(cell, root, Embedded(table, number, i, column)) for i, cell in zip(places, cells))
    sizes = tuple(check(medium, row["data_type"]) for medium in media) if check else ()
    as_tuple = {name: tuple(row[name]) if row.get(name) is not None else None for name in ("objects", "relevant")}
    return Sample(
        id=_name_of(row, "problem_id"),
        data_type=row["data_type"],
        media=media,
        problem=problem,
        options=tuple(options),
        problem_type=problem_type,
        answer=golds[0] if len(golds) == 1 else answers.Answers(*golds),
        process=process,
        category=_name_of(row, "category") or problem_type,
        pair=_name_of(row, "pair"),
        sizes=sizes,
        **as_tuple,
    )


def _name_of(row: dict, field: str) -> str | None:
    value = row.get(field)
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas makes 3.0 of 3 where another row has none
    if isinstance(value, bool) or not isinstance(value, str | int | None):
        raise DataError(f"{field}: must be a string, got {value!r}")
    return None if value is None else str(value)


def _question(value, decided: list) -> str:
    """The text of `problem`, or of the user's turn in a chat, whose pictures become marks."""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        turns = [turn for turn in value if turn.get("role") != "system"]
        if [turn.get("role") for turn in turns] != ["user"]:
            raise DataError("problem: must be a text, or a chat with one turn, the user's")
        if len(turns) < len(value):
            decided.append("the system's turn is left out")
        value = turns[0].get("content")
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        parts = [f"<{p['type']}>" if p.get("type") in ("image", "video") else p.get("text") for p in value]
        value = "".join(parts) if all(isinstance(part, str) for part in parts) else value
    if not isinstance(value, str):
        raise DataError(f"problem: must be a text, or a chat with one turn, the user's; got {type(value).__name__}")
    return value


def _marked(texts: list[str], row: dict, count: int) -> list[str]:
    """Question and options; each picture or clip has its mark in them, or none has."""
    for pattern, ours in FOREIGN:
        texts = [pattern.sub(ours, text) for text in texts]
    numbers = [int(number) for text in texts for _, number in NUMBERED.findall(text)]
    if numbers != list(range(1, len(numbers) + 1)):
        raise DataError(f"problem: marks <image {numbers[0]}> ... are not 1, 2, ... in order, each once. Use <image>")
    texts = [NUMBERED.sub(r"<\1>", text) for text in texts]
    marks = [mark for text in texts for mark in MARK.findall(text)]
    if marks and len(marks) != count:
        raise DataError(f"problem: {len(marks)} marks {marks[0]} for {count} in `path`. Give one for each, or none")
    if "<video>" in marks and row["data_type"] == "image":
        raise DataError("problem: holds the mark <video>, and the row has a picture. Write <image>")
    if not MARK.sub("", texts[0]).strip():
        raise DataError("problem: holds no words. Every row needs a question")
    return texts


def _golds(solution) -> list[str]:
    """The accepted answers as text. A whole number may have been written 5 or, as pandas and JSON have it, 5.0."""
    golds = []
    for one in solution if isinstance(solution, list) else [solution]:
        if isinstance(one, str):
            golds.append(_bare(answers.solution_of(one)))
            if re.fullmatch(r"""\[\s*(['"]).*\1\s*\]""", golds[-1], re.DOTALL):
                raise DataError(f"solution: {golds[-1]!r} is a list written as text. Give the list, or one answer")
        elif isinstance(one, float) and math.isfinite(one):
            golds += [str(int(one)), f"{int(one)}.0"] if one.is_integer() else [str(one)]
        elif isinstance(one, int) and not isinstance(one, bool):
            golds.append(str(one))
        else:
            raise DataError(f"solution: must be a text, a number or a list of accepted ones, got {one!r}")
    if not all(golds):
        raise DataError("solution: no answer inside <answer></answer>")
    if any(re.search("</?answer>", gold) for gold in golds):
        raise DataError("solution: <answer> is not closed, or is there twice. Give <answer>...</answer> once")
    return list(dict.fromkeys(golds))


def _bare(gold: str) -> str:
    """ "\\boxed{12.5}" -> "12.5"; "$4$" -> "4" """
    found = WRAPPED.fullmatch(gold)
    return (found[1] or found[2]).strip() if found else gold


def _type(given: str | None, problem: str, options: list[str], golds: list[str], decided: list):
    """The problem type, decided where none is given, and the names of options that the question itself lists."""
    names = {} if options or given not in ("multiple choice", None) else _listed(problem, golds)
    if given:
        return given, names
    if options or names:
        kind, why = "multiple choice", "by its options" if options else "by lettered options in the question"
    elif all(letters := [re.fullmatch(r"\(?([A-Z])\)?[.:]?", gold) for gold in golds]):
        kind, why, names = "multiple choice", "by a letter as solution", {letter[1]: [] for letter in letters}
    elif all(answers.NUMBER.fullmatch(gold) for gold in golds):
        kind, why = "numerical", "by a number as solution"
    else:
        kind, why = "free-form", "without options, letter or number"
    decided.append(f"{kind} {why}")
    return kind, names


def _lettered(options: list[str], decided: list) -> tuple[list[str], dict[str, list[str]]]:
    """Options as they are shown, "A. red", and by letter what a solution may call each: the option as it is written,
    and the number that it begins with where all are numbered 1, 2, ... in order."""
    if len(options) > 26:
        raise DataError(f"options: {len(options)} of them, and only 26 letters")
    letters, options = string.ascii_uppercase[: len(options)], [option.strip() for option in options]
    options = [option[2:-2] if re.fullmatch(r"\*\*[^*]+\*\*", option) else option for option in options]
    found = [OPTION.fullmatch(option) for option in options]
    told = [unicodedata.normalize("NFKC", match[1]).upper() if match else "" for match in found]
    own = [a == b for a, b in zip(told, letters)]
    if all(options) and (all(told) or any(own)) and not all(own):
        begin = ", ".join(letter or "no letter" for letter in told)
        raise DataError(f"options: begin with {begin}. Give all of them letters, A, B, ... in order, or none")
    texts = [match[2].strip() for match in found] if all(own) else options
    bare = [match[1].upper() for option in options if (match := re.match(r"\W*([A-Za-z])\W", option))]
    if not any(own) and bare != list(letters) and sorted(bare) == list(letters) and len(bare) > 1:
        raise DataError(f"options: seem to begin with {', '.join(bare)}. Give them letters in order, or none")
    if not all(texts):
        raise DataError(f"options: one is empty ({', '.join(map(repr, options))}). Leave it out, or fill it")
    if not all(own):
        decided.append("options get letters in their order")
    numbered = [re.match(rf"\(?{i}[.)]\s", option) for i, option in enumerate(options, 1)]
    names = {a: [option, f"{a}. {text}"] for a, option, text in zip(letters, options, texts)}
    if all(numbered):
        names = {a: [*of, str(i)] for i, (a, of) in enumerate(names.items(), 1)}
    return [f"{a}. {text}" for a, text in zip(letters, texts)], names


def _listed(question: str, golds: list[str]) -> dict[str, list[str]]:
    """By letter, what a solution may call each of the options that a question lists itself: on lines of their own, or
    one behind the other, which is believed only where a solution names one. {}: it lists none."""
    for pattern in LISTED:
        found = list(pattern.finditer(question))
        letters = [unicodedata.normalize("NFKC", match[1]) for match in found]
        start = "".join(letters).upper().rfind("A")
        found, letters = found[start:], letters[start:]
        ends = [match.start() for match in found[1:]] + [len(question)]
        texts = [question[match.end() : end].strip() for match, end in zip(found, ends)]
        in_order = "".join(letters).upper() == string.ascii_uppercase[: len(letters)]
        if len(found) < 2 or not in_order or not all(texts):
            continue
        texts[-1] = texts[-1].split("\n")[0]
        names = {letter: [text, f"{letter}. {text}"] for letter, text in zip(letters, texts)}
        if pattern is LISTED[0] or all(any(_names(gold, letter, of) for letter, of in names.items()) for gold in golds):
            return names
    return {}


def _names(answer: str, letter: str, others: list[str]) -> bool:
    """Does an answer of a row stand for this option: its letter, in any usual form, or one of its other names?"""
    bare = re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", answer.translate(answers.NARROW))
    if bare and bare[1].upper() == letter.upper():
        return True
    return answers.is_correct(answer, others, "free-form")


def _letter(answer: str, names: dict[str, list[str]], field: str) -> str:
    """The letter of the option that an answer of the row stands for."""
    found = [letter for letter, others in names.items() if _names(answer, letter, others)]
    if len(found) > 1:
        raise DataError(f"{field}: {answer!r} may be option {' or '.join(found)}. Give the letter")
    if not found:
        known = ", ".join(names) or "no options"
        raise DataError(
            f"{field}: {answer!r} is not the letter of an option ({known}). Give a letter, or another problem_type"
        )
    return found[0]


def fingerprint(sets: dict[str, list[Sample]]) -> str:
    """What a run works on, a few words for each set: equal where its rows are, in their order, with every field and
    every picture and clip. A file is known by path, size and time of change, anything else by its content."""
    lines = []
    for name, rows in sorted(sets.items()):
        digest = hashlib.sha256()
        for s in rows:
            fields = [value for field, value in vars(s).items() if field not in ("media", "sizes")]
            accepted = getattr(s.answer, "accepted", ())
            digest.update(repr((fields, accepted, [trace(medium) for medium in s.media])).encode())
        lines.append(f"{name}: {len(rows)} rows, {digest.hexdigest()[:12]}")
    return "; ".join(lines)


def _placed(media: list[dict], text: str) -> list[dict]:
    """Media at their marks in the text; all before it where it has none."""
    before, *behind = MARK.split(text)
    if not media or len(behind) != len(media):
        return [*media, {"type": "text", "text": text}]
    content = [{"type": "text", "text": before}] if before.strip() else []
    for medium, words in zip(media, behind):
        if all(part["type"] != "text" for part in content):
            words = words.lstrip()  # a mark before all words is where the picture goes anyway
        content += [medium, {"type": "text", "text": words}] if words.strip() else [medium]
    return content


def messages(sample: Sample, text: str, fps: float = 2.0, max_frames: int = 16) -> list[dict]:
    """The user turn: the pictures or the clip at their marks in `text`, or before it, as chat content that
    `vlm.VLM.encode` takes."""
    if sample.data_type == "video":
        frames, true_fps = read_video(sample.media[0], fps, max_frames)
        media = [{"type": "video", "video": frames, "fps": true_fps}]
    else:
        media = [{"type": "image", "image": read_image(path)} for path in sample.media]
    return [{"role": "user", "content": _placed(media, text)}]


def prompts(samples: Sequence[Sample], four_stage: bool, fps: float, max_frames: int) -> list[list[dict]]:
    """The conversation of each sample: its media and the prompt of `reasoning`."""
    return [
        messages(s, reasoning.prompt(s.problem, s.options, s.problem_type, four_stage), fps, max_frames)
        for s in samples
    ]


def check(source: str, model: str = "", min_pixels=3136, max_pixels=401_408, fps=2.0, max_frames=16) -> bool:
    """Print what is in a dataset and a line for each bad row; is it free of them?"""
    splits, problems = _read(source, print)
    count_text = None
    if model:
        from vlm import context  # here only: reading rows needs no model library

        try:
            most, tokenizer = context(model)
        except (OSError, ValueError) as error:
            raise DataError(f"--model: cannot load {model}: {reason(error)}") from error
        count_text = prompt_text_tokens(tokenizer)
        splits, unfit = fitting(splits, tokenizer, most, True, min_pixels, max_pixels, fps, max_frames)
        problems = [*problems, *unfit]
    for name, rows in splits.items():
        print(f"{name}: {len(rows)} rows, {sum(bool(s.process) for s in rows)} with a reference response")
        for (data_type, problem_type), n in sorted(Counter((s.data_type, s.problem_type) for s in rows).items()):
            print(f"  {n:>7} {data_type}, {problem_type}")
        sizes = [size for s in rows for size in s.sizes]
        tokens = [visual_tokens(s, min_pixels, max_pixels, fps, max_frames) for s in rows]
        numbers = {
            "width": [size.width for size in sizes],
            "height": [size.height for size in sizes],
            "media per row": [len(s.sizes) for s in rows],
            "seconds of a clip": [z.frames / z.rate for s in rows if s.data_type == "video" for z in s.sizes],
            f"visual tokens (at most {max_pixels} pixels a picture)": tokens,
        }
        if count_text:
            numbers["prompt tokens"] = [count_text(s) + n for s, n in zip(rows, tokens)]
        for what, values in numbers.items():
            if values:
                values = sorted(values)
                print(f"  {what}: {values[0]:g} to {values[-1]:g}, median {values[len(values) // 2]:g}")
    for line in problems:
        print(f"bad: {line}")
    print(f"{len(problems)} bad rows" if problems else "no bad row")
    return not problems


def prompt_text_tokens(tokenizer, four_stage: bool = True):
    """Sample -> tokens of its prompt without pictures: the words, and the chat template around them."""
    around = len(
        tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True)["input_ids"]
    )

    def count(sample: Sample) -> int:
        text = reasoning.prompt(sample.problem, sample.options, sample.problem_type, four_stage)
        words = [part["text"] for part in _placed([{"type": "image"}] * len(sample.media), text) if "text" in part]
        tokens = sum(len(tokenizer(part).input_ids) for part in words)
        return around + tokens + 2 * len(sample.media)  # vision_start, vision_end

    return count


def fitting(
    sets: dict[str, list[Sample]], tokenizer, most: int, four_stage: bool, min_pixels, max_pixels, fps, max_frames
) -> tuple[dict[str, list[Sample]], list[str]]:
    """The rows that a model can be asked, and a line for each other: a multimodal prompt is never truncated, so one of
    more than `most` tokens is a bad row, as is one with a control token in its text."""
    text_tokens, problems, fit = prompt_text_tokens(tokenizer, four_stage), [], {}
    commands = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    commands |= set(tokenizer.all_special_tokens)
    commands -= set(reasoning.TAGS)  # stage tags may be special, and belong there
    for name, rows in sets.items():
        fit[name] = []
        for s in rows:
            tokens = text_tokens(s) + visual_tokens(s, min_pixels, max_pixels, fps, max_frames)
            words = " ".join([s.problem, *s.options, s.answer, s.process or ""])
            control = [token for token in commands if token in words]
            if control:
                problems.append(f"{name} ({s.id}), text: holds {control[0]}, which the model takes for a command")
            elif tokens > most:
                problems.append(f"{name} ({s.id}), prompt: {tokens} tokens, more than {most}: a lower --max_pixels?")
            else:
                fit[name].append(s)
    return fit, problems


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Check a dataset before anything is trained on it.")
    parser.add_argument("command", choices=["check"])
    parser.add_argument("source", help="dataset folder, file or hub id")
    parser.add_argument("--model", default="", help="count prompt tokens, and find what this model cannot be asked")
    args = parser.parse_args()
    try:
        sys.exit(0 if check(args.source, args.model) else 1)
    except DataError as error:
        sys.exit(f"error: {error}")
