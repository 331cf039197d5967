"""Tables and figures from a run folder: one self-contained report.html, and a table for the
terminal.

    python report.py RUN_FOLDER      # before and after RL
    python report.py RUN_A RUN_B     # after RL in A and in B, row by row: RUN_B/contrast.html

The page needs no network and no JavaScript: figures are inline SVG, pictures are base64. What the
run folder lacks (an unfinished run, --method sft, no captions) is left out or said in a sentence.
Text of models and data is escaped.
"""

import argparse
import base64
import io
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import measures
import reasoning
from comparison import (
    MEASURES,
    NOTHING,
    POPE,
    SIDES,
    Line,
    Results,
    compare,
    contrast_of,
    percent,
    table,
    table_of,
)
from engine.files import rewrite
from engine.media import gallery_file

STAGES = {"prethink": "Planning", "caption": "Caption", "think": "Thinking", "answer": "Answer"}
DISEASE = ("accuracy", "answerable captions", "right, caption wrong", "hallucinated objects")
PICTURES = 4  # gallery rows per held-out set
NEARLY_NONE = 1 / 3  # a category that keeps less than this part of its share is warned about
POINTS = 3000  # most dots in the scatter; more only make the page heavy

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
    "gradient is not; cold start: mean of -log p over response tokens; OViP: L_OViP, mean of pairs",
    "nce": "Eq. 4: mean over active anchors of -log(sum of exp(s / T) over positives / the same "
    "sum over all others)",
    "nce/active": "anchors with both a positive and a negative; only they enter Eq. 4, which is 0 "
    "without any",
    "nce/positive": "pairs with a gradient cosine at or below tau / pairs; these are the "
    "positives of Eq. 4",
    "nce/cosine_mean": "mean gradient cosine of all pairs of prompts in the batch",
    "nce/cosine_sd": "standard deviation of these cosines",
    "score": "mean score of responses, 0 to 10 (OViP)",
    "scored": "responses with a score / responses",
    "pairs": "pairs of responses / prompts of the round",
    "no_pair": "prompts without a valid pair / prompts",
    "no_reference": "prompts whose only pair would need the row's reference response, which it "
    "lacks / prompts",
    "of_reference": "prompts paired with it / prompts",
    "updates": "updates of the round",
    "taken": "pairs that left the buffer",
    "buffer": "pairs left in it",
    "lost": "pairs without a negative image / pairs that left the buffer",
    "text_right": "pairs with h(A+, I+) > h(A-, I+) / pairs trained on; equal ones count half",
    "text_margin": "mean of that difference, in nats",
    "image_right": "pairs with h(A+, I+) > h(A+, I-) / pairs trained on; equal ones count half",
    "image_margin": "mean of that difference, in nats",
    "unknown": "rewards that the judge could not give / responses; left out, never counted as 0",
    "grad_norm": "Euclidean norm of the gradient before clipping",
    "lr": "learning rate of the update",
}


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
    kind = run.selected.get("class")
    which = f"{len(run.scores)}" + (f" are {kind} and" if kind else "")
    text += (
        "Not finished."
        if cut is None
        else f"The cut: {len(kept)} of {which} have a variance of {cut:.3f} or more."
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


def disease_and_cure(run: Results) -> Drawing | None:
    """Accuracy, and what stands behind it, at every side of the first test set."""
    split = next(iter(run.splits), None)
    shown = {
        side: scored[split]["metrics"]
        for side, scored in run.evals.items()
        if split in scored and set(DISEASE) <= set(scored[split]["metrics"])
    }
    if len(shown) < 2:
        return None

    def draw(axes: Axes) -> None:
        looks = ((GRID, ""), (ONE, "//"), (TWO, ".."))[-len(shown) :]
        wide = 0.8 / len(shown)
        for k, ((side, metrics), (colour, hatch)) in enumerate(zip(shown.items(), looks)):
            x = [i + (k - (len(shown) - 1) / 2) * wide for i in range(len(DISEASE))]
            y = [100 * metrics[name]["value"] for name in DISEASE]
            axes.bar(x, y, wide, color=colour, hatch=hatch, edgecolor=INK, label=run.sides[side])
        axes.set_xticks(range(len(DISEASE)), [name.replace(" ", "\n", 1) for name in DISEASE])
        axes.set(ylabel="%", ylim=(0, 100))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)

    ends = "; ".join(
        f"{name} " + " → ".join(f"{100 * m[name]['value']:.0f}" for m in shown.values())
        for name in DISEASE
    )
    return f"On {split}, in percent: {ends}.", draw


