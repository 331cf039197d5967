"""POPE, MMBench, MathVista, MMVU, Video-MMMU, VideoHallucer and AMBER: read as published, asked, scored by two rules.

    rows = read("pope", "lmms-lab/POPE")                     # or a folder or file; clips: media="FOLDER or ZIP"
    texts = [prompt("pope", row) for row in rows]
    score("pope", rows, outputs, "official").metrics["overall"]["f1"]
    score("pope", rows, outputs, "paper").metrics["overall"]["accuracy"]

*official* is what the benchmark's authors publish, *paper* what Table 1 of Ground What You See was counted with (its
code: one flat mean of exact matches). `TABLE` says what each is and what must not be compared. The rules themselves are
in `benchmark_rules.py`. What only a judge can decide is counted as undecided, never guessed; bad files, missing
predictions and the like are counted and named.
"""

import functools
import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import answers
import benchmark_files as files
import benchmark_rules as rules
import data
import reasoning
from benchmark_tasks import (
    ASK,
    ASK_JUDGE,
    ATTRIBUTE,
    EXTRA_SUBSETS,
    JUDGE,
    READ,
    REPLY,
    SUBSETS,
    TRACKS,
    Row,
    circular,
    right_or_wrong,
)
from benchmark_tasks import amber_tools as amber_tools  # for those who score
from data import DataError

Judge = Callable[[list[str]], list[str | None]]  # as in caption_reward.py
PROTOCOLS = ("official", "paper")


@dataclass(frozen=True)
class Benchmark:
    """What a number of this benchmark is. `paper_number`: Table 1, the row "Ours", in percent."""

    title: str
    media: str  # image or video
    source: str
    hub: tuple[str, ...]  # the id of the paper's time, then the one it moved to
    splits: tuple[tuple[str | None, str], ...]  # (configuration, split) there
    rows: int
    official: str
    headline: dict[str, tuple[str, str]]  # protocol -> (subset, measure)
    paper: str
    paper_number: float | None
    beware: str


TABLE = {
    "pope": Benchmark(
        "POPE",
        "image",
        "Parquet of the hub; JSON lines of the authors' repository with COCO val2014; TSV of VLMEvalKit",
        ("lmms-lab/POPE", "lmms-lab-encoder/POPE"),
        ((None, "test"),),
        9000,
        "F1, precision, recall (positive: yes), accuracy and share of yes, by subset and their mean; no match is a yes",
        {"official": ("overall", "f1"), "paper": ("overall", "accuracy")},
        "accuracy over the pooled 9,000 rows, asked as A. yes / B. no",
        88.7,
        "accuracy with F1, which others print as 'POPE': on the published rows they differ by about a point",
    ),
    "mmbench": Benchmark(
        "MMBench (en, dev)",
        "image",
        "Parquet of the hub; TSV of VLMEvalKit",
        ("lmms-lab/MMBench", "lmms-lab-encoder/MMBench"),
        (("en", "dev"),),
        4329,
        "CircularEval: a question is right when all its rotations are; free text that no rule reads goes to a judge",
        {"official": ("overall", "circular accuracy"), "paper": ("overall", "accuracy")},
        "accuracy over the rows of en/dev, each rotation a row of its own (not circular)",
        88.6,
        "the paper's column with the leaderboard, which is circular and, for test, scored by a server",
    ),
    "mathvista": Benchmark(
        "MathVista (testmini)",
        "image",
        "Parquet of the hub; testmini.json with images or images.zip",
        ("AI4Math/MathVista",),
        ((None, "testmini"),),
        1000,
        "accuracy after a judge has taken the answer out of the response; edit distance to the options",
        {"official": ("overall", "accuracy"), "paper": ("overall", "accuracy")},
        "exact match without a judge over 998 rows (the two with a list are left out)",
        69.4,
        "official numbers without a judge: its rows are undecided here, not wrong or nearest by edit distance",
    ),
    "mmvu": Benchmark(
        "MMVU (validation)",
        "video",
        "validation.json and videos/ of the hub; eval_mmvu.json of Video-R1",
        ("yale-nlp/MMVU", "lmms-lab/MMVU", "lmms-eval/MMVU"),
        ((None, "validation"),),
        1000,
        "accuracy by a judge over multiple-choice (625) and open questions (375)",
        {"official": ("overall", "accuracy"), "paper": ("overall", "accuracy")},
        "exact letter over the 625 multiple-choice questions only",
        65.6,
        "the paper's column with the official number over all questions; it is 'MMVU (mc)' elsewhere",
    ),
    "videommmu": Benchmark(
        "Video-MMMU",
        "video",
        "Parquet of the hub or JSON of the repository, with its zips of clips; eval_videommmu.json of Video-R1",
        ("lmms-lab/VideoMMMU", "lmms-eval/VideoMMMU"),
        (("Perception", "test"), ("Comprehension", "test"), ("Adaptation", "test")),
        900,
        "mean of the accuracies of three tracks of 300; an empty output leaves the denominator (named: dropped)",
        {"official": ("mean of tracks", "accuracy"), "paper": ("overall", "accuracy")},
        "mean over the 900 rows of exact letters (882) and numbers (18)",
        50.8,
        "runs with empty outputs: officially they do not count, in the paper's rule they are wrong",
    ),
    "videohallucer": Benchmark(
        "VideoHallucer",
        "video",
        "<subset>/<subset>.json and <subset>/videos/ of the hub",
        ("bigai-nlco/VideoHallucer", "ColorfulAI/VideoHallucer"),
        (),
        1952,
        "both questions of a pair right, by subset, and the unweighted mean of the five",
        {"official": ("mean of subsets", "pair accuracy"), "paper": ("mean of subsets", "pair accuracy")},
        "the same mean, asked as A. Yes / B. No (the authors' pairing script is not public)",
        50.8,
        "runs before and after 2025-10-24, when 24 of 200 temporal pairs went (2,000 rows before); question accuracy",
    ),
    "amber": Benchmark(
        "AMBER",
        "image",
        "data/ of the authors' repository (query/, annotations.json, relation.json, safe_words.txt) and their images",
        (),
        (),
        15220,
        "generative: CHAIR, Cover, Hal, Cog; discriminative: accuracy, precision, recall, F1, positive: NO",
        {"official": ("discriminative", "f1"), "paper": ("generative", "F1")},
        "not in Ground What You See. OViP: F1 of 100 - CHAIR and Cover, and F1 of the discriminative part",
        None,
        "F1 with POPE's, whose positive is yes; CHAIR counted with other word vectors than spaCy's en_core_web_lg",
    ),
}


