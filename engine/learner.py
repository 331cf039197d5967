"""A policy under training in one stage: optimiser, schedule, checkpoints, metrics, and its
reference model."""

import dataclasses
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import copy as shallow_copy
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import cpu_offload
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import BatchFeature

from engine import ConfigError, DataError, checkpoint, counted
from engine.files import read_jsonl
from engine.loader import read_ahead
from engine.pretrained import open_policy
from engine.run import Run, finite
from engine.vlm import REFERENCE, VLM, TokenScores


class Diverged(RuntimeError):
    """Training was stopped because its loss or gradient stayed non-finite."""


def updates(steps: int, epochs: float, rows: int, batch: int, processes: int = 1) -> int:
    """The updates of a stage: `steps`, or as many as `epochs` passes over its rows take."""
    return (
        math.ceil(epochs * rows / max(1, batch_size(rows, batch, processes))) if epochs else steps
    )


def batch_size(rows: int, asked: int, processes: int) -> int:
    """Rows of one update: `asked`, or all rows if there are fewer, rounded down to a multiple of
    the processes."""
    return min(asked, rows) // processes * processes


def rows_of_update(stage: str, rows: int, asked: int, processes: int, at_least: int = 1) -> int:
    """`batch_size`. Raises DataError where it is below `at_least`, or empty on a process."""
    size, needed = batch_size(rows, asked, processes), max(at_least, processes)
    if size < needed:
        other = ", or fewer processes" if processes > 1 else ""
        other += ", or --nce_weight 0" if needed > processes else ""
        raise DataError(
            f"{stage}: too few rows ({rows}). An update on {processes} process(es) needs at "
            f"least {needed}. Give more rows{other}"
        )
    return size


