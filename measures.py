"""What is counted on own rows: right answers, hallucinations, and how the two hang together.

Each row gets one greedy response. All measures are taken of each set and of each `category` in it.

    accuracy        with Wilson 95 % intervals
    blind accuracy  the same, with the media of another row of the category: the control
    existence       POPE's on yes/no questions: accuracy, precision, recall, F1, share of "yes"
    paired          VideoHallucer's: both rows of a `pair` right
    captions        CHAIR's: share of captioned objects that are not in `objects`, share of captions
                    with such an object; and the share of `relevant` objects that the caption covers
    format          responses with all their stages
    answerable      captions from which the judge answers right, whatever was rewarded in training;
                    with --caption_reward self also those from which the policy itself does
    no verdict      captions that the judge gave none on, if any: they are left out above
    right, caption wrong; both right
                    rows with the right answer behind a caption that the judge cannot answer from
                    or that names what is not there; and behind any other caption
    slope           of "right" on "answerable" within the sampled responses of a row: how far a
                    reward for answers is one for captions; and the entropy of the first one

A measure whose fields the rows lack is left out.
"""

import math
import random
import re
from collections import Counter, defaultdict
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageOps

import answers
import data
import reasoning
from caption_reward import CaptionReward
from engine import counted, vlm
from engine.judges import PolicyJudge
from engine.media import gallery_file
from engine.run import Run
from engine.shared_prefix import uniform_numbers


def respond(
    policy: vlm.VLM,
    samples: list[data.Sample],
    four_stage=True,
    max_new_tokens=768,
    fps=2.0,
    max_frames=16,
):
    """The greedy response to each sample, in one batch."""
    if not samples:
        return []
    inputs = policy.encode(data.prompts(samples, four_stage, fps, max_frames))
    return [row[0] for row in policy.generate(inputs, 1, max_new_tokens, sample=False).text]


def evaluate(
    policy: vlm.VLM,
    sets: dict[str, list[data.Sample]],
    judge: CaptionReward | None,
    cfg,
    run: Run,
    title: str,
):
    """{set: {"metrics": ..., "rows": ...}}: what `policy` says to each row, greedily, and the
    verdicts on it.

    Each row is answered, and its caption judged, by one process; every process gets all. cfg:
    four_stage, eval_batch, eval_responses, max_new_tokens, fps, max_frames, seed.
    """
    names, result, size = vocabulary(sets), {}, cfg.eval_batch * run.processes
    n = cfg.eval_responses if judge and cfg.four_stage else 0
    itself = None
    if getattr(cfg, "caption_reward", "") == "self":
        itself = CaptionReward(PolicyJudge(policy, cfg.max_new_tokens))
    bar = run.progress_bar(sum(map(len, sets.values())), title, "row")

    def answer(some: list[data.Sample], elsewhere: dict[str, data.Sample]) -> list[tuple]:
        how = (cfg.four_stage, cfg.max_new_tokens, cfg.fps, cfg.max_frames)
        said = respond(policy, some, *how)
        moved = [s.id for s in some if s.id in elsewhere]
        blind = dict(zip(moved, respond(policy, [elsewhere[i] for i in moved], *how), strict=True))
        drawn = draw(policy, some, n, cfg) if n and not some[0].corruption else [None] * len(some)
        mine = [None] * len(some)
        if itself:
            asked = [judged_item(s, text) for s, text in zip(some, said, strict=True)]
            mine = [verdict for verdict, _ in itself(asked)]
        return [(s, text, blind.get(s.id), *x) for s, text, *x in zip(some, said, drawn, mine)]

    for split, samples in sets.items():
        answered, elsewhere = [], other_media(samples)
        for chunk in (samples[i : i + size] for i in range(0, len(samples), size)):
            parts = run.local_micro_batches(run.shard(chunk), 0, answer, elsewhere)
            answered += [row for part in parts for row in part]
            bar.update(len(chunk))
        shard, texts, blind, drawn, mine = [list(x) for x in zip(*answered)] or [[]] * 5
        found = verdicts(shard, texts, names, cfg.four_stage, judge)
        for row, sample, text, own in zip(found, shard, blind, mine, strict=True):
            row["blind"] = None if text is None else is_right(sample, text)
            if itself:
                row["answerable to itself"] = None if own != own else bool(own)
        if any(drawn):
            add_sampled(found, shard, drawn, judge)
        rows = {row["id"]: row for row in run.gather_object(found)}
        in_order = [rows[s.id] for s in samples]
        result[split] = {"metrics": metrics(samples, in_order), "rows": in_order}
        judged = [v for r in in_order if "answerable" in r for v in all_verdicts(r)]
        if missing := judged.count(None):
            errors = run.gather_object([getattr(judge.judge, "last_error", "")])
            run.say(
                f"warning: {split}: the judge gave no verdict on {missing} of "
                f"{counted(len(judged), 'caption')}, which are left out. Its last error: "
                f"{next(filter(None, errors), 'unknown')}"
            )
        if samples[0].corruption:
            result[split]["corruption"] = samples[0].corruption[0]
    bar.close()
    return result


