"""Score a checkpoint on held-out rows: right answers, hallucinated captions.

    accelerate launch eval.py --model RUN_OR_CHECKPOINT --data DIR --judge JUDGE
    accelerate launch eval.py --model RUN_OR_CHECKPOINT --benchmarks pope=DIR mmvu=DIR     # as published, or a hub id
    python eval.py --compare RUN_A/benchmarks RUN_B/benchmarks

A run folder stands for its trained policy (or its cold start, when RL has not finished). DIR is a dataset in the
schema of data.py; its test*.json are evaluated, or train.json when there are none, as train.py evaluates them.
Benchmarks (benchmarks.py) are scored by their official rule and by the paper's, and a run of them that stops goes on.
Several processes share the rows.

Measures on own rows, each with what it needs of the rows:
    accuracy        by `category`, with Wilson 95 % intervals
    existence       POPE's measures on yes/no questions: accuracy, precision, recall, F1, share of "yes"
    paired          VideoHallucer's: both rows of a `pair` right
    captions        CHAIR's: share of captioned objects that are not in `objects`, share of captions with such an
                    object; and the share of `relevant` objects that the caption covers
    format          responses with all their stages
    answerable      captions from which the judge answers rightly (with a judge, whatever was rewarded in training)
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from huggingface_hub.errors import HFValidationError
from PIL import Image, ImageOps
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

import answers
import benchmarks
import data
import reasoning
import vlm
from caption_reward import MAX_TOKENS, CaptionReward, EndpointJudge, without_control_tokens
from media import gallery_file
from run import ConfigError, Journal, Run, read_jsonl, rewrite, stop, to_jsonl


def respond(policy: vlm.VLM, samples: list[data.Sample], four_stage=True, max_new_tokens=768, fps=2.0, max_frames=16):
    """The greedy response to each sample, in one batch."""
    if not samples:
        return []
    inputs = policy.encode(data.prompts(samples, four_stage, fps, max_frames))
    return [row[0] for row in policy.generate(inputs, 1, max_new_tokens, sample=False).text]


def evaluate(
    policy: vlm.VLM, sets: dict[str, list[data.Sample]], judge: CaptionReward | None, cfg, run: Run, title: str
):
    """{set: {"metrics": ..., "rows": ...}}: what `policy` says to each row, greedily, and the verdicts on it.

    Each row is answered, and its caption judged, by one process; every process gets all. cfg: four_stage, eval_batch,
    max_new_tokens, fps, max_frames.
    """
    names, result, size = vocabulary(sets), {}, cfg.eval_batch * run.processes
    bar = run.bar(sum(map(len, sets.values())), title, "row")

    def answer(some: list[data.Sample]) -> list[tuple[data.Sample, str]]:
        said = respond(policy, some, cfg.four_stage, cfg.max_new_tokens, cfg.fps, cfg.max_frames)
        return list(zip(some, said, strict=True))

    for split, samples in sets.items():
        answered = []
        for chunk in (samples[i : i + size] for i in range(0, len(samples), size)):
            answered += [pair for part in run.pieces(run.mine(chunk), 0, answer) for pair in part]
            bar.update(len(chunk))
        mine, texts = [list(x) for x in zip(*answered)] or ([], [])
        rows = {row["id"]: row for row in run.gather(verdicts(mine, texts, names, cfg.four_stage, judge))}
        result[split] = summary(samples, [rows[s.id] for s in samples])
    bar.close()
    return result


def vocabulary(sets: dict[str, list[data.Sample]]) -> list[str]:
    """Every object that the rows of any set list: the names that a caption can hallucinate.

    Over all sets, because what a set never shows is just what a model should not see in it.
    """
    return sorted({name for samples in sets.values() for s in samples for name in s.objects or ()})


def summary(samples: list[data.Sample], rows: list[dict]) -> dict:
    """One set's measures, and its rows as `verdicts` gives them."""
    return {"metrics": metrics(samples, rows), "rows": rows}


