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
import random
import shutil
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import count as count_from
from itertools import islice, zip_longest
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from accelerate.utils.memory import should_reduce_batch_size
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from transformers import BatchFeature, HfArgumentParser
from transformers.utils import is_flash_attn_2_available

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
from caption_reward import MAX_TOKENS, CaptionReward, only_states_the_answer, wrong_in
from run import PATIENCE, ConfigError, Journal, Run, finite, read_jsonl, stop


def main(cfg: "Config") -> None:
    run = Run(cfg)
    sets = open_data(cfg, run)
    judge = open_judge(sets, cfg, run)

    # Redefine the Reasoning Paradigm: a supervised cold start teaches planning, caption, thinking and answer.
    start = cold_start(sets, cfg, run)
    evaluate("before", start, sets, judge, cfg, run)

    if cfg.method != "sft":
        # Reward Variance-Guided Sample Selection: 64 responses a prompt; keep the half whose rewards differ most.
        prompts = select_prompts(start, sets["train"], judge, cfg, run)

        # Reinforcement learning: GRPO with the Caption Reward, and the conflict regulariser.
        steps = updates(cfg.rl_steps, cfg.rl_epochs, len(prompts), cfg.prompts_per_step, run.processes)
        learner = Learner("rl", start, steps, cfg.rl_lr, cfg, run, held_out(sets, judge, cfg, run))
        reference = Reference(start, learner, cfg)  # the model after the cold start, frozen
        for step, batch in learner.batches(prompts, cfg.prompts_per_step):
            with run.whole(learner.policy):
                parts = run.parts(batch, cfg.prompts_per_pass, roll_out, learner.policy, reference, cfg, step)
            for part, (rewards, replies) in zip(parts, reward(parts, judge, cfg)):
                part.rewards, part.replies = rewards, replies  # accuracy, format, caption   [B, G] each
                part.adv = grpo.group_advantages(grpo.total_reward(part.rewards, cfg.reward_weights))
            counts = count(parts, run)  # of the global batch

            for _ in range(cfg.iterations):
                conflict = Conflict(parts, learner.policy, cfg, run, step)
                for i, part in learner.passes(parts):
                    scores = learner.model(part.inputs, part.branches, part.fed)  # G responses and the answer
                    logp = scores.logp[:, : cfg.group_size].flatten(0, 1)  # [B * G, T]
                    part.old_logp = logp.detach() if part.old_logp is None else part.old_logp
                    loss, part.stats = grpo.grpo_loss(  # Eq. 1
                        logp, part.old_logp, part.adv.flatten(), part.mask, part.ref_logp, **cfg.grpo_options, **counts
                    )
                    nce = loss.new_zeros(())
                    if cfg.nce_weight:  # Eq. 4, f_i = d log pi(y_i | x_i) / d head, y_i the reference answer
                        cosine = conflict.cosine(i, scores)  # among all prompts of the global batch
                        tau = ntk_infonce.quantile_tau(cosine, cfg.tau_quantile) if cfg.tau_quantile else cfg.tau
                        nce, part.nce_stats = ntk_infonce.info_nce(cosine, tau, cfg.nce_temperature)
                    learner.backward(loss + cfg.nce_weight * nce)
                    part.record(scores, loss, nce)
                learner.update()
            learner.log_rollouts(parts)
        policy = learner.finish()
        evaluate("after", policy, sets, judge, cfg, run)

    finish(run)


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
    judge_max_tokens: int = option(MAX_TOKENS, "most tokens of a reply, thought included; longer: unknown [choice]")
    world: str = option("shapes-world", "where the embedded world is built, once [choice]")
    output_dir: str = option("", "run folder; empty: runs/METHOD-DATA-MODEL-seedSEED, those given [choice]")
    seed: int = option(0, "of data order, sampling and LoRA initialisation [choice]")

    on_bad_row: str = option("error", "error: stop before any work; skip: leave bad rows out [choice]")
    min_pixels: int = option(3136, "pictures and frames are enlarged to at least this [qwen-vl-utils: 4 tokens]")
    max_pixels: int = option(401408, "and reduced to at most this [official code]")
    fps: float = option(2.0, "frames a second taken from a clip [qwen-vl-utils]")
    max_frames: int = option(16, "most frames taken from a clip [Video-R1]")
    max_prompt_tokens: int = option(0, "longer prompts are bad rows; 0: what the model takes [choice]")

    dtype: str = option("float32", "float32, bfloat16 or float64 [official code: bfloat16]")
    attention: str = option("sdpa", f"{', '.join(ATTENTION)}; the last shares no prompt in scoring [choice]")
    lora_rank: int = option(0, "rank of LoRA on the language model's linears; 0: full fine-tuning [official code]")
    merge: bool = option(False, "with LoRA: write whole weights at the end of RL, not the adapter alone [choice]")
    train_vision: bool = option(False, "train the vision tower as well [choice]")
    gradient_checkpointing: bool = option(False, "recompute activations, saves memory [official code: true]")

    sft_steps: int = option(250, "cold-start updates; 0: none [choice; official code: 2 epochs]")
    sft_epochs: float = option(0.0, "above 0: this many passes over the rows in place of sft_steps [official code: 2]")
    sft_batch: int = option(32, "rows per cold-start update, over all processes [choice; official code: 8]")
    sft_lr: float = option(2e-3, "cold-start learning rate [choice for a 1.5 M model; official code: 1e-6]")

    responses: int = option(64, "responses per prompt scored for selection [paper]")
    keep: float = option(0.5, "share of the prompts kept [paper]")
    select_within: str = option("", "category: at most that share of each category; empty: of all prompts [paper]")
    select_batch: int = option(16, "prompts scored at a time in each process, by memory [choice]")

    rl_steps: int = option(60, "updates of reinforcement learning [choice; official code: 1 epoch]")
    rl_epochs: float = option(0.0, "above 0: this many passes over the prompts in place of rl_steps [official code: 1]")
    prompts_per_step: int = option(32, "prompts per update, over all processes [choice; official code: 8]")
    prompts_per_pass: int = option(0, "prompts per pass in each process, to save memory; 0: all [choice]")
    group_size: int = option(8, "G, responses per prompt [official code; paper silent]")
    max_new_tokens: int = option(40, "longest response [choice; official code: 768]")
    rl_lr: float = option(3e-4, "learning rate, cosine [choice for a 1.5 M model; official code: 1e-6]")
    warmup: float = option(0.05, "share of a stage's updates with rising rate [choice; official code: 0]")
    weight_decay: float = option(0.01, "AdamW's, on matrices: norms and biases have none [official code]")
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
    nce_sketch: int = option(0, "above 0: f_i as a TensorSketch of so many numbers, for a y_i of many tokens [choice]")

    eval_batch: int = option(64, "rows per evaluation batch in each process [choice]")
    show_every: int = option(10, "print a sampled response every so many updates, 0: never [choice]")
    save_every: int = option(20, "checkpoint every so many updates [choice; official code: 100]")
    keep_last: int = option(1, "checkpoints kept while a stage runs [choice]")
    held_out_rows: int = option(
        64, "test rows, of every category, on which RL's checkpoints are compared; 0: no [choice]"
    )
    max_skipped: int = option(5, "stop after so many updates in a row with a loss or gradient not finite [choice]")
    max_truncated: float = option(0.25, "warn where a greater share of responses is cut at max_new_tokens [choice]")
    tracker: str = option("", "also log to tensorboard or wandb, through accelerate [choice]")
    quiet: bool = option(False, "print only the result [choice]")

    def __post_init__(self) -> None:
        """Refuse what cannot work, before anything is loaded. Resolves what --method leaves open."""
        choices = {
            "method": tuple(MECHANISMS),
            "on_bad_row": ("error", "skip"),
            "dtype": ("float32", "bfloat16", "float64"),
            "attention": ATTENTION,
            "kl_kind": grpo.KL_KINDS,
            "loss_norm": ("sequence", "token", "constant"),
            "nce_feature": tuple(ntk_infonce.FEATURES),
            "select_within": ("", "category"),
            "tracker": ("", "tensorboard", "wandb"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}: {getattr(self, name)!r} is not one of {', '.join(filter(None, allowed))}")
        for name, value in MECHANISMS[self.method].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        positive = (
            "judge_concurrency judge_max_tokens prompts_per_step sft_batch select_batch eval_batch max_new_tokens "
            "iterations save_every keep_last max_skipped"
        )
        for name in positive.split():
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1, got {getattr(self, name)}")
        for name in ("responses", "group_size"):
            if getattr(self, name) < 2:
                raise ConfigError(f"{name}: a group of one has no variance and no advantage; give at least 2")
        if not 0 < self.min_pixels <= self.max_pixels:
            raise ConfigError(f"min_pixels: must lie in (0, max_pixels], got {self.min_pixels} and {self.max_pixels}")
        if wrong := wrong_in(self.judge):
            raise ConfigError(f"judge: {wrong}")
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
        if not 0 < self.judge_deadline < PATIENCE.seconds / 2:  # a judge may be asked twice while others wait
            raise ConfigError(
                f"judge_deadline: must lie in (0, {PATIENCE.seconds // 2}) seconds, got {self.judge_deadline}"
            )
        at_least_0 = "max_prompt_tokens leak_penalty sft_steps rl_steps show_every prompts_per_pass lora_rank "
        at_least_0 += "nce_sketch held_out_rows nce_weight beta eps_low eps_high sft_epochs rl_epochs"
        for name in at_least_0.split():
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: must be 0 or more, got {getattr(self, name)}")
        for name in "sft_lr rl_lr max_grad_norm nce_temperature fps max_frames".split():
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}: must be above 0, got {getattr(self, name)}")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warmup: is a share of a stage's updates and must lie in [0, 1), got {self.warmup}")
        if self.method != "sft" and self.nce_weight and self.prompts_per_step < 3:
            raise ConfigError(
                "prompts_per_step: Eq. 4 needs a positive and a negative beside a prompt; give at least 3, or "
                "--nce_weight 0"
            )
        given = (Path(self.data).stem, Path(self.model).name, f"seed{self.seed}")
        self.output_dir = self.output_dir or "runs/" + "-".join(filter(None, (self.method, *given)))

    @property
    def start(self) -> str:
        return self.model or str(Path(self.world) / "policy")

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
        return cfg.start
    for sample in rows:
        reference_response(sample, cfg.four_stage)  # a bad one is found before the model is loaded
    steps = updates(cfg.sft_steps, cfg.sft_epochs, len(rows), cfg.sft_batch, run.processes)
    learner = Learner("sft", cfg.start, steps, cfg.sft_lr, cfg, run)
    for step, batch in learner.batches(rows, cfg.sft_batch):
        inputs = learner.policy.encode(data.prompts(batch, cfg.four_stage, cfg.fps, cfg.max_frames))
        ids, mask = learner.policy.encode_responses([reference_response(s, cfg.four_stage) for s in batch])
        loss = -learner.model(inputs, ids, mask).logp.sum() / run.total(mask.sum())
        learner.backward(loss)
        learner.update()
        learner.log({"loss": (loss.item(), 0)}, show=step % 10 == 0)
    return learner.finish()


