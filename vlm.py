"""Everything that touches transformers: load, LoRA, encode, generate groups, score tokens, a text-only judge.

The prompt of a vision-language model is long, its completions are short, and all of a group share it. So the prompt
runs once per group, in generation (its keys and values are held and read once) and in scoring (one row
[prompt | y_1 | ... | y_K] whose branches see the prompt and themselves only). Both are exact; `score_plain` is the form
they are tested against.

Shapes: B prompts, K completions per prompt, P prompt tokens (left-padded), T completion tokens (right-padded).
"""

import copy
import inspect
import json
import random
import re
import warnings
import zipfile
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jinja2 import TemplateError
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
)
from qwen_vl_utils.vision_process import fetch_image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import create_block_mask
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

import reasoning
from caption_reward import MAX_TOKENS, said

SEGMENT = 16  # tokens between two looks at which completions have ended
LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # the language model's linears, never the vision's
# transformers renames this argument; the old name warns
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


@dataclass
class Completions:
    """ids [B, K, T]; mask [B, K, T], 1 up to and including the first end token; text[b][k]; ended [B, K]."""

    ids: Tensor
    mask: Tensor
    text: list[list[str]]
    ended: Tensor


class TokenScores(NamedTuple):
    """At every completion token: its log-prob [B, K, T], the entropy of its distribution [B, K, T] and the head's input
    there, hidden [B, K, T, d]; prompt [B, P, d]: the prompt's hidden states."""

    logp: Tensor
    entropy: Tensor
    hidden: Tensor
    prompt: Tensor


def _in_evaluation_mode(method):
    """Gradient checkpointing, which acts in training mode, allows no cache. The mode comes back also after an error."""

    @wraps(method)
    def wrapped(self, *args, **kwargs):
        was_training, _ = self.training, self.eval()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.train(was_training)

    return wrapped


