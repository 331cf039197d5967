"""Everything that touches transformers: load, LoRA, encode, generate groups, score tokens, a text-only judge.

The prompt of a vision-language model is long, its completions are short, and all of a group share it. So the prompt
runs once per group, in generation (one prefill, its cache repeated) and in scoring (one row [prompt | y_1 | ... | y_K]
whose branches see the prompt and themselves only). Both are exact; `score_plain` is the form they are tested against.

Shapes: B prompts, K completions per prompt, P prompt tokens (left-padded), T completion tokens (right-padded).
"""

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from qwen_vl_utils.vision_process import fetch_image
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    GenerationConfig,
)

LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"  # the language model's linears, never the vision's


@dataclass
class Completions:
    """ids [B, K, T]; mask [B, K, T], 1 up to and including the first end token; text[b][k]; ended [B, K]."""

    ids: Tensor
    mask: Tensor
    text: list[list[str]]
    ended: Tensor


class TokenScores(NamedTuple):
    """At every completion token: its log-prob [B, K, T], the entropy of its distribution [B, K, T], and what led to
    them, the head's input [B, K, T, d] and its output [B, K, T, V]. prompt [B, P, d]: the prompt's hidden states."""

    logp: Tensor
    entropy: Tensor
    hidden: Tensor
    logits: Tensor
    prompt: Tensor