def figures(run: Results) -> str:
    """All figures whose numbers the run has, and a sentence on those it has not."""
    rl, conflict = run.rl, [row for row in run.rl if "nce/active" in row]
    batch = min(run.config.get("prompts_per_step", 1), len(run.selected.get("kept", ())) or 10**9)
    anchors = [row | {"share": row["nce/active"] / batch} for row in conflict]
    rewards = {"reward/accuracy": "answer", "reward/caption": "caption", "reward/format": "format"}
    own = {k: k[7:] for row in rl for k in row if k.startswith("reward/") and k not in rewards}
    cosine = {"nce/cosine_mean": "mean"}
    band = partial(cosine_band, conflict, run.config.get("tau"))
    disease = disease_and_cure(run)
    pairs = curves(
        [row for row in rl if "text_right" in row],
        {"text_right": "A+ against A-", "image_right": "I+ against I-"},
        "Share of pairs on their right side of 0 (OViP).",
        ylim=(0, 1.02),
    )
    drawn = {
        **({"Disease and cure": disease} if disease else {}),  # needs captions and a judge
        "Rewards": curves(
            rl, rewards, "Means over sampled responses (paper, Figure 3).", ylim=(0, 1.02)
        ),
        **({"Rewards of its own": curves(rl, own, "Means over responses.")} if own else {}),
        **({"Pairs": pairs} if pairs else {}),
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
        "reward": f"the reward {cfg.get('reward')}",
    }
    if (kind := cfg.get("caption_reward")) in ("self", "gain", "shared"):
        switches["caption_reward"] += f" ({kind})"
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
        what = f"{len(run.rl)}{asked} updates of reinforcement learning"
        if cfg.get("method") == "ovip":
            made = sum(row.get("updates", 0) for row in run.rl)
            what = f"{made:g} updates in {len(run.rl)}{asked} rounds of OViP"
        did.append(what)
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
    text += changes(run, lines, "after RL")
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


def changes(run: Results, lines: list[Line], where: str) -> list[str]:
    """A sentence each on what is better, worse and not clearly changed."""
    text = []
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
        text.append(f"{verdict.capitalize()} {where}: {listed or 'nothing'}.")
    return text


def comparison(lines: list[Line], sides: list[str]) -> str:
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
        for head in ("", "n", *(f"{escape(side)}, %" for side in sides), "Points", "")
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
        first, last = list(sides.values())[-2:][0], list(sides.values())[-1]
        cases = [(first[i], last[i]) for i in first if i in last]
        turned = [(a["right"], b["right"]) for a, b in cases]
        pictured = [(a, b) for a, b in cases if picture(run, split, a).exists()]
        pictured.sort(
            key=lambda case: (
                not is_sick(case[0]),
                not (is_sick(case[0]) and case[1]["right"] and not is_sick(case[1])),
                case[0]["right"] == case[1]["right"],
                case[0]["text"] == case[1]["text"],
            )
        )
        if pictured:
            gained, lost = turned.count((False, True)), turned.count((True, False))
            counts = f"{gained} turned right and {lost} turned wrong"
            if any(map(is_sick, (*first.values(), *last.values()))):
                sick = [sum(map(is_sick, side.values())) for side in (first, last)]
                counts += "; right answers behind wrong captions: {} → {}".format(*sick)
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
        f"keeps, you see up to {PICTURES}: first those whose answer was right and whose "
        "caption was wrong, those that were mended before the others; then those whose answer "
        "turned right or wrong, those whose response changed, and others, each in the order of "
        "the file. So such rows and changes are over-represented. <mark>Marked and "
        "underlined</mark>: an object that the caption names and the picture does not hold.</p>"
    )
    return (
        rule + "".join(parts)
        if parts
        else "<p>This run kept no pictures, or evaluated nothing.</p>"
    )


def is_sick(row: dict) -> bool:
    """Is the answer right and the caption wrong?"""
    judged = row.get("answerable") is not None
    return bool(judged and row["right"] and measures.caption_wrong(row))