class VLM(nn.Module):
    """A Qwen2.5-VL and its processor. `forward` is scoring, so that DDP wraps the pass that has a backward."""

    _no_split_modules = ("Qwen2_5_VLDecoderLayer",)  # what FSDP2 makes shards of

    def __init__(self, model: nn.Module, processor, min_pixels: int, max_pixels: int):
        super().__init__()
        self.model, self.processor = model, processor
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.end_ids = _end_ids(self.core, processor.tokenizer)
        self.banned_ids = _banned_ids(self.core, processor.tokenizer, self.end_ids)
        # a convolution whose stride is its kernel is one matrix product, and PyTorch's Conv3d is far slower at it
        conv = self.core.model.visual.patch_embed.proj
        conv.forward = MethodType(_patches_times_kernel, conv)

    @property
    def core(self) -> nn.Module:
        """The Qwen2_5_VLForConditionalGeneration itself; LoRA layers, when there are any, sit inside it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        return self.core.lm_head.weight.device

    def base(self):
        """Context in which the LoRA adapter is off: the reference model of a LoRA run."""
        return self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else nullcontext()

    def encode(self, conversations: list[list[dict]]) -> BatchFeature:
        """Chat messages with PIL images or lists of frames -> left-padded model inputs.

        One processor call builds ids, mask, token types, pixels and grids, so that they cannot disagree, and
        generation and scoring get the very same tensors. Nothing is ever truncated. Raises ValueError for no
        conversation.
        """
        if not conversations:
            raise ValueError("there is no conversation to encode")
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        images, videos, metadata = [], [], []
        for part in (part for turns in conversations for turn in turns for part in turn["content"]):
            if part["type"] == "image":
                images.append(fetch_image({"image": part["image"], **limits}))
            elif part["type"] == "video":  # frame by frame: qwen-vl-utils' own list reader rounds to 56, not 28 pixels
                frames = [fetch_image({"image": frame, **limits}) for frame in part["video"]]
                videos.append(frames)
                metadata.append(
                    {"fps": part["fps"], "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
                )
        text = self.processor.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
        media = {"images": images} if images else {}
        if videos:
            media |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        inputs = self.processor(
            text=text, **media, do_resize=False, padding=True, padding_side="left", return_tensors="pt"
        )
        inputs = inputs.to(self.device)
        if not any(p.requires_grad for p in self.core.model.visual.parameters()):
            # once for generation, policy and reference: a frozen tower sees the same in all three
            with torch.no_grad():
                inputs.update(self._see(inputs))
        return inputs

    def _see(self, inputs: BatchFeature) -> dict[str, Tensor]:
        """The vision tower's output, one row for every image (video) token of the batch in reading order."""
        body, seen = self.core.model, {}
        if "pixel_values" in inputs:
            out = body.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
            seen["image_features"] = torch.cat(list(out.pooler_output))
        if "pixel_values_videos" in inputs:
            out = body.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
            seen["video_features"] = torch.cat(list(out.pooler_output))
        return seen

    def _embed(self, inputs: BatchFeature) -> Tensor:
        """The prompts' tokens as the language model takes them [B, P, d], pictures and clips in their places."""
        ids, config = inputs["input_ids"], self.core.config
        placeholder = {"image_features": config.image_token_id, "video_features": config.video_token_id}
        seen = {name: inputs[name] for name in placeholder if name in inputs} or self._see(inputs)
        embeds = self.core.get_input_embeddings()(ids)
        for name, features in seen.items():
            embeds = embeds.masked_scatter((ids == placeholder[name])[..., None], features.to(embeds.dtype))
        return embeds

    @torch.no_grad()
    @_in_evaluation_mode
    def generate(
        self, inputs: BatchFeature, n: int, max_new_tokens: int, sample: bool = True, draws: Tensor | None = None
    ) -> Completions:
        """n completions per prompt, at T = 1 from the whole distribution (D-8), or greedy.

        The prompt, and with it the vision tower, runs once, and its keys and values are held once for all its
        completions (`_Branches`). Every SEGMENT tokens those that have ended leave the batch.
        Raises ValueError for n below 1.
        draws [B, n, T]: the uniform numbers that choose the tokens, by default from torch's generator. With the same
        numbers a prompt gets the same completions in any batch.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1 completion a prompt, got {n}")
        core, prompts, valid = self.core, inputs["input_ids"], inputs["attention_mask"]
        (b, p), device = prompts.shape, prompts.device
        ends = torch.tensor(self.end_ids, device=device)
        if sample and draws is None:
            draws = torch.rand(b, n, max_new_tokens, dtype=torch.float64, device=device)
        position = _positions(core.model, inputs)
        # the positions that scoring uses; transformers' own deltas count from the largest, a long clip's time
        delta = position[0, :, -1] + 1 - valid.sum(1)
        attention = core.config.text_config._attn_implementation
        # transformers' own mask for eager attention lets padding see nothing: in float64 it then holds NaN
        mask = {"full_attention": _branch_mask(valid, [], core.dtype, attention)} if attention == "eager" else valid
        prefill = DynamicCache()
        core.model(
            inputs_embeds=self._embed(inputs),
            attention_mask=mask,
            position_ids=position,
            use_cache=True,
            **{CACHE: prefill},
        )
        prefill.crop(-1)  # `generate` feeds the last prompt token again and so gets its logits
        branches = DynamicCache()
        branches.layers = [_Branches(layer, valid[:, :-1], n, max_new_tokens) for layer in prefill.layers]

        ids = torch.full((b, n, max_new_tokens), self.processor.tokenizer.pad_token_id, device=device)
        kept = torch.arange(n, device=device).expand(b, n)  # the completions still in the batch, as many of each prompt
        for start in range(0, max_new_tokens, SEGMENT):
            stop = min(start + SEGMENT, max_new_tokens)
            ended = torch.isin(ids[..., :start], ends).any(-1).gather(1, kept)  # [B, m]
            left = int((~ended).sum(1).max())
            if not left:
                break
            if left < kept.shape[1]:  # where a prompt has fewer left, ended ones fill up
                order = ended.int().argsort(dim=1, stable=True)[:, :left]
                rows = order + torch.arange(b, device=device)[:, None] * kept.shape[1]
                kept, ended = kept.gather(1, order), ended.gather(1, order)
                for layer in branches.layers:
                    layer.keep(rows.flatten())
            index = kept[..., None].expand(-1, -1, stop - start)
            said = ids[:, :, :start].gather(1, kept[..., None].expand(-1, -1, start)).flatten(0, 1)
            numbers = draws[..., start:stop].to(device).gather(1, index).flatten(0, 1) if sample else None
            core.model.rope_deltas = delta.repeat_interleave(left)[:, None]
            with _attention(core, "shared_prefix"), plain_generation(core):
                sequences = core.generate(
                    input_ids=torch.cat([prompts.repeat_interleave(left, 0), said], 1),
                    attention_mask=torch.cat([valid.repeat_interleave(left, 0), torch.ones_like(said)], 1),
                    logits_processor=[_NextToken(self.banned_ids, self.end_ids[0], ended.flatten(), numbers)],
                    synced_gpus=False,  # by itself it would keep step with other processes wherever FSDP is in use
                    generation_config=GenerationConfig(
                        do_sample=False,  # _NextToken has chosen, at T = 1, from the whole distribution
                        use_cache=True,
                        max_new_tokens=stop - start,
                        eos_token_id=self.end_ids,
                        pad_token_id=self.processor.tokenizer.pad_token_id,
                    ),
                    **{CACHE: branches},
                )
            new = sequences[:, p + start :].unflatten(0, kept.shape)
            ids[:, :, start:stop].scatter_(1, index[..., : new.shape[2]], new)
        is_end = torch.isin(ids, ends)
        mask = (is_end.cumsum(2) - is_end.int()) == 0  # first end token kept, whatever follows it dropped
        said = mask & ~is_end  # decoded whole, special tokens too: stage tags may be among a checkpoint's
        text = [
            [self.processor.tokenizer.decode(row[keep]) for row, keep in zip(rows, keeps, strict=True)]
            for rows, keeps in zip(ids, said, strict=True)
        ]
        length = mask.sum(2).max()
        ids, mask = ids[..., :length], mask[..., :length]
        return Completions(ids, mask, text, is_end.any(2))

    def encode_responses(self, texts: list[str], after: list[str] | None = None) -> tuple[Tensor, Tensor]:
        """One response text per prompt, teacher-forced: ids and mask [B, 1, T], each closed by the end token.

        after: a beginning of each response that is fed as well but not in the mask. Raises ValueError for no text.
        """
        if not texts:
            raise ValueError("there is no response to encode")
        tokenizer = self.processor.tokenizer
        start = [tokenizer(text, add_special_tokens=False).input_ids for text in after or [""] * len(texts)]
        rows = [tokenizer(text, add_special_tokens=False).input_ids + [self.end_ids[0]] for text in texts]
        length = max(len(a) + len(b) for a, b in zip(start, rows))
        ids = torch.full((len(rows), 1, length), self.end_ids[0], device=self.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, (a, b) in enumerate(zip(start, rows)):
            ids[i, 0, : len(a) + len(b)] = torch.tensor(a + b)
            mask[i, 0, len(a) : len(a) + len(b)] = True
        return ids, mask

    def forward(self, inputs: BatchFeature, ids: Tensor, mask: Tensor | None = None) -> TokenScores:
        """log pi(ids | prompt) with K branches behind one prompt.   [B, P], [B, K, T], [B, K, T] -> TokenScores

        Row b is [prompt_b | y_1 | ... | y_K]; in the 4-D mask a branch sees its prompt and its own past, and its
        positions go on from the prompt's last (mRoPE) position. Equal to K separate rows up to rounding. mask: the
        tokens to be scored, by default all; what follows a branch's last one is not fed, and the head runs on these
        tokens only. Elsewhere log-prob and entropy are 0. Attention that takes no 4-D mask scores plain rows. Raises
        ValueError where K or T is 0.
        """
        if ids.ndim != 3 or not ids.numel():
            raise ValueError(f"ids must be [B, K, T] with at least one token each, got shape {tuple(ids.shape)}")
        body, prompts = self.core.model, inputs["input_ids"]
        attention = self.core.config.text_config._attn_implementation
        p, t = prompts.shape[1], ids.shape[2]
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if attention not in ("shared_prefix", "eager", "sdpa", "flex_attention"):
            warnings.warn(f"{attention} attention takes no 4-D mask: scoring shares no prompt", stacklevel=2)
            return self.score_plain(inputs, ids, mask)
        # branch by branch, as many tokens as its longest row in the batch; the last token predicts nothing
        ends = (mask.any(0) * torch.arange(1, t + 1, device=ids.device)).amax(-1).clamp_min(1).tolist()
        fed = [end - 1 for end in ends]
        branches = torch.cat([ids[:, i, :n] for i, n in enumerate(fed)], 1)
        position = _positions(body, inputs)  # [3, B, P]
        start = position[0, :, -1] + 1  # [B]: after the prompt's text, although a long clip's time may run past it
        steps = torch.cat([torch.arange(n, device=ids.device) for n in fed])
        hidden = body(
            inputs_embeds=torch.cat([self._embed(inputs), self.core.get_input_embeddings()(branches)], 1),
            attention_mask={"full_attention": _branch_mask(inputs["attention_mask"], fed, self.core.dtype, attention)},
            position_ids=torch.cat([position, (start[:, None] + steps).expand(3, -1, -1)], 2),
            use_cache=False,
        ).last_hidden_state
        # the prompt's end predicts y_1
        parts = [torch.cat([hidden[:, p - 1 : p], part], 1) for part in hidden[:, p:].split(fed, 1)]
        states = torch.stack([F.pad(part, (0, 0, 0, t - end)) for part, end in zip(parts, ends)], 1)  # [B, K, T, d]
        return self._scores(states, ids, mask, hidden[:, :p])

    def score_plain(self, inputs: BatchFeature, ids: Tensor, mask: Tensor | None = None) -> TokenScores:
        """The same numbers with one row per completion and no sharing."""
        k, t = ids.shape[1:]
        rows, p = ids.flatten(0, 1), inputs["input_ids"].shape[1]
        position = _positions(self.core.model, inputs)
        steps = (position[0, :, -1:] + 1 + torch.arange(t, device=ids.device)).expand(3, -1, -1)
        embeds = self._embed(inputs).repeat_interleave(k, 0)
        hidden = self.core.model(
            inputs_embeds=torch.cat([embeds, self.core.get_input_embeddings()(rows)], 1),
            attention_mask=torch.cat([inputs["attention_mask"].repeat_interleave(k, 0), torch.ones_like(rows)], 1),
            position_ids=torch.cat([position, steps], 2).repeat_interleave(k, 1),
            use_cache=False,
        ).last_hidden_state
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return self._scores(hidden[:, p - 1 : -1].unflatten(0, ids.shape[:2]), ids, mask, hidden[::k, :p])

    def _scores(self, hidden: Tensor, ids: Tensor, mask: Tensor, prompt: Tensor) -> TokenScores:
        found = log_prob(hidden[mask], self.core.lm_head.weight, ids[mask], self.banned_ids)
        logp, entropy = (torch.zeros(ids.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x) for x in found)
        return TokenScores(logp, entropy, hidden, prompt)

    def head(self, trained: bool = True) -> tuple[Tensor, Tensor]:
        """W [V, d] and b [V]: softmax(W h + b) is the distribution that is sampled; b is -inf at banned tokens.

        trained = False: without gradient.
        """
        weight = self.core.lm_head.weight if trained else self.core.lm_head.weight.detach()
        banned = torch.tensor(self.banned_ids, device=weight.device)
        return weight, torch.zeros(len(weight), device=weight.device).index_fill(0, banned, -torch.inf)

    def save(self, folder: str | Path, merge: bool = True) -> None:
        """Write weights and processor, so that plain `from_pretrained` loads them. LoRA's are merged in, or written
        alone, as an adapter of the model that it was put on (whose path it remembers)."""
        own = self.core.generation_config
        with plain_generation(self.core):  # transformers refuses to write some that it has read
            if isinstance(self.model, PeftModel) and merge:
                # a copy, because training may go on, and on the CPU, because a second model may not fit on the device
                device = self.device
                merged = copy.deepcopy(self.model.cpu()).merge_and_unload()
                self.model.to(device)
                merged.save_pretrained(folder)
            else:
                self.model.save_pretrained(folder)
        if (Path(folder) / "generation_config.json").exists():
            own.to_json_file(Path(folder) / "generation_config.json")
        self.processor.save_pretrained(folder)


def log_prob(hidden: Tensor, weight: Tensor, ids: Tensor, banned: list[int], chunk: int | None = None):
    """log pi(y_t) and the entropy H_t of pi_t = softmax(W h_t).   [N, d], [V, d], [N] -> [N], [N]

    The logits [N, V] are by far the largest tensor of a step, so they never exist: the head runs on chunk / V tokens at
    a time, and again in backward, where d log pi(y) / dz = e_y - pi. banned tokens have no probability. The entropy
    carries no gradient. Half precision is widened before the softmax. chunk: numbers in a chunk; by default what suited
    a CPU's caches best, and on a GPU more, so that it is kept busy and a half-precision gradient of W has few summands.
    """
    chunk = chunk or (2**22 if hidden.device.type == "cpu" else 2**26)
    return _LogProb.apply(hidden, weight, ids, banned, max(1, chunk // len(weight)))


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, banned, rows):
        logp, entropy, norm = [], [], []
        for h, y in zip(hidden.split(rows), ids.split(rows)):
            z = _wide(h @ weight.T)
            z[:, banned] = torch.finfo(z.dtype).min / 2
            most = z.amax(-1, keepdim=True)
            weights = z.sub_(most).exp()  # log-sum-exp by hand: its parts give the entropy as well
            total = weights.sum(-1)
            norm.append(most[:, 0] + total.log())
            logp.append(z.gather(-1, y[:, None])[:, 0] - total.log())
            entropy.append(total.log() - torch.linalg.vecdot(weights, z) / total)
        norm = torch.cat(norm)
        ctx.save_for_backward(hidden, weight, ids, norm)
        ctx.banned, ctx.rows = banned, rows
        entropy = torch.cat(entropy)
        ctx.mark_non_differentiable(entropy)
        return torch.cat(logp), entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        hidden, weight, ids, norm = ctx.saved_tensors
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if to_hidden else None
        d_weight = torch.zeros_like(weight) if to_weight else None
        for start in range(0, len(hidden), ctx.rows):
            part = slice(start, start + ctx.rows)
            h, g = hidden[part], grad[part, None]
            z = _wide(h @ weight.T)
            z[:, ctx.banned] = torch.finfo(z.dtype).min / 2
            residual = z.sub_(norm[part, None]).exp_().mul_(-g).scatter_add_(-1, ids[part, None], g).to(hidden.dtype)
            if to_hidden:
                d_hidden[part] = residual @ weight
            if to_weight:
                d_weight.addmm_(residual.T, h)
        return d_hidden, d_weight, None, None, None


def _wide(x: Tensor) -> Tensor:
    """At least single precision: no log-softmax is taken in half."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def uniform_numbers(names: list[str], n: int, length: int, when: str) -> Tensor:
    """The chance behind n completions of each prompt [B, n, T]: it depends on `when` (seed, update) and the prompt's
    name only, not on the batch, the process or the device, so that the completions do not either, up to rounding."""
    numbers = torch.empty(len(names), n, length, dtype=torch.float64)
    for table, name in zip(numbers, names):
        stream = torch.Generator().manual_seed(random.Random(f"{when}/{name}").randrange(2**63))
        torch.rand(n, length, generator=stream, out=table)
    return numbers