class VLM(nn.Module):
    """A Qwen2.5-VL and its processor. `forward` is scoring, so that DDP and FSDP wrap the pass that has a backward."""

    def __init__(self, model: nn.Module, processor, min_pixels: int, max_pixels: int):
        super().__init__()
        self.model, self.processor = model, processor
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        config, tokenizer = self.core.config, processor.tokenizer
        self.end_ids = _end_ids(self.core, tokenizer)
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        banned = {getattr(config, name) for name in names} | {tokenizer.pad_token_id}
        # a sampled image token has no image behind it and breaks scoring: never sampled, and so never scored
        self.banned_ids = sorted(banned - {None} - set(self.end_ids))

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
        generation and scoring get the very same tensors. Nothing is ever truncated.
        """
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
        return inputs.to(self.device)

    @torch.no_grad()
    def generate(self, inputs: BatchFeature, n: int, max_new_tokens: int, sample: bool = True) -> Completions:
        """n completions per prompt, at T = 1 from the whole distribution (D-8), or greedy.

        The prompt, and with it the vision tower, runs once; its key-value cache is then repeated n times.
        """
        core, prompts = self.core, inputs["input_ids"]
        was_training, _ = self.training, self.eval()
        cache = core.model(**inputs, use_cache=True).past_key_values
        cache.crop(-1)  # `generate` feeds the last prompt token again and so gets its logits
        cache.batch_repeat_interleave(n)
        # the positions that scoring uses; transformers' own deltas count from the largest, a long clip's time
        start = _positions(core.model, inputs)[0, :, -1] + 1
        core.model.rope_deltas = (start - inputs["attention_mask"].sum(1)).repeat_interleave(n)[:, None]
        sequences = core.generate(
            input_ids=prompts.repeat_interleave(n, 0),
            attention_mask=inputs["attention_mask"].repeat_interleave(n, 0),
            past_key_values=cache,
            # spelled out: released checkpoints ship a repetition penalty and T = 1e-6 in their generation_config,
            # and log-probs are those of the plain distribution
            generation_config=GenerationConfig(
                do_sample=sample,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                repetition_penalty=1.0,
                max_new_tokens=max_new_tokens,
                suppress_tokens=self.banned_ids,
                eos_token_id=self.end_ids,
                pad_token_id=self.processor.tokenizer.pad_token_id,
            ),
        )
        self.train(was_training)
        ids = sequences[:, prompts.shape[1] :]
        is_end = torch.isin(ids, torch.tensor(self.end_ids, device=ids.device))
        mask = (is_end.cumsum(1) - is_end.int()) == 0  # first end token kept, whatever follows it dropped
        length = mask.sum(1).tolist()
        text = [
            self.processor.tokenizer.decode(row[:k], skip_special_tokens=True)
            for row, k in zip(ids, length, strict=True)
        ]
        groups = [text[i : i + n] for i in range(0, len(text), n)]
        shape = (len(prompts), n, -1)
        return Completions(ids.view(shape), mask.view(shape), groups, is_end.any(1).view(shape[:2]))

    def encode_responses(self, texts: list[str], after: list[str] | None = None) -> tuple[Tensor, Tensor]:
        """One response text per prompt, teacher-forced: ids and mask [B, 1, T], each closed by the end token.

        after: a beginning of each response that is fed as well but not in the mask.
        """
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

    def forward(self, inputs: BatchFeature, ids: Tensor) -> TokenScores:
        """log pi(ids | prompt) with K branches behind one prompt.   [B, P], [B, K, T] -> TokenScores

        Row b is [prompt_b | y_1 | ... | y_K]; in the 4-D mask a branch sees its prompt and its own past, and its
        positions go on from the prompt's last (mRoPE) position. Equal to K separate rows up to rounding.
        """
        body, prompts = self.core.model, inputs["input_ids"]
        (b, p), (_, k, t) = prompts.shape, ids.shape
        fed = ids[..., :-1]  # a branch's last token predicts nothing
        position = _positions(body, inputs)  # [3, B, P]
        start = position[0, :, -1] + 1  # [B]: after the prompt's text, although a long clip's time may run past it
        steps = torch.arange(t - 1, device=ids.device).repeat(k)
        branch_position = (start[:, None] + steps).expand(3, -1, -1)
        hidden = body(
            input_ids=torch.cat([prompts, fed.reshape(b, -1)], 1),
            attention_mask=_branch_mask(inputs["attention_mask"], k, t - 1, self.core.dtype),
            position_ids=torch.cat([position, branch_position], 2),
            use_cache=False,
            **{name: inputs[name] for name in _PIXELS if name in inputs},
        ).last_hidden_state
        first = hidden[:, p - 1 : p, None].transpose(1, 2).expand(-1, k, -1, -1)  # the prompt's end predicts y_1
        states = torch.cat([first, hidden[:, p:].unflatten(1, (k, t - 1))], 2)  # [B, K, T, d]
        return self._scores(states, ids, hidden[:, :p])

    def score_plain(self, inputs: BatchFeature, ids: Tensor) -> TokenScores:
        """The same numbers with one row per completion and no sharing: the reference for tests. Takes B = 1."""
        prompts, rows = inputs["input_ids"], ids[0]
        k, p = len(rows), prompts.shape[1]
        types = inputs["mm_token_type_ids"]
        media = {name: torch.cat([inputs[name]] * k) for name in _PIXELS if name in inputs}
        if "second_per_grid_ts" in inputs:
            media["second_per_grid_ts"] = [s for s in inputs["second_per_grid_ts"]] * k
        hidden = self.core.model(
            input_ids=torch.cat([prompts.expand(k, -1), rows], 1),
            attention_mask=torch.cat([inputs["attention_mask"].expand(k, -1), torch.ones_like(rows)], 1),
            mm_token_type_ids=torch.cat([types.expand(k, -1), torch.zeros_like(rows)], 1),
            use_cache=False,
            **media,
        ).last_hidden_state
        return self._scores(hidden[None, :, p - 1 : -1], ids, hidden[:1, :p])

    def _scores(self, hidden: Tensor, ids: Tensor, prompt: Tensor) -> TokenScores:
        logits = self.core.lm_head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # never a log-softmax in half precision
        banned = torch.tensor(self.banned_ids, device=logits.device)
        logits = logits.index_fill(-1, banned, torch.finfo(logits.dtype).min)  # the distribution that is sampled
        log_pi = logits.log_softmax(-1)
        logp = log_pi.gather(-1, ids[..., None]).squeeze(-1)
        entropy = -(log_pi.detach().exp() * log_pi.detach()).sum(-1)
        return TokenScores(logp, entropy, hidden, logits, prompt)

    def save(self, folder: str | Path) -> None:
        """Write weights (LoRA merged in) and processor, so that plain `from_pretrained` loads them."""
        if hasattr(self.model, "merge_adapter"):
            # merging into a copy, because training may go on
            import copy

            copy.deepcopy(self.model).merge_and_unload().save_pretrained(folder)
        else:
            self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


_PIXELS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")


def _positions(body: nn.Module, inputs: BatchFeature) -> Tensor:
    """mRoPE positions of the left-padded prompts [3, B, P]."""
    names = ("mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "attention_mask")
    return body.get_rope_index(inputs["input_ids"], **{name: inputs[name] for name in names if name in inputs})[0]


def _branch_mask(prompt_mask: Tensor, k: int, t: int, dtype: torch.dtype) -> Tensor:
    """Additive attention mask [B, 1, L, L], L = P + k t: 0 where a row may look, the most negative number elsewhere."""
    b, p = prompt_mask.shape
    length, device = p + k * t, prompt_mask.device
    branch = torch.cat([torch.zeros(p, device=device), torch.arange(k, device=device).repeat_interleave(t) + 1])
    see = (branch[None] == 0) | (branch[None] == branch[:, None])  # the prompt, or the same branch
    see = see & torch.ones(length, length, dtype=torch.bool, device=device).tril()
    valid = torch.cat([prompt_mask.bool(), prompt_mask.new_ones(b, k * t).bool()], 1)
    see = see[None] & valid[:, None] | torch.eye(length, dtype=torch.bool, device=device)  # padding sees itself: no NaN
    return torch.zeros(see.shape, dtype=dtype, device=device).masked_fill(~see, torch.finfo(dtype).min)[:, None]


def _end_ids(model: nn.Module, tokenizer) -> list[int]:
    """The end-of-turn token, first in the list, and any other token the checkpoint treats as an end.

    Qwen lists its padding token as an end too; as padding it can never be sampled, so it is not one here.
    """
    listed = model.generation_config.eos_token_id
    listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    return list(dict.fromkeys([tokenizer.eos_token_id, *(i for i in listed if i != tokenizer.pad_token_id)]))


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
    """A Qwen2.5-VL checkpoint (folder or hub id). Full fine-tuning of the language model, or LoRA on its linears.

    The vision tower is frozen unless `train_vision`. `trainable=False` freezes everything: reference, evaluation.
    """
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    processor = AutoProcessor.from_pretrained(path)
    model.requires_grad_(trainable)
    if not train_vision:
        model.model.visual.requires_grad_(False)
    if gradient_checkpointing and trainable:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    if lora_rank and trainable:
        config = LoraConfig(r=lora_rank, lora_alpha=2 * lora_rank, target_modules=LORA_TARGETS)
        model = get_peft_model(model, config)
    return VLM(model, processor, min_pixels, max_pixels).train(trainable)


class LocalJudge:
    """A text-only causal LM that answers prompts greedily: the judge of the Caption Reward (`caption_reward.Judge`)."""

    def __init__(self, path: str, device: str | torch.device = "cpu", batch: int = 256, max_new_tokens: int = 16):
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype="auto").to(device).eval()
        self.batch, self.max_new_tokens = batch, max_new_tokens

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> list[str | None]:
        replies = []
        for i in range(0, len(prompts), self.batch):
            turns = [[{"role": "user", "content": text}] for text in prompts[i : i + self.batch]]
            inputs = self.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
            ).to(self.model.device)
            out = self.model.generate(
                **inputs,
                generation_config=GenerationConfig(
                    do_sample=False,
                    max_new_tokens=self.max_new_tokens,
                    repetition_penalty=1.0,
                    eos_token_id=self.tokenizer.eos_token_id,
                    pad_token_id=self.tokenizer.pad_token_id,
                ),
            )
            new = out[:, inputs["input_ids"].shape[1] :]
            replies += self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return replies
