"""A checkpoint in the shape of the released Qwen2.5-VL: its whole vocabulary, special tokens and
files, with two small layers of random weights.

qwen_vocabulary.xz: the 151,643 byte sequences of Qwen2's and Qwen2.5's vocabulary in order of rank,
each behind its length in one byte; from qwen.tiktoken of the package dashscope (Apache-2.0).
"""

import json
import lzma
from functools import cache
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from world.models import CHAT_TEMPLATE

# in order of their ids, from 151,643 on
SPECIAL = (
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> "
    "<|box_end|> <|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> "
    "<|image_pad|> <|video_pad|>"
).split()
ORDINARY = (  # added, and not special
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> "
    "<|repo_name|> <|file_sep|>"
).split()
WORDS = (  # Qwen2's way to part a text before its merges
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SIZES = {"3b": (151_936, True), "7b": (152_064, False)}  # rows of the head; is it the embedding?


@cache
def tokens() -> list[bytes]:
    raw = lzma.decompress(Path(__file__).with_name("qwen_vocabulary.xz").read_bytes())
    found, at = [], 0
    while at < len(raw):
        found.append(raw[at + 1 : at + 1 + raw[at]])
        at += 1 + raw[at]
    return found


@cache
def tokenizer() -> Qwen2Tokenizer:
    ranks = {token: rank for rank, token in enumerate(tokens())}
    as_text = bytes_to_unicode()

    def word(token: bytes) -> str:
        return "".join(as_text[byte] for byte in token)

    merges = []
    for token in ranks:  # in order of rank: every split of it into two tokens is a merge
        parts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [pair for pair in parts if pair[0] in ranks and pair[1] in ranks]
        merges += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    vocabulary = {word(token): rank for token, rank in ranks.items()}
    bpe = Tokenizer(models.BPE(vocabulary, [(word(a), word(b)) for a, b in merges]))
    bpe.normalizer = normalizers.NFC()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in SPECIAL])
    bpe.add_tokens([AddedToken(s, normalized=False, special=False) for s in ORDINARY])
    made = Qwen2Tokenizer(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL[1:],
        model_max_length=131_072,
    )
    made.chat_template = CHAT_TEMPLATE
    return made


def write(folder: Path, size: str) -> Path:
    """The checkpoint's folder: bfloat16 weights, a generation_config that would change every
    sample, a preprocessor_config and no video processor's."""
    rows, tied = SIZES[size]
    text = {
        "vocab_size": rows, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128_000,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3],
        },
        "tie_word_embeddings": tied, "bos_token_id": 151_643, "eos_token_id": 151_645,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4,
        "out_hidden_size": 64, "fullatt_block_indexes": [1],
    }  # fmt: skip
    ids = tokenizer().convert_tokens_to_ids
    marks = {f"{name}_token_id": ids(f"<|{token}|>") for name, token in (
        ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"),
        ("vision_end", "vision_end"),
    )}  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, **marks, tie_word_embeddings=tied
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=151_643, pad_token_id=151_643, eos_token_id=[151_645, 151_643],
        do_sample=True, repetition_penalty=1.05, temperature=1e-6,
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "Qwen2VLImageProcessor",
                "processor_class": "Qwen2_5_VLProcessor",
                "min_pixels": 3136,
                "max_pixels": 12_845_056,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "merge_size": 2,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
            }
        )  # fmt: skip
    )
    return folder