class _NextToken(LogitsProcessor):
    """Chooses the next token itself, at T = 1 from all of softmax(scores) or greedily, and leaves `generate` no other
    choice. A row that has ended goes on with the end token."""

    def __init__(self, banned: list[int], end: int, ended: Tensor, draws: Tensor | None):
        self.banned, self.end, self.ended = banned, end, ended[:, None]
        self.draws = None if draws is None else iter(draws.split(1, 1))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, self.banned] = -torch.inf
        token = scores.argmax(-1, keepdim=True) if self.draws is None else _invert(scores, next(self.draws))
        choice = torch.zeros_like(scores, dtype=torch.uint8)  # in bytes, because `generate` looks for the largest
        return choice.scatter_(-1, token.masked_fill(self.ended, self.end), 1)


def _invert(scores: Tensor, u: Tensor, block: int = 128) -> Tensor:
    """The token at which the cumulative distribution of softmax(scores) passes u.   [N, V], [N, 1] -> [N, 1]

    One number a row, where `torch.multinomial` draws one for each token of the vocabulary and on a CPU took longer than
    the model (39 % of generation with 32,768 tokens). In two steps, block of the vocabulary and token in it, so that
    only few sums are in double precision; in single the tail of a vocabulary would be lost.
    """
    weights = _wide(scores).softmax(-1)
    if rest := -weights.shape[1] % block:
        weights = F.pad(weights, (0, rest))
    blocks = weights.unflatten(1, (weights.shape[1] // block, block))
    mass = blocks.sum(-1).double()
    edges = mass.cumsum(-1)
    passed = u * edges[:, -1:]
    which = torch.searchsorted(edges, passed, right=True)  # right: never a block or token without probability
    share = (passed - (edges - mass).gather(1, which)) / mass.gather(1, which)
    inside = blocks.gather(1, which[..., None].expand(-1, -1, block))[:, 0].double().cumsum(-1)
    within = torch.searchsorted(inside, share.clamp(0, 1 - 2**-40) * inside[:, -1:], right=True)
    return which * block + within


class _Branches(DynamicLayer):
    """The cache of one layer: the prompts' keys and values once, and room for those of n completions of each, which are
    written in place where the plain layer copies all there is at every token."""

    is_croppable = False

    def __init__(self, prompt: DynamicLayer, valid: Tensor, n: int, room: int):
        super().__init__()
        # wide: scores in half precision would be off by percents, and the distribution sampled not the one scored
        self.prompt, self.filled, self.is_initialized = (_wide(prompt.keys), _wide(prompt.values)), 0, True
        b, heads, self.before, d = prompt.keys.shape
        self.keys, self.values = (x.new_empty(b * n, heads, room, d) for x in (prompt.keys, prompt.values))
        hidden = valid[:, None, None] == 0
        self.hidden = hidden if hidden.any() else None  # the padding [B, 1, 1, P]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        end = self.filled + key_states.shape[-2]
        self.keys[..., self.filled : end, :] = key_states
        self.values[..., self.filled : end, :] = value_states
        self.filled = end
        keys = self.keys[..., :end, :]
        keys.branches = self  # what `_attend` needs beside them
        return keys, self.values[..., :end, :]

    def get_seq_length(self) -> int:
        return self.before + self.filled

    def keep(self, rows: Tensor) -> None:
        self.keys, self.values = self.keys[rows], self.values[rows]


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask, scaling: float, **kwargs):
    """SDPA that knows which tokens share a prompt. Registered with transformers as "shared_prefix"."""
    if hasattr(key, "branches"):  # a new token in every completion
        return _decode(_wide(query) * scaling, key, value)[:, None], None
    if not isinstance(mask, tuple):
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)
    p = query.shape[2] - mask[1].shape[2]  # the prompt sees no branch: its rows need no columns of theirs
    parts = (query[:, :, :p], key[:, :, :p], value[:, :, :p], mask[0]), (query[:, :, p:], key, value, mask[1])
    return torch.cat([sdpa_attention_forward(module, *part, scaling=scaling, **kwargs)[0] for part in parts], 1), None


