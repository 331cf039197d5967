"""Rows on disk -> checked samples; pictures and clips -> chat messages.

The schema is the official one, one JSON object per row:

    data_type     "image" or "video"
    problem_type  one of `reasoning.PROBLEM_TYPES`
    problem       the question, or a chat with one turn, the user's. Pictures are placed at its
                  marks <image> (a clip at <video>), or before the text where it has none
    options       ["A. red", "B. green"], empty where there are none. "A) red", "(a) red" and
                  "a: red" are shown as "A. red"; options without letters get them in their order
    path          the picture or clip, relative to the file ("./images/0.png"); a list of them for
                  several images. In place of a path: the bytes, a PIL image, or what `datasets`
                  makes of them, {"bytes": ..., "path": ...}
    solution      "<answer>A</answer>" (a bare "A" is taken too), a number, or a list of accepted
                  answers; among options without letters also the words of one
    problem_id    unique
    process       optional: a reference response with all its stages, for the cold start

and, optional, for evaluation: `category` (groups the accuracy), `pair` (two rows of one pair share
it), `objects` (in the picture, for caption hallucination) and `relevant` (those that the question
is about).

TRL's columns will do: `image`, `images` or `video` for `path`, `prompt` for `problem`, `answer` for
`solution`. What such a row leaves out is decided, and said: its number is its id; multiple choice
is told by options, by lettered options in the question or by a capital letter as solution,
numerical by a number; else it is free-form (engine/rows.py).

A dataset is a folder of such files, its splits named by file: `cold_start`, `train`, `validation`
(to choose among RL's checkpoints) and any `test*`; or one file; or a folder written by `datasets`
(save_to_disk); or a hub id. Every row is checked, and every picture and clip opened, before a model
is loaded; the same check alone:

    python data.py check SOURCE               # counts, sizes, and one line for each bad row
    python data.py check SOURCE --model M     # prompt lengths in M's tokens as well
"""

import argparse
import hashlib
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qwen_vl_utils.vision_process import smart_resize

import reasoning
from engine import ConfigError, DataError, counted, reason
from engine.files import read_rows, undecoded, whole
from engine.loader import media_parts
from engine.media import trace
from engine.media_check import Checked
from engine.rows import FIELDS, MARK, Sample, columns_of, read_row
from engine.video import frames_taken

LIMITS = SimpleNamespace(  # of `check`; the defaults of config.Config
    four_stage=True,
    min_pixels=3136,
    max_pixels=401_408,
    fps=2.0,
    max_frames=16,
    max_prompt_tokens=0,
    max_new_tokens=40,
)
SUFFIXES = (".json", ".jsonl", ".parquet")


def visual_tokens(sample: Sample, limits) -> int:
    """How many tokens its pictures or clip take in Qwen2.5-VL: one for 28 x 28 pixels, of two
    frames in a clip."""
    total = 0
    for size in sample.sizes:
        bounds = {"min_pixels": limits.min_pixels, "max_pixels": limits.max_pixels}
        height, width = smart_resize(size.height, size.width, factor=28, **bounds)
        frames = 1
        if sample.data_type == "video":
            frames = frames_taken(size.frames, size.rate, limits.fps, limits.max_frames)
        total += math.ceil(frames / 2) * (height // 28) * (width // 28)
    return total


def most_visual_tokens(sets: dict[str, list[Sample]], limits) -> int:
    return max(visual_tokens(s, limits) for rows in sets.values() for s in rows)


def load(
    source: str | Path, on_bad_row: str = "error", say=print, staged: Container[str] = ()
) -> dict[str, list[Sample]]:
    """All splits of a dataset folder or hub id, or {"train": rows} of one file.

    staged: the splits whose reference responses need all four stages; without a `cold_start` its
    rows are those of `train`. Raises DataError, with a line for each of the first ten bad rows,
    unless `on_bad_row` is "skip": then `say` gets a line for each.
    """
    samples, problems = _read(source, say, staged)
    refuse(problems, on_bad_row, say)
    for line in _empty(samples):
        raise DataError(f"data: {source}, {line}")
    return samples


def _empty(samples: dict[str, list[Sample]]) -> list[str]:
    what = "has no usable row. Give it rows, or take its file away"
    return [f"{name} {what}" for name, rows in samples.items() if not rows]


def refuse(problems: list[str], on_bad_row: str, say) -> None:
    """Raise DataError with the first ten bad rows, or with "skip" print a line for each.

    All readers of rows use this.
    """
    if problems and on_bad_row == "error":
        more = f"\n... and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise DataError(
            "\n".join(problems[:10])
            + more
            + "\nCorrect these rows, or leave them out with --on_bad_row skip"
        )
    for line in problems:
        say(f"skipped: {line}")


