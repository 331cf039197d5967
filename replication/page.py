"""What the results say of the claims: intervals over seeds, tables, figures.

A difference is taken seed by seed, because the arms of a seed share world, cold start and test
rows, and its 95 % interval is Student's over the seeds. A claim holds if the interval lies on its
side of 0 (or of the claim's margin), does not hold if it lies on the other side, and is undecided
if the interval contains 0 (the margin).
"""

import json
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.files import rewrite
from replication.arms import BASIS, CUES, TABLES
from replication.claims import CLAIMS, CRITERIA, IDEAS, Claim, of

# Student's 97.5 % quantiles for 1 degree of freedom and more
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MEASURES = {  # column: (set, measure, is more better)
    "accuracy": ("test", "accuracy", 1),
    "prior-breaking": ("test_prior_breaking", "accuracy", 1),
    "pairs": ("test_pairs", "paired", 1),
    "F1 of yes": ("test_pairs", "f1", 1),
    "answerable": ("test", "answerable captions", 1),
    "true": ("test", "true captions", 1),
    "right, caption wrong": ("test", "right, caption wrong", -1),
    "caption wrong if right": ("test", "caption wrong if right", -1),
    "both right": ("test", "both right", 1),
    "hallucinated": ("test", "hallucinated objects", -1),
    "coverage": ("test", "coverage", 1),
    "slope": ("test", "slope", 0),
    "entropy": ("test", "entropy", 0),
    "blind": ("test", "blind accuracy", 0),
}
IN_POINTS = {name for name in MEASURES if name not in ("entropy", "slope")}
SETS = {
    "test": "",
    "test_blank": " on blank pictures",
    "test_prior_breaking": ", prior-breaking",
    "test_pairs": ", pairs",
    "rise": " reward's rise",
    "early rise": " reward's rise by the second fifth of the updates, medium prompts",
    "representations": "s' distance to the anchor, % of the mean distance",
}


# --- results --------------------------------------------------------------------------------------


def values(metrics: dict, kinds: bool = True) -> dict:
    """The numbers of measures.metrics, without their intervals."""
    found = {
        name: round(part["value"], 5)
        for name, part in metrics.items()
        if isinstance(part, dict) and "value" in part
    }
    if right := found.get("right, caption wrong", 0) + found.get("both right", 0):
        found["caption wrong if right"] = round(found["right, caption wrong"] / right, 5)
    if "existence" in metrics:
        found["f1"] = round(metrics["existence"]["f1"], 5)
    if kinds:
        found["by category"] = {
            name: values(part, False) for name, part in metrics["by category"].items()
        }
    return found


def read(folder: Path) -> list[dict]:
    """Every result file of a folder."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*-seed*.json"))]


Results = dict[str, dict[int, dict]]  # arm -> seed -> what reproduce.collect has kept


def by_arm(results: list[dict]) -> Results:
    """Results by arm and seed. Exits where they do not belong together: where not all are of one
    code and one world; those of an arm of the same options; those of a seed of the same models and
    versions; and those of a seed that share a cold start of the same one."""
    arms: Results = defaultdict(dict)
    seen: dict[tuple, tuple] = {}
    for found in results:
        arm, seed, first = found["arm"], found["seed"], found["begins as"]
        arms[arm][seed] = found
        for what, group, value_ in (
            ("code or world", (), (found["code"], found["world"])),
            ("options", (arm,), found["config"]),
            ("models of the world, or versions", (seed,), (found["models"], found["versions"])),
            ("cold start", (seed, first), found["start"]),
        ):
            other, expected = seen.setdefault((what, *group), (f"{arm} of seed {seed}", value_))
            if value_ != expected:
                sys.exit(
                    f"error: the results of {arm} of seed {seed} and of {other} differ in {what} "
                    f"({value_} and {expected}), and are not mixed. Delete those that are not "
                    "wanted, or give another --results"
                )
    return arms


def value(found: dict, side: str, split: str, measure: str) -> float | None:
    """One number of a result: of an evaluation, of the rewards' rise, or of representations."""
    if side == "gain":
        before, after = (value(found, x, split, measure) for x in ("before", "after"))
        return None if None in (before, after) else after - before
    if split == "rise":
        return rise(found["curves"].get(f"{measure}, {side}", [None]))
    if split == "early rise":
        return rise(found["curves"].get(f"{side}, medium", [None])[:2])
    if split == "representations":
        return found["representations"].get(side, {}).get(measure)
    return found["metrics"].get(side, {}).get(split, {}).get(measure)


