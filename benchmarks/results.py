"""The files and tables of an evaluation, and the comparison of two."""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.base import Row
from benchmarks.score import (
    PROTOCOLS,
    Score,
    difference,
    intervals,
    mcnemar,
    measures,
    total_of,
)
from benchmarks.table import TABLE
from engine import DataError
from engine.files import read_jsonl
from measures import rate_of

SETTINGS = (  # whose differences --compare prints
    "model asked template limit max_new_tokens max_pixels max_frames dtype sample".split()
)


# --- of one evaluation ----------------------------------------------------------------------------


def notes(found: dict[str, Score]) -> list[str]:
    """The problems, a line each, with the protocol's name where only one protocol has it."""
    by_protocol = {protocol: score.notes() for protocol, score in found.items()}
    whose: dict[str, list[str]] = {}
    for protocol, lines in by_protocol.items():
        for line in lines:
            whose.setdefault(line, []).append(protocol)
    return [
        line if len(of) == len(found) or of[0] in line else f"{of[0]}: {line}"
        for line, of in whose.items()
    ]


def first_outputs(lines: list[dict]) -> dict[str, dict]:
    """By id, the line that counts: the first with an output, as in `score`."""
    found = {}
    for line in lines:
        if found.get(line["id"], {}).get("output") is None:
            found[line["id"]] = line
    return found


def unreadable(lines: list[dict]) -> list[str]:
    """A line on the rows without an output; none without such rows."""
    ids = [line["id"] for line in first_outputs(lines).values() if line["output"] is None]
    shown = f"{len(ids)} ({', '.join(ids[:5])})"
    return [f"clip or picture cannot be decoded: {shown}"] if ids else []


def verdict_lines(found: dict[str, Score], rows: list[Row], lines: list[dict]) -> Iterator[dict]:
    """One line for each row: prompt, raw output, and by protocol the answer and the verdict."""
    said = first_outputs(lines)
    verdicts = {protocol: {v.id: v for v in score.verdicts} for protocol, score in found.items()}
    for row in rows:
        line = {"id": row.id, "cluster": row.cluster}
        line |= {key: said[row.id][key] for key in ("prompt", "output")}
        for protocol, of in verdicts.items():
            given = of[row.id]
            line[protocol] = {"answer": given.answer, "verdict": given.verdict}
        yield line


def as_json(score: Score) -> dict:
    """Metrics by subset, with a 95 % interval for the headline's measure.

    Wilson's interval, or a bootstrap over pictures and clips if rows share one or the measure is no
    plain share. Undecided rows give the least and the most that the value can be instead.
    """
    subset, measure = TABLE[score.name].headline[score.protocol]
    metrics = {
        where: {name: dataclasses.asdict(metric) for name, metric in of.items()}
        for where, of in score.metrics.items()
    }
    bootstrap = functools.cache(lambda: intervals(score, measure))
    for where, of in metrics.items():
        one = of.get(measure, {"n": 0})
        if not one["n"] or one["value"] is None:
            continue
        if one["undecided"]:
            low, high = one["value"], min(1.0, one["value"] + one["undecided"] / one["n"])
            one |= {
                "low": low,
                "high": high,
                "interval": "none: what the undecided rows leave open",
            }
        elif one["right"] is not None and not score.clustered:
            wilson = rate_of(one["right"], one["n"])
            one |= {"low": wilson["low"], "high": wilson["high"], "interval": "Wilson"}
        elif where in bootstrap():
            low, high = bootstrap()[where]
            if low < high:  # else there are too few pictures to say anything
                how = "bootstrap over pictures or clips"
                one |= {"low": low, "high": high, "interval": how}
    return {"headline": [subset, measure], "metrics": metrics, "problems": score.problems}


def table(name: str, by_protocol: dict[str, Any]) -> str:
    """The scores of one benchmark as text, a line for each protocol and subset.

    Finer subsets ("subject: ...") are in scores.json only.
    """
    known = TABLE[name]
    lines = [("protocol", "subset", "measure", "%", "95 % interval", "n", "undecided")]
    for protocol in PROTOCOLS:
        found = by_protocol[protocol]
        subset, measure = found["headline"]
        for where in [subset, *(s for s in found["metrics"] if s != subset and ": " not in s)]:
            if one := found["metrics"].get(where, {}).get(measure):
                where = _with_members(name, where, found["metrics"])
                lines.append((protocol, where, measure, *_cells(one)))
    widths = [max(len(str(line[k])) for line in lines) for k in range(len(lines[0]))]
    align = "<<<><><"
    out = [
        "  ".join(f"{x!s:{a}{w}}" for x, a, w in zip(line, align, widths)).rstrip()
        for line in lines
    ]
    for subset, of in by_protocol["official"]["metrics"].items():
        given = {m: one["value"] for m, one in of.items() if one["value"] is not None}
        if len(of) > 1 and given and ": " not in subset:
            others = ", ".join(f"{m} {100 * value:.1f}" for m, value in given.items())
            out.append(f"official, {subset}: {others}")
    if known.paper_number:
        out.append(f"published: {known.paper_number} (the paper's row Ours: {known.paper})")
    if by_protocol["asked"] != "direct":
        out.append(
            "asked with the stages of training: published official numbers are for the "
            "benchmark's own prompt, --direct"
        )
    elif known.paper_number:
        out.append(
            "asked with the benchmark's own prompt: the paper's rule wants the form that training "
            "asks for"
        )
    out.append(f"do not compare: {known.beware}")
    return "\n  ".join([known.title, *out])