def _read(
    source: str | Path, say, staged: Container[str]
) -> tuple[dict[str, list[Sample]], list[str]]:
    """The splits, and a line for each bad row."""
    tables, root = _tables(source, say)
    if "train" not in tables and not any(name.startswith("test") for name in tables):
        names = ", ".join(tables) or "no split"
        raise DataError(
            f"data: {source} holds {names}; expected train.json (and cold_start.json, test*.json)"
        )
    samples, problems = {}, []
    with Checked(source) as checked:
        for name, (label, rows) in tables.items():
            taught = name in staged or (
                name == "train" and "cold_start" in staged and "cold_start" not in tables
            )
            samples[name], bad = _split(label, rows, root, checked, say, taught)
            problems += bad
    return samples, problems


def _split(
    label: str, rows, root: Path | None, checked: Checked, say, four_stage: bool
) -> tuple[list[Sample], list[str]]:
    """`_read` of one split."""
    found, problems, calls, seen, unknown, decided = [], {}, [], Counter(), Counter(), Counter()

    def is_bad(number: int, row, error: DataError) -> None:
        named = f" ({row['problem_id']})" if isinstance(row, dict) and "problem_id" in row else ""
        field, _, what = str(error).partition(":")
        said = f"{label} row {number}{named}, {calls[number].get(field, field)}:{what}"
        problems[number] = said.encode(errors="backslashreplace").decode()

    for number, row in enumerate(rows):
        called, choices = columns_of(row), []
        calls.append(called)
        try:
            sample = read_row(row, root, rows, number, called, choices, four_stage)
            found.append((number, sample))
            unknown.update(set(row) - set(FIELDS) - set(called.values()))
            decided.update(choices)
        except DataError as error:
            is_bad(number, row, error)
    samples = []
    for (number, sample), sizes in zip(
        found, checked.each([(s.media, s.data_type) for _, s in found]), strict=True
    ):
        seen[sample.id] += not isinstance(sizes, DataError)
        if isinstance(sizes, DataError):
            is_bad(number, rows[number], sizes)
        elif seen[sample.id] > 1:
            is_bad(
                number,
                rows[number],
                DataError(f"problem_id: {sample.id!r} is already taken. Make ids unique"),
            )
        else:
            samples.append(replace(sample, sizes=sizes))
    if unknown:
        named = ", ".join(f"{field} ({counted(n, 'row')})" for field, n in sorted(unknown.items()))
        say(f"data: {label}: fields ignored: {named}. Is one misspelt? Known: {', '.join(FIELDS)}")
    if decided:
        say(
            f"data: {label}: assumed where rows leave it open: "
            + "; ".join(f"{what} ({counted(n, 'row')})" for what, n in sorted(decided.items()))
        )
    return samples, [problems[number] for number in sorted(problems)]


