"""The stage of selection: which prompts RL trains on; and what runs with one cold start share.

`variance_select` has the mathematics. select/scores.jsonl holds every prompt with its rewards,
select/selected.json the ids that were kept.
"""

import json
import math
import shutil
from collections import Counter
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import torch
import yaml
from torch import Tensor

import data
import report
import variance_select
from caption_reward import CaptionReward
from config import SHARED, Config
from engine import ConfigError, DataError, counted
from engine.files import read_jsonl, rewrite, to_jsonl
from engine.loader import read_ahead
from engine.pretrained import open_policy
from engine.run import Run
from rewards import reward, reward_judge, rewards_as_json, total
from rollouts import roll_out


def select_prompts(
    start: str, samples: list[data.Sample], judge: CaptionReward | None, cfg: Config, run: Run
) -> list[data.Sample]:
    """Score every prompt by its responses' rewards and keep the top share by variance (D-40).

    select/scores.jsonl gets one line per prompt as it is scored, so an interrupted stage is resumed
    where it stopped. A prompt with a missing verdict is scored again, once and whenever the stage
    is resumed; one with most of them missing is not ranked.
    """
    if not cfg.selection:
        return samples
    chosen, file = (run.folder / "select" / name for name in ("selected.json", "scores.jsonl"))
    if not run.from_main(chosen.exists):
        # not needed where all are scored
        policy = cache(lambda: open_policy(start, cfg, run.device))

        def score(shard: list[data.Sample]) -> list[dict]:
            micro_batches = run.micro_batches(
                shard, 0, lambda some: roll_out(some, policy(), cfg, "select", cfg.responses)
            )
            now = reward_judge(judge, policy(), cfg)
            rewards = [tables for tables, _ in reward(micro_batches, now, cfg)]
            scored = zip(micro_batches, rewards)
            return [line for m, tables in scored for line in score_lines(m.samples, tables, cfg)]

        for _ in range(2):
            run.keep_lines(file, lambda line: line["known"] == cfg.responses)
            scores = run.resumable_map(
                file, samples, cfg.select_batch, score, "select", partial(read_ahead, cfg=cfg)
            )
        run.write(chosen, _selected(samples, scores, judge, cfg, run))
    found = run.from_main(lambda: json.loads(chosen.read_text()))
    kept = set(found["kept"])
    run.say(f"selection: {len(kept)} of {len(samples)} prompts kept")
    wanted = variance_select.share_of(found["of"] - found.get("unjudged", 0), cfg.keep)
    if len(kept) < wanted:
        run.say(
            f"  --keep {cfg.keep:g} stands for {wanted}, but all responses to "
            f"{counted(found['tied'], 'prompt')} earn the same, which teaches nothing"
        )
    for line in filter(None, report.selected_by_category(found)):
        run.say(f"  {line}")
    return [s for s in samples if s.id in kept]


def _selected(
    samples, scores: list[dict], judge: CaptionReward | None, cfg: Config, run: Run
) -> dict:
    """selected.json: the ids kept, and by category how many were kept, scored and tied."""
    known = [line for line in scores if 2 * line["known"] >= cfg.responses]
    if len(known) < len(scores) / 2:
        asked = getattr(judge, "judge", None)  # none where the policy judges
        errors = run.gather_object([getattr(asked, "last_error", "")])
        raise ConfigError(
            f"selection: the judge gave no verdict on most captions of {len(scores) - len(known)} "
            f"of {len(scores)} prompts, although it was asked twice. Its last error: "
            f"{next(filter(None, errors), 'unknown')}. The same command asks again"
        )
    if cfg.select_class:
        scores, known = (
            [line for line in lines if line["class"] == cfg.select_class]
            for lines in (scores, known)
        )
    of_class = {line["id"] for line in scores}
    kind = {sample.id: sample.category for sample in samples if sample.id in of_class}
    ids = [line["id"] for line in known]
    variance = torch.tensor([line["variance"] for line in known])
    within = [kind[i] for i in ids] if cfg.select_within else None
    kept = variance_select.select_top_variance(ids, variance, cfg.keep, within)
    if not kept:
        which = f" of class {cfg.select_class}" if cfg.select_class else ""
        if not scores:
            raise DataError(f"selection: no prompt is{which}. Choose another --select_class")
        raise DataError(
            f"selection: all {cfg.responses} responses of every prompt{which} earn the same "
            "reward, so RL has nothing to learn from. Train the cold start longer, or give harder "
            "or easier prompts"
        )
    tied = [line["id"] for line in known if line["variance"] == 0]
    counts = [Counter(kind[i] for i in some) for some in (kept, kind, tied)]
    return {
        "kept": kept,
        "of": len(scores),
        "tied": len(tied),
        "unjudged": len(scores) - len(known),
        "within": cfg.select_within,
        "class": cfg.select_class,
        "categories": {name: [count[name] for count in counts] for name in sorted(counts[1])},
    }