def picture(run: Results, split: str, row: dict) -> Path:
    return run.folder / "eval" / "gallery" / split / gallery_file(row["id"])


def example(run: Results, split: str, sides: dict[str, dict]) -> str:
    """One picture: the question, the right answer, and the stages of each response side by side."""
    row = next(iter(sides.values()))
    png = base64.b64encode(picture(run, split, row).read_bytes()).decode()
    options = "".join(f"<br>{escape(option)}" for option in row.get("options") or ())
    return (
        f'<article style="--rows: {1 + -(-len(sides) // 2)}">'
        f'<div><img src="data:image/png;base64,{png}" '
        f'alt="picture or clip {escape(row["id"])}">'
        f"{escape(row['id'])}, {escape(row['category'])}</div>"
        f"<div class=question><b>{escape(row['problem'])}</b>{options}<br>"
        f"Right answer: <b>{escape(row['solution'])}</b></div>"
        f"{''.join(response(run.sides[side], row) for side, row in sides.items())}</article>"
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
    return f"<section><h4>{escape(title)} {verdict}</h4><dl>{''.join(cells)}</dl></section>"


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
    configuration = {name: json.dumps(value) for name, value in run.config.items()}
    held = {name: text for name, (_, text) in (MEASURES | POPE).items()}
    sections = {
        "Before and after": comparison(lines, list(SIDES.values())),
        "Figures": figures(run),
        "Held-out pictures": gallery(run),
        "Configuration": definitions(configuration),
        "What the table measures": definitions(held),
        "What metrics.jsonl holds": definitions(
            {name: text for name, text in METRICS.items() if name in logged}
        ),
    }
    title = f"Run {run.name}, method {run.config.get('method', 'unknown')}"
    return _write_page(run.folder / "report.html", title, summary(run, lines), sections)


def _write_page(file: Path, title: str, text: str, sections: dict[str, str]) -> Path:
    verdicts = r"(Better|Worse|No clear change) (after RL|in the second run):"
    page = PAGE.format(
        title=escape(title),
        summary=re.sub(verdicts, r"<b>\g<0></b>", escape(text)),
        body="".join(f"<h2>{heading}</h2>{part}" for heading, part in sections.items()),
        css=CSS,
    )
    rewrite(file, page)
    return file


def contrast(run: Results) -> Path:
    """Write contrast.html into the second run's folder: two runs after RL, row by row."""
    a, b = (run.sides[side] for side in run.compared)
    lines = list(compare(run))
    start = (
        "Both began with the same responses"
        if "before" in run.evals
        else "They did not begin with the same responses, so RL is not their only difference"
    )
    text = f"{a} against {b}, after RL. {start}. " + " ".join(
        changes(run, lines, "in the second run")
    )
    drawn = disease_and_cure(run)
    held = {name: text for name, (_, text) in (MEASURES | POPE).items()}
    sections = {
        "Row by row": comparison(lines, [a, b]),
        "Disease and cure": figure("Disease and cure", *drawn) if drawn else "-",
        "Held-out pictures": gallery(run),
        "Options that differ": definitions(run.config),
        "What the table measures": definitions(held),
    }
    return _write_page(run.folder / "contrast.html", f"{a} and {b}", text, sections)


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
article > div:first-child { grid-row: span var(--rows); font-size: .8rem; color: var(--soft); }
.question { grid-column: 2 / -1; }
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
        description="Write report.html into a run folder and print its table; of two runs, "
        "contrast.html into the second one's."
    )
    parser.add_argument(
        "folders", type=Path, nargs="+", metavar="RUN_FOLDER", help="the --output_dir of train.py"
    )
    folders = parser.parse_args().folders
    if len(folders) > 2:
        parser.error("give one run folder, or two")
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            sys.exit(
                f"error: {folder} is not a run folder: it has no config.yaml. Give the "
                "--output_dir of train.py"
            )
    both = contrast_of(*folders) if len(folders) == 2 else None
    print(table_of(both) if both else table(folders[0]))
    try:
        page = contrast(both) if both else write(folders[0])
    except OSError as error:
        sys.exit(f"error: the report cannot be written: {error}")
    print(f"\nReport: {page}")


if __name__ == "__main__":
    main()