def _with_members(name: str, subset: str, metrics: dict) -> str:
    """A mean's name, with the number of its members if some are missing."""
    mean, members = TABLE[name].mean
    there = sum(member in metrics for member in members)
    if subset == mean and there < len(members):
        return f"{mean} ({there} of {len(members)})"
    return subset


def _cells(one: dict) -> tuple[str, str, int, str]:
    """(percent, interval, n, undecided) of a metric."""
    value = "-" if one["value"] is None else f"{100 * one['value']:.1f}"
    both = f"[{100 * one['low']:.1f}, {100 * one['high']:.1f}]" if "low" in one else ""
    dropped = f", {one['dropped']} not counted" if one["dropped"] else ""
    return value, both, one["n"], f"{one['undecided']}{dropped}"


# --- of two evaluations ---------------------------------------------------------------------------


def counts_as_json(score: Score) -> dict[str, list]:
    """cluster -> [[subset, measure, part, number], ...]"""
    return {
        cluster: [[*key, n] for key, n in parts.items()] for cluster, parts in score.counts.items()
    }


def from_counts(name: str, protocol: str, counts: dict[str, list]) -> Score:
    """The score of `counts_as_json`, without verdicts and problems."""
    by_cluster = {
        cluster: Counter({tuple(key): n for *key, n in parts}) for cluster, parts in counts.items()
    }
    found = measures(name, protocol, total_of(by_cluster))
    return Score(name, protocol, [], found, {}, by_cluster)


FORM = "  {:<14} {:<9} {:<34} {:>6} {:>6}  {:<24} {:<8} {}"


def compare(first: Path, second: Path) -> None:
    """Print the difference of two evaluations: B minus A, by benchmark and protocol.

    A paired bootstrap over pictures and clips, and McNemar's test if rows are independent. Raises
    DataError if the rows are not the same.
    """
    folders = [f / "benchmarks" if (f / "benchmarks").is_dir() else f for f in (first, second)]
    for folder in folders:
        if not (folder / "scores.json").is_file():
            raise DataError(
                f"compare: {folder} has no scores.json. Give what eval.py --benchmarks has written"
            )
    scores, counts = (
        [json.loads((folder / f"{name}.json").read_text()) for folder in folders]
        for name in ("scores", "counts")
    )
    shared = [name for name in scores[0] if name in scores[1]]
    if not shared:
        raise DataError(f"compare: {folders[0]} and {folders[1]} have no benchmark in common")
    print(f"A: {folders[0]}\nB: {folders[1]}")
    a, b = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in folders)
    for key in SETTINGS:
        if a.get(key) != b.get(key):
            print(f"  {key}: {a.get(key)!r} in A, {b.get(key)!r} in B")
    print()
    head = ("benchmark", "protocol", "measure", "A", "B", "B - A [95 %], points")
    print(FORM.format(*head, "p", "McNemar's p"))
    for name in shared:
        rows = [_rows_by_id(folder / f"{name}.jsonl") for folder in folders]
        if odd := sorted(rows[0].keys() ^ rows[1].keys()):
            raise DataError(
                f"compare: {name}: rows are in one of them only: {len(odd)} "
                f"({', '.join(odd[:3])}). Evaluate both on the same rows, with the same --limit"
            )
        if scores[0][name]["judge"] != scores[1][name]["judge"]:
            print(f"  {name}: judged differently")
        for protocol in PROTOCOLS:
            headline = scores[0][name][protocol]["headline"]
            both = [from_counts(name, protocol, of[name][protocol]) for of in counts]
            print(_difference_line(name, protocol, headline, both, rows))


def _rows_by_id(file: Path) -> dict[str, dict]:
    return {line["id"]: line for line in read_jsonl(file, repair=False)}


def _difference_line(
    name: str, protocol: str, headline: list[str], scores: list[Score], rows: list[dict]
) -> str:
    subset, measure = headline
    label = f"{measure}, {subset}"
    try:
        found = difference(*scores, subset, measure)
    except ValueError as error:
        raise DataError(f"compare: {name}: {error}; evaluate both on the same rows") from error
    if found["value"] is None:
        nothing = ("-", "-", "undecided, or of nothing", "", "")
        return FORM.format(name, protocol, label, *nothing)
    values = [f"{100 * score.metrics[subset][measure].value:.1f}" for score in scores]
    value, low, high = (100 * found[key] for key in ("value", "low", "high"))
    points, p = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", f"{found['p']:.3f}"
    test = _mcnemar(protocol, measure, rows)
    return FORM.format(name, protocol, label, *values, points, p, test)


def _mcnemar(protocol: str, measure: str, rows: list[dict]) -> str:
    """p over the rows that both decide, if each has its own picture or clip."""
    verdicts = [{i: line[protocol]["verdict"] for i, line in of.items()} for of in rows]
    counted = [i for i in rows[0] if {v[i] for v in verdicts} <= {"right", "wrong"}]
    independent = len({rows[0][i]["cluster"] for i in counted}) == len(counted)
    if not (independent and measure == "accuracy" and counted):
        return "not by rows"
    return f"{mcnemar(*([v[i] == 'right' for i in counted] for v in verdicts)):.3f}"
