"""POPE: is an object in the picture? Yes or no, in three subsets of 3,000 rows."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from benchmarks import rules
from benchmarks.base import (
    Benchmark,
    Counts,
    Metric,
    Metrics,
    Row,
    Verdict,
    count_rows,
    right_or_wrong,
    shares,
    yes_or_no,
)
from benchmarks.files import Source
from measures import yes_no_measures

SUBSETS = ("random", "popular", "adversarial")
CELLS = {
    ("right", "yes"): "tp",
    ("right", "no"): "tn",
    ("wrong", "yes"): "fn",
    ("wrong", "no"): "fp",
}


def read(raw: dict, number: int, source: Source) -> Iterator[Row]:
    original = "text" in raw  # the authors' JSON lines
    category = raw.get("category") or next((s for s in SUBSETS if s in source.label), "all")
    name = raw.get("image_source") or (raw["image"] if original else None)
    medium = source.medium(raw, number, "image", *([raw["image"]] if original else []))
    keys = ("question_id", "index", "id")
    asked = next(raw[key] for key in keys if raw.get(key) is not None)
    yield Row(
        id=f"{category}/{asked}",  # question_id is unique in its category
        question=raw["text" if original else "question"],
        answer=yes_or_no(raw["label" if original else "answer"]),
        kind="yes/no",
        media=medium,
        options={"A": "yes", "B": "no"},
        # VLMEvalKit's "random,popular" counts in both
        subsets=tuple(part.strip() for part in category.split(",")),
        cluster=str(name or hashlib.sha1(medium).hexdigest()),  # a TSV names no picture
    )


def prompts(row: Row) -> dict[str, str]:
    return {
        "official": row.question,
        "lmms": f"{row.question.strip()}\nAnswer the question using a single word or phrase.",
    }


def verdict(row: Row, text: str, tools) -> tuple[str, str]:
    said = rules.pope(text)
    return right_or_wrong(said == row.answer), said


def problem(row: Row, text: str, given: Verdict) -> str:
    if given.answer == "yes" and text.strip() and not re.search(r"(?i)\byes\b", text):
        return "neither yes nor a no that POPE's rule knows (No, no, not): taken for a yes"
    return ""


def count(
    protocol: str, rows: Sequence[Row], verdicts: Mapping[str, Verdict], problems: dict
) -> Iterator[tuple[str, Counts]]:
    """Accuracy, and the cells of the confusion matrix."""
    for row in rows:
        yield from count_rows(protocol, [row], verdicts, problems)
        cell = CELLS[verdicts[row.id].verdict, row.answer]
        yield row.cluster, {(subset, "", cell): 1 for subset in ("overall", *row.subsets)}


def measures(protocol: str, total: Counter) -> Metrics:
    """Accuracy, and officially also precision, recall, F1 (positive: yes) and the share of yes."""
    found = shares(protocol, total)
    for subset in found if protocol == "official" else ():
        tp, fp, fn, tn = (total[subset, "", cell] for cell in ("tp", "fp", "fn", "tn"))
        values = yes_no_measures(tp, fp, fn, tn)
        found[subset] |= {key: Metric(value, tp + fp + fn + tn) for key, value in values.items()}
    return found


ENTRY = Benchmark(
    name="pope",
    title="POPE",
    media="image",
    rows=9000,
    source="Parquet of the hub; JSON lines of the authors' repository with COCO val2014; TSV of "
    "VLMEvalKit",
    hub=("lmms-lab/POPE", "lmms-lab-encoder/POPE"),
    splits=((None, "test"),),
    files=(
        r"(^|/)test-.*\.parquet$",
        r"(random|popular|adversarial).*\.parquet$",
        r"coco_pope_\w+\.jsonl?$",
        r"_pope_\w+\.jsonl?$",
        r"POPE.*\.tsv$",
    ),
    forms=("question answer category image", "question_id image text label"),
    official="F1, precision, recall (positive: yes), accuracy and share of yes, by subset and "
    "their mean; no match is a yes",
    paper="accuracy over the pooled 9,000 rows, asked as A. yes / B. no",
    paper_number=88.7,
    headline={"official": ("overall", "f1"), "paper": ("overall", "accuracy")},
    beware="accuracy with F1, which others print as 'POPE': on the published rows they differ by "
    "about a point",
    read=read,
    prompts=prompts,
    verdict=verdict,
    problem=problem,
    count=count,
    measures=measures,
    mean=("mean of subsets", SUBSETS),
)
