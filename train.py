"""The whole method, top to bottom: `main` reads as the paper's Method section.

    accelerate launch train.py                    # the embedded world: minutes on a laptop, nothing to download
    accelerate launch train.py --data DIR         # your own pictures and clips (data.py has the schema)
    accelerate launch train.py --method grpo      # the baseline; every mechanism of the paper is a switch

Paper section -> code: Redefine the Reasoning Paradigm -> reasoning.py and `cold_start`; Caption Reward ->
caption_reward.py; Reward Variance-Guided Sample Selection -> variance_select.py and `select_prompts`; GRPO, Eq. 1 ->
grpo.py; Conflict-Aware Regularization, Eq. 4 -> ntk_infonce.py. Departures from the paper: DEPARTURES.md.
"""

import dataclasses
import importlib.util
import json
import math
import os
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import yaml
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import gather_object, set_seed
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import Tensor
from tqdm import tqdm
from transformers import BatchFeature, HfArgumentParser, get_cosine_schedule_with_warmup
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

import answers
import data
import eval as evaluation
import grpo
import ntk_infonce
import reasoning
import report
import shapes
import variance_select
import vlm
from caption_reward import CaptionReward, EndpointJudge, only_states_the_answer


def main(cfg: "Config") -> None:
    run = Run(cfg)
    sets = run.open_data()
    judge = run.open_judge(sets)

    # Redefine the Reasoning Paradigm: a supervised cold start teaches planning, caption, thinking and answer.
    start = cold_start(sets, cfg, run)
    evaluate("before", start, sets, judge, cfg, run)

    if cfg.method != "sft":
        # Reward Variance-Guided Sample Selection: 64 responses a prompt; keep the half whose rewards differ most.
        prompts = select_prompts(start, sets["train"], judge, cfg, run)

        # Reinforcement learning: GRPO with the Caption Reward, and the conflict regulariser.
        steps = updates(cfg.rl_steps, cfg.rl_epochs, len(prompts), cfg.prompts_per_step)
        learner = Learner("rl", start, steps, cfg.rl_lr, cfg, run)
        reference = Reference(start, learner, cfg)  # the model after the cold start, frozen
        for step, batch in learner.batches(prompts, cfg.prompts_per_step):
            parts = run.parts(batch, cfg.prompts_per_pass, roll_out, learner.policy, reference, cfg, step)
            for part, (rewards, replies) in zip(parts, reward(parts, judge, cfg)):
                part.rewards, part.replies = rewards, replies  # accuracy, format, caption   [B, G] each
                part.adv = grpo.group_advantages(grpo.total_reward(part.rewards, cfg.reward_weights))
            counts = run.count(parts)  # of the global batch

            for _ in range(cfg.iterations):
                tokens_of_f = all_tokens_of_f(learner.policy, parts, cfg)
                for i, part in learner.passes(parts):
                    scores = learner.model(part.inputs, part.branches, part.fed)  # G responses and the answer
                    logp = scores.logp[:, : cfg.group_size].flatten(0, 1)  # [B * G, T]
                    part.old_logp = logp.detach() if part.old_logp is None else part.old_logp
                    loss, part.stats = grpo.grpo_loss(  # Eq. 1
                        logp, part.old_logp, part.adv.flatten(), part.mask, part.ref_logp, **cfg.grpo_options, **counts
                    )
                    nce = loss.new_zeros(())
                    if cfg.nce_weight:  # Eq. 4, f_i = d log pi(y_i | x_i) / d head, y_i the reference answer
                        everyone = [*tokens_of_f[:i], part.tokens_of_f(scores, cfg.nce_feature), *tokens_of_f[i + 1 :]]
                        cosine = similarity(everyone, cfg.nce_feature, learner.policy.head(trained=part is parts[-1]))
                        tau = ntk_infonce.quantile_tau(cosine, cfg.tau_quantile) if cfg.tau_quantile else cfg.tau
                        nce, part.nce_stats = ntk_infonce.info_nce(cosine, tau, cfg.nce_temperature)
                    learner.backward(loss * run.processes + cfg.nce_weight * nce)
                    part.record(scores, loss, nce)
                learner.update()
            learner.log_rollouts(step, parts)
        policy = learner.finish()
        evaluate("after", policy, sets, judge, cfg, run)

    run.finish()


# --- configuration --------------------------------------------------------------------------------------------------


def option(default: Any, text: str) -> Any:
    """One field of Config: its default, what it does, and [where the value comes from]."""
    return dataclasses.field(default=default, metadata={"help": text})


MECHANISMS = {  # what --method stands for; each switch can be set by itself
    "ours": {"four_stage": True, "caption_reward": True, "selection": True, "nce_weight": 0.01},
    "grpo": {"four_stage": False, "caption_reward": False, "selection": False, "nce_weight": 0.0},
    "sft": {"four_stage": True, "caption_reward": False, "selection": False, "nce_weight": 0.0},
}
ATTENTION = ("sdpa", "eager", "flex_attention", "flash_attention_2")
FEW = 64  # questions on which the judge is tried
DENSE_LOGITS = 2**26  # numbers; beyond it Eq. 4 takes the vocabulary in chunks
PATIENCE = timedelta(hours=1)  # after which processes that wait for another give up
FREE_TO_CHANGE = (
    "output_dir",
    "judge_concurrency",
    "judge_deadline",
    "quiet",
    "tracker",
    "show_every",
    "save_every",
    "eval_batch",
    "select_batch",
    "prompts_per_pass",
    "gradient_checkpointing",
    "compile",
)  # between a run and its resumption


