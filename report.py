"""Tables and figures from a run folder: one self-contained report.html, and a table for the
terminal.

    python report.py RUN_FOLDER

The page needs no network and no JavaScript: figures are inline SVG, pictures are base64. What the
run folder lacks (an unfinished run, --method sft, no captions) is left out or said in a sentence.
Text of models and data is escaped.

How a difference is judged: its 95 % interval comes from the rows themselves, each question before
and after being compared with itself; where rows cannot be matched, from the two Wilson intervals
(Newcombe). It covers the choice of questions, not the choice of seed.
"""

import argparse
import base64
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import reasoning
from engine.files import read_jsonl, rewrite
from engine.media import gallery_file

STAGES = {"prethink": "Planning", "caption": "Caption", "think": "Thinking", "answer": "Answer"}
SIDES = {"before": "Before RL", "after": "After RL"}
NOTHING = "nothing was evaluated: the data have no test*.json, or the run has not reached it"
PICTURES = 4  # gallery rows per held-out set
NEARLY_NONE = 1 / 3  # a category that keeps less than this part of its share is warned about
POINTS = 3000  # most dots in the scatter; more only make the page heavy

MEASURES = {  # of eval/*.json: which way is better (0: neither), and what it is
    "accuracy": (1, "questions answered rightly / questions"),
    "paired": (1, "pairs with both questions right / pairs (VideoHallucer)"),
    "answerable captions": (
        1,
        "captions from which the text-only judge answers rightly / captions that it judged",
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
# one row's part in a measure: (top, bottom) of the share, or a falsehood where it was not scored
PARTS = {
    "accuracy": lambda r: (r["right"], 1),
    "answerable captions": lambda r: r.get("answerable") is not None and (r["answerable"], 1),
    "hallucinated objects": lambda r: "captioned" in r and (len(r["hallucinated"]), r["captioned"]),
    "hallucinated captions": lambda r: "captioned" in r and (len(r["hallucinated"]) > 0, 1),
    "coverage": lambda r: "captioned" in r and (r["covered"], r["relevant"]),
    "format": lambda r: (r["format"], 1),
}
METRICS = {  # of metrics.jsonl, over the responses (tokens, prompts) of one update
    "reward/accuracy": "sampled responses with the right answer / responses",
    "reward/format": "sampled responses that are exactly their stages / responses",
    "reward/caption": "sampled captions from which the judge answers rightly / captions that it "
    "judged",
    "kl": "mean over response tokens of the estimator kl_kind of the KL from the cold-start "
    "model, in nats; k3 is r - 1 - log r with r = pi_ref / pi",
    "entropy": "mean over response tokens of -sum_v p(v) log p(v), v the next token, in nats",
    "length": "response tokens / responses",
    "truncated": "responses cut off at max_new_tokens / responses",
    "tied": "groups whose responses all earn the same / groups; their advantage is exactly 0",
    "clipped": "response tokens whose gradient the clip of Eq. 1 cuts off / response tokens",
    "loss": "RL: Eq. 1, near 0 on fresh samples because advantages are centred, though its "
    "gradient is not; cold start: mean of -log p over response tokens",
    "nce": "Eq. 4: mean over active anchors of -log(sum of exp(s / T) over positives / the same "
    "sum over all others)",
    "nce/active": "anchors with both a positive and a negative; only they enter Eq. 4, which is 0 "
    "without any",
    "nce/positive": "pairs with a gradient cosine at or below tau / pairs; these are the "
    "positives of Eq. 4",
    "nce/cosine_mean": "mean gradient cosine of all pairs of prompts in the batch",
    "nce/cosine_sd": "standard deviation of these cosines",
    "unknown": "rewards that the judge could not give / responses; left out, never counted as 0",
    "grad_norm": "Euclidean norm of the gradient before clipping",
    "lr": "learning rate of the update",
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
    evals: dict[str, dict]  # "before", "after" -> split -> {"metrics", "rows"}

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

    @property
    def splits(self) -> list[str]:
        return list(dict.fromkeys(split for scored in self.evals.values() for split in scored))


def _read(file: Path, missing: Any) -> Any:
    """A YAML, JSON or JSONL file; of a JSONL file that may still grow, the complete lines."""
    if not file.exists():
        return missing
    if file.suffix == ".jsonl":
        return read_jsonl(file, repair=False)
    text = file.read_text(encoding="utf-8")
    return yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)


# --- before and after -----------------------------------------------------------------------------


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
        scored = [run.evals.get(side, {}).get(split, {"metrics": {}, "rows": []}) for side in SIDES]
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
            categories = sorted({*by_category[0], *by_category[1]}) if name == "accuracy" else []
            for category in categories if len(categories) > 1 else []:
                pair = [rates.get(category) for rates in by_category]
                some = [[r for r in side if r["category"] == category] for side in rows]
                yield Line(
                    split, f"- {category}", better, *pair, difference_interval(name, pair, some)
                )
        pope = [m.get("existence") for m in metrics]
        truth = next(map(true_yes, filter(None, pope)), None)
        for name, (better, _) in POPE.items() if any(pope) else ():
            pair = [found and {"value": found[name], "n": found["n"]} for found in pope]
            if name == "f1":
                yield Line(split, "F1 of yes", better, *pair)
            else:
                label = "said yes" + (f" (true: {truth:.0%})" if truth is not None else "")
                yield Line(split, label, better, *pair, truth=truth)


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
    interval = f" [{abs(100 * rate['low']):.1f}, {100 * rate['high']:.1f}]" if "low" in rate else ""
    return f"{100 * rate['value']:.1f}{interval}"


def table(folder: Path) -> str:
    """The before-and-after table in ASCII (but for the data's own names), in percent and points."""
    run = Results.read(Path(folder))
    if not run.evals:
        return NOTHING
    out, split, both = [], None, len(run.evals) == len(SIDES)
    for line in compare(run):
        if line.split != split:
            split = line.split
            out += ["", f"{split:<27}{SIDES['before']:<24}" + f"{SIDES['after']:<22}points" * both]
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


# --- figures --------------------------------------------------------------------------------------

# Colours that stand for CSS variables: matplotlib draws with them, `svg` replaces them, so that a
# figure follows the page's light or dark theme. Lines also differ by dashes and dots by shape,
# never by colour alone.
INK, GRID, ONE, TWO, THREE = "#010101", "#010102", "#010103", "#010104", "#010105"
THEME = {
    INK: "currentColor",
    GRID: "var(--line)",
    ONE: "var(--one)",
    TWO: "var(--two)",
    THREE: "var(--three)",
}
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "grid.color": GRID}
STYLE |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False)
STYLE |= dict.fromkeys(("axes.grid", "axes.axisbelow"), True)
STYLE |= dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
)

