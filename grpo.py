"""Group Relative Policy Optimization: Eq. 1 and Eq. 2 of the paper as pure functions.

Three repairs to Eq. 1 as printed: the surrogate is maximised and the KL minimised (printed with one
sign, departure D-1); the ratio is taken against the sampler pi_old, pi_ref appears only in the KL
(D-2); the mean runs over sequences (D-4). Eq. 2 as printed hides a factor that differs from token
to token (D-70), and its sentence, "positive rewards make the distribution more peaked, negative
rewards flatter", holds for likely tokens only (D-71): the border is `sharpening_threshold`. Nothing
here knows about models, files or ranks.

Shapes: B prompts, G responses per prompt, N = B*G responses grouped by prompt, T response tokens, V
vocabulary.

Worked examples: python -m examples.equations
"""

import torch
import torch.nn.functional as F
from torch import Tensor

KL_KINDS = ("k1", "k2", "k3", "rho_k3")
# largest log-ratio that is exponentiated, D-6: e^60 = 1e26 fits float32 and bfloat16
OVERFLOW = 60.0


def total_reward(components: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """r = sum_c w_c r_c, weights by name (D-13).   dict of [B, G] -> [B, G]

    NaN is "unknown": it takes that component's mean over the group, so that it neither rewards nor
    punishes, and the response keeps its other components (D-15). Where a component is unknown for a
    whole group it adds nothing.
    """
    total = 0.0
    for name, reward in components.items():
        reward = _floating(reward)
        neutral = reward.nanmean(1, keepdim=True).nan_to_num(0.0)
        total = total + weights[name] * torch.where(reward.isnan(), neutral, reward)
    return total


def group_advantages(rewards: Tensor, eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + eps) within each group.   [B, G] -> [B, G]

    The std is the unbiased one (D-5). A group whose rewards are all equal gives exactly 0. NaN =
    unknown: it leaves mean and std, and gets advantage 0.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [B, G] with G > 1, got shape {tuple(rewards.shape)}")
    rewards = _floating(rewards)
    known = ~rewards.isnan()
    count = known.sum(1, keepdim=True)
    mean = torch.where(known, rewards, 0.0).sum(1, keepdim=True) / count.clamp_min(1)
    centred = torch.where(known, rewards - mean, 0.0)
    variance = centred.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)
    most = torch.where(known, rewards, -torch.inf).amax(1, keepdim=True)
    # none or one known: tied as well
    tied = most <= torch.where(known, rewards, torch.inf).amin(1, keepdim=True)
    # set aside before the root, whose gradient at 0 is infinite
    return torch.where(tied, 0.0, centred / (variance.masked_fill(tied, 1.0).sqrt() + eps))


def clipped_surrogate(
    logp: Tensor, old_logp: Tensor, adv: Tensor | float, eps_low=0.2, eps_high=0.2
) -> Tensor:
    """min(rho A, clip(rho, 1 - eps, 1 + eps) A), rho = pi_theta / pi_old.
    [N, T], [N, T], [N] -> [N, T]

    To be maximised. On the first update after sampling rho = 1: the value is A, its gradient is
    REINFORCE's.
    """
    _same_shape(logp=logp, old_logp=old_logp)
    [adv] = _one_each(logp, adv=adv)
    rho = _exp(logp - old_logp)
    adv = adv[:, None]
    return torch.minimum(rho * adv, rho.clamp(1 - eps_low, 1 + eps_high) * adv)


def dead_zone(logp: Tensor, old_logp: Tensor, adv: Tensor, eps_low=0.2, eps_high=0.2) -> Tensor:
    """1 - g: True where the clip cuts the gradient off.   three of one shape -> bool

    One-sided: A > 0 and rho > 1 + eps_high, or A < 0 and rho < 1 - eps_low. A bad token that became
    *likelier* is not among them: its gradient is unbounded.
    """
    rho = _exp(logp - old_logp)
    return ((adv > 0) & (rho > 1 + eps_high)) | ((adv < 0) & (rho < 1 - eps_low))


