"""What every benchmark is made of: a row, a verdict, a metric, and its entry in the table."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import answers
from engine import DataError
from engine.media import Media, Size

if TYPE_CHECKING:
    from benchmarks.files import Source


@dataclass(frozen=True)
class Row:
    """One question.

    answer: the gold as published. group: rows that count as one (rotations, a pair). cluster: rows
    about the same picture or clip, which are not independent. more: what only one benchmark has.
    """

    id: str
    question: str
    answer: Any
    kind: str  # yes/no, multiple choice, open, integer, float, list, description
    media: Media | None = None
    options: Mapping[str, str] = field(default_factory=dict)  # letter -> text, no missing ones
    subsets: tuple[str, ...] = ()
    group: str = ""
    cluster: str = ""
    sizes: tuple[Size, ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """right, wrong, undecided (only a judge could say) or dropped (not counted by this protocol).

    answer: as read from the output.
    """

    id: str
    verdict: str
    answer: Any = None


@dataclass(frozen=True)
class Metric:
    """A measure as a share of 1; None if it, or a member of a mean, divides by zero.

    n: the rows, pairs or questions it is counted over. undecided: of n, not counted as right, so
    `value` is the least it can be and value + undecided / n the most. dropped: left out of n.
    right: the numerator, if the measure is a plain share of n (for Wilson's interval).
    """

    value: float | None
    n: int
    undecided: int = 0
    dropped: int = 0
    right: int | None = None


Metrics = dict[str, dict[str, Metric]]  # subset -> measure -> number
Counts = Mapping[tuple[str, str, str], float]  # (subset, measure, part) -> how often
PaperForm = tuple[dict[str, str], str, str]  # options, solution, problem type
Tools = tuple[Callable | None, Callable | None]  # (nouns, similar) of AMBER


# --- counting -------------------------------------------------------------------------------------


def right_or_wrong(is_right: bool) -> str:
    return "right" if is_right else "wrong"


def share(verdict: str, measure: str, *subsets: str) -> dict[tuple[str, str, str], int]:
    """One verdict as counts of a measure, in each subset."""
    parts = ("dropped",) if verdict == "dropped" else ("n", verdict)
    return {(subset, measure, part): 1 for subset in subsets for part in parts}


def count_rows(
    protocol: str, rows: Sequence[Row], verdicts: Mapping[str, Verdict], problems: dict
) -> Iterator[tuple[str, Counts]]:
    """(cluster, counts) of each row: accuracy, overall and by subset."""
    for row in rows:
        yield row.cluster, share(verdicts[row.id].verdict, "accuracy", "overall", *row.subsets)


def shares(protocol: str, total: Counter, empty: float | None = None) -> Metrics:
    """Every plain share of the counts. empty: its value over no rows."""
    found: Metrics = defaultdict(dict)
    for subset, measure in dict.fromkeys(key[:2] for key in total if key[1]):
        parts = ("n", "right", "undecided", "dropped")
        n, right, undecided, dropped = (total[subset, measure, part] for part in parts)
        value = right / n if n else empty
        found[subset][measure] = Metric(value, n, undecided, dropped, right)
    return found


def paper_form(row: Row) -> PaperForm | None:
    """(options, solution, problem type) in the paper's code; None: the paper leaves the row out."""
    if row.kind == "yes/no":
        return dict(row.options), "A" if row.answer == "yes" else "B", "multiple choice"
    if row.kind == "multiple choice":
        return dict(row.options), row.answer, "multiple choice"
    return None


# --- the table's entry ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """What the numbers of a benchmark are, and the functions that read, ask, score and count it.

    Each file of a benchmark has one instance, ENTRY. Functions with a default need no definition.
    """

    name: str
    title: str
    media: str  # image or video
    rows: int  # of the published set
    source: str  # the files that can be read, in words
    hub: tuple[str, ...]  # the id of the paper's time, then the one it moved to
    splits: tuple[tuple[str | None, str], ...]  # (configuration, split) on the hub
    # Patterns of file names. Only files of the first pattern that matches are read; the others hold
    # the same rows, or no answers.
    files: tuple[str, ...]
    forms: tuple[str, ...]  # the fields of a row, in each form that it is published in

    official: str  # the publisher's protocol, in words
    paper: str  # that of Table 1 of Ground What You See
    paper_number: float | None  # Table 1, the row "Ours", in percent
    headline: dict[str, tuple[str, str]]  # protocol -> (subset, measure)
    beware: str  # what must not be compared

    # (published row, its number, source) -> rows; raises DataError("field: what is wrong")
    read: Callable[[dict, int, "Source"], Iterator[Row]]
    # row -> published prompts by style, "official" among them
    prompts: Callable[[Row], dict[str, str]]
    # (row, answer text, tools) -> (the official verdict, the answer read)
    verdict: Callable[[Row, str, Tools], tuple[str, Any]]
    # of an undecided row: (row, text) -> a judge's prompt; (row, reply) -> (verdict, answer read)
    judge_prompt: Callable[[Row, str], str] | None = None
    judge_reply: Callable[[Row, str], tuple[str, Any]] | None = None
    # (row, text, verdict) -> a problem to report with the score, or ""
    problem: Callable[[Row, str, Verdict], str] = lambda row, text, verdict: ""

    paper_form: Callable[[Row], PaperForm | None] = paper_form
    has_paper_rule: bool = True  # False: the official rule scores both protocols
    paper_question: Callable[[Row], str] = lambda row: row.question

    # (protocol, rows, verdicts by id, problems) -> (cluster, counts) of rows, questions or pairs
    count: Callable[..., Iterator[tuple[str, Counts]]] = count_rows
    # (protocol, counts of all clusters or of a sample of them) -> measures
    measures: Callable[[str, Counter], Metrics] = shares
    mean: tuple[str, tuple[str, ...]] = ("", ())  # the published unweighted mean: (name, members)
    # pictures are stored once per row, under different names, and compared by content
    pictures_repeat: bool = False


# --- reading --------------------------------------------------------------------------------------

# Video-R1's files for evaluation, of which the paper used two
VIDEO_R1_FORM = "problem_id problem problem_type options solution path"


def lettered(options: Iterable[str]) -> dict[str, str]:
    """["red", "blue"] -> {"A": "red", "B": "blue"}"""
    return {chr(ord("A") + i): str(option) for i, option in enumerate(options)}


def own_letters(options: Sequence[str]) -> dict[str, str] | None:
    """letter -> text of options with their letters ("A. red", "(A) red"); None unless all have."""
    found = {}
    for letter, option in lettered(options).items():
        pattern = rf"\(?{letter}[.):] ?(.*)"
        if not (own := re.fullmatch(pattern, option, re.IGNORECASE | re.DOTALL)):
            return None
        found[letter] = own[1]
    return found


def yes_or_no(gold: Any) -> str:
    """The gold in lower case. Raises DataError unless it is yes or no."""
    gold = str(gold).strip().lower()
    if gold not in ("yes", "no"):
        raise DataError(f"answer: {gold!r} is neither yes nor no")
    return gold


def gold_text(gold: Any) -> str:
    """The gold as text. Raises DataError if it is missing."""
    if gold is None or gold != gold or str(gold).strip() in ("", "nan"):
        raise DataError("answer: missing; the answers of a test split are not published")
    return str(gold)


def read_video_r1(raw: dict) -> tuple[str, dict[str, str], str]:
    """(question, options, answer) of a row of Video-R1's, whose options begin with their letters.

    Raises DataError for other options, or without an answer.
    """
    if (options := own_letters(raw["options"] or ())) is None:
        raise DataError(
            f"options: {raw['options']} do not begin with their letters (A. red, B. blue)"
        )
    return raw["problem"], options, gold_text(answers.solution_of(str(raw["solution"])))
