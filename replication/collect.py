"""What is kept of a finished arm: one small JSON file, with the code and the world behind it."""

import hashlib
import json
import os
import platform
import random
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import torch
import transformers
import yaml

import data
import ntk_infonce
from caption_reward import CaptionReward
from config import Config
from engine import ConfigError
from engine.files import read_jsonl, rewrite
from engine.pretrained import open_policy
from reasoning import parse
from replication.arms import ARMS, CODE, REPRESENTED, ROOT, Job, code, decisive
from replication.page import values
from train import judge_of
from world import scenes

PROVENANCE = ("code", "commit", "world", "models", "begins as", "start", "versions", "machine")


def spent(job: Job, seconds: float = 0.0) -> float:
    """The seconds of all attempts at an arm, failed ones too, with those of one more."""
    file = job.folder / "seconds.json"
    total = seconds + (json.loads(file.read_text()) if file.exists() else 0.0)
    rewrite(file, json.dumps(total))
    return total


def collect(job: Job, seconds: float, threads: int, results: Path) -> None:
    """What is kept of a finished arm: RESULTS/ARM-seedN.json. The scores of "ours" give all arms of
    its seed their classes, so those that were there before it are collected again, with the
    provenance that they had.

    Raises ConfigError where the run had other options than its arm has now, or where a result that
    is there began with another cold start.
    """
    folder, selected = job.folder, job.folder / "select" / "selected.json"
    had, wanted = decisive(config_of(job)), ARMS[job.arm].decisive()
    if had != wanted:
        names = ", ".join(name for name in wanted if had.get(name) != wanted[name])
        raise ConfigError(f"{folder}: it was run with another {names} than its arm has now")
    made = provenance(job, threads)
    kept = job.result(results)
    if kept.exists() and json.loads(kept.read_text())["start"] != made["start"]:
        raise ConfigError(
            f"{kept}: it began with another cold start than {folder}, made on another machine or "
            "with other versions. Give another --results, or delete the results of this seed"
        )
    evals = {side: folder / "eval" / f"{side}.json" for side in ("before", "after")}
    rolls = read_jsonl(folder / "rl" / "rollouts.jsonl", repair=False)
    scores = scored(job)
    found = {
        "arm": job.arm,
        "words": ARMS[job.arm].words,
        "seed": job.seed,
        "options": ARMS[job.arm].options,
        "config": had,
        **made,
        "seconds": round(seconds),
        "updates": len({line["step"] for line in rolls}),
        "completions": sum(len(line["text"]) for line in rolls),
        "prompts seen": len({line["id"] for line in rolls}),
        "variance seen": variance_seen(scores, rolls),
        "selected": json.loads(selected.read_text()) if selected.exists() else {},
        "metrics": {
            side: {
                split: values(scored["metrics"]) | truth(scored["rows"], split, job)
                for split, scored in json.loads(file.read_text()).items()
            }
            for side, file in evals.items()
            if file.exists()
        },
        "curves": curves(job, scores, rolls),
        "floor": judge_floor(job) if job.arm == "cold" else {},
        "representations": representations(job) if job.arm in REPRESENTED else {},
    }
    found["selected"].pop("kept", None)
    results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found)
    rewrite(kept, text)
    rewrite(folder / "result.json", text)
    if job.arm == "ours":
        for arm in ARMS:
            other = Job(arm, job.seed)
            if arm != "ours" and other.done:
                collect(other, spent(other), threads, results)


def scored(job: Job) -> dict[str, dict]:
    """The scores of the seed's prompts by id, from the arm that scored them all."""
    file = Job("ours", job.seed).folder / "select" / "scores.jsonl"
    return {line["id"]: line for line in read_jsonl(file, repair=False)}


def variance_seen(scores: dict[str, dict], rolls: list[dict]) -> float | None:
    """Mean over the prompts of all updates of their reward variance before RL."""
    known = [scores[line["id"]]["variance"] for line in rolls if line["id"] in scores]
    return round(sum(known) / len(known), 5) if known else None


def curves(job: Job, scores: dict[str, dict], rolls: list[dict]) -> dict:
    """Means over every fifth of the updates: the metrics, and the rewards by class of prompt."""
    metrics = read_jsonl(job.folder / "rl" / "metrics.jsonl", repair=False)
    if not metrics:
        return {}
    kind = {name: line["class"] for name, line in scores.items()}
    last = max(line["step"] for line in metrics)

    def fifth(line: dict) -> int:
        return (line["step"] - 1) * 5 // last

    sums: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in range(5)])
    for line in metrics:
        for name, value in line.items():
            if isinstance(value, int | float) and name not in ("step", "lr", "seconds"):
                sums[name][fifth(line)].append(value)
    for line in rolls:
        for name in ("accuracy", "caption"):
            known = [r for r in line.get(name, ()) if r is not None]
            if known and line["id"] in kind:
                sums[f"{name}, {kind[line['id']]}"][fifth(line)] += known
    return {
        name: [round(sum(v) / len(v), 5) if v else None for v in parts]
        for name, parts in sorted(sums.items())
    }


