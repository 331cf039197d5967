"""What is counted on own rows, one greedy response each: right answers, hallucinations, format.

    accuracy        by `category`, with Wilson 95 % intervals
    existence       POPE's on yes/no questions: accuracy, precision, recall, F1, share of "yes"
    paired          VideoHallucer's: both rows of a `pair` right
    captions        CHAIR's: share of captioned objects that are not in `objects`, share of captions
                    with such an object; and the share of `relevant` objects that the caption covers
    format          responses with all their stages
    answerable      captions from which the judge answers right, whatever was rewarded in training

A measure whose fields the rows lack is left out.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image, ImageOps

import answers
import data
import reasoning
from caption_reward import CaptionReward
from engine import vlm
from engine.media import gallery_file
from engine.run import Run


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
    four_stage, eval_batch, max_new_tokens, fps, max_frames.
    """
    names, result, size = vocabulary(sets), {}, cfg.eval_batch * run.processes
    bar = run.progress_bar(sum(map(len, sets.values())), title, "row")

    def answer(some: list[data.Sample]) -> list[tuple[data.Sample, str]]:
        said = respond(policy, some, cfg.four_stage, cfg.max_new_tokens, cfg.fps, cfg.max_frames)
        return list(zip(some, said, strict=True))

    for split, samples in sets.items():
        answered = []
        for chunk in (samples[i : i + size] for i in range(0, len(samples), size)):
            answered += [
                pair
                for part in run.local_micro_batches(run.shard(chunk), 0, answer)
                for pair in part
            ]
            bar.update(len(chunk))
        shard, texts = [list(x) for x in zip(*answered)] or ([], [])
        rows = {
            row["id"]: row
            for row in run.gather_object(verdicts(shard, texts, names, cfg.four_stage, judge))
        }
        in_order = [rows[s.id] for s in samples]
        result[split] = {"metrics": metrics(samples, in_order), "rows": in_order}
    bar.close()
    return result


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
            "problem": sample.problem,
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
        judged: list[tuple[float, str | None]] = []
        for i in range(0, len(asked), 256):  # a deadline for each 256
            judged += judge(asked[i : i + 256])
            if any(v != v for v, _ in judged[i:]) and not any(reply for _, reply in judged[i:]):
                # it is gone: do not wait again
                judged += [(float("nan"), None)] * (len(asked) - len(judged))
                break
        for row, (verdict, reply) in zip(rows, judged, strict=True):
            row["answerable"], row["judge"] = (None if verdict != verdict else bool(verdict)), reply
    return rows


def metrics(samples: list[data.Sample], rows: list[dict]) -> dict:
    """All measures of one set; a measure that the rows cannot give is left out."""
    result = {
        "accuracy": rate([r["right"] for r in rows]),
        "format": rate([r["format"] for r in rows]),
    }
    if any(r["right_lenient"] != r["right"] for r in rows):
        result["accuracy_lenient"] = rate([r["right_lenient"] for r in rows])
    by_category, pairs = defaultdict(list), defaultdict(list)
    for sample, row in zip(samples, rows, strict=True):
        by_category[sample.category].append(row["right"])
        if sample.pair:
            pairs[sample.pair].append(row["right"])
    result["by category"] = {name: rate(values) for name, values in sorted(by_category.items())}
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
    if judged := [r["answerable"] for r in rows if r.get("answerable") is not None]:
        result["answerable captions"] = rate(judged)
    return result


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
        "hallucinated objects",
        "coverage",
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