def _decode(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax([q k_prompt^T, q k_own^T]) [v_prompt; v_own], where all completions of a prompt read its keys and values
    together, as one matrix product.   [B n, H, 1, d], [B n, h, T, d], [B n, h, T, d] -> [B n, H, d]"""
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
    weights = torch.cat([shared, by_prompt(query @ _wide(key).mT)], -1).softmax(-1)
    out = by_completion(weights[..., :p] @ v) + by_completion(weights[..., p:]) @ _wide(value)
    return out.reshape(rows, heads, d).to(value.dtype)


AttentionInterface.register("shared_prefix", _attend)
AttentionMaskInterface.register("shared_prefix", sdpa_mask)


@contextmanager
def _attention(core: nn.Module, name: str):
    """The language model attends with the registered function `name`."""
    config = core.config.text_config
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


def _patches_times_kernel(conv: nn.Conv3d, patches: Tensor) -> Tensor:
    """[N, C, T, P, P] -> [N, d]"""
    return F.linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)


def _positions(body: nn.Module, inputs: BatchFeature) -> Tensor:
    """mRoPE positions of the left-padded prompts [3, B, P]."""
    names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    return body.get_rope_index(inputs["input_ids"], **{name: inputs[name] for name in names if name in inputs})[0]


def _branch_mask(prompt_mask: Tensor, fed: list[int], dtype: torch.dtype, attention: str):
    """What each of the L = P + sum(fed) tokens of a row may look at: the prompt, and its own branch's past.

    A mask [B, 1, L, L] to be added, 0 or the lowest number; for `_attend` in two, the prompt's [B, 1, P, P] (None where
    plain causal attention will do) and the branches' [B, 1, L - P, L]; for flex attention its blocks.
    """
    (b, p), device = prompt_mask.shape, prompt_mask.device
    length = p + sum(fed)
    branch = torch.arange(len(fed) + 1, device=device).repeat_interleave(torch.tensor([p, *fed], device=device))
    valid = torch.cat([prompt_mask.bool(), prompt_mask.new_ones(b, sum(fed)).bool()], 1)

    def may_see(row, _head, q, k):
        same = (branch[k] == 0) | (branch[k] == branch[q])
        return (same & (k <= q) & valid[row, k]) | (k == q)  # padding sees itself: no NaN

    def dense(start: int, stop: int) -> Tensor:
        at = torch.arange(stop, device=device)
        see = may_see(torch.arange(b, device=device)[:, None, None], None, at[start:, None], at)
        return torch.zeros(see.shape, dtype=dtype, device=device).masked_fill(~see, torch.finfo(dtype).min)[:, None]

    if attention == "flex_attention":
        return create_block_mask(may_see, b, None, length, length, device=device)
    if attention == "shared_prefix" and length > p:
        return None if prompt_mask.all() else dense(0, p), dense(p, length)
    return dense(0, length)


@contextmanager
def plain_generation(model: nn.Module):
    """`generate` takes nothing from the checkpoint's own generation_config, of which transformers fills in whatever the
    given one leaves open: a repetition penalty or T = 1e-6 (released checkpoints ship both), beams, a minimum length.
    Log-probs are those of the plain distribution, and so must the samples be. What is saved keeps the checkpoint's."""
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def _end_ids(model: nn.Module, tokenizer) -> list[int]:
    """The end-of-turn token, first in the list, and any other token the checkpoint treats as an end.

    Qwen lists its padding token as an end too; as padding it can never be sampled, so it is not one here.
    """
    listed = model.generation_config.eos_token_id
    listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    return list(dict.fromkeys([tokenizer.eos_token_id, *(i for i in listed if i != tokenizer.pad_token_id)]))