def truth(rows: list[dict], split: str, job: Job) -> dict[str, float]:
    """The share of captions of which every phrase is true of the row's scene, and one is about the
    shape asked for: what no reward and no judge sees. Of test and test_prior_breaking; none without
    captions."""
    typical = {"test": scenes.TYPICAL, "test_prior_breaking": 0.0}
    captions = [parse(row["text"]).caption for row in rows]
    if split not in typical or not any(captions):
        return {}
    rng, true = random.Random(f"{job.seed}/{split}"), 0
    for i, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        # the draws of scenes.write_data
        scene, query = scenes.make_row(rng, scenes.KINDS[i % len(scenes.KINDS)], typical[split])
        (scenes.frames if query["kind"] == "motion" else scenes.draw)(rng, scene)
        if scenes.ask(query)[0] != row["problem"]:
            raise ConfigError(f"{job.folder}: row {row['id']} is not of the world of {job.seed}")
        phrases = (caption or "").split(", ")
        facts = {thing.describe() for thing in scene}
        facts |= {f"no {s}" for s in scenes.PRIOR if not scenes.of_shape(scene, s)}
        true += facts.issuperset(phrases) and any(query["shape"] in phrase for phrase in phrases)
    return {"true captions": round(true / len(rows), 5)}


def config_of(job: Job) -> Config:
    return Config(**yaml.safe_load((job.folder / "config.yaml").read_text()))


def representations(job: Job, n: int = 129) -> dict:
    """Figure 5b, c. Final-layer representations of n prompts (mean over the tokens of the reference
    answer) before and after RL. By the cosines of f_i before, prompts are positives of an anchor of
    Eq. 4 (cosine <= tau) or negatives.

    positive, negative: mean distance to the anchor over mean distance of all pairs, over all
    anchors. points: the first two principal components, shown for the first anchor.
    """
    cfg = config_of(job)
    rows = data.load(Path(cfg.world) / "data")["train"][:n]
    positive, found = None, {}
    for side, stage in (("before", "sft"), ("after", "rl")):
        policy = open_policy(str(job.folder / stage / "policy"), cfg, "cpu")
        inputs = policy.encode(data.prompts(rows, cfg.four_stage, cfg.fps, cfg.max_frames))
        ids, mask = policy.encode_responses([f"<answer>{s.answer}</answer>" for s in rows])
        with torch.no_grad():
            hidden = policy(inputs, ids, mask).hidden
            weight, bias = policy.head()
            where = mask.nonzero(as_tuple=True)
            tokens, scale = hidden[where], 1 / mask.sum((1, 2))[where[0], None]
            cosine = ntk_infonce.gradient_cosine(
                tokens * scale, tokens @ weight.T + bias, ids[where], where[0], n
            )
        others = ~torch.eye(n, dtype=torch.bool)
        if positive is None:
            positive = (cosine <= cfg.tau) & others
        mean = (hidden * mask[..., None]).sum((1, 2)) / mask.sum((1, 2))[:, None]
        distance = torch.cdist(mean, mean)
        distance /= distance[others].mean()
        centred = mean - mean.mean(0)
        axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
        flat = centred @ (axes * axes.sum(1, keepdim=True).sign()).T
        found[side] = {
            "positive": round(distance[positive].mean().item(), 4),
            "negative": round(distance[~positive & others].mean().item(), 4),
            "share positive": round(positive[others].float().mean().item(), 4),
            "points": [[round(x, 2) for x in point] for point in flat.tolist()],
        }
    return found | {"is positive": positive[0].int().tolist()}


def judge_floor(job: Job) -> dict[str, float]:
    """The share of each test set that the judge answers rightly from an empty caption."""
    cfg = config_of(job)
    asked = CaptionReward(judge_of(cfg, "cpu")[0])
    sets = data.load(Path(cfg.world) / "data")
    right = {
        name: asked.floor([(s.question, s.answer, s.problem_type) for s in rows])
        for name, rows in sets.items()
        if name.startswith("test")
    }
    return {name: round(sum(each) / len(each), 5) for name, each in right.items()}


def provenance(job: Job, threads: int) -> dict:
    """The code, the world, the cold start, the versions and the machine behind a result; those that
    it was first collected with."""
    if (file := job.folder / "result.json").exists():
        there = json.loads(file.read_text())
        return {name: there[name] for name in PROVENANCE}
    there = json.loads((job.world / "world.json").read_text())
    if there["seed"] != job.seed:
        raise ConfigError(f"world: {job.world} is the world of seed {there['seed']}")
    before = json.loads((job.folder / "eval" / "before.json").read_text())
    # an arm may be tested on corrupted sets too, after the same cold start
    corrupted = tuple(f"_{kind}" for kind in ARMS[job.arm].decisive()["corrupt_eval"].split())
    intact = [rows for name, rows in before.items() if not name.endswith(corrupted)]
    said = [row["text"] for rows in intact for row in rows["rows"]]
    weights = hashlib.sha256()
    for part in ("policy", "judge"):
        weights.update((job.world / part / "model.safetensors").read_bytes())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {
        "code": code(),
        "commit": commit(),
        "world": there["version"],
        "models": weights.hexdigest()[:10],
        "begins as": root(job.arm),
        "start": hashlib.sha256(json.dumps(said).encode()).hexdigest()[:10],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{device}, {threads} thread(s) an arm",
    }


def root(arm: str) -> str:
    """The arm whose cold start an arm has."""
    return root(ARMS[arm].after) if ARMS[arm].after else arm


def processor() -> str:
    """The CPU's name and its cores."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def commit() -> str:
    """The commit of the folder, with "+" where files of CODE differ from it; "" without git."""

    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return ""
        return done.stdout.strip()

    files = [f"{name}.py" for name in CODE]
    changed = git("status", "--porcelain", "-uno", "--", *files)
    return git("rev-parse", "--short=10", "HEAD") + "+" * bool(changed)
