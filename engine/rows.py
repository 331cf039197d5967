"""One row of a dataset -> a checked `Sample`, from the official schema or the forms that others
write.

What a row leaves open is decided, and said: options without letters get them in their order, other
families' picture marks become ours, TRL's columns stand for ours. What could mean two things is
refused. An error is one line, "field: what is wrong. What to do".
"""

import math
import re
import string
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import answers
import reasoning
from engine import DataError, counted
from engine.media import Embedded, Media, Size, medium_of

FIELDS = (
    "data_type problem_type problem options path solution problem_id process process_and_answer "
    "data_source category pair objects relevant"
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
        # Qwen2-VL's template
        (r"<\|vision_start\|><\|(image|video)_pad\|><\|vision_end\|>", r"<\1>"),
        (r"(?:Picture ?\d+: ?)?<img>[^<]*</img>", r"<image>"),  # Qwen-VL, the first
        (r"\(<(image|video)>\./</\1>\)", r"<\1>"),  # MiniCPM-V
        (r"<\|(image|video)_(\d+)\|>", r"<\1_\2>"),  # Phi-3.5-vision
        # InternLM-XComposer, DeepSeek-VL, Gemma
        (r"<(image|video)(?:here|_placeholder|_soft_token)>", r"<\1>"),
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
LISTED = (
    re.compile(rf"^[ \t]*{LABEL}[ \t]*", re.MULTILINE),  # on lines
    re.compile(rf"(?<!\S){LABEL}\s*"),  # in a row
)
# how mathematical sets write a whole solution
WRAPPED = re.compile(r"\$?\\boxed\{([^{}$]+)\}\$?|\$([-+]?[\d.,]+|[A-Z])\$")


@dataclass(frozen=True)
class Sample:
    """One checked row. Media stay on disk until `messages` is asked for them. `answer` is an
    `answers.Answers` where several are accepted. `corruption`: a kind of corruption.py, and its
    seed. `hint` stands behind the problem, and no judge reads it. `others`: (question, answer,
    problem type) of other rows about the same picture. `decoded`: its media, if they have been
    read ahead (engine/loader.py)."""

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
    corruption: tuple[str, int] | None = None
    hint: str = ""
    others: tuple[tuple[str, str, str], ...] = ()
    decoded: list[dict[str, Any]] | None = field(default=None, repr=False, compare=False)

    @property
    def length(self) -> tuple[int, int]:
        """Sorts prompts by their length, nearly: pixels first, then text."""
        pixels = sum(size.frames * size.height * size.width for size in self.sizes)
        return pixels, len(self.question)

    @property
    def question(self) -> str:
        """What the judge reads. Marks go; several among the words become "picture 1" and so on."""
        *before, last = MARK.split(reasoning.question(self.problem, self.options))
        words = "".join(before)
        if len(before) > 1 and words.strip():
            return "".join(f"{text}picture {i}" for i, text in enumerate(before, 1)) + last
        if not words.strip():
            return last.lstrip() if before else last
        return (words if last[:1].isalnum() else words.rstrip()) + last


def columns_of(row) -> dict[str, str]:
    """Ours -> theirs, for what a row has under another name of COLUMNS only."""
    row = row if isinstance(row, dict) else {}
    found = {
        ours: [name for name in theirs if not _missing(row.get(name))]
        for ours, theirs in COLUMNS.items()
    }
    return {ours: names[0] for ours, names in found.items() if names and _missing(row.get(ours))}


def _missing(value) -> bool:
    """Nothing, or what stands for it: blanks, an empty list, pandas' not-a-number."""
    if isinstance(value, float | str):
        return value != value or not str(value).strip()
    return value is None or (isinstance(value, list) and not value)


def read_row(
    row: dict,
    root: Path | None,
    table=None,
    number=0,
    called=None,
    decided=None,
    four_stage: bool = False,
):
    """One row, checked but for its media; DataError("field: what is wrong. What to do").

    called: its `columns_of`. decided: gets a few words for each thing that the row leaves open.
    four_stage: a reference response needs all four stages; else thinking and answer will do.
    """
    if not isinstance(row, dict):
        raise DataError(f"row: must be an object, got {type(row).__name__}")
    called, decided = called or {}, [] if decided is None else decided
    decided += [f"{theirs} is read as {ours}" for ours, theirs in called.items()]
    row = {
        name: value if isinstance(value, list) or not _missing(value) else None
        for name, value in row.items()
    }
    row |= {ours: row[theirs] for ours, theirs in called.items()}
    if "path" in called:
        if row.get("problem_id") is None:
            row["problem_id"] = number
            decided.append("the row's number is read as problem_id")
        row["data_type"] = row.get("data_type") or (
            "video" if called["path"].startswith("video") else "image"
        )
    for name in ("path", "data_type", "problem_type", "problem", "solution", "problem_id"):
        if _missing(row.get(name)) and not ("path" in called and name == "problem_type"):
            other = f" (or {', '.join(COLUMNS[name])})" if name in COLUMNS else ""
            raise DataError(f"{name}: missing or empty. Every row needs one{other}")
    if row["data_type"] not in ("image", "video"):
        raise DataError(f"data_type: {row['data_type']!r} is neither 'image' nor 'video'")
    if row.get("problem_type") not in (*reasoning.PROBLEM_TYPES, None):
        raise DataError(
            f"problem_type: {row['problem_type']!r} is not one of "
            f"{', '.join(reasoning.PROBLEM_TYPES)}"
        )
    for name in ("options", "objects", "relevant"):
        value = row.get(name)
        if value is not None and not (
            isinstance(value, list) and all(isinstance(v, str) for v in value)
        ):
            such = '["A. red", "B. green"]' if name == "options" else '["cat", "dog"]'
            raise DataError(f"{name}: must be a list of strings such as {such}")
    cells = row["path"] if isinstance(row["path"], list) else [row["path"]]
    if row["data_type"] == "video" and len(cells) > 1:
        raise DataError("path: a row has one clip. Give one path")
    problem, *options = _marked(
        [_question(row["problem"], decided), *(row.get("options") or ())], row, len(cells)
    )
    process = row.get("process") or row.get("process_and_answer")
    if process is not None and not isinstance(process, str):
        raise DataError(f"process: must be a string, got {type(process).__name__}")
    if process and not any(reasoning.format_reward(process, four) for four in {True, four_stage}):
        raise DataError(
            "process: lacks a stage, or holds text outside them. Give all four"
            f"{'' if four_stage else ', or <think> and <answer> alone'}, once each, in order"
        )
    golds = _golds(row["solution"])
    problem_type, names = _type(row.get("problem_type"), problem, options, golds, decided)
    if problem_type == "multiple choice":
        if not isinstance(row["solution"], str | list):
            raise DataError(
                f"solution: {row['solution']} is ambiguous: it may be an option's position or its "
                "text. Give the option's letter"
            )
        if options:
            shown, names = _lettered(options, decided)
            # the letter is what is taught, however the row writes it
            if process and shown != options:
                letter = _letter(reasoning.parse(process).answer, names, "process")
                process = re.sub(
                    r"<answer>.*</answer>", f"<answer>{letter}</answer>", process, flags=re.DOTALL
                )
            options = shown
        golds = list(dict.fromkeys(_letter(gold, names, "solution") for gold in golds))
        if len(golds) > 1:
            raise DataError(
                f"solution: holds the letters {', '.join(golds)}. Give one, or leave the row out"
            )
    for gold in golds if problem_type in ("numerical", "regression") else ():
        if answers.to_number(gold) is None:
            raise DataError(f"solution: {gold!r} is not a number")
        if not answers.NUMBER.fullmatch(gold.removesuffix(".")):
            raise DataError(
                f"solution: {gold!r} may be several numbers. Write one, such as 1,200 or 1.5"
            )
    try:
        "".join([problem, *options, *golds, process or ""]).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "problem: a text of this row holds a lone surrogate, which UTF-8 cannot encode "
            f"({error}). Replace that character"
        ) from error
    places = range(len(cells)) if isinstance(row["path"], list) else [None]
    column = called.get("path", "path")
    media = tuple(
        medium_of(cell, root, Embedded(table, number, i, column)) for i, cell in zip(places, cells)
    )
    as_tuple = {
        name: tuple(row[name]) if row.get(name) is not None else None
        for name in ("objects", "relevant")
    }
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
        parts = [
            f"<{p['type']}>" if p.get("type") in ("image", "video") else p.get("text")
            for p in value
        ]
        value = "".join(parts) if all(isinstance(part, str) for part in parts) else value
    if not isinstance(value, str):
        raise DataError(
            "problem: must be a text, or a chat with one turn, the user's; got "
            f"{type(value).__name__}"
        )
    return value