def draw(policy: vlm.VLM, samples: list[data.Sample], n: int, cfg) -> list[tuple]:
    """n responses to each sample at T = 1, and the mean entropy of the first one's tokens."""
    inputs = policy.encode(data.prompts(samples, cfg.four_stage, cfg.fps, cfg.max_frames))
    ids, length = [s.id for s in samples], cfg.max_new_tokens
    draws = uniform_numbers(ids, n, length, f"{cfg.seed}/evaluation")
    rolls = policy.generate(inputs, n, length, draws=draws)
    with torch.no_grad():
        mask = rolls.mask[:, :1]
        entropy = policy(inputs, rolls.ids[:, :1], mask).entropy
    mean = (entropy * mask).sum((1, 2)) / mask.sum((1, 2))
    return list(zip(rolls.text, mean.tolist(), strict=True))


def other_media(samples: list[data.Sample]) -> dict[str, data.Sample]:
    """Each sample with the media of another one of its category and type, drawn by its id; without
    those that have none. Rows of one `pair` show the same."""
    kinds = defaultdict(list)
    for s in samples:
        if not s.corruption:  # a test of its own
            kinds[s.category, s.data_type, len(s.media)].append(s)
    found = {}
    for some in kinds.values():
        for s in some:
            rng = random.Random(f"{s.id}/another")
            for other in rng.sample(some, min(len(some), 8)):
                if other.media != s.media and (s.pair is None or other.pair != s.pair):
                    found[s.id] = replace(s, media=other.media, sizes=other.sizes)
                    break
    return found


def is_right(sample: data.Sample, text: str) -> bool:
    """The strict verdict on a response."""
    answer = answers.extract(reasoning.parse(text).answer, text)
    return answers.is_correct(answer, sample.answer, sample.problem_type)


def judged_item(sample: data.Sample, text: str) -> tuple[str, str | None, str, str]:
    """What `CaptionReward` takes of a response."""
    return sample.question, reasoning.parse(text).caption, sample.answer, sample.problem_type


def add_sampled(
    rows: list[dict], samples: list[data.Sample], drawn: list[tuple], judge: CaptionReward
) -> None:
    """row["sampled"]: of each drawn response whether it is right, and whether its caption is
    answerable (None: unknown)."""
    asked = [
        judged_item(s, text) for s, (texts, _) in zip(samples, drawn, strict=True) for text in texts
    ]
    verdict = iter(ask_in_parts(judge, asked))
    for row, sample, (texts, entropy) in zip(rows, samples, drawn, strict=True):
        row["sampled"] = {
            "right": [is_right(sample, text) for text in texts],
            "answerable": [None if v != v else bool(v) for v, _ in islice(verdict, len(texts))],
            "entropy": round(entropy, 6),
        }


def all_verdicts(row: dict) -> list[bool | None]:
    """Of the judge on the greedy response's caption, and on those of sampled ones."""
    return [row["answerable"], *row.get("sampled", {}).get("answerable", ())]


def ask_in_parts(judge: CaptionReward, asked: list[tuple]) -> list[tuple[float, str | None]]:
    """The judge's verdicts and replies, with a deadline for each 256 captions."""
    judged: list[tuple[float, str | None]] = []
    for i in range(0, len(asked), 256):
        judged += judge(asked[i : i + 256])
        if any(v != v for v, _ in judged[i:]) and not any(reply for _, reply in judged[i:]):
            # it is gone: do not wait again
            judged += [(math.nan, None)] * (len(asked) - len(judged))
            break
    return judged


def vocabulary(sets: dict[str, list[data.Sample]]) -> list[str]:
    """Every object that the rows of any set list: the names that a caption can hallucinate.

    Over all sets, because what a set never shows is just what a model should not see in it.
    """
    return sorted({name for samples in sets.values() for s in samples for name in s.objects or ()})