# --- files ------------------------------------------------------------------------------------------------------------

FILES = {  # of the files of a folder, those that the first pattern finds; the others hold the same rows, or no answers
    "pope": (
        r"(^|/)test-.*\.parquet$",
        r"(random|popular|adversarial).*\.parquet$",
        r"coco_pope_\w+\.jsonl?$",
        r"_pope_\w+\.jsonl?$",
        r"POPE.*\.tsv$",
    ),
    "mmbench": (r"en/dev-.*\.parquet$", r"^dev-.*\.parquet$", r"MMBench_DEV_EN.*\.tsv$"),
    "mathvista": (r"testmini-.*\.parquet$", r"(^|/)testmini\.json$"),
    "mmvu": (r"(^|/)validation.*\.(json|parquet)$", r"eval_mmvu\.json$"),
    "videommmu": (rf"({'|'.join(TRACKS)})/test-.*\.parquet$", r"(?i)\w+_video\.json$", r"eval_videommmu\.json$"),
    "videohallucer": (rf"(^|/)({'|'.join((*SUBSETS, *EXTRA_SUBSETS))})\.json$",),
    "amber": (r"query_all\.json$", r"query_.*\.json$"),
}
PAPER_FORM = "problem_id problem problem_type options solution path"  # Video-R1's files for evaluation
FORMS = {  # the fields of a row, in each form that it is published in
    "pope": ("question answer category image", "question_id image text label"),
    "mmbench": ("index question hint answer A B category image",),
    "mathvista": ("pid question answer choices question_type answer_type precision unit image",),
    "mmvu": tuple(f"id question answer choices question_type {video}" for video in ("video", "video_path"))
    + (PAPER_FORM,),
    "videommmu": ("id question options answer", PAPER_FORM),
    "videohallucer": ("basic hallucination",),
    "amber": ("id image query",),
}