@dataclass
class Config:
    """Every value of a run, in one flat block. Defaults fit the embedded world. D-1 and the like: DEPARTURES.md."""

    method: str = option(
        "ours", "ours, grpo (plain: two stages, two rewards, D-43) or sft (cold start) [paper, Table 1]"
    )
    four_stage: bool | None = option(None, "planning and caption stages too; default by --method [paper, Table 2]")
    caption_reward: bool | None = option(None, "the Caption Reward; default by --method [paper, Table 2]")
    selection: bool | None = option(None, "top half of the prompts by variance; default by --method [paper, Table 3]")
    nce_weight: float | None = option(None, "weight of Eq. 4, 0 = off; ours: 0.01, D-55 [official code, paper silent]")

    model: str = option("", "Qwen2.5-VL, folder or hub id; empty: the embedded world's tiny policy [choice]")
    data: str = option("", "dataset folder or file (see data.py); empty: the embedded world's [choice]")
    judge: str = option("", "causal LM, or OpenAI-compatible URL; empty: the embedded world's [choice]")
    judge_model: str = option("", "model at the judge's URL; its key comes from OPENAI_API_KEY [choice]")
    judge_concurrency: int = option(16, "calls at a time to the judge's URL, in each process [choice]")
    judge_deadline: float = option(600.0, "seconds for a step's calls; the rest is unknown, D-15 [choice]")
    world: str = option("shapes-world", "where the embedded world is built, once [choice]")
    output_dir: str = option("", "run folder; empty: runs/METHOD-DATA-MODEL-seedSEED, those given [choice]")
    seed: int = option(0, "of data order, sampling and LoRA initialisation [choice]")

    on_bad_row: str = option("error", "error: stop before any work; skip: leave bad rows out [choice]")
    min_pixels: int = option(3136, "pictures and frames are enlarged to at least this [qwen-vl-utils: 4 tokens]")
    max_pixels: int = option(401408, "and reduced to at most this [official code]")
    fps: float = option(2.0, "frames a second taken from a clip [qwen-vl-utils]")
    max_frames: int = option(16, "most frames taken from a clip [Video-R1]")
    max_prompt_tokens: int = option(0, "longer prompts are bad rows; 0: what the model takes [choice]")

    dtype: str = option("float32", "float32 or bfloat16 [official code: bfloat16]")
    attention: str = option("sdpa", f"{', '.join(ATTENTION)}; the last shares no prompt in scoring [choice]")
    lora_rank: int = option(0, "rank of LoRA on the language model's linears; 0: full fine-tuning [official code]")
    merge: bool = option(False, "with LoRA: write whole weights at the end of RL, not the adapter alone [choice]")
    train_vision: bool = option(False, "train the vision tower as well [choice]")
    gradient_checkpointing: bool = option(False, "recompute activations, saves memory [official code: true]")

    compile: bool = option(False, "torch.compile the language model: slow to start, then faster [choice]")

    sft_steps: int = option(250, "cold-start updates; 0: none [choice; official code: 2 epochs]")
    sft_epochs: float = option(0.0, "above 0: this many passes over the rows in place of sft_steps [official code: 2]")
    sft_batch: int = option(32, "rows per cold-start update, over all processes [choice; official code: 8]")
    sft_lr: float = option(2e-3, "cold-start learning rate [choice for a 1.5 M model; official code: 1e-6]")

    responses: int = option(64, "responses per prompt scored for selection [paper]")
    keep: float = option(0.5, "share of the prompts kept [paper]")
    select_batch: int = option(16, "prompts scored at a time in each process, by memory [choice]")

    rl_steps: int = option(60, "updates of reinforcement learning [choice; official code: 1 epoch]")
    rl_epochs: float = option(0.0, "above 0: this many passes over the prompts in place of rl_steps [official code: 1]")
    prompts_per_step: int = option(32, "prompts per update, over all processes [choice; official code: 8]")
    prompts_per_pass: int = option(0, "prompts per pass in each process, to save memory; 0: all [choice]")
    group_size: int = option(8, "G, responses per prompt [official code; paper silent]")
    max_new_tokens: int = option(40, "longest response [choice; official code: 768]")
    rl_lr: float = option(3e-4, "learning rate, cosine [choice for a 1.5 M model; official code: 1e-6]")
    warmup: float = option(0.05, "share of a stage's updates with rising rate [choice; official code: 0]")
    weight_decay: float = option(0.01, "AdamW's [official code]")
    max_grad_norm: float = option(1.0, "gradient clipping [choice; official code: 5]")
    beta: float = option(0.04, "weight of the KL in Eq. 1; 0: no reference model [official code, paper silent]")
    kl_kind: str = option("k3", "k1, k2, k3 or rho_k3 [official code]")
    eps_low: float = option(0.2, "clip(rho, 1 - eps_low, 1 + eps_high) in Eq. 1 [GRPO, paper silent]")
    eps_high: float = option(0.2, "see eps_low [GRPO, paper silent]")
    loss_norm: str = option("sequence", "sequence (Eq. 1), token (DAPO) or constant (Dr. GRPO) [paper]")
    iterations: int = option(1, "updates per batch of responses; above 1 the clip acts, D-3 [official code]")

    accuracy_weight: float = option(1.0, "of the accuracy reward [official code]")
    format_weight: float = option(0.1, "of the format reward [official code]")
    caption_weight: float = option(1.0, "of the Caption Reward [official code]")
    leak_penalty: float = option(0.0, "taken off where a caption only states the answer, D-14; 0: counted [choice]")
    lenient: bool = option(False, "accuracy reward by the lenient rule of answers.py [official code: strict]")
    nce_feature: str = option(
        "reference", f"y_i of Eq. 4, D-51: {', '.join(ntk_infonce.FEATURES)} [choice; official code: hidden_mean]"
    )
    tau: float = option(0.54, "cosine threshold of Eq. 4, D-54 [paper, Figure 5a]")
    tau_quantile: float = option(0.0, "above 0: tau is this quantile of the batch's cosines instead [choice]")
    nce_temperature: float = option(1.0, "temperature of Eq. 4, D-53 [paper: none]")

    eval_batch: int = option(64, "rows per evaluation batch in each process [choice]")
    show_every: int = option(10, "print a sampled response every so many updates, 0: never [choice]")
    save_every: int = option(20, "checkpoint every so many updates [choice; official code: 100]")
    tracker: str = option("", "also log to tensorboard or wandb, through accelerate [choice]")
    quiet: bool = option(False, "print only the result [choice]")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is loaded. Resolves what --method leaves open."""
        choices = {
            "method": tuple(MECHANISMS),
            "on_bad_row": ("error", "skip"),
            "dtype": ("float32", "bfloat16"),
            "attention": ATTENTION,
            "kl_kind": grpo.KL_KINDS,
            "loss_norm": ("sequence", "token", "constant"),
            "nce_feature": tuple(ntk_infonce.FEATURES),
            "tracker": ("", "tensorboard", "wandb"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(filter(None, allowed))}")
        for name, value in MECHANISMS[self.method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        positive = (
            "judge_concurrency prompts_per_step sft_batch select_batch eval_batch max_new_tokens iterations save_every"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("responses", "group_size"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name}: a group of one has no variance and no advantage; give at least 2")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ConfigError(f"min_pixels: must lie in (0, max_pixels], got {self.min_pixels} and {self.max_pixels}")
        url = urlsplit(self.judge)
        if url.username or url.password or url.query:
            raise ConfigError("judge: no key or password in its URL, which is written down; it goes to OPENAI_API_KEY")
        if not 0 < self.keep <= 1:
            raise ConfigError(f"keep: must lie in (0, 1], got {self.keep}")
        if not -1 <= self.tau <= 1:
            raise ConfigError(f"tau: is a cosine and must lie in [-1, 1], got {self.tau}")
        if not 0 <= self.tau_quantile < 1:
            raise ConfigError(f"tau_quantile: must lie in [0, 1), got {self.tau_quantile}")
        if self.caption_reward and not self.four_stage:
            raise ConfigError("caption_reward: there is no caption without four_stage; set --caption_reward false")
        if self.lora_rank and self.train_vision:
            raise ConfigError("train_vision: LoRA covers the language model only; set --lora_rank 0 to train vision")
        if self.attention == "flex_attention" and not torch.cuda.is_available():
            raise ConfigError("attention: flex_attention has no backward pass on a CPU; give sdpa")
        if self.attention == "flash_attention_2" and not (is_flash_attn_2_available() and self.dtype == "bfloat16"):
            raise ConfigError("attention: flash_attention_2 needs a GPU, pip install flash-attn and --dtype bfloat16")
        if self.tracker and importlib.util.find_spec(self.tracker) is None:
            raise ConfigError(f"tracker: {self.tracker} is not installed; pip install {self.tracker}")
        if self.model and self.caption_reward and not self.judge:
            raise ConfigError("judge: your own model needs a judge of its own; give --judge, or --caption_reward false")
        if self.judge.startswith("http") and not self.judge_model:
            raise ConfigError("judge_model: name the model that the judge's URL serves")
        if not 0 < self.judge_deadline < PATIENCE.total_seconds():
            raise ConfigError(f"judge_deadline: must lie in (0, {PATIENCE.seconds}) seconds, got {self.judge_deadline}")
        at_least_0 = "max_prompt_tokens leak_penalty sft_steps rl_steps show_every prompts_per_pass lora_rank "
        at_least_0 += "nce_weight beta eps_low eps_high sft_epochs rl_epochs"
        for name in at_least_0.split():
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: must be 0 or more, got {getattr(self, name)}")
        for name in "sft_lr rl_lr max_grad_norm nce_temperature fps max_frames".split():
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: must be above 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup: is a share of a stage's updates and must lie in [0, 1), got {self.warmup}")
        given = (Path(self.data).stem, Path(self.model).name, f"seed{self.seed}")
        self.output_dir = self.output_dir or "runs/" + "-".join(filter(None, (self.method, *given)))

    @property
    def reward_weights(self) -> dict[str, float]:
        weights = {"accuracy": self.accuracy_weight, "format": self.format_weight}
        if self.caption_reward:
            weights |= {"caption": self.caption_weight, "leak": self.leak_penalty}
        return weights

    @property
    def grpo_options(self) -> dict[str, Any]:
        names = ("beta", "eps_low", "eps_high", "kl_kind", "loss_norm")
        return {name: getattr(self, name) for name in names} | {"max_tokens": self.max_new_tokens}


class ConfigError(ValueError):
    """A setting that cannot work, in one line."""


def parse_config(argv: list[str]) -> Config:
    """Command line -> Config. `--config file.yaml` may come anywhere; options on the command line win over it."""
    about = (
        "Ground What You See: cold start, selection, GRPO with caption reward and InfoNCE, evaluation, report. "
        "Options marked D-1 and the like are explained in DEPARTURES.md."
    )
    parser = HfArgumentParser(Config, description=about, prog="train.py", allow_abbrev=False)
    parser.add_argument("--config", help="YAML file with any of these options; the command line wins over it")
    names = {f.name for f in dataclasses.fields(Config)}
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if argv.count("--config") > 1:
        raise ConfigError("--config: give one file")
    if "--config" in argv:
        at = argv.index("--config")
        path, argv = argv[at + 1 : at + 2], argv[:at] + argv[at + 2 :]
        try:
            values = yaml.safe_load(Path(*path).read_text()) or {}
        except (OSError, TypeError, yaml.YAMLError) as error:
            raise ConfigError(f"--config: cannot read {''.join(path) or 'a file (none given)'}: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"--config: {path[0]} must hold lines of the form option: value")
        if unknown := sorted(set(map(str, values)) - names):
            raise ConfigError(f"--config: {path[0]} has unknown options {', '.join(unknown)}")
        argv = [f"--{name}={value}" for name, value in values.items() if value is not None] + argv
    values = vars(parser.parse_args(argv))
    return Config(**{name: values[name] for name in names})


# --- the stages -----------------------------------------------------------------------------------------------------


def cold_start(sets: dict[str, list[data.Sample]], cfg: Config, run: "Run") -> str:
    """Supervised fine-tuning on reference responses, on the response's tokens only (D-74). Returns the model's folder.

    Without rows that have a reference response (`process`), or with --sft_steps 0, RL starts from --model as it is.
    """
    rows = [s for s in sets.get("cold_start", sets["train"]) if s.process]
    if not rows or not (cfg.sft_steps or cfg.sft_epochs):
        run.say("cold start: skipped" + ("" if rows else " (no row has a reference response in `process`)"))
        return run.model
    for sample in rows:
        reference_response(sample, cfg.four_stage)  # a bad one is found before the model is loaded
    steps = updates(cfg.sft_steps, cfg.sft_epochs, len(rows), cfg.sft_batch)
    learner = Learner("sft", run.model, steps, cfg.sft_lr, cfg, run)
    for step, batch in learner.batches(rows, cfg.sft_batch):
        inputs = learner.policy.encode(data.prompts(batch, cfg.four_stage, cfg.fps, cfg.max_frames))
        ids, mask = learner.policy.encode_responses([reference_response(s, cfg.four_stage) for s in batch])
        tokens = run.total(mask.sum())
        loss = -learner.model(inputs, ids, mask).logp.sum() / tokens
        learner.backward(loss * run.processes)
        learner.update()
        learner.log(step, {"loss": (loss.item(), 0)}, show=step % 10 == 0)
    return learner.finish()


def updates(steps: int, epochs: float, rows: int, batch: int) -> int:
    """How many updates a stage has: `steps`, or as many as `epochs` passes over its rows take."""
    return math.ceil(epochs * rows / min(batch, rows)) if epochs else steps


def reference_response(sample: data.Sample, four_stage: bool) -> str:
    """The row's reference, with only the stages that are asked for."""
    text = sample.process
    if not four_stage:
        text = reasoning.render(dataclasses.replace(reasoning.parse(text), prethink=None, caption=None))
    if not reasoning.format_reward(text, four_stage):
        raise data.DataError(f"process: the reference response of row {sample.id} lacks a stage; mend or drop it")
    return text


