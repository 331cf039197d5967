"""Outputs -> verdicts, measures, intervals and comparisons."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import answers
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
)
from benchmarks.table import TABLE
from caption_reward import Judge

PROTOCOLS = ("official", "paper")
COUNTED = ("n", "undecided", "dropped")  # of a Metric, summed in a mean
LONG = 20_000  # characters: such an output is reported
Outputs = Mapping[str, str] | Sequence[str | None] | Sequence[tuple[str, str | None]]


@dataclass(frozen=True)
class Score:
    """verdicts: in the order of the rows. metrics: by subset. problems: what went wrong -> ids.

    counts: by cluster, all that `measures` needs, so that clusters can be resampled.
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
        """Do rows share pictures or clips? Wilson's interval would then be too narrow."""
        counted = [
            parts
            for parts in self.counts.values()
            if any(part != "dropped" for _, _, part in parts)
        ]
        return len(counted) < sum(given.verdict != "dropped" for given in self.verdicts)

    def notes(self) -> list[str]:
        """A line for each kind of problem: how many rows, and the first five."""
        return [
            f"{what}: {len(ids)} ({', '.join(ids[:5])}{', ...' * (len(ids) > 5)})"
            for what, ids in self.problems.items()
        ]


def score(
    name: str,
    rows: Sequence[Row],
    outputs: Outputs,
    protocol: str = "official",
    *,
    answer: Callable[[str], str] = rules.final_answer,
    lettered: bool = False,
    judge: Judge | None = None,
    nouns: Callable[[str], list[str]] | None = None,
    similar: Callable[[str, str], float] | None = None,
) -> Score:
    """The verdict on every output, and the measures by subset.

    outputs: row id -> raw text, or such pairs, or texts in the order of the rows. A missing output
    is wrong. Missing, empty and very long outputs are reported, and ids without a row or with two
    outputs (the first counts). The rule decides on an empty output (POPE: a yes).
    answer: applied before an official rule; `str` scores raw text. The paper's rule has its own.
    lettered: yes/no questions were asked with options A and B, as in training. "B" or "B. no" then
    stands for the option's text, because official rules know no letters.
    judge: for rows that no rule decides (free text in MMBench, MathVista, MMVU). Without a judge,
    or where it fails, they are undecided.
    nouns, similar: for AMBER's descriptions, from `amber_tools()`. Without them these are
    undecided.
    Raises ValueError for an unknown benchmark or protocol.
    """
    if name not in TABLE:
        raise ValueError(f"{name!r} is not one of {', '.join(TABLE)}")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol: {protocol!r} is not one of {', '.join(PROTOCOLS)}")
    benchmark, by_paper = TABLE[name], protocol == "paper" and TABLE[name].has_paper_rule
    rows, texts, problems = _matched(rows, outputs)
    verdicts, open_cases = {}, []
    for row in rows:
        raw, form = texts.get(row.id), benchmark.paper_form(row) if by_paper else None
        is_left_out = by_paper and form is None
        if is_left_out:
            given = Verdict(row.id, "dropped")
        elif raw is None:
            given = Verdict(row.id, "wrong")
            problems["missing prediction, counted as wrong"].append(row.id)
        elif by_paper:
            _, solution, problem_type = form
            is_right = rules.paper_correct(raw, solution, problem_type)
            given = Verdict(row.id, right_or_wrong(is_right), rules.paper_answer(raw))
        else:
            text = answer(raw)
            if lettered and row.kind == "yes/no":
                letter = answers.read(text, "multiple choice") if len(text) < 200 else None
                text = row.options.get(letter, text)
            given = _official(benchmark, row, raw, text, (nouns, similar), problems)
            if given.verdict == "undecided" and judge and benchmark.judge_prompt:
                open_cases.append((row, text[-LONG:]))
        verdicts[row.id] = given
        if raw is not None and not raw.strip() and not is_left_out:
            problems[f"empty output, {given.verdict} by the {protocol} rule"].append(row.id)
        if raw is not None and len(raw) > LONG:
            problems[f"output of more than {LONG} characters"].append(row.id)
    if open_cases:
        verdicts |= _judged(benchmark, open_cases, judge, problems)
    counts: dict[str, Counter] = defaultdict(Counter)
    for cluster, parts in benchmark.count(protocol, rows, verdicts, problems):
        counts[cluster].update(parts)
    metrics = measures(name, protocol, total_of(counts))
    in_order = [verdicts[row.id] for row in rows]
    return Score(name, protocol, in_order, metrics, dict(problems), dict(counts))


def _official(
    benchmark: Benchmark, row: Row, raw: str, text: str, tools: Tools, problems: dict
) -> Verdict:
    """The publisher's verdict on the answer `text` of the output `raw`."""
    verdict, said = benchmark.verdict(row, text, tools)
    if raw.strip() and (not text.strip() or (verdict == "dropped" and text != raw)):
        # a rule's default must not stand for an answer that was not given
        verdict, said = "wrong", None
        problems["output without an answer, counted as wrong"].append(row.id)
    given = Verdict(row.id, verdict, said)
    if problem := benchmark.problem(row, text, given):
        problems[problem].append(row.id)
    return given


