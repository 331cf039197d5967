"""Score a checkpoint on held-out rows: right answers, hallucinated captions.

    python eval.py --model RUN_OR_CHECKPOINT --data DIR

A run folder stands for its trained policy (or its cold start, when RL has not finished). DIR is a dataset in the
schema of data.py; its test*.json are evaluated, or train.json when there are none.

Measures, each with what it needs of the rows:
    accuracy        by `category`, with Wilson 95 % intervals
    existence       POPE's measures on yes/no questions: accuracy, precision, recall, F1, share of "yes"
    paired          VideoHallucer's: both rows of a `pair` right
    captions        CHAIR's: share of captioned objects that are not in `objects`, share of captions with such an
                    object; and the share of `relevant` objects that the caption covers
    format          responses with all their stages
    answerable      captions from which the judge answers rightly (with a judge)
"""

import argparse
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
import yaml
from PIL import Image
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import answers
import data
import reasoning
import vlm
from caption_reward import CaptionReward


def respond(policy: vlm.VLM, samples: list[data.Sample], four_stage=True, max_new_tokens=768, fps=2.0, max_frames=16):
    """The greedy response to each sample, in one batch."""
    if not samples:
        return []
    inputs = policy.encode(data.prompts(samples, four_stage, fps, max_frames))
    return [row[0] for row in policy.generate(inputs, 1, max_new_tokens, sample=False).text]


def vocabulary(sets: dict[str, list[data.Sample]]) -> list[str]:
    """Every object that the rows of any set list: the names that a caption can hallucinate.

    Over all sets, because what a set never shows is just what a model should not see in it.
    """
    return sorted({name for samples in sets.values() for s in samples for name in s.objects or ()})


def score(samples: list[data.Sample], texts: list[str], names: list[str], four_stage=True, judge=None) -> dict:
    """{"metrics": ..., "rows": ...} of one set; `names` from `vocabulary`."""
    return summary(samples, verdicts(samples, texts, names, four_stage, judge))


def summary(samples: list[data.Sample], rows: list[dict]) -> dict:
    return {"metrics": metrics(samples, rows), "rows": rows}


def verdicts(
    samples: list[data.Sample],
    texts: list[str],
    names: list[str],
    four_stage: bool = True,
    judge: CaptionReward | None = None,
) -> list[dict]:
    """What was said to each sample, and whether it is right."""
    rows = []
    for sample, text in zip(samples, texts, strict=True):
        stages = reasoning.parse(text)
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
            "right, leniently": answers.is_correct(answer, sample.answer, sample.problem_type, lenient=True),
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
        asked = [(s.question, reasoning.parse(t).caption, s.answer, s.problem_type) for s, t in zip(samples, texts)]
        verdicts: list[tuple[float, str | None]] = []
        for i in range(0, len(asked), 256):  # a deadline for each 256
            verdicts += judge(asked[i : i + 256])
            if any(v != v for v, _ in verdicts[i:]) and not any(reply for _, reply in verdicts[i:]):
                verdicts += [(float("nan"), None)] * (len(asked) - len(verdicts))  # it is gone: do not wait again
                break
        for row, (verdict, reply) in zip(rows, verdicts, strict=True):
            row["answerable"], row["judge"] = (None if verdict != verdict else bool(verdict)), reply
    return rows


def metrics(samples: list[data.Sample], rows: list[dict]) -> dict:
    """All measures of one set; a measure that the rows cannot give is left out."""
    result = {"accuracy": rate([r["right"] for r in rows]), "format": rate([r["format"] for r in rows])}
    if any(r["right, leniently"] != r["right"] for r in rows):
        result["accuracy, lenient"] = rate([r["right, leniently"] for r in rows])
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
        result["hallucinated objects"] = rate_of(sum(len(r["hallucinated"]) for r in known), captioned)
        result["hallucinated captions"] = rate([bool(r["hallucinated"]) for r in known])
    if relevant := sum(r["relevant"] for r in known):
        result["coverage"] = rate_of(sum(r["covered"] for r in known), relevant)
    if judged := [r["answerable"] for r in rows if r.get("answerable") is not None]:
        result["answerable captions"] = rate(judged)
    return result


