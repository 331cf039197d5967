"""AMBER: descriptions of a picture, and yes/no questions whose positive class is "no"."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import ovip
from benchmarks import rules
from benchmarks.base import (
    Benchmark,
    Counts,
    Metric,
    Metrics,
    Row,
    Tools,
    Verdict,
    right_or_wrong,
    yes_or_no,
)
from benchmarks.files import Source, read_table
from engine import DataError, reason

DIMENSIONS = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
ATTRIBUTE = ("state", "number", "action")
GROUPS = {  # the numbers that AMBER prints -> the dimensions they are over
    "discriminative": (*ATTRIBUTE, "existence", "relation"),
    "existence": ("existence",),
    "attribute": ATTRIBUTE,
    **{name: (name,) for name in (*ATTRIBUTE, "relation")},
}
EPSILON = 0.001  # start of every denominator in AMBER's metrics.txt


# --- reading and asking ---------------------------------------------------------------------------


@cache
def words(folder: Path) -> rules.AmberWords:
    """relation.json and safe_words.txt of AMBER's data/ folder. Raises DataError."""
    try:
        relation = json.loads((folder / "relation.json").read_text(encoding="utf-8"))
        safe = (folder / "safe_words.txt").read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"amber: cannot read its word lists in {folder}: {error}") from error
    return rules.AmberWords(relation, frozenset(safe))


@cache
def _annotations(folder: Path) -> list[dict] | str:
    """annotations.json, or its error: read once, not for each of 15,220 rows."""
    try:
        return read_table(folder / "annotations.json")
    except DataError as error:
        return str(error)


def read(raw: dict, number: int, source: Source) -> Iterator[Row]:
    folders = [source.file.parent, source.file.parent.parent]
    folder = next((f for f in folders if (f / "annotations.json").is_file()), None)
    if folder is None:
        raise DataError(f"annotations.json: missing in {folders[0]} and above it")
    if isinstance(known := _annotations(folder), str):
        raise DataError(known)
    truth = known[raw["id"] - 1] if 0 < raw["id"] <= len(known) else {}
    if truth.get("id") != raw["id"]:
        raise DataError(
            f"id: entry {raw['id']} of annotations.json does not have this id. Give the "
            "annotations.json of these queries"
        )
    medium = source.files.find(raw["image"])
    if truth["type"] == "generative":
        kind = {
            "answer": tuple(truth["truth"]),
            "kind": "description",
            "subsets": ("generative",),
            "more": {"hallu": tuple(truth["hallu"]), "words": words(folder)},
        }
    else:
        kind = {
            "answer": yes_or_no(truth["truth"]),
            "kind": "yes/no",
            "subsets": (DIMENSIONS.get(truth["type"], "relation"),),
            "options": {"A": "Yes", "B": "No"},
        }
    yield Row(id=str(raw["id"]), question=raw["query"], media=medium, cluster=raw["image"], **kind)


def prompts(row: Row) -> dict[str, str]:
    end = "" if row.kind == "description" else "\nPlease answer yes or no."
    return {"official": row.question, "vlmevalkit": row.question + end}


# --- the official verdict -------------------------------------------------------------------------


def verdict(row: Row, text: str, tools: Tools) -> tuple[str, Any]:
    """A description is right if it names no hallucinated object; undecided without the tools."""
    if row.kind == "yes/no":
        said = rules.amber_yes_no(text)
        return right_or_wrong(said == row.answer.capitalize()), said
    nouns, similar = tools
    if nouns is None or similar is None:
        return "undecided", None
    hallu = row.more["hallu"]
    known, flags, named, invented = rules.amber_description(
        nouns(text), row.answer, hallu, row.more["words"], similar
    )
    return right_or_wrong(not any(flags)), {
        "nouns": known,
        "hallucinated": [noun for noun, flag in zip(known, flags) if flag],
        "covered": [row.answer[i] for i in sorted(named)],
        "as people do": [hallu[i] for i in sorted(invented)],  # expected hallucinations: Cog
    }


def problem(row: Row, text: str, given: Verdict) -> str:
    is_unread = row.kind == "yes/no" and given.answer is None
    return "neither yes nor no, counted as wrong" if is_unread else ""


def amber_tools() -> tuple[Callable[[str], list[str]], Callable[[str, str], float]]:
    """(nouns, similar) of AMBER's script: nltk's tagger and lemmas, spaCy's en_core_web_lg.

    Raises DataError with what to install. The data of nltk and the vectors of spaCy are not on
    PyPI.
    """
    try:
        import nltk
        import spacy

        lemma = nltk.stem.WordNetLemmatizer().lemmatize

        def nouns(text: str) -> list[str]:
            tagged = nltk.pos_tag(nltk.word_tokenize(text))
            return [lemma(word) for word, tag in tagged if tag.startswith("NN")]

        nouns("a dog")  # fails here if its data are missing
        vector = cache(spacy.load("en_core_web_lg"))
    except (ImportError, LookupError, OSError) as error:
        raise DataError(
            f"amber: generative scoring needs nltk and spaCy with their data ({reason(error)}): "
            "pip install nltk spacy; python -m nltk.downloader punkt punkt_tab "
            "averaged_perceptron_tagger averaged_perceptron_tagger_eng wordnet; python -m spacy "
            "download en_core_web_lg"
        ) from error
    return nouns, lambda a, b: vector(a).similarity(vector(b))