def _banned_ids(model: nn.Module, tokenizer, end_ids: list[int]) -> list[int]:
    """The tokens that no response holds: never sampled, and so never scored.

    Control tokens (a sampled image token has no image behind it, and a turn of another speaker is no response), and
    the rows of the head that stand for no token: real checkpoints pad the vocabulary. Stage tags may be special tokens
    of a checkpoint, and stay.
    """
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
    control = {i for token, i in special.items() if token not in reasoning.TAGS}
    control |= {getattr(model.config, name) for name in names} | {tokenizer.pad_token_id}
    control -= {None, *end_ids}
    nothing = set(range(model.lm_head.weight.shape[0])) - set(tokenizer.get_vocab().values())
    return sorted(control | nothing)


def context(path: str) -> tuple[int, PreTrainedTokenizerBase]:
    """The most tokens that a checkpoint takes, and its tokenizer; nothing heavy is loaded.

    Raises ValueError for a model of another family, quantised, in part there or without a chat template that can be
    used, OSError where there is none."""
    _, _, config, processor = _opened(path)
    _check_template(processor)
    return config.text_config.max_position_embeddings, processor.tokenizer


def _opened(path: str) -> tuple[str, str | None, PreTrainedConfig, ProcessorMixin]:
    """(model, adapter to put on it, the model's configuration, processor): what a folder or hub id holds."""
    base, adapter = _base_of(path)
    it = f"its base {base}" if adapter else "it"
    if Path(base).is_dir() and not (Path(base) / "config.json").exists():
        raise ValueError(f"{it} holds no model (config.json)")
    config = AutoConfig.from_pretrained(base)
    if config.model_type != "qwen2_5_vl":
        raise ValueError(f"{it} is a {config.model_type} model, and only Qwen2.5-VL (qwen2_5_vl) is supported")
    for part in (config, config.text_config):
        if how := getattr(part, "quantization_config", None):
            method = how.get("quant_method", "bitsandbytes")  # whose older checkpoints do not say it
            raise ValueError(f"{it} is quantised ({method}); give the unquantised checkpoint")
    _check_files(base, "model", "pytorch_model")
    processor = _processor_of(path, base)
    tokenizer = processor.tokenizer
    for kind in ("image", "video"):
        token, number = getattr(processor, f"{kind}_token"), getattr(config, f"{kind}_token_id")
        if tokenizer.convert_tokens_to_ids(token) != number or not tokenizer("red").input_ids:
            raise ValueError(
                f"its tokenizer lacks words, or the {kind} token of its config.json ({token}, {number}); give a folder "
                "that holds the tokenizer's files (tokenizer.json, tokenizer_config.json)"
            )
    # some checkpoints give it to one of the two alone
    tokenizer.chat_template = tokenizer.chat_template or processor.chat_template
    processor.chat_template = processor.chat_template or tokenizer.chat_template
    return base, adapter, config, processor