def _marked(texts: list[str], row: dict, count: int) -> list[str]:
    """Question and options; each picture or clip has its mark in them, or none has."""
    for pattern, ours in FOREIGN:
        texts = [pattern.sub(ours, text) for text in texts]
    numbers = [int(number) for text in texts for _, number in NUMBERED.findall(text)]
    if numbers != list(range(1, len(numbers) + 1)):
        raise DataError(
            f"problem: marks <image {numbers[0]}> ... are not 1, 2, ... in order, each once. Use "
            "<image>"
        )
    texts = [NUMBERED.sub(r"<\1>", text) for text in texts]
    marks = [mark for text in texts for mark in MARK.findall(text)]
    if marks and len(marks) != count:
        raise DataError(
            f"problem: {counted(len(marks), 'mark')} {marks[0]} for {count} in `path`. Give one "
            "for each, or none"
        )
    if "<video>" in marks and row["data_type"] == "image":
        raise DataError("problem: holds the mark <video>, and the row has a picture. Write <image>")
    if not MARK.sub("", texts[0]).strip():
        raise DataError("problem: holds no words. Every row needs a question")
    return texts


def _golds(solution) -> list[str]:
    """The accepted answers as text. A whole number may have been written 5 or, as pandas and JSON
    have it, 5.0."""
    golds = []
    for one in solution if isinstance(solution, list) else [solution]:
        if isinstance(one, str):
            golds.append(_bare(answers.solution_of(one)))
            if re.fullmatch(r"""\[\s*(['"]).*\1\s*\]""", golds[-1], re.DOTALL):
                raise DataError(
                    f"solution: {golds[-1]!r} is a list written as text. Give the list, or one "
                    "answer"
                )
        elif isinstance(one, float) and math.isfinite(one):
            golds += [str(int(one)), f"{int(one)}.0"] if one.is_integer() else [str(one)]
        elif isinstance(one, int) and not isinstance(one, bool):
            golds.append(str(one))
        else:
            raise DataError(
                f"solution: must be a text, a number or a list of accepted ones, got {one!r}"
            )
    if not all(golds):
        raise DataError("solution: no answer inside <answer></answer>")
    if any(re.search("</?answer>", gold) for gold in golds):
        raise DataError(
            "solution: <answer> is not closed, or is there twice. Give <answer>...</answer> once"
        )
    return list(dict.fromkeys(golds))