def verdicts(
    samples: list[data.Sample],
    texts: list[str],
    names: list[str],
    four_stage: bool = True,
    judge: CaptionReward | None = None,
) -> list[dict]:
    """What was said to each sample, and whether it is right. names: from `vocabulary`."""
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
        judged: list[tuple[float, str | None]] = []
        for i in range(0, len(asked), 256):  # a deadline for each 256
            judged += judge(asked[i : i + 256])
            if any(v != v for v, _ in judged[i:]) and not any(reply for _, reply in judged[i:]):
                judged += [(float("nan"), None)] * (len(asked) - len(judged))  # it is gone: do not wait again
                break
        for row, (verdict, reply) in zip(rows, judged, strict=True):
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

    An answer that is neither counts as a "no" here; POPE's own script takes it for a yes (benchmarks.py).
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
                strip.paste(ImageOps.pad(image, (side, side), color="white"), (side * k, 0))
            strip.save(folder / split / gallery_file(sample.id))


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


# --- benchmarks ------------------------------------------------------------------------------------------------------


def on_benchmarks(args: argparse.Namespace) -> None:
    """Ask every row of every benchmark, score by both protocols, print the table. Goes on from what is there."""
    cfg = settings_of(args)
    run = Run(cfg)
    sets = rows_of(cfg, args, run)
    policy = functools.cache(lambda: load(cfg.model, vars(cfg), run.device))
    judged_by = args.judge_model or args.judge or ""
    judge = asked_judge(args, run.device) if args.judge and run.is_main else None
    judge = remembering(judge, judged_by, run.folder) if judge else None
    kept = run.first(lambda: [read_json(run.folder / f"{file}.json") for file in ("scores", "counts")])
    results, counts = kept
    for name in sets:
        if not judged_by and results.get(name, {}).get("judge"):
            raise data.DataError(f"--judge: {name} was scored here with {results[name]['judge']}; give it again")
    for name, rows in sets.items():
        texts = {row.id: prompt_of(name, row, cfg) for row in rows}

        def ask(some: list[data.Sample], texts=texts) -> list[dict]:
            turns, lost = [], []
            for s in some:
                try:
                    turns.append(data.messages(s, texts[s.id], cfg.fps, cfg.max_frames))
                except data.DataError as error:  # key frames alone were looked at before
                    lost.append({"id": s.id, "prompt": texts[s.id], "output": None, "error": str(error)})
            gone = {line["id"] for line in lost}
            ids, length = [s.id for s in some if s.id not in gone], cfg.max_new_tokens
            if not ids:
                return lost
            chance = vlm.uniform_numbers(ids, 1, length, str(cfg.seed)) if cfg.sample else None
            said = policy().generate(policy().encode(turns), 1, length, sample=cfg.sample, draws=chance).text
            return lost + [{"id": i, "prompt": texts[i], "output": row[0]} for i, row in zip(ids, said, strict=True)]

        def answer(mine: list[data.Sample], ask=ask) -> list[dict]:
            return [line for lines in run.parts(mine, 0, ask) for line in lines]

        samples = [benchmarks.sample(name, row) for row in rows]
        file = run.folder / "outputs" / f"{name}.jsonl"
        lines = run.each(file, samples, cfg.eval_batch, answer, name)
        if any(texts.get(line["id"], line["prompt"]) != line["prompt"] for line in lines):
            raise data.DataError(f"{name}: {file} holds answers to other questions; delete it, or give --output_dir")
        if run.is_main:
            found = scored(name, rows, lines, cfg.asked != "direct", judge)
            rewrite(run.folder / f"{name}.jsonl", to_jsonl(verdict_lines(found, rows, lines)))
            results[name] = {protocol: as_json(score) for protocol, score in found.items()}
            results[name] |= {"asked": cfg.asked, "judge": judged_by}
            counts[name] = {protocol: counts_as_json(score) for protocol, score in found.items()}
            print(table(name, results[name]), flush=True)
            for line in notes(found):
                print(f"  {line}")
            if unread := [line["id"] for line in first_of(lines).values() if line["output"] is None]:
                print(f"  clip or picture cannot be decoded: {len(unread)} ({', '.join(unread[:5])})")
        run.write(run.folder / "counts.json", counts)
        run.write(run.folder / "scores.json", results)
    run.say(f"rows, verdicts and scores: {run.folder}")
    run.accelerator.end_training()