def score_lines(samples: list[data.Sample], rewards: dict[str, Tensor], cfg: Config) -> list[dict]:
    """Lines of select/scores.jsonl, one per prompt: statistics of the total reward, class, every
    reward."""
    # in double precision, so that round-off parts no prompts of equal variance
    reward = total({name: table.double() for name, table in rewards.items()}, cfg)
    # a mean in place of an unknown one would lower the variance
    if cfg.reward_weights.get("caption"):
        reward = reward.masked_fill(rewards["caption"].isnan(), math.nan)
    stats = variance_select.reward_statistics(reward)
    best = sum(cfg.reward_weights.values()) - cfg.reward_weights.get("leak", 0.0)
    return [
        {
            "id": sample.id,
            "known": int(stats.count[i]),
            "mean": round(stats.mean[i].nan_to_num(0.0).item(), 6),
            "variance": float(f"{stats.variance[i].item():.6g}"),
            "class": variance_select.classify(stats.mean[i].item(), stats.variance[i].item(), best),
            **rewards_as_json(rewards, i),
        }
        for i, sample in enumerate(samples)
    ]


def shared_options(cfg: Config) -> dict:
    """The options of --share's run. Raises ConfigError where it has no cold start, or another."""
    source = Path(cfg.share)
    file = source / "config.yaml"
    if not (file.is_file() and (source / "sft" / "policy").is_dir()):
        raise ConfigError(
            f"share: {source} is not a run folder with a finished cold start (sft/policy)"
        )
    there = Config.in_words(yaml.safe_load(file.read_text()))
    merged = there.get("merge") and there["lora_rank"] and there["method"] == "sft"
    if merged and cfg.method != "sft":
        raise ConfigError(f"share: {source} has merged the adapter that RL would go on with")
    differ = [f"{k}: {there.get(k)!r}" for k in SHARED if there.get(k) != getattr(cfg, k)]
    if differ:
        raise ConfigError(f"share: {source} has another cold start: {', '.join(differ)}")
    return there


def take_over(cfg: Config, run: Run) -> None:
    """Take over what --share has finished before RL, so that runs differ in RL alone: the cold
    start, its evaluation, the judge's replies, and the responses scored for selection, whose
    variance is taken anew by this run's rewards."""
    # the cold start is taken over last
    if not cfg.share or run.from_main((run.folder / "sft" / "policy").exists):
        return
    source, there = Path(cfg.share), shared_options(cfg)
    rows = [folder / "data.json" for folder in (source, run.folder)]
    if json.loads(rows[0].read_text()) != json.loads(rows[1].read_text()):
        raise ConfigError(
            f"share: {source} has another cold start: its rows or their media are not those of now"
        )
    if run.is_main:
        lines = read_jsonl(source / "select" / "scores.jsonl", repair=False)
        tables = {
            name: torch.tensor([[math.nan if r is None else r for r in x[name]] for x in lines])
            for name in cfg.reward_weights
            if lines and name in lines[0]
        }
        same = {
            name: all(there.get(k, getattr(Config, k)) == getattr(cfg, k) for k in names)
            for name, names in {
                "prompts": ("corrupt_train", "corrupt_share", "train_set"),
                "tests": ("corrupt_eval",),
            }.items()
        }
        kinds = (there.get("caption_reward"), cfg.caption_reward)
        judged_alike = kinds[0] == kinds[1]
        same["tests"] &= judged_alike or "self" not in kinds
        # without captions judged there, the responses are sampled anew here
        rewards = len(tables) == len(cfg.reward_weights) and not cfg.reward
        rewards &= judged_alike or not cfg.caption_reward
        if cfg.selection and same["prompts"] and rewards:
            some = [SimpleNamespace(id=line["id"]) for line in lines]
            file = run.folder / "select" / "scores.jsonl"
            file.parent.mkdir(exist_ok=True)
            rewrite(file, to_jsonl(score_lines(some, tables, cfg)))
        for name in ("judge", *(["eval"] if same["tests"] else []), "sft"):
            unfinished = run.folder / f".{name}.unfinished"
            shutil.rmtree(run.folder / name, ignore_errors=True)
            if (source / name).exists():
                left = shutil.ignore_patterns("after.json")
                shutil.copytree(source / name, unfinished, dirs_exist_ok=True, ignore=left)
                unfinished.rename(run.folder / name)
    run.accelerator.wait_for_everyone()
