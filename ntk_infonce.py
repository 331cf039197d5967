"""Conflict-Aware Regularization: Eq. 4, an InfoNCE loss on the cosine of log-prob gradients.

f_i is the gradient of log pi(y_i | x_i) with respect to the final layer (the LM head W), V x d numbers per sample.
It is never formed: for the head, grad_W log pi = sum_t r_t h_t^T with r_t = e_{y_t} - pi_t, so that

    <f_i, f_j> = sum_{t in i, s in j} <r_t, r_s> <h_t, h_s>

is a product of two small Gram matrices, exact, and differentiable by ordinary first-order autograd (D-50).

What Eq. 4 does and does not do (theory, each with a test): it only redistributes similarity within a row; where all
pairs lie on one side of tau it is exactly 0, so tau is a boundary and not a target; and for y_i sampled on-policy
E f_i = 0, which leaves it inert. Hence y_i is the reference answer, teacher-forced (D-51).

Shapes: n samples, N valid tokens of all samples laid flat, V vocabulary, d hidden size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def gradient_cosine(hidden: Tensor, logits: Tensor, targets: Tensor, segment: Tensor, n: int) -> Tensor:
    """cos(f_i, f_j) of the head gradients.   [N, d], [N, V], [N], [N] -> [n, n]

    hidden: what is fed to the LM head (after the final norm) at the position that predicts the target; logits: what
    the head gives there; targets: the token y_t; segment: the sample 0..n-1 that the token belongs to.
    """
    if not (len(hidden) == len(logits) == len(targets) == len(segment)):
        raise ValueError("hidden, logits, targets and segment must have one row per token")
    residual = F.one_hot(targets, logits.shape[-1]).to(logits) - logits.softmax(-1)  # r_t  [N, V]
    member = F.one_hot(segment, n).to(hidden)  # [N, n]
    gram = member.T @ ((residual @ residual.T) * (hidden @ hidden.T)) @ member  # K_ij  [n, n]
    inverse_norm = gram.diagonal().clamp_min(1e-12).rsqrt()
    return inverse_norm[:, None] * gram * inverse_norm[None]


def info_nce(cosine: Tensor, tau: float = 0.54, temperature: float = 1.0) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4:  L = -mean_i log [ sum_{j in P(i)} exp(s_ij / T) / sum_{k != i} exp(s_ik / T) ].   [n, n] -> scalar

    P(i) = {j != i : s_ij <= tau}, the dissimilar ones, are the positives; membership carries no gradient. Anchors
    with no positive or no negative are left out of the mean and counted (D-57); with no anchor left, the loss is 0.
    Statistics: active anchors, share of pairs at or below tau (positive), mean and sd of the off-diagonal cosines.
    """
    n = len(cosine)
    if cosine.shape != (n, n):
        raise ValueError(f"cosine must be square, got shape {tuple(cosine.shape)}")
    if not -1.0 <= tau <= 1.0:
        raise ValueError(f"tau is a cosine and must lie in [-1, 1], got {tau}")
    others = ~torch.eye(n, dtype=torch.bool, device=cosine.device)
    positive = (cosine.detach() <= tau) & others
    active = positive.any(1) & (others & ~positive).any(1)
    # rows that are left out get finite numbers before logsumexp, so that no NaN reaches the backward pass
    scores = cosine / temperature
    numerator = torch.where(positive | ~active[:, None], scores, -torch.inf).logsumexp(1)
    denominator = torch.where(others | ~active[:, None], scores, -torch.inf).logsumexp(1)
    loss = torch.where(active, denominator - numerator, 0.0).sum() / active.sum().clamp_min(1)
    pairs = cosine.detach()[others]
    empty = pairs.numel() == 0
    return loss, {
        "active": active.sum().float(),
        "positive": positive[others].float().mean() if not empty else loss.new_tensor(0.0),
        "cosine_mean": pairs.mean() if not empty else loss.new_tensor(0.0),
        "cosine_sd": pairs.std(correction=0) if not empty else loss.new_tensor(0.0),
    }