def settings_of(args: argparse.Namespace) -> SimpleNamespace:
    """What an evaluation depends on, from the options and the run that trained the model."""
    model, trained = checkpoint_of(Path(args.model))
    given = pairs(args.benchmarks)
    for name in [*given, *pairs(args.media)]:
        if name not in benchmarks.TABLE:
            raise data.DataError(f"--benchmarks: {name!r} is not one of {', '.join(benchmarks.TABLE)}")
        if not (given.get(name) or benchmarks.TABLE[name].hub):
            raise data.DataError(f"--benchmarks: {name} is not on the hub; give {name}=FOLDER")
    template = Path(args.template).read_text() if args.template else ""
    if template and "{Question}" not in template:
        raise data.DataError(f"--template: {args.template} has no {{Question}}")
    two = args.two_stage or not (args.four_stage or trained.get("four_stage", True))
    options = {"dtype": "float32", "attention": "sdpa", "min_pixels": 3136, "max_pixels": 401_408}
    options |= {"fps": 2.0, "max_frames": 16, "max_new_tokens": 768}
    for source in (trained, vars(args)):
        options |= {name: source[name] for name in options if source.get(name) is not None}
    where = Path(args.model).resolve().parts[-3:] if Path(args.model).exists() else (args.model.replace("/", "-"),)
    default = Path(args.model) / "benchmarks" if trained else Path("runs") / f"eval-{'-'.join(where)}"
    return SimpleNamespace(
        output_dir=str(args.output_dir or default),
        model=str(model),
        asked="template" if template else "direct" if args.direct else "two_stage" if two else "four_stage",
        template=template,
        sample=args.sample,
        seed=args.seed,
        limit=args.limit,
        eval_batch=args.batch,
        tracker="",
        quiet=False,
        **options,
    )


def rows_of(cfg: SimpleNamespace, args: argparse.Namespace, run: Run) -> dict[str, list[benchmarks.Row]]:
    """Every benchmark's rows, each looked at before the model is loaded: its picture or clip, its length."""
    media, sets = pairs(args.media), {}
    with run.one_first():
        for name, path in pairs(args.benchmarks).items():
            path = path or benchmarks.TABLE[name].hub[0]
            sets[name] = benchmarks.read(name, path, media.get(name), args.on_bad_row, say_once)
    for name, rows in sets.items():
        whole, some = Counter(row.group for row in rows), rows[: cfg.limit or None]
        begun = Counter(row.group for row in some)  # a pair or a question with its rotations is not cut in two
        sets[name] = [row for row in some if not row.group or begun[row.group] == whole[row.group]]
        if not sets[name]:
            raise data.DataError(f"--limit: {cfg.limit} rows of {name} hold no whole pair or question")
    samples = {name: [benchmarks.sample(name, row) for row in rows] for name, rows in sets.items()}
    kept = {name: {sample.id for sample in fit} for name, fit in fitting(samples, cfg, args.on_bad_row).items()}
    return {name: [row for row in rows if row.id in kept[name]] for name, rows in sets.items()}


def fitting(sets: dict[str, list[data.Sample]], cfg: SimpleNamespace, on_bad_row: str) -> dict[str, list[data.Sample]]:
    """The rows that the model can be asked; the others are bad rows."""
    try:
        context, tokenizer = vlm.context(cfg.model)
    except (OSError, ValueError) as error:
        raise data.DataError(f"--model: cannot load {cfg.model} ({data.reason(error)})") from error
    limits = (cfg.asked != "two_stage", cfg.min_pixels, cfg.max_pixels, cfg.fps, cfg.max_frames)
    fit, problems = data.fitting(sets, tokenizer, context - cfg.max_new_tokens, *limits)
    data.refuse(problems, on_bad_row if all(fit.values()) else "error", say_once)
    return fit