def _base_of(path: str) -> tuple[str, str | None]:
    """(model, adapter to put on it): what a folder or hub id holds."""
    file = Path(path) / "adapter_config.json"
    if not file.exists():
        return path, None
    try:
        config = PeftConfig.from_pretrained(path)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error})") from error
    base = config.base_model_name_or_path
    if not base:
        raise ValueError(f"{file} names no base_model_name_or_path; write the model there that it is an adapter of")
    if config.is_prompt_learning:
        raise ValueError(f"{path} is a {config.peft_type.value} adapter, which no weights can take in; give a LoRA")
    if (Path(base).is_absolute() or base.count("/") > 1) and not Path(base).exists():
        raise FileNotFoundError(
            f"{path} is an adapter of {base}, which is not there. Put it back, or train with --merge"
        )
    _check_files(path, "adapter_model", "adapter_model")
    return base, path


def _check_files(folder: str, name: str, older: str) -> None:
    """Are a folder's files of weights there, and as long as they say? Their heads tell, so this is cheap."""
    here = Path(folder)
    if not here.is_dir():  # on the hub
        return
    files = [here / f"{name}.safetensors", *here.glob(f"{name}.safetensors.index.json")]
    files += [here / f"{older}.bin", *here.glob(f"{older}.bin.index.json")]
    file = next((file for file in files if file.exists()), None)  # in the order in which they are looked for
    if file is None:
        raise FileNotFoundError(f"{folder} holds no weights ({name}.safetensors)")
    try:
        whole = json.loads(file.read_text())["weight_map"] if file.suffix == ".json" else {"": file.name}
        for file in sorted({here / each for each in whole.values()}):
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif not zipfile.is_zipfile(file):
                raise ValueError("its end is missing" if file.exists() else "No such file")
    except (OSError, ValueError, LookupError, SafetensorError) as error:
        raise ValueError(f"{file} is not whole ({error}); copy or download it again") from error