# --- counters and measures ------------------------------------------------------------------------


def count(
    protocol: str, rows: Sequence[Row], verdicts: Mapping[str, Verdict], problems: dict
) -> Iterator[tuple[str, Counts]]:
    for row in rows:
        counts = _description if row.kind == "description" else _answer
        yield row.cluster, counts(row, verdicts[row.id])


def _description(row: Row, given: Verdict) -> Counts:
    """A missing description covers nothing, and is not free of hallucination."""
    if given.verdict == "undecided":
        return {("generative", "", "undecided"): 1}
    keys = {
        "flags": "hallucinated",
        "nouns": "nouns",
        "named": "covered",
        "invented": "as people do",
    }
    found = given.answer or dict.fromkeys(keys.values(), ())
    counts = {part: len(found[key]) for part, key in keys.items()} | {
        "truth": len(row.answer),
        "hallu": len(row.more["hallu"]),
        "clean": int(given.verdict == "right"),
        "n": 1,
    }
    return {("generative", "", part): count for part, count in counts.items()}


def _answer(row: Row, given: Verdict) -> Counts:
    is_no, says_no = row.answer == "no", given.answer == "No"
    counts = {
        "n": 1,
        "right": given.verdict == "right",
        "no": is_no,
        "said no": says_no,
        "hit": is_no and says_no,
    }
    return {(row.subsets[0], "", part): int(count) for part, count in counts.items()}


def measures(protocol: str, total: Counter) -> Metrics:
    """AMBER's numbers as it prints them, but of 1: rounded to 0.1 %, denominators from 0.001."""
    found = {}
    for name, parts in GROUPS.items():
        if measured := _discriminative(name, parts, total):
            found[name] = measured
    return found | _generative(total, found.get("discriminative", {}).get("f1"))


def _discriminative(name: str, parts: Sequence[str], total: Counter) -> dict[str, Metric]:
    keys = ("n", "right", "no", "said no", "hit")
    n, right, no, said, hit = (sum(total[part, "", key] for part in parts) for key in keys)
    if not n:
        return {}
    start = EPSILON * (len(parts) if name == "attribute" else 1)
    ratios = ((right, n), (hit, said), (hit, no))
    accuracy, precision, recall = (round(a / (b + start) * 100, 1) for a, b in ratios)
    p, r = precision / 100, recall / 100
    f1 = round(2 * p * r / (p + r + (0.001 if name == "existence" else 0.0001)) * 100, 1)
    values = {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}
    return {key: Metric(value / 100, n) for key, value in values.items()}


def _generative(total: Counter, f1: Metric | None) -> Metrics:
    """AMBER's generative measures. f1: that of the discriminative part, for the AMBER score."""
    keys = ("flags", "nouns", "named", "truth", "invented", "hallu", "clean", "n", "undecided")
    flags, nouns, named, truth, invented, hallu, clean, n, undecided = (
        total["generative", "", key] for key in keys
    )
    if not n:
        none = Metric(None, 0, undecided)
        return {"generative": {"CHAIR": none, "F1": none}} if undecided else {}
    ratios = ((flags, nouns), (named, truth), (invented, hallu))
    chair, cover, cog = (round(a / (b + EPSILON) * 100, 1) for a, b in ratios)
    hal = round(100 - clean / (n + EPSILON) * 100, 1)
    values = {"CHAIR": chair, "Cover": cover, "Hal": hal, "Cog": cog}
    values["F1"] = ovip.f1(chair, cover)
    if f1:  # defined in the AMBER paper; its script does not print it
        values["AMBER"] = (100 - chair + 100 * f1.value) / 2
    return {"generative": {key: Metric(v / 100, n, undecided) for key, v in values.items()}}


ENTRY = Benchmark(
    name="amber",
    title="AMBER",
    media="image",
    rows=15220,
    source="data/ of the authors' repository (query/, annotations.json, relation.json, "
    "safe_words.txt) and their images",
    hub=(),
    splits=(),
    files=(r"query_all\.json$", r"query_.*\.json$"),
    forms=("id image query",),
    official="generative: CHAIR, Cover, Hal, Cog; discriminative: accuracy, precision, recall, F1, "
    "positive: NO",
    paper="not in Ground What You See. OViP: F1 of 100 - CHAIR and Cover, and F1 of the "
    "discriminative part",
    paper_number=None,
    headline={"official": ("discriminative", "f1"), "paper": ("generative", "F1")},
    beware="F1 with POPE's, whose positive is yes; CHAIR counted with other word vectors than "
    "spaCy's en_core_web_lg",
    read=read,
    prompts=prompts,
    verdict=verdict,
    problem=problem,
    has_paper_rule=False,
    count=count,
    measures=measures,
)
