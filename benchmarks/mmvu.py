"""MMVU (validation): expert questions about clips, with options or open."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import answers
from benchmarks.base import (
    VIDEO_R1_FORM,
    Benchmark,
    Row,
    gold_text,
    read_video_r1,
    right_or_wrong,
)
from benchmarks.files import Source
from engine import DataError

DISCIPLINES = {
    "Science": "Biology Chemistry Modern_Physics Astronomy Geography Materials_Science "
    "Neurobiology Electromagnetism Thermodynamics Mechanics",
    "Engineering": "Civil_Engineering Electrical_Engineering Mechanical_Engineering "
    "Biomedical_Engineering Electronics_and_Communication Computer_Science",
    "Healthcare": "Clinical_Medicine Basic_Medicine Preventive_Medicine Pharmacy Dentistry",
    "Humanities_and_Social_Science": "Art Literature History Law Economics Management",
}
DISCIPLINE = {
    subject: name for name, subjects in DISCIPLINES.items() for subject in subjects.split()
}
# the form that the prompt asks for, as a sentence of its own
FINAL_LETTER = re.compile(
    r"(?:^|[.!?\n]\s*)(?:Therefore, )?[Tt]he final answer is:?\s*[*$(]{0,4}([A-E])[*$).]{0,4}\s*$"
)


def read(raw: dict, number: int, source: Source) -> Iterator[Row]:
    if "problem" in raw:
        asked, path = raw["problem_id"], raw["path"]
        question, options, answer = read_video_r1(raw)
        is_open = raw["problem_type"] != "multiple choice"
    else:
        asked, path = raw["id"], raw.get("video") or raw["video_path"]
        question, answer = raw["question"], gold_text(raw["answer"])
        is_open = raw["question_type"] != "multiple-choice"
        options = {letter: text for letter, text in raw["choices"].items() if text}
    if not is_open and answer not in options:
        raise DataError(f"answer: {answer!r} is not the letter of a choice ({', '.join(options)})")
    video = "/".join(Path(path).parts[-2:])  # Chemistry/0.mp4: other subjects have a 0.mp4 too
    subject = video.partition("/")[0]
    form = "open-ended" if is_open else "multiple-choice"
    yield Row(
        id=str(asked),
        question=question,
        answer=answer,
        kind="open" if is_open else "multiple choice",
        media=source.files.find(video),
        options=options,
        subsets=tuple(filter(None, (form, DISCIPLINE.get(subject), f"subject: {subject}"))),
        cluster=video,
    )


def prompts(row: Row) -> dict[str, str]:
    choices = "".join(f"{letter}: {text}\n" for letter, text in row.options.items())
    asked = f"\nQuestion: {row.question}\n{choices}\n"
    lmms = f"\nQuestion:{row.question}\n{choices}Visual Information: processed video\n"
    direct = "Do not generate any intermediate reasoning process. "
    begin = "step by step. Begin by explaining your reasoning process"
    conclude = "stating the final answer using the following"
    if row.kind == "open":
        return {
            "official": f"{asked}Answer the given question {begin} clearly. Conclude by {conclude} "
            "format: 'Therefore, the final answer is: 'Answer: $ANSWER' (without quotes), where "
            "$ANSWER is the final answer of the question. Think step by step\nbefore answering.",
            "direct": f"{asked}{direct}Directly output the final short answer.\n",
            "lmms": f"{lmms}{direct}Directly output the final answer.\n",
            "lmms-cot": f"{lmms}Answer the given question {begin} clearly. Conclude\nby {conclude} "
            'format: "Therefore, the final answer is: "Answer:\n$ANSWER" (without quotes), where '
            "$ANSWER is the final answer of the question. Think step by\nstep before answering.\n",
        }
    return {
        "official": f"{asked}Answer the given multiple-choice question {begin} clearly. Conclude "
        f"by {conclude} format: 'Therefore, the final answer is: $LETTER' (without quotes), where "
        "$LETTER is one of the options. Think step by\nstep before answering.",
        "direct": f"{asked}{direct}Answer directly with the option letter from the given "
        "choices.\n",
        "lmms": f"{lmms}{direct}Answer directly with the option letter from the\ngiven choices.\n",
        "lmms-cot": f"{lmms}Answer the given multiple-choice question {begin}\nclearly. Conclude "
        f'by {conclude} format: "Therefore, the final answer\nis: $LETTER" (without quotes), where '
        "$LETTER is one of the options. Think step by step before\nanswering.\n",
    }


def verdict(row: Row, text: str, tools) -> tuple[str, str | None]:
    """Officially a judge decides every question. Only an unambiguous letter is read without one."""
    if not text.strip():
        return "wrong", None
    ended = FINAL_LETTER.search(text[-200:])
    letter = ended[1] if ended else None
    if not ended and len(text) < 200:
        letter = answers.read(text, "multiple choice")
    if row.kind == "open" or letter not in row.options:
        return "undecided", None
    return right_or_wrong(letter == row.answer), letter


def judge_messages(row: Row, text: str) -> tuple[str, str]:
    """The system turn and the user turn of MMVU's own judge."""
    lenient, form = "", 'str value "A" "B" "C" "D" "E", should be a single character'
    if row.kind == "open":
        lenient = (
            "The final answer generated by the model does not need to match the ground-truth "
            "answer word-for-word. However, it should only be considered correct if it "
            "demonstrates the exact same technique or concept explicitly and unambiguously "
            "equivalent to the ground-truth answer.\n"
        )
        form = (
            "str value, the short final answer extracted from the model's response, do not "
            "hallucinate one that is not present in the response"
        )
    system = (
        "Evaluate whether the model's final answer is correct by comparing it to the ground-truth "
        "answer provided for the given question.\n\nYou should first extract the final answer from "
        "the model's response, and then compare the extracted answer with the ground-truth answer "
        f"to determine its accuracy.\n{lenient}"
        f'Output your response in the following structured format:\n{{\n    "extracted_answer": '
        f'// {form}\n    "correct": // boolean value, True if the answer is correct, False '
        "otherwise\n}\n"
    )
    options = "".join(f"{letter}: {option}\n" for letter, option in row.options.items())
    options = f"Options:\n{options}\n" if options else ""
    user = f"Question: {row.question}\n\n{options}Ground Truth Answer: {row.answer}\n\n"
    return system, f"{user}Model Response to the Question: {text}"