def _processor_of(path: str, base: str) -> ProcessorMixin:
    """A checkpoint's own processor; that of its base, with its own tokenizer if it has one, where PEFT or a trainer has
    saved an adapter without."""
    if path == base or any((Path(path) / f"{name}_config.json").exists() for name in ("processor", "preprocessor")):
        return AutoProcessor.from_pretrained(path)
    processor = AutoProcessor.from_pretrained(base)
    if not (Path(path) / "tokenizer_config.json").exists():
        return processor
    tokenizer = AutoTokenizer.from_pretrained(path)
    template = tokenizer.chat_template or processor.chat_template
    return type(processor)(processor.image_processor, tokenizer, processor.video_processor, chat_template=template)


def _check_template(processor: ProcessorMixin) -> None:
    """Does the chat template write what it is given, pictures too? Asked as `VLM.encode` and `data` ask it."""
    if not processor.chat_template:
        raise ValueError("it has no chat template; give an Instruct checkpoint")
    seen = [{"type": "image"}, {"type": "text", "text": "red"}]
    try:
        with_picture, plain = (
            of.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
            for of, content in ((processor, seen), (processor.tokenizer, "red"))
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"its chat template cannot be used ({error}); give an Instruct checkpoint's") from error
    if processor.image_token not in with_picture or not all("red" in text for text in (with_picture, plain)):
        raise ValueError("its chat template leaves out pictures or words; give an Instruct checkpoint's")


def load(
    path: str,
    *,
    dtype: str = "float32",
    attention: str = "sdpa",
    lora_rank: int = 0,
    train_vision: bool = False,
    gradient_checkpointing: bool = False,
    min_pixels: int = 4 * 28 * 28,
    max_pixels: int = 401_408,
    trainable: bool = True,
) -> VLM:
    """A Qwen2.5-VL checkpoint (folder or hub id), or an adapter of one (folder), which is merged in first.

    Full fine-tuning of the language model, or LoRA on its linears.
    The vision tower is frozen unless `train_vision`. `trainable=False` freezes everything: reference, evaluation.
    Raises ValueError or OSError for what `context` refuses, and where a weight has no place or a place no weight.
    """
    ours = {"sdpa": "shared_prefix", "flex_attention": "flex_attention"}  # of the language model, not of the tower
    base, adapter, _, processor = _opened(path)
    base = str(Path(base).resolve()) if Path(base).exists() else base  # what a new adapter will remember
    model, loaded = AutoModelForImageTextToText.from_pretrained(
        base,
        dtype=getattr(torch, dtype),
        attn_implementation="sdpa" if attention in ours else attention,
        ignore_mismatched_sizes=True,  # `_refuse_part` does not, and names them
        output_loading_info=True,
    )
    _refuse_part(loaded)
    model.config.text_config._attn_implementation = ours.get(attention, attention)
    if adapter:
        model = _with_adapter(model, adapter).merge_and_unload()
    _without_dropout(model)
    model.requires_grad_(trainable)
    if not train_vision:
        model.model.visual.requires_grad_(False)
    if gradient_checkpointing and trainable:
        new = getattr(model, "activation_checkpointing_enable", None)  # its name from transformers 5.x on
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
        model.enable_input_require_grads()
    if lora_rank and trainable:
        config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=LORA_TARGETS)
        with _quietly():
            model = get_peft_model(model, config)
    return VLM(model, processor, min_pixels, max_pixels).train(trainable)