def read(name: str, path: str | Path, media: str | Path | None = None, on_bad_row="error", say=print) -> list[Row]:
    """The rows of a benchmark, from a folder or file as its publisher ships it, or from a hub id (old or new).

    media: folder or zip of the pictures or clips, where they lie neither in the file nor beside it.
    Raises DataError with a line for each of the first ten bad rows, unless on_bad_row is "skip": then `say` gets a line
    for each. `scan` returns these lines instead.
    """
    rows, problems = scan(name, path, media)
    data.refuse(problems, on_bad_row, say)
    if not rows:
        raise DataError(f"{name}: {path} has no usable row")
    if len(rows) != TABLE[name].rows:
        say(f"{name}: {len(rows)} rows; the published set has {TABLE[name].rows}")
    return rows


def scan(name: str, path: str | Path, media: str | Path | None = None, check=True) -> tuple[list[Row], list[str]]:
    """All usable rows, and a line for each other one: picture or clip missing or unreadable, bad field, id taken.

    check: open every picture, and the key frames of every clip, as data.py does (a minute for some thousand pictures).
    Raises DataError where there is nothing to read, or where the file is another benchmark's.
    """
    if name not in TABLE:
        raise DataError(f"{name!r} is not one of {', '.join(TABLE)}")
    if not check:
        return _scan(name, path, media, None)
    with data.Checked(name, path, media or "") as checked:
        rows, problems = _scan(name, path, media, checked)
    return _one_cluster_a_picture(rows) if name in ("mmbench", "mathvista") else rows, problems


