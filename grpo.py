"""Group Relative Policy Optimization: Eq. 1 of the paper as pure functions.

Three repairs to the equation as printed: the surrogate is maximised and the KL minimised (printed with one sign,
departure D-1); the ratio is taken against the sampler pi_old, pi_ref appears only in the KL (D-2); the mean runs
over sequences (D-4). Nothing here knows about models, files or ranks.

Shapes: B prompts, G responses per prompt, N = B*G responses grouped by prompt, T response tokens.
"""

import torch
from torch import Tensor

KL_KINDS = ("k1", "k2", "k3", "rho_k3")


def total_reward(components: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """r = sum_c w_c r_c.   dict of [B, G] -> [B, G]

    NaN is "unknown": it takes that component's mean over the group, so that it neither rewards nor punishes. Where a
    component is unknown for a whole group it adds nothing.
    """
    total = 0.0
    for name, reward in components.items():
        neutral = reward.nanmean(1, keepdim=True).nan_to_num(0.0)
        total = total + weights[name] * torch.where(reward.isnan(), neutral, reward)
    return total


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + eps) within each group.   [B, G] -> [B, G]

    The std is the unbiased one (D-5). A group whose rewards are all equal gives exactly 0. NaN = unknown: it leaves
    mean and std, and gets advantage 0.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [B, G] with G > 1, got shape {tuple(rewards.shape)}")
    known = ~rewards.isnan()
    centred = torch.where(known, rewards - rewards.nanmean(1, keepdim=True), 0.0)
    variance = centred.square().sum(1, keepdim=True) / (known.sum(1, keepdim=True) - 1).clamp_min(1)
    tied = torch.where(known, rewards, -torch.inf).amax(1) == torch.where(known, rewards, torch.inf).amin(1)
    return (centred / (variance.sqrt() + eps)).masked_fill(tied[:, None], 0.0)


def clipped_surrogate(logp: Tensor, old_logp: Tensor, adv: Tensor, eps_low=0.2, eps_high=0.2) -> Tensor:
    """min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = pi_theta / pi_old.   [N, T], [N, T], [N] -> [N, T]

    To be maximised. On the first update after sampling rho = 1: the value is A, its gradient is REINFORCE's.
    """
    rho = (logp - old_logp).exp()
    adv = adv[:, None]
    return torch.minimum(rho * adv, rho.clamp(1 - eps_low, 1 + eps_high) * adv)


def kl_penalty(logp: Tensor, ref_logp: Tensor, kind: str = "k3") -> Tensor:
    """D_KL(pi_theta || pi_ref), estimated at the sampled tokens.   [N, T], [N, T] -> [N, T]

    With x = log pi_ref - log pi:   k1 = -x,   k2 = x^2 / 2,   k3 = e^x - x - 1 (never negative),   rho_k3 = rho k3.
    As part of the loss on on-policy samples, the gradients differ: k1 has none on average, k2 and rho_k3 follow the
    reverse KL(pi || pi_ref), and k3 (GRPO's, the default) the forward KL(pi_ref || pi).
    """
    x = ref_logp - logp
    if kind == "k1":
        return -x
    if kind == "k2":
        return x.square() / 2
    if kind in ("k3", "rho_k3"):
        k3 = torch.expm1(x) - x
        return k3 if kind == "k3" else (logp - logp.detach()).exp() * k3
    raise ValueError(f"kind must be one of {KL_KINDS}, got {kind!r}")


def sequence_weights(mask: Tensor, loss_norm: str, sequences: float, tokens: float, max_tokens: int) -> Tensor:
    """The weight of each token in the loss, so that the loss is one weighted sum.   [N, T] -> [N, T]

    sequence  1 / (N |y_i|)        Eq. 1: mean over a response's tokens, then over responses
    token     1 / sum_i |y_i|      DAPO: every token counts the same
    constant  1 / (N T_max)        Dr. GRPO: no length normalisation

    sequences and tokens are the counts of the *global* batch: a mean of per-rank or per-micro-batch means is another
    loss when lengths differ.
    """
    mask = mask.to(torch.get_default_dtype())
    if loss_norm == "sequence":
        return mask / (mask.sum(1, keepdim=True).clamp_min(1) * sequences)
    if loss_norm == "token":
        return mask / tokens
    if loss_norm == "constant":
        return mask / (sequences * max_tokens)
    raise ValueError(f"loss_norm must be sequence, token or constant, got {loss_norm!r}")


def grpo_loss(
    logp: Tensor,
    old_logp: Tensor,
    adv: Tensor,
    weights: Tensor,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    kl_kind: str = "k3",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 1:  L = sum_it w_it [ -min(rho A, clip(rho) A) + beta KL_it ].   [N, T] x 2, [N], [N, T] -> scalar

    weights: from `sequence_weights`, 0 on padding. At rho = 1 and beta = 0 the value is about 0, because advantages
    sum to 0 in each group, while its gradient is not: a loss of 0 does not mean that nothing is learned.
    Also returns per-token statistics [N, T]: kl (None at beta = 0) and clipped, 1 where the gradient was cut off.
    """
    if beta and ref_logp is None:
        raise ValueError("beta > 0 needs ref_logp, the reference model's log-probs")
    # padding may hold anything, even NaN: cleared before the arithmetic, or its gradient would be 0 * NaN
    logp, old_logp = (torch.where(weights > 0, x, 0.0) for x in (logp, old_logp))
    per_token, kl = -clipped_surrogate(logp, old_logp, adv, eps_low, eps_high), None
    if beta:
        kl = kl_penalty(logp, torch.where(weights > 0, ref_logp, 0.0), kl_kind)
        per_token = per_token + beta * kl
    loss = (per_token * weights).sum()
    rho, sign = (logp - old_logp).detach().exp(), adv[:, None].sign()
    clipped = ((sign > 0) & (rho > 1 + eps_high)) | ((sign < 0) & (rho < 1 - eps_low))
    return loss, {"kl": None if kl is None else kl.detach(), "clipped": clipped.float()}