def select_prompts(start: str, samples: list[data.Sample], judge: CaptionReward | None, cfg: Config, run: "Run"):
    """Score every prompt by its responses' rewards and keep the top share by variance (D-40).

    select/scores.jsonl gets one line a prompt as it is scored, so an interrupted stage goes on where it was.
    """
    if not cfg.selection:
        return samples
    chosen = run.folder / "select" / "selected.json"
    already = chosen.exists()
    run.accelerator.wait_for_everyone()  # before one of them writes it
    if not already:
        scores_file = run.folder / "select" / "scores.jsonl"
        scores = read_jsonl(scores_file, mend=run.is_main)
        done = {line["id"] for line in scores}
        waiting = sorted((s for s in samples if s.id not in done), key=data.length)  # alike in length: little padding
        size = cfg.select_batch * run.processes
        policy = run.load(start, trainable=False) if waiting else None
        bar = run.bar(len(samples), "select", "prompt", len(scores))
        for i in range(0, len(waiting), size):
            mine, lines = run.mine(waiting[i : i + size]), []
            parts = run.parts(mine, 0, roll_out, policy, None, cfg, "select", cfg.responses)
            for part, (rewards, _) in zip(parts, reward(parts, judge, cfg)):
                lines += score_lines(part.samples, rewards, cfg)
            lines = run.gather(lines)
            run.append(scores_file, lines)
            scores += lines
            bar.update(len(lines))
        bar.close()
        ids = [line["id"] for line in scores]
        kept = variance_select.select_top_variance(ids, torch.tensor([line["variance"] for line in scores]), cfg.keep)
        if not kept:
            raise data.DataError(
                f"selection: all {cfg.responses} responses of every prompt earn the same reward, so RL has nothing to "
                "learn from. Train the cold start longer, or give harder or easier prompts"
            )
        run.write(chosen, {"kept": kept, "of": len(ids), "tied": sum(line["variance"] == 0 for line in scores)})
    kept = set(json.loads(chosen.read_text())["kept"])
    run.say(f"selection: {len(kept)} of {len(samples)} prompts kept")
    if len(kept) < cfg.prompts_per_step:
        run.say(f"warning: fewer than --prompts_per_step {cfg.prompts_per_step}: each update sees {len(kept)} prompts")
    return [s for s in samples if s.id in kept]


def score_lines(samples: list[data.Sample], rewards: dict[str, Tensor], cfg: Config) -> list[dict]:
    """One line of select/scores.jsonl per prompt: statistics of the total reward, its class, every reward."""
    stats = variance_select.reward_statistics(grpo.total_reward(rewards, cfg.reward_weights))
    best = sum(cfg.reward_weights.values()) - cfg.reward_weights.get("leak", 0.0)
    return [
        {
            "id": sample.id,
            "mean": round(stats.mean[i].item(), 6),
            "variance": round(stats.variance[i].item(), 6),
            "class": variance_select.classify(stats.mean[i].item(), stats.variance[i].item(), best),
            **as_json(rewards, i),
        }
        for i, sample in enumerate(samples)
    ]


