"""The exact reformulations: the prompt of a vision-language model is long, its responses are short
and share it.

Scoring puts all responses of a prompt in one row [prompt | y_1 | ... | y_K], where each branch sees
the prompt and its own past (`branch_mask`). Generation holds the prompt's keys and values once for
all its responses (`BranchCache`). The LM head runs on response tokens only, in chunks (`log_prob`),
and one random number draws a token (`TokenSampler`).

Shapes: B prompts, K branches per prompt, P prompt tokens (left-padded), T response tokens, V
vocabulary.
"""

import math
import random
from collections import defaultdict
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, LogitsProcessor
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUP = 2  # tokens of branches that attend together, as a multiple of the prompt's


def log_prob(hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor, chunk: int | None = None):
    """log pi(y_t) and the entropy H_t of pi_t = softmax(W h_t + b).
    [N, d], [V, d], [N], [V] -> [N], [N]

    The logits [N, V] are by far the largest tensor of a step, so they never exist: the head runs on
    chunk / V tokens at a time, and again in backward, where d log pi(y) / dz = e_y - pi. bias: no
    gradient (`VLM.bias`). The entropy carries none either. Half precision is widened before the
    softmax. chunk: numbers in a chunk; by default what suited a CPU's caches best, and on a GPU
    more, so that it is kept busy and a half-precision gradient of W has few summands.
    """
    chunk = chunk or (2**22 if hidden.device.type == "cpu" else 2**26)
    return _LogProb.apply(hidden, weight, ids, bias, max(1, chunk // len(weight)))


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, bias, rows):
        logp, entropy = [], []
        for h, y in zip(hidden.split(rows), ids.split(rows)):
            z = at_least_float32(h @ weight.T).add_(bias)
            z.sub_(z.amax(-1, keepdim=True))
            # no exp: MKL's is up to 50 times slower where it underflows, as at every banned token
            pi = z.softmax(-1)
            total = pi.sum(-1)  # not 1: on a CPU softmax adds up a large vocabulary inexactly
            log_norm = (total / pi.amax(-1)).log()
            logp.append(z.gather(-1, y[:, None])[:, 0] - log_norm)
            entropy.append(log_norm - pi.mul_(z).sum(-1) / total)
        ctx.save_for_backward(hidden, weight, ids, bias)
        ctx.rows = rows
        entropy = torch.cat(entropy)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logp), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, ids, bias = ctx.saved_tensors
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if to_hidden else None
        d_weight = torch.zeros_like(weight) if to_weight else None
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            h, g = hidden[part], grad[part, None]
            residual = at_least_float32(h @ weight.T).add_(bias).softmax(-1)
            residual.mul_(-g / residual.sum(-1, keepdim=True)).scatter_add_(-1, ids[part, None], g)
            residual = residual.to(hidden.dtype)
            if to_hidden:
                d_hidden[part] = residual @ weight
            if to_weight:
                d_weight.addmm_(residual.T, h)
        return d_hidden, d_weight, None, None, None


def uniform_numbers(names: list[str], n: int, length: int, when: str) -> Tensor:
    """Uniform random numbers [B, n, T], one for each token of n completions per prompt.

    They depend on `when` (seed, update) and the prompt's name only, not on batch, process or
    device. Nor do the completions, up to rounding.
    """
    numbers = torch.empty(len(names), n, length, dtype=torch.float64)
    for table, name in zip(numbers, names):
        stream = torch.Generator().manual_seed(random.Random(f"{when}/{name}").randrange(2**63))
        torch.rand(n, length, generator=stream, out=table)
    return numbers


