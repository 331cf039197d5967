"""What reproduce.py's results say: the paper's claims with intervals over seeds, tables, figures.

A claim is a difference between two arms, or between two moments of one, in one measure. It is taken
seed by seed, because the arms of a seed share world, cold start and test rows, and its 95 %
interval is Student's over the seeds. A claim holds where the interval lies on its side of 0, does
not where it lies on the other, and is undecided where it holds 0.
"""

import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Student's 97.5 % quantiles for 1 degree of freedom and more
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MEASURES = {  # column: (set, measure, is more better)
    "accuracy": ("test", "accuracy", 1),
    "prior-breaking": ("test_prior_breaking", "accuracy", 1),
    "pairs": ("test_pairs", "paired", 1),
    "F1 of yes": ("test_pairs", "f1", 1),
    "answerable": ("test", "answerable captions", 1),
    "right, caption wrong": ("test", "right, caption wrong", -1),
    "both right": ("test", "both right", 1),
    "hallucinated": ("test", "hallucinated objects", -1),
    "coverage": ("test", "coverage", 1),
    "slope": ("test", "slope", 0),
    "entropy": ("test", "entropy", 0),
    "blind": ("test", "blind accuracy", 0),
}
IN_POINTS = {name for name in MEASURES if name not in ("entropy", "slope")}
SETS = {"test": "", "test_prior_breaking": ", prior-breaking", "test_pairs": ", pairs"}


@dataclass(frozen=True)
class Claim:
    """`more` - `less` in one measure, in the direction that is claimed (1: greater, -1: smaller).

    more, less: (arm, side), side "before" or "after" RL. least: a margin that the difference must
    exceed. share: `less` counts by this share only.
    """

    words: str
    more: tuple[str, str]
    less: tuple[str, str]
    split: str
    measure: str
    direction: int
    paper: str = "-"
    least: float = 0.0
    share: float = 1.0


def of(arm: str, side: str = "after") -> tuple[str, str]:
    return arm, side


def better(
    words: str, more: str, less: str, paper: tuple[str, str, str] = ("-",) * 3
) -> list[Claim]:
    """`more` does better than `less`: in accuracy, pairs, F1; and in what its captions say. paper:
    its difference on MMVU, VideoHallucer and POPE, the nearest of its benchmarks."""
    rows = [
        ("test", "accuracy", 1, f"MMVU {paper[0]}"),
        ("test_prior_breaking", "accuracy", 1, "-"),
        ("test_pairs", "paired", 1, f"VideoHallucer {paper[1]}"),
        ("test_pairs", "f1", 1, f"POPE {paper[2]}"),
        ("test", "answerable captions", 1, "-"),
        ("test", "right, caption wrong", -1, "-"),
        ("test", "hallucinated objects", -1, "-"),
    ]
    return [
        Claim(words, of(more), of(less), split, measure, way, "-" if said.endswith("-") else said)
        for split, measure, way, said in rows
    ]