Drawing = tuple[str, Callable[[Axes], None]]  # what a figure says in words, and how it is drawn


def figure(title: str, text: str, draw: Callable[[Axes], None]) -> str:
    """One figure as inline SVG: the same text every time, ids of its own, colours of the page."""
    with matplotlib.rc_context(STYLE):
        drawing, out = Figure(figsize=(4.4, 2.6), layout="constrained"), io.StringIO()
        draw(drawing.subplots())
        drawing.savefig(
            out,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")),
        )
    svg, name = out.getvalue(), re.sub(r"\W+", "-", title)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    for colour, variable in THEME.items():
        svg = svg.replace(colour, variable)
    label = f'role="img" aria-label="{escape(f"{title}. {text}")}"'
    svg = re.sub(r'width="\S+" height="\S+"', lambda _: label, svg, count=1)
    return f"<figure>{svg}<figcaption><b>{escape(title)}.</b> {escape(text)}</figcaption></figure>"


def curves(
    rows: list[dict], keys: dict[str, str], text: str, extra=None, **limits
) -> Drawing | None:
    """Metrics (key -> label) over updates, each thin as logged and thick as a moving average; None
    without any."""
    window, found = max(1, len(rows) // 10), {}
    for key, label in keys.items():
        if points := [
            (row["step"], row[key]) for row in rows if key in row and row[key] == row[key]
        ]:  # not NaN
            found[label] = list(zip(*points, strict=True))

    def draw(axes: Axes) -> None:
        looks = ((ONE, "-"), (TWO, "--"), (THREE, "-."))
        for (label, (steps, values)), (colour, dashes) in zip(found.items(), looks, strict=False):
            mean = [
                fmean(values[max(0, i - window // 2) : i + window // 2 + 1])
                for i in range(len(values))
            ]
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.45)
            axes.plot(
                steps,
                mean,
                dashes,
                color=colour,
                linewidth=1.8,
                label=label,
                marker="." * (len(steps) == 1),
            )
        if extra:
            extra(axes)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
        axes.set(xlabel="update", **limits)

    ends = [
        f"{label} {fmean(v[:window]):.3g} → {fmean(v[-window:]):.3g}"
        for label, (_, v) in found.items()
    ]
    return (f"{text} First to last tenth: {'; '.join(ends)}.", draw) if found else None


def cosine_band(rows: list[dict], tau: float | None, axes: Axes) -> None:
    """One standard deviation around the mean gradient cosine, and the threshold."""
    steps, mean, sd = zip(
        *((r["step"], r["nce/cosine_mean"], r["nce/cosine_sd"]) for r in rows), strict=True
    )
    low, high = ([m + sign * s for m, s in zip(mean, sd, strict=True)] for sign in (-1, 1))
    axes.fill_between(steps, low, high, color=ONE, alpha=0.15, linewidth=0, label="± 1 sd")
    if tau is not None:
        axes.axhline(tau, color=TWO, linestyle="--", linewidth=1.2, label=f"tau = {tau}")


def selection(run: Results) -> Drawing | None:
    """Every scored prompt by mean and variance of its rewards, with the selection cut."""
    kept = set(run.selected.get("kept", ()))
    cut = min((s["variance"] for s in run.scores if s["id"] in kept), default=None)
    every = -(-len(run.scores) // POINTS)
    looks, counts = {"easy": (THREE, "o"), "medium": (ONE, "^"), "hard": (TWO, "s")}, []
    for name in looks:
        ids = [s["id"] for s in run.scores if s["class"] == name]
        counts.append(f"{len(ids)} {name} ({sum(i in kept for i in ids)} kept)")

    def draw(axes: Axes) -> None:
        for name, (colour, marker) in looks.items():
            x, y = (
                [s[key] for s in run.scores[::every] if s["class"] == name]
                for key in ("mean", "variance")
            )
            axes.scatter(
                x,
                y,
                s=12,
                marker=marker,
                facecolors="none",
                edgecolors=colour,
                linewidths=0.8,
                label=name,
            )
        if cut is not None:
            axes.axhline(cut, color=INK, linestyle="--", linewidth=1, label="cut")
        axes.legend(
            loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, columnspacing=1, handletextpad=0.3
        )
        axes.set(xlabel="mean reward", ylabel="variance of the reward", ylim=(0, None))

    drawn = f", 1 in {every} is drawn" if every > 1 else ""
    text = f"A mark is a prompt{drawn}: {', '.join(counts)}. "
    text += (
        "Not finished."
        if cut is None
        else f"The cut: {len(kept)} of {len(run.scores)} have a variance of {cut:.3f} or more."
    )
    return (text, draw) if run.scores else None


def selected_by_category(selected: dict) -> list[str]:
    """How many prompts of each category were kept ("" where there is one only), then what to be
    warned of."""
    judged = selected["of"] - selected.get("unjudged", 0)
    share, categories = len(selected["kept"]) / max(1, judged), selected.get("categories", {})
    counts = [f"{name}: {kept} of {of}" for name, (kept, of, _) in categories.items()]
    lines = [", ".join(counts) if len(counts) > 1 else ""]
    few = {
        k: v
        for k, v in categories.items()
        if share * v[1] >= 2 and v[0] < NEARLY_NONE * share * v[1]
    }
    if equal := [name for name, (_, of, tied) in few.items() if tied == of]:
        lines.append(
            f"warning: all responses to every prompt of {', '.join(equal)} earn the same: RL "
            "cannot train it"
        )
    few = [name for name in few if name not in equal]
    if few:
        remedy = (
            ""
            if selected.get("within")
            else ". --select_within category keeps up to the same share of each"
        )
        lines.append(
            f"warning: few prompts of {', '.join(few)} were kept, so RL hardly trains it{remedy}"
        )
    if selected.get("unjudged"):
        count = f"warning: {selected['unjudged']} of {selected['of']} prompts were not ranked"
        lines.append(f"{count}: the judge gave no verdict on most of their captions")
    return lines


def figures(run: Results) -> str:
    """All figures whose numbers the run has, and a sentence on those it has not."""
    rl, conflict = run.rl, [row for row in run.rl if "nce/active" in row]
    batch = min(run.config.get("prompts_per_step", 1), len(run.selected.get("kept", ())) or 10**9)
    anchors = [row | {"share": row["nce/active"] / batch} for row in conflict]
    rewards = {"reward/accuracy": "answer", "reward/caption": "caption", "reward/format": "format"}
    cosine = {"nce/cosine_mean": "mean"}
    band = partial(cosine_band, conflict, run.config.get("tau"))
    drawn = {
        "Rewards": curves(
            rl, rewards, "Means over sampled responses (paper, Figure 3).", ylim=(0, 1.02)
        ),
        "KL from the cold-start model": curves(rl, {"kl": "KL"}, "Nats per token."),
        "Entropy of the policy": curves(rl, {"entropy": "entropy"}, "Nats per token."),
        "Length of responses": curves(rl, {"length": "length"}, "Tokens."),
        "Tied groups": curves(
            rl, {"tied": "share"}, "Share of groups whose responses earn the same.", ylim=(0, None)
        ),
        "Gradient cosines": curves(
            conflict, cosine, "Between the prompts of an update; Eq. 4 parts them at tau.", band
        ),
        "Active anchors": curves(
            anchors,
            {"share": "share"},
            f"Share of {batch} prompts with pairs on both sides of tau.",
            ylim=(0, 1.05),
        ),
        "Cold-start loss": curves(
            run.sft, {"loss": "loss"}, "Mean of -log p of response tokens.", yscale="log"
        ),
        "Selection by reward variance": selection(run),
    }
    missing = ", ".join(title for title, made in drawn.items() if not made)
    shown = "".join(figure(title, *made) for title, made in drawn.items() if made)
    return f"<div class=figures>{shown}</div>" + (
        f"<p class=soft>Not in this run: {missing}.</p>" if missing else ""
    )


# --- the page -------------------------------------------------------------------------------------


def summary(run: Results, lines: list[Line]) -> str:
    """What the run did and what it changed, for the worse as for the better, in one paragraph of
    plain text."""
    cfg = run.config
    switches = {
        "four_stage": "the four reasoning stages",
        "caption_reward": "the Caption Reward",
        "selection": "selection by reward variance",
        "nce_weight": "the regulariser of Eq. 4",
    }
    with_what = (
        ", ".join(text for name, text in switches.items() if cfg.get(name))
        or "none of the paper's mechanisms"
    )
    did, warnings = [f"a cold start of {len(run.sft)} updates" if run.sft else "no cold start"], []
    if run.selected:
        of_each, *warnings = selected_by_category(run.selected)
        did.append(
            f"{len(run.selected['kept'])} of {run.selected['of']} prompts selected"
            + f" ({of_each})" * bool(of_each)
        )
    if cfg.get("method") != "sft":
        asked = "" if cfg.get("rl_epochs") else f" of {cfg.get('rl_steps', '?')}"
        did.append(f"{len(run.rl)}{asked} updates of reinforcement learning")
    text = [
        f"A run with {with_what}: {', '.join(did)}.",
        *(f"{line[0].upper()}{line[1:]}." for line in warnings),
    ]
    if "after" not in run.evals:
        why = (
            "the method is the cold start alone"
            if cfg.get("method") == "sft"
            else "the run has not come so far"
        )
        accuracy = [
            f"{line.split} {percent(line.before)} %" for line in lines if line.label == "accuracy"
        ]
        text.append(f"There is no evaluation after RL: {why}.")
        return " ".join(text + [f"Accuracy before it: {', '.join(accuracy)}."] * bool(accuracy))
    for verdict in ("better", "worse", "no clear change"):
        found = defaultdict(list)
        for line in lines:
            if line.headline and line.verdict == verdict:
                change = f" {100 * line.before['value']:.1f} → {100 * line.after['value']:.1f} %"
                found[line.label].append(
                    line.split + (change if verdict != "no clear change" else "")
                )
        if verdict == "no clear change":
            found = {
                label: ["every set"] if len(where) == len(run.splits) else where
                for label, where in found.items()
            }
        listed = "; ".join(f"{label} ({', '.join(where)})" for label, where in found.items())
        text.append(f"{verdict.capitalize()} after RL: {listed or 'nothing'}.")
    biased = [
        f"{line.split} {line.before['value']:.0%} → {line.after['value']:.0%}, true "
        f"{line.truth:.0%}"
        for line in lines
        if line.truth is not None and line.before and line.after
        if abs(line.after["value"] - line.truth) > abs(line.before["value"] - line.truth) + 0.05
    ]
    if biased:
        text.append(
            "Mind a growing bias on yes/no questions, in the share answered yes "
            f"({'; '.join(biased)})."
        )
    text.append(
        "Better and worse mean that the 95 % interval of the difference excludes 0. This is one "
        "seed."
    )
    return " ".join(text)


def comparison(lines: list[Line]) -> str:
    """The before-and-after table."""
    if not lines:
        return f"<p>{NOTHING.capitalize()}.</p>"
    body, split = [], None
    for line in lines:
        if line.split != split:
            split = line.split
            body.append(f"<tr class=set><th>{escape(split)}</th><td colspan=5></td></tr>")
        n = (line.after or line.before)["n"]
        cells = "".join(
            f"<td>{text.replace('[', '<small>[').replace(']', ']</small>')}</td>"
            for text in (percent(line.before), percent(line.after), line.difference)
        )
        tone, sign = {"better": ("good", "✓ "), "worse": ("bad", "✗ ")}.get(
            line.verdict, ("soft", "")
        )
        body.append(
            f"<tr{'' if line.headline else ' class=minor'}><th "
            f"scope=row>{escape(line.label)}</th><td>{n}</td>{cells}"
            f"<td class={tone}>{sign}{line.verdict}</td></tr>"
        )
    heads = "".join(
        f"<th scope=col>{head}</th>"
        for head in ("", "n", "Before RL, %", "After RL, %", "Points", "")
    )
    return (
        # focus lets keys scroll it
        "<div class=wide tabindex=0 role=region aria-label='before and after'><table>"
        f"<thead><tr>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        "<p class=soft>In brackets: 95 % intervals, Wilson's for a share; for a difference, each "
        "question is compared with itself, or, for pairs, for fewer than 20 questions and where "
        "no answer changed, Newcombe's, which takes the two sides for different questions. Even "
        "if nothing had changed, about one line in twenty would be called better or worse.</p>"
    )


def gallery(run: Results) -> str:
    """Held-out pictures with the response before and after, chosen by a rule that the page
    states."""
    parts = []
    for split in run.splits:
        sides = {
            side: {r["id"]: r for r in scored[split]["rows"]}
            for side, scored in run.evals.items()
            if split in scored
        }
        first, last = list(sides.values())[0], list(sides.values())[-1]
        cases = [(first[i], last[i]) for i in first if i in last]
        turned = [(a["right"], b["right"]) for a, b in cases]
        pictured = [(a, b) for a, b in cases if picture(run, split, a).exists()]
        pictured.sort(
            key=lambda case: (
                case[0]["right"] == case[1]["right"],
                case[0]["text"] == case[1]["text"],
            )
        )
        if pictured:
            gained, lost = turned.count((False, True)), turned.count((True, False))
            counts = f"{gained} turned right and {lost} turned wrong"
            note = (
                f"<p class=soft>Of all {len(cases)} rows, {counts}.</p>" if len(sides) > 1 else ""
            )
            shown = "".join(
                example(run, split, {side: sides[side][a["id"]] for side in sides})
                for a, _ in pictured[:PICTURES]
            )
            parts.append(f"<h3>{escape(split)}</h3>{note}{shown}")
    rule = (
        "<p>Not picked by hand. Of the first rows of each held-out set, whose pictures the run "
        f"keeps, you see up to {PICTURES}: first those whose answer turned right or wrong, then "
        "those whose response changed, then others, each in the order of the file. So changes "
        "are over-represented. <mark>Marked and underlined</mark>: an object that the caption "
        "names and the picture does not hold.</p>"
    )
    return (
        rule + "".join(parts)
        if parts
        else "<p>This run kept no pictures, or evaluated nothing.</p>"
    )


def picture(run: Results, split: str, row: dict) -> Path:
    return run.folder / "eval" / "gallery" / split / gallery_file(row["id"])


def example(run: Results, split: str, sides: dict[str, dict]) -> str:
    """One picture: the question, the right answer, and the stages of each response side by side."""
    row = next(iter(sides.values()))
    png = base64.b64encode(picture(run, split, row).read_bytes()).decode()
    options = "".join(f"<br>{escape(option)}" for option in row.get("options") or ())
    return (
        f'<article><div><img src="data:image/png;base64,{png}" '
        f'alt="picture or clip {escape(row["id"])}">'
        f"{escape(row['id'])}, {escape(row['category'])}</div>"
        f"<div class=question><b>{escape(row['problem'])}</b>{options}<br>"
        f"Right answer: <b>{escape(row['solution'])}</b></div>"
        f"{''.join(response(SIDES[side], row) for side, row in sides.items())}</article>"
    )


def response(title: str, row: dict) -> str:
    """One response by its stages; as it is, when it does not have the form that was asked for."""
    verdict = (
        "<span class=good>✓ right</span>" if row["right"] else "<span class=bad>✗ wrong</span>"
    )
    stages, cells = reasoning.parse(row["text"]), []
    for tag, name in STAGES.items():
        said = getattr(stages, tag)
        if said is None:
            continue
        text = marked(said, row.get("hallucinated") or []) if tag == "caption" else escape(said)
        if tag == "caption" and row.get("answerable") is not None:
            reply = f"{'✓' if row['answerable'] else '✗'} answers {escape(str(row.get('judge')))}"
            text += f"<small class=soft>judge, from the caption alone: {reply}</small>"
        cells.append(f"<dt>{name}</dt><dd>{text or '<i>empty</i>'}</dd>")
    if not row["format"]:
        cells.append(f"<dt>Not in form</dt><dd>{escape(row['text']) or '<i>empty</i>'}</dd>")
    return f"<section><h4>{title} {verdict}</h4><dl>{''.join(cells)}</dl></section>"


def marked(caption: str, phrases: list[str]) -> str:
    """The caption, escaped, with its hallucinated phrases in <mark>."""
    if not phrases:
        return escape(caption.strip())
    pattern = "|".join(rf"\b{re.escape(p)}\b" for p in sorted(phrases, key=len, reverse=True))
    pieces = re.split(f"({pattern})", caption.strip(), flags=re.IGNORECASE)
    return "".join(
        f"<mark>{escape(p)}</mark>" if i % 2 else escape(p) for i, p in enumerate(pieces)
    )


def definitions(entries: dict[str, str]) -> str:
    rows = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries.items()
    )
    return f"<dl class=terms>{rows}</dl>" if rows else "<p>Nothing yet.</p>"


def write(folder: Path) -> Path:
    """Write folder/report.html, whole or not at all. Returns its path."""
    run = Results.read(Path(folder))
    lines = list(compare(run))
    logged = {key for rows in (run.sft, run.rl) for row in rows[-1:] for key in row}
    sections = {
        "Before and after": comparison(lines),
        "Figures": figures(run),
        "Held-out pictures": gallery(run),
        "Configuration": definitions(
            {name: json.dumps(value) for name, value in run.config.items()}
        ),
        "What the table measures": definitions(
            {name: text for name, (_, text) in (MEASURES | POPE).items()}
        ),
        "What metrics.jsonl holds": definitions(
            {name: text for name, text in METRICS.items() if name in logged}
        ),
    }
    page = PAGE.format(
        title=escape(f"Run {run.name}, method {run.config.get('method', 'unknown')}"),
        summary=re.sub(
            r"(Better|Worse|No clear change) after RL:",
            r"<b>\g<0></b>",
            escape(summary(run, lines)),
        ),
        body="".join(f"<h2>{title}</h2>{text}" for title, text in sections.items()),
        css=CSS,
    )
    file = run.folder / "report.html"
    rewrite(file, page)
    return file


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,
  initial-scale=1">
<title>{title}</title><style>{css}</style></head>
<body><p class=soft>Ground What You See: report of a run</p><h1>{title}</h1><p
  class=summary>{summary}</p>
{body}</body></html>
"""
CSS = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1b1c1f; --soft: #5c6168; --line: #dfe2e6;
  --card: #f6f7f9;
  --one: #0b5fa5; --two: #b3500b; --three: #0a7a5a; --good: #0a6b3b; --bad: #a8201a; --mark:
  #ffe08a; }
@media (prefers-color-scheme: dark) { :root { --bg: #141518; --ink: #e9e9eb; --soft: #a3a8b0;
  --line: #34373d;
  --card: #1d1f23; --one: #6fb4f2; --two: #f2a25c; --three: #5fd0ac; --good: #6fd398; --bad:
  #ff8f87;
  --mark: #6b5200; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 70rem; background: var(--bg); color:
  var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0 0 1rem; line-height: 1.2; } h2 { margin: 2.5rem 0 .75rem; border-bottom: 1px solid
  var(--line); }
h3 { margin: 1.5rem 0 0; } h4 { margin: 0 0 .4rem; } .soft { color: var(--soft); margin: .25rem 0;
  } dd { margin: 0; }
.summary { max-width: 48rem; padding: .75rem 1rem; background: var(--card); border-left: 4px solid
  var(--one); }
.good { color: var(--good); } .bad { color: var(--bad); } .good, .bad { font-weight: 600; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .2rem .9rem .2rem 0; text-align: left; border-bottom: 1px solid var(--line);
  font-weight: normal; }
thead th, .set th { font-weight: 600; } .set th { padding-top: 1rem; } .minor { color: var(--soft);
  font-size: .9rem; }
.minor th { padding-left: 1rem; }
th:first-child { position: sticky; left: 0; background: var(--bg); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
  gap: 1.5rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figure svg text { font-family:
  inherit !important; }
figcaption { font-size: .875rem; color: var(--soft); } figcaption b { color: var(--ink); }
article { display: grid; grid-template-columns: 10.5rem 1fr 1fr; gap: .75rem 1.5rem; margin: 1rem
  0; padding: 1rem;
  background: var(--card); border-radius: .5rem; }
article > div:first-child { grid-row: span 2; font-size: .8rem; color: var(--soft); } .question {
  grid-column: 2 / -1; }
article img { max-width: 100%; display: block; margin-bottom: .25rem; } h4 span { margin-left:
  .5rem; }
dl { display: grid; grid-template-columns: minmax(5rem, max-content) 1fr; gap: .2rem 1rem; margin:
  0; }
dt { color: var(--soft); font-size: .875rem; line-height: 1.7; } section small { display: block; }
mark { background: var(--mark); color: inherit; text-decoration: underline wavy var(--bad); }
.terms dt { font-family: ui-monospace, monospace; }
@media (max-width: 40rem) { article, .terms { grid-template-columns: 1fr; } .question {
  grid-column: auto; }
  th:first-child { min-width: 7.5rem; white-space: normal; } article > div:first-child { grid-row:
  auto; }
  .terms dd { margin-bottom: .5rem; } }
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write report.html into a run folder and print its table."
    )
    parser.add_argument(
        "folder", type=Path, metavar="RUN_FOLDER", help="the --output_dir of train.py"
    )
    folder = parser.parse_args().folder
    if not (folder / "config.yaml").is_file():
        sys.exit(
            f"error: {folder} is not a run folder: it has no config.yaml. Give the --output_dir "
            "of train.py"
        )
    page = write(folder)
    print(table(folder))
    print(f"\nReport: {page}")


if __name__ == "__main__":
    main()
