"""Rows on disk -> checked samples; images and clips -> chat messages.

The schema is the official one, one JSON object per row:

    data_type     "image" or "video"
    problem_type  one of `reasoning.PROBLEM_TYPES`
    problem       the question
    options       ["A. red", "B. green"], empty where there are none
    path          the picture or clip, relative to the file ("./images/0.png"); a list of them for several images. In
                  place of a path: the bytes, a PIL image, or what `datasets` makes of them, {"bytes": ..., "path": ...}
    solution      "<answer>A</answer>" (a bare "A" is taken too)
    problem_id    unique
    process       optional: a reference response with all its stages, for the cold start

and, optional, for evaluation: `category` (groups the accuracy), `pair` (two rows of one pair share it), `objects`
(what the picture holds, for caption hallucination) and `relevant` (those of them that the question is about).

A dataset is a folder of such files, its splits named by file: `cold_start`, `train`, `validation` (to choose among RL's
checkpoints) and any `test*`; or one file; or a folder written by `datasets` (save_to_disk); or a hub id. Every row is
checked, and every picture and clip opened, before a model is loaded; the same check alone:

    python data.py check SOURCE               # counts, sizes, and one line for each bad row
    python data.py check SOURCE --model M     # prompt lengths in M's tokens as well
"""

import argparse
import glob
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen_vl_utils.vision_process import smart_resize

import answers
import reasoning
from media import DataError, Embedded, Media, Size, _check_media, frames_taken, medium_of, read_image, read_video

SUFFIXES = (".json", ".jsonl", ".parquet")
FIELDS = (
    "data_type problem_type problem options path solution problem_id process process_and_answer data_source category "
    "pair objects relevant"
).split()


@dataclass(frozen=True)
class Sample:
    """One checked row. Media stay on disk until `messages` is asked for them."""

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
        return reasoning.question(self.problem, self.options)


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
    for name, (label, rows) in tables.items():
        samples[name], seen, unknown = [], Counter(), Counter()
        for number, row in enumerate(rows):
            try:
                sample = _sample(row, root, rows, number)
                seen[sample.id] += 1
                unknown.update(set(row) - set(FIELDS))
                if seen[sample.id] > 1:
                    raise DataError(f"problem_id: {sample.id!r} is already taken. Make ids unique")
                samples[name].append(sample)
            except DataError as error:
                named = f" ({row['problem_id']})" if isinstance(row, dict) and "problem_id" in row else ""
                problems.append(f"{label} row {number}{named}, {error}")
        if unknown:
            counted = ", ".join(f"{field} ({count} rows)" for field, count in sorted(unknown.items()))
            say(f"data: {label}: fields left alone: {counted}. Is one misspelt? Known: {', '.join(FIELDS)}")
    return samples, problems


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
        return {"train": (path.name, _rows(path))}, path.parent
    files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES)
    if others := [f.name for f in files if not f.stem.startswith(("train", "cold_start", "validation", "test"))]:
        say(f"data: not a split, left alone: {', '.join(others)}")
    files = [f for f in files if f.name not in others]
    if len({f.stem for f in files}) < len(files):
        raise DataError(f"data: {path} holds a split twice: {', '.join(f.name for f in files)}. Keep one of each name")
    if not files:
        raise DataError(
            f"data: {path} holds {', '.join(others) or 'no data file'}; expected train.json (and cold_start.json, "
            "test*.json)"
        )
    return {f.stem: (f.name, _rows(f)) for f in files}, path


def _undecoded(table):
    """Pictures stay bytes until they are opened."""
    import datasets

    for name, feature in table.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.Image | datasets.Video):
            plain = type(inner)(decode=False)
            table = table.cast_column(name, plain if inner is feature else datasets.List(plain))
    return table


def _rows(file: Path):
    if file.suffix == ".parquet":
        import datasets

        try:
            table = datasets.load_dataset("parquet", data_files=glob.escape(str(file)), split="train")
        except Exception as error:  # of many kinds
            raise DataError(f"data: cannot read {file}: {error}") from error
        return _undecoded(table)
    try:
        text = file.read_text(encoding="utf-8")
        rows = (
            [json.loads(line) for line in text.split("\n") if line.strip()]
            if file.suffix == ".jsonl"
            else json.loads(text)
        )
    except (OSError, ValueError) as error:
        raise DataError(f"data: cannot read {file}: {error}") from error
    if not isinstance(rows, list):
        raise DataError(f"data: {file} must hold a list of rows, not a {type(rows).__name__}")
    return rows