def rise(line: list[float | None]) -> float | None:
    """From the first to the last of the fifths of the updates."""
    return None if None in (line[0], line[-1]) else line[-1] - line[0]


def differences(claim: Claim, arms: Results) -> dict[int, float]:
    """The claimed difference by seed, for the seeds that have both sides of it."""
    found = {}
    for seed in sorted(set(arms[claim.more[0]]) & set(arms[claim.less[0]])):
        one, two = (
            value(arms[arm][seed], side, claim.split, claim.measure)
            for arm, side in (claim.more, claim.less)
        )
        if one is not None and two is not None:
            found[seed] = one - claim.share * two
    return found


def interval(numbers: list[float]) -> tuple[float, float] | None:
    """Student's 95 % interval of the mean; None for a single number."""
    n = len(numbers)
    if n < 2:
        return None
    half = STUDENT[min(n - 2, len(STUDENT) - 1)] * stdev(numbers) / n**0.5
    return fmean(numbers) - half, fmean(numbers) + half


def verdict(claim: Claim, numbers: list[float]) -> str:
    """holds, does not hold (the opposite does), undecided, or why there is none."""
    if (found := interval(numbers)) is None:
        return "no result" if not numbers else "one seed: no interval"
    low, high = sorted(claim.direction * x - claim.least for x in found)
    return "holds" if low > 0 else "does not hold" if high < 0 else "undecided"


# --- the page -------------------------------------------------------------------------------------


def points(x: float, measure: str, sign: bool = True) -> str:
    scale = 1 if measure in ("entropy", "slope") else 100
    return f"{scale * x:{'+' if sign else ''}.{3 if scale == 1 else 1}f}"


def claim_row(claim: Claim, arms: Results) -> str:
    found = list(differences(claim, arms).values())
    both, name = interval(found), claim.measure
    low, high = (points(x, name) for x in both) if both else ("", "")
    cells = [claim.words, name + SETS[claim.split], points(fmean(found), name)]
    cells += [f"[{low}, {high}]" if both else "-", str(len(found)), verdict(claim, found)]
    return f"| {' | '.join([*cells, claim.paper])} |"


def criteria_table(arms: Results) -> str:
    """What the world must show, with the difference of every seed in place of the paper's."""
    by_seed = [
        replace(c, paper=", ".join(points(x, c.measure) for x in differences(c, arms).values()))
        for c in CRITERIA
    ]
    return claim_table(by_seed, arms).replace("| the paper |", "| by seed |", 1)


def claim_table(claims: list[Claim], arms: Results) -> str:
    """A row for each claim whose arms have results, and a sentence on the others."""
    known = [claim for claim in claims if differences(claim, arms)]
    head = "| claim | measure | difference | 95 % interval | seeds | here | the paper |\n"
    head += "|---|---|---|---|---|---|---|\n"
    parts = [head + "\n".join(claim_row(claim, arms) for claim in known)] if known else []
    if missing := dict.fromkeys(claim.words for claim in claims if claim not in known):
        parts.append(f"Not measured yet: {'; '.join(missing)}.")
    return "\n\n".join(parts)


