"""What flows between the stages: sample G responses to each prompt, reward them, record them.

    Sample -> Rollouts (responses, masks, log-probs) -> rewards by name [B, G] -> advantages -> loss

Shapes: B prompts of a micro-batch, G responses each, T response tokens. NaN rewards are unknown.
"""

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import BatchFeature

import answers
import data
import reasoning
from caption_reward import CaptionReward, only_states_the_answer
from conflict import reference_branch
from engine import vlm
from engine.learner import Learner, Reference
from engine.run import Run
from engine.shared_prefix import uniform_numbers


@dataclass
class Rollouts:
    """B prompts of one micro-batch with their G responses, and what training adds to them.

    branches [B, G + 1, T]: the ids of the responses and, last, of the reference branch of Eq. 4 (no
    such branch where f_i needs none), right-padded. mask [B * G, T] and reference_mask [B, T]: the
    tokens that count. old_logp, ref_logp [B * G, T]. numbers: (sum, count) of each metric, by name.
    """

    samples: list[data.Sample]
    inputs: BatchFeature
    text: list[list[str]]
    ended: Tensor
    branches: Tensor
    mask: Tensor
    reference_mask: Tensor
    ref_logp: Tensor | None = None
    old_logp: Tensor | None = None
    rewards: dict[str, Tensor] = field(default_factory=dict)
    replies: list[list[str | None]] = field(default_factory=list)
    adv: Tensor | None = None
    stats: dict[str, Tensor] = field(default_factory=dict)
    nce_stats: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def scored_mask(self) -> Tensor:
        """The tokens of `branches` that count [B, G + 1, T]."""
        reference = self.reference_mask[:, None][:, : self.branches.shape[1] - self.adv.shape[1]]
        return torch.cat([self.mask.unflatten(0, self.adv.shape), reference], 1)

    def record(self, scores: vlm.TokenScores, loss: Tensor, nce: Tensor) -> None:
        """Keep the metrics of this micro-batch as plain numbers, so that no graph is kept."""
        mask, prompts = self.mask, len(self.samples)
        tokens = mask.sum().item()
        entropy = scores.entropy[:, : len(mask) // prompts].flatten(0, 1)
        numbers = {
            "entropy": ((entropy * mask).sum().item(), tokens),
            "clipped": ((self.stats["clipped"] * mask).sum().item(), tokens),
            "length": (tokens, mask.shape[0]),
            "truncated": ((~self.ended).sum().item(), mask.shape[0]),
            "tied": ((self.adv == 0).all(1).sum().item(), prompts),
            "loss": (loss.item(), 0),  # a global mean already: micro-batches and ranks add up
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
            numbers["nce"] = (nce.item(), 1)
            numbers["nce/active"] = (self.nce_stats.pop("active").item(), 1)
            for name, value in self.nce_stats.items():
                numbers[f"nce/{name}"] = (value.item() * pairs, pairs)
        self.numbers = numbers


def roll_out(
    samples: list[data.Sample],
    policy: vlm.VLM,
    reference: Reference | None,
    cfg,
    step: int | str = 0,
    n: int = 0,
) -> Rollouts:
    """Sample n responses (0: G) to each prompt at T = 1, and score them with the reference model.

    The draws follow from (seed, step, prompt) alone. reference = None (selection): neither
    reference log-probs nor the reference branch of Eq. 4.
    """
    n, length = n or cfg.group_size, cfg.max_new_tokens
    inputs = policy.encode(data.prompts(samples, cfg.four_stage, cfg.fps, cfg.max_frames))
    draws = uniform_numbers([s.id for s in samples], n, length, f"{cfg.seed}/{step}")
    rolls = policy.generate(inputs, n, length, draws=draws)
    feature = cfg.nce_feature if reference and cfg.nce_weight else ""
    branch = reference_branch(feature, policy, rolls, inputs, samples, length)
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
        reference_mask=branch_mask[:, 0],
        ref_logp=reference.logp(inputs, ids, mask) if reference else None,
    )


def reward(
    micro_batches: list[Rollouts], judge: CaptionReward | None, cfg
) -> list[tuple[dict[str, Tensor], list]]:
    """For each micro-batch the rewards of every response, by name [B, G], and the judge's replies.

    accuracy, format and, with the Caption Reward, caption and leak (D-14). The judge is asked once
    for all.
    """
    stages = [[[reasoning.parse(text) for text in row] for row in m.text] for m in micro_batches]
    verdicts: list[list] = [[] for _ in micro_batches]
    if cfg.caption_reward:
        items = [
            [
                (s.question, p.caption, s.answer, s.problem_type)
                for s, row in zip(m.samples, rows)
                for p in row
            ]
            for m, rows in zip(micro_batches, stages)
        ]
        flat = iter(judge([item for some in items for item in some]))
        verdicts = [[next(flat) for _ in some] for some in items]
    return [_rewards(*three, cfg) for three in zip(micro_batches, stages, verdicts)]


def _rewards(m: Rollouts, stages: list, verdicts: list, cfg) -> tuple[dict[str, Tensor], list]:
    rows = zip(m.samples, m.text, stages, strict=True)
    flat = [(s, text, parsed) for s, texts, some in rows for text, parsed in zip(texts, some)]
    shape, n = (len(m.text), -1), len(m.text[0])
    correct = [
        answers.is_correct(answers.extract(p.answer, t), s.answer, s.problem_type, cfg.lenient)
        for s, t, p in flat
    ]
    formed = [reasoning.format_reward(t, cfg.four_stage) for _, t, _ in flat]
    rewards = {
        "accuracy": torch.tensor(correct).float().view(shape),
        "format": torch.tensor(formed).view(shape),
    }
    replies = [reply for _, reply in verdicts] or [None] * len(flat)
    if verdicts:
        rewards["caption"] = torch.tensor([verdict for verdict, _ in verdicts]).view(shape)
        leaks = [only_states_the_answer(p.caption, s.answer, s.problem_type) for s, _, p in flat]
        rewards["leak"] = 0.0 - torch.tensor(leaks).float().view(shape)
    rewards = {name: table.to(m.mask.device) for name, table in rewards.items()}
    return rewards, [replies[i : i + n] for i in range(0, len(replies), n)]


def rewards_as_json(rewards: dict[str, Tensor], i: int) -> dict[str, list[float | None]]:
    """Every reward of prompt i by name. An unknown one is null, because JSON has no NaN."""
    return {
        name: [None if r != r else r for r in table[i].tolist()] for name, table in rewards.items()
    }


def global_counts(micro_batches: list[Rollouts], run: Run) -> dict[str, float]:
    """Responses and response tokens of the global batch: the denominators of the loss."""
    tokens = sum(m.mask.sum() for m in micro_batches)
    sequences = tokens.new_tensor(sum(len(m.mask) for m in micro_batches))
    total = run.all_reduce(torch.stack([sequences, tokens]))
    return dict(zip(("sequences", "tokens"), total.tolist(), strict=True))


def log_rollouts(learner: Learner, micro_batches: list[Rollouts]) -> None:
    """One line of metrics.jsonl, one line of rollouts.jsonl per prompt, and what a user should
    see."""
    numbers: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for m in micro_batches:
        for name, (value, n) in m.numbers.items():
            numbers[name][0] += value
            numbers[name][1] += n
    run, cfg, step = learner.run, learner.cfg, learner.step
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
    if cfg.show_every and (step % cfg.show_every == 0 or step == 1):
        if metrics["truncated"] > cfg.max_truncated:
            run.say(
                f"  warning: {metrics['truncated']:.0%} of responses were cut at --max_new_tokens "
                f"{cfg.max_new_tokens}, before their answer: raise it, or train the cold start "
                "longer"
            )
        if step > 1:
            sample, text = micro_batches[0].samples[0], micro_batches[0].text[0][0]
            run.say(f"  {sample.problem} [{sample.answer}]\n  {text}")
