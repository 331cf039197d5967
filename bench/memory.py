"""What a preset of configs/ needs, computed from the model's shapes and not measured: memory by
part, floors of time.

    python -m bench.memory configs/*.yaml               # one process, or each of several under DDP
    python -m bench.memory configs/*.yaml --shards 8    # each of eight under FSDP2

Parameters are counted on transformers' own classes (on the meta device). Bytes: weights, gradients,
AdamW's two moments (in float32, with a float32 copy of half-precision weights), the reference where
full fine-tuning needs a copy, the activations of one pass (with checkpointing: every layer's input,
and one layer in full), keys and values of generation (the prompt's in float32), the weights of a
local judge. Seconds per update on one GPU of each kind, were it at 40 % of its bf16 rate in scoring
and the update, and at the bandwidth of its memory in decoding; Hugging Face's `generate` is several
times slower than that.
"""

import argparse
import math
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = {  # the published config.json of each
    "Qwen2.5-VL-3B-Instruct": dict(
        hidden_size=2048,
        num_hidden_layers=36,
        intermediate_size=11008,
        num_attention_heads=16,
        num_key_value_heads=2,
        vocab_size=151_936,
    ),
    "Qwen2.5-VL-7B-Instruct": dict(
        hidden_size=3584,
        num_hidden_layers=28,
        intermediate_size=18944,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152_064,
    ),
}
VISION = dict(
    depth=32,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    fullatt_block_indexes=[7, 15, 23, 31],
)
JUDGE = {"Qwen/Qwen2.5-1.5B-Instruct": 1.54e9}  # parameters, from its model card
CARDS = {
    "RTX 4090, 24 GB": (165e12, 1.01e12),
    "H100, 80 GB": (989e12, 3.35e12),
}  # dense bf16 operations, bytes a second
QUESTION = 100  # tokens of text beside the picture