def verdicts(
    samples: list[data.Sample],
    texts: list[str],
    names: list[str],
    four_stage: bool = True,
    judge: CaptionReward | None = None,
) -> list[dict]:
    """What was said to each sample, and whether it is right. names: from `vocabulary`."""
    rows, captions = [], []
    for sample, text in zip(samples, texts, strict=True):
        stages = reasoning.parse(text)
        captions.append(stages.caption)
        answer = answers.extract(stages.answer, text)
        row = {
            "id": sample.id,
            "category": sample.category,
            "problem": sample.problem + sample.hint,
            "options": list(sample.options),
            "solution": sample.answer,
            "text": text,
            "answer": answer,
            "right": answers.is_correct(answer, sample.answer, sample.problem_type),
            "right_lenient": answers.is_correct(
                answer, sample.answer, sample.problem_type, lenient=True
            ),
            "format": reasoning.format_reward(text, four_stage) == 1.0,
        }
        if sample.objects is not None and four_stage:
            named = mentioned(stages.caption or "", names)
            row["hallucinated"] = sorted(set(named) - set(sample.objects))
            row["captioned"] = len(named)
            wanted = sample.relevant if sample.relevant is not None else sample.objects
            row["covered"], row["relevant"] = len(set(named) & set(wanted)), len(set(wanted))
        rows.append(row)
    if judge and four_stage:
        asked = [
            (s.question, caption, s.answer, s.problem_type)
            for s, caption in zip(samples, captions, strict=True)
        ]
        for row, (verdict, reply) in zip(rows, ask_in_parts(judge, asked), strict=True):
            row["answerable"], row["judge"] = (None if verdict != verdict else bool(verdict)), reply
    return rows


def metrics(samples: list[data.Sample], rows: list[dict], by_category: bool = True) -> dict:
    """All measures of one set, and of each category in it; a measure that the rows cannot give is
    left out."""
    result = {
        "accuracy": rate([r["right"] for r in rows]),
        "format": rate([r["format"] for r in rows]),
    }
    if any(r["right_lenient"] != r["right"] for r in rows):
        result["accuracy_lenient"] = rate([r["right_lenient"] for r in rows])
    if blind := [r["blind"] for r in rows if r.get("blind") is not None]:
        result["blind accuracy"] = rate(blind)
    pairs, kinds = defaultdict(list), defaultdict(list)
    for sample, row in zip(samples, rows, strict=True):
        kinds[sample.category].append((sample, row))
        if sample.pair:
            pairs[sample.pair].append(row["right"])
    if pairs:
        result["paired"] = rate([all(values) for values in pairs.values()])
    if existence := pope(samples, rows):
        result["existence"] = existence
    known = [r for r in rows if r.get("captioned") is not None]
    if captioned := sum(r["captioned"] for r in known):
        result["hallucinated objects"] = rate_of(
            sum(len(r["hallucinated"]) for r in known), captioned
        )
        result["hallucinated captions"] = rate([bool(r["hallucinated"]) for r in known])
    if relevant := sum(r["relevant"] for r in known):
        result["coverage"] = rate_of(sum(r["covered"] for r in known), relevant)
    if judged := [r for r in rows if r.get("answerable") is not None]:
        result["answerable captions"] = rate([r["answerable"] for r in judged])
        for name, wrong in (("right, caption wrong", True), ("both right", False)):
            result[name] = rate([r["right"] and caption_wrong(r) == wrong for r in judged])
    unjudged = [r["answerable"] is None for r in rows if "answerable" in r]
    if any(unjudged):
        result["no verdict"] = rate(unjudged)
    if own := [x for r in rows if (x := r.get("answerable to itself")) is not None]:
        result["answerable to itself"] = rate(own)
    if found := slope([covariance(r) for r in rows if "sampled" in r]):
        result["slope"] = found
    if entropy := [r["sampled"]["entropy"] for r in rows if "sampled" in r]:
        result["entropy"] = {"value": sum(entropy) / len(entropy), "n": len(entropy)}
    if by_category:
        result["by category"] = {
            name: metrics(*map(list, zip(*some)), by_category=False)
            for name, some in sorted(kinds.items())
        }
    return result


def caption_wrong(row: dict) -> bool:
    """Does the judge fail on the caption, or does it name what is not there?"""
    return not row["answerable"] or bool(row.get("hallucinated"))


def covariance(row: dict) -> tuple[float, float]:
    """sum (a - mean a)(r - mean r) and sum (a - mean a)^2 over a row's sampled responses, where
    r = right and a = answerable. Unknown ones are left out."""
    pairs = zip(row["sampled"]["right"], row["sampled"]["answerable"], strict=True)
    known = [(float(r), float(a)) for r, a in pairs if a is not None]
    if not known:
        return 0.0, 0.0
    r_mean, a_mean = (sum(values) / len(known) for values in zip(*known))
    both = sum((a - a_mean) * (r - r_mean) for r, a in known)
    return both, sum((a - a_mean) ** 2 for _, a in known)


