"""Models of the published shapes with random weights, made on the card, for gpu.py's parts."""

import sys
from functools import cache
from pathlib import Path

import torch
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from bench import one_step
from engine import memory, pretrained
from engine.vlm import VLM
from world import models

NAMES = {"3b": "Qwen2.5-VL-3B-Instruct", "7b": "Qwen2.5-VL-7B-Instruct"}
TINY_TEXT = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=1024)
TINY_TEXT |= dict(num_attention_heads=4, num_key_value_heads=2)
TINY_VISION = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=4)
TINY_VISION |= dict(fullatt_block_indexes=[1])
REAL = 151_665  # tokens of the real vocabulary
MARKS = {"image": "image_pad", "video": "video_pad"}
MARKS |= {"vision_start": "vision_start", "vision_end": "vision_end"}
RANK = 16  # of LoRA


class NotRun(Exception):
    """Why a part cannot run here, in one line."""


@cache
def processor(real: bool) -> Qwen2_5_VLProcessor:
    """With the real vocabulary, or the embedded world's."""
    if real:
        sys.path.append(str(Path(__file__).parent.parent / "tests"))
        import qwen

        tokenizer = qwen.tokenizer()
    else:
        tokenizer = models.make_tokenizer()
    size = {"shortest_edge": 3136, "longest_edge": one_step.PIXELS}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size),
        tokenizer,
        Qwen2VLVideoProcessor(size=size),
        chat_template=tokenizer.chat_template,
    )


def make(size: str, device: torch.device, dtype: str, text=None, vision=None) -> tuple:
    """transformers' own model with its own random weights, always the same, and its processor."""
    config = memory.published(NAMES[size], text, vision)
    its = processor(real=config.text_config.vocab_size >= REAL)
    ids = its.tokenizer.convert_tokens_to_ids
    for name, token in MARKS.items():
        setattr(config, f"{name}_token_id", ids(f"<|{token}|>"))
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    return model, its


def policy_of(
    size: str, device: torch.device, dtype: str, text=None, vision=None, **options
) -> VLM:
    """The policy, with an end token that is never sampled: a row of the head without a token."""
    options = {"max_pixels": one_step.PIXELS} | options
    policy = pretrained.as_policy(*make(size, device, dtype, text, vision), **options).to(device)
    policy.end_ids = [policy.core.lm_head.weight.shape[0] - 1]
    return policy