class TokenSampler(LogitsProcessor):
    """Chooses the next token itself, at T = 1 from all of softmax(scores + bias) or greedily, and
    leaves `generate` no other choice. A row that has ended gets end tokens. warpers: those of
    transformers, for another temperature or a nucleus."""

    def __init__(
        self, bias: Tensor, end: int, ended: Tensor, draws: Tensor | None, warpers: list = ()
    ):
        self.warpers = warpers
        self.bias, self.end, self.ended = bias, end, ended[:, None]
        self.draws = None if draws is None else iter(draws.split(1, 1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.choose(scores, None if self.draws is None else next(self.draws))
        # in bytes, because `generate` looks for the largest
        choice = torch.zeros_like(scores, dtype=torch.uint8)
        return choice.scatter_(-1, token.masked_fill(self.ended, self.end), 1)

    def choose(self, scores: Tensor, u: Tensor | None) -> Tensor:
        """[N, V], which it may change, and uniform numbers [N, 1] -> tokens [N, 1]"""
        scores += self.bias
        for warper in self.warpers:
            scores = warper(None, scores)
        return scores.argmax(-1, keepdim=True) if u is None else inverse_cdf(scores, u)


def inverse_cdf(scores: Tensor, u: Tensor, block: int = 128) -> Tensor:
    """The token at which the cumulative distribution of softmax(scores) passes u.
    [N, V], [N, 1] -> [N, 1]

    One number a row, where `torch.multinomial` draws one for each token of the vocabulary and on a
    CPU took longer than the model (39 % of generation with 32,768 tokens). In two steps, block of
    the vocabulary and token in it, so that only few sums are in double precision; in single the
    tail of a vocabulary would be lost.
    """
    weights = at_least_float32(scores).softmax(-1)
    if rest := -weights.shape[1] % block:
        weights = F.pad(weights, (0, rest))
    blocks = weights.unflatten(1, (weights.shape[1] // block, block))
    mass = blocks.sum(-1).double()
    edges = mass.cumsum(-1)
    passed = u * edges[:, -1:]
    # right: never a block or token without probability
    which = torch.searchsorted(edges, passed, right=True)
    share = (passed - (edges - mass).gather(1, which)) / mass.gather(1, which)
    inside = blocks.gather(1, which[..., None].expand(-1, -1, block))[:, 0].double().cumsum(-1)
    within = torch.searchsorted(inside, share.clamp(0, 1 - 2**-40) * inside[:, -1:], right=True)
    return which * block + within


def branch_mask(
    prompt_mask: Tensor,
    lengths: list[int],
    dtype: torch.dtype,
    attention: str,
    prefix: "Prefix | None" = None,
):
    """What a token of a row [prompt | branches] may see: the prompt, and its own branch's past.

    lengths: the tokens of each branch; L = P + sum(lengths). An additive mask [B, 1, L, L], 0 or
    the lowest number; flex attention gets blocks, and `branch_attention` gets `Branches`, because
    this mask grows with the square of the branches' number. prefix: where rows are the prompt
    alone, or branches behind one that has run.
    """
    (b, p), device = prompt_mask.shape, prompt_mask.device
    length = p + sum(lengths)
    # place L, behind the row, is a branch of its own: it pads groups, and nothing else sees it
    branch = torch.arange(len(lengths) + 2, device=device).repeat_interleave(
        torch.tensor([p, *lengths, 1], device=device)
    )
    valid = F.pad(prompt_mask.bool(), (0, length + 1 - p), value=True)

    def may_see(row, _head, q, k):
        same = (branch[k] == 0) | (branch[k] == branch[q])
        return (same & (k <= q) & valid[row, k]) | (k == q)  # padding sees itself: no NaN

    def additive(q: Tensor, k: Tensor) -> Tensor:  # [n, Q], [n, K] -> [B * n, 1, Q, K]
        row = torch.arange(b, device=device)[:, None, None, None]
        see = may_see(row, None, q[..., None], k[:, None]).flatten(0, 1)[:, None]
        return torch.zeros(see.shape, dtype=dtype, device=device).masked_fill(
            ~see, torch.finfo(dtype).min
        )

    if attention == "flex_attention":
        return create_block_mask(may_see, b, None, length, length, device=device)
    at = torch.arange(length, device=device)[None]
    if attention != "shared_prefix" or length == p and prefix is None:
        return additive(at, at)
    of_prompt = at[:, :p]
    has_run = prefix is not None and length > p
    prompt = None if has_run or prompt_mask.all() else additive(of_prompt, of_prompt)
    if length == p:
        return Branches(prompt, None, at[:0], at[0, :0], prefix)
    n = math.ceil((length - p) / (GROUP * p))
    groups = defaultdict(list)
    for size, stop in zip(lengths, accumulate(lengths)):
        if size:  # where its middle lies
            groups[n * (2 * stop - size) // (2 * (length - p))] += range(p + stop - size, p + stop)
    place = pad_sequence(
        [torch.tensor(group, device=device) for group in groups.values()],
        batch_first=True,
        padding_value=length,
    )
    return Branches(
        prompt,
        additive(place, torch.cat([of_prompt.expand(len(place), -1), place], 1)),
        place.clamp_max(length - 1) - p,
        (place.flatten() < length).nonzero()[:, 0],
        prefix,
    )


class Prefix:
    """Prompts that have run once, for branches that follow in several passes, each with its own
    backward. Their gradients with respect to the prompts' keys, values and hidden states [B, P, d]
    add up here, and `backward` sends the sum through the prompts: the gradient of one pass, with
    the activations of a few branches at a time (arXiv 2606.01143)."""

    def __init__(self):
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # by number, as the prompts' pass finds

    def cut(self, hidden: Tensor) -> None:
        """The prompts' pass is over: from here on leaves stand for what it found."""
        self.roots = [hidden, *(x for pair in self.layers.values() for x in pair)]
        leaves = [x.detach().requires_grad_(x.requires_grad) for x in self.roots]
        self.hidden, pairs = leaves[0], zip(leaves[1::2], leaves[2::2])
        self.layers = dict(zip(self.layers, pairs))
        self.leaves = leaves

    def backward(self) -> None:
        found = [
            (x, leaf.grad) for x, leaf in zip(self.roots, self.leaves) if leaf.grad is not None
        ]
        torch.autograd.backward(*map(list, zip(*found)))


class Branches(NamedTuple):
    """The branches of a row in n groups of about S = 2 P tokens, for `branch_attention`: time and
    masks grow with the number of branches and not with its square. Each group has a copy of its
    prompt's keys and values, hence groups and not single branches.

    prompt [B, 1, P, P]: the prompt's additive mask, None where plain causal attention is enough.
    own [B * n, 1, S, P + S]: the groups'. place [n, S]: where their tokens stand behind the prompt.
    back [L - P]: which of the n * S each token behind the prompt is. prefix: takes the prompt's
    keys and values, or has them; neither tuple nor mapping, in which FSDP2 would look for tensors.
    """

    prompt: Tensor | None
    own: Tensor | None
    place: Tensor
    back: Tensor
    prefix: Prefix | None = None


def branch_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, scaling: float, **kwargs
):
    """SDPA that knows which tokens share a prompt. Registered with transformers as
    "shared_prefix"."""
    if hasattr(key, "branches"):  # a new token in every completion
        out = decode_attention(at_least_float32(query) * scaling, key, value)
        return out[:, None].to(query.dtype), None
    if not isinstance(mask, Branches):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    p, n = key.shape[2] - len(mask.back), len(mask.place)  # p = 0: the prompt has run

    def attend(*parts: Tensor) -> Tensor:
        return sdpa_attention_forward(module, *parts, scaling=scaling, **kwargs)[0]

    def group(x: Tensor, of_prompt: Tensor | None = None) -> Tensor:
        """[B, h, L, d] -> [B * n, h, (P +) S, d]"""
        own = x[:, :, p:]
        if n == 1:
            if of_prompt is None:
                return own
            return x if p else torch.cat([of_prompt, own], 2)
        own = own[:, :, mask.place].transpose(1, 2)
        if of_prompt is not None:
            own = torch.cat([of_prompt[:, None].expand(-1, n, -1, -1, -1), own], 3)
        return own.flatten(0, 1)

    if p:  # it sees no branch
        k, v = key[:, :, :p], value[:, :, :p]
        before = attend(query[:, :, :p], k, v, mask.prompt)
        if not n:
            # under gradient checkpointing this runs again in backward
            mask.prefix.layers.setdefault(module.layer_idx, (k, v))
            return before, None
    else:
        k, v = mask.prefix.layers[module.layer_idx]
    own = attend(group(query), group(key, k), group(value, v), mask.own)
    own = own.unflatten(0, (-1, n)).flatten(1, 2)[:, mask.back]  # [B, L - P, H, d]
    return torch.cat([before, own], 1) if p else own, None


class BranchCache(DynamicLayer):
    """The cache of one layer: the prompts' keys and values once, and room for those of n
    completions of each, which are written in place where the plain layer copies all there is at
    every token. at [1]: the place of the next token, where every step has one shape."""

    is_croppable = False

    def __init__(
        self, prompt: DynamicLayer, valid: Tensor, n: int, room: int, at: Tensor | None = None
    ):
        super().__init__()
        # wide: scores in half precision would be off by percents, and the distribution sampled not
        # the one scored
        self.prompt = (at_least_float32(prompt.keys), at_least_float32(prompt.values))
        self.filled, self.at = 0, at
        self.is_initialized = True
        b, heads, self.before, d = prompt.keys.shape
        # half of the memory, widened as they are read; but steps of one shape read all of the room
        dtype = prompt.keys.dtype if at is None else self.prompt[0].dtype
        self.keys, self.values = (
            x.new_zeros(b * n, heads, room, d, dtype=dtype) for x in self.prompt
        )
        hidden = valid[:, None, None] == 0
        self.hidden = hidden if hidden.any() else None  # the padding [B, 1, 1, P]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        if self.at is None:
            end = self.filled + key_states.shape[-2]
            self.keys[..., self.filled : end, :] = key_states
            self.values[..., self.filled : end, :] = value_states
            self.filled = end
        else:
            end = None
            self.keys.index_copy_(2, self.at, key_states.to(self.keys.dtype))
            self.values.index_copy_(2, self.at, value_states.to(self.values.dtype))
        keys = self.keys[..., :end, :]
        keys.branches = self  # what `branch_attention` needs beside them
        return keys, self.values[..., :end, :]

    def get_seq_length(self) -> int:
        return self.before + self.filled

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


def decode_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax([q k_prompt^T, q k_own^T]) [v_prompt; v_own].

    [B n, H, 1, d], [B n, h, T, d], [B n, h, T, d] -> [B n, H, d]. All completions of a prompt read
    its keys and values together, as one matrix product.
    """
    (k, v), hidden = key.branches.prompt, key.branches.hidden
    b, h, p, d = k.shape
    rows, heads = query.shape[:2]
    n, group = rows // b, heads // h  # completions per prompt; query heads per key head
    query = query.view(rows, h, group, d)

    def by_prompt(x: Tensor) -> Tensor:  # [B n, h, group, .] -> [B, h, n group, .]
        return x.view(b, n, h, group, -1).transpose(1, 2).reshape(b, h, n * group, -1)

    def by_completion(x: Tensor) -> Tensor:
        return x.view(b, h, n, group, -1).transpose(1, 2).reshape(rows, h, group, -1)

    shared = by_prompt(query) @ k.mT
    if hidden is not None:
        shared = shared.masked_fill(hidden, torch.finfo(shared.dtype).min)
    own = query @ at_least_float32(key).mT
    if (at := key.branches.at) is not None:
        to_come = torch.arange(own.shape[-1], device=own.device) > at
        own = own.masked_fill(to_come, torch.finfo(own.dtype).min)
    weights = torch.cat([shared, by_prompt(own)], -1).softmax(-1)
    own = by_completion(weights[..., p:]) @ at_least_float32(value)
    out = by_completion(weights[..., :p] @ v) + own
    return out.reshape(rows, heads, d)


AttentionInterface.register("shared_prefix", branch_attention)
AttentionMaskInterface.register("shared_prefix", sdpa_mask)


@contextmanager
def attention_function(core: nn.Module, name: str):
    """The language model attends with the registered function `name`."""
    config = core.config.text_config
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def at_least_float32(x: Tensor) -> Tensor:
    """At least single precision: no log-softmax is taken in half."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