def _scan(name: str, path, media, checked: Callable[[data.Media, str], data.Size] | None) -> tuple[list, list[str]]:
    rows, problems, seen, known = [], [], set(), TABLE[name]
    checked_once = functools.cache(checked) if checked else None

    def size_of(medium: data.Media) -> data.Size:
        return (checked_once if isinstance(medium, Path | files.InZip) else checked)(medium, known.media)

    for source in files.sources(name, path, media, FILES[name], known.source, known.hub, known.splits):
        fields = _form(name, source)
        for number, raw in enumerate(source.table):
            try:
                if not isinstance(raw, dict) or (lacking := fields - set(raw)):
                    raise DataError(
                        "not an object" if not isinstance(raw, dict) else f"{', '.join(sorted(lacking))}: missing"
                    )
                made = list(READ[name](raw, number, source))
                for row in made:
                    if not isinstance(row.question, str) or not row.question.strip():
                        raise DataError("question: missing or empty")
                    if row.id in seen:
                        raise DataError(f"id: {row.id!r} is already taken")
                if checked:
                    made = [replace(row, sizes=(size_of(row.media),)) for row in made]
                rows += made
                seen |= {row.id for row in made}
            except (DataError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                said = error if isinstance(error, DataError) else f"cannot be read ({type(error).__name__}: {error})"
                problems.append(f"{source.label} row {number}, {said}")
    return rows, problems


def _one_cluster_a_picture(rows: list[Row]) -> list[Row]:
    """Clusters that hold one picture are one: these benchmarks store it with each question, under a name of its own."""
    first, same = {}, {}

    def root(cluster: str) -> str:
        while cluster in same:
            cluster = same[cluster]
        return cluster

    for row in rows:
        content = row.media.read_bytes() if isinstance(row.media, Path) else row.media
        content = content if isinstance(content, bytes) else content.read()
        a, b = root(row.cluster), root(first.setdefault(hashlib.sha1(content).digest(), row.cluster))
        if a != b:
            same[a] = b
    return [replace(row, cluster=root(row.cluster)) for row in rows]


def _form(name: str, source: files.Source) -> set[str]:
    """The fields of the published form that the first rows have: the cheap check for a wrong file."""
    first = [
        set(map(str, source.table[i])) for i in range(min(10, len(source.table))) if isinstance(source.table[i], dict)
    ]

    def fits(form: str) -> bool:
        return any(set(form.split()) <= fields for fields in first)

    for form in filter(fits, FORMS[name]):
        return set(form.split())
    other = " or ".join(o for o, forms in FORMS.items() if o != name and any(map(fits, forms)))
    held = ", ".join(sorted(set().union(*first))) or "no fields"
    raise DataError(
        f"{name}: {source.label} is not {TABLE[name].title}: its rows hold {held}; expected "
        + ", or ".join(form.replace(" ", ", ") for form in FORMS[name])
        + (f". It looks like {other}" if other else "")
    )


# --- asking -----------------------------------------------------------------------------------------------------------

PAPER_ASKS = {  # what the paper's code adds to every prompt
    "multiple choice": "only the single option letter (e.g., A, B, C, D, etc.)",
    "numerical": "the numerical value (e.g., 42 or 3.14)",
}


def paper_form(name: str, row: Row) -> tuple[dict[str, str], str, str] | None:
    """(options, solution, problem type) that the paper's code makes of a row; None: the paper leaves the row out.

    All of MMBench's options are shown, missing ones as "nan". In MathVista the letter of the choice that equals the
    answer becomes the answer, and the choices after it are compared with that letter: the first of equal choices is
    the solution, unless choices are letters themselves.
    """
    if row.kind == "yes/no":
        return dict(row.options), "A" if row.answer == "yes" else "B", "multiple choice"
    if name == "mmbench":
        return {letter: row.options.get(letter, "nan") for letter in "ABCD"}, row.answer, "multiple choice"
    if name == "mathvista" and row.more["answer_type"] == "text":
        solution = row.answer
        for letter, choice in row.options.items():
            solution = letter if choice == solution else solution
        return dict(row.options), solution, "multiple choice"
    if name == "mathvista":
        return None if row.more["answer_type"] == "list" else ({}, row.answer, "numerical")
    if row.kind == "multiple choice":
        return dict(row.options), row.answer, "multiple choice"
    if name == "videommmu":
        gold = str(row.answer)
        if re.fullmatch("[A-Z]", gold):  # two open questions, and one of no type, are answered by a letter
            return dict(row.options), gold, "multiple choice"
        listed = re.findall(r"'([\d.]+)'", gold)  # one gold answer is a broken list, "['24/7', '3.429', ..."
        return {}, listed[0] if gold.startswith("[") and listed else gold, "numerical"
    return None


def _asked(name: str, row: Row) -> str:
    """The question, as in Video-R1's file without Video-MMMU's mark of a picture, which is the clip's last frame."""
    marked = name == "videommmu" and "<image 1>" in row.question
    return row.question.replace("<image 1>", "").strip() if marked else row.question


def prompt(
    name: str, row: Row, protocol: str = "official", style: str = "official", template: str = "", four_stage=True
) -> str:
    """The text of the user turn, beside the picture or clip.

    official: the benchmark's own; `style` picks another published one of it (lmms, vlmevalkit, direct, ...).
    paper: the question as the paper's code lays it out and its sentence on the answer's form, with this repository's
    wording of the stages between them (D-11); `template`, with {Question} in it, puts another wording there, such as
    QUESTION_TEMPLATE_PCDA of the paper's code, for its checkpoints.
    """
    if protocol == "official":
        styles = ASK[name](row)
        if style not in styles:
            raise ValueError(f"{name} has no prompt {style!r}, only {', '.join(styles)}")
        return styles[style]
    options, _, problem_type = paper_form(name, row) or (row.options, "", "free-form")
    question = _asked(name, row)
    if options:  # no newline before "Options:", as there
        question += "Options:\n" + "".join(f"{letter}. {option}\n" for letter, option in options.items())
    asks = PAPER_ASKS.get(problem_type)
    end = f" Please provide {asks} within the <answer> </answer> tags." if asks else ""
    stages = template.replace("{Question}", question) if template else question
    return stages + ("" if template else reasoning.prompt("", (), problem_type, four_stage)) + end


def sample(name: str, row: Row) -> data.Sample:
    """The row as everything else here knows one, in the paper's form: for `data.messages`, and `data.prompts` with the
    prompt of training. A row that the paper leaves out is free-form."""
    options, solution, problem_type = paper_form(name, row) or (row.options, str(row.answer), "free-form")
    return data.Sample(
        id=row.id,
        data_type=TABLE[name].media,
        media=() if row.media is None else (row.media,),
        problem=_asked(name, row),
        options=tuple(f"{letter}. {option}" for letter, option in options.items()),
        problem_type=problem_type,
        answer=solution,
        category=row.subsets[0] if row.subsets else name,
        pair=row.group or None,
        sizes=row.sizes,
    )


# --- scoring ----------------------------------------------------------------------------------------------------------

LONG = 20_000  # characters: such an output is named


@dataclass(frozen=True)
class Verdict:
    """right, wrong, undecided (only a judge could say) or dropped (not counted by this protocol); what was read."""

    id: str
    verdict: str
    answer: Any = None


@dataclass(frozen=True)
class Metric:
    """A measure as a share of 1; None where it, or a member of a mean, divides by nothing. n: the rows, pairs or
    questions it is counted over.

    undecided of n: not counted as right, so that `value` is the least it can be, and value + undecided / n the most.
    dropped: left out of n. right: where it is a plain share of n, for Wilson's interval (eval.rate_of).
    """

    value: float | None
    n: int
    undecided: int = 0
    dropped: int = 0
    right: int | None = None


Metrics = dict[str, dict[str, Metric]]  # subset -> measure -> number


@dataclass(frozen=True)
class Score:
    """verdicts in the order of the rows; metrics by subset; problems: what went wrong -> the ids it went wrong with.

    counts: by cluster, all that `metrics` needs, so that they can be counted again over other clusters.
    """

    name: str
    protocol: str
    verdicts: list[Verdict]
    metrics: Metrics
    problems: dict[str, list[str]]
    counts: dict[str, Counter]

    @property
    def headline(self) -> Metric | None:
        subset, measure = TABLE[self.name].headline[self.protocol]
        return self.metrics.get(subset, {}).get(measure)

    @property
    def clustered(self) -> bool:
        """Do rows share pictures or clips, so that Wilson's interval would be too narrow?"""
        counted = [parts for parts in self.counts.values() if any(key[2] != "dropped" for key in parts)]
        return len(counted) < sum(verdict.verdict != "dropped" for verdict in self.verdicts)

    def notes(self) -> list[str]:
        """A line for each kind of problem: how many, and the first of them."""
        return [
            f"{what}: {len(ids)} ({', '.join(ids[:5])}{', ...' * (len(ids) > 5)})"
            for what, ids in self.problems.items()
        ]


def score(
    name: str,
    rows: Sequence[Row],
    outputs: Mapping[str, str] | Sequence[str | None] | Sequence[tuple[str, str | None]],
    protocol: str = "official",
    *,
    answer: Callable[[str], str] = rules.final_answer,
    lettered: bool = False,
    judge: Judge | None = None,
    nouns: Callable[[str], list[str]] | None = None,
    similar: Callable[[str, str], float] | None = None,
) -> Score:
    """The verdict on every output, and the measures by subset.

    outputs: row id -> raw text, or such pairs, or the texts in the order of the rows. A missing one is wrong, and
    named; so are ids that no row has, those that have two (the first counts), and empty and very long outputs. An empty
    one is what the rule makes of it (POPE: a yes).
    answer: the step before an official rule, `rules.final_answer` unless said otherwise; `str` scores raw text. The
    paper's rule has its own.
    lettered: yes/no questions were asked with options A and B (as the paper and training do), so that for the official
    rule, which knows no letters, "B" or "B. no" stands for the option's text.
    judge: for what no rule decides (MMBench's free text, MathVista's extraction, MMVU); without it, or where it fails,
    such rows are undecided.
    nouns, similar: for AMBER's descriptions, from `amber_tools()`; without them these are undecided.
    """
    if name not in TABLE:
        raise ValueError(f"{name!r} is not one of {', '.join(TABLE)}")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    rows, texts, problems = _matched(rows, outputs)
    verdicts, open_cases = {}, []
    for row in rows:
        raw = texts.get(row.id)
        form = paper_form(name, row) if protocol == "paper" and name != "amber" else ...
        if form is None:
            verdicts[row.id] = Verdict(row.id, "dropped")
        elif raw is None:
            verdicts[row.id] = Verdict(row.id, "wrong")
            problems["missing prediction, counted as wrong"].append(row.id)
        elif form is not ...:
            said = rules.paper_answer(raw)
            verdicts[row.id] = Verdict(row.id, right_or_wrong(rules.paper_reward(raw, form[1], form[2]) == 1), said)
        else:
            text = answer(raw)
            if lettered and row.kind == "yes/no":
                letter = answers.read(text, "multiple choice") if len(text) < 200 else None
                text = row.options.get(letter, text)
            verdict = JUDGE[name](row, text, (nouns, similar))
            if raw.strip() and (not text.strip() or (verdict[0] == "dropped" and text != raw)):
                # no rule's default may stand for an answer that was not given
                verdict = ("wrong", None)
                problems["output without an answer, counted as wrong"].append(row.id)
            verdicts[row.id] = Verdict(row.id, *verdict)
            if verdicts[row.id].verdict == "undecided" and judge and name in ASK_JUDGE:
                open_cases.append((row, text[-LONG:]))
            if row.kind == "yes/no" and name == "amber" and verdicts[row.id].answer is None:
                problems["neither yes nor no, counted as wrong"].append(row.id)
            if name == "pope" and verdict[1] == "yes" and text.strip() and not re.search(r"(?i)\byes\b", text):
                problems["neither yes nor a no that POPE's rule knows (No, no, not): taken for a yes"].append(row.id)
        if raw is not None and not raw.strip() and form is not None:
            problems[f"empty output, {verdicts[row.id].verdict} by the {protocol} rule"].append(row.id)
        if raw is not None and len(raw) > LONG:
            problems[f"output of more than {LONG} characters"].append(row.id)
    replies = judge([ASK_JUDGE[name](*case) for case in open_cases]) if open_cases else []
    for (row, _), reply in zip(open_cases, replies, strict=True):
        if reply is None:
            problems["judge failed, undecided"].append(row.id)
            continue
        verdicts[row.id] = Verdict(row.id, *REPLY[name](row, reply))
        if verdicts[row.id].verdict == "undecided":
            problems["judge's reply is not in the form asked for, undecided"].append(row.id)
    counts: dict[str, Counter] = defaultdict(Counter)
    for cluster, parts in _counted(name, protocol, rows, verdicts, problems):
        counts[cluster].update(parts)
    total = Counter()
    for parts in counts.values():
        total.update(parts)
    in_order = [verdicts[row.id] for row in rows]
    return Score(name, protocol, in_order, measures(name, protocol, total), dict(problems), dict(counts))


def _matched(rows: Sequence[Row], outputs) -> tuple[list[Row], dict[str, str], dict[str, list[str]]]:
    """Each row once, the raw text of each that has one, and what did not match."""
    problems, unique = defaultdict(list), {}
    for row in rows:
        if row.id in unique:
            problems["row given twice, counted once"].append(row.id)
        unique.setdefault(row.id, row)
    pairs = list(outputs.items() if isinstance(outputs, Mapping) else outputs)
    if any(not isinstance(pair, tuple) for pair in pairs):  # texts alone
        problems["prediction for no row"] += [f"#{i}" for i in range(len(rows), len(pairs))]
        pairs = {row.id: (row.id, text) for row, text in reversed(list(zip(rows, pairs)))}.values()
    said = Counter(str(key) for key, _ in pairs)
    problems["prediction for no row"] += [key for key in said if key not in unique]
    problems["prediction given twice, the first counted"] += [key for key, n in said.items() if n > 1]
    texts = {str(key): str(text) for key, text in reversed(list(pairs)) if text is not None}
    return list(unique.values()), texts, defaultdict(list, {what: ids for what, ids in problems.items() if ids})


def _share(verdict: str, measure: str, *subsets: str) -> dict[tuple, int]:
    parts = ("dropped",) if verdict == "dropped" else ("n", verdict)
    return {(subset, measure, part): 1 for subset in subsets for part in parts}


def _counted(name, protocol, rows, verdicts, problems):
    """(cluster, what is counted there: (subset, measure, part) -> number) of each row, question or pair."""
    of = {row.id: verdicts[row.id].verdict for row in rows}
    if name == "mmbench" and protocol == "official":
        sizes, whole = Counter(row.group for row in rows), circular(rows, of)
        for row in rows:
            if row.group not in whole or (row.more["first"] and sizes[row.group] < len(row.options)):
                problems["rotations missing (without the first, not counted)"].append(row.id)
        for row in rows:
            if row.more["first"]:
                yield row.cluster, _share(whole[row.group], "circular accuracy", "overall", *row.subsets)
    elif name == "videohallucer":
        pairs = defaultdict(list)
        for row in rows:
            pairs[row.group].append(row)
            yield row.cluster, _share(of[row.id], f"{row.more['variant']} accuracy", "overall", *row.subsets)
        for pair in pairs.values():
            verdict = right_or_wrong(len(pair) == 2 and all(of[row.id] == "right" for row in pair))
            yield pair[0].cluster, _share(verdict, "pair accuracy", "overall", *pair[0].subsets)
    elif name == "amber":
        yield from ((row.cluster, _count_amber(row, verdicts[row.id])) for row in rows)
    else:
        for row in rows:
            yield row.cluster, _share(of[row.id], "accuracy", "overall", *row.subsets)
            if name == "pope":
                cell = {("right", "yes"): "tp", ("right", "no"): "tn", ("wrong", "yes"): "fn", ("wrong", "no"): "fp"}
                for subset in ("overall", *row.subsets):
                    yield row.cluster, {(subset, "", cell[of[row.id], row.answer]): 1}


MEANS = {  # the unweighted means that are published: undefined where a member is
    "pope": ("mean of subsets", ("random", "popular", "adversarial")),
    "videommmu": ("mean of tracks", TRACKS),
    "videohallucer": ("mean of subsets", SUBSETS),
}


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def measures(name: str, protocol: str, total: Mapping[tuple, float]) -> Metrics:
    """All measures from what was counted, over all clusters or any sample of them."""
    total = Counter(total)
    if name == "amber":
        return _amber_measures(total)
    found: Metrics = defaultdict(dict)
    nothing = 0.0 if name == "videommmu" else None  # its script prints 0 where every output is empty
    for subset, measure in dict.fromkeys(key[:2] for key in total if key[1]):
        n, right, undecided, dropped = (total[subset, measure, p] for p in ("n", "right", "undecided", "dropped"))
        found[subset][measure] = Metric(right / n if n else nothing, n, undecided, dropped, right)
    if name == "pope" and protocol == "official":
        for subset in found:
            found[subset] |= _binary(total, subset)
    mean, members = MEANS.get(name, ("", ()))
    for measure in dict.fromkeys(measure for member in members for measure in found.get(member, ())):
        parts = [found[member][measure] for member in members if found.get(member, {}).get(measure)]
        values = [part.value for part in parts]
        value = None if None in values else sum(values) / len(values)
        n, undecided, dropped = (sum(getattr(part, key) for part in parts) for key in ("n", "undecided", "dropped"))
        found[mean][measure] = Metric(value, n, undecided, dropped)
    return dict(found)


def _binary(total: Counter, subset: str) -> dict[str, "Metric"]:
    """POPE's measures; None where the official script divides by zero."""
    tp, fp, tn, fn = (total[subset, "", part] for part in ("tp", "fp", "tn", "fn"))
    n = tp + fp + tn + fn
    precision, recall = _ratio(tp, tp + fp), _ratio(tp, tp + fn)
    f1 = _ratio(2 * precision * recall, precision + recall) if None not in (precision, recall) else None
    values = {"precision": precision, "recall": recall, "f1": f1, "yes ratio": _ratio(tp + fp, n)}
    return {name: Metric(value, n) for name, value in values.items()}


def _count_amber(row: Row, verdict: Verdict) -> dict[tuple, int]:
    """AMBER's counters of one answer. A description that is missing covers nothing and is not free of hallucination."""
    if row.kind == "description":
        if verdict.verdict == "undecided":
            return {("generative", "", "undecided"): 1}
        found = verdict.answer or dict.fromkeys(("nouns", "hallucinated", "covered", "as people do"), ())
        parts = {"flags": "hallucinated", "nouns": "nouns", "named": "covered", "invented": "as people do"}
        counts = {part: len(found[key]) for part, key in parts.items()}
        counts |= {"truth": len(row.answer), "hallu": len(row.more["hallu"]), "clean": int(verdict.verdict == "right")}
        return {("generative", "", part): count for part, count in counts.items()} | {("generative", "", "n"): 1}
    no, said = row.answer == "no", verdict.answer == "No"
    counts = {"n": 1, "right": verdict.verdict == "right", "no": no, "said no": said, "hit": no and said}
    return {(row.subsets[0], "", part): int(count) for part, count in counts.items()}


EPSILON = 0.001  # what every count that is divided by starts at, in AMBER's metrics.txt


def _amber_measures(total: Counter) -> dict[str, dict[str, "Metric"]]:
    """AMBER's numbers as it prints them, but of 1: to a tenth of a percent, each denominator begun at 0.001."""
    measures = {}
    groups = {
        "discriminative": (*ATTRIBUTE, "existence", "relation"),
        "existence": ("existence",),
        "attribute": ATTRIBUTE,
    }
    groups |= {name: (name,) for name in (*ATTRIBUTE, "relation")}
    for name, parts in groups.items():
        n, right, no, said, hit = (sum(total[p, "", k] for p in parts) for k in ("n", "right", "no", "said no", "hit"))
        if not n:
            continue
        begun = EPSILON * (len(parts) if name == "attribute" else 1)
        accuracy, precision, recall = (round(a / (b + begun) * 100, 1) for a, b in ((right, n), (hit, said), (hit, no)))
        p, r = precision / 100, recall / 100
        f1 = round(2 * p * r / (p + r + (0.001 if name == "existence" else 0.0001)) * 100, 1)
        values = {"accuracy": accuracy, "precision": precision, "recall": recall, "f1": f1}
        measures[name] = {key: Metric(value / 100, n) for key, value in values.items()}
    of = {
        part: total["generative", "", part]
        for part in "flags nouns named truth invented hallu clean n undecided".split()
    }
    if of["n"]:
        chair, cover, cog = (
            round(a / (b + EPSILON) * 100, 1)
            for a, b in ((of["flags"], of["nouns"]), (of["named"], of["truth"]), (of["invented"], of["hallu"]))
        )
        hal = round(100 - of["clean"] / (of["n"] + EPSILON) * 100, 1)
        values = {"CHAIR": chair, "Cover": cover, "Hal": hal, "Cog": cog, "F1": rules.amber_f1(chair, cover)}
        score = measures.get("discriminative", {}).get("f1")
        if score:  # from the AMBER paper; its script does not print it
            values["AMBER"] = (100 - chair + 100 * score.value) / 2
        measures["generative"] = {key: Metric(value / 100, of["n"], of["undecided"]) for key, value in values.items()}
    elif of["undecided"]:
        measures["generative"] = {"CHAIR": Metric(None, 0, of["undecided"]), "F1": Metric(None, 0, of["undecided"])}
    return measures


# --- intervals and comparisons ----------------------------------------------------------------------------------------


def _resampled(scores: Sequence[Score], samples: int, seed: int) -> list[list[Metrics]]:
    """[scores][samples]: all measures of each score over the same clusters, drawn with replacement."""
    import numpy as np

    clusters = list(scores[0].counts)
    if any(set(score.counts) != set(clusters) for score in scores):
        raise ValueError("the scores are not over the same pictures or clips")
    if not clusters:
        return [[] for _ in scores]
    weights = np.random.default_rng(seed).multinomial(len(clusters), [1 / len(clusters)] * len(clusters), size=samples)
    found = []
    for score in scores:
        keys = sorted({key for parts in score.counts.values() for key in parts})
        totals = weights @ np.array([[score.counts[cluster][key] for key in keys] for cluster in clusters])
        found.append([measures(score.name, score.protocol, dict(zip(keys, map(float, row)))) for row in totals])
    return found


def _value(found: Metrics, subset: str, measure: str) -> float | None:
    return (found.get(subset, {}).get(measure) or Metric(None, 0)).value


def intervals(score: Score, measure: str, samples: int = 1000, seed: int = 0) -> dict[str, tuple[float, float]]:
    """The 95 % percentile intervals of a bootstrap over clusters (pictures, clips), for a measure in every subset.

    Rows about one picture are not independent, so whole pictures are drawn. A sample in which the measure divides by
    nothing is left out; a subset none of whose samples gives it is not there.
    """
    [found], result = _resampled([score], samples, seed), {}
    for subset in score.metrics:
        values = sorted(value for one in found if (value := _value(one, subset, measure)) is not None)
        if values:
            result[subset] = (values[int(0.025 * len(values))], values[int(0.975 * len(values))])
    return result


def difference(
    a: Score, b: Score, subset: str, measure: str, samples: int = 1000, seed: int = 0
) -> dict[str, float | None]:
    """How much b is above a: value, the 95 % interval (low, high) and two-sided p of a paired bootstrap over clusters.

    p is twice the smaller share of samples on either side of no difference. Raises ValueError where the scores are not
    over the same clusters.
    """
    pairs = ([_value(one, subset, measure) for one in both] for both in zip(*_resampled([a, b], samples, seed)))
    values = sorted(y - x for x, y in pairs if None not in (x, y))
    first, second = (score.metrics.get(subset, {}).get(measure) for score in (a, b))
    if not values or not first or not second or None in (first.value, second.value):
        return {"value": None, "low": None, "high": None, "p": None}
    side = min(sum(v <= 0 for v in values), sum(v >= 0 for v in values)) / len(values)
    low, high = values[int(0.025 * len(values))], values[int(0.975 * len(values))]
    return {"value": second.value - first.value, "low": low, "high": high, "p": min(1.0, 2 * side)}


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test: do two runs get different numbers of the same independent rows right?

    Of the rows that only one of them has right, each would be either's with chance one half.
    """
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