def say_once(text: str) -> None:
    """Before the processes have met."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text)


def read_json(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


def pairs(words: list[str] | None) -> dict[str, str]:
    """['pope=DIR', 'mmvu'] -> {'pope': 'DIR', 'mmvu': ''}"""
    return {name: path for name, _, path in (word.partition("=") for word in words or [])}


def prompt_of(name: str, row: benchmarks.Row, cfg: SimpleNamespace) -> str:
    """The prompt of training, the benchmark's own, or another wording of the stages (the authors' checkpoints)."""
    if cfg.asked == "direct":
        return benchmarks.prompt(name, row)
    if cfg.asked == "template":
        return benchmarks.prompt(name, row, "paper", template=cfg.template)
    sample = benchmarks.sample(name, row)
    return reasoning.prompt(sample.problem, sample.options, sample.problem_type, cfg.asked == "four_stage")


def load(model: str, options: dict, device: torch.device) -> vlm.VLM:
    names = ("dtype", "attention", "min_pixels", "max_pixels")
    try:
        return vlm.load(model, trainable=False, **{k: options[k] for k in names if k in options}).to(device)
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise data.DataError(f"--model: cannot load {model} ({data.reason(error)})") from error


def open_judge(where: str, model: str, device: torch.device, tokens: int = MAX_TOKENS, **endpoint):
    """What answers prompts: a causal LM, or the `model` behind a URL (with EndpointJudge's options). tokens: the most
    that a reply may have, its thought among them. Raises DataError, in one line, where nothing there can be asked."""
    served, folder = where.startswith(("http://", "https://")), Path(where).is_dir()
    if folder and not any((Path(where) / name).exists() for name in ("config.json", "adapter_config.json")):
        raise data.DataError(f"judge: {where} holds no model (config.json)")
    try:
        if served:
            return EndpointJudge(where, model, max_tokens=tokens, **endpoint)
        return vlm.LocalJudge(where, device, max_new_tokens=tokens)
    except Exception as error:
        why = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        if isinstance(error, (OSError, HFValidationError)) and not (served or folder):
            why = f"it is no folder, and the hub gave no model of that name ({why}). A server's URL begins with http://"
        raise data.DataError(f"judge: {why}" if served else f"judge: cannot load {where}: {why}") from error


def asked_judge(args: argparse.Namespace, device: torch.device):
    """The judge of the command line, once it has answered a question: before anything heavy is loaded."""
    judge = open_judge(args.judge, args.judge_model, device, args.judge_max_tokens)
    if judge(["Which letter comes first in the alphabet?"]) == [None]:
        raise data.DataError(f"judge: {judge} does not answer. Its last error: {judge.last_error}")
    return judge


def remembering(judge, name: str, folder: Path):
    """The judge, asked 256 prompts at a time, which is what its deadline is for; its replies are kept."""
    journal = Journal(folder / "judge" / "0.jsonl", name)

    def ask(prompts: list[str]) -> list[str | None]:
        prompts = [without_control_tokens(prompt) for prompt in prompts]  # an output may hold some
        new = list(dict.fromkeys(prompt for prompt in prompts if (prompt, "") not in journal))
        for i in range(0, len(new), 256):
            for prompt, reply in zip(new[i : i + 256], judge(new[i : i + 256]), strict=True):
                if reply is not None:
                    journal[prompt, ""] = reply
        return [journal.get((prompt, "")) for prompt in prompts]

    return ask


def scored(name: str, rows: list, lines: list[dict], lettered: bool, judge) -> dict[str, benchmarks.Score]:
    """The score by each protocol. lettered: yes/no questions were asked as A and B."""
    outputs, tools = [(line["id"], line["output"]) for line in lines], {}
    if any(row.kind == "description" for row in rows):
        try:
            tools = dict(zip(("nouns", "similar"), benchmarks.amber_tools()))
        except data.DataError as error:
            print(f"amber: descriptions stay undecided ({error})")
    options = dict(lettered=lettered, judge=judge, **tools)
    return {p: benchmarks.score(name, rows, outputs, p, **options) for p in benchmarks.PROTOCOLS}


def notes(found: dict[str, benchmarks.Score]) -> list[str]:
    """What went wrong, a line each: once where the protocols agree on it, else with whose rule it is."""
    by_protocol = {protocol: score.notes() for protocol, score in found.items()}
    lines = dict.fromkeys(line for of in by_protocol.values() for line in of)
    whose = {line: [protocol for protocol, of in by_protocol.items() if line in of] for line in lines}
    shared = {line for line in lines if len(whose[line]) == len(found) or whose[line][0] in line}
    return [line if line in shared else f"{whose[line][0]}: {line}" for line in lines]


def first_of(lines: list[dict]) -> dict[str, dict]:
    """The line of each row that counts, where it has two: the first with an output, as in `benchmarks.score`."""
    found = {}
    for line in lines:
        if found.get(line["id"], {}).get("output") is None:
            found[line["id"]] = line
    return found


def verdict_lines(found: dict[str, benchmarks.Score], rows: list, lines: list[dict]) -> Iterator[dict]:
    """One line a row: prompt, raw output, and by protocol what was read and the verdict."""
    said = first_of(lines)
    verdicts = {protocol: {v.id: v for v in score.verdicts} for protocol, score in found.items()}
    for row in rows:
        line = {
            "id": row.id,
            "cluster": row.cluster,
            "prompt": said[row.id]["prompt"],
            "output": said[row.id]["output"],
        }
        for protocol, of in verdicts.items():
            answer = of[row.id].answer
            line[protocol] = {"answer": answer, "verdict": of[row.id].verdict}
        yield line


def as_json(score: benchmarks.Score) -> dict:
    """Metrics by subset with their n, and for the headline's measure the 95 % interval: Wilson's, or a bootstrap over
    pictures and clips where rows share one or the measure is no plain share."""
    subset, measure = benchmarks.TABLE[score.name].headline[score.protocol]
    metrics = {s: {m: dataclasses.asdict(metric) for m, metric in of.items()} for s, of in score.metrics.items()}
    drawn = functools.cache(lambda: benchmarks.intervals(score, measure))
    for where, of in metrics.items():
        one = of.get(measure, {"n": 0})
        if not one["n"] or one["value"] is None:
            continue
        if one["undecided"]:
            most = min(1.0, one["value"] + one["undecided"] / one["n"])
            one |= {"low": one["value"], "high": most, "interval": "none: what the undecided rows leave open"}
        elif one["right"] is not None and not score.clustered:
            wilson = rate_of(one["right"], one["n"])
            one |= {"low": wilson["low"], "high": wilson["high"], "interval": "Wilson"}
        elif where in drawn() and drawn()[where][0] < drawn()[where][1]:  # else too few pictures to say anything
            low, high = drawn()[where]
            one |= {"low": low, "high": high, "interval": "bootstrap over pictures or clips"}
    return {"headline": [subset, measure], "metrics": metrics, "problems": score.problems}


def table(name: str, by_protocol: dict[str, dict]) -> str:
    """The numbers of one benchmark, a line for each protocol and subset; finer subsets ("subject: ...") are in
    scores.json."""
    known = benchmarks.TABLE[name]
    mean, members = benchmarks.MEANS.get(name, ("", ()))
    lines = []
    for protocol in benchmarks.PROTOCOLS:
        found = by_protocol[protocol]
        subset, measure = found["headline"]
        for where in [subset, *(s for s in found["metrics"] if s != subset and ": " not in s)]:
            one = found["metrics"].get(where, {}).get(measure)
            if one:
                value = "-" if one["value"] is None else f"{100 * one['value']:.1f}"
                both = f"[{100 * one['low']:.1f}, {100 * one['high']:.1f}]" if "low" in one else ""
                dropped = f", {one['dropped']} not counted" if one["dropped"] else ""
                there = sum(member in found["metrics"] for member in members)
                if where == mean and there < len(members):
                    where = f"{mean} ({there} of {len(members)})"
                lines.append((protocol, where, measure, value, both, one["n"], f"{one['undecided']}{dropped}"))
    lines.insert(0, ("protocol", "subset", "measure", "%", "95 % interval", "n", "undecided"))
    widths = [max(len(str(line[k])) for line in lines) for k in range(len(lines[0]))]
    left = (0, 1, 2, 4, 6)
    out = [
        "  ".join(f"{x!s:{'<' if k in left else '>'}{w}}" for k, (x, w) in enumerate(zip(line, widths)))
        for line in lines
    ]
    for subset, of in by_protocol["official"]["metrics"].items():
        others = [f"{m} {100 * x['value']:.1f}" for m, x in of.items() if len(of) > 1 and x["value"] is not None]
        if others and ": " not in subset:
            out.append(f"official, {subset}: {', '.join(others)}")
    if known.paper_number:
        out.append(f"published: {known.paper_number} (the paper's row Ours: {known.paper})")
    if by_protocol["asked"] != "direct":
        out.append(
            "asked with the stages of training: official numbers of others are for the benchmark's prompt, --direct"
        )
    elif known.paper_number:
        out.append("asked with the benchmark's own prompt: the paper's rule wants the form that training asks for")
    out.append(f"do not compare: {known.beware}")
    return "\n  ".join([known.title, *map(str.rstrip, out)])


def counts_as_json(score: benchmarks.Score) -> dict[str, list]:
    return {cluster: [[*key, n] for key, n in parts.items()] for cluster, parts in score.counts.items()}


def compare(first: Path, second: Path) -> None:
    """What two evaluations differ by: paired bootstrap over pictures and clips, and McNemar's test over rows where
    these are independent."""
    first, second = (f / "benchmarks" if (f / "benchmarks").is_dir() else f for f in (first, second))
    results = [{n: json.loads((f / f"{n}.json").read_text()) for n in ("scores", "counts")} for f in (first, second)]
    shared = [name for name in results[0]["scores"] if name in results[1]["scores"]]
    if not shared:
        raise data.DataError(f"--compare: {first} and {second} have no benchmark in common")
    print(f"A: {first}\nB: {second}")
    settings = [yaml.safe_load((f / "config.yaml").read_text()) for f in (first, second)]
    for key in ("model", "asked", "template", "limit", "max_new_tokens", "max_pixels", "max_frames", "dtype", "sample"):
        if settings[0].get(key) != settings[1].get(key):
            print(f"  {key}: {settings[0].get(key)!r} in A, {settings[1].get(key)!r} in B")
    print()
    form = "  {:<14} {:<9} {:<34} {:>6} {:>6}  {:<24} {:<8} {}"
    print(form.format("benchmark", "protocol", "measure", "A", "B", "B - A [95 %], points", "p", "McNemar's p"))
    for name in shared:
        rows = [{line["id"]: line for line in read_jsonl(f / f"{name}.jsonl", mend=False)} for f in (first, second)]
        if odd := sorted(rows[0].keys() ^ rows[1].keys()):
            raise data.DataError(
                f"--compare: {name}: rows are in one of them only: {len(odd)} ({', '.join(odd[:3])}). Evaluate both on "
                "the same rows, with the same --limit"
            )
        if len({result["scores"][name]["judge"] for result in results}) > 1:
            print(f"  {name}: judged differently")
        for protocol in benchmarks.PROTOCOLS:
            subset, measure = results[0]["scores"][name][protocol]["headline"]
            scores = [_again(name, protocol, result) for result in results]
            try:
                found = benchmarks.difference(*scores, subset, measure)
            except ValueError as error:
                raise data.DataError(f"--compare: {name}: {error}; evaluate both on the same rows") from error
            if found["value"] is None:
                print(form.format(name, protocol, f"{measure}, {subset}", "-", "-", "undecided, or of nothing", "", ""))
                continue
            a, b = (score.metrics[subset][measure].value for score in scores)
            verdicts = [{i: line[protocol]["verdict"] for i, line in of.items()} for of in rows]
            counted = [i for i in rows[0] if {v[i] for v in verdicts} <= {"right", "wrong"}]
            alone = len({rows[0][i]["cluster"] for i in counted}) == len(counted)
            right = [[v[i] == "right" for i in counted] for v in verdicts]
            of_rows = alone and measure == "accuracy" and counted
            test = f"{benchmarks.mcnemar(*right):.3f}" if of_rows else "not by rows"
            points = f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
            numbers = (f"{100 * a:.1f}", f"{100 * b:.1f}", points, f"{found['p']:.3f}")
            print(form.format(name, protocol, f"{measure}, {subset}", *numbers, test))


def _again(name: str, protocol: str, result: dict) -> benchmarks.Score:
    """A score from what was kept of it."""
    kept = result["counts"][name][protocol]
    counts = {cluster: Counter({tuple(key): n for *key, n in parts}) for cluster, parts in kept.items()}
    total = Counter()
    for parts in counts.values():
        total.update(parts)
    return benchmarks.Score(name, protocol, [], benchmarks.measures(name, protocol, total), {}, counts)


# --- command line ----------------------------------------------------------------------------------------------------


class Sharing(Run):
    """Processes that share rows, and keep nothing but --out."""

    def _claim_folder(self) -> None:
        self.folder = None


def on_own_rows(args: argparse.Namespace) -> None:
    """The test*.json of a dataset in the schema of data.py."""
    if args.out and not args.out.parent.is_dir():
        raise data.DataError(f"--out: the folder {args.out.parent} does not exist")
    cfg = settings_of(args)
    cfg.four_stage = cfg.asked == "four_stage"
    run = Sharing(cfg)
    with run.one_first():
        sets = data.load(args.data, args.on_bad_row, say_once)
    sets = {k: v for k, v in sets.items() if k.startswith("test")} or {"train": sets["train"]}
    sets = fitting(sets, cfg, args.on_bad_row)
    judge = CaptionReward(asked_judge(args, run.device)) if args.judge else None
    result = evaluate(load(cfg.model, vars(cfg), run.device), sets, judge, cfg, run, "evaluate")
    for split, scored in result.items():
        run.say(f"{split}: {one_line(scored)}")
        for name, value in scored["metrics"]["by category"].items():
            run.say(f"  {name:<16} {value['value']:6.1%}  [{value['low']:.1%}, {value['high']:.1%}]  n {value['n']}")
        if existence := scored["metrics"].get("existence"):
            run.say("  existence        " + "  ".join(f"{k} {v:.3f}" for k, v in existence.items() if k != "n"))
    if args.out:
        run.write(args.out, result)
    run.accelerator.end_training()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="run folder, or checkpoint or adapter folder or hub id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="dataset folder or file in the schema of data.py")
    what.add_argument("--benchmarks", nargs="+", metavar="NAME=PATH", help=f"of {', '.join(benchmarks.TABLE)}")
    what.add_argument(
        "--compare", nargs=2, type=Path, metavar="FOLDER", help="two folders that --benchmarks has written"
    )
    parser.add_argument(
        "--media", nargs="+", metavar="NAME=PATH", help="where pictures or clips lie apart from the rows"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--four_stage", action="store_true", help="the prompt of training (default, unless the run had none)"
    )
    how.add_argument("--direct", action="store_true", help="the benchmark's own prompt")
    how.add_argument("--template", help="file with a wording of the stages, {Question} in it, for other checkpoints")
    how.add_argument(
        "--two_stage", action="store_true", help="prompt for thinking and answer only (default for such a run)"
    )
    parser.add_argument("--limit", type=int, default=0, help="first rows of each benchmark only (0: all)")
    parser.add_argument("--sample", action="store_true", help="sample at T = 1 instead of greedy responses")
    parser.add_argument("--seed", type=int, default=0, help="of --sample")
    parser.add_argument("--judge", help="causal LM, or URL: captions (--data), or what no rule decides (--benchmarks)")
    parser.add_argument("--judge_model", default="", help="model at the judge's URL; its key comes from OPENAI_API_KEY")
    parser.add_argument(
        "--judge_max_tokens", type=int, default=MAX_TOKENS, help="most tokens of its reply, with thought"
    )
    parser.add_argument("--max_new_tokens", type=int, help="longest response (default: the run's, or 768)")
    parser.add_argument("--max_pixels", type=int, help="of a picture or frame (default: the run's, or 401408)")
    parser.add_argument("--max_frames", type=int, help="of a clip (default: the run's, or 16)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="(default: the run's, or float32)")
    parser.add_argument("--batch", type=int, default=64, help="rows at a time in each process")
    parser.add_argument("--output_dir", help="folder of --benchmarks (default: benchmarks/ in the run folder)")
    parser.add_argument("--out", type=Path, help="with --data: also write scores and responses to this JSON file")
    parser.add_argument("--on_bad_row", choices=("error", "skip"), default="error", help="skip: leave bad rows out")
    args = parser.parse_args()
    if not args.compare and not args.model:
        parser.error("--model is needed")
    if args.batch < 1 or args.limit < 0:
        parser.error("--batch must be at least 1, --limit 0 or more")
    own = {"out": args.out}
    published = {n: getattr(args, n) for n in ("media", "direct", "template", "limit", "sample", "output_dir")}
    for name, value in (own if args.benchmarks else published if args.data else {}).items():
        if value:
            parser.error(f"--{name} is for {'--data' if args.benchmarks else '--benchmarks'}")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if args.compare:
            compare(*args.compare)
        elif args.benchmarks:
            on_benchmarks(args)
        else:
            on_own_rows(args)
    except (data.DataError, ConfigError, OSError) as error:
        stop(f"error: {error}")
    except KeyboardInterrupt:
        goes_on = ". The same command goes on from the rows that are answered" if args.benchmarks else ""
        stop(f"\ninterrupted{goes_on}", everyone=True)


if __name__ == "__main__":
    main()