def pope(samples: list[data.Sample], rows: list[dict]) -> dict | None:
    """POPE's measures over the yes/no questions, "yes" being positive; None without such questions.

    An answer that is neither counts as a "no", as in POPE's own script for anything that is not a yes.
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
    hit = sum(y and t for y, t in zip(yes, truth))
    precision, recall = hit / max(sum(yes), 1), hit / max(sum(truth), 1)
    return {
        "accuracy": sum(y == t for y, t in zip(yes, truth)) / len(yes),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-12),
        "yes ratio": sum(yes) / len(yes),
        "n": len(yes),
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
    return {"value": share, "low": max(0.0, (centre - half) / scale), "high": min(1.0, (centre + half) / scale), "n": n}


def one_line(scored: dict) -> str:
    """The headline numbers of one set, for the screen."""
    shown = ("accuracy", "paired", "answerable captions", "hallucinated objects", "coverage", "format")
    return "  ".join(f"{name} {scored['metrics'][name]['value']:.1%}" for name in shown if name in scored["metrics"])


def save_gallery(folder: Path, sets: dict[str, list[data.Sample]], fps: float, max_frames: int, n: int = 12) -> None:
    """Small PNGs of the first rows of every held-out set, for the report; a clip becomes a strip of its frames."""
    for split, samples in sets.items():
        (folder / split).mkdir(parents=True, exist_ok=True)
        for sample in samples[:n]:
            content = data.messages(sample, "", fps, max_frames)[0]["content"]
            images = [i for part in content for i in part.get("video", [part.get("image")]) if i is not None][:4]
            side = 168
            strip = Image.new("RGB", (side * len(images), side), "white")
            for k, image in enumerate(images):
                image = image.resize((side, side), Image.Resampling.BICUBIC)
                strip.paste(image, (side * k, 0))
            strip.save(folder / split / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', sample.id)}.png")


def checkpoint_of(path: Path) -> tuple[Path, dict]:
    """The model folder that a run folder stands for, and the run's configuration; a checkpoint stands for itself."""
    config = path / "config.yaml"
    if not config.exists():
        return path, {}
    settings = yaml.safe_load(config.read_text())
    for stage in ("rl", "sft"):
        if (path / stage / "policy").exists():
            return path / stage / "policy", settings
    sys.exit(f"error: {path} is a run folder without a finished stage; let train.py finish its cold start first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="run folder, or checkpoint folder or hub id")
    parser.add_argument("--data", type=Path, required=True, help="dataset folder or file")
    parser.add_argument("--judge", help="text-only judge: folder or hub id. Adds the share of answerable captions")
    parser.add_argument("--two_stage", action="store_true", help="prompt for thinking and answer only")
    parser.add_argument("--max_new_tokens", type=int, help="longest response (default: the run's, or 768)")
    parser.add_argument("--batch", type=int, default=64, help="rows at a time")
    parser.add_argument("--out", type=Path, help="also write scores and responses to this JSON file")
    parser.add_argument("--on_bad_row", choices=("error", "skip"), default="error", help="skip: leave bad rows out")
    args = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if args.out and not args.out.parent.is_dir():
        sys.exit(f"error: --out: the folder {args.out.parent} does not exist")
    try:
        sets = data.load(args.data, args.on_bad_row)
    except data.DataError as error:
        sys.exit(f"error: {error}")
    model, settings = checkpoint_of(args.model)
    sets = {k: v for k, v in sets.items() if k.startswith("test")} or {"train": sets["train"]}
    options = ("dtype", "attention", "min_pixels", "max_pixels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        policy = vlm.load(str(model), trainable=False, **{k: settings[k] for k in options if k in settings})
    except OSError as error:
        sys.exit(f"error: --model: cannot load {model} ({str(error).splitlines()[0]})")
    policy.to(device)
    four_stage = settings.get("four_stage", True) and not args.two_stage
    length, video = args.max_new_tokens or settings.get("max_new_tokens", 768), {}
    video = {"fps": settings.get("fps", 2.0), "max_frames": settings.get("max_frames", 16)}
    judge = CaptionReward(vlm.LocalJudge(args.judge, device)) if args.judge else None
    names, result = vocabulary(sets), {}
    for split, samples in sets.items():
        texts = []
        for i in tqdm(range(0, len(samples), args.batch), desc=split, unit="batch"):
            texts += respond(policy, samples[i : i + args.batch], four_stage, length, **video)
        result[split] = score(samples, texts, names, four_stage, judge)
        print(f"{split}: {one_line(result[split])}")
        for name, value in result[split]["metrics"]["by category"].items():
            print(f"  {name:<16} {value['value']:6.1%}  [{value['low']:.1%}, {value['high']:.1%}]  n {value['n']}")
        if existence := result[split]["metrics"].get("existence"):
            print("  existence        " + "  ".join(f"{k} {v:.3f}" for k, v in existence.items() if k != "n"))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