def judge_prompt(row: Row, text: str) -> str:
    return "\n\n".join(judge_messages(row, text))


def judge_reply(row: Row, reply: str) -> tuple[str, str | None]:
    """The judge's own field `correct`.

    The judge quotes the answer that it judges, and that answer may contain a verdict. So the text
    between the first and the last brace must be one object with each field once; else it decides
    nothing.
    """
    text = reply[reply.find("{") : reply.rfind("}") + 1]
    # True and False are Python's, as the prompt writes them
    pattern = r'(?<!\\)"correct"\s*:\s*(True|False)\b'
    text = re.sub(pattern, lambda found: found[0].lower(), text)
    try:
        fields = json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError):
        return "undecided", None
    said, got = str(fields.get("correct")).lower(), fields.get("extracted_answer")
    verdicts = {"true": "right", "false": "wrong"}
    return verdicts.get(said, "undecided"), None if got is None else str(got)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(fields := dict(pairs)) < len(pairs):
        raise ValueError("a field is given twice")
    return fields


ENTRY = Benchmark(
    name="mmvu",
    title="MMVU (validation)",
    media="video",
    rows=1000,
    source="validation.json and videos/ of the hub; eval_mmvu.json of Video-R1",
    hub=("yale-nlp/MMVU", "lmms-lab/MMVU", "lmms-eval/MMVU"),
    splits=((None, "validation"),),
    files=(r"(^|/)validation.*\.(json|parquet)$", r"eval_mmvu\.json$"),
    forms=(
        "id question answer choices question_type video",
        "id question answer choices question_type video_path",
        VIDEO_R1_FORM,
    ),
    official="accuracy by a judge over multiple-choice (625) and open questions (375)",
    paper="exact letter over the 625 multiple-choice questions only",
    paper_number=65.6,
    headline={"official": ("overall", "accuracy"), "paper": ("overall", "accuracy")},
    beware="the paper's column with the official number over all questions; it is 'MMVU (mc)' "
    "elsewhere",
    read=read,
    prompts=prompts,
    verdict=verdict,
    judge_prompt=judge_prompt,
    judge_reply=judge_reply,
)
