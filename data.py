"""Rows on disk -> checked samples; images and clips -> chat messages.

The schema is the official one, one JSON object per row:

    data_type     "image" or "video"
    problem_type  one of `reasoning.PROBLEM_TYPES`
    problem       the question
    options       ["A. red", "B. green"], empty where there are none
    path          the picture or clip, relative to the file ("./images/0.png"); a list of paths for several images
    solution      "<answer>A</answer>" (a bare "A" is taken too)
    problem_id    unique
    process       optional: a reference response with all its stages, for the cold start

and, optional, for evaluation: `category` (groups the accuracy), `pair` (two rows of one pair share it), `objects`
(what the picture holds, for caption hallucination) and `relevant` (those of them that the question is about).

A dataset is a folder of such files, its splits named by file: `cold_start`, `train`, and any `test*`; or one file.
Every row is checked, and every picture and clip opened, before a model is loaded.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
from PIL import Image

import answers
import reasoning

SUFFIXES = (".json", ".jsonl", ".parquet")


class DataError(ValueError):
    """Something in the data, in one line: which file, which row, which field, what to do."""


@dataclass(frozen=True)
class Sample:
    """One checked row. Media stay on disk until `messages` is asked for them."""

    id: str
    data_type: str
    media: tuple[Path, ...]
    problem: str
    options: tuple[str, ...]
    problem_type: str
    answer: str
    process: str | None = None
    category: str = ""
    pair: str | None = None
    objects: tuple[str, ...] | None = None
    relevant: tuple[str, ...] | None = None
    pixels: int = 0  # of all its pictures, or of its clip's frames

    @property
    def question(self) -> str:
        return reasoning.question(self.problem, self.options)


def length(sample: Sample) -> tuple[int, int]:
    """Sorts prompts by how long they are, nearly: visual tokens first, then text."""
    return sample.pixels, len(sample.question)


def load(source: str | Path, on_bad_row: str = "error", say=print) -> dict[str, list[Sample]]:
    """All splits of a dataset folder, or {"train": rows} of one file.

    Raises DataError, with a line for each of the first ten bad rows, unless `on_bad_row` is "skip": then `say` gets a
    line for each.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"data: {source} does not exist. Give a folder with train.json, or one JSON/JSONL/Parquet file")
    files = sorted(f for f in source.iterdir() if f.suffix in SUFFIXES) if source.is_dir() else [source]
    if others := [f.name for f in files if source.is_dir() and not f.stem.startswith(("train", "cold_start", "test"))]:
        say(f"data: not a split, left alone: {', '.join(others)}")
    files = [f for f in files if f.name not in others]
    splits = {f.stem if source.is_dir() else "train": f for f in files}
    if len(splits) < len(files):
        raise DataError(
            f"data: {source} holds a split twice: {', '.join(f.name for f in files)}. Keep one of each name"
        )
    if "train" not in splits and not any(name.startswith("test") for name in splits):
        names = ", ".join([f.name for f in files] + others) or "no data file"
        raise DataError(f"data: {source} holds {names}; expected train.json (and cold_start.json, test*.json)")
    problems: list[str] = []
    samples = {name: _load_file(file, problems) for name, file in splits.items()}
    if problems and on_bad_row == "error":
        more = f"\n... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError("\n".join(problems[:10]) + more + "\nMend these rows, or leave them out with --on_bad_row skip")
    for line in problems:
        say(f"skipped: {line}")
    for name, rows in samples.items():
        if not rows:
            raise DataError(f"data: {splits[name]} has no usable row")
    return samples


def _load_file(file: Path, problems: list[str]) -> list[Sample]:
    samples, seen = [], Counter()
    for number, row in enumerate(_rows(file)):
        where = f"{file.name} row {number}"
        try:
            sample = _sample(row, file.parent)
            seen[sample.id] += 1
            if seen[sample.id] > 1:
                raise DataError(f"problem_id: {sample.id!r} is already taken. Make ids unique")
            samples.append(sample)
        except DataError as error:
            name = f" ({row['problem_id']})" if isinstance(row, dict) and "problem_id" in row else ""
            problems.append(f"{where}{name}, {error}")
    return samples


def _rows(file: Path) -> list[dict]:
    try:
        if file.suffix == ".parquet":
            from datasets import load_dataset

            return list(load_dataset("parquet", data_files=str(file), split="train"))
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


def _sample(row: dict, root: Path) -> Sample:
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
    paths = row["path"] if isinstance(row["path"], list) else [row["path"]]
    if not all(isinstance(path, str) for path in paths):
        raise DataError("path: must be a path or a list of paths")
    if row["data_type"] == "video" and len(paths) > 1:
        raise DataError("path: a row has one clip. Give one path")
    media = tuple(root / path for path in paths)
    pixels = sum(_check_media(path, row["data_type"]) for path in media)
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
        pixels=pixels,
        **as_tuple,
    )


def _check_media(path: Path, data_type: str) -> int:
    """Opens all of it; the number of its pixels."""
    if not path.is_file():
        raise DataError(f"path: {path} does not exist")
    try:
        if data_type == "image":
            with Image.open(path) as image:
                image.load()  # verify() would pass a truncated JPEG
                return image.width * image.height
        else:
            with av.open(str(path)) as container:
                if not container.streams.video:
                    raise ValueError("no video stream")
                if any(packet.is_corrupt for packet in container.demux(video=0)):
                    raise ValueError("it is cut off")
                stream = container.streams.video[0]
                return stream.width * stream.height * stream.frames
    except Exception as error:  # PIL and PyAV raise many kinds; all of them mean an unreadable file
        raise DataError(f"path: cannot read {path} as {data_type} ({error})") from error


def messages(sample: Sample, text: str, fps: float = 2.0, max_frames: int = 16) -> list[dict]:
    """The user turn: the pictures or the clip, then `text`, as chat content that `vlm.VLM.encode` takes."""
    if sample.data_type == "video":
        frames, true_fps = read_video(sample.media[0], fps, max_frames)
        media = [{"type": "video", "video": frames, "fps": true_fps}]
    else:
        media = [{"type": "image", "image": read_image(path)} for path in sample.media]
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]


def read_image(path: Path) -> Image.Image:
    """The picture in RGB; transparency becomes white, as in qwen-vl-utils, not black."""
    image = Image.open(path)
    if image.mode == "RGBA" or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def read_video(path: Path, fps: float = 2.0, max_frames: int = 16) -> tuple[list[Image.Image], float]:
    """Frames of a clip, evenly spaced at about `fps` and at most `max_frames`, and the rate they really have.

    PyAV, because qwen-vl-utils' torchvision reader is gone from torchvision and its torchcodec reader needs a system
    FFmpeg.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 1.0)
        total = sum(1 for _ in container.decode(stream))
    if not total:
        raise DataError(f"path: {path} holds no frame")
    count = min(total, max_frames, max(2, round(total / rate * fps)))
    wanted = {round(i * (total - 1) / max(count - 1, 1)) for i in range(count)}
    with av.open(str(path)) as container:  # a second time, so that a long clip is never in memory as a whole
        frames = enumerate(container.decode(video=0))
        picked = [frame.to_image() for i, frame in frames if i in wanted]
    return picked, rate * count / total


def prompts(samples: Sequence[Sample], four_stage: bool, fps: float, max_frames: int) -> list[list[dict]]:
    """The conversation of each sample: its media and the prompt of `reasoning`."""
    return [
        messages(s, reasoning.prompt(s.problem, s.options, s.problem_type, four_stage), fps, max_frames)
        for s in samples
    ]