def _tables(source: str | Path, say) -> tuple[dict[str, tuple[str, Any]], Path | None]:
    """Split name -> (what to call it, its rows), and the folder that paths are relative to (None:
    they may be none)."""
    path = Path(source)
    if not path.exists():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
            raise DataError(
                f"data: {source} does not exist. Give a folder with train.json, or one "
                "JSON/JSONL/Parquet file, or a hub id"
            )
        import datasets

        try:
            found = datasets.load_dataset(str(source))
        except Exception as error:  # of many kinds, from the hub, the network and the builder
            raise DataError(
                f"data: {source} is not on this disk and could not be loaded from the hub ({error})"
            ) from error
        return {name: (f"{source} {name}", undecoded(table)) for name, table in found.items()}, None
    if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        import datasets

        try:
            found = datasets.load_from_disk(str(path))
        except Exception as error:  # of many kinds
            raise DataError(f"data: cannot read {path}: {error}") from error
        found = found if isinstance(found, dict) else {"train": found}
        return {
            name: (f"{path.name} {name}", undecoded(table)) for name, table in found.items()
        }, path
    if not path.is_dir():
        if path.suffix not in SUFFIXES:
            raise DataError(f"data: {path.name} is none of {', '.join(SUFFIXES)}. Convert it")
        return {"train": (path.name, read_rows(path))}, path.parent
    files = sorted(f for f in path.iterdir() if f.suffix in SUFFIXES)
    if others := [
        f.name
        for f in files
        if not f.stem.startswith(("train", "cold_start", "validation", "test"))
    ]:
        say(f"data: ignored, because no split has this name: {', '.join(others)}")
    files = [f for f in files if f.name not in others]
    splits = defaultdict(list)
    for f in files:
        # a table of the hub may lie in several files
        splits[re.sub(r"-\d+-of-\d+$", "", f.stem)].append(f)
    if len({f.stem for f in files}) < len(files):
        raise DataError(
            f"data: {path} holds a split twice: {', '.join(f.name for f in files)}. Keep one of "
            "each name"
        )
    if not files:
        raise DataError(
            f"data: {path} holds {', '.join(others) or 'no data file'}; expected train.json (and "
            "cold_start.json, test*.json)"
        )
    return {k: (parts[0].name, read_rows(*whole(parts))) for k, parts in splits.items()}, path


def fingerprint(sets: dict[str, list[Sample]]) -> str:
    """A fingerprint of the data, a few words for each set.

    It is equal if all rows, fields and media are equal and in the same order. A file counts by
    path, size and modification time, other media by content.
    """
    lines, not_data = [], ("media", "sizes", "corruption", "hint", "others", "decoded")
    for name, rows in sorted(sets.items()):
        digest = hashlib.sha256()
        for s in rows:
            fields = [value for field, value in vars(s).items() if field not in not_data]
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
    """The user turn: the pictures or the clip at their marks in `text`, or before it, as chat
    content that `vlm.VLM.encode` takes."""
    media = sample.decoded
    if media is None:
        media = media_parts(sample, fps, max_frames)
    return [{"role": "user", "content": _placed(media, text)}]


def prompts(
    samples: Sequence[Sample], four_stage: bool, fps: float, max_frames: int
) -> list[list[dict]]:
    """The conversation of each sample: its media and the prompt of `reasoning`."""
    return [messages(s, prompt_of(s, four_stage), fps, max_frames) for s in samples]


def prompt_of(sample: Sample, four_stage: bool) -> str:
    """The text of the user turn."""
    problem = sample.problem + sample.hint
    return reasoning.prompt(problem, sample.options, sample.problem_type, four_stage)


def picture_of(sample: Sample) -> tuple:
    """Equal for rows about the same picture or clip."""
    return tuple(trace(medium) for medium in sample.media)


def check(source: str, model: str = "", limits: SimpleNamespace = LIMITS) -> bool:
    """Print what a dataset holds and a line for each bad row; True where no row is bad."""
    splits, problems = _read(source, print, ["cold_start"] if limits.four_stage else [])
    count_text = None
    if model:
        longest, tokenizer = _context(model)
        count_text = prompt_text_tokens(tokenizer)
        splits, unfit = fitting(splits, longest, tokenizer, limits)
        problems = [*problems, *unfit]
    for name, rows in splits.items():
        taught = sum(bool(s.process) for s in rows)
        print(f"{name}: {counted(len(rows), 'row')}, {taught} with a reference response")
        for (data_type, problem_type), n in sorted(
            Counter((s.data_type, s.problem_type) for s in rows).items()
        ):
            print(f"  {n:>7} {data_type}, {problem_type}")
        sizes = [size for s in rows for size in s.sizes]
        tokens = [visual_tokens(s, limits) for s in rows]
        numbers = {
            "width": [size.width for size in sizes],
            "height": [size.height for size in sizes],
            "media per row": [len(s.sizes) for s in rows],
            "seconds of a clip": [
                z.frames / z.rate for s in rows if s.data_type == "video" for z in s.sizes
            ],
            f"visual tokens (at most {limits.max_pixels} pixels a picture)": tokens,
        }
        if count_text:
            numbers["prompt tokens"] = [count_text(s) + n for s, n in zip(rows, tokens)]
        for what, values in numbers.items():
            if values:
                values = sorted(values)
                print(
                    f"  {what}: {values[0]:g} to {values[-1]:g}, median "
                    f"{values[len(values) // 2]:g}"
                )
    empty = _empty(splits)
    for line in [*problems, *empty]:
        print(f"bad: {line}")
    if problems or not empty:
        print(counted(len(problems), "bad row") if problems else "no bad row")
    return not problems and not empty


