"""Qwen2.5-VL through transformers: encode, generate groups, score tokens.

`forward` scores all responses of a prompt in one row and `generate` runs the prompt once
(`shared_prefix`); both are exact. `score_plain`, one row per response, is the form they are tested
against.

Shapes: B prompts, K completions per prompt, P prompt tokens (left-padded), T completion tokens
(right-padded).
"""

import copy
import inspect
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import (
    BatchFeature,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import reasoning
from engine.loader import resized
from engine.shared_prefix import (
    BranchCache,
    Prefix,
    TokenSampler,
    attention_function,
    branch_mask,
    log_prob,
)
from engine.static_decode import StaticSteps

REFERENCE = "reference"  # the name of a frozen adapter beside the one that is trained, "default"
SEGMENT = 16  # tokens between two looks at which completions have ended
# transformers renames this argument; the old name warns
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


@dataclass
class Completions:
    """ids [B, K, T]; mask [B, K, T], 1 up to and including the first end token; text[b][k]; ended
    [B, K]."""

    ids: Tensor
    mask: Tensor
    text: list[list[str]]
    ended: Tensor


class TokenScores(NamedTuple):
    """At every completion token: its log-prob [B, K, T], the entropy of its distribution [B, K, T]
    and the head's input there, hidden [B, K, T, d]; prompt [B, P, d]: the prompt's hidden
    states."""

    logp: Tensor
    entropy: Tensor
    hidden: Tensor
    prompt: Tensor


def _in_evaluation_mode(method):
    """Gradient checkpointing, which acts in training mode, allows no cache. The mode comes back
    also after an error."""

    @wraps(method)
    def wrapped(self, *args, **kwargs):
        was_training, _ = self.training, self.eval()
        try:
            return method(self, *args, **kwargs)
        finally:
            self.train(was_training)

    return wrapped


class VLM(nn.Module):
    """A Qwen2.5-VL and its processor. `forward` is scoring, so that FSDP2 wraps the pass that has
    a backward."""

    _no_split_modules = ("Qwen2_5_VLDecoderLayer",)  # what FSDP2 makes shards of

    def __init__(self, model: nn.Module, processor, min_pixels: int, max_pixels: int):
        super().__init__()
        self.model, self.processor = model, processor
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.static_decoding = False
        self.end_ids = end_token_ids(self.core, processor.tokenizer)
        self.banned_ids = banned_token_ids(self.core, processor.tokenizer, self.end_ids)
        # no buffer: it is not part of the weights; finite, because 0 times it is asked for
        lowest = torch.finfo(torch.float32).min / 2
        self._bias = torch.zeros(len(self.core.lm_head.weight))
        self._bias[self.banned_ids] = lowest
        # a convolution whose stride is its kernel is one matrix product, and PyTorch's Conv3d is
        # far slower at it
        conv = self.core.model.visual.patch_embed.proj
        conv.forward = MethodType(_patches_times_kernel, conv)

    @property
    def core(self) -> nn.Module:
        """The Qwen2_5_VLForConditionalGeneration itself; LoRA layers, when there are any, sit
        inside it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def device(self) -> torch.device:
        return self.core.lm_head.weight.device

    @property
    def bias(self) -> Tensor:
        """Of the head [V]: 0, and a number at `banned_ids` that leaves them no probability."""
        self._bias = self._bias.to(self.device)
        return self._bias

    @contextmanager
    def base(self):
        """Context with the reference model of a LoRA run: the adapter as it was at the start of
        training (`REFERENCE`), or none if it was new."""
        adapters = getattr(self.model, "peft_config", {})
        if REFERENCE in adapters:
            self.model.base_model.set_adapter(REFERENCE, inference_mode=True)
            try:
                yield
            finally:
                self.model.base_model.set_adapter("default")
        elif adapters:
            with self.model.disable_adapter():
                yield
        else:
            yield

    def encode(self, conversations: list[list[dict]]) -> BatchFeature:
        """Chat messages with PIL images or lists of frames -> left-padded model inputs.

        One processor call builds ids, mask, token types, pixels and grids, so that they cannot
        disagree, and generation and scoring get the very same tensors, with the times of a clip's
        frames (D-23). Nothing is ever truncated.
        Raises ValueError for no conversation.
        """
        if not conversations:
            raise ValueError("there is no conversation to encode")
        images, videos, metadata = [], [], []
        for part in (part for turns in conversations for turn in turns for part in turn["content"]):
            part = resized(part, self.min_pixels, self.max_pixels)
            if part["type"] == "image":
                images.append(part["image"])
            elif part["type"] == "video":
                frames = part["video"]
                videos.append(frames)
                metadata.append(
                    {
                        "fps": part["fps"],
                        "total_num_frames": len(frames),
                        "frames_indices": list(range(len(frames))),
                    }
                )
        text = self.processor.apply_chat_template(
            conversations, tokenize=False, add_generation_prompt=True
        )
        media = {"images": images} if images else {}
        if videos:
            media |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        inputs = self.processor(
            text=text,
            **media,
            do_resize=False,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        inputs = inputs.to(self.device)
        if not any(p.requires_grad for p in self.core.model.visual.parameters()):
            # once for generation, policy and reference: a frozen tower sees the same in all three
            with torch.no_grad():
                inputs.update(self._see(inputs))
        return inputs

    def _see(self, inputs: BatchFeature) -> dict[str, Tensor]:
        """The vision tower's output, one row for every image (video) token of the batch in reading
        order."""
        body, seen = self.core.model, {}
        if "pixel_values" in inputs:
            out = body.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
            seen["image_features"] = torch.cat(list(out.pooler_output))
        if "pixel_values_videos" in inputs:
            out = body.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
            seen["video_features"] = torch.cat(list(out.pooler_output))
        return seen

    def _embed(self, inputs: BatchFeature) -> Tensor:
        """The prompts' tokens as the language model takes them [B, P, d], pictures and clips in
        their places."""
        ids, config = inputs["input_ids"], self.core.config
        placeholder = {
            "image_features": config.image_token_id,
            "video_features": config.video_token_id,
        }
        seen = {name: inputs[name] for name in placeholder if name in inputs} or self._see(inputs)
        embeds = self.core.get_input_embeddings()(ids)
        for name, features in seen.items():
            embeds = embeds.masked_scatter(
                (ids == placeholder[name])[..., None], features.to(embeds.dtype)
            )
        return embeds

    @torch.no_grad()
    @_in_evaluation_mode
    def generate(
        self,
        inputs: BatchFeature,
        n: int,
        max_new_tokens: int,
        sample: bool = True,
        draws: Tensor | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> Completions:
        """n completions per prompt, at T = 1 from the whole distribution (D-8), or greedy.
        temperature, top_p: another distribution, for samples that are not scored as such (D-84).

        The prompt, and with it the vision tower, runs once, and its keys and values are held once
        for all its completions (`BranchCache`). Those that have ended leave the batch after a
        SEGMENT of tokens, in steps of one shape once a quarter has ended. Raises ValueError for n
        below 1. draws [B, n, T]: the uniform numbers that choose the tokens, by default from
        torch's generator. With the same numbers a prompt gets the same completions in any batch.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1 completion a prompt, got {n}")
        core, prompts, valid = self.core, inputs["input_ids"], inputs["attention_mask"]
        (b, p), device = prompts.shape, prompts.device
        ends = torch.tensor(self.end_ids, device=device)
        if sample and draws is None:
            draws = torch.rand(b, n, max_new_tokens, dtype=torch.float64, device=device)
        draws = draws.to(device) if sample else None
        position = _positions(core.model, inputs)
        # the positions that scoring uses; transformers' own deltas count from the largest, a long
        # clip's time
        delta = position[0, :, -1] + 1 - valid.sum(1)
        attention = core.config.text_config._attn_implementation
        # transformers' own mask for eager attention lets padding see nothing: in float64 it then
        # holds NaN
        mask = (
            {"full_attention": branch_mask(valid, [], core.dtype, attention)}
            if attention == "eager"
            else valid
        )
        warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
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
        at = torch.zeros(1, dtype=torch.long, device=device) if self.static_decoding else None
        branches.layers = [
            BranchCache(layer, valid[:, :-1], n, max_new_tokens, at) for layer in prefill.layers
        ]
        del prefill  # of half precision `branches` has a wide copy

        ids = torch.full(
            (b, n, max_new_tokens), self.processor.tokenizer.pad_token_id, device=device
        )
        # the completions still in the batch, as many of each prompt
        kept, steps = torch.arange(n, device=device).expand(b, n), None
        for start in range(0, max_new_tokens, SEGMENT):
            stop = min(start + SEGMENT, max_new_tokens)
            ended = torch.isin(ids[..., :start], ends).any(-1).gather(1, kept)  # [B, m]
            left = int((~ended).sum(1).max())
            if not left:
                break
            # a step that has been recorded is not given up for a few rows
            if left < kept.shape[1] * (0.75 if self.static_decoding else 1):
                # where a prompt has fewer left, ended ones fill up
                order = ended.int().argsort(dim=1, stable=True)[:, :left]
                rows = order + torch.arange(b, device=device)[:, None] * kept.shape[1]
                kept, ended = kept.gather(1, order), ended.gather(1, order)
                for layer in branches.layers:
                    layer.keep(rows.flatten())
                steps = None
            left = kept.shape[1]
            so_far = ids[:, :, :start].gather(1, kept[..., None].expand(-1, -1, start))
            fed = torch.cat([prompts.repeat_interleave(left, 0), so_far.flatten(0, 1)], 1)
            numbers = (
                draws.gather(1, kept[..., None].expand_as(draws[:, :left])).flatten(0, 1)
                if sample
                else None
            )
            later = None if numbers is None else numbers[:, start:]
            sampler = TokenSampler(self.bias, self.end_ids[0], ended.flatten(), later, warpers)
            core.model.rope_deltas = delta.repeat_interleave(left)[:, None]
            with attention_function(core, "shared_prefix"), plain_generation(core):
                if self.static_decoding:
                    where = (position[0, :, -1:] + start).repeat_interleave(left, 0)
                    steps = steps or StaticSteps(
                        core, {CACHE: branches}, sampler, fed[:, -1:], where, at, numbers
                    )
                    new = steps.run(start, stop)
                else:
                    new = core.generate(
                        input_ids=fed,
                        attention_mask=torch.cat(
                            [
                                valid.repeat_interleave(left, 0),
                                valid.new_ones(b * left, start),
                            ],
                            1,
                        ),
                        logits_processor=[sampler],
                        # by itself it would keep step with other processes wherever FSDP is in use
                        synced_gpus=False,
                        generation_config=GenerationConfig(
                            # TokenSampler has chosen, at T = 1, from the whole distribution
                            do_sample=False,
                            use_cache=True,
                            max_new_tokens=stop - start,
                            eos_token_id=self.end_ids,
                            pad_token_id=self.processor.tokenizer.pad_token_id,
                        ),
                        **{CACHE: branches},
                    )[:, p + start :]
            index = kept[..., None].expand(-1, -1, new.shape[1])
            ids[:, :, start:stop].scatter_(1, index, new.unflatten(0, kept.shape))
        is_end = torch.isin(ids, ends)
        # first end token kept, whatever follows it dropped
        mask = (is_end.cumsum(2) - is_end.int()) == 0
        ids = ids.masked_fill(~mask, self.processor.tokenizer.pad_token_id)
        # decoded whole, special tokens too: stage tags may be among a checkpoint's
        text_mask = mask & ~is_end
        text = [
            [
                self.processor.tokenizer.decode(row[keep])
                for row, keep in zip(rows, keeps, strict=True)
            ]
            for rows, keeps in zip(ids, text_mask, strict=True)
        ]
        length = mask.sum(2).max()
        ids, mask = ids[..., :length], mask[..., :length]
        return Completions(ids, mask, text, is_end.any(2))

    def encode_responses(
        self, texts: list[str], after: list[str] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One response text per prompt, teacher-forced: ids and mask [B, 1, T], each closed by the
        end token.

        after: a beginning of each response that is fed as well but not in the mask. Both are one
        text to the tokenizer, as what a model writes is; a token that reaches into both, such as
        Qwen's "><" of </think><answer>, is in the mask. Raises ValueError for no text.
        """
        if not texts:
            raise ValueError("there is no response to encode")
        tokenizer, after = self.processor.tokenizer, after or [""] * len(texts)
        rows, starts = [], []
        for begin, text in zip(after, texts, strict=True):
            whole = tokenizer(begin + text, add_special_tokens=False, return_offsets_mapping=True)
            rows.append([*whole.input_ids, self.end_ids[0]])
            starts.append(sum(end <= len(begin) for _, end in whole.offset_mapping))
        length = max(map(len, rows))
        ids = torch.full((len(rows), 1, length), self.end_ids[0], device=self.device)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, (row, start) in enumerate(zip(rows, starts)):
            ids[i, 0, : len(row)] = torch.tensor(row)
            mask[i, 0, start : len(row)] = True
        return ids, mask

    def prefix(self, inputs: BatchFeature) -> tuple[Tensor, Prefix]:
        """The prompts' own pass, for `forward` in several passes: their hidden states [B, P, d],
        which `Prefix.cut` takes, and their keys and values."""
        found = Prefix()
        hidden = self.core.model(
            inputs_embeds=self._embed(inputs),
            attention_mask={
                "full_attention": branch_mask(
                    inputs["attention_mask"], [], self.core.dtype, "shared_prefix", found
                )
            },
            position_ids=_positions(self.core.model, inputs),
            use_cache=False,
        ).last_hidden_state
        return hidden, found

    def forward(
        self,
        inputs: BatchFeature,
        ids: Tensor,
        mask: Tensor | None = None,
        prefix: Prefix | None = None,
    ) -> TokenScores:
        """log pi(ids | prompt) with K branches behind one prompt.
        [B, P], [B, K, T], [B, K, T] -> TokenScores

        Row b is [prompt_b | y_1 | ... | y_K]. In the 4-D mask a branch sees its prompt and its own
        past; its positions continue from the prompt's last (mRoPE) position. Equal to K separate
        rows up to rounding. mask: the tokens to be scored, by default all. The model gets no token
        after a branch's last one, and the head runs on these tokens only; elsewhere log-prob and
        entropy are 0. Attention that takes no 4-D mask scores plain rows. prefix: the prompts have
        run. Raises ValueError where K or T is 0.
        """
        if ids.ndim != 3 or not ids.numel():
            raise ValueError(
                f"ids must be [B, K, T] with at least one token each, got shape {tuple(ids.shape)}"
            )
        body, prompts = self.core.model, inputs["input_ids"]
        attention = self.core.config.text_config._attn_implementation
        p, t = prompts.shape[1], ids.shape[2]
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if attention not in ("shared_prefix", "eager", "sdpa", "flex_attention"):
            warnings.warn(
                f"{attention} attention takes no 4-D mask: scoring shares no prompt", stacklevel=2
            )
            return self.score_plain(inputs, ids, mask)
        # branch by branch, as many tokens as its longest row in the batch; the last token predicts
        # nothing
        ends = (
            (mask.any(0) * torch.arange(1, t + 1, device=ids.device)).amax(-1).clamp_min(1).tolist()
        )
        if prefix and max(ends) == 1:
            ends[0] = 2  # no row is empty; its hidden state is cut off below
        lengths = [end - 1 for end in ends]
        branches = torch.cat([ids[:, i, :n] for i, n in enumerate(lengths)], 1)
        position = _positions(body, inputs)  # [3, B, P]
        # [B]: after the prompt's text, although a long clip's time may run past it
        start = position[0, :, -1] + 1
        steps = torch.cat([torch.arange(n, device=ids.device) for n in lengths])
        embeds = self.core.get_input_embeddings()(branches)
        after = (start[:, None] + steps).expand(3, -1, -1)
        if prefix is None:
            embeds = torch.cat([self._embed(inputs), embeds], 1)
            after = torch.cat([position, after], 2)
        hidden = body(
            inputs_embeds=embeds,
            attention_mask={
                "full_attention": branch_mask(
                    inputs["attention_mask"], lengths, self.core.dtype, attention, prefix
                )
            },
            position_ids=after,
            use_cache=False,
        ).last_hidden_state
        if prefix is None:
            prompt, own = hidden[:, :p], hidden[:, p:]
        else:
            prompt, own = prefix.hidden, hidden
        # the prompt's end predicts y_1
        split, last = own.split(lengths, 1), prompt[:, -1:]
        padded = [F.pad(torch.cat([last, x], 1), (0, 0, 0, t - n)) for x, n in zip(split, ends)]
        states = torch.stack(padded, 1)  # [B, K, T, d]
        return self._scores(states, ids, mask, prompt)

    def score_plain(
        self, inputs: BatchFeature, ids: Tensor, mask: Tensor | None = None
    ) -> TokenScores:
        """The same numbers with one row per completion and no sharing."""
        k, t = ids.shape[1:]
        rows, p = ids.flatten(0, 1), inputs["input_ids"].shape[1]
        position = _positions(self.core.model, inputs)
        steps = (position[0, :, -1:] + 1 + torch.arange(t, device=ids.device)).expand(3, -1, -1)
        embeds = self._embed(inputs).repeat_interleave(k, 0)
        hidden = self.core.model(
            inputs_embeds=torch.cat([embeds, self.core.get_input_embeddings()(rows)], 1),
            attention_mask=torch.cat(
                [inputs["attention_mask"].repeat_interleave(k, 0), torch.ones_like(rows)], 1
            ),
            position_ids=torch.cat([position, steps], 2).repeat_interleave(k, 1),
            use_cache=False,
        ).last_hidden_state
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        return self._scores(
            hidden[:, p - 1 : -1].unflatten(0, ids.shape[:2]), ids, mask, hidden[::k, :p]
        )

    def _scores(self, hidden: Tensor, ids: Tensor, mask: Tensor, prompt: Tensor) -> TokenScores:
        found = log_prob(hidden[mask], self.core.lm_head.weight, ids[mask], self.bias)
        logp, entropy = (
            torch.zeros(ids.shape, dtype=x.dtype, device=x.device).masked_scatter(mask, x)
            for x in found
        )
        return TokenScores(logp, entropy, hidden, prompt)

    def head(self, trained: bool = True) -> tuple[Tensor, Tensor]:
        """W [V, d] and b [V] (`bias`): softmax(W h + b) is the distribution that is sampled.

        trained = False: W without gradient.
        """
        weight = self.core.lm_head.weight
        return weight if trained else weight.detach(), self.bias

    def save(self, folder: str | Path, merge: bool = True) -> None:
        """Write weights and processor, so that plain `from_pretrained` loads them. LoRA's are
        merged in, or written alone, as an adapter of the model that it was put on (whose path it
        remembers)."""
        own = self.core.generation_config
        with plain_generation(self.core):  # transformers refuses to write some that it has read
            if isinstance(self.model, PeftModel) and merge:
                # a copy, because training may go on, and on the CPU, because a second model may not
                # fit on the device
                device = self.device
                merged = copy.deepcopy(self.model.cpu()).merge_and_unload()
                self.model.to(device)
                merged.save_pretrained(folder)
            elif isinstance(self.model, PeftModel):
                self.model.save_pretrained(folder, selected_adapters=["default"])
            else:
                self.model.save_pretrained(folder)
        if (Path(folder) / "generation_config.json").exists():
            own.to_json_file(Path(folder) / "generation_config.json")
        self.processor.save_pretrained(folder)


def rows_of(inputs: BatchFeature, rows: slice) -> BatchFeature:
    """The inputs of some prompts of a batch, as `VLM.encode` gives them."""
    kinds, mask = inputs["mm_token_type_ids"], inputs["attention_mask"]
    start = mask.shape[1] - int(mask[rows].sum(1).max())  # what no row needs as padding goes
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    found = {name: inputs[name][rows, start:] for name in names}
    for kind, name, pixels in ((1, "image", "pixel_values"), (2, "video", "pixel_values_videos")):
        tokens = (kinds == kind).sum(1).tolist()
        first, count = sum(tokens[: rows.start]), sum(tokens[rows])
        if not count:
            continue
        patches = inputs[f"{name}_grid_thw"].prod(1)
        merged = int(patches.sum()) // sum(tokens)  # patches of a token
        ends = patches.cumsum(0)
        own = (ends > first * merged) & (ends <= (first + count) * merged)
        found[f"{name}_grid_thw"] = inputs[f"{name}_grid_thw"][own]
        if kind == 2 and "second_per_grid_ts" in inputs:
            found["second_per_grid_ts"] = inputs["second_per_grid_ts"][own]
        for key, size in ((f"{name}_features", 1), (pixels, merged)):
            if key in inputs:
                found[key] = inputs[key][first * size : (first + count) * size]
    return BatchFeature(found)


def _patches_times_kernel(conv: nn.Conv3d, patches: Tensor) -> Tensor:
    """[N, C, T, P, P] -> [N, d]"""
    return F.linear(patches.flatten(1), conv.weight.flatten(1), conv.bias)


def _positions(body: nn.Module, inputs: BatchFeature) -> Tensor:
    """mRoPE positions of the left-padded prompts [3, B, P]."""
    names = (
        "mm_token_type_ids",
        "image_grid_thw",
        "video_grid_thw",
        "second_per_grid_ts",
        "attention_mask",
    )
    return body.get_rope_index(
        inputs["input_ids"], **{name: inputs[name] for name in names if name in inputs}
    )[0]


@contextmanager
def plain_generation(model: nn.Module):
    """Context in which `generate` ignores the checkpoint's generation_config.

    transformers would fill gaps from it: a repetition penalty or T = 1e-6 (released checkpoints
    ship both), beams, a minimum length. Samples must follow the distribution that is scored. The
    saved model keeps the checkpoint's.
    """
    before, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before


def end_token_ids(model: nn.Module, tokenizer) -> list[int]:
    """The end-of-turn token, first in the list, and any other token the checkpoint treats as an
    end.

    Qwen lists its padding token as an end too; as padding it can never be sampled, so it is not one
    here.
    """
    listed = model.generation_config.eos_token_id
    listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    return list(
        dict.fromkeys([tokenizer.eos_token_id, *(i for i in listed if i != tokenizer.pad_token_id)])
    )


def banned_token_ids(model: nn.Module, tokenizer, end_ids: list[int]) -> list[int]:
    """The tokens that no response holds: never sampled, and so never scored.

    Control tokens (a sampled image token has no image behind it, and a turn of another speaker is
    no response), and the rows of the head that stand for no token: real checkpoints pad the
    vocabulary. Stage tags may be special tokens of a checkpoint, and stay.
    """
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    special = {
        str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
    control = {i for token, i in special.items() if token not in reasoning.TAGS}
    control |= {getattr(model.config, name) for name in names} | {tokenizer.pad_token_id}
    control -= {None, *end_ids}
    nothing = set(range(model.lm_head.weight.shape[0])) - set(tokenizer.get_vocab().values())
    return sorted(control | nothing)
