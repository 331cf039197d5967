"""What flows between the stages: sample G responses to each prompt, and record what they earn.

    Sample -> Rollouts (responses, masks, log-probs) -> rewards by name [B, G] -> advantages -> loss

Shapes: B prompts of a micro-batch, G responses each, T response tokens. NaN rewards are unknown.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import BatchFeature

import data
import grpo
import reasoning
from caption_reward import CaptionReward
from conflict import feature_branch
from engine import ConfigError, vlm
from engine.learner import Learner, Reference
from engine.run import Run
from engine.shared_prefix import uniform_numbers
from rewards import reward, reward_judge, rewards_as_json, total


@dataclass
class Rollouts:
    """B prompts of one micro-batch with their G responses, and what training adds to them.

    branches [B, G + 1, T]: the ids of the responses and, last, of the y_i of Eq. 4 (no such branch
    where y_i is a response), right-padded. mask [B * G, T] and feature_mask [B, T]: the tokens that
    count. old_logp, ref_logp [B * G, T]. numbers: (sum, count) of each metric, by name.
    inputs: the prompts [B, P] with their media. `rollouts[rows]`: those of some of its prompts.
    """

    samples: list[data.Sample]
    inputs: BatchFeature
    text: list[list[str]]
    ended: Tensor
    branches: Tensor
    mask: Tensor
    feature_mask: Tensor
    ref_logp: Tensor | None = None
    old_logp: Tensor | None = None
    rewards: dict[str, Tensor] = field(default_factory=dict)
    replies: list[list[str | None]] = field(default_factory=list)
    adv: Tensor | None = None
    stats: dict[str, Tensor] = field(default_factory=dict)
    nce_stats: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, rows: slice) -> "Rollouts":
        def some(x):  # [B, ...] or [B * G, ...]
            if isinstance(x, Tensor):
                return x.unflatten(0, (len(self), -1))[rows].flatten(0, 1)
            if isinstance(x, BatchFeature):
                return vlm.rows_of(x, rows)
            return x[rows] if isinstance(x, list) else x

        parts = {f.name: some(getattr(self, f.name)) for f in fields(self)}
        parts["rewards"] = {name: some(table) for name, table in self.rewards.items()}
        return Rollouts(**parts)

    def split(self, n: int) -> list["Rollouts"]:
        """In micro-batches of n prompts."""
        starts = range(0, len(self), n)
        return [self[i : i + n] for i in starts] if len(starts) > 1 else [self]

    @property
    def scored_mask(self) -> Tensor:
        """The tokens of `branches` that count [B, G + 1, T]."""
        last = self.feature_mask[:, None][:, : self.branches.shape[1] - self.adv.shape[1]]
        return torch.cat([self.mask.unflatten(0, self.adv.shape), last], 1)

    def passes(self, n: int) -> list["Rollouts"]:
        """With n responses of each prompt at a time (0: all); y_i is in the last."""
        size = self.adv.shape[1]
        starts = range(0, size, n or size)
        stops = [*starts[1:], self.branches.shape[1]]
        return [self._responses(slice(*at)) for at in zip(starts, stops)] if n else [self]

    def _responses(self, at: slice) -> "Rollouts":
        def some(x: Tensor | None) -> Tensor | None:  # [B * G, T]
            return None if x is None else x.unflatten(0, self.adv.shape)[:, at].flatten(0, 1)

        names = ("mask", "old_logp", "ref_logp")
        parts = {name: some(getattr(self, name)) for name in names}
        return replace(self, branches=self.branches[:, at], adv=self.adv[:, at], **parts)

    def record(self, scores: vlm.TokenScores, loss: Tensor, nce: Tensor) -> None:
        """Keep what a pass found of each token as plain numbers, so that no graph is kept."""
        mask, tokens = self.mask, self.mask.sum().item()
        entropy = scores.entropy[:, : self.adv.shape[1]].flatten(0, 1)
        self.numbers = {
            "entropy": ((entropy * mask).sum().item(), tokens),
            "clipped": ((self.stats["clipped"] * mask).sum().item(), tokens),
            "loss": (loss.item(), 0),  # a global mean already: micro-batches and ranks add up
        }
        if self.stats["kl"] is not None:
            self.numbers["kl"] = ((self.stats["kl"] * mask).sum().item(), tokens)
        if self.nce_stats:
            pairs = self.nce_stats.pop("pairs").item()
            self.numbers["nce"] = (nce.item(), 1)
            self.numbers["nce/active"] = (self.nce_stats.pop("active").item(), 1)
            for name, value in self.nce_stats.items():
                self.numbers[f"nce/{name}"] = (value.item() * pairs, pairs)

    def collect(self, passes: list["Rollouts"]) -> None:
        """What the passes found."""
        rows = [part.old_logp.unflatten(0, part.adv.shape) for part in passes]
        self.old_logp = torch.cat(rows, 1).flatten(0, 1)
        self.numbers = added(part.numbers for part in passes)

    def of_responses(self) -> dict[str, tuple[float, float]]:
        """The metrics of whole responses."""
        count, prompts = self.mask.shape[0], len(self.samples)
        numbers = {
            "length": (self.mask.sum().item(), count),
            "truncated": ((~self.ended).sum().item(), count),
            "tied": ((self.adv == 0).all(1).sum().item(), prompts),
        }
        for name, table in self.rewards.items():
            known = ~table.isnan()
            numbers[f"reward/{name}"] = (table[known].sum().item(), known.sum().item())
        if "leak" in self.rewards:
            total, n = numbers.pop("reward/leak")
            numbers["caption_leak"] = (-total, n)
        unknown = sum(table.isnan().sum().item() for table in self.rewards.values())
        return numbers | {"unknown": (unknown, count)}


def added(numbers: Iterable[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """(sum, count) by name, over all that have it."""
    found: dict[str, tuple[float, float]] = {}
    for some in numbers:
        for name, (value, n) in some.items():
            total, count = found.get(name, (0.0, 0.0))
            found[name] = (total + value, count + n)
    return found


def roll_out(
    samples: list[data.Sample],
    policy: vlm.VLM,
    cfg,
    step: int | str = 0,
    n: int = 0,
    feature: str = "",
) -> Rollouts:
    """Sample n responses (0: G) to each prompt, at T = 1 but in OViP.

    The draws follow from (seed, step, prompt) alone. feature: --nce_feature where Eq. 4 is on. It
    says what y_i is, and so what the last branch holds.
    """
    n, length = n or cfg.group_size, cfg.max_new_tokens

    inputs = policy.encode(data.prompts(samples, cfg.four_stage, cfg.fps, cfg.max_frames))
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if f"{kind}_features" in inputs:
            del inputs[pixels]  # a frozen tower has seen them
    draws = uniform_numbers([s.id for s in samples], n, length, f"{cfg.seed}/{step}")
    rolls = policy.generate(
        inputs, n, length, draws=draws, temperature=cfg.temperature, top_p=cfg.top_p
    )
    branch = feature_branch(feature, policy, rolls, inputs, samples, length)
    longest = max(rolls.ids.shape[-1], branch[0].shape[-1])
    ids, mask, branch_ids, branch_mask = (
        pad(x, (0, longest - x.shape[-1])) for x in (rolls.ids, rolls.mask, *branch)
    )
    return Rollouts(
        samples=samples,
        inputs=inputs,
        text=rolls.text,
        ended=rolls.ended,
        branches=torch.cat([ids, branch_ids], 1),
        mask=mask.flatten(0, 1),
        feature_mask=branch_mask[:, 0],
    )


def refer(micro_batches: list[Rollouts], reference: Reference) -> None:
    """Score the responses with the reference model."""
    for m in micro_batches:
        mask = m.mask.unflatten(0, (len(m), -1))  # [B, G, T]
        m.ref_logp = reference.logp(m.inputs, m.branches[:, : mask.shape[1]], mask)


def explore(
    batch: list[data.Sample], learner: Learner, reference: Reference, judge: CaptionReward | None
) -> list[Rollouts]:
    """G responses to each prompt with rewards and advantages, in the micro-batches of the update.
    All prompts are sampled at a time, or as many as fit."""
    cfg, run, policy = learner.cfg, learner.run, learner.policy
    n = learner.rows_at_once(len(batch))
    if n < len(batch):  # prompts of a length together
        batch = sorted(batch, key=lambda sample: sample.length)
    feature = cfg.nce_feature if cfg.nce_weight else ""

    def explored(some: list[data.Sample]) -> list[Rollouts]:
        parts = roll_out(some, policy, cfg, learner.step, feature=feature).split(n)
        refer(parts, reference)
        return parts

    rolled = run.micro_batches(batch, 0, explored)
    micro_batches = [part for parts in rolled for part in parts]
    found = reward(micro_batches, reward_judge(judge, policy, cfg), cfg)
    for m, (rewards, replies) in zip(micro_batches, found):
        m.rewards, m.replies = rewards, replies  # accuracy, format, caption   [B, G] each
        m.adv = grpo.group_advantages(total(m.rewards, cfg)).to(m.mask.device)
    return micro_batches


def reference_response(sample: data.Sample, four_stage: bool) -> str:
    """The row's reference, with the stages that are asked for and no others."""
    text = sample.process
    if not four_stage:
        stages = replace(reasoning.parse(text), prethink=None, caption=None)
        text = reasoning.render(stages)
    return text


