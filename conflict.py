"""Eq. 4 in a batch: which y_i, the tokens of f_i, and their cosines over micro-batches and ranks.

    f_i = d log pi(y_i | x_i) / d head,   cos(f_i, f_j) among all prompts of the global batch

`feature_branch` chooses y_i, `feature_tokens` finds the tokens of f_i in a scored micro-batch,
and `Conflict.cosine` hands those of all prompts to `ntk_infonce`, which has the mathematics.

Shapes: B prompts and G responses each in a micro-batch, T tokens, d hidden size, n prompts in the
global batch.
"""

import random

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

import ntk_infonce
from engine import vlm

DENSE_LOGITS = 2**26  # numbers; with more, Eq. 4 takes the vocabulary in chunks


def feature_branch(
    feature: str,
    policy: vlm.VLM,
    rolls: vlm.Completions,
    inputs,
    samples: list,
    max_new_tokens: int,
) -> tuple[Tensor, Tensor]:
    """y_i where it is none of the G responses: ids [B, 1, T] and mask [B, 1, T], to be scored with
    them.

    feature: one of `ntk_infonce.FEATURES` (D-51), or "" without Eq. 4. Where f_i needs no branch of
    its own the ids are [B, 0, T] and the mask is 0.
    """
    if feature == "greedy":
        greedy = policy.generate(inputs, 1, max_new_tokens, sample=False)
        return greedy.ids, greedy.mask
    if feature in ("reference", "own_prefix"):
        own = (
            [row[0].split("<answer>")[0] for row in rolls.text] if feature == "own_prefix" else None
        )
        answers = [f"<answer>{s.answer}</answer>" for s in samples]
        return policy.encode_responses(answers, after=own)
    return rolls.ids[:, :0], torch.zeros_like(rolls.mask[:, :1])


def feature_tokens(rollouts, scores: vlm.TokenScores, feature: str) -> tuple[Tensor, ...]:
    """hidden [N, d], weight [N], target [N] and prompt [N] of the N tokens that f_i is summed
    over."""
    prompts = torch.arange(len(rollouts.samples), device=rollouts.mask.device)
    if feature == "hidden_mean":
        where = rollouts.inputs["attention_mask"].bool()
        segment = prompts[:, None].expand_as(where)[where]
        return scores.prompt[where], torch.ones_like(segment), segment, segment
    mask = rollouts.mask.unflatten(0, (len(prompts), -1))
    scored = scores.logp.shape[1]  # all branches, or the last one only
    weights = ntk_infonce.feature_weights(feature, mask, rollouts.adv, rollouts.feature_mask)
    weights = weights[:, : rollouts.branches.shape[1]][:, -scored:]
    where = weights != 0
    segment = prompts[:, None, None].expand_as(where)[where]
    return scores.hidden[where], weights[where], rollouts.branches[:, -scored:][where], segment