def prompt_text_tokens(tokenizer, four_stage: bool = True):
    """Sample -> tokens of its prompt without pictures: the words, and the chat template around
    them."""
    turn = [{"role": "user", "content": ""}]
    around = len(tokenizer.apply_chat_template(turn, add_generation_prompt=True)["input_ids"])

    def count(sample: Sample) -> int:
        parts = _placed([{"type": "image"}] * len(sample.media), prompt_of(sample, four_stage))
        tokens = sum(len(tokenizer(part["text"]).input_ids) for part in parts if "text" in part)
        return around + tokens + 2 * len(sample.media)  # vision_start, vision_end

    return count


def _context(model: str):
    from engine.pretrained import context  # here only: reading rows needs no model library

    try:
        return context(model)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: cannot load {model}: {reason(error)}") from error


def fitting(
    sets: dict[str, list[Sample]], longest: int, tokenizer, limits
) -> tuple[dict[str, list[Sample]], list[str]]:
    """The rows that a model can be asked, and a line for each other row.

    A multimodal prompt is never truncated (D-24): one of more tokens than the model takes is a bad
    row, and so is one with a control token in its text. limits: four_stage, min_pixels, max_pixels,
    fps, max_frames, max_new_tokens and max_prompt_tokens, as in `config.Config`. longest,
    tokenizer: the model's context.
    """
    longest = limits.max_prompt_tokens or longest - limits.max_new_tokens
    text_tokens, problems, fit = prompt_text_tokens(tokenizer, limits.four_stage), [], {}
    commands = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    commands |= set(tokenizer.all_special_tokens)
    commands -= set(reasoning.TAGS)  # stage tags may be special, and belong there
    for name, rows in sets.items():
        fit[name] = []
        for s in rows:
            tokens = text_tokens(s) + visual_tokens(s, limits)
            words = " ".join([s.problem, *s.options, s.answer, s.process or ""])
            control = [token for token in commands if token in words]
            if control:
                problems.append(
                    f"{name} ({s.id}), text: contains {control[0]}, a control token of the model. "
                    "Remove it"
                )
            elif tokens > longest:
                problems.append(
                    f"{name} ({s.id}), prompt: it has {tokens} tokens, and the limit is "
                    f"{longest}. Lower --max_pixels, or shorten the text"
                )
            else:
                fit[name].append(s)
    return fit, problems


def fit_to_model(
    sets: dict[str, list[Sample]], model: str, limits, on_bad_row: str, say=print
) -> dict[str, list[Sample]]:
    """The rows of `fitting`. The others are bad rows; a set of bad rows alone is an error also with
    "skip"."""
    return fit(sets, *_context(model), limits, on_bad_row, say)


def fit(
    sets: dict[str, list[Sample]], longest: int, tokenizer, limits, on_bad_row: str, say=print
) -> dict[str, list[Sample]]:
    """`fit_to_model`, where the model's context is known."""
    left, problems = fitting(sets, longest, tokenizer, limits)
    refuse(problems, on_bad_row if all(left.values()) else "error", say)
    return left


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Check a dataset before anything is trained on it."
    )
    parser.add_argument("command", choices=["check"])
    parser.add_argument("source", help="dataset folder, file or hub id")
    parser.add_argument(
        "--model", default="", help="count prompt tokens, and find what this model cannot be asked"
    )
    parser.add_argument(
        "--two_stage", action="store_true", help="for a run with --four_stage false"
    )
    args = parser.parse_args()
    asked = SimpleNamespace(**vars(LIMITS) | {"four_stage": not args.two_stage})
    try:
        sys.exit(0 if check(args.source, args.model, asked) else 1)
    except (DataError, ConfigError) as error:
        sys.exit(f"error: {error}")