def idea_table(arms: Results) -> str:
    """What each idea brings, in points, with its interval; bold where that leaves out 0."""
    shown = ("accuracy", "prior-breaking", "pairs", "answerable", "true", "right, caption wrong",
             "hallucinated")  # fmt: skip
    lines = [f"| idea | seeds | {' | '.join(shown)} |", "|---" * (len(shown) + 2) + "|"]
    for words, more, less in IDEAS:
        cells, seeds = [], set()
        for split, measure, way in (MEASURES[name] for name in shown):
            found = differences(Claim(words, of(more), of(less), split, measure, way), arms)
            both, seeds = interval(list(found.values())), seeds | set(found)
            cells.append(points(fmean(found.values()), measure) if found else "-")
            if both:
                cells[-1] += f" [{points(both[0], measure)}, {points(both[1], measure)}]"
            if both and (both[0] > 0 or both[1] < 0):
                cells[-1] = f"**{cells[-1]}** {'better' if way * both[0] > 0 else 'worse'}"
        if seeds:
            lines.append(f"| {' | '.join([words, str(len(seeds)), *cells])} |")
    return "\n".join(lines)


def cue_table(arms: Results) -> str:
    """Accuracy of each training (row) on each input of the test set (column): mean, and its 95 %
    interval over seeds."""
    splits = ["test", *(f"test_{kind}" for kind in CUES)]
    lines = [f"| | seeds | intact | {' | '.join(CUES)} |", "|---" * (len(splits) + 2) + "|"]
    rows = [("before RL", "cue", "before")]
    rows += [(s["words"], name, "after") for name in TABLES["cue"] for s in arms[name].values()]
    for words, name, side in dict.fromkeys(rows):
        cells = []
        for split in splits:
            found = [value(s, side, split, "accuracy") for s in arms[name].values()]
            both = interval(found)
            cells.append(points(fmean(found), "accuracy", False))
            if both:
                low, high = (points(x, "accuracy", False) for x in both)
                cells[-1] += f" [{low}, {high}]"
        lines.append(f"| {words} | {len(arms[name])} | {' | '.join(cells)} |")
    return "\n".join(lines)


def acting_table(claims: list[Claim], arms: Results) -> str:
    """How far Eq. 4 acted in the arms of these claims: the least and the most of all fifths of
    their runs."""
    lines = ["| arm | seeds | active anchors | positive pairs, % |", "|---|---|---|---|"]
    for arm in dict.fromkeys(arm for claim in claims for arm, _ in (claim.more, claim.less)):
        some = [found for found in arms[arm].values() if found["curves"].get("nce/active")]
        if not some:
            continue
        active, positive = (
            [x for found in some for x in found["curves"][f"nce/{name}"]]
            for name in ("active", "positive")
        )
        lines.append(
            f"| {some[0]['words']} | {len(some)} | {min(active):.1f} to {max(active):.1f} of "
            f"{some[0]['config']['prompts_per_step']} | {100 * min(positive):.1f} to "
            f"{100 * max(positive):.1f} |"
        )
    return "\n".join(lines)


