"""The stress test of Hallucination-as-Cue: how much of a score needs eyes.

The same rows are asked again on corrupted inputs (corruption.py). What stays right there was
guessed from the rest. For each test and kind of question:

    drop        right on intact inputs minus right on corrupted ones, over the rows that have both
    needs eyes  the drop where the question is asked alone, without any picture
    chance      of being right by a blind choice among the options that are shown; 0 without any

The interval of a drop compares each row with itself. Rows about one picture, or of one pair, are
one cluster: with d_i the row's change and m its mean over n rows,

    var(m) = C / (C - 1) sum_c (sum_{i in c} (d_i - m))^2 / n^2          over C clusters

With fewer than 20 clusters, or no spread, it is Newcombe's interval from the two shares, which is
too wide for the same questions.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import data
from comparison import newcombe
from corruption import NO_MEDIA, corrupt
from engine import DataError
from measures import rate

INTACT, ALL = "intact", "all"
FEW = 20  # clusters
Right = Mapping[str, Mapping[str, bool]]  # input -> row id -> right


@dataclass(frozen=True)
class Question:
    """A row as it is counted. chance: of being right by a blind choice."""

    id: str
    kind: str
    cluster: str
    chance: float


@dataclass(frozen=True)
class Line:
    """The rows of one kind on one input; shares of 1. drop, low, high: None where nothing is
    compared."""

    kind: str
    input: str
    n: int
    right: float
    drop: float | None = None
    low: float | None = None
    high: float | None = None


def lines(questions: Sequence[Question], right: Right) -> Iterator[Line]:
    """A line for each kind of question, all of them first, and each input."""
    kinds = defaultdict(list)
    for question in questions:
        if question.id in right[INTACT]:
            kinds[ALL].append(question)
            kinds[question.kind].append(question)
    if len(kinds) == 2:
        del kinds[next(kind for kind in kinds if kind != ALL)]
    for kind, some in kinds.items():
        for name, of in right.items():
            both = [q for q in some if q.id in of]
            if not both:
                continue
            share = sum(of[q.id] for q in both) / len(both)
            change = {} if name == INTACT else difference(both, right[INTACT], of)
            yield Line(kind, name, len(both), share, **change)
        yield Line(kind, "chance", len(some), sum(q.chance for q in some) / len(some))


def difference(
    questions: Sequence[Question], one: Mapping[str, bool], two: Mapping[str, bool]
) -> dict[str, float]:
    """one minus two over the questions: drop, and its 95 % interval (low, high) over clusters."""
    changes = [one[q.id] - two[q.id] for q in questions]
    n, mean = len(changes), sum(changes) / len(changes)
    sums: dict[str, float] = defaultdict(float)
    for question, change in zip(questions, changes, strict=True):
        sums[question.cluster] += change - mean
    spread = sum(x * x for x in sums.values())
    if len(sums) < FEW or not spread:
        low, high = newcombe(*(rate([of[q.id] for q in questions]) for of in (two, one)))
    else:
        half = 1.96 * (spread * len(sums) / (len(sums) - 1)) ** 0.5 / n
        low, high = mean - half, mean + half
    return {"drop": mean, "low": max(-1.0, low), "high": min(1.0, high)}


def table(name: str, found: Sequence[Line]) -> str:
    """The lines as text, in percent and points."""
    rows, before = [("kind of question", "input", "rows", "right %", "drop [95 %], points")], None
    for line in found:
        drop = "" if line.drop is None else points(line)
        label = {NO_MEDIA: "question alone"}.get(line.input, line.input)
        kind = line.kind if line.kind != before else ""
        rows.append((kind, label, str(line.n), f"{100 * line.right:.1f}", drop))
        before = line.kind
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    text = [
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, "<<>><", widths)).rstrip()
        for row in rows
    ]
    eyes = [line for line in found if line.kind == ALL and line.input == NO_MEDIA]
    said = [f"needs eyes: {points(x)} of {100 * (x.right + x.drop):.1f} points" for x in eyes]
    return "\n  ".join([f"{name}: the stress test", *text, *said])


def points(line: Line) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*(100 * x for x in (line.drop, line.low, line.high)))


def as_json(found: Sequence[Line]) -> list[dict]:
    return [asdict(line) for line in found]


# --- rows of one's own ----------------------------------------------------------------------------


def corrupted_tests(
    sets: dict[str, list[data.Sample]], kinds: Sequence[str], say: Callable[[str], None]
) -> dict[str, list[data.Sample]]:
    """Each test set with each kind of corruption, as NAME_KIND. What cannot be corrupted is said
    and left out. Raises DataError where a set has such a name already."""
    made = {}
    for name, rows in sets.items():
        for kind in kinds:
            if (new := f"{name}_{kind}") in sets:
                raise DataError(f"data: {new} is the name of {name} with {kind}. Rename your set")
            found, notes = corrupt(rows, kind, 0, picture=data.picture_of)
            for note in notes:
                say(f"{new}: {note}")
            made |= {new: found} if found else {}
    return made


def questions_of(samples: list[data.Sample]) -> list[Question]:
    """The rows of a set as the stress test counts them. Rows about one picture, and rows of one
    pair, are one cluster."""
    first, same = {}, {}

    def root(name: str) -> str:
        while name in same:
            name = same[name]
        return name

    for s in samples:
        keys = [("media", data.picture_of(s)), *([("pair", s.pair)] if s.pair else [])]
        for key in keys:
            a, b = root(s.id), root(first.setdefault(key, s.id))
            if a != b:
                same[a] = b
    return [Question(s.id, s.category, root(s.id), chance(*right_options(s))) for s in samples]


def right_options(sample: data.Sample) -> tuple[int, int]:
    """How many options are shown, and how many of them are right."""
    accepted = getattr(sample.answer, "accepted", (sample.answer,))
    letters = [option.partition(".")[0].strip() for option in sample.options]
    return len(letters), sum(letter in accepted for letter in letters)


def chance(shown: int, right: int) -> float:
    """Of being right by a blind choice among the options that are shown."""
    return right / shown if shown else 0.0