class Learner:
    """A policy under training in one stage. It resumes from its last checkpoint by itself.

    held_out: scores a policy on rows that are not trained on; the best checkpoint so far is then
    kept. `finished`: the stage's policy is on disk already, and `batches` yields nothing.
    """

    def __init__(
        self,
        stage: str,
        model: str,
        steps: int,
        lr: float,
        cfg,
        run: Run,
        held_out: Callable[[VLM], float] | None = None,
    ):
        self.stage, self.base, self.steps, self.cfg, self.run = stage, model, steps, cfg, run
        self.held_out = held_out
        self.folder = run.folder / stage
        self.result = self.folder / "policy"
        self.finished = run.from_main(self.result.exists)
        self.step, self.size, self.losses = 0, None, []
        # skipped: the updates right before this one, and iterations of this one
        self.skipped_before = self.skipped = 0
        self.extra: dict[str, Any] = {}  # what else the rest of the stage depends on, as JSON
        self.gradient_norm = self.rate = math.nan  # of the last update
        self.policy = None
        # rows at a time that an update's memory takes; another stage needs other memory
        self.limit = run.micro_batch_limit = sys.maxsize
        if self.finished:
            return
        run.reseed(stage, "initialisation")
        policy = open_policy(model, cfg, run.device, trainable=True)
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        run.upcast_shards(list(trained.values()))
        # as transformers' Trainer: what scales or shifts (norms, biases) does not decay
        decayed, others = (
            [n for n, p in trained.items() if (p.ndim > 1) == m] for m in (True, False)
        )
        self.names = decayed + others  # in the optimiser's order
        groups = [{"params": [trained[n] for n in names]} for names in (decayed, others)]
        groups[1]["weight_decay"] = 0.0
        optimizer = AdamW(groups, lr=lr, weight_decay=cfg.weight_decay, fused=True)
        total = steps * (cfg.iterations if stage == "rl" else 1)
        schedule = LambdaLR(optimizer, partial(rate, warmup=round(cfg.warmup * total), total=total))
        self.model, self.optimizer, self.schedule = run.prepare(policy, optimizer, schedule)
        self.policy = run.accelerator.unwrap_model(self.model)
        if last := run.from_main(lambda: max(self.checkpoints(), default=None, key=number)):
            self._load_checkpoint(last)
            run.say(f"{stage}: resumed after update {self.step}")
        for folder in self.checkpoints("best"):
            if number(folder) > self.step:  # of updates that are done again
                run.remove(folder)
        for name in ("metrics", "rollouts", "held_out", "skipped"):
            run.keep_lines(self.folder / f"{name}.jsonl", lambda line: line["step"] <= self.step)

    def batches(self, samples: list, size: int, at_least: int = 1) -> Iterator[tuple[int, list]]:
        """(update number from 1, this rank's shard of its batch), for batches of `size` over all
        ranks.

        Rows and random draws are functions of the seed and the update, so resuming is exact. Raises
        DataError where there are fewer than `at_least` rows for an update.
        """
        if self.finished:
            return
        run, asked = self.run, size
        size = rows_of_update(self.stage, len(samples), size, run.processes, at_least)
        if size < asked:
            run.say(
                f"warning: {self.stage} has {counted(len(samples), 'row')}: an update sees {size}, "
                f"not {asked}"
            )
        if self.size not in (None, size):
            raise ConfigError(
                f"{self.stage}: each update before the interruption took {self.size} of the "
                f"{len(samples)} rows. With {run.processes} processes it would take {size}. "
                "Resume with the earlier number of processes"
            )
        self.size = size
        self.bar = run.progress_bar(self.steps, self.stage, "step", self.step)
        rows = islice(self._rows(len(samples), size), self.step * size, None)
        left = [[samples[i] for i in islice(rows, size)] for _ in range(self.step, self.steps)]
        shards = read_ahead([run.shard(batch) for batch in left], self.cfg)
        for batch, shard in zip(left, shards):
            self.step += 1
            self.skipped_before, self.skipped = self.skipped_before + 1 if self.skipped else 0, 0
            self.ids = [sample.id for sample in batch]
            self.gradient_norm = self.rate = math.nan  # until an update
            run.reseed(self.stage, self.step)
            yield self.step, shard
            self.bar.update()
            if self.step % self.cfg.save_every == 0 and self.step < self.steps and not self.skipped:
                self._save_checkpoint()

    def _rows(self, n: int, size: int) -> Iterator[int]:
        """Rows 0..n-1 epoch after epoch, each in an order of its own. No batch of `size` holds a
        row twice: where two epochs share a batch, the later one begins with rows that are not in it
        yet."""
        order: list[int] = []
        for epoch in count():
            left = set(order[n - epoch * n % size :])
            order = self.run.permutation(self.stage, epoch, n)
            head = [i for i in order if i not in left][: size - len(left)]
            taken = set(head)
            order = [*head, *(i for i in order if i not in taken)]
            yield from order

    def rows_at_once(self, rows: int) -> int:
        """In a micro-batch of an update of so many on this rank."""
        return min(self.cfg.prompts_per_pass or rows, self.limit)

    def accumulate(self, micro_batches: list, work: Callable, *args) -> list:
        """The gradient of an update: work(micro_batches, *args) goes through them all and calls
        `backward`. Returns the micro-batches that it was done in.

        If memory runs out on any rank, all begin again with micro-batches of half as many prompts.
        The gradient is the same up to rounding. Each attempt has copies of the micro-batches, which
        are anything that can be sliced, and leaves nothing behind.
        """
        run = self.run
        while why := run.attempt(work, tried := list(map(shallow_copy, micro_batches)), *args):
            self.optimizer.zero_grad()
            self.losses = []
            most = max(map(len, micro_batches))
            if most == 1:
                raise RuntimeError(why)
            n = self.limit = (most + 1) // 2  # from now on
            run.say(
                f"{self.stage} {self.step}: out of memory in the update with {most} prompts at a "
                f"time ({why}); trying {n}"
            )
            micro_batches = [m[i : i + n] for m in micro_batches for i in range(0, len(m), n)]
        run.average_gradients(self._slots())
        return tried

    def passes(self, rollouts) -> Iterator[tuple[Any, TokenScores, bool]]:
        """(rollouts, their scores, are they the last?) of a micro-batch: all responses at once, or
        --completions_per_pass at a time, behind prompts that run once. The caller takes each
        through `backward` before it asks for the next."""
        parts, prefix = rollouts.passes(self.cfg.completions_per_pass), None
        if len(parts) > 1:
            hidden, prefix = self.model.prefix(rollouts.inputs)
            prefix.cut(hidden)
        for part in parts:
            scores = self.model(rollouts.inputs, part.branches, part.scored_mask, prefix)
            yield part, scores, part is parts[-1]
        if prefix:
            prefix.backward()
        rollouts.collect(parts)

    def backward(self, loss: Tensor) -> None:
        """Add to the gradients. `loss` is this rank's part of the loss of the global batch;
        gradients are averaged over ranks, hence the factor."""
        self.losses.append(loss.detach())
        self.run.accelerator.backward(loss * self.run.processes)

    def update(self, scheduled: bool = True) -> None:
        """Take one optimiser step, or skip it if any rank's loss or gradient is non-finite: one
        batch is lost, and not the weights. Raises Diverged after `max_skipped` skipped updates in a
        row. scheduled: take the schedule's step with it."""
        run, cfg = self.run, self.cfg
        slots = dict(zip(self.names, self._slots(), strict=True))
        in_order = [slots[name] for name, _ in self.policy.named_parameters() if name in slots]
        self.gradient_norm = run.clip_grad_norm(in_order, cfg.max_grad_norm)
        self.rate = self.schedule.get_last_lr()[0]
        bad = not (math.isfinite(self.gradient_norm) and torch.stack(self.losses).isfinite().all())
        file = self.folder / "skipped.jsonl"
        if run.all_reduce(torch.tensor(bad, device=run.device)) == 0:
            self.optimizer.step()
        else:
            self.skipped += 1
            run.append(file, [{"step": self.step, "ids": self.ids}])
            run.say(
                f"{self.stage} {self.step}: non-finite loss or gradient; update skipped, its rows "
                f"are in {file}"
            )
        if scheduled:
            self.schedule.step()
        self.optimizer.zero_grad()
        self.losses = []
        in_a_row = self.skipped_before + 1
        if self.skipped and in_a_row >= cfg.max_skipped:
            again = f"--model {self.base} --sft_steps 0 " if self.stage == "rl" else ""
            raise Diverged(
                f"{self.stage}: {counted(in_a_row, 'update')} in a row had a non-finite "
                f"loss or gradient; their rows are in {file}. Give a lower --{self.stage}_lr or "
                f"--max_grad_norm, or other rows, and another folder: {again}--output_dir NEW. "
                "The last checkpoint is from before them"
            )

    def log(self, numbers: dict[str, tuple[float, float]], show: bool = True) -> dict[str, float]:
        """(sum, count) by name -> means over all ranks; one line in metrics.jsonl, one on
        screen."""
        metrics = self.run.average(numbers) | {"grad_norm": self.gradient_norm, "lr": self.rate}
        metrics = {"step": self.step, **finite(metrics)}
        metrics |= {"skipped": self.skipped} if self.skipped else {}
        self.run.append(self.folder / "metrics.jsonl", [metrics])
        self.run.track(self.stage, metrics, self.step)
        if show:
            self.run.say(f"{self.stage} {self.step:>4}/{self.steps}  {readable(metrics)}")
        return metrics

    def finish(self) -> str:
        """Write the trained policy, whole or not at all, and delete the checkpoints. Returns its
        folder."""
        if not self.finished:
            self.bar.close()
            self._score_held_out()
            self._write_policy(self.result)
            self._keep_best()
            self.policy = self.model = self.optimizer = self.schedule = None
            self.run.accelerator.free_memory()  # before another model is loaded
        for folder in self.checkpoints():
            self.run.remove(folder)
        self.run.tracked += self.steps
        return str(self.result)

    def _write_policy(self, folder: Path) -> None:
        weights = checkpoint.full_tensors(self.run, self._weights()) if self.run.sharded else {}
        self.run.write_folder(folder, partial(self._save, weights))

    def _save(self, weights: dict[str, Tensor], folder: Path) -> None:
        """The policy and its model card. RL goes on with a cold start's adapter, so `merge` is for
        the last stage."""
        policy, cfg = self.policy, self.cfg
        adapters = getattr(policy.model, "peft_config", {})
        # of an adapter that `load` merged in no folder holds the base
        merged = (Path(self.base) / "adapter_config.json").exists() and not self._of_adapter()
        merge = merged or cfg.merge and self.stage == ("sft" if cfg.method == "sft" else "rl")
        if weights:  # this rank holds a shard of them only
            policy = open_policy(self.base, cfg, "cpu", trainable=True)
            if unknown := policy.load_state_dict(weights, strict=False).unexpected_keys:
                raise RuntimeError(f"the trained weights have other names: {unknown[:3]}")
        policy.save(folder, merge)
        of = "" if merge or not adapters else adapters["default"].base_model_name_or_path
        card = model_card(self.stage, of, self.step, cfg)
        (folder / "README.md").write_text(card, encoding="utf-8")

    # checkpoints
    def checkpoints(self, kind: str = "checkpoint") -> list[Path]:
        return sorted(self.folder.glob(f"{kind}-*"), key=number)

    def _weights(self) -> dict[str, Tensor]:
        parameters = dict(self.policy.named_parameters())
        return {name: parameters[name] for name in self.names}

    def _of_adapter(self) -> bool:
        """Is what is trained the adapter that the stage began with?"""
        return REFERENCE in getattr(self.policy.model, "peft_config", {})

    def _slots(self) -> list[Tensor]:
        """What the optimiser changes, in the order of `names`."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _save_checkpoint(self) -> None:
        """All that the rest of the stage depends on: weights, optimiser, schedule, place in the
        data."""
        self._score_held_out()
        tensors = {}
        for name, slot in zip(self.names, self._slots(), strict=True):
            tensors[f"weight/{name}"] = slot  # in float32, also of half-precision weights
            state = self.optimizer.state.get(slot, {})
            tensors |= {f"{key}/{name}": value for key, value in state.items()}
        schedule = {k: v for k, v in self.schedule.state_dict().items() if k != "lr_lambdas"}
        state = {"stage": self.stage, "step": self.step, "size": self.size, "schedule": schedule}
        state |= {"micro_batch_limit": self.run.micro_batch_limit, "limit": self.limit}
        state |= {"extra": self.extra, "of_adapter": self._of_adapter()}
        checkpoint.save(self.run, self.folder / f"checkpoint-{self.step}", state, tensors)
        for old in self.checkpoints()[: -self.cfg.keep_last]:
            self.run.remove(old)
        self._keep_best()
        self.run.accelerator.wait_for_everyone()

    def _load_checkpoint(self, folder: Path) -> None:
        weights = self._weights()
        needed = ("size", "micro_batch_limit", "schedule")
        state, tensors = checkpoint.load(self.run, folder, weights, needed)
        if state.get("of_adapter", False) != self._of_adapter():
            raise ConfigError(
                f"checkpoint: {folder} is of an earlier version, which merged the adapter that the "
                "run began with. Give another --output_dir"
            )
        self.step, self.size = state["step"], state["size"]
        self.run.micro_batch_limit = state["micro_batch_limit"]
        self.limit = state.get("limit", sys.maxsize)
        self.extra = state.get("extra", {})
        now, slots = self.optimizer.state_dict(), self._slots()
        for group in now["param_groups"]:
            group["lr"] = state["schedule"]["_last_lr"][0]
        index = {name: i for i, name in enumerate(self.names)}
        moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "weight":
                for p in (weights[name], slots[index[name]]):
                    p.data.copy_(value)
            else:
                moments[index[name]][kind] = value
        groups = now["param_groups"]
        self.optimizer.load_state_dict({"state": dict(moments), "param_groups": groups})
        self.schedule.load_state_dict(state["schedule"] | {"lr_lambdas": [None] * len(groups)})

    def _score_held_out(self) -> None:
        """Score the policy on held-out rows, and write it as best-N where none was better."""
        if not self.held_out:
            return
        with self.run.unsharded(self.policy):
            score = self.held_out(self.policy)
        scores = self.run.from_main(lambda: [line["reward"] for line in self._held_out_lines()])
        known = math.isfinite(score)
        line = {"step": self.step, "reward": score if known else None}
        self.run.append(self.folder / "held_out.jsonl", [line])
        shown = f"{score:.3f}" if known else "unknown: the judge gave no verdict on some captions"
        self.run.say(f"{self.stage} {self.step:>4}/{self.steps}  held-out reward {shown}")
        # the last is the result
        if score >= max(scores, default=-math.inf) and self.step < self.steps:
            self._write_policy(self.folder / f"best-{self.step}")

    def _keep_best(self) -> None:
        """Keep the best of the policies best-N, or none where the result is as good."""
        lines = self._held_out_lines()
        best = max(((line["reward"], line["step"]) for line in lines), default=(0, 0))[1]
        for folder in self.checkpoints("best"):
            if number(folder) != best:
                self.run.remove(folder)

    def _held_out_lines(self) -> list[dict]:
        """The comparisons so far whose reward is known."""
        lines = read_jsonl(self.folder / "held_out.jsonl", repair=self.run.is_main)
        return [line for line in lines if line["reward"] is not None]


def number(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def rate(update: int, warmup: int, total: int) -> float:
    """The factor on the learning rate in update 0, 1, ...: (update + 1) / warmup in the warm-up,
    then half a cosine to 0."""
    if update < warmup:
        return (update + 1) / warmup
    return (1 + math.cos(math.pi * (update - warmup) / max(1, total - warmup))) / 2


class AdamW(torch.optim.AdamW):
    """AdamW on float32 copies of half-precision weights: a step of 1e-6 is far below what bfloat16
    resolves at 0.02, and would be lost. Checkpoints hold the copies. Gradients go to the copies as
    soon as backward has them, so micro-batches and ranks are summed in float32."""

    def __init__(self, groups: list[dict], **options):
        half, self.pairs, copies = (torch.bfloat16, torch.float16), [], []
        for group in groups:
            slots = [
                p.detach().float().requires_grad_() if p.dtype in half else p
                for p in group["params"]
            ]
            self.pairs += [(p, slot) for p, slot in zip(group["params"], slots) if p is not slot]
            copies.append(group | {"params": slots})
        for p, copy in self.pairs:
            p.register_post_accumulate_grad_hook(partial(move_gradient, copy))
        super().__init__(copies, **options)

    def step(self, closure=None) -> None:
        super().step(closure)
        for p, copy in self.pairs:
            if copy.grad is not None:
                p.data.copy_(copy)
                copy.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for p, _ in self.pairs:
            p.grad = None


def move_gradient(slot: Tensor, p: Tensor) -> None:
    """Add the gradient of p to that of its float32 copy."""
    slot.grad = p.grad.float() if slot.grad is None else slot.grad.add_(p.grad)
    p.grad = None


class Reference:
    """pi_ref of the KL: the model after the cold start. With LoRA it is the policy with its adapter
    as it was then (`VLM.base`), otherwise a frozen copy, whose layers `--reference cpu` keeps in
    host memory and moves to the device one by one. It is not loaded with beta = 0, nor where the
    stage is finished. always: a loss needs it whatever beta is."""

    def __init__(self, start: str, learner: Learner, cfg, always: bool = False):
        self.learner, self.frozen = learner, None
        self.needed = (always or cfg.beta > 0) and not learner.finished
        if self.needed and not cfg.lora_rank:
            device, offload = learner.run.device, cfg.reference == "cpu"
            self.frozen = open_policy(start, cfg, "cpu" if offload else device)
            if offload:  # the head stays on the device: it is used without being called
                cpu_offload(self.frozen.core.model, device)
                self.frozen.core.lm_head.to(device)

    @torch.no_grad()
    def logp(self, inputs: BatchFeature, ids: Tensor, mask: Tensor) -> Tensor | None:
        """log pi_ref of each response token.   [B, P], [B, G, T], [B, G, T] -> [B * G, T]"""
        if not self.needed:
            return None
        if self.frozen is not None:
            return self.frozen(inputs, ids, mask).logp.flatten(0, 1)
        policy = self.learner.policy
        with policy.base():
            return policy(inputs, ids, mask).logp.flatten(0, 1)


def model_card(stage: str, base: str, steps: int, cfg) -> str:
    """README.md of a trained policy: how it was trained, how to load it. base: of an adapter, the
    model that it is one of."""
    on_hub = cfg.model and not Path(cfg.model).exists()
    paths = {"data", "world", "output_dir", "judge"} | (set() if on_hub else {"model"})
    kept = {k: v for k, v in dataclasses.asdict(cfg).items() if k not in paths}
    header = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    header |= {"tags": ["ground-what-you-see"]} | ({"base_model": cfg.model} if on_hub else {})
    how = {"sft": "a supervised cold start", "rl": f"reinforcement learning (method {cfg.method})"}
    of = f"\nAn adapter of the weights in `{base}` alone: keep both, or give `--merge true`.\n"
    return f"""---
{yaml.safe_dump(header, sort_keys=False)}---
# {Path(cfg.model).name or "The embedded world's policy"} after {how[stage]}

Trained with the reference implementation of *Ground What You See* (arXiv 2601.06224).
This stage had {counted(steps, "update")}.
{of if base else ""}
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
    """One line of metrics for the screen."""
    shown = {
        "reward/accuracy": "accuracy {:.2f}",
        "reward/format": "format {:.2f}",
        "reward/caption": "caption {:.2f}",
        "loss": "loss {:+.4f}",
        "kl": "kl {:.4f}",
        "entropy": "entropy {:.3f}",
        "length": "length {:.0f}",
        "tied": "tied {:.0%}",
        "unknown": "unknown {:.2f}",
        "score": "score {:.1f}",
        "pairs": "pairs a prompt {:.2f}",
        "text_right": "text right {:.0%}",
        "image_right": "image right {:.0%}",
        "nce/cosine_mean": "cosine {:.2f}",
        "nce/active": "anchors {:.0f}",
        "grad_norm": "gradient {:.2f}",
    }
    own = {name: name[7:] + " {:.2f}" for name in metrics if name.startswith("reward/")}
    shown = own | shown
    if not metrics.get("unknown"):
        del shown["unknown"]
    return "  ".join(f.format(metrics[name]) for name, f in shown.items() if name in metrics)