def as_json(rewards: dict[str, Tensor], i: int) -> dict[str, list[float | None]]:
    """Every reward of prompt i by name; an unknown one is null, because JSON has no NaN."""
    return {name: [None if r != r else r for r in table[i].tolist()] for name, table in rewards.items()}


@dataclass
class Rollouts:
    """B prompts of one pass with their G sampled responses, and what training adds to them.

    branches [B, G + 1, T]: the responses' ids and, as the last branch, what Eq. 4 needs beside them (the reference
    answer; no branch where it needs nothing), right-padded; mask [B * G, T] and beside_mask [B, T] of the tokens that
    count; old_logp, ref_logp [B * G, T].
    """

    samples: list[data.Sample]
    inputs: BatchFeature
    text: list[list[str]]
    ended: Tensor
    branches: Tensor
    mask: Tensor
    beside_mask: Tensor
    ref_logp: Tensor | None = None
    old_logp: Tensor | None = None
    rewards: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    replies: list[list[str | None]] = dataclasses.field(default_factory=list)
    adv: Tensor | None = None
    stats: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    nce_stats: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    numbers: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    @property
    def fed(self) -> Tensor:
        """The tokens of `branches` that count [B, G + 1, T]."""
        beside = self.beside_mask[:, None][:, : self.branches.shape[1] - self.adv.shape[1]]
        return torch.cat([self.mask.unflatten(0, self.adv.shape), beside], 1)

    def tokens_of_f(self, scores: vlm.TokenScores, feature: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """hidden, weight, target and prompt index of the tokens that make up f_i, flat, for Eq. 4."""
        prompts = torch.arange(len(self.samples), device=self.mask.device)
        if feature == "hidden_mean":
            where = self.inputs["attention_mask"].bool()
            hidden, segment = scores.prompt[where], prompts[:, None].expand_as(where)[where]
            return hidden, torch.ones_like(segment), segment, segment
        mask = self.mask.unflatten(0, (len(prompts), -1))
        scored = scores.logp.shape[1]  # all branches, or the last one only
        weights = ntk_infonce.feature_weights(feature, mask, self.adv, self.beside_mask)
        weights = weights[:, : self.branches.shape[1]][:, -scored:]
        where = weights != 0
        segment = prompts[:, None, None].expand_as(where)[where]
        return scores.hidden[where], weights[where], self.branches[:, -scored:][where], segment

    def record(self, scores: vlm.TokenScores, loss: Tensor, nce: Tensor) -> None:
        """Sums and counts of this pass for the metrics; plain numbers, so that no graph is kept."""
        mask, prompts = self.mask, len(self.samples)
        tokens = mask.sum().item()
        numbers = {
            "entropy": ((scores.entropy[:, : len(mask) // prompts].flatten(0, 1) * mask).sum().item(), tokens),
            "clipped": ((self.stats["clipped"] * mask).sum().item(), tokens),
            "length": (tokens, mask.shape[0]),
            "truncated": ((~self.ended).sum().item(), mask.shape[0]),
            "tied": ((self.adv == 0).all(1).sum().item(), prompts),
            "loss": (loss.item(), 0),  # already a global mean: a sum over parts and ranks
        }
        if self.stats["kl"] is not None:
            numbers["kl"] = ((self.stats["kl"] * mask).sum().item(), tokens)
        for name, table in self.rewards.items():
            known = ~table.isnan()
            numbers[f"reward/{name}"] = (table[known].sum().item(), known.sum().item())
        if "leak" in self.rewards:
            total, count = numbers.pop("reward/leak")
            numbers["caption_leak"] = (-total, count)
        unknown = sum(table.isnan().sum().item() for table in self.rewards.values())
        numbers["unknown"] = (unknown, mask.shape[0])
        if self.nce_stats:
            pairs = self.nce_stats.pop("pairs").item()
            numbers |= {"nce": (nce.item(), 1), "nce/active": (self.nce_stats.pop("active").item(), 1)}
            numbers |= {f"nce/{name}": (value.item() * pairs, pairs) for name, value in self.nce_stats.items()}
        self.numbers = numbers


def roll_out(batch: list[data.Sample], policy: vlm.VLM, reference: "Reference | None", cfg: Config, when=0, n: int = 0):
    """Sample n (default G) responses to each prompt, at T = 1, and lay beside them what Eq. 4 needs."""
    inputs = policy.encode(data.prompts(batch, cfg.four_stage, cfg.fps, cfg.max_frames))
    draws = uniform_numbers(batch, n or cfg.group_size, cfg.max_new_tokens, f"{cfg.seed}/{when}")
    rolls = policy.generate(inputs, n or cfg.group_size, cfg.max_new_tokens, draws=draws)
    feature = cfg.nce_feature if reference and cfg.nce_weight else None
    if feature == "greedy":
        greedy = policy.generate(inputs, 1, cfg.max_new_tokens, sample=False)
        beside, beside_mask = greedy.ids, greedy.mask
    elif feature in ("reference", "own_prefix"):
        own = [row[0].split("<answer>")[0] for row in rolls.text] if feature == "own_prefix" else None
        beside, beside_mask = policy.encode_responses([f"<answer>{s.answer}</answer>" for s in batch], after=own)
    else:
        beside, beside_mask = rolls.ids[:, :0], torch.zeros_like(rolls.mask[:, :1])
    length = max(rolls.ids.shape[-1], beside.shape[-1])
    ids, mask, beside, beside_mask = (
        torch.nn.functional.pad(x, (0, length - x.shape[-1])) for x in (rolls.ids, rolls.mask, beside, beside_mask)
    )
    part = Rollouts(
        samples=batch,
        inputs=inputs,
        text=rolls.text,
        ended=rolls.ended,
        branches=torch.cat([ids, beside], 1),
        mask=mask.flatten(0, 1),
        beside_mask=beside_mask[:, 0],
    )
    part.ref_logp = reference.logp(inputs, ids, mask) if reference else None
    return part


def uniform_numbers(batch: list[data.Sample], n: int, length: int, when: str) -> Tensor:
    """The chance behind n responses to each prompt [B, n, T]: it depends on seed, update and prompt only, not on the
    batch, the process or the device, so that the responses do not either, up to rounding."""
    streams = (torch.Generator().manual_seed(random.Random(f"{when}/{s.id}").randrange(2**63)) for s in batch)
    return torch.stack([torch.rand(n, length, dtype=torch.float64, generator=stream) for stream in streams])


def reward(parts: list[Rollouts], judge: CaptionReward | None, cfg: Config) -> list[tuple[dict[str, Tensor], list]]:
    """For each part the accuracy, format and caption reward of every response, by name [B, G] each, and the judge's
    replies. The judge is asked once for all parts."""
    verdicts = [[] for _ in parts]
    stages = [[[reasoning.parse(text) for text in row] for row in part.text] for part in parts]
    if cfg.caption_reward:
        items = [
            [(s.question, p.caption, s.answer, s.problem_type) for s, row in zip(part.samples, rows) for p in row]
            for part, rows in zip(parts, stages)
        ]
        flat = iter(judge([item for of_part in items for item in of_part]))
        verdicts = [[next(flat) for _ in of_part] for of_part in items]
    return [_rewards(*three, cfg) for three in zip(parts, stages, verdicts)]


def _rewards(part: Rollouts, stages: list, verdicts: list, cfg: Config) -> tuple[dict[str, Tensor], list]:
    flat = [(s, t, p) for s, row, ps in zip(part.samples, part.text, stages, strict=True) for t, p in zip(row, ps)]
    shape, n = (len(part.text), -1), len(part.text[0])
    correct = [
        answers.is_correct(answers.extract(p.answer, t), s.answer, s.problem_type, cfg.lenient) for s, t, p in flat
    ]
    formed = [reasoning.format_reward(t, cfg.four_stage) for _, t, _ in flat]
    rewards = {"accuracy": torch.tensor(correct).float().view(shape), "format": torch.tensor(formed).view(shape)}
    replies = [reply for _, reply in verdicts] or [None] * len(flat)
    if verdicts:
        rewards["caption"] = torch.tensor([verdict for verdict, _ in verdicts]).view(shape)
        leaks = [only_states_the_answer(p.caption, s.answer, s.problem_type) for s, _, p in flat]
        rewards["leak"] = 0.0 - torch.tensor(leaks).float().view(shape)
    rewards = {name: table.to(part.mask.device) for name, table in rewards.items()}
    return rewards, [replies[i : i + n] for i in range(0, len(replies), n)]


def all_tokens_of_f(policy: vlm.VLM, parts: list[Rollouts], cfg: Config) -> list:
    """The tokens of Eq. 4 of every pass of this update, without gradient; `main` puts the live pass's in place.

    Eq. 4 compares all prompts of the batch, also when memory splits it into passes: each pass then carries the
    gradient of the whole loss with respect to its own prompts, and the passes add up to the exact gradient.
    """
    if not cfg.nce_weight or len(parts) == 1:
        return [None] * len(parts)
    first = 0 if cfg.nce_feature in ("best", "advantage") else -1  # the others need the last branch only
    with torch.no_grad():
        scores = (policy(part.inputs, part.branches[:, first:], part.fed[:, first:]) for part in parts)
        return [part.tokens_of_f(s, cfg.nce_feature) for part, s in zip(parts, scores, strict=True)]


def similarity(
    passes: list[tuple[Tensor, Tensor, Tensor, Tensor]], feature: str, head: tuple[Tensor, Tensor]
) -> Tensor:
    """The cosines of Eq. 4 among the prompts of all passes; a prompt without any token in f_i is not among them.

    The head is common to all passes: `main` lets its gradient through in the last one, for all of them at once.
    """
    offset, segments = 0, []
    for *_, segment in passes:
        segments.append(segment + offset)
        offset = offset + int(segment.max()) + 1 if len(segment) else offset
    found, segment = torch.cat(segments).unique(return_inverse=True)
    hidden, scale, targets = (torch.cat([tokens[k] for tokens in passes]) for k in range(3))
    if feature == "hidden_mean":
        return ntk_infonce.hidden_mean(hidden, segment, len(found))
    (weight, bias), n = head, max(1, len(found))
    if len(hidden) * len(weight) <= DENSE_LOGITS:  # few tokens: smaller than the chunked form's gradients of W
        logits = hidden @ weight.T + bias
        return ntk_infonce.gradient_cosine(hidden * scale[:, None], logits, targets, segment, n)
    return ntk_infonce.gradient_cosine_chunked(hidden, weight, targets, segment, n, bias, scale=scale)


def evaluate(name: str, model: str, sets: dict, judge: CaptionReward | None, cfg: Config, run: "Run") -> None:
    """Greedy responses on every held-out set -> eval/NAME.json, and a few pictures for the report."""
    file = run.folder / "eval" / f"{name}.json"
    held_out = {k: v for k, v in sets.items() if k.startswith("test")}
    if file.exists() or not held_out:
        if not held_out:
            run.say("evaluation: skipped (the data have no test*.json)")
        return
    policy, names, result = run.load(model, trainable=False), evaluation.vocabulary(held_out), {}
    bar = run.bar(sum(map(len, held_out.values())), f"evaluate {name}", "row")
    for split, samples in held_out.items():
        pairs = []
        for i in range(0, len(samples), cfg.eval_batch * run.processes):
            mine = run.mine(samples[i : i + cfg.eval_batch * run.processes])
            texts = evaluation.respond(policy, mine, cfg.four_stage, cfg.max_new_tokens, cfg.fps, cfg.max_frames)
            pairs += run.gather(list(zip((s.id for s in mine), texts, strict=True)))
            bar.update(len(mine) * run.processes)
        texts = dict(pairs)
        result[split] = evaluation.score(
            samples, [texts[s.id] for s in samples], names, cfg.four_stage, judge if run.is_main else None
        )
    bar.close()
    if run.is_main:
        evaluation.save_gallery(run.folder / "eval" / "gallery", held_out, cfg.fps, cfg.max_frames)
    run.write(file, result)
    for split, scores in result.items():
        run.say(f"{name:>6} | {split}: {evaluation.one_line(scores)}")


# --- learning -------------------------------------------------------------------------------------------------------


class Learner:
    """A policy under training in one stage: optimiser, schedule, checkpoints, metrics. Resumes by itself."""

    def __init__(self, stage: str, model: str, steps: int, lr: float, cfg: Config, run: "Run"):
        self.stage, self.base, self.steps, self.cfg, self.run = stage, model, steps, cfg, run
        self.folder = run.folder / stage
        run.most = sys.maxsize  # another stage needs other memory
        self.result = self.folder / "policy"
        self.finished = self.result.exists()
        self.start = 0
        if self.finished:
            return
        run.reseed(stage, "initialisation")
        self.policy = run.load(model, trainable=True)
        trainable = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer = AdamW(trainable, lr=lr, weight_decay=cfg.weight_decay, fused=True)
        total = steps * (cfg.iterations if stage == "rl" else 1)
        schedule = get_cosine_schedule_with_warmup(optimizer, round(cfg.warmup * total), total)
        self.model, self.optimizer, self.schedule = run.accelerator.prepare(self.policy, optimizer, schedule)
        if checkpoint := self._last_checkpoint():
            run.accelerator.load_state(str(checkpoint))
            self.start = int(checkpoint.name.split("-")[1])
            run.say(f"{stage}: resumed after update {self.start}")
        run.forget_after(self.folder / "metrics.jsonl", self.start)
        run.forget_after(self.folder / "rollouts.jsonl", self.start)

    def batches(self, samples: list[data.Sample], size: int) -> Iterator[tuple[int, list[data.Sample]]]:
        """(update number from 1, this process's share of its batch). Which rows, and the random numbers drawn while
        the batch is worked on, depend on the seed and the number only: that makes resuming exact."""
        if self.finished:
            return
        run = self.run
        size = min(size, len(samples)) // run.processes * run.processes
        least = run.processes * (2 if self.stage == "rl" and self.cfg.nce_weight else 1)  # Eq. 4 needs two prompts
        if size < least:
            raise data.DataError(f"{self.stage}: {len(samples)} rows are too few; {least} at least in each update")
        self.bar = run.bar(self.steps, self.stage, "step", self.start)
        for step in range(self.start + 1, self.steps + 1):
            where = range((step - 1) * size, step * size)
            batch = [samples[run.order(self.stage, i // len(samples), len(samples))[i % len(samples)]] for i in where]
            run.reseed(self.stage, step)
            yield step, run.mine(batch)
            self.bar.update()
            if step % self.cfg.save_every == 0 and step < self.steps:
                self._save_checkpoint(step)

    def passes(self, parts: list) -> Iterator[tuple[int, Any]]:
        """The parts of an update with their numbers. The gradients of processes meet in the last one only; the context
        spans forward and backward, because DDP looks at it in forward."""
        for i, part in enumerate(parts):
            with nullcontext() if part is parts[-1] else self.run.accelerator.no_sync(self.model):
                yield i, part

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients. DDP averages over processes, hence the factor `run.processes` on sums."""
        self.run.accelerator.backward(loss)

    def update(self) -> None:
        norm = self.run.accelerator.clip_grad_norm_(self.model.parameters(), self.cfg.max_grad_norm)
        self.gradient_norm, self.rate = float(norm), self.schedule.get_last_lr()[0]
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def log(self, step: int, numbers: dict[str, tuple[float, float]], show: bool = True) -> None:
        """(sum, count) by name -> means over all processes; one line in metrics.jsonl, one on screen."""
        metrics = {"step": step, **self.run.average(numbers), "grad_norm": self.gradient_norm, "lr": self.rate}
        self.run.append(self.folder / "metrics.jsonl", [metrics])
        self.run.track(self.stage, metrics, step)
        if show:
            self.run.say(f"{self.stage} {step:>4}/{self.steps}  {readable(metrics)}")

    def log_rollouts(self, step: int, parts: list[Rollouts]) -> None:
        numbers: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for part in parts:
            for name, (value, count) in part.numbers.items():
                numbers[name][0] += value
                numbers[name][1] += count
        self.log(step, numbers)
        lines = [
            {
                "step": step,
                "id": sample.id,
                "text": part.text[i],
                **as_json(part.rewards, i),
                "judge": part.replies[i],
            }
            for part in parts
            for i, sample in enumerate(part.samples)
        ]
        self.run.append(self.folder / "rollouts.jsonl", self.run.gather(lines))
        if self.cfg.show_every and step % self.cfg.show_every == 0:
            sample, text = parts[0].samples[0], parts[0].text[0][0]
            self.run.say(f"  {sample.problem} [{sample.answer}]\n  {text}")

    def finish(self) -> str:
        """Write the trained policy, whole or not at all, and drop the checkpoints. Returns its folder."""
        if not self.finished:
            self.bar.close()
            self.run.write_folder(self.result, self._save)
            for checkpoint in self.folder.glob("checkpoint-*"):
                self.run.remove(checkpoint)
            self.run.accelerator.free_memory()  # or the next stage's checkpoints would hold this stage's model too
        self.run.tracked += self.steps
        return str(self.result)

    def _save(self, folder: str) -> None:
        """The policy and its model card. What RL starts from is whole, because RL's adapter is one of it."""
        of_adapter = (Path(self.base) / "adapter_config.json").exists()  # which `load` has merged: no base on this disk
        merge = self.cfg.merge or self.stage == "sft" or of_adapter
        self.run.unwrap(self.model).save(folder, merge)
        card = model_card(self.stage, self.base, self.steps, bool(self.cfg.lora_rank) and not merge, self.cfg)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")

    def _save_checkpoint(self, step: int) -> None:
        older = list(self.folder.glob("checkpoint-*"))
        self.run.write_folder(self.folder / f"checkpoint-{step}", self.run.accelerator.save_state, by_all=True)
        for checkpoint in older:
            self.run.remove(checkpoint)

    def _last_checkpoint(self) -> Path | None:
        found = [(int(p.name.split("-")[1]), p) for p in self.folder.glob("checkpoint-*") if p.suffix == ""]
        return max(found)[1] if found else None


class AdamW(torch.optim.AdamW):
    """AdamW on float32 copies of half-precision weights, as mixed precision has it: a step of 1e-6 is far below what
    bfloat16 resolves at 0.02, and would be lost. The copies are in the state, and so in checkpoints. Gradients are
    summed over passes in half precision."""

    def __init__(self, params: list[Tensor], **options):
        half = (torch.bfloat16, torch.float16)
        self.weights = params
        self.copies = [p.detach().float().requires_grad_() if p.dtype in half else p for p in params]
        super().__init__(self.copies, **options)

    def step(self, closure=None) -> None:
        pairs = [(p, copy) for p, copy in zip(self.weights, self.copies) if p is not copy]
        for p, copy in pairs:
            copy.grad, p.grad = None if p.grad is None else p.grad.float(), None
        super().step(closure)
        for p, copy in pairs:
            if copy.grad is not None:
                self.state[copy]["copy"] = copy.detach()
                p.data.copy_(copy)
                copy.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.weights:
            p.grad = None

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        for p, copy in zip(self.weights, self.copies):
            if p is not copy:
                copy.data.copy_(self.state.get(copy, {}).get("copy", p))


class Reference:
    """pi_ref of the KL: the model after the cold start. With LoRA it is the policy without its adapter, otherwise a
    frozen copy; with beta = 0 it is not loaded at all."""

    def __init__(self, start: str, learner: Learner, cfg: Config):
        self.learner, self.needed, self.frozen = learner, cfg.beta > 0 and not learner.finished, None
        if self.needed and not cfg.lora_rank:
            self.frozen = learner.run.load(start, trainable=False)

    @torch.no_grad()
    def logp(self, inputs: BatchFeature, ids: Tensor, mask: Tensor) -> Tensor | None:
        """[B, P], [B, G, T], [B, G, T] -> [B * G, T]"""
        if not self.needed:
            return None
        if self.frozen is not None:
            return self.frozen(inputs, ids, mask).logp.flatten(0, 1)
        policy = self.learner.policy
        with policy.base():
            return policy(inputs, ids, mask).logp.flatten(0, 1)


def model_card(stage: str, start: str, steps: int, adapter: bool, cfg: Config) -> str:
    """README.md of a trained policy: how it was trained, how to load it."""
    paths = {"data", "world", "output_dir", "judge"} | ({"model"} if Path(cfg.model).exists() else set())
    kept = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in paths}
    header = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["ground-what-you-see"]}
    header |= {"base_model": cfg.model} if cfg.model and not Path(cfg.model).exists() else {}
    what = {"sft": "a supervised cold start", "rl": f"reinforcement learning (method {cfg.method})"}
    of = f"\nAn adapter of the weights in `{start}`, and of no others: keep both, or train with `--merge true`.\n"
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---
# {Path(cfg.model).name or "The embedded world's policy"} after {what[stage]}

Trained with the reference implementation of *Ground What You See* (arXiv 2601.06224), {steps} updates in this stage.
{of if adapter else ""}
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(FOLDER)
processor = AutoProcessor.from_pretrained(FOLDER)
```

The configuration of the run, without its paths:

```yaml
{yaml.safe_dump(kept, sort_keys=False)}```
"""


def load_options(cfg: Config) -> dict[str, Any]:
    names = "dtype attention lora_rank train_vision gradient_checkpointing min_pixels max_pixels"
    return {name: getattr(cfg, name) for name in names.split()} | {"compiled": cfg.compile}


def readable(metrics: dict[str, float]) -> str:
    """One line of metrics that a person can read."""
    shown = {
        "reward/accuracy": "accuracy {:.2f}",
        "reward/format": "format {:.2f}",
        "reward/caption": "caption {:.2f}",
        "loss": "loss {:+.4f}",
        "kl": "kl {:.4f}",
        "entropy": "entropy {:.3f}",
        "length": "length {:.0f}",
        "tied": "tied {:.0%}",
        "nce/cosine_mean": "cosine {:.2f}",
        "nce/active": "anchors {:.0f}",
        "grad_norm": "gradient {:.2f}",
    }
    return "  ".join(form.format(metrics[name]) for name, form in shown.items() if name in metrics)


# --- processes, files, screen: everything else that is not the method -----------------------------------------------


class Run:
    """One run: its folder, its processes and its screen. The only place that knows about ranks."""

    def __init__(self, cfg: Config):
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        self.accelerator = Accelerator(
            cpu=torch.backends.mps.is_available(),  # Apple's GPUs know no float64, which sampling needs
            mixed_precision="no",  # --dtype decides: under autocast the policy would differ from its reference
            log_with=cfg.tracker or None,
            project_dir=cfg.output_dir,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=PATIENCE),
                DistributedDataParallelKwargs(broadcast_buffers=False),
            ],
        )
        if self.accelerator.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 in float32 products; softmax and sums stay in float32
        self.cfg, self.processes = cfg, self.accelerator.num_processes
        self.is_main, self.folder = self.accelerator.is_main_process, Path(cfg.output_dir)
        if self.accelerator.distributed_type.value not in ("NO", "MULTI_CPU", "MULTI_GPU"):
            raise ConfigError(
                f"accelerate: {self.accelerator.distributed_type.value} is not supported; use plain data parallelism "
                "(accelerate config, or --multi_gpu), with LoRA where the model does not fit"
            )
        if cfg.method != "sft" and cfg.nce_weight and cfg.prompts_per_step < 2 * self.processes:
            raise ConfigError(
                f"prompts_per_step: Eq. 4 compares the prompts of a process (D-51), and {cfg.prompts_per_step} leave "
                f"fewer than two to each of {self.processes}. Give at least {2 * self.processes}, or --nce_weight 0"
            )
        for name in ("prompts_per_step", "sft_batch"):
            if getattr(cfg, name) % self.processes:
                raise ConfigError(f"{name}: {getattr(cfg, name)} does not split over {self.processes} processes")
        self._claim_folder()
        if cfg.tracker:
            self.accelerator.init_trackers("ground-what-you-see", config=dataclasses.asdict(cfg))
        self._orders: dict[tuple, list[int]] = {}
        self.most = sys.maxsize  # prompts at a time for which memory has sufficed
        self.tracked = 0  # updates of the stages before this one
        self.began = time.time()
        self.say(f"{cfg.method} on {self.processes} process(es), {self.accelerator.device}; run folder {self.folder}")

    def _claim_folder(self) -> None:
        """Start or go on in the run folder; refuse one that was made with another configuration."""
        file, now = self.folder / "config.yaml", dataclasses.asdict(self.cfg)
        begun = self.folder.exists() and any(path != file for path in self.folder.iterdir())
        if file.exists() and begun:  # a run that was stopped before its first result binds no one
            then = yaml.safe_load(file.read_text())
            differ = [k for k in now if k not in FREE_TO_CHANGE and then.get(k) != now[k]]
            if differ:
                changes = "; ".join(f"{k}: {then.get(k)!r} there, {now[k]!r} now" for k in differ)
                raise ConfigError(
                    f"output_dir: {self.folder} belongs to a run with another configuration ({changes}). "
                    "Give another --output_dir, or the same options to go on, or delete the folder to start again"
                )
        elif begun:
            raise ConfigError(f"output_dir: {self.folder} is not empty and not a run folder. Give another --output_dir")
        self.accelerator.wait_for_everyone()
        self.write(file, now)

    # what the run works on
    def open_data(self) -> dict[str, list[data.Sample]]:
        """Check every row and every file before any model is loaded; then build the embedded world where needed."""
        cfg = self.cfg
        given = data.load(cfg.data, cfg.on_bad_row, self.say) if cfg.data else None
        if not (cfg.data and cfg.model and (cfg.judge or not cfg.caption_reward)):
            if self.is_main:
                shapes.build(Path(cfg.world), cfg.quiet)
            self.accelerator.wait_for_everyone()
        self.model = cfg.model or str(Path(cfg.world) / "policy")
        sets = given or data.load(Path(cfg.world) / "data")
        self._check_lengths(sets)
        if "train" not in sets:
            raise data.DataError(f"data: {cfg.data} has no train.json to learn from")
        self.say("data: " + ", ".join(f"{len(rows)} {name}" for name, rows in sets.items()))
        return sets

    def _check_lengths(self, sets: dict[str, list[data.Sample]]) -> None:
        """A multimodal prompt is never truncated: one that is too long is a bad row, as is one with a control token."""
        cfg = self.cfg
        try:
            context, tokenizer = vlm.context(self.model)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model: cannot load {self.model}: {str(error).splitlines()[0]}") from error
        text_tokens = data.prompt_text_tokens(tokenizer, cfg.four_stage)
        most = cfg.max_prompt_tokens or context - cfg.max_new_tokens
        problems = []
        for name, rows in sets.items():
            fitting = []
            for s in rows:
                tokens = text_tokens(s)
                tokens += data.visual_tokens(s, cfg.min_pixels, cfg.max_pixels, cfg.fps, cfg.max_frames)
                words = " ".join([s.problem, *s.options, s.answer, s.process or ""])
                control = [token for token in tokenizer.all_special_tokens if token in words]
                if control:
                    problems.append(f"{name} ({s.id}), text: holds {control[0]}, which the model takes for a command")
                elif tokens > most:
                    problems.append(
                        f"{name} ({s.id}), prompt: {tokens} tokens, more than {most}: a lower --max_pixels?"
                    )
                else:
                    fitting.append(s)
            sets[name] = fitting
        if problems and (cfg.on_bad_row == "error" or not all(sets.values())):
            remedy = "Mend them, or leave them out with --on_bad_row skip"
            raise data.DataError("\n".join([*problems[:10], f"{len(problems)} rows cannot be used. {remedy}"]))
        for line in problems:
            self.say(f"skipped: {line}")

    def open_judge(self, sets: dict[str, list[data.Sample]]) -> CaptionReward | None:
        """The judge, tried on a few questions without a caption: that it answers at all, and the floor of the reward.
        What it has replied is kept in the run folder, so that a resumed run does not ask again."""
        cfg = self.cfg
        if not cfg.caption_reward or (self.folder / "eval" / "after.json").exists():
            return None
        name = cfg.judge_model if cfg.judge.startswith("http") else cfg.judge or str(Path(cfg.world) / "judge")
        if cfg.judge.startswith("http"):
            try:
                judge = EndpointJudge(cfg.judge, name, concurrency=cfg.judge_concurrency, deadline=cfg.judge_deadline)
            except Exception as error:  # no client library, or no key
                raise ConfigError(f"judge: {error}") from error
        else:
            judge = vlm.LocalJudge(name, self.accelerator.device)
        journal = Journal(self.folder / "judge" / f"{self.accelerator.process_index}.jsonl", name)
        self.accelerator.wait_for_everyone()  # all have read what there was before one writes
        asked, few = CaptionReward(judge, journal), sets["train"][: 4 * FEW : 4]
        floor = asked.floor([(s.question, s.answer, s.problem_type) for s in few])
        if floor is None:
            raise ConfigError(
                f"judge: {name} answered none of {len(few)} questions. Is it up, and does it know the key?"
            )
        self.say(f"judge: {name}, right on {floor:.0%} of {len(few)} questions without any caption")
        return asked

    def load(self, model: str, trainable: bool) -> vlm.VLM:
        return vlm.load(model, **load_options(self.cfg), trainable=trainable).to(self.accelerator.device)

    def unwrap(self, model) -> vlm.VLM:
        return self.accelerator.unwrap_model(model)

    def parts(self, batch: list[data.Sample], size: int, work: Callable, *args) -> list:
        """work(rows, *args) on `size` rows of the batch at a time (0: all), prompts of a length together. Where memory
        does not suffice on half as many, with the same results up to rounding."""
        size = min(size or len(batch), self.most)
        if 0 < size < len(batch):
            even = sorted(batch, key=data.length)
            return [part for i in range(0, len(even), size) for part in self.parts(even[i : i + size], 0, work, *args)]
        try:
            return [work(batch, *args)] if batch else []
        except RuntimeError as error:
            if len(batch) == 1 or not should_reduce_batch_size(error):
                raise
        # not inside `except`: the error holds on to what the failed attempt allocated
        clear_device_cache(garbage_collection=True)
        self.most = (len(batch) + 1) // 2  # from now on
        self.say(f"memory does not suffice for {len(batch)} prompts at a time: trying {self.most}")
        return self.parts(batch, 0, work, *args)

    # randomness
    def reseed(self, *where) -> None:
        """Every random number follows from (seed, stage, step, rank): nothing to store, and resuming is exact."""
        set_seed(random.Random(f"{self.cfg.seed}/{where}/{self.accelerator.process_index}").randrange(2**31))

    def order(self, stage: str, epoch: int, n: int) -> list[int]:
        """The rows' order in an epoch, the same on every process."""
        key = (stage, epoch, n)
        if key not in self._orders:
            self._orders[key] = random.Random(f"{self.cfg.seed}/{key}").sample(range(n), n)
        return self._orders[key]

    # processes
    def mine(self, items: list) -> list:
        return items[self.accelerator.process_index :: self.processes]

    def gather(self, items: list) -> list:
        return gather_object(items) if self.processes > 1 else items

    def total(self, value: Tensor) -> Tensor:
        return self.accelerator.reduce(value.float(), "sum")

    def count(self, parts: list[Rollouts]) -> dict[str, float]:
        """Responses and response tokens of the global batch: the denominators of the loss."""
        here = torch.stack(
            [sum(len(p.mask) for p in parts) + 0 * parts[0].mask.sum(), sum(p.mask.sum() for p in parts)]
        )
        return dict(zip(("sequences", "tokens"), self.total(here).tolist(), strict=True))

    def average(self, numbers: dict[str, tuple[float, float]]) -> dict[str, float]:
        """Sums and counts by name -> sum / count over all processes. Nothing counted, no value; `loss` is a sum."""
        names = sorted(numbers)
        table = torch.tensor([numbers[name] for name in names], dtype=torch.float64)
        if self.processes > 1:
            table = self.accelerator.reduce(table.to(self.accelerator.device), "sum")
        sums = dict(zip(names, table.tolist(), strict=True))
        return {name: value / (count or 1) for name, (value, count) in sums.items() if count or name == "loss"}

    # files: written beside and renamed, so that what is there is whole
    def write(self, file: Path, value: Any) -> None:
        if self.is_main:
            file.parent.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(value, sort_keys=False) if file.suffix == ".yaml" else json.dumps(value, indent=1)
            rewrite(file, text)
        self.accelerator.wait_for_everyone()

    def write_folder(self, folder: Path, save, by_all: bool = False) -> None:
        beside = folder.with_name(f".{folder.name}.unfinished")
        if self.is_main:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        if by_all or self.is_main:
            save(str(beside))
        self.accelerator.wait_for_everyone()
        if self.is_main:
            os.replace(beside, folder)
        self.accelerator.wait_for_everyone()

    def remove(self, folder: Path) -> None:
        if self.is_main:
            shutil.rmtree(folder, ignore_errors=True)

    def append(self, file: Path, lines: list[dict]) -> None:
        if self.is_main:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as out:
                out.write(to_jsonl(lines))

    def forget_after(self, file: Path, step: int) -> None:
        """Drop the lines of updates that a resumed stage will do again."""
        if self.is_main and file.exists():
            kept = [line for line in read_jsonl(file) if line["step"] <= step]
            rewrite(file, to_jsonl(kept))

    # screen
    def say(self, text: str) -> None:
        if self.is_main and not self.cfg.quiet:
            tqdm.write(text)

    def bar(self, total: int, name: str, unit: str, done: int = 0) -> tqdm:
        hidden = True if self.cfg.quiet or not self.is_main else None  # None: shown on a terminal only
        return tqdm(total=total, initial=done, desc=name, unit=unit, disable=hidden, dynamic_ncols=True)

    def track(self, stage: str, metrics: dict[str, float], step: int) -> None:
        if self.cfg.tracker:
            self.accelerator.log(
                {f"{stage}/{name}": value for name, value in metrics.items()},
                step=self.tracked + step,
            )

    def finish(self) -> None:
        """The report, the table, and where everything is."""
        if self.is_main:
            page = report.write(self.folder)
            print(report.table(self.folder))
            print(f"{time.time() - self.began:.0f} s. Run folder: {self.folder}   Report: {page}")
        self.accelerator.end_training()


class Journal(dict):
    """(question, caption) -> the judge's reply, also on disk: one line a reply, in a file of this process; lines of all
    processes are read at the start."""

    def __init__(self, file: Path, judge: str):
        lines = [line for one in sorted(file.parent.glob("*.jsonl")) for line in read_jsonl(one, mend=one == file)]
        super().__init__({(x["question"], x["caption"]): x["reply"] for x in lines if x["judge"] == judge})
        self.file, self.judge = file, judge

    def __setitem__(self, key: tuple[str, str], reply: str) -> None:
        super().__setitem__(key, reply)
        line = {"judge": self.judge, "question": key[0], "caption": key[1], "reply": reply}
        self.file.parent.mkdir(parents=True, exist_ok=True)  # not before: a start that fails leaves nothing behind
        with self.file.open("a", encoding="utf-8") as out:
            out.write(to_jsonl([line]))


def rewrite(file: Path, text: str) -> None:
    """Replace a file's content, whole or not at all."""
    beside = file.with_name(f".{file.name}.unfinished")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def to_jsonl(lines: list[dict]) -> str:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def read_jsonl(file: Path, mend: bool = True) -> list[dict]:
    """The whole lines of a file that grows; a last line that a crash cut off is dropped; mend: from the file too."""
    if not file.exists():
        return []
    # bytes, because the cut may go through a character; not splitlines, because a response may hold U+2028
    *whole, rest = file.read_bytes().split(b"\n")
    if rest and mend:
        rewrite(file, "".join(line.decode() + "\n" for line in whole))
    return [json.loads(line) for line in whole]


def cli() -> None:
    """Entry point: one clear line for what is wrong with the input, and for Ctrl-C."""
    folder = Path(".")
    try:
        cfg = parse_config(sys.argv[1:])
        folder = Path(cfg.output_dir)
        main(cfg)
    except (ConfigError, data.DataError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted. The same command goes on from what is finished and the last checkpoint")
    except Exception as error:
        # torch and safetensors report a full disk in their own ways
        if "No space left" not in str(error) and (not folder.exists() or shutil.disk_usage(folder).free > 2**20):
            raise
        sys.exit(f"error: the disk is full ({error}). Free some space; the same command goes on where it was")


if __name__ == "__main__":
    cli()