def global_counts(micro_batches: list[Rollouts], run: Run) -> dict[str, float]:
    """Responses and response tokens of the global batch: the denominators of the loss."""
    tokens = sum(m.mask.sum() for m in micro_batches)
    sequences = tokens.new_tensor(sum(len(m.mask) for m in micro_batches))
    total = run.all_reduce(torch.stack([sequences, tokens]))
    return dict(zip(("sequences", "tokens"), total.tolist(), strict=True))


def log_rollouts(learner: Learner, micro_batches: list[Rollouts]) -> None:
    """One line of metrics.jsonl, one line of rollouts.jsonl per prompt, and what a user should
    see."""
    numbers = added(each for m in micro_batches for each in (m.numbers, m.of_responses()))
    run, cfg, step = learner.run, learner.cfg, learner.step
    if cfg.reward and len({tuple(names) for names in run.gather_object([sorted(numbers)])}) > 1:
        raise ConfigError(f"reward: {cfg.reward} must return the same names for all rows")
    metrics = learner.log(numbers)
    lines = [
        {
            "step": step,
            "id": sample.id,
            "text": m.text[i],
            **rewards_as_json(m.rewards, i),
            "judge": m.replies[i],
        }
        for m in micro_batches
        for i, sample in enumerate(m.samples)
    ]
    place = {name: i for i, name in enumerate(learner.ids)}
    lines = sorted(run.gather_object(lines), key=lambda line: place[line["id"]])
    run.append(learner.folder / "rollouts.jsonl", lines)
    if metrics["tied"] == 1:
        run.say(
            "  warning: all responses to each prompt earn the same reward: every advantage is 0"
        )
    sample, text = micro_batches[0].samples[0], micro_batches[0].text[0][0]
    show(run, cfg, step, metrics["truncated"], sample, text)


def show(run: Run, cfg, step: int, truncated: float, sample: data.Sample, text: str) -> None:
    """Every so many updates: a response, and a warning where many are cut off."""
    if cfg.show_every and (step % cfg.show_every == 0 or step == 1):
        if truncated > cfg.max_truncated:
            run.say(
                f"  warning: {truncated:.0%} of responses were cut at --max_new_tokens "
                f"{cfg.max_new_tokens}, before their answer: raise it, or train the cold start "
                "longer"
            )
        if step > 1:
            run.say(f"  {sample.problem} [{sample.answer}]\n  {text}")