def slope(parts: list[tuple[float, float]], z: float = 1.96) -> dict[str, float] | None:
    """b = sum_i S_ra,i / sum_i S_aa,i over rows i, with a 95 % interval from the spread over rows.
    n: rows whose captions differ in being answerable; fewer than two give None."""
    parts = [(both, own) for both, own in parts if own]
    if len(parts) < 2:
        return None
    n, total = len(parts), sum(own for _, own in parts)
    b = sum(both for both, _ in parts) / total
    spread = sum((both - b * own) ** 2 for both, own in parts) * n / (n - 1)
    half = z * spread**0.5 / total
    return {"value": b, "low": b - half, "high": b + half, "n": n}


def pope(samples: list[data.Sample], rows: list[dict]) -> dict | None:
    """POPE's measures over the yes/no questions, "yes" being positive; None without such questions.

    An answer that is neither counts as a "no" here; POPE's own script takes it for a yes
    (benchmarks/pope.py).
    """
    yes, truth = [], []
    for sample, row in zip(samples, rows, strict=True):
        parts = [option.partition(".") for option in sample.options]
        letters = {name.strip().lower(): letter.strip() for letter, _, name in parts}
        if set(letters) == {"yes", "no"}:
            yes.append(row["answer"] == letters["yes"])
            truth.append(sample.answer == letters["yes"])
    if not yes:
        return None
    cells = Counter(zip(yes, truth))
    tp, fp, fn, tn = (
        cells[pair] for pair in ((True, True), (True, False), (False, True), (False, False))
    )
    found = {name: value or 0.0 for name, value in yes_no_measures(tp, fp, fn, tn).items()}
    return {"accuracy": (tp + tn) / len(yes), **found, "n": len(yes)}


def yes_no_measures(tp: int, fp: int, fn: int, tn: int) -> dict[str, float | None]:
    """Precision, recall, F1 (positive: yes) and the share of yes, from counts; None where one
    divides by zero."""

    def ratio(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    f1 = (
        ratio(2 * precision * recall, precision + recall)
        if None not in (precision, recall)
        else None
    )
    return {
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes ratio": ratio(tp + fp, tp + fp + fn + tn),
    }


def mentioned(caption: str, names: list[str]) -> list[str]:
    """The objects that a caption names, each once; a longer name hides a shorter one inside it."""
    found, rest = [], caption.lower()
    for name in sorted(names, key=len, reverse=True):
        rest, count = re.subn(rf"\b{re.escape(name.lower())}\b", " ", rest)
        if count:
            found.append(name)
    return found


def rate(values: list[bool]) -> dict[str, float]:
    return rate_of(sum(values), len(values))


def rate_of(right: int, n: int, z: float = 1.96) -> dict[str, float]:
    """A share with its Wilson 95 % interval."""
    share = right / n
    centre, half = share + z * z / (2 * n), z * ((share * (1 - share) + z * z / (4 * n)) / n) ** 0.5
    scale = 1 + z * z / n
    return {
        "value": share,
        "low": max(0.0, (centre - half) / scale),
        "high": min(1.0, (centre + half) / scale),
        "n": n,
    }


def one_line(scored: dict) -> str:
    """The headline numbers of one set, for the screen."""
    shown = (
        "accuracy",
        "paired",
        "answerable captions",
        "no verdict",
        "answerable to itself",
        "right, caption wrong",
        "hallucinated objects",
        "format",
    )
    return "  ".join(
        f"{name} {scored['metrics'][name]['value']:.1%}"
        for name in shown
        if name in scored["metrics"]
    )


def save_gallery(
    folder: Path, sets: dict[str, list[data.Sample]], fps: float, max_frames: int, n: int = 12
) -> None:
    """Small PNGs of the first rows of every held-out set, for the report; a clip becomes a strip of
    its frames."""
    for split, samples in sets.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for sample in samples[:n]:
            content = data.messages(sample, "", fps, max_frames)[0]["content"]
            images = [
                i
                for part in content
                for i in part.get("video", [part.get("image")])
                if i is not None
            ][:4]
            side = 168
            strip = Image.new("RGB", (side * len(images), side), "white")
            for k, image in enumerate(images):
                strip.paste(ImageOps.pad(image, (side, side), color="white"), (side * k, 0))
            strip.save(folder / split / gallery_file(sample.id))
