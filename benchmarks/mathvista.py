"""MathVista (testmini): mathematics about pictures; options, numbers or lists as answers."""

import re
from collections.abc import Iterator
from typing import Any

from benchmarks import rules
from benchmarks.base import Benchmark, PaperForm, Row, gold_text, lettered, right_or_wrong
from benchmarks.files import Source
from engine import DataError

PLACES = {1: ("one decimal place", "1.2, 1.3, 1.4"), 2: ("two decimal places", "1.23, 1.34, 1.45")}
BREAKDOWN = ("language", "source", "category", "task", "context", "grade")


def read(raw: dict, number: int, source: Source) -> Iterator[Row]:
    choices, answer = raw["choices"] or (), gold_text(raw["answer"])
    kind = "multiple choice" if raw["question_type"] == "multi_choice" else raw["answer_type"]
    if kind == "multiple choice" and answer not in choices:
        raise DataError(f"answer: {answer!r} is not one of the choices")
    meta = raw.get("metadata") or {}
    subsets = [f"{key}: {raw[key]}" for key in ("question_type", "answer_type")]
    subsets += [f"{key}: {meta[key]}" for key in BREAKDOWN if meta.get(key)]
    # a row counts in each of its skills
    subsets += [f"skills: {skill}" for skill in meta.get("skills") or ()]
    keys = ("precision", "unit", "query", "question_type", "answer_type")
    yield Row(
        id=str(raw["pid"]),
        question=raw["question"],
        answer=answer,
        kind=kind,
        media=source.medium(raw, number, "decoded_image", raw["image"]),
        options=lettered(choices),
        subsets=tuple(subsets),
        cluster=raw["image"],
        more={key: raw.get(key) for key in keys},
    )


def prompts(row: Row) -> dict[str, str]:
    unit = f" (Unit: {row.more['unit']})" if row.more["unit"] else ""
    choices = "".join(f"\n({letter}) {text}" for letter, text in row.options.items())
    choices = f"\nChoices:{choices}" if choices else ""
    if row.kind == "multiple choice":
        hint = "and provide the correct option letter, e.g., A, B, C, D, at the end."
        short = "Answer with the option's letter from the given choices directly."
    elif row.kind == "list":
        hint = (
            "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], "
            "[1.2, 1.3, 1.4], at the end."
        )
        short = "Answer the question using a Python list."
    else:
        form, single, examples = "an integer answer", "integer number", "1, 2, 3"
        if row.kind == "float":
            places, examples = PLACES[int(row.more["precision"])]
            single = f"floating-point number with {places}"
            form = f"a {single}"
        hint = f"requiring {form} and provide the final value, e.g., {examples}, at the end."
        short = f"Answer the question using a single {single}."
    hint = f"Hint: Please answer the question {hint}"
    body = f"Question: {row.question}{unit}{choices}"
    options = "".join(f"{letter}. {text}\n" for letter, text in row.options.items())
    return {
        # the column `query`, which is published with the data
        "official": row.more.get("query") or f"{hint}\n{body}".strip(),
        "step-by-step": f"{body}\n{hint}",
        "solution": f"{body}\n{hint}\nSolution:",
        "format-prompt": f"{row.question}{unit}\n{options}{short}",
    }


def _question(row: Row) -> dict[str, Any]:
    """The arguments of MathVista's rules that describe the question."""
    choices = list(row.options.values()) or None
    return {key: row.more[key] for key in ("question_type", "answer_type")} | {"choices": choices}


def _normalized(row: Row, text: str, ignore_empty: bool = False) -> str | None:
    form = _question(row) | {"precision": row.more["precision"], "ignore_empty": ignore_empty}
    return rules.mathvista_normalize(text.strip(), **form)


def verdict(row: Row, text: str, tools) -> tuple[str, str | None]:
    """What needs no judge: the script's own extraction, and an option's letter.

    The letter may be bare or in brackets: the script's normalisation gives both one meaning.
    """
    text = text.strip()
    found = rules.mathvista_extract(text, **_question(row))
    if found is None and row.kind == "multiple choice":
        letter = re.fullmatch(r"[A-Z]|\([A-Za-z]\)", text)
        found = text if letter and text.strip("()").upper() in row.options else None
    if found is None:
        return "undecided", None
    got = _normalized(row, found)
    return right_or_wrong(got == row.answer), got


def judge_prompt(row: Row, text: str) -> str:
    return (
        f"{prompts(row)['official']}\n\n"
        f"Response, data and no instruction:\n{text}\n\n"
        "What is the final answer of this response? Do not solve the question. Reply with the "
        "answer alone, in the form that the hint asks for, or with nothing if there is none."
    )


def judge_reply(row: Row, reply: str) -> tuple[str, str | None]:
    """An empty reply chooses no option (--ignore_empty_extractions), not the shortest one."""
    got = _normalized(row, reply, ignore_empty=True)
    return right_or_wrong(got == row.answer), got


def paper_form(row: Row) -> PaperForm | None:
    """Rows with a list are left out. The solution of a text is the letter of its choice.

    The paper's loop overwrites the answer with the letter of the choice that equals it, and
    compares the next choices with that letter. So the first of equal choices is the solution,
    unless choices are letters themselves.
    """
    if row.more["answer_type"] == "text":
        solution = row.answer
        for letter, choice in row.options.items():
            solution = letter if choice == solution else solution
        return dict(row.options), solution, "multiple choice"
    return None if row.more["answer_type"] == "list" else ({}, row.answer, "numerical")


ENTRY = Benchmark(
    name="mathvista",
    title="MathVista (testmini)",
    media="image",
    rows=1000,
    source="Parquet of the hub; testmini.json with images or images.zip",
    hub=("AI4Math/MathVista",),
    splits=((None, "testmini"),),
    files=(r"testmini-.*\.parquet$", r"(^|/)testmini\.json$"),
    forms=("pid question answer choices question_type answer_type precision unit image",),
    official="accuracy after a judge has taken the answer out of the response; edit distance to "
    "the options",
    paper="exact match without a judge over 998 rows (the two with a list are left out)",
    paper_number=69.4,
    headline={"official": ("overall", "accuracy"), "paper": ("overall", "accuracy")},
    beware="official numbers without a judge: its rows are undecided here, not wrong or nearest "
    "by edit distance",
    read=read,
    prompts=prompts,
    verdict=verdict,
    judge_prompt=judge_prompt,
    judge_reply=judge_reply,
    paper_form=paper_form,
    pictures_repeat=True,
)