def updates(steps: int, epochs: float, rows: int, batch: int, processes: int = 1) -> int:
    """How many updates a stage has: `steps`, or as many as `epochs` passes over its rows take."""
    return math.ceil(epochs * rows / max(1, batch_size(rows, batch, processes))) if epochs else steps


def batch_size(rows: int, asked: int, processes: int) -> int:
    """Rows of an update: as many as asked for, where there are so many, and as many in each process."""
    return min(asked, rows) // processes * processes


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

    select/scores.jsonl gets one line a prompt as it is scored, so an interrupted stage goes on where it was. A prompt
    on which a verdict is missing is asked about again, once and whenever the stage is resumed; where most stay missing
    it is not ranked.
    """
    if not cfg.selection:
        return samples
    chosen, file = (run.folder / "select" / name for name in ("selected.json", "scores.jsonl"))
    if not run.first(chosen.exists):
        policy = cache(lambda: load(start, False, cfg, run.device))  # where all prompts are scored it is not needed

        def score(mine: list[data.Sample]) -> list[dict]:
            parts = run.parts(mine, 0, lambda some: roll_out(some, policy(), None, cfg, "select", cfg.responses))
            scored = zip(parts, reward(parts, judge, cfg))
            return [line for part, (rewards, _) in scored for line in score_lines(part.samples, rewards, cfg)]

        for _ in range(2):
            run.keep_lines(file, lambda line: line["known"] == cfg.responses)
            scores = run.each(file, samples, cfg.select_batch, score, "select")
        known = [line for line in scores if 2 * line["known"] >= cfg.responses]
        if len(known) < len(scores) / 2:
            why = next(filter(None, run.gather([getattr(judge.judge, "last_error", "")])), "unknown")
            raise ConfigError(
                f"selection: the judge gave no verdict on most captions of {len(scores) - len(known)} of {len(scores)} "
                f"prompts, although it was asked twice. Its last error: {why}. The same command asks again"
            )
        kind = {sample.id: sample.category for sample in samples}
        ids, variance = [line["id"] for line in known], torch.tensor([line["variance"] for line in known])
        within = [kind[i] for i in ids] if cfg.select_within else None
        kept = variance_select.select_top_variance(ids, variance, cfg.keep, within)
        if not kept:
            raise data.DataError(
                f"selection: all {cfg.responses} responses of every prompt earn the same reward, so RL has nothing to "
                "learn from. Train the cold start longer, or give harder or easier prompts"
            )
        tied = [line["id"] for line in known if line["variance"] == 0]
        counts = [Counter(kind[i] for i in some) for some in (kept, kind, tied)]
        found = {"kept": kept, "of": len(scores), "tied": len(tied), "unjudged": len(scores) - len(known)}
        found |= {"within": cfg.select_within}
        found["categories"] = {name: [count[name] for count in counts] for name in sorted(counts[1])}  # kept, of, tied
        run.write(chosen, found)
    found = run.first(lambda: json.loads(chosen.read_text()))
    kept = set(found["kept"])
    run.say(f"selection: {len(kept)} of {len(samples)} prompts kept")
    for line in filter(None, report.selected_by_category(found)):
        run.say(f"  {line}")
    return [s for s in samples if s.id in kept]


def score_lines(samples: list[data.Sample], rewards: dict[str, Tensor], cfg: Config) -> list[dict]:
    """One line of select/scores.jsonl per prompt: statistics of the total reward, its class, every reward."""
    total = grpo.total_reward(rewards, cfg.reward_weights)
    if cfg.reward_weights.get("caption"):  # no mean in an unknown one's place: it would make the variance smaller
        total = total.masked_fill(rewards["caption"].isnan(), math.nan)
    stats = variance_select.reward_statistics(total)
    best = sum(cfg.reward_weights.values()) - cfg.reward_weights.get("leak", 0.0)
    return [
        {
            "id": sample.id,
            "known": int(stats.count[i]),
            "mean": round(stats.mean[i].nan_to_num(0.0).item(), 6),
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
    draws = vlm.uniform_numbers([s.id for s in batch], n or cfg.group_size, cfg.max_new_tokens, f"{cfg.seed}/{when}")
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


class Conflict:
    """The cosines of Eq. 4 among all prompts of an update, which memory splits into passes, and processes share.

    f_i travels as a table: the rows [hidden | weight | target | prompt] of its tokens, from which every process gets
    the exact cosines with its own head; or, with --nce_sketch and for hidden_mean, as one row for each prompt. A pass
    sees its own f_i with gradient and the others' without: it carries the gradient of the whole loss with respect to
    its own prompts, and passes and processes add up to the exact gradient. What is common to all tokens, the head, is
    trained in one of them. run = None: a process alone.
    """

    def __init__(self, parts: list[Rollouts], policy: vlm.VLM, cfg: Config, run: Run | None = None, step: int = 0):
        self.parts, self.policy, self.cfg, self.run = parts, policy, cfg, run
        self.seed = random.Random(f"{cfg.seed}/{step}").randrange(2**31)  # one hash for all processes
        self.rows = cfg.nce_feature == "hidden_mean" or cfg.nce_sketch > 0  # one for each prompt
        self.tables: list[Tensor] | None = None
        if cfg.nce_weight and len(parts) > 1:  # the first pass needs those of the last
            first = 0 if cfg.nce_feature in ("best", "advantage") else -1  # the others need the last branch only
            with torch.no_grad():
                scores = (policy(part.inputs, part.branches[:, first:], part.fed[:, first:]) for part in parts)
                self.tables = self._exchange([self._table(part, s) for part, s in zip(parts, scores, strict=True)])

    def cosine(self, i: int, scores: vlm.TokenScores) -> Tensor:
        """[n, n], with gradient to pass i of this process. A prompt without any token in f_i is not among them."""
        live = self._table(self.parts[i], scores)
        tables = list(self.tables or self._exchange([live]))
        tables[(self.run.rank if self.run else 0) * len(self.parts) + i] = live
        if self.rows:
            return ntk_infonce.cosine(torch.cat(tables))
        offset, segments = 0, []
        for table in tables:
            segments.append(table[:, -1].long() + offset)
            offset += int(table[:, -1].max()) + 1 if len(table) else 0
        found, segment = torch.cat(segments).unique(return_inverse=True)
        trained = (not self.run or self.run.is_main) and i == len(self.parts) - 1
        weight, bias = self.policy.head(trained)
        table, n = torch.cat(tables), max(1, len(found))
        hidden, scale, targets = table[:, :-3].to(weight.dtype), table[:, -3], table[:, -2].long()
        if len(hidden) * len(weight) <= DENSE_LOGITS:  # few tokens: smaller than the chunked form's gradients of W
            logits = hidden @ weight.T + bias
            return ntk_infonce.gradient_cosine(hidden * scale[:, None], logits, targets, segment, n)
        return ntk_infonce.gradient_cosine_chunked(hidden, weight, targets, segment, n, bias, scale=scale)

    def _table(self, part: Rollouts, scores: vlm.TokenScores) -> Tensor:
        hidden, scale, targets, prompt = part.tokens_of_f(scores, self.cfg.nce_feature)
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # holds any token's number
        if not self.rows:
            return torch.cat([wide, *(x[:, None].to(wide) for x in (scale, targets, prompt))], 1)
        found, segment = prompt.unique(return_inverse=True)
        if self.cfg.nce_feature == "hidden_mean":
            return ntk_infonce.hidden_mean(hidden, segment, len(found))
        weight, bias = self.policy.head()

        def sketch(h: Tensor, w: Tensor, y: Tensor, at: Tensor) -> Tensor:
            logits = h @ weight.T + bias
            return ntk_infonce.tensor_sketch(h * w[:, None], logits, y, at, len(found), self.cfg.nce_sketch, self.seed)

        size = max(1, DENSE_LOGITS // len(weight))
        chunks = zip(*(x.split(size) for x in (hidden, scale, targets, segment)))
        return sum(checkpoint(sketch, *chunk, use_reentrant=False) for chunk in chunks)

    def _exchange(self, tables: list[Tensor]) -> list[Tensor]:
        """The tables of every pass of every process, in one order."""
        packed = torch.cat([torch.nn.functional.pad(table, (0, 1), value=k) for k, table in enumerate(tables)])
        everyone = self.run.exchange(packed) if self.run else [packed.detach()]
        return [rows[rows[:, -1] == k, :-1] for rows in everyone for k in range(len(tables))]


def count(parts: list[Rollouts], run: Run) -> dict[str, float]:
    """Responses and response tokens of the global batch: the denominators of the loss."""
    here = torch.stack([sum(len(p.mask) for p in parts) + 0 * parts[0].mask.sum(), sum(p.mask.sum() for p in parts)])
    return dict(zip(("sequences", "tokens"), run.total(here).tolist(), strict=True))


def held_out(sets: dict, judge: CaptionReward | None, cfg: Config, run: Run) -> Callable[[vlm.VLM], float] | None:
    """Scores a policy on some rows that are not trained on; None without such rows."""
    rows = sets.get("validation") or next((rows for name, rows in sets.items() if name.startswith("test")), [])
    rows = balanced(rows, cfg.held_out_rows, cfg.seed)
    return partial(held_out_reward, rows, judge, cfg, run) if rows else None


def balanced(rows: list[data.Sample], n: int, seed: int) -> list[data.Sample]:
    """n rows drawn at random, as evenly over the categories as their numbers allow."""
    kinds: dict[str, list] = defaultdict(list)
    for row in random.Random(f"{seed}/held out").sample(rows, len(rows)):
        kinds[row.category].append(row)
    return [row for turn in zip_longest(*kinds.values()) for row in turn if row][:n]


def held_out_reward(rows: list, judge: CaptionReward | None, cfg: Config, run: Run, policy: vlm.VLM) -> float:
    """Mean total reward of greedy responses. NaN where a verdict is missing although it was asked for twice: a policy
    is not compared on what the network let through."""
    answered = run.pieces(run.mine(rows), cfg.eval_batch, greedily, policy, cfg)
    parts = [
        SimpleNamespace(samples=some, text=[[text] for text in texts], mask=torch.zeros(1)) for some, texts in answered
    ]
    weights = {name: weight for name, weight in cfg.reward_weights.items() if weight}
    for _ in range(2):  # the second time only what is not known yet is asked for
        totals = [sum(w * one[name] for name, w in weights.items()) for one, _ in reward(parts, judge, cfg)]
        if not any(total.isnan().any() for total in totals):
            break
    found = run.gather([value for total in totals for value in total[:, 0].tolist()])
    return sum(found) / len(found)


def greedily(some: list[data.Sample], policy: vlm.VLM, cfg: Config) -> tuple[list[data.Sample], list[str]]:
    return some, evaluation.respond(policy, some, cfg.four_stage, cfg.max_new_tokens, cfg.fps, cfg.max_frames)


def evaluate(name: str, model: str, sets: dict, judge: CaptionReward | None, cfg: Config, run: "Run") -> None:
    """Greedy responses on every held-out set -> eval/NAME.json, and a few pictures for the report."""
    file = run.folder / "eval" / f"{name}.json"
    held_out = {k: v for k, v in sets.items() if k.startswith("test")}
    if run.first(file.exists) or not held_out:
        if not held_out:
            run.say("evaluation: skipped (the data have no test*.json)")
        return
    policy = load(model, False, cfg, run.device)
    result = evaluation.evaluate(policy, held_out, judge, cfg, run, f"evaluate {name}")
    if run.is_main:
        evaluation.save_gallery(run.folder / "eval" / "gallery", held_out, cfg.fps, cfg.max_frames)
    run.write(file, result)
    for split, scores in result.items():
        run.say(f"{name:>6} | {split}: {evaluation.one_line(scores)}")


# --- learning -------------------------------------------------------------------------------------------------------


class Learner:
    """A policy under training in one stage: optimiser, schedule, checkpoints, metrics. Resumes by itself."""

    def __init__(
        self,
        stage: str,
        model: str,
        steps: int,
        lr: float,
        cfg: Config,
        run: Run,
        held_out: Callable[[vlm.VLM], float] | None = None,
    ):
        self.stage, self.base, self.steps, self.cfg, self.run, self.held_out = stage, model, steps, cfg, run, held_out
        self.folder = run.folder / stage
        run.most = sys.maxsize  # another stage needs other memory
        self.result = self.folder / "policy"
        self.finished = run.first(self.result.exists)
        self.step, self.size, self.losses = 0, None, []
        self.policy = self.reference = None
        self.skipped = self.left_out = 0  # updates in a row before this one; steps of the optimiser in this one
        if self.finished:
            return
        run.reseed(stage, "initialisation")
        policy = load(model, True, cfg, run.device)
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        run.widen(list(trained.values()))
        # as transformers' Trainer: what scales or shifts (norms, biases) is not pulled towards 0
        decayed, others = ([n for n, p in trained.items() if (p.ndim > 1) == matrix] for matrix in (True, False))
        self.names = decayed + others  # in the optimiser's order
        groups = [{"params": [trained[n] for n in decayed]}, {"params": [trained[n] for n in others]}]
        groups[1]["weight_decay"] = 0.0
        optimizer = AdamW(groups, lr=lr, weight_decay=cfg.weight_decay, fused=True)
        total = steps * (cfg.iterations if stage == "rl" else 1)
        schedule = LambdaLR(optimizer, partial(rate, warmup=round(cfg.warmup * total), total=total))
        self.model, self.optimizer, self.schedule = run.prepare(policy, optimizer, schedule)
        self.policy = run.accelerator.unwrap_model(self.model)
        if last := run.first(lambda: max(self.checkpoints(), default=None, key=number)):
            self._load_checkpoint(last)
            run.say(f"{stage}: resumed after update {self.step}")
        for folder in self.checkpoints("best"):
            if number(folder) > self.step:  # of updates that are done again
                run.remove(folder)
        for name in ("metrics", "rollouts", "held_out", "skipped"):
            run.keep_lines(self.folder / f"{name}.jsonl", lambda line: line["step"] <= self.step)

    def batches(self, samples: list[data.Sample], size: int) -> Iterator[tuple[int, list[data.Sample]]]:
        """(update number from 1, this process's share of its batch). Which rows, and the random numbers drawn while
        the batch is worked on, depend on the seed and the number only: that makes resuming exact."""
        if self.finished:
            return
        run, asked = self.run, size
        size = batch_size(len(samples), size, run.processes)
        compares = self.stage == "rl" and self.cfg.nce_weight
        least = max(run.processes, 2 if compares else 1)
        if size < least:
            fewer = "The same command with fewer processes goes on from here"
            raise data.DataError(
                f"{self.stage}: {len(samples)} rows are too few; {least} at least in each update of {run.processes} "
                f"process(es). {fewer if run.processes > 1 else 'Give more rows, or --nce_weight 0'}"
            )
        if size < asked:
            run.say(f"warning: {self.stage} has {len(samples)} rows: each update sees {size}, and not {asked}")
        if compares and size < 3:
            run.say(f"warning: Eq. 4 needs a positive and a negative beside a prompt: of {size} prompts it is 0")
        if self.size not in (None, size):
            raise ConfigError(
                f"{self.stage}: {len(samples)} rows, in updates of {self.size} so far, make updates of {size} with "
                f"{run.processes} processes. Go on with as many processes as before"
            )
        self.size = size
        self.bar = run.bar(self.steps, self.stage, "step", self.step)
        rows = islice(self._rows(len(samples), size), self.step * size, None)
        while self.step < self.steps:
            self.step += 1
            self.skipped, self.left_out = self.skipped + 1 if self.left_out else 0, 0
            batch = [samples[i] for i in islice(rows, size)]
            self.ids = [sample.id for sample in batch]
            run.reseed(self.stage, self.step)
            yield self.step, run.mine(batch)
            self.bar.update()
            if self.step % self.cfg.save_every == 0 and self.step < self.steps and not self.left_out:
                self._save_checkpoint()

    def _rows(self, n: int, size: int) -> Iterator[int]:
        """Rows 0..n-1 epoch after epoch, in an order of its own each. No batch of `size` holds a row twice: where two
        epochs share a batch, the later one begins with rows that the earlier one has not left over for it."""
        order: list[int] = []
        for epoch in count_from():
            left = set(order[n - epoch * n % size :])
            order = self.run.order(self.stage, epoch, n)
            first = [i for i in order if i not in left][: size - len(left)]
            taken = set(first)
            order = [*first, *(i for i in order if i not in taken)]
            yield from order

    def passes(self, parts: list) -> Iterator[tuple[int, Any]]:
        """The parts of an update with their numbers."""
        return self.run.passes(self.model, parts)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients: `loss` is what this process adds to the loss of the global batch. Gradients are
        averaged over processes, hence the factor."""
        self.losses.append(loss.detach())
        self.run.accelerator.backward(loss * self.run.processes)

    def update(self) -> None:
        """One step of the optimiser; none where the loss or the gradient of any process is not finite: what is lost is
        one batch, and not the weights."""
        run, cfg = self.run, self.cfg
        self.gradient_norm, self.rate = run.clip(self.model, cfg.max_grad_norm), self.schedule.get_last_lr()[0]
        bad = not (math.isfinite(self.gradient_norm) and torch.stack(self.losses).isfinite().all())
        file = self.folder / "skipped.jsonl"
        if run.total(torch.tensor(bad, device=run.device)) == 0:
            self.optimizer.step()
        else:
            self.left_out += 1
            run.append(file, [{"step": self.step, "ids": self.ids}])
            run.say(f"{self.stage} {self.step}: loss or gradient is not finite; update skipped, its rows are in {file}")
        self.schedule.step()
        self.optimizer.zero_grad()
        self.losses = []
        if self.left_out and self.skipped + 1 >= cfg.max_skipped:
            again = f"--model {self.base} --sft_steps 0 " if self.stage == "rl" else ""
            raise Diverged(
                f"{self.stage}: {self.skipped + 1} updates in a row had a loss or gradient that is not finite; their "
                f"rows are in {file}. A lower --{self.stage}_lr or --max_grad_norm, or other rows, in another "
                f"folder: {again}--output_dir NEW. The last checkpoint is from before them"
            )

    def log(self, numbers: dict[str, tuple[float, float]], show: bool = True) -> dict[str, float]:
        """(sum, count) by name -> means over all processes; one line in metrics.jsonl, one on screen."""
        metrics = self.run.average(numbers) | {"grad_norm": self.gradient_norm, "lr": self.rate}
        metrics = {"step": self.step, **finite(metrics)} | ({"skipped": self.left_out} if self.left_out else {})
        self.run.append(self.folder / "metrics.jsonl", [metrics])
        self.run.track(self.stage, metrics, self.step)
        if show:
            self.run.say(f"{self.stage} {self.step:>4}/{self.steps}  {readable(metrics)}")
        return metrics

    def log_rollouts(self, parts: list[Rollouts]) -> None:
        numbers: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for part in parts:
            for name, (value, n) in part.numbers.items():
                numbers[name][0] += value
                numbers[name][1] += n
        metrics, cfg = self.log(numbers), self.cfg
        lines = [
            {
                "step": self.step,
                "id": sample.id,
                "text": part.text[i],
                **as_json(part.rewards, i),
                "judge": part.replies[i],
            }
            for part in parts
            for i, sample in enumerate(part.samples)
        ]
        place = {name: i for i, name in enumerate(self.ids)}
        self.run.append(self.folder / "rollouts.jsonl", sorted(self.run.gather(lines), key=lambda x: place[x["id"]]))
        if metrics["tied"] == 1:
            self.run.say(
                "  all responses to each prompt earn the same: no advantage, nothing learned from rewards here"
            )
        if cfg.show_every and (self.step % cfg.show_every == 0 or self.step == 1):
            if metrics["truncated"] > cfg.max_truncated:
                cut = f"{metrics['truncated']:.0%} of responses were cut at --max_new_tokens {cfg.max_new_tokens}"
                self.run.say(f"  warning: {cut}, before their answer: give more, or train the cold start longer")
            if self.step > 1:
                sample, text = parts[0].samples[0], parts[0].text[0][0]
                self.run.say(f"  {sample.problem} [{sample.answer}]\n  {text}")

    def finish(self) -> str:
        """Write the trained policy, whole or not at all, and drop the checkpoints. Returns its folder."""
        if not self.finished:
            self.bar.close()
            self._compare()
            self._write_policy(self.result)
            self._keep_best()
            self.policy = self.model = self.optimizer = self.schedule = None
            if self.reference:
                self.reference.frozen = None
            self.run.accelerator.free_memory()  # before another is loaded
        for folder in self.checkpoints():
            self.run.remove(folder)
        self.run.tracked += self.steps
        return str(self.result)

    def _write_policy(self, folder: Path) -> None:
        weights = self.run.gathered(self._weights()) if self.run.sharded else {}
        self.run.write_folder(folder, partial(self._save, weights))

    def _save(self, weights: dict[str, Tensor], folder: Path) -> None:
        """The policy and its model card. What RL starts from is whole, because RL's adapter is one of it."""
        of_adapter = (Path(self.base) / "adapter_config.json").exists()  # which `load` has merged: no base on this disk
        merge = self.cfg.merge or self.stage == "sft" or of_adapter
        policy = self.policy
        if weights:  # this process has a share of them only
            policy = load(self.base, True, self.cfg, "cpu")
            if unknown := policy.load_state_dict(weights, strict=False).unexpected_keys:
                raise RuntimeError(f"the trained weights have other names: {unknown[:3]}")
        policy.save(folder, merge)
        card = model_card(self.stage, self.base, self.step, bool(self.cfg.lora_rank) and not merge, self.cfg)
        (folder / "README.md").write_text(card, encoding="utf-8")

    # checkpoints
    def checkpoints(self, kind: str = "checkpoint") -> list[Path]:
        return sorted(self.folder.glob(f"{kind}-*"), key=number)

    def _weights(self) -> dict[str, Tensor]:
        parameters = dict(self.policy.named_parameters())
        return {name: parameters[name] for name in self.names}

    def _slots(self) -> list[Tensor]:
        """What the optimiser changes, in the order of `names`."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _save_checkpoint(self) -> None:
        """All that the rest of the stage depends on: weights, optimiser, schedule, place in the data. Random numbers
        follow from the seed and the place (`Run.reseed`)."""
        self._compare()
        tensors = {}
        for name, slot in zip(self.names, self._slots(), strict=True):
            tensors[f"weight/{name}"] = slot  # in float32, also of half-precision weights
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state.get(slot, {}).items()}
        schedule = {key: value for key, value in self.schedule.state_dict().items() if key != "lr_lambdas"}
        state = {"stage": self.stage, "step": self.step, "size": self.size, "most": self.run.most, "schedule": schedule}
        self.run.save_checkpoint(self.folder / f"checkpoint-{self.step}", state, tensors)
        for old in self.checkpoints()[: -self.cfg.keep_last]:
            self.run.remove(old)
        self._keep_best()
        self.run.accelerator.wait_for_everyone()

    def _load_checkpoint(self, folder: Path) -> None:
        weights = self._weights()
        state, tensors = self.run.load_checkpoint(folder, weights, ("size", "most", "schedule"))
        self.step, self.size, self.run.most = state["step"], state["size"], state["most"]
        now, slots = self.optimizer.state_dict(), self._slots()
        for group in now["param_groups"]:
            group["lr"] = state["schedule"]["_last_lr"][0]
        of = {name: i for i, name in enumerate(self.names)}
        kept: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "weight":
                for p in (weights[name], slots[of[name]]):
                    p.data.copy_(value)
            else:
                kept[of[name]][kind] = value
        self.optimizer.load_state_dict({"state": dict(kept), "param_groups": now["param_groups"]})
        self.schedule.load_state_dict(state["schedule"] | {"lr_lambdas": [None] * len(now["param_groups"])})

    def _compare(self) -> None:
        """Score the policy on held-out rows; write it as best-N where none was better."""
        if not self.held_out:
            return
        with self.run.whole(self.policy):
            score = self.held_out(self.policy)
        best = self.run.first(lambda: max((line["reward"] for line in self._held_out()), default=-math.inf))
        known = math.isfinite(score)
        self.run.append(self.folder / "held_out.jsonl", [{"step": self.step, "reward": score if known else None}])
        said = f"{score:.3f}" if known else "unknown: the judge left captions without a verdict, so it is not compared"
        self.run.say(f"{self.stage} {self.step:>4}/{self.steps}  held-out reward {said}")
        if score >= best and self.step < self.steps:  # the last is the result itself
            self._write_policy(self.folder / f"best-{self.step}")

    def _keep_best(self) -> None:
        """Of the policies best-N the best, or none where the result is as good. Called when what follows is safe."""
        best = max(((line["reward"], line["step"]) for line in self._held_out()), default=(0, 0))[1]
        for folder in self.checkpoints("best"):
            if number(folder) != best:
                self.run.remove(folder)

    def _held_out(self) -> list[dict]:
        """The comparisons so far whose reward is known."""
        lines = read_jsonl(self.folder / "held_out.jsonl", mend=self.run.is_main)
        return [line for line in lines if line["reward"] is not None]


def number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


class Diverged(RuntimeError):
    """Training has stopped because its numbers are not finite any more."""


def rate(update: int, warmup: int, total: int) -> float:
    """The share of the learning rate in update 0, 1, ...: a linear rise over `warmup` updates, of which the first has
    its share already, then half a cosine to 0."""
    if update < warmup:
        return (update + 1) / warmup
    return (1 + math.cos(math.pi * (update - warmup) / max(1, total - warmup))) / 2


class AdamW(torch.optim.AdamW):
    """AdamW on float32 copies of half-precision weights, as mixed precision has it: a step of 1e-6 is far below what
    bfloat16 resolves at 0.02, and would be lost. Checkpoints hold the copies. Gradients are summed over passes in half
    precision."""

    def __init__(self, groups: list[dict], **options):
        half, self.pairs, copies = (torch.bfloat16, torch.float16), [], []
        for group in groups:
            slots = [p.detach().float().requires_grad_() if p.dtype in half else p for p in group["params"]]
            self.pairs += [(p, slot) for p, slot in zip(group["params"], slots) if p is not slot]
            copies.append(group | {"params": slots})
        super().__init__(copies, **options)

    def step(self, closure=None) -> None:
        for p, copy in self.pairs:
            copy.grad, p.grad = None if p.grad is None else p.grad.float(), None
        super().step(closure)
        for p, copy in self.pairs:
            if copy.grad is not None:
                p.data.copy_(copy)
                copy.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for p, _ in self.pairs:
            p.grad = None


class Reference:
    """pi_ref of the KL: the model after the cold start. With LoRA it is the policy without its adapter, otherwise a
    frozen copy; with beta = 0 it is not loaded at all."""

    def __init__(self, start: str, learner: Learner, cfg: Config):
        self.learner, self.needed, self.frozen = learner, cfg.beta > 0 and not learner.finished, None
        learner.reference = self  # which lets go of it at its end
        if self.needed and not cfg.lora_rank:
            self.frozen = load(start, False, cfg, learner.run.device)

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


# --- what a run works on ---------------------------------------------------------------------------------------------


def open_data(cfg: Config, run: Run) -> dict[str, list[data.Sample]]:
    """Check every row and every file before any model is loaded; then build the embedded world where needed."""
    with run.one_first():
        given = data.load(cfg.data, cfg.on_bad_row, run.say) if cfg.data else None
    if not (cfg.data and cfg.model and (cfg.judge or not cfg.caption_reward)):
        if run.is_main:
            shapes.build(Path(cfg.world), cfg.quiet)
        run.accelerator.wait_for_everyone()
    if given is None:
        with run.one_first():
            given = data.load(Path(cfg.world) / "data")
    sets = _fitting(given, cfg, run)
    if "train" not in sets:
        raise data.DataError(f"data: {cfg.data} has no train.json to learn from")
    run.claim_data(run.first(lambda: data.fingerprint(sets)))
    run.say("data: " + ", ".join(f"{len(rows)} {name}" for name, rows in sets.items()))
    return sets


def _fitting(sets: dict[str, list[data.Sample]], cfg: Config, run: Run) -> dict[str, list[data.Sample]]:
    try:
        context, tokenizer = vlm.context(cfg.start)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: cannot load {cfg.start}: {data.reason(error)}") from error
    most = cfg.max_prompt_tokens or context - cfg.max_new_tokens
    limits = (cfg.four_stage, cfg.min_pixels, cfg.max_pixels, cfg.fps, cfg.max_frames)
    fit, problems = data.fitting(sets, tokenizer, most, *limits)
    data.refuse(problems, cfg.on_bad_row if all(fit.values()) else "error", run.say)
    return fit


def open_judge(sets: dict[str, list[data.Sample]], cfg: Config, run: Run) -> CaptionReward | None:
    """The judge, tried on a few questions without a caption: that it answers at all, and the floor of the reward.
    What it has replied is kept in the run folder, so that a resumed run does not ask again. Wherever there are a judge
    and captions these are judged at evaluation, also where they earn no reward: so runs can be compared."""
    there = cfg.four_stage and (cfg.judge or not cfg.model)
    if not there or run.first((run.folder / "eval" / "after.json").exists):
        return None
    name = cfg.judge_model if cfg.judge.startswith("http") else cfg.judge or str(Path(cfg.world) / "judge")
    bounds = {"concurrency": cfg.judge_concurrency, "deadline": cfg.judge_deadline}
    judge = evaluation.open_judge(cfg.judge or name, name, run.device, cfg.judge_max_tokens, **bounds)
    journal = Journal(run.folder / "judge" / f"{run.rank}.jsonl", name)
    run.accelerator.wait_for_everyone()  # all have read what there was before one writes
    asked, few = CaptionReward(judge, journal), sets["train"][: 4 * FEW : 4]
    floor = asked.floor([(s.question, s.answer, s.problem_type) for s in few])
    if floor is None:
        raise ConfigError(f"judge: {judge} answered none of {len(few)} questions. Its last error: {judge.last_error}")
    run.say(f"judge: {name}, right on {floor:.0%} of {len(few)} questions without any caption")
    if refused := getattr(judge, "refused", None):
        run.say(f"warning: the judge's server refuses {' and '.join(refused)}: replies may differ from call to call")
    return asked


def load(model: str, trainable: bool, cfg: Config, device: str | torch.device) -> vlm.VLM:
    names = "dtype attention lora_rank train_vision gradient_checkpointing min_pixels max_pixels"
    options = {name: getattr(cfg, name) for name in names.split()}
    try:
        policy = vlm.load(model, **options, trainable=trainable)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise ConfigError(f"model: cannot load {model}: {data.reason(error)}") from error
    return policy.to(device)


def finish(run: Run) -> None:
    """The report, the table, and where everything is."""
    if run.is_main:
        page = report.write(run.folder)
        print(report.table(run.folder))
        print(f"{time.time() - run.began:.0f} s. Run folder: {run.folder}   Report: {page}")
    run.accelerator.end_training()


def cli() -> None:
    """Entry point: one clear line for what is wrong with the input, and for Ctrl-C."""
    folder = Path(".")
    try:
        cfg = parse_config(sys.argv[1:])
        folder = Path(cfg.output_dir)
        main(cfg)
    except (ConfigError, data.DataError, Diverged) as error:
        stop(f"error: {error}")
    except KeyboardInterrupt:
        stop("\ninterrupted. The same command goes on from what is finished and the last checkpoint", everyone=True)
    except Exception as error:
        if isinstance(error, RuntimeError) and should_reduce_batch_size(error):
            hint = (
                "a lower --prompts_per_pass, --sft_batch, --eval_batch or --max_pixels, --gradient_checkpointing true"
            )
            stop(
                f"error: memory does not suffice ({str(error).splitlines()[0]}). Try {hint}; the last checkpoint stays"
            )
        # torch and safetensors report a full disk in their own ways
        if "No space left" not in str(error) and (not folder.exists() or shutil.disk_usage(folder).free > 2**20):
            raise
        stop(
            f"error: the disk is full ({error}). What was there before, the last checkpoint among it, is whole. Free "
            "some space; the same command goes on where it was"
        )


if __name__ == "__main__":
    cli()
