"""Conflict-Aware Regularization: Eq. 3, how one sample's update moves another, and Eq. 4, an
InfoNCE loss on the cosine of their log-prob gradients.

f_i is the gradient of log pi(y_i | x_i) with respect to the final layer (the LM head W), V x d
numbers per sample. It is never formed: for the head, grad_W log pi = sum_t r_t h_t^T with r_t =
e_{y_t} - pi_t, so that

    <f_i, f_j> = sum_{t in i, s in j} <r_t, r_s> <h_t, h_s>

is a product of two small Gram matrices, exact, and differentiable by ordinary first-order autograd
(D-50).

What Eq. 4 does and does not do (each with a test): it only redistributes similarity within a row;
where all pairs lie on one side of tau it is exactly 0, so tau is a border and no balanced range
(D-73); and for y_i sampled on-policy E f_i = 0, so the cosines scatter about 0 whatever the prompts
are, and it is inert or follows chance. Hence y_i is the reference answer, teacher-forced (D-51);
see `FEATURES`. `bench/claims.py` measures all of them on a policy.

Shapes: n samples, N valid tokens of all samples laid flat, V vocabulary, d hidden size.

Worked examples: python -m examples.equations
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.utils.checkpoint import checkpoint

FEATURES = {  # which y_i (D-51)
    "reference": "the reference answer, teacher-forced right after the prompt",
    "own_prefix": "the reference answer, after the other stages of the prompt's first response",
    "best": "the response with the highest reward",
    "advantage": "all responses, weighted with their advantages: the policy gradient's direction",
    "greedy": "a greedy response",
    "hidden_mean": "no y: the prompt's mean hidden state, which is no gradient (official code)",
}
OF_ALL_RESPONSES = ("best", "advantage")
# two cosines of single precision that are nearer than this may stand in either order
ROUNDING = 1e-5


# --- Eq. 3 ----------------------------------------------------------------------------------------


def empirical_ntk(model: nn.Module, observed: Tensor, updated: Tensor) -> Tensor:
    """K(x_o, x_u) = J_o J_u^T,  J = dz/dtheta of the logits, one row per position and token.
    -> [M, V, L, V]

    model maps x_o to logits [M, V] and x_u to logits [L, V]. All J are held: for small models. The
    paper prints grad z^T grad z, which is this only if the gradient is stored parameters first
    (D-72).
    """
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("model has no parameter that is trained: its K is 0")

    def jacobian(x: Tensor) -> dict[str, Tensor]:
        return jacrev(lambda p: functional_call(model, p, (x,)))(parameters)

    j_o, j_u = jacobian(observed), jacobian(updated)
    flat = [[j[name].reshape(*j[name].shape[:2], -1) for j in (j_o, j_u)] for name in parameters]
    return sum(torch.einsum("mvp,lwp->mvlw", a, b) for a, b in flat)


def learning_dynamics(
    model: nn.Module,
    observed: Tensor,
    updated: Tensor,
    targets: Tensor,
    adv: Tensor | float,
    lr: float,
) -> Tensor:
    """Eq. 3:  Delta log pi(.|x_o) = lr softmax_jac(x_o) K(x_o, x_u) (e_y - pi(.|x_u)) A +
    O(lr^2).   -> [M, V]

    What one SGD step of size lr on L = -sum_l A_l log pi(y_l | x_u) does to every token at every
    position of x_o. targets [L]; adv [L] or a number: A_eff of each position, with 1 / |y|, the
    ratio, the clip and the KL folded in (`grpo.logit_gradient`). softmax_jac = I - 1 pi^T (the
    paper's calligraphic A, not the advantage). A sequence sums over its positions l; the printed
    form is a single one (D-72). AdamW moves otherwise: its step is preconditioned. To first order
    this is lr A <grad log pi(.|x_o), grad log pi(y|x_u)>: the inner product whose cosine, without A
    and for the head only, is Eq. 4's similarity.
    """
    with torch.no_grad():
        pi_o, pi_u = model(observed).softmax(-1), model(updated).softmax(-1)
    adv = torch.as_tensor(adv).to(pi_u)
    for name, x in {"targets": targets, "adv": adv}.items():
        if x.shape != pi_u.shape[:1] and not (name == "adv" and x.ndim == 0):
            raise ValueError(
                f"{name} must hold one number for each of the {len(pi_u)} positions, got "
                f"{tuple(x.shape)}"
            )
    force = adv.expand(len(pi_u))[:, None] * (F.one_hot(targets.long(), pi_u.shape[1]) - pi_u)
    dz = torch.einsum("mvlw,lw->mv", empirical_ntk(model, observed, updated), force)
    return lr * (dz - (pi_o * dz).sum(-1, keepdim=True))


# --- f_i and their cosines ------------------------------------------------------------------------


def feature_weights(choice: str, mask: Tensor, adv: Tensor, own_mask: Tensor) -> Tensor:
    """w of f_i = sum_gt w_igt grad_W log pi(y_igt | x_i), for a choice of y_i in FEATURES.
    [B, G, T], [B, G], [B, T] -> [B, G + 1, T]

    mask: the tokens of the G responses. own_mask: those of a y_i that is none of them (the
    reference answer or the greedy response), which gets the last weights. f is linear in h, so
    `gradient_cosine` of w h in place of h gives the weighted gradient; the chunked form takes w as
    `scale`. The first of equally good responses is `best`. A tied group has no `advantage` feature:
    all its weights are 0.
    """
    choices = [name for name in FEATURES if name != "hidden_mean"]
    if choice not in choices:
        raise ValueError(f"choice must be one of {', '.join(choices)}, got {choice!r}")
    fits = mask.ndim == 3 and mask.shape[:2] == adv.shape and mask.shape[1] > 0
    if not fits or own_mask.shape != mask.shape[::2]:
        raise ValueError(
            f"mask [B, G, T] {tuple(mask.shape)}, adv [B, G] {tuple(adv.shape)} and "
            f"own_mask [B, T] {tuple(own_mask.shape)} do not fit together, or G is 0"
        )
    # of the *mean* log-prob of a response
    per_token = mask / mask.sum(-1, keepdim=True).clamp_min(1)
    weights, own = torch.zeros_like(per_token), torch.zeros_like(per_token[:, 0])
    if choice == "best":
        best = adv.argmax(1)[:, None, None].expand(-1, 1, mask.shape[2])
        weights = weights.scatter(1, best, per_token.gather(1, best))
    elif choice == "advantage":
        weights = adv[..., None] * per_token
    else:
        own = own_mask / own_mask.sum(-1, keepdim=True).clamp_min(1)
    return torch.cat([weights, own[:, None].to(weights)], 1)


def gradient_cosine(
    hidden: Tensor, logits: Tensor, targets: Tensor, segment: Tensor, n: int
) -> Tensor:
    """cos(f_i, f_j) of the head gradients.   [N, d], [N, V], [N], [N] -> [n, n]

    hidden: what is fed to the LM head (after the final norm) at the position that predicts the
    target; logits: what the head gives there; targets: the token y_t; segment: the sample 0..n-1
    that the token belongs to. A sample without tokens, or so certain of them that f_i is 0 in this
    precision, has cosine 0 with all, and no gradient. With tied embeddings this is the head's part
    of the gradient. Cost N^2 (V + d), memory N V: see the chunked form.
    """
    _check_tokens(hidden, logits, targets, segment, n)
    residual = _residual(logits, targets)
    return _normalised(residual @ residual.T, hidden, segment, n)


def gradient_cosine_chunked(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    segment: Tensor,
    n: int,
    bias: Tensor | None = None,
    chunk: int = 8192,
    scale: Tensor | None = None,
) -> Tensor:
    """`gradient_cosine` from the head itself, weight [V, d], without ever holding [N, V].
    -> [n, n]

    <r_t, r_s> is a sum over the vocabulary: it is taken `chunk` tokens at a time, and each chunk's
    logits are computed again in backward. bias [V]: added to the logits, for instance -inf at
    tokens that cannot be sampled. scale [N]: the weights of the tokens in f_i (`feature_weights`),
    by default 1. Peak memory N (N + chunk) instead of N V; the head runs twice in forward
    (log-sum-exp first) and twice in backward.
    """
    _check_tokens(hidden, None, targets, segment, n, len(weight))
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    wide, targets = torch.promote_types(hidden.dtype, torch.float32), targets.long()
    bias = (
        hidden.new_zeros(len(weight), dtype=wide)
        if bias is None
        else bias.to(wide).clamp_min(torch.finfo(wide).min)
    )
    chunks = list(zip(weight.split(chunk), bias.split(chunk), range(0, len(weight), chunk)))

    def logits(h: Tensor, w: Tensor, b: Tensor, first: int) -> tuple[Tensor, Tensor]:
        return h @ w.T + b, (targets - first)[:, None] == torch.arange(len(w), device=h.device)

    def log_others(h: Tensor, w: Tensor, b: Tensor, first: int) -> Tensor:
        z, hit = logits(h, w, b, first)
        return z.masked_fill(hit, torch.finfo(wide).min).logsumexp(-1)

    def gram(h: Tensor, w: Tensor, b: Tensor, norm: Tensor, rest: Tensor, first: int) -> Tensor:
        z, hit = logits(h, w, b, first)
        r = torch.where(hit, rest[:, None], -(z - norm[:, None]).exp())
        return r @ r.T

    others = torch.stack(
        [checkpoint(log_others, hidden, *part, use_reentrant=False) for part in chunks]
    ).logsumexp(0)
    norm = torch.logaddexp(others, (hidden * weight[targets]).sum(-1) + bias[targets])
    rest = (others - norm).exp()  # 1 - pi_y
    grams = (  # one at a time
        checkpoint(gram, hidden, w, b, norm, rest, first, use_reentrant=False)
        for w, b, first in chunks
    )
    return _normalised(sum(grams), hidden if scale is None else hidden * scale[:, None], segment, n)


def tensor_sketch(
    hidden: Tensor,
    logits: Tensor,
    targets: Tensor,
    segment: Tensor,
    n: int,
    m: int = 4096,
    seed: int = 0,
) -> Tensor:
    """Sketches with E<sketch_i, sketch_j> = <f_i, f_j>.   [N, d], [N, V], [N], [N] -> [n, m]

    The circular convolution of a count sketch of r_t with one of h_t (Pham and Pagh 2013), summed
    over a sample's tokens: m numbers instead of V d, small enough to send between processes. Linear
    in r and h, so gradients flow. The error of a cosine has standard deviation about 1 / sqrt(m) to
    1.4 / sqrt(m). The hash comes from `seed` and not from the device or the rank: give every
    process the same, and every step another. A sample without tokens has sketch 0.
    """
    _check_tokens(hidden, logits, targets, segment, n)
    if m < 1:
        raise ValueError(f"m must be at least 1, got {m}")
    if not len(hidden):  # some FFT libraries refuse a table of no rows
        return _wide(hidden).new_zeros(n, m)
    generator = torch.Generator().manual_seed(seed)

    def spectrum(x: Tensor) -> Tensor:
        bucket = torch.randint(m, x.shape[1:], generator=generator).to(x.device)
        sign = 2 * torch.randint(2, x.shape[1:], generator=generator).to(x) - 1
        return torch.fft.rfft(x.new_zeros(len(x), m).index_add(1, bucket, x * sign))

    product = spectrum(_residual(logits, targets)) * spectrum(_wide(hidden))
    return torch.fft.irfft(
        product.new_zeros(n, product.shape[1]).index_add(0, segment.long(), product), n=m
    )


def hidden_mean(hidden: Tensor, segment: Tensor, n: int) -> Tensor:
    """The mean hidden states, the official code's stand-in for f_i (D-50).   [N, d], [N] -> [n, d]

    No log-prob and no gradient is in it, and on measured models its cosine does not follow that of
    Eq. 4.
    """
    _check_tokens(hidden, None, segment, segment, n)
    hidden, segment = _wide(hidden), segment.long()
    total = hidden.new_zeros(n, hidden.shape[1]).index_add(0, segment, hidden)
    return total / segment.bincount(minlength=n).clamp_min(1)[:, None]


def cosine(features: Tensor) -> Tensor:
    """cos(f_i, f_j) of features that are one vector each (`tensor_sketch`, `hidden_mean`).
    [n, m] -> [n, n]"""
    unit = F.normalize(features)
    return unit @ unit.T


def _wide(x: Tensor) -> Tensor:
    """At least single precision: sums of many products, and FFT knows no half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _residual(logits: Tensor, targets: Tensor) -> Tensor:
    """r_t = e_{y_t} - pi_t.   [N, V], [N] -> [N, V]

    1 - pi_y is summed from the other tokens: as a difference it would be round-off where the model
    is certain.
    """
    pi = _wide(logits).softmax(-1)
    hit = F.one_hot(targets.long(), logits.shape[-1]).bool()
    others = pi.masked_fill(hit, 0.0)
    return torch.where(hit, others.sum(-1, keepdim=True), -others)


def _normalised(residual_gram: Tensor, hidden: Tensor, segment: Tensor, n: int) -> Tensor:
    """K_ij / sqrt(K_ii K_jj),  K_ij = sum_{t in i, s in j} <r_t, r_s> <h_t, h_s>.
    [N, N], [N, d] -> [n, n]"""
    # [N, n]
    member = (segment[:, None] == torch.arange(n, device=segment.device)).to(residual_gram)
    hidden = hidden.to(residual_gram)
    gram = member.T @ (residual_gram * (hidden @ hidden.T)) @ member
    square = gram.diagonal()
    # about to underflow: no direction is left
    zero = square <= torch.finfo(square.dtype).tiny ** 0.5
    inverse_norm = torch.where(zero, 0.0, square.masked_fill(zero, 1.0).rsqrt())
    return inverse_norm[:, None] * gram * inverse_norm[None]


def _check_tokens(
    hidden: Tensor,
    logits: Tensor | None,
    targets: Tensor,
    segment: Tensor,
    n: int,
    vocabulary: int | None = None,
) -> None:
    tables = {"hidden": hidden} | ({} if logits is None else {"logits": logits})
    flat = {"targets": targets, "segment": segment}
    for name, t in (tables | flat).items():
        if t.ndim != (2 if name in tables else 1) or len(t) != len(segment):
            raise ValueError(
                f"{name} must have one row per token, {len(segment)} here, got shape "
                f"{tuple(t.shape)}"
            )
    if len(segment) and not 0 <= int(segment.min()) <= int(segment.max()) < n:
        raise ValueError(
            f"segment must hold sample numbers 0..{n - 1}, got "
            f"{int(segment.min())}..{int(segment.max())}"
        )
    v = logits.shape[1] if logits is not None else vocabulary
    if v and len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < v:
        raise ValueError(
            f"targets must be tokens 0..{v - 1}, got {int(targets.min())}..{int(targets.max())}"
        )


# --- Eq. 4 ----------------------------------------------------------------------------------------


def info_nce(
    cosine: Tensor, tau: float = 0.54, temperature: float = 1.0, order: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Eq. 4:  L = -mean_i log [ sum_{j in P(i)} exp(s_ij / T) / sum_{k != i} exp(s_ik / T) ].
    [n, n] -> scalar

    P(i) = {j != i : s_ij <= tau}, the dissimilar ones, are the positives; membership carries no
    gradient. Every sample is an anchor (D-52); those with no positive or no negative are left out
    of the mean and counted (D-57); with no anchor left, the loss is 0. Its gradient, dL_i/ds_ik =
    (q_k - p_k) / T with q the softmax over all k and p that over P(i), sums to 0 in a row:
    positives are pulled up and negatives pushed down, but only against each other. The paper's
    "balanced range" is not in it: pairs leave for one side of tau, where the loss is 0 (D-73).
    order: a permutation [n] for a control: membership comes from s of (order[i], order[j]), so as
    many pairs are positive, but other ones.
    Statistics: active anchors, number of ordered pairs, share of them at or below tau (positive),
    mean and sd of their cosines.
    """
    n = len(cosine)
    if cosine.shape != (n, n):
        raise ValueError(f"cosine must be square, got shape {tuple(cosine.shape)}")
    if not -1.0 <= tau <= 1.0:
        raise ValueError(f"tau is a cosine and must lie in [-1, 1], got {tau}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    others = ~torch.eye(n, dtype=torch.bool, device=cosine.device)
    # clamped: rounding takes duplicates beyond 1
    decides = cosine.detach() if order is None else cosine.detach()[order][:, order]
    positive = (decides.clamp(-1, 1) <= tau) & others
    active = positive.any(1) & (others & ~positive).any(1)
    # rows that are left out get finite numbers before logsumexp, so that no NaN reaches the
    # backward pass
    scores = cosine / temperature
    numerator = torch.where(positive | ~active[:, None], scores, -torch.inf).logsumexp(1)
    denominator = torch.where(others | ~active[:, None], scores, -torch.inf).logsumexp(1)
    loss = torch.where(active, denominator - numerator, 0.0).sum() / active.sum().clamp_min(1)
    pairs = cosine.detach()[others]
    empty = pairs.numel() == 0
    return loss, {
        "active": active.sum().float(),
        "pairs": others.sum().float(),
        "positive": positive[others].float().mean() if not empty else loss.new_tensor(0.0),
        "cosine_mean": pairs.mean() if not empty else loss.new_tensor(0.0),
        "cosine_sd": pairs.std(correction=0) if not empty else loss.new_tensor(0.0),
    }


def quantile_tau(cosine: Tensor, quantile: float) -> float:
    """A tau that splits this batch's pairs at the quantile of their cosines.   [n, n] -> number

    With tau fixed, a feature whose cosines all lie on one side of it leaves Eq. 4 inert; a quantile
    moves with them. tau is the middle of the gap between two cosines, the one nearest to the
    quantile among those wider than `ROUNDING`: were it on a cosine, rounding would decide on which
    side that pair stands, and with it much of the gradient. 1, with no pair above it, where there
    is no such gap.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile must lie in [0, 1], got {quantile}")
    row, column = torch.triu_indices(*cosine.shape, offset=1, device=cosine.device)
    pairs = cosine.detach()[row, column].sort().values  # each pair once
    gaps = pairs.diff()
    below = torch.arange(1, len(gaps) + 1, device=pairs.device)  # pairs under each gap
    distance = (below - quantile * len(pairs)).abs().masked_fill(gaps <= ROUNDING, torch.inf)
    if not distance.isfinite().any():
        return 1.0
    k = int(distance.argmin())
    return ((pairs[k] + pairs[k + 1]) / 2).clamp(-1, 1).item()