def kl_penalty(logp: Tensor, ref_logp: Tensor, kind: str = "k3") -> Tensor:
    """D_KL(pi_theta || pi_ref), estimated at the sampled tokens.   [N, T], [N, T] -> [N, T]

    With x = log pi_ref - log pi:   k1 = -x,   k2 = x^2 / 2,   k3 = e^x - x - 1,   rho_k3 = rho k3
    (rho is 1 here, and carries the gradient of pi).
    k3 is never negative. As part of the loss on on-policy samples, the gradients differ: k1 has
    none on average, k2 and rho_k3 follow the reverse KL(pi || pi_ref), and k3 (GRPO's, the default)
    the forward KL(pi_ref || pi).
    """
    _same_shape(logp=logp, ref_logp=ref_logp)
    x = ref_logp - logp
    if kind == "k1":
        return -x
    if kind == "k2":
        return x.square() / 2
    if kind in ("k3", "rho_k3"):
        k3 = torch.expm1(x.clamp(max=OVERFLOW)) - x
        return k3 if kind == "k3" else (logp - logp.detach()).exp() * k3
    raise ValueError(f"kind must be one of {KL_KINDS}, got {kind!r}")


def sequence_weights(
    mask: Tensor, loss_norm: str, sequences: float, tokens: float, max_tokens: int
) -> Tensor:
    """The weight of each token in the loss, so that the loss is one weighted sum.
    [N, T] -> [N, T]

    sequence  1 / (N |y_i|)        Eq. 1: mean over a response's tokens, then over responses
    token     1 / sum_i |y_i|      DAPO: every token counts the same
    constant  1 / (N T_max)        Dr. GRPO: no length normalisation

    sequences and tokens are the counts of the *global* batch: a mean of per-rank or per-micro-batch
    means is another loss when lengths differ.
    """
    if mask.ndim != 2:
        raise ValueError(f"mask must be [N, T], got shape {tuple(mask.shape)}")
    mask, sequences, tokens = mask.to(torch.get_default_dtype()), max(sequences, 1), max(tokens, 1)
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
    mask: Tensor,
    ref_logp: Tensor | None = None,
    beta: float = 0.0,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    kl_kind: str = "k3",
    loss_norm: str = "sequence",
    sequences: float | None = None,
    tokens: float | None = None,
    max_tokens: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 1:  L = sum_it w_it [ -min(rho A, clip(rho) A) + beta KL_it ].
    [N, T] x 2, [N], [N, T] -> scalar

    mask: 1 on the tokens that count, 0 on padding, which may hold anything. w: `sequence_weights`
    of loss_norm and of the global batch's counts, by default those of this mask. At rho = 1 and
    beta = 0 the value is about 0, because advantages sum to 0 in each group, while its gradient is
    not: a loss of 0 does not mean that nothing is learned. Also returns statistics of each token,
    [N, T]: kl (None at beta = 0) and clipped, 1 where the gradient was cut off.
    """
    if beta and ref_logp is None:
        raise ValueError("beta > 0 needs ref_logp, the reference model's log-probs")
    _same_shape(logp=logp, old_logp=old_logp, mask=mask, **({"ref_logp": ref_logp} if beta else {}))
    counts = (
        len(mask) if sequences is None else sequences,
        float(mask.sum()) if tokens is None else tokens,
    )
    weights = sequence_weights(mask, loss_norm, *counts, max_tokens or mask.shape[1])
    # padding may hold anything, even NaN: cleared before the arithmetic, because 0 x NaN is NaN
    real = mask > 0
    logp, old_logp = (torch.where(real, x, 0.0) for x in (logp, old_logp))
    per_token, kl = -clipped_surrogate(logp, old_logp, adv, eps_low, eps_high), None
    if beta:
        kl = kl_penalty(logp, torch.where(real, ref_logp, 0.0), kl_kind)
        per_token = per_token + beta * kl
    loss = (per_token * weights).sum()
    clipped = dead_zone(
        logp.detach(), old_logp, _one_each(logp, adv=adv)[0][:, None], eps_low, eps_high
    )
    return loss, {"kl": None if kl is None else kl.detach(), "clipped": clipped.float()}


def logit_gradient(
    logits: Tensor,
    target: Tensor,
    adv: Tensor | float,
    old_logp: Tensor,
    ref_logp: Tensor | None = None,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    beta: float = 0.0,
) -> Tensor:
    """Eq. 2, exact:  dL/dz = [ -g rho A + beta (1 - pi_ref(y) / pi(y)) ] (e_y - pi).
    [N, V], [N] x 3 -> [N, V]

    L = -min(rho A, clip(rho) A) + beta k3 of one token y at one position with logits z; g = 0 in
    the `dead_zone`. The KL only shifts the advantage, A_eff = g rho A - beta (1 - pi_ref / pi), so
    all that is said of A holds for A_eff. The paper prints -pi_y (1 - pi_y) A for the sampled
    token: with g = 1 and beta = 0 that is this times pi_old(y), another number for every token
    (D-70). On-policy a token of pi_y = 0.001 is pushed with 0.999 A, not with 0.001 A.
    """
    if beta and ref_logp is None:
        raise ValueError("beta > 0 needs ref_logp, the reference model's log-probs")
    if logits.ndim != 2:
        raise ValueError(f"logits must be [N, V], got shape {tuple(logits.shape)}")
    target, adv, old_logp = _one_each(logits, target=target, adv=adv, old_logp=old_logp)
    target = target.long()
    log_pi = logits.log_softmax(-1)
    logp = log_pi.gather(-1, target[:, None])[:, 0]
    g = ~dead_zone(logp, old_logp, adv, eps_low, eps_high)
    strength = torch.where(g, -_exp(logp - old_logp) * adv, 0.0)
    if beta:
        [ref_logp] = _one_each(logits, ref_logp=ref_logp)
        strength = strength + beta * (1 - _exp(ref_logp - logp))
    return strength[:, None] * (F.one_hot(target, logits.shape[-1]) - log_pi.exp())


def entropy_change(probs: Tensor, target: Tensor | int, step: Tensor | float) -> Tensor:
    """dH = -step (s_y - C) + O(step^2), for the logit step dz = step (e_y - pi).
    [..., V], [...], [...] -> [...]

    s_v = pi_v (log pi_v + H) = -dH/dz_v,  C = E_pi[s] >= 0,  step = learning rate x A_eff. In nats.
    The paper's sentence is the case s_y > C. On-policy, E[dH] = -rate Cov(A, s): what sharpens is
    reward on what is likely. A law for the logits of one position; a step of shared parameters
    moves other positions too (Eq. 3).
    """
    s = _minus_entropy_slope(probs)[0]
    target = torch.as_tensor(target, device=probs.device).long()
    shape = torch.broadcast_shapes(probs.shape[:-1], target.shape)
    s_y = s.expand(*shape, -1).gather(-1, target.expand(shape)[..., None])[..., 0]
    return -step * (s_y - (probs * s).sum(-1))


def sharpening_threshold(probs: Tensor) -> Tensor:
    """p* = exp(W(C e^H) - H), the root of p (log p + H) = C: A > 0 sharpens iff pi_y > p*.
    [..., V] -> [...]

    A < 0 flattens iff pi_y > p*. Below p* both halves of the paper's sentence reverse. p* lies
    between 1 / perplexity and max pi: the paper is right on the likeliest token, and wrong on every
    token rarer than 1 / perplexity (D-71). W is Lambert's function, the root w of w e^w = x, here
    by Newton's method.
    """
    s, entropy = _minus_entropy_slope(probs)
    x = (probs * s).sum(-1).clamp_min(0) * entropy.exp()
    w = torch.log1p(x)  # never below the root, and w e^w is convex: Newton descends to it
    for _ in range(8):
        w = w - (w - x * (-w).exp()) / (1 + w)
    return (w - entropy).exp()


def _minus_entropy_slope(probs: Tensor) -> tuple[Tensor, Tensor]:
    """s_v = pi_v (log pi_v + H), and H in nats.   [..., V] -> [..., V], [...]"""
    # 0 log 0 = 0, with a finite gradient
    log = probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
    entropy = -(probs * log).sum(-1)
    return probs * (log + entropy[..., None]), entropy


def _floating(rewards: Tensor) -> Tensor:
    return rewards if rewards.is_floating_point() else rewards.to(torch.get_default_dtype())


def _exp(log_ratio: Tensor) -> Tensor:
    """e^x, bounded where single precision would overflow to inf and its gradient to NaN (D-6)."""
    return log_ratio.clamp(max=OVERFLOW).exp()


def _same_shape(**tensors: Tensor) -> None:
    if len({tuple(t.shape) for t in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"these must have one shape [N, T]: {shapes}")


def _one_each(rows: Tensor, **given: Tensor | float) -> list[Tensor]:
    """Each as [N], one number a row of `rows`; a single number stands for all of them."""
    n = len(rows)
    tensors = {name: torch.as_tensor(x, device=rows.device) for name, x in given.items()}
    for name, t in tensors.items():
        if t.shape not in ((n,), ()):
            raise ValueError(
                f"{name} must hold one number for each of the {n} rows, got shape {tuple(t.shape)}"
            )
    return [t.expand(n) for t in tensors.values()]