def _bare(gold: str) -> str:
    """ "\\boxed{12.5}" -> "12.5"; "$4$" -> "4" """
    found = WRAPPED.fullmatch(gold)
    return (found[1] or found[2]).strip() if found else gold


def _type(given: str | None, problem: str, options: list[str], golds: list[str], decided: list):
    """The problem type, decided where none is given, and the names of options that the question
    itself lists."""
    names = {} if options or given not in ("multiple choice", None) else _listed(problem, golds)
    if given:
        return given, names
    if options or names:
        kind = "multiple choice"
        why = "by its options" if options else "by lettered options in the question"
    elif all(letters := [re.fullmatch(r"\(?([A-Z])\)?[.:]?", gold) for gold in golds]):
        kind = "multiple choice"
        why = "by a letter as solution"
        names = {letter[1]: [] for letter in letters}
    elif all(answers.NUMBER.fullmatch(gold) for gold in golds):
        kind, why = "numerical", "by a number as solution"
    else:
        kind, why = "free-form", "without options, letter or number"
    decided.append(f"{kind} {why}")
    return kind, names


def _lettered(options: list[str], decided: list) -> tuple[list[str], dict[str, list[str]]]:
    """The options as shown ("A. red"), and for each letter the names that a solution may use.

    The names are the option as written, as shown, and its number if all are numbered 1, 2, ... in
    order.
    """
    if len(options) > 26:
        raise DataError(f"options: {len(options)} of them, and only 26 letters")
    letters = string.ascii_uppercase[: len(options)]
    options = [option.strip() for option in options]
    options = [
        option[2:-2] if re.fullmatch(r"\*\*[^*]+\*\*", option) else option for option in options
    ]
    found = [OPTION.fullmatch(option) for option in options]
    told = [unicodedata.normalize("NFKC", match[1]).upper() if match else "" for match in found]
    own = [a == b for a, b in zip(told, letters)]
    if all(options) and (all(told) or any(own)) and not all(own):
        begin = ", ".join(letter or "no letter" for letter in told)
        raise DataError(
            f"options: begin with {begin}. Give all of them letters, A, B, ... in order, or none"
        )
    texts = [match[2].strip() for match in found] if all(own) else options
    bare = [
        match[1].upper() for option in options if (match := re.match(r"\W*([A-Za-z])\W", option))
    ]
    if not any(own) and bare != list(letters) and sorted(bare) == list(letters) and len(bare) > 1:
        raise DataError(
            f"options: seem to begin with {', '.join(bare)}. Give them letters in order, or none"
        )
    if not all(texts):
        raise DataError(
            f"options: one is empty ({', '.join(map(repr, options))}). Leave it out, or fill it"
        )
    if not all(own):
        decided.append("options get letters in their order")
    numbered = [re.match(rf"\(?{i}[.)]\s", option) for i, option in enumerate(options, 1)]
    names = {a: [option, f"{a}. {text}"] for a, option, text in zip(letters, options, texts)}
    if all(numbered):
        names = {a: [*of, str(i)] for i, (a, of) in enumerate(names.items(), 1)}
    return [f"{a}. {text}" for a, text in zip(letters, texts)], names


def _listed(question: str, golds: list[str]) -> dict[str, list[str]]:
    """For each letter, the names of the options that the question itself lists; {} if none.

    They stand on separate lines, or in a running line, which counts only if every accepted solution
    names one of them.
    """
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
        if pattern is LISTED[0] or all(
            any(_names(gold, letter, of) for letter, of in names.items()) for gold in golds
        ):
            return names
    return {}


def _names(answer: str, letter: str, others: list[str]) -> bool:
    """Does an answer of a row stand for this option: its letter, in any usual form, or one of its
    other names?"""
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
            f"{field}: {answer!r} is not the letter of an option ({known}). Give a letter, or "
            "another problem_type"
        )
    return found[0]