def _refuse_part(loaded: dict) -> None:
    """ValueError where a checkpoint's weights and a model's places are not one to one, sizes included. A head that is
    the embedding (tied) is not missed."""
    missing, unexpected = sorted(loaded["missing_keys"]), sorted(loaded["unexpected_keys"])
    told = [f"lack {len(missing)} weights ({missing[0]})"] if missing else []
    told += [f"hold {len(unexpected)} that the model has no place for ({unexpected[0]})"] if unexpected else []
    if sizes := sorted(loaded["mismatched_keys"]):
        name, there, wanted = sizes[0]
        told += [f"hold {len(sizes)} of another size than its config.json says ({name}: {[*there]}, not {[*wanted]})"]
    if told:
        raise ValueError(f"its files {' and '.join(told)}; give a whole checkpoint, with any LoRA merged")


def _with_adapter(model: nn.Module, adapter: str) -> PeftModel:
    """The model with all weights of a LoRA adapter on it; ValueError where one finds no place, or a place no weight."""
    names = {  # as transformers before 4.52 called them
        r"^model\.(?=layers|norm|embed_tokens)": "model.language_model.",
        r"^visual\.": "model.visual.",
    }
    with _quietly(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            found = PeftModel.from_pretrained(model, adapter, key_mapping=names)
        except UserWarning as error:
            raise ValueError(f"{adapter} lacks weights that its adapter_config.json describes") from error
        except RuntimeError as error:
            if not (sizes := re.search("size mismatch for .*", str(error))):
                raise
            raise ValueError(f"{adapter} and its adapter_config.json differ: {sizes[0]}") from error
    there, taken = len(load_peft_weights(adapter, device="cpu")), len(get_peft_model_state_dict(found))
    if there != taken:
        raise ValueError(f"{adapter} holds {there} weights, of which its adapter_config.json has places for {taken}")
    return found


def _without_dropout(model: nn.Module) -> None:
    """No dropout anywhere, although training mode stays on for gradient checkpointing: policy, reference and sampler
    are one distribution. With it the ratios of Eq. 1 are off before anything has been learned."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):  # probabilities that are handed to functions
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


@contextmanager
def _quietly():
    """Without the warning about a name in transformers that peft has not followed yet."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


class LocalJudge:
    """A text-only causal LM that answers prompts greedily: the judge of the Caption Reward (`caption_reward.Judge`).

    What its tokenizer calls special is taken out of prompts and replies: no caption can write a turn. A reply that
    max_new_tokens cuts off, or that ends inside its thought or right behind it, is None.
    Raises ValueError, or what transformers raises, for a checkpoint that cannot be asked.
    """

    def __init__(
        self, path: str, device: str | torch.device = "cpu", batch: int = 64, max_new_tokens: int = MAX_TOKENS
    ):
        self.path, self.batch, self.max_new_tokens, self.last_error = path, batch, max_new_tokens, ""
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        if not self.tokenizer.chat_template:
            raise ValueError("it has no chat template; give a model that is tuned to follow instructions")
        turns = [[{"role": "user", "content": word}] for word in ("red", "blue")]
        if len(set(self.tokenizer.apply_chat_template(turns, tokenize=False))) < 2:
            raise ValueError("its chat template leaves out what is asked")
        named = {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        named |= {*self.tokenizer.all_special_tokens} - {""}
        self.special = re.compile("|".join(map(re.escape, sorted(named, key=len, reverse=True))) or "(?!)")
        try:
            self.model, loaded = AutoModelForCausalLM.from_pretrained(path, dtype="auto", output_loading_info=True)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ValueError("it is no text-only causal LM") from error
        if missing := sorted(loaded["missing_keys"]):
            raise ValueError(f"its files lack {len(missing)} weights ({missing[0]})")
        self.model.to(device).eval()
        ends = {*_end_ids(self.model, self.tokenizer), self.tokenizer.pad_token_id}
        self.model.generation_config = GenerationConfig(  # in place of what the checkpoint ships
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends - {None}),
            pad_token_id=self.tokenizer.pad_token_id,
        )

    def __str__(self) -> str:
        return self.path

    def _encode(self, prompts: list[str]) -> BatchFeature:
        turns = [[{"role": "user", "content": self.special.sub(" ", text)}] for text in prompts]
        return self.tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> list[str | None]:
        replies = []
        for i in range(0, len(prompts), self.batch):
            inputs = self._encode(prompts[i : i + self.batch]).to(self.model.device)
            out = self.model.generate(**inputs, generation_config=self.model.generation_config)
            replies += map(self._read, out[:, inputs["input_ids"].shape[1] :].tolist())
        return replies

    def _read(self, ids: list[int]) -> str | None:
        """The reply up to its end; the marks of its thought may be special tokens as well, so these go last."""
        end = next((k for k, i in enumerate(ids) if i in self.model.generation_config.eos_token_id), None)
        text = None if end is None else said(self.tokenizer.decode(ids[:end]))
        if text is None:
            inside = "ends inside its thought or right behind it"
            what = f"was cut off at {self.max_new_tokens} tokens" if end is None else inside
            self.last_error = f"its reply {what}: raise --judge_max_tokens"
            return None
        return self.special.sub(" ", text).strip()