def _judged(
    benchmark: Benchmark, cases: list[tuple[Row, str]], judge: Judge, problems: dict
) -> dict[str, Verdict]:
    """The judge's verdicts, where it gave one in the form asked for."""
    found = {}
    replies = judge([benchmark.judge_prompt(*case) for case in cases])
    for (row, _), reply in zip(cases, replies, strict=True):
        if reply is None:
            problems["judge failed, undecided"].append(row.id)
            continue
        found[row.id] = Verdict(row.id, *benchmark.judge_reply(row, reply))
        if found[row.id].verdict == "undecided":
            what = "judge's reply is not in the form asked for, undecided"
            problems[what].append(row.id)
    return found


def _matched(
    rows: Sequence[Row], outputs: Outputs
) -> tuple[list[Row], dict[str, str], dict[str, list[str]]]:
    """Each row once, the raw text of each row that has one, and the problems."""
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
    twice = [key for key, n in said.items() if n > 1]
    problems["prediction given twice, the first counted"] += twice
    texts = {str(key): str(text) for key, text in reversed(list(pairs)) if text is not None}
    problems = {what: ids for what, ids in problems.items() if ids}
    return list(unique.values()), texts, defaultdict(list, problems)


# --- measures -------------------------------------------------------------------------------------


def total_of(counts: Mapping[str, Counter]) -> Counter:
    """The counts of all clusters together."""
    total = Counter()
    for parts in counts.values():
        total.update(parts)
    return total


def measures(name: str, protocol: str, total: Counts) -> Metrics:
    """All measures from counts, over all clusters or a sample of them."""
    benchmark = TABLE[name]
    found = benchmark.measures(protocol, Counter(total))
    mean, members = benchmark.mean
    members = [found[member] for member in members if member in found]
    for measure in dict.fromkeys(measure for member in members for measure in member):
        parts = [member[measure] for member in members if measure in member]
        values = [part.value for part in parts]
        value = None if None in values else sum(values) / len(values)
        counted = (sum(getattr(part, key) for part in parts) for key in COUNTED)
        found.setdefault(mean, {})[measure] = Metric(value, *counted)
    return dict(found)


# --- intervals and comparisons --------------------------------------------------------------------


def _resampled(scores: Sequence[Score], samples: int, seed: int) -> list[list[Metrics]]:
    """[scores][samples]: the measures of each score over the same resampled clusters."""
    import numpy as np

    clusters = list(scores[0].counts)
    if any(set(score.counts) != set(clusters) for score in scores):
        raise ValueError("the scores are not over the same pictures or clips")
    if not clusters:
        return [[] for _ in scores]
    n, found = len(clusters), []
    weights = np.random.default_rng(seed).multinomial(n, [1 / n] * n, size=samples)
    for score in scores:
        keys = sorted({key for parts in score.counts.values() for key in parts})
        table = [[score.counts[cluster][key] for key in keys] for cluster in clusters]
        totals = (dict(zip(keys, map(float, row))) for row in weights @ np.array(table))
        found.append([measures(score.name, score.protocol, total) for total in totals])
    return found


def _value(found: Metrics, subset: str, measure: str) -> float | None:
    metric = found.get(subset, {}).get(measure)
    return metric.value if metric else None


def _middle_95(ordered: list[float]) -> tuple[float, float]:
    return ordered[int(0.025 * len(ordered))], ordered[int(0.975 * len(ordered))]


def intervals(
    score: Score, measure: str, samples: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of a bootstrap over clusters, for a measure in every subset.

    Rows about one picture or clip are not independent, so whole clusters are drawn. Samples in
    which the measure divides by zero are left out, and subsets without any other sample.
    """
    [found], result = _resampled([score], samples, seed), {}
    for subset in score.metrics:
        values = [value for one in found if (value := _value(one, subset, measure)) is not None]
        if values:
            result[subset] = _middle_95(sorted(values))
    return result


def difference(
    a: Score, b: Score, subset: str, measure: str, samples: int = 1000, seed: int = 0
) -> dict[str, float | None]:
    """b minus a, by a paired bootstrap over clusters: value, low, high (95 %), two-sided p.

    p is twice the smaller share of samples on either side of zero. All are None if the measure has
    no value. Raises ValueError if the scores are not over the same clusters.
    """
    pairs = (
        [_value(one, subset, measure) for one in both]
        for both in zip(*_resampled([a, b], samples, seed))
    )
    values = sorted(y - x for x, y in pairs if None not in (x, y))
    first, second = (_value(score.metrics, subset, measure) for score in (a, b))
    if not values or None in (first, second):
        return {"value": None, "low": None, "high": None, "p": None}
    side = min(sum(v <= 0 for v in values), sum(v >= 0 for v in values)) / len(values)
    low, high = _middle_95(values)
    return {"value": second - first, "low": low, "high": high, "p": min(1.0, 2 * side)}


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test, over independent rows that two runs got right.

    Under the null hypothesis a row that only one run got right is either's with probability 1/2.
    """
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