def _sample(row: dict, root: Path | None, table=None, number: int = 0) -> Sample:
    """One row, checked; DataError("field: what is wrong. What to do")."""
    if not isinstance(row, dict):
        raise DataError(f"row: must be an object, got {type(row).__name__}")
    for name in ("data_type", "problem_type", "problem", "path", "solution", "problem_id"):
        if row.get(name) in (None, "", []):
            raise DataError(f"{name}: missing or empty. Every row needs one")
    if row["data_type"] not in ("image", "video"):
        raise DataError(f"data_type: {row['data_type']!r} is neither 'image' nor 'video'")
    if row["problem_type"] not in reasoning.PROBLEM_TYPES:
        raise DataError(f"problem_type: {row['problem_type']!r} is not one of {', '.join(reasoning.PROBLEM_TYPES)}")
    for name in ("options", "objects", "relevant"):
        value = row.get(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            raise DataError(f'{name}: must be a list of strings such as ["A. red", "B. green"]')
    options, answer = tuple(row.get("options") or ()), answers.solution_of(str(row["solution"]))
    if not answer:
        raise DataError("solution: no answer inside <answer></answer>")
    if row["problem_type"] == "multiple choice":
        letters = [option.split(".")[0].strip() for option in options]
        if answer not in letters:
            raise DataError(
                f"solution: {answer!r} is not the letter of an option ({', '.join(letters) or 'no options'})"
            )
    if row["problem_type"] in ("numerical", "regression") and answers.to_number(answer) is None:
        raise DataError(f"solution: {answer!r} is not a number")
    for name in ("category", "pair"):
        if not isinstance(row.get(name), str | int | None):
            raise DataError(f"{name}: must be a string, got {row[name]!r}")
    process = row.get("process") or row.get("process_and_answer")
    if process is not None and not isinstance(process, str):
        raise DataError(f"process: must be a string, got {type(process).__name__}")
    if process and not any(reasoning.format_reward(process, four_stage) for four_stage in (True, False)):
        raise DataError("process: lacks a stage, or holds text outside them. Give all four, once each, in order")
    cells = row["path"] if isinstance(row["path"], list) else [row["path"]]
    if row["data_type"] == "video" and len(cells) > 1:
        raise DataError("path: a row has one clip. Give one path")
    places = range(len(cells)) if isinstance(row["path"], list) else [None]
    media = tuple(medium_of(cell, root, Embedded(table, number, i)) for i, cell in zip(places, cells))
    sizes = tuple(_check_media(medium, row["data_type"]) for medium in media)
    as_tuple = {name: tuple(row[name]) if row.get(name) is not None else None for name in ("objects", "relevant")}
    return Sample(
        id=str(row["problem_id"]),
        data_type=row["data_type"],
        media=media,
        problem=str(row["problem"]),
        options=options,
        problem_type=row["problem_type"],
        answer=answer,
        process=process,
        category=str(row.get("category") or row["problem_type"]),
        pair=None if row.get("pair") is None else str(row["pair"]),
        sizes=sizes,
        **as_tuple,
    )


def messages(sample: Sample, text: str, fps: float = 2.0, max_frames: int = 16) -> list[dict]:
    """The user turn: the pictures or the clip, then `text`, as chat content that `vlm.VLM.encode` takes."""
    if sample.data_type == "video":
        frames, true_fps = read_video(sample.media[0], fps, max_frames)
        media = [{"type": "video", "video": frames, "fps": true_fps}]
    else:
        media = [{"type": "image", "image": read_image(path)} for path in sample.media]
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


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
            raise DataError(f"--model: cannot load {model}: {str(error).splitlines()[0]}") from error
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
        return around + len(tokenizer(text).input_ids) + 2 * len(sample.media)  # vision_start, vision_end

    return count


def fitting(
    sets: dict[str, list[Sample]], tokenizer, most: int, four_stage: bool, min_pixels, max_pixels, fps, max_frames
) -> tuple[dict[str, list[Sample]], list[str]]:
    """The rows that a model can be asked, and a line for each other: a multimodal prompt is never truncated, so one of
    more than `most` tokens is a bad row, as is one with a control token in its text."""
    text_tokens, problems, fit = prompt_text_tokens(tokenizer, four_stage), [], {}
    for name, rows in sets.items():
        fit[name] = []
        for s in rows:
            tokens = text_tokens(s) + visual_tokens(s, min_pixels, max_pixels, fps, max_frames)
            words = " ".join([s.problem, *s.options, s.answer, s.process or ""])
            control = [token for token in tokenizer.all_special_tokens if token in words]
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