RL, START = of("plain"), of("plain", "before")
CRITERIA = [
    Claim(
        "RL on answers raises accuracy by 10 points or more",
        RL, START, "test", "accuracy", 1, least=0.1,
    ),
    Claim(
        "right answers behind wrong captions become more frequent",
        RL, START, "test", "right, caption wrong", 1,
    ),
    Claim(
        "more than four fifths of the hallucination stays",
        RL, START, "test", "hallucinated objects", 1, share=0.8,
    ),
    Claim("held-out pairs do not gain", RL, START, "test_pairs", "paired", -1),
]  # fmt: skip
CLAIMS = {
    "RL makes it worse (Table 1)": [
        Claim(
            "GRPO answers fewer pairs than the base model",
            of("grpo"), of("base", "before"), "test_pairs", "paired", -1, "VideoHallucer -4.2",
        ),
        Claim(
            "GRPO answers better than the base model",
            of("grpo"), of("base", "before"), "test", "accuracy", 1, "MMVU +4.5",
        ),
    ],
    "All three together (Table 1)": better(
        "ours beats two-stage GRPO", "ours", "grpo", ("+3.5", "+8.5", "+5.1")
    )[:4]
    + better("ours beats plain four-stage GRPO", "ours", "plain"),
    "Caption Reward (Table 2)": better(
        "ours loses without it", "ours", "no-reward", ("+2.3", "+2.2", "+2.1")
    )
    + better("added alone to plain GRPO it helps", "caption", "plain"),
    "Caption stage (Table 2)": better(
        "ours loses without stage and reward", "ours", "no-stage", ("+3.0", "+3.2", "+3.5")
    )[:4],
    "Selection (Table 3)": better(
        "the top half by variance beats all prompts", "ours", "full", ("+1.3", "+1.4", "+1.2")
    )
    + better("medium beats easy prompts", "medium", "easy", ("+3.4", "+3.1", "+2.1"))
    + better("medium beats hard prompts", "medium", "hard", ("+2.1", "+2.4", "+0.5"))
    + better("added alone to plain GRPO it helps", "select", "plain")
    + better("the top half of each kind beats that of all", "within", "ours"),
    "Eq. 4 (Table 4)": better(
        "ours loses without it", "ours", "no-eq4", ("+1.8", "+2.5", "+1.9")
    )
    + better("added alone to plain GRPO it helps", "eq4", "plain")
    + better("its positives beat shuffled ones", "ours", "shuffled"),
    "Variance and generalisation (Figure 1b)": better(
        "the top 30 % of medium by variance beat all of medium", "top30", "medium"
    )[:2],
    "Entropy (Figure 4)": [
        Claim(
            "training on easy prompts leaves lower entropy than on medium ones",
            of("easy"), of("medium"), "test", "entropy", -1, "lower",
        ),
        Claim(
            "training on hard prompts leaves higher entropy than on medium ones",
            of("hard"), of("medium"), "test", "entropy", 1, "higher",
        ),
    ],
    "tau (Figure 5a)": [
        Claim(
            f"accuracy at tau 0.54 is above that at {tau}",
            of("ours"), of(f"tau-{tau}"), "test", "accuracy", 1, "peak at 0.54",
        )
        for tau in (0.1, 0.3, 0.7, 0.9)
    ],
}  # fmt: skip


# --- results --------------------------------------------------------------------------------------


def values(metrics: dict, kinds: bool = True) -> dict:
    """The numbers of measures.metrics, without their intervals."""
    found = {
        name: round(part["value"], 5)
        for name, part in metrics.items()
        if isinstance(part, dict) and "value" in part
    }
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
    """Results by arm and seed. Exits where they come from more than one code or world."""
    kinds = sorted({(found["code"], found["world"]) for found in results})
    if len(kinds) > 1:
        sys.exit(
            "error: the results are of different code or worlds, and are not mixed: "
            + "; ".join(f"code {code}, world {version}" for code, version in kinds)
            + ". Delete those that are not wanted, or give another --results"
        )
    arms: Results = defaultdict(dict)
    for found in results:
        arms[found["arm"]][found["seed"]] = found
    return arms


def value(found: dict, side: str, split: str, measure: str) -> float | None:
    return found["metrics"].get(side, {}).get(split, {}).get(measure)


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


def claim_table(claims: list[Claim], arms: Results) -> str:
    """A row for each claim whose arms have results, and a sentence on the others."""
    known = [claim for claim in claims if differences(claim, arms)]
    head = "| claim | measure | difference | 95 % interval | seeds | here | the paper |\n"
    head += "|---|---|---|---|---|---|---|\n"
    parts = [head + "\n".join(claim_row(claim, arms) for claim in known)] if known else []
    if missing := dict.fromkeys(claim.words for claim in claims if claim not in known):
        parts.append(f"Not measured yet: {'; '.join(missing)}.")
    return "\n\n".join(parts)


