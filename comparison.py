"""Two evaluations compared, row by row: before and after RL, or the ends of two runs.

How a difference is judged: its 95 % interval comes from the rows themselves, each question being
compared with itself; where rows cannot be matched, from the two Wilson intervals (Newcombe). It
covers the choice of questions, not the choice of seed.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import stdev
from typing import Any

import yaml

import measures
from engine.files import read_jsonl

SIDES = {"before": "Before RL", "after": "After RL"}
NOTHING = "nothing was evaluated: the data have no test*.json, or the run has not reached it"

MEASURES = {  # of eval/*.json: which way is better (0: neither), and what it is
    "accuracy": (1, "questions answered rightly / questions"),
    "blind accuracy": (
        0,
        "questions answered rightly with the media of another row of their category: what needs no "
        "look",
    ),
    "paired": (1, "pairs with both questions right / pairs (VideoHallucer)"),
    "answerable captions": (
        1,
        "captions from which the text-only judge answers rightly / captions that it judged",
    ),
    "no verdict": (0, "captions that the judge gave no verdict on / captions it was to judge"),
    "answerable to itself": (
        1,
        "captions from which the policy itself, without the picture, answers rightly / captions "
        "(--caption_reward self)",
    ),
    "right, caption wrong": (
        -1,
        "right answers behind a caption that the judge cannot answer from or that names what is "
        "not there / questions, without those that it gave no verdict on",
    ),
    "both right": (1, "right answers behind any other caption / the same questions"),
    "slope": (
        0,
        "slope of right on answerable within the sampled responses of a question, times 100: how "
        "far a reward for answers is one for captions",
    ),
    "hallucinated objects": (
        -1,
        "objects that captions name and the picture lacks / objects named (CHAIR, objects)",
    ),
    "hallucinated captions": (
        -1,
        "captions with at least one such object / captions (CHAIR, sentences)",
    ),
    "coverage": (1, "objects relevant to the question that the caption names / relevant objects"),
    "format": (1, "responses that are exactly their stages, in order / responses"),
}
POPE = {  # of yes/no questions, yes being positive
    "f1": (1, "2 precision recall / (precision + recall) of yes, on yes/no questions (POPE)"),
    "yes ratio": (
        0,
        "yes/no questions answered yes / yes/no questions; best where it equals the share that is "
        "true",
    ),
}
BY_KIND = {  # shown for every category too
    *("accuracy", "answerable captions", "right, caption wrong", "both right", "slope"),
    "hallucinated objects",
}
# one row's part in a measure: (top, bottom) of the share, or a falsehood where it was not scored
PARTS = {
    "accuracy": lambda r: (r["right"], 1),
    "answerable captions": lambda r: r.get("answerable") is not None and (r["answerable"], 1),
    "no verdict": lambda r: "answerable" in r and (r["answerable"] is None, 1),
    "answerable to itself": lambda r: (
        r.get("answerable to itself") is not None and (r["answerable to itself"], 1)
    ),
    "blind accuracy": lambda r: r.get("blind") is not None and (r["blind"], 1),
    "right, caption wrong": lambda r: (
        r.get("answerable") is not None and (r["right"] and measures.caption_wrong(r), 1)
    ),
    "both right": lambda r: (
        r.get("answerable") is not None and (r["right"] and not measures.caption_wrong(r), 1)
    ),
    "slope": lambda r: "sampled" in r and measures.covariance(r),
    "hallucinated objects": lambda r: "captioned" in r and (len(r["hallucinated"]), r["captioned"]),
    "hallucinated captions": lambda r: "captioned" in r and (len(r["hallucinated"]) > 0, 1),
    "coverage": lambda r: "captioned" in r and (r["covered"], r["relevant"]),
    "format": lambda r: (r["format"], 1),
}


@dataclass
class Results:
    """What a run folder holds; a missing file is an empty list or dict."""

    name: str
    folder: Path
    config: dict
    sft: list[dict]
    rl: list[dict]
    scores: list[dict]
    selected: dict
    evals: dict[str, dict]  # side -> split -> {"metrics", "rows"}
    sides: dict[str, str] = field(default_factory=lambda: SIDES)  # side -> its title

    @property
    def compared(self) -> list[str]:
        """The two sides that are compared: of two runs their ends, which share a beginning."""
        return list(self.sides)[-2:]

    @classmethod
    def read(cls, folder: Path) -> "Results":
        return cls(
            name=folder.resolve().name,
            folder=folder,
            config=_read(folder / "config.yaml", {}) or {},
            sft=_read(folder / "sft" / "metrics.jsonl", []),
            rl=_read(folder / "rl" / "metrics.jsonl", []),
            scores=_read(folder / "select" / "scores.jsonl", []),
            selected=_read(folder / "select" / "selected.json", {}),
            evals={
                side: found
                for side in SIDES
                if (found := _read(folder / "eval" / f"{side}.json", {}))
            },
        )

    def _splits(self, corrupted: bool) -> list[str]:
        sides = self.evals.values()
        found = [n for of in sides for n, x in of.items() if ("corruption" in x) == corrupted]
        return list(dict.fromkeys(found))

    @property
    def splits(self) -> list[str]:
        return self._splits(corrupted=False)

    @property
    def corrupted(self) -> list[str]:
        """Sets on which a right answer was guessed, so more of them are no improvement."""
        return self._splits(corrupted=True)


def _read(file: Path, missing: Any) -> Any:
    """A YAML, JSON or JSONL file; of a JSONL file that may still grow, the complete lines."""
    if not file.exists():
        return missing
    if file.suffix == ".jsonl":
        return read_jsonl(file, repair=False)
    text = file.read_text(encoding="utf-8")
    return yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)


def contrast_of(one: Path, two: Path) -> Results:
    """Two runs as one: what was before RL, where both began alike, and what came after it in each.
    Exits where one of them is not finished, or where they share no test set."""
    runs = [Results.read(folder) for folder in (one, two)]
    for run in runs:
        if "after" not in run.evals:
            sys.exit(f"error: {run.folder} has no evaluation after RL (eval/after.json)")
    names = [run.name for run in runs]
    if names[0] == names[1]:
        names = ["/".join(run.folder.resolve().parts[-2:]) for run in runs]
    before = [
        {
            split: [row["text"] for row in scored["rows"]]
            for split, scored in run.evals["before"].items()
        }
        if "before" in run.evals
        else {}
        for run in runs
    ]
    evals = {"a": runs[0].evals["after"], "b": runs[1].evals["after"]}
    asked = [
        {
            split: [(r["id"], r["problem"], r["solution"]) for r in x["rows"]]
            for split, x in e.items()
        }
        for e in evals.values()
    ]
    shared = [split for split in asked[0] if split in asked[1]]
    if not shared or any(asked[0][split] != asked[1][split] for split in shared):
        sys.exit(f"error: {one} and {two} were not evaluated on the same rows")
    evals = {side: {split: of[split] for split in shared} for side, of in evals.items()}
    sides = {"a": names[0], "b": names[1]}
    if before[0] == before[1] and before[0]:
        evals = {"before": runs[0].evals["before"], **evals}
        sides = {"before": SIDES["before"], **sides}
    differ = {
        name: f"{json.dumps(runs[0].config.get(name))} | {json.dumps(runs[1].config.get(name))}"
        for name in {**runs[0].config, **runs[1].config}
        if runs[0].config.get(name) != runs[1].config.get(name)
    }
    return replace(runs[1], evals=evals, sides=sides, config=differ)


@dataclass
class Line:
    """One measure of one held-out set, before and after, as shares in [0, 1] with their
    intervals."""

    split: str
    label: str
    better: int
    before: dict | None
    after: dict | None
    interval: tuple[float, float] | None = None  # of after - before
    headline: bool = False
    truth: float | None = None  # the value that would be right, where that is neither 0 nor 1
    on_screen: bool = True  # in the terminal's table too

    @property
    def verdict(self) -> str:
        """better or worse where the difference's interval leaves out 0; '' where nothing can be
        said."""
        if not self.interval or not self.better:
            return ""
        if self.interval[0] <= 0 <= self.interval[1]:
            return "no clear change"
        return "better" if (self.interval[0] > 0) == (self.better > 0) else "worse"

    @property
    def difference(self) -> str:
        """In points, with its interval."""
        if not self.before or not self.after:
            return ""
        points = f"{100 * (self.after['value'] - self.before['value']):+.1f}"
        return points + (
            " [{:+.1f}, {:+.1f}]".format(*(100 * x for x in self.interval)) if self.interval else ""
        )


def compare(run: Results) -> Iterator[Line]:
    """Every measure of every held-out set that at least one evaluation gives; accuracy by category
    as well."""
    for split in run.splits:
        nothing = {"metrics": {}, "rows": []}
        scored = [run.evals.get(side, {}).get(split, nothing) for side in run.compared]
        metrics, rows = [s["metrics"] for s in scored], [s["rows"] for s in scored]
        for name, (better, _) in MEASURES.items():
            pair = [m.get(name) for m in metrics]
            if any(pair):
                label = "paired accuracy" if name == "paired" else name
                yield Line(
                    split,
                    label,
                    better,
                    *pair,
                    difference_interval(name, pair, rows),
                    headline=True,
                )
            by_category = [m.get("by category", {}) for m in metrics]
            categories = sorted({*by_category[0], *by_category[1]}) if name in BY_KIND else []
            for category in categories if len(categories) > 1 else []:
                pair = [kinds.get(category, {}).get(name) for kinds in by_category]
                some = [[r for r in side if r["category"] == category] for side in rows]
                if any(pair):
                    interval = difference_interval(name, pair, some)
                    on_screen = name == "accuracy"
                    label = f"- {category}"
                    yield Line(split, label, better, *pair, interval, on_screen=on_screen)
        pope = [m.get("existence") for m in metrics]
        truth = next(map(true_yes, filter(None, pope)), None)
        for name, (better, _) in POPE.items() if any(pope) else ():
            pair = [found and {"value": found[name], "n": found["n"]} for found in pope]
            if name == "f1":
                yield Line(split, "F1 of yes", better, *pair)
            else:
                label = "said yes" + (f" (true: {truth:.0%})" if truth is not None else "")
                yield Line(split, label, better, *pair, truth=truth)
    for split in run.corrupted:
        scored = [run.evals.get(side, {}).get(split) for side in run.compared]
        pair = [s and s["metrics"]["accuracy"] for s in scored]
        rows = [s["rows"] if s else [] for s in scored]
        yield Line(split, "accuracy", 0, *pair, difference_interval("accuracy", pair, rows))


def difference_interval(
    name: str, pair: list[dict | None], rows: list[list[dict]]
) -> tuple[float, float] | None:
    """95 % interval of after - before, for a share = sum(top) / sum(bottom) over rows.

    Every row is compared with itself: its linearised ratio is (top - share * bottom) /
    mean(bottom), for a plain share top - share, and the interval follows from the spread over rows
    of its change. With fewer than 20 rows in common, none as for pairs, or no change at all,
    Newcombe's interval from the two Wilson intervals, too wide for the same questions.
    """
    if not all(pair):
        return None
    known = [
        {r["id"]: part for r in side if (part := name in PARTS and PARTS[name](r))} for side in rows
    ]
    shared = [i for i in known[0] if i in known[1]]
    totals = [[sum(side[i][k] for i in shared) for k in (0, 1)] for side in known]
    if len(shared) < 20 or not all(bottom for _, bottom in totals):
        return newcombe(*pair)
    share = [top / bottom for top, bottom in totals]
    linear = [
        [(side[i][0] - share[k] * side[i][1]) * len(shared) / totals[k][1] for i in shared]
        for k, side in enumerate(known)
    ]
    half = 1.96 * stdev(b - a for a, b in zip(*linear, strict=True)) / len(shared) ** 0.5
    return (share[1] - share[0] - half, share[1] - share[0] + half) if half else newcombe(*pair)


def newcombe(p: dict, q: dict) -> tuple[float, float]:
    """95 % interval of q - p from the two shares' own intervals, as if they came from different
    questions."""
    below = ((q["value"] - q["low"]) ** 2 + (p["high"] - p["value"]) ** 2) ** 0.5
    above = ((q["high"] - q["value"]) ** 2 + (p["value"] - p["low"]) ** 2) ** 0.5
    return q["value"] - p["value"] - below, q["value"] - p["value"] + above


def true_yes(pope: dict) -> float | None:
    """The share of yes/no questions whose truth is yes: precision x (said yes) = recall x (true
    yes) = hits."""
    return pope["yes ratio"] * pope["precision"] / pope["recall"] if pope["recall"] else None


def percent(rate: dict | None) -> str:
    if not rate:
        return "-"
    low, high = (round(100 * rate.get(end, 0.0), 1) + 0.0 for end in ("low", "high"))  # no "-0.0"
    interval = f" [{low:.1f}, {high:.1f}]" if "low" in rate else ""
    return f"{100 * rate['value']:.1f}{interval}"


def table(folder: Path) -> str:
    """The before-and-after table in ASCII (but for the data's own names), in percent and points."""
    return table_of(Results.read(Path(folder)))


def table_of(run: Results) -> str:
    if not run.evals:
        return NOTHING
    out, split = [], None
    both = all(side in run.evals for side in run.compared)
    one, two = (run.sides[side][-20:] for side in run.compared)  # names differ at their ends
    for line in compare(run):
        if not line.on_screen:
            continue
        if line.split != split:
            split = line.split
            out += ["", f"{split:<27}{one:<24}" + f"{two:<22}points" * both]
        cells = (
            f"  {line.label:<24} {percent(line.before):<20}"
            + f" -> {percent(line.after):<21}" * both
        )
        out.append(f"{cells} {line.difference:<21} {line.verdict}".rstrip())
    about = (
        "percent [95% interval]"
        + "; better, worse: the interval of the difference excludes 0" * both
    )
    return "\n".join([*out[1:], "", about])