def kind_table(names: tuple[str, ...], arms: Results) -> str:
    """By kind of question on the test set: what stands behind the answers, mean over seeds."""
    columns = ("accuracy", "answerable captions", "right, caption wrong", "slope")
    lines = ["| arm | kind | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for name in names:
        for side in ["before" if name == "cold" else "after"]:
            tables = [
                found["metrics"][side]["test"]["by category"] for found in arms[name].values()
            ]
            for kind in sorted({kind for table in tables for kind in table}):
                cells = []
                for column in columns:
                    known = [t[kind][column] for t in tables if column in t.get(kind, {})]
                    cells.append(points(fmean(known), column, False) if known else "-")
                lines.append(f"| {name} | {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def arm_table(names: tuple[str, ...], arms: Results) -> str:
    """Mean and standard deviation over seeds of every measure, an arm a row."""
    head = ["arm", "seeds", "prompts seen", *MEASURES]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        some = list(arms[name].values())
        side = "after" if "after" in some[0]["metrics"] else "before"
        cells = [f"{some[0]['words']}", str(len(some))]
        cells.append(f"{fmean(s['prompts seen'] for s in some):.0f}")
        for split, measure, _ in MEASURES.values():
            known = [x for s in some if (x := value(s, side, split, measure)) is not None]
            spread = f" ± {points(stdev(known), measure, False)}" if len(known) > 1 else ""
            cells.append(points(fmean(known), measure, False) + spread if known else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(folder: Path, page: Path, order: list[str]) -> Path:
    """Write the page's measured part, the arms in this order, and its figures beside the results.
    What stands above the mark is written by hand and kept."""
    arms = by_arm(read(folder))
    parts = [MARK, about(arms)]
    if arms["plain"]:
        parts += ["## Does the world have the disease?", criteria_table(arms)]
        unseen = {arm: {s: r for s, r in some.items() if s > 1} for arm, some in arms.items()}
        parts += ["On seeds 2 and up, which helped to choose nothing:"]
        parts += [criteria_table(defaultdict(dict, unseen))]
        parts += ["## What each idea brings", idea_table(arms)]
        parts += ["Points on the test set, mean and 95 % interval; *better* or *worse* where that "
                  "leaves out 0."]  # fmt: skip
    if arms["cue"]:
        parts += ["## Trained on one input, tested on another", cue_table(arms)]
    parts.append("## Every claim")
    for title, (options, claims) in CLAIMS.items():
        if any(differences(claim, arms) for claim in claims):
            parts += [f"### {title}", f"`python reproduce.py {options}`", claim_table(claims, arms)]
            if "Figure 5" in title and arms["tau-0.1"]:
                parts += [
                    "How far Eq. 4 acted, from the least to the most over all fifths of the runs "
                    "(an anchor without a pair on one of the sides of tau does nothing):",
                    acting_table(claims, arms),
                ]
    parts += [
        "## Every arm",
        "Test set unless said; percent, mean ± standard deviation over seeds; the slope is a "
        "ratio, the entropy in nats. docs/evaluation.md defines the measures, docs/replication.md "
        "those of true captions and of wrong ones among right answers. The base and the cold "
        "starts are before RL.",
    ]
    # a table has been begun where it has more than what most tables share
    begun = [names for names in TABLES.values() if any(arms[n] for n in {*names} - BASIS)]
    rest = [arm for arm in order if not any(arm in names for names in TABLES.values())]
    alone = [arm for arm in order if arms[arm] and not any(arm in names for names in begun)]
    for title, names in (*TABLES.items(), ("Other", alone)):
        title = {"cue": "Hallucination-as-Cue", "neighbours": "Neighbours"}.get(title, title)
        title = f"Table {title}" if title.isdigit() else title
        known = tuple(arm for arm in order if arm in names and arms[arm])
        if known and (names in begun or names is alone):
            parts += [f"### {title}", arm_table(known, arms)]
    begun = {arm for names in begun for arm in names}
    begun |= {*rest} if arms["ours"] else set()  # Figure 5 and the like are of ours
    if missing := [arm for arm in order if not arms[arm] and arm in begun]:
        parts.append(f"Not run yet: {', '.join(missing)}.")
    shown = tuple(arm for arm in ("cold", "plain", "caption", "ours") if arms[arm])
    parts += ["## By kind of question", kind_table(shown, arms)] if shown else []
    parts.append(f"## Figures\n\n{figures(arms, folder)}")
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    rewrite(page, text.split(MARK)[0] + "\n\n".join(parts) + "\n")
    return page


MARK = "<!-- what follows is written by reproduce.py -->"


def about(arms: Results) -> str:
    """Where the results come from, in a paragraph."""
    some = [found for seeds in arms.values() for found in seeds.values()]
    if not some:
        return "There are no results yet."
    floors = [f["floor"] for f in arms["cold"].values() if f.get("floor")]
    floor = [
        f"{split} {100 * fmean(f[split] for f in floors):.0f} %" for split in (floors or [{}])[0]
    ]
    one, seeds = some[0], sorted({found["seed"] for found in some})
    commits = " and ".join(sorted({found["commit"] for found in some}))
    rl = [found for found in some if found["updates"]]
    numbers = {
        name: ", ".join(map(str, sorted({f[name] for f in rl})))
        for name in ("updates", "completions")
    }
    versions = " and ".join(
        sorted({", ".join(f"{k} {v}" for k, v in f["versions"].items()) for f in some})
    )
    said = f" From empty captions the judge answers rightly: {', '.join(floor)}." if floor else ""
    machines = " and ".join(sorted({f["machine"] for f in some}))
    return (
        f"{len(some)} results of {len(arms)} arms, seeds {', '.join(map(str, seeds))}; code "
        f"{one['code']}, commit {commits}, world {one['world']}, {versions}; {machines}; "
        f"{sum(f['seconds'] for f in some) / 3600:.1f} hours of arms. "
        f"Every arm with RL made {numbers['updates']} updates with {numbers['completions']} "
        f"completions.{said}"
    )


# --- figures --------------------------------------------------------------------------------------

CLASSES = {"easy": "tab:green", "medium": "tab:blue", "hard": "tab:red"}
STYLE = {"svg.hashsalt": "replication", "font.size": 9, "axes.spines.top": False}
STYLE |= {"axes.spines.right": False, "legend.frameon": False, "axes.grid": True}
STYLE |= {"grid.alpha": 0.3, "axes.axisbelow": True}


def figures(arms: Results, folder: Path) -> str:
    """Draw what there are results for; the Markdown that shows it."""
    drawn = {
        "disease": (
            "Disease and cure: the test set after the cold start and after RL. A dot is a seed.",
            tuple(arm for arm in ("cold", "plain", "caption", "ours") if arms[arm]), _disease,
        ),
        "figure-1b": (
            "Figure 1b: reward variance of the prompts trained on, and accuracy. A dot is a seed.",
            ("easy", "hard", "medium", "top30", "top60", "full"), _variance,
        ),
        "figure-3": (
            "Figure 3: both rewards over the updates, by class of prompt (all prompts).",
            ("full",), _rewards,
        ),
        "figure-4": (
            "Figure 4: entropy of the tokens of responses to test rows. A dot is a seed.",
            ("cold", "full", "easy", "hard", "medium", "top30", "top60"), _entropy,
        ),
        "figure-5a": (
            "Figure 5a: accuracy against tau, of the seeds that have every tau. A thin line is a "
            "seed.",
            ("tau-0.1", "tau-0.3", "ours", "tau-0.7", "tau-0.9"), _tau,
        ),
    }  # fmt: skip
    drawn["figure-5bc"] = (
        "Figure 5b, c: final-layer representations before and after RL with Eq. 4, in the first "
        "seed: the anchor, its positives (cosine at most tau) and its negatives.",
        ("ours",),
        _representations,
    )
    lines = []
    for name, (words, needed, draw) in drawn.items():
        file = folder / f"{name}.svg"
        if not needed or not all(arms[arm] for arm in needed):
            file.unlink(missing_ok=True)
            continue
        with matplotlib.rc_context(STYLE):
            drawing = Figure(figsize=(6.4, 2.8), layout="constrained")
            draw(drawing, arms, needed)
            drawing.savefig(file, metadata={"Date": None})
        lines.append(f"![{words}]({folder.name}/{file.name})\n\n{words}")
    return "\n\n".join(lines)


def _dots(ax: Axes, arms: Results, names: tuple[str, ...], column: str, title: str) -> None:
    split, measure, _ = MEASURES[column]
    for x, name in enumerate(names):
        found = [
            value(s, "after" if "after" in s["metrics"] else "before", split, measure)
            for s in arms[name].values()
        ]
        scale = 100 if column in IN_POINTS else 1
        known = [scale * y for y in found if y is not None]
        ax.plot([x] * len(known), known, "o", ms=3.5, alpha=0.6, color="tab:blue")
        if known:
            ax.plot([x - 0.25, x + 0.25], [fmean(known)] * 2, color="black", lw=1.5)
    ax.set_xticks(range(len(names)), names, rotation=45, ha="right")
    ax.set_title(title, fontsize=9)


def _disease(drawing: Figure, arms: Results, names: tuple[str, ...]) -> None:
    columns = ("accuracy", "right, caption wrong", "answerable", "hallucinated")
    for ax, column in zip(drawing.subplots(1, len(columns)), columns):
        _dots(ax, arms, names, column, f"{column}, %")


def _entropy(drawing: Figure, arms: Results, names: tuple[str, ...]) -> None:
    _dots(drawing.subplots(), arms, names, "entropy", "nats a token")


def _variance(drawing: Figure, arms: Results, names: tuple[str, ...]) -> None:
    ax = drawing.subplots()
    for name in names:
        some = arms[name].values()
        x = [s["variance seen"] for s in some]
        y = [100 * value(s, "after", "test", "accuracy") for s in some]
        ax.plot(x, y, "o", ms=4, label=name)
    ax.set_xlabel("mean reward variance of the prompts seen")
    ax.set_ylabel("test accuracy, %")
    ax.legend(ncols=2, fontsize=8)


def _rewards(drawing: Figure, arms: Results, names: tuple[str, ...]) -> None:
    curves = [found["curves"] for found in arms[names[0]].values()]
    for ax, reward in zip(drawing.subplots(1, 2, sharey=True), ("caption", "accuracy")):
        for kind, colour in CLASSES.items():
            lines = [c[f"{reward}, {kind}"] for c in curves if f"{reward}, {kind}" in c]
            for line in lines:
                ax.plot(range(1, 6), line, color=colour, alpha=0.25, lw=1)
            if lines:
                known = [[x for x in part if x is not None] for part in zip(*lines)]
                mean = [fmean(part) if part else float("nan") for part in known]
                ax.plot(range(1, 6), mean, color=colour, label=kind)
        ax.set_title(f"{reward} reward", fontsize=9)
        ax.set_xlabel("fifth of the updates")
        ax.set_ylim(0, 1)
    ax.legend()


def _tau(drawing: Figure, arms: Results, names: tuple[str, ...]) -> None:
    ax, taus = drawing.subplots(), [float(name.partition("-")[2] or 0.54) for name in names]
    # seeds differ by more than taus do, so means over different seeds do not compare
    lines = [
        [100 * value(arms[name][seed], "after", "test", "accuracy") for name in names]
        for seed in sorted(set.intersection(*(set(arms[name]) for name in names)))
    ]
    for line in lines:
        ax.plot(taus, line, "o-", color="tab:blue", alpha=0.35, lw=1, ms=3)
    if lines:
        ax.plot(taus, [fmean(part) for part in zip(*lines)], "o-", color="tab:blue")
    ax.set_xlabel("tau")
    ax.set_ylabel("test accuracy, %")


def _representations(drawing: Figure, arms: Results, names: tuple[str, ...]) -> None:
    found = arms[names[0]][min(arms[names[0]])]["representations"]
    kinds = {"positive": (1, "tab:green"), "negative": (0, "tab:red")}
    for ax, side in zip(drawing.subplots(1, 2), ("before", "after")):
        spots = found[side]["points"]
        for label, (flag, colour) in kinds.items():
            some = [p for p, is_positive in zip(spots, found["is positive"]) if is_positive == flag]
            x, y = zip(*some[not flag :]) if some[not flag :] else ((), ())
            ax.plot(x, y, "o", ms=3, alpha=0.6, color=colour, label=label)
        ax.plot(*spots[0], "*", ms=10, color="black", label="anchor")
        ax.set_title(f"{side} RL", fontsize=9)
    ax.legend()
