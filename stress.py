"""The stress test of Hallucination-as-Cue: how much of a score needs eyes.

The same rows are asked again on corrupted inputs (corruption.py). What stays right there was
guessed from the rest. For each test and kind of question:

    drop        right on intact inputs minus right on corrupted ones, over the rows that have both
    needs eyes  the drop where the question is asked alone, without any picture
    chance      the mean of 1 / number of options, 0 where there are none

The interval of a drop compares each row with itself. Rows about one picture, or of one pair, are
one cluster: with d_i the row's change and m its mean over n rows,

    var(m) = C / (C - 1) sum_c (sum_{i in c} (d_i - m))^2 / n^2          over C clusters
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from corruption import NO_MEDIA

INTACT, ALL = "intact", "all"
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
    compared (low, high: also with one cluster)."""

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
    if len(sums) < 2:
        return {"drop": mean}
    spread = sum(x * x for x in sums.values()) * len(sums) / (len(sums) - 1)
    half = 1.96 * spread**0.5 / n
    return {"drop": mean, "low": max(-1.0, mean - half), "high": min(1.0, mean + half)}


def table(name: str, found: Sequence[Line]) -> str:
    """The lines as text, in percent and points."""
    rows, before = [("kind of question", "input", "rows", "right %", "drop [95 %], points")], None
    for line in found:
        drop = "" if line.drop is None else f"{100 * line.drop:+.1f}"
        if line.low is not None:
            drop += f" [{100 * line.low:+.1f}, {100 * line.high:+.1f}]"
        label = {NO_MEDIA: "question alone"}.get(line.input, line.input)
        kind = line.kind if line.kind != before else ""
        rows.append((kind, label, str(line.n), f"{100 * line.right:.1f}", drop))
        before = line.kind
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    text = [
        "  ".join(f"{cell:{a}{w}}" for cell, a, w in zip(row, "<<>><", widths)).rstrip()
        for row in rows
    ]
    eyes = [line for line in found if line.kind == ALL and line.input == NO_MEDIA and line.drop]
    said = [
        f"needs eyes: {100 * x.drop:.1f} of {100 * (x.right + x.drop):.1f} points" for x in eyes
    ]
    return "\n  ".join([f"{name}: the stress test", *text, *said])


def as_json(found: Sequence[Line]) -> list[dict]:
    return [asdict(line) for line in found]