def arm_table(names: tuple[str, ...], arms: Results) -> str:
    """Mean and standard deviation over seeds of every measure, an arm a row."""
    head = ["arm", "seeds", "prompts seen", *MEASURES]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in names:
        some = list(arms[name].values())
        if not some:
            lines.append(f"| {name}: no result |" + " |" * (len(head) - 1))
            continue
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
    parts = [MARK, about(arms), "## Does the world have the disease?", claim_table(CRITERIA, arms)]
    parts += ["## Every claim"]
    for title, claims in CLAIMS.items():
        parts += [f"### {title}", claim_table(claims, arms)]
    parts += ["## Every arm", "Percent, mean ± standard deviation over seeds; slope and entropy as "
              "they are. Rows before RL: base, cold starts."]  # fmt: skip
    parts.append(arm_table(tuple(arm for arm in order if arms[arm]), arms))
    parts.append(f"## Figures\n\n{figures(arms, folder)}")
    text = page.read_text() if page.exists() else ""
    page.write_text(text.split(MARK)[0] + "\n\n".join(parts) + "\n")
    return page


MARK = "<!-- what follows is written by reproduce.py -->"


def about(arms: Results) -> str:
    """Where the results come from, in a paragraph."""
    some = [found for seeds in arms.values() for found in seeds.values()]
    if not some:
        return "There are no results yet."
    one, seeds = some[0], sorted({found["seed"] for found in some})
    commits = " and ".join(sorted({found["commit"] for found in some}))
    rl = [found for found in some if found["updates"]]
    numbers = {
        name: ", ".join(map(str, sorted({f[name] for f in rl})))
        for name in ("updates", "completions")
    }
    versions = ", ".join(f"{name} {number}" for name, number in one["versions"].items())
    return (
        f"{len(some)} results of {len(arms)} arms, seeds {', '.join(map(str, seeds))}; code "
        f"{one['code']}, commit {commits}, world {one['world']}, {versions}, {one['machine']} "
        f"each; {sum(f['seconds'] for f in some) / 3600:.1f} core hours without the worlds. "
        f"Every arm with RL made {numbers['updates']} updates with {numbers['completions']} "
        "completions."
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
            ("cold", "plain", "caption", "ours"), _disease,
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
            "Figure 5a: accuracy against tau, mean and 95 % interval.",
            ("tau-0.1", "tau-0.3", "ours", "tau-0.7", "tau-0.9"), _tau,
        ),
    }  # fmt: skip
    drawn["figure-5bc"] = (
        "Figure 5b, c: final-layer representations before and after RL with Eq. 4, seed 0: the "
        "anchor, its positives (cosine at most tau) and its negatives.",
        ("ours",),
        _representations,
    )
    lines = []
    for name, (words, needed, draw) in drawn.items():
        file = folder / f"{name}.svg"
        if not all(arms[arm] for arm in needed):
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
    ax = drawing.subplots()
    for name in names:
        found = [100 * value(s, "after", "test", "accuracy") for s in arms[name].values()]
        tau = float(name.partition("-")[2] or 0.54)
        low, high = interval(found) or (fmean(found),) * 2
        ax.errorbar(tau, fmean(found), [[fmean(found) - low], [high - fmean(found)]], fmt="o",
                    color="tab:blue", capsize=3)  # fmt: skip
    ax.set_xlabel("tau")
    ax.set_ylabel("test accuracy, %")


def _representations(drawing: Figure, arms: Results, names: tuple[str, ...]) -> None:
    found = arms[names[0]][min(arms[names[0]])]["representations"]
    kinds = {"positive": (1, "tab:green"), "negative": (0, "tab:red")}
    for ax, side in zip(drawing.subplots(1, 2), ("before", "after")):
        spots = found[side]["points"]
        for label, (flag, colour) in kinds.items():
            some = [p for p, is_positive in zip(spots, found["is positive"]) if is_positive == flag]
            ax.plot(*zip(*some[not flag :]), "o", ms=3, alpha=0.6, color=colour, label=label)
        ax.plot(*spots[0], "*", ms=10, color="black", label="anchor")
        ax.set_title(f"{side} RL", fontsize=9)
    ax.legend()
