"""Reward Variance-Guided Sample Selection: 64 responses per prompt, keep the half whose rewards
disagree most.

GRPO learns from differences inside a group: a prompt whose responses all earn the same teaches
nothing (advantage exactly 0). The paper scores each prompt by the variance of its rewards over 64
responses and keeps the top 50 %. Unstated there, settled here [choice]: the population is every RL
prompt whose responses could be judged, prompts without any variance are dropped first, ties go to
the smaller id, and the three classes are cut at the two constants below.

Shapes: P prompts, R responses. Rewards are [P, R], NaN = unknown (a judge that failed), never 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CLASSES = ("easy", "medium", "hard")  # the paper names them, but no thresholds
LOW_VARIANCE = 0.25  # of the largest possible variance [choice]
HIGH_MEAN = 0.5  # of the largest possible reward [choice]


@dataclass(frozen=True)
class RewardStatistics:
    """Per prompt over its known responses: mean [P], unbiased variance [P], number known [P]."""

    mean: Tensor
    variance: Tensor
    count: Tensor


def reward_statistics(rewards: Tensor) -> RewardStatistics:
    """mean(r) and unbiased Var(r) of each row, NaN left out.   [P, R] -> three [P]

    A row with no known reward has mean NaN; with fewer than two, variance 0: nothing to learn from.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards must be [prompts, responses], got shape {tuple(rewards.shape)}")
    rewards = rewards if rewards.is_floating_point() else rewards.to(torch.get_default_dtype())
    # so that the order of the responses cannot move a tie by round-off
    rewards = rewards.sort(1).values
    known = ~rewards.isnan()
    count = known.sum(1)
    mean = rewards.nanmean(1)
    squares = torch.where(known, rewards - mean[:, None], 0.0).square().sum(1)
    variance = squares / (count - 1).clamp_min(1)
    # round-off is not variance
    tied = (torch.where(known, rewards - mean[:, None], 0.0).abs() < 1e-6).all(1)
    return RewardStatistics(mean, variance.masked_fill(tied | (count < 2), 0.0), count)


def classify(mean: float, variance: float, best: float) -> str:
    """'easy' (high mean, low variance), 'hard' (low mean, low variance) or 'medium' (high
    variance).

    best: the largest reward a response can earn; in [0, best] a population variance is at most
    best^2 / 4.
    """
    if variance > LOW_VARIANCE * best**2 / 4:
        return "medium"
    return "easy" if mean >= HIGH_MEAN * best else "hard"


def share_of(prompts: int, keep: float) -> int:
    """The share `keep` of so many prompts, rounded up."""
    return math.ceil(keep * prompts - 1e-9)


def select_top_variance(
    ids: list[str], variance: Tensor, keep: float = 0.5, within: list[str] | None = None
) -> list[str]:
    """The ids of the top `keep` share by variance, in descending order.   P ids, [P] -> at most
    ceil(keep * P) ids

    Zero-variance prompts are dropped first, so fewer may come back. Independent of the order of the
    rows. within: the kind of each prompt; then it is the top share of each kind [choice]. By
    variance alone (the paper's rule) a kind of question on which all responses agree is never
    trained.
    """
    kinds = [""] * len(ids) if within is None else within
    if not len(ids) == len(variance) == len(kinds):
        raise ValueError(f"{len(ids)} ids but {len(variance)} variances and {len(kinds)} kinds")
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"keep must lie in (0, 1], got {keep}")
    kept: list[tuple[float, str]] = []
    for kind in set(kinds):
        rows = zip(variance.tolist(), ids, kinds, strict=True)
        of_kind = [(v, i) for v, i, k in rows if k == kind]
        ranked = sorted((-v, i) for v, i in of_kind if v > 0)
        kept += ranked[: share_of(len(of_kind), keep)]
    return [i for _, i in sorted(kept)]
