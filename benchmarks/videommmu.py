"""Video-MMMU: three questions about each lecture, one for perceiving, understanding, applying."""

import json
import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks import rules
from benchmarks.base import (
    VIDEO_R1_FORM,
    Benchmark,
    PaperForm,
    Row,
    gold_text,
    lettered,
    own_letters,
    read_video_r1,
    right_or_wrong,
    shares,
)
from benchmarks.base import paper_form as plain_paper_form
from benchmarks.files import Source
from engine import DataError

TRACKS = ("Perception", "Comprehension", "Adaptation")
DOMAINS = {  # name in the tables of results: (folder, subjects)
    "Art and Design": ("Art", "Art Art_Theory Design Music"),
    "Business": ("Business", "Accounting Economics Finance Manage Marketing"),
    "Science": ("Science", "Biology Chemistry Geography Math Physics"),
    "Health and Medicine": (
        "Medicine",
        "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
        "Public_Health",
    ),
    "Humanities and Social Science": ("Humanities", "History Literature Sociology Psychology"),
    "Tech and Engineering": (
        "Engineering",
        "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power "
        "Materials Mechanical_Engineering",
    ),
}


def read(raw: dict, number: int, source: Source) -> Iterator[Row]:
    label = str(raw.get("track") or source.label).lower()
    track = next((track for track in TRACKS if track.lower() in label), "")
    if "problem" in raw:
        video, asked = Path(raw["path"]).stem, str(raw["problem_id"])
        question, options, answer = read_video_r1(raw)
        published = tuple(options.values())
        kind = "multiple choice" if raw["problem_type"] == "multiple choice" else "open"
        if len(source.table) == 900:  # three hundred of each, in this order
            track = ("Adaptation", "Comprehension", "Perception")[number // 300]
    else:
        video, question, answer = raw["id"], raw["question"], raw["answer"]
        answer = answer if isinstance(answer, list) else gold_text(answer)
        asked = f"{track}/{video}"  # the same clip has a question in every track
        listed = raw["options"]
        listed = json.loads(listed) if isinstance(listed, str) else listed  # VLMEvalKit's
        published = tuple(map(str, listed or ()))
        options = own_letters(published) or lettered(published)
        question_type = raw.get("question_type", "multiple-choice")
        kind = "multiple choice" if question_type == "multiple-choice" else "open"
    if kind == "multiple choice" and answer not in options:
        raise DataError(f"answer: {answer!r} is not the letter of an option ({', '.join(options)})")
    subject = "_".join(video.split("_")[1:-1])
    domain, folder = next(
        (
            (domain, folder)
            for domain, (folder, names) in DOMAINS.items()
            if subject in names.split()
        ),
        ("", "unknown"),
    )
    parts = [part for part in (domain, subject, raw.get("qa_type")) if part]
    subsets = [track, *(f"{track}: {part}" if track else part for part in parts)]
    yield Row(
        id=asked,
        question=question,
        answer=answer,
        kind=kind,
        media=source.files.find(f"{folder}/{video}.mp4", f"{video}.mp4"),
        options=options,
        subsets=tuple(dict.fromkeys(s for s in subsets if s)),
        cluster=video,
        more={"track": track, "published": published},
    )


def _published(row: Row) -> Sequence[str]:
    """The options as published, with or without their own letters."""
    return row.more.get("published", tuple(row.options.values()))


def prompts(row: Row) -> dict[str, str]:
    shown = lettered(_published(row))
    # one row is published with letters
    if not all(option.startswith(f"{letter}.") for letter, option in shown.items()):
        shown = {letter: f"{letter}. {option}" for letter, option in shown.items()}
    text = "\n".join([row.question, *shown.values()])
    if row.more["track"] == "Adaptation":
        kind = "multi-choice" if row.kind == "multiple choice" else "open-ended"
        text = text if row.kind == "multiple choice" else row.question
        text = (
            "You should watch and learn the video content. Then apply what you learned to answer "
            f"the following {kind} question. The image for this question is at the end of the "
            f"video.\n{text}"
        )
    else:
        text += "\nPlease ignore the Quiz question in last frame of the video."
    end = "Add `Answer: {Your final answer}` at the end of your reply."
    return {"official": text, "vlmevalkit": f"{text}\n{end}"}


def verdict(row: Row, text: str, tools) -> tuple[str, str]:
    """An empty output is dropped, as in the official script."""
    if row.kind == "multiple choice":
        letter = rules.option_videommmu(text, _published(row))
        given = right_or_wrong(letter == row.answer)
        return "dropped" if letter == rules.API_ERROR else given, letter
    parsed = rules.open_videommmu(text)
    if parsed == rules.API_ERROR:
        return "dropped", parsed
    correct = rules.open_videommmu_correct(parsed, row.answer)
    return right_or_wrong(correct), "; ".join(map(str, parsed))


def paper_form(row: Row) -> PaperForm:
    if found := plain_paper_form(row):
        return found
    gold = str(row.answer)
    # two open questions, and one without a type, are answered by a letter
    if re.fullmatch("[A-Z]", gold):
        return dict(row.options), gold, "multiple choice"
    # one gold answer is a broken list, "['24/7', '3.429', ..."
    listed = re.findall(r"'([\d.]+)'", gold)
    return {}, listed[0] if gold.startswith("[") and listed else gold, "numerical"


def paper_question(row: Row) -> str:
    """Video-R1's file lacks the mark of the picture, which is the clip's last frame."""
    marked = "<image 1>" in row.question
    return row.question.replace("<image 1>", "").strip() if marked else row.question


ENTRY = Benchmark(
    name="videommmu",
    title="Video-MMMU",
    media="video",
    rows=900,
    source="Parquet of the hub or JSON of the repository, with its zips of clips; "
    "eval_videommmu.json of Video-R1",
    hub=("lmms-lab/VideoMMMU", "lmms-eval/VideoMMMU"),
    splits=tuple((track, "test") for track in TRACKS),
    files=(
        rf"({'|'.join(TRACKS)})/test-.*\.parquet$",
        r"(?i)\w+_video\.json$",
        r"eval_videommmu\.json$",
    ),
    forms=("id question options answer", VIDEO_R1_FORM),
    official="mean of the accuracies of three tracks of 300; an empty output leaves the "
    "denominator (named: dropped)",
    paper="mean over the 900 rows of exact letters (882) and numbers (18)",
    paper_number=50.8,
    headline={"official": ("mean of tracks", "accuracy"), "paper": ("overall", "accuracy")},
    beware="runs with empty outputs: officially they do not count, in the paper's rule they are "
    "wrong",
    read=read,
    prompts=prompts,
    verdict=verdict,
    paper_form=paper_form,
    paper_question=paper_question,
    measures=partial(shares, empty=0.0),  # the script prints 0 if every output is empty
    mean=("mean of tracks", TRACKS),
)