def config_of(name: str, text: dict | None = None, vision: dict | None = None):
    """The published configuration; text, vision: what is another number in it."""
    from transformers import Qwen2_5_VLConfig

    shape = TEXT[name] | (text or {})
    half = shape["hidden_size"] // shape["num_attention_heads"] // 2
    sections = [half // 4, 3 * half // 8, 3 * half // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    layers = shape["num_hidden_layers"]
    return Qwen2_5_VLConfig(
        text_config=shape | {"rope_parameters": rope, "max_window_layers": layers},
        vision_config=VISION | (vision or {}) | {"out_hidden_size": shape["hidden_size"]},
        tie_word_embeddings=name.endswith("3B-Instruct"),
    )


@cache
def parameters(name: str) -> dict[str, float]:
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    shape, config = TEXT[name], config_of(name)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    head = shape["vocab_size"] * shape["hidden_size"]
    linears = sum(p.numel() for p in model.model.language_model.layers.parameters())
    heads = 1 if config.tie_word_embeddings else 2
    whole = linears + model.model.language_model.norm.weight.numel() + head * heads
    return {
        "vision": sum(p.numel() for p in model.model.visual.parameters()),
        "layers": linears,
        "head": head,
        "text": whole,
    }


def needs(cfg, shards: int = 1) -> dict:
    """GB by part, and the work of one update of one process."""
    name = cfg.model.split("/")[-1]
    shape, count = TEXT[name], parameters(name)
    size = 2 if cfg.dtype == "bfloat16" else 4
    d, layers, inner = shape["hidden_size"], shape["num_hidden_layers"], shape["intermediate_size"]
    prompt = cfg.max_pixels // 784 + QUESTION
    # of q, k, v, o together
    width = 2 * d + 2 * shape["num_key_value_heads"] * (d // shape["num_attention_heads"])
    if cfg.lora_rank:
        # in + out of the seven linears, about
        each = layers * cfg.lora_rank * (4 * d + width + 3 * (d + inner))
        training = {"adapter and AdamW": each * 4 * 4}
    else:
        trained = count["text"]
        training = {
            # moments, and a copy of half-precision weights
            "AdamW": trained * 4 * (3 if size == 2 else 2) / shards,
            "gradients": trained * 4 / shards,
            # with --reference cpu, the head alone
            "reference": (trained + count["vision"] if cfg.reference == "copy" else count["head"])
            * size,
        }
        if cfg.nce_weight and cfg.nce_feature != "hidden_mean":
            training["Eq. 4"] = 3 * count["head"] * size
    tokens = (cfg.prompts_per_pass or cfg.prompts_per_step) * (
        prompt + cfg.group_size * cfg.max_new_tokens
    )
    one_layer = tokens * (8 * d + width + 4 * inner) * size
    kept = tokens * d * size * layers if cfg.gradient_checkpointing else one_layer * (layers - 1)
    mask = (tokens - prompt) * tokens * size
    key = 2 * layers * shape["num_key_value_heads"] * (d // shape["num_attention_heads"]) * size
    groups = {"RL": (cfg.prompts_per_pass or cfg.prompts_per_step, cfg.group_size)}
    if cfg.selection:
        groups["selection"] = (cfg.select_batch, cfg.responses)
    cache = {
        k: key * b * (prompt * 4 // size + n * cfg.max_new_tokens) for k, (b, n) in groups.items()
    }
    whole = (count["text"] + count["vision"]) * size  # what sampling needs in any case
    outermost = (
        count["text"] - count["layers"] + count["vision"] + 2 * count["layers"] / layers
    ) * size
    parts = {
        "weights": whole if shards == 1 else outermost,
        **training,
    }  # sharded: two layers at a time
    parts["activations"] = kept + one_layer + mask + 3 * 4 * 2**26
    parts["judge"] = JUDGE.get(cfg.judge, 0) * 2
    generation = whole + training.get("reference", 0) + parts["judge"] + max(cache.values())
    generation += training["AdamW"] if shards > 1 and not cfg.lora_rank else 0
    step = cfg.prompts_per_step / shards * (prompt + cfg.group_size * cfg.max_new_tokens)
    passes = 1 + 2 + cfg.gradient_checkpointing + (cfg.beta > 0)
    passes -= bool(cfg.lora_rank)  # frozen weights need no gradient
    flops = 2 * step * passes * count["layers"] + 2 * step * (4 + 1) * count["head"]
    rounds = math.ceil(cfg.prompts_per_step / shards / groups["RL"][0])
    read = (
        rounds * cfg.max_new_tokens * ((count["layers"] + count["head"]) * size + cache["RL"] / 2)
    )
    return {
        "parts": parts,
        "training": sum(parts.values()),
        "generation": generation,
        "flops": flops,
        "read": read,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("presets", nargs="+", type=Path)
    parser.add_argument(
        "--shards",
        type=int,
        default=1,
        help="processes that share the policy under FSDP2 [default 1]",
    )
    args = parser.parse_args()
    from config import parse_config

    print(
        "Computed, not measured. "
        f"{'One process' if args.shards == 1 else f'Each of {args.shards} processes'}.\n"
    )
    columns = " | ".join(f"{card}: update, decoding, s" for card in CARDS)
    print(f"| preset | training, GB | of it | generation, GB | {columns} |")
    print("|---|---|---|---|" + "---|" * len(CARDS))
    for file in args.presets:
        cfg = parse_config(["--config", str(file)])
        need = needs(cfg, args.shards)
        parts = ", ".join(
            f"{name} {value / 1e9:.1f}" for name, value in need["parts"].items() if value > 5e7
        )
        times = " | ".join(
            f"{need['flops'] / (0.4 * f):.0f}, {need['read'] / b:.0f}" for f, b in CARDS.values()
        )
        print(
            f"| `{file}` | {need['training'] / 1e9:.0f} | {parts} | "
            f"{need['generation'] / 1e9:.0f} | {times} |"
        )


if __name__ == "__main__":
    main()