class Conflict:
    """The cosines of Eq. 4 among all prompts of an update.

    f_i travels as a table of its tokens, [hidden | weight | target | prompt], from which every rank
    gets the exact cosines with its own head; with --nce_sketch, and for hidden_mean, as one row per
    prompt. A micro-batch sees its own f_i with gradient and all others without, so it carries the
    gradient of the whole loss with respect to its own prompts, and micro-batches and ranks add up
    to the exact gradient. The head, which all tokens share, is trained in one micro-batch of one
    rank. run = None: one rank.
    """

    def __init__(self, micro_batches: list, policy: vlm.VLM, cfg, run=None, step: int = 0):
        self.micro_batches, self.policy, self.cfg, self.run = micro_batches, policy, cfg, run
        self.seed = random.Random(f"{cfg.seed}/{step}").randrange(2**31)  # one hash for all ranks
        self.is_row = cfg.nce_feature == "hidden_mean" or cfg.nce_sketch > 0  # one per prompt
        self.tables: list[Tensor] | None = None
        if cfg.nce_weight and len(micro_batches) > 1:  # the first one needs the f_i of the last
            # the others need the last branch only
            first = 0 if cfg.nce_feature in ntk_infonce.OF_ALL_RESPONSES else -1
            with torch.no_grad():
                scores = (  # one at a time
                    policy(m.inputs, m.branches[:, first:], m.scored_mask[:, first:])
                    for m in micro_batches
                )
                self.tables = self._all_gather(list(map(self._table, micro_batches, scores)))

    def order(self, n: int) -> Tensor | None:
        """With --nce_control, the permutation of the update's n prompts that `info_nce` takes."""
        if not self.cfg.nce_control:
            return None
        return torch.randperm(n, generator=torch.Generator().manual_seed(self.seed))

    def cosine(self, i: int, scores: vlm.TokenScores) -> Tensor:
        """cos(f_i, f_j) [n, n] of all prompts, with gradient to micro-batch i of this rank. A
        prompt without any token in f_i is left out."""
        own = self._table(self.micro_batches[i], scores)
        tables = list(self.tables or self._all_gather([own]))
        tables[(self.run.rank if self.run else 0) * len(self.micro_batches) + i] = own
        if self.is_row:
            return ntk_infonce.cosine(torch.cat(tables))
        offset, segments = 0, []
        for table in tables:
            segments.append(table[:, -1].long() + offset)
            offset += int(table[:, -1].max()) + 1 if len(table) else 0
        found, segment = torch.cat(segments).unique(return_inverse=True)
        trained = (not self.run or self.run.is_main) and i == len(self.micro_batches) - 1
        weight, bias = self.policy.head(trained)
        table, n = torch.cat(tables), max(1, len(found))
        hidden, scale, targets = table[:, :-3].to(weight.dtype), table[:, -3], table[:, -2].long()
        if len(hidden) * len(weight) <= DENSE_LOGITS:  # less memory than the chunks' gradients of W
            logits = hidden @ weight.T + bias
            return ntk_infonce.gradient_cosine(hidden * scale[:, None], logits, targets, segment, n)
        return ntk_infonce.gradient_cosine_chunked(
            hidden, weight, targets, segment, n, bias, scale=scale
        )

    def _table(self, rollouts, scores: vlm.TokenScores) -> Tensor:
        """f_i of a micro-batch: its tokens [N, d + 3], or one row per prompt."""
        hidden, scale, targets, prompt = feature_tokens(rollouts, scores, self.cfg.nce_feature)
        if not self.is_row:
            # at least float32, which holds any token's number
            wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
            return torch.cat([wide, *(x[:, None].to(wide) for x in (scale, targets, prompt))], 1)
        found, segment = prompt.unique(return_inverse=True)
        if self.cfg.nce_feature == "hidden_mean":
            return ntk_infonce.hidden_mean(hidden, segment, len(found))
        weight, bias = self.policy.head()
        m, seed = self.cfg.nce_sketch, self.seed

        def sketch(h: Tensor, w: Tensor, y: Tensor, at: Tensor) -> Tensor:
            logits = h @ weight.T + bias
            return ntk_infonce.tensor_sketch(h * w[:, None], logits, y, at, len(found), m, seed)

        size = max(1, DENSE_LOGITS // len(weight))
        chunks = zip(*(x.split(size) for x in (hidden, scale, targets, segment)))
        return sum(checkpoint(sketch, *chunk, use_reentrant=False) for chunk in chunks)

    def _all_gather(self, tables: list[Tensor]) -> list[Tensor]:
        """The tables of every micro-batch of every rank, in order of rank."""
        packed = torch.cat([pad(table, (0, 1), value=k) for k, table in enumerate(tables)])
        by_rank = self.run.all_gather(packed) if self.run else [packed.detach()]
        return [rows[rows[:, -1] == k, :-1] for rows in by_rank for k in range(len(tables))]
