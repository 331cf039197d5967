"""What a run needs of each GPU, computed from the model's shapes and not measured.

Bytes: weights, gradients, AdamW's two moments (in float32, with a float32 copy of half-precision
weights), the reference where full fine-tuning needs a copy (with --reference cpu its head alone),
the activations of one pass (with checkpointing: every layer's input, and one layer in full), keys
and values of generation (the prompt's, or with --static_decoding all, in float32), the weights of a
local judge and of OViP's diffusion model. A reference response of the cold start is taken to be as
long as --max_new_tokens.
Not counted: what the allocator takes on top, and the vision tower's activations (--train_vision).
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from transformers import PreTrainedConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from engine.judges import is_url
from engine.pretrained import opened
from engine.shared_prefix import GROUP

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
BESIDE = {  # parameters of models beside the policy, from their model cards
    "Qwen2.5-1.5B-Instruct": 1.54e9,
    "Qwen2.5-7B-Instruct": 7.61e9,
    "FLUX.1-dev": 16.9e9,  # 12 and, of its text encoder, 4.8
}
QUESTION = 100  # tokens of text beside picture or clip
USABLE = 0.9  # share of a card; the rest is the driver's and the allocator's [choice]
# what changes memory and not the update
EXACT = {
    "completions_per_pass": 2,
    "reference": "cpu",
    "prompts_per_pass": 1,
    "gradient_checkpointing": True,
    "select_batch": 1,
}
# that a token launches in bfloat16, counted: in a layer without and with LoRA, and outside
KERNELS, KERNELS_OUTSIDE = (55, 97), 71
RANK = 16  # of the LoRA that is proposed


class Shape(NamedTuple):
    """Sizes of a model, and its parameters: kv: of a token's keys; head: of one; text: all but the
    vision tower's."""

    hidden: int
    layers: int
    inner: int
    kv: int
    vision: int
    linears: int
    head: int
    text: int


def published(model: str, text: dict | None = None, vision: dict | None = None) -> Qwen2_5_VLConfig:
    """The configuration of a released checkpoint. Raises KeyError for one that is not in TEXT.
    text, vision: what is another number in it."""
    text = TEXT[name := model.split("/")[-1]] | (text or {})
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    sections = [half // 4, 3 * half // 8, 3 * half // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    text |= {"rope_parameters": rope, "max_window_layers": text["num_hidden_layers"]}
    text |= {"max_position_embeddings": 128_000}
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=VISION | (vision or {}) | {"out_hidden_size": text["hidden_size"]},
        tie_word_embeddings=name.endswith("3B-Instruct"),
    )


def shape_of(config: PreTrainedConfig) -> Shape:
    """Counted on transformers' own classes, on the meta device."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    text, count = config.text_config, lambda module: sum(p.numel() for p in module.parameters())
    body = model.model.language_model
    return Shape(
        text.hidden_size,
        text.num_hidden_layers,
        text.intermediate_size,
        text.num_key_value_heads * (text.hidden_size // text.num_attention_heads),
        count(model.model.visual),
        count(body.layers),
        model.lm_head.weight.numel(),
        count(model) - count(model.model.visual),
    )


def prompt_tokens(cfg, clips: bool = True) -> int:
    """Tokens of the longest prompt: a picture, or a clip whose frames go in pairs."""
    return cfg.max_pixels // 784 * (math.ceil(cfg.max_frames / 2) if clips else 1) + QUESTION


def beside(model: str) -> float | None:
    """Bytes of a model beside the policy, in half precision; None where they are not known."""
    name, files = model.rstrip("/").split("/")[-1], [*Path(model).glob("*.safetensors")]
    if not model or is_url(model):
        return 0.0
    if name in BESIDE:
        return 2 * BESIDE[name]
    return float(sum(file.stat().st_size for file in files)) if files else None


def needs(cfg, shape: Shape, prompt: int, processes: int = 1, sharded: bool = False) -> dict:
    """Bytes by part on each GPU, the most of training and of generation, the parameters that are
    trained, and the work of one update of one process: operations of scoring and the update, bytes
    that decoding reads and kernels that it launches. prompt: tokens of the longest."""
    size = 2 if cfg.dtype == "bfloat16" else 4 if cfg.dtype == "float32" else 8
    d, layers, t = shape.hidden, shape.layers, cfg.max_new_tokens
    shards, is_ovip, static = processes if sharded else 1, cfg.method == "ovip", cfg.static_decoding
    width = 2 * d + 2 * shape.kv  # of q, k, v, o together
    trained = shape.text + cfg.train_vision * shape.vision
    whole = (shape.text + shape.vision) * size  # what sampling needs in any case
    outside = shape.text - shape.linears  # of the layers
    training, reference = {}, 0.0
    if cfg.lora_rank:
        # in + out of the seven linears, about
        trained = layers * cfg.lora_rank * (4 * d + width + 3 * (d + shape.inner))
        # weights, gradient and moments; where training goes on with one also that, the reference
        begun = cfg.model and Path(cfg.model, "adapter_config.json").exists()
        numbers = 5 if begun or cfg.sft_steps or cfg.sft_epochs else 4
        training["adapter and AdamW"] = optimizer = trained * 4 * numbers / shards
    else:
        # moments, and a copy of half-precision weights
        training["AdamW"] = optimizer = trained * 4 * (3 if size == 2 else 2) / shards
        training["gradients"] = trained * 4 / shards
        if cfg.beta or is_ovip:
            reference = whole if cfg.reference == "copy" else shape.head * size
        if cfg.nce_weight and cfg.nce_feature != "hidden_mean":
            training["Eq. 4"] = 3 * shape.head * size
    share, pairs = (math.ceil(n / processes) for n in (cfg.prompts_per_step, cfg.pairs))
    at_once = min(cfg.prompts_per_pass or share, share)
    own = cfg.group_size * t
    key = 2 * layers * shape.kv * size  # and value, of a token in all layers
    wide = max(1, 4 / size)  # in float32
    a_pass = min(cfg.completions_per_pass or cfg.group_size, cfg.group_size) * t
    together = min(a_pass, max(t, GROUP * prompt))  # tokens of branches in a group
    tokens = at_once * (prompt + a_pass)
    mask = at_once * math.ceil(a_pass / together) * together * (prompt + together) * size
    if is_ovip:  # A+ and A- behind one prompt; A+ without an image, and with another
        pair = 2 * prompt + 4 * t if cfg.negatives else prompt + 2 * t
        tokens, mask = min(cfg.prompts_per_pass or pairs, pairs) * pair, 0
    if cfg.sft_steps or cfg.sft_epochs:
        rows = math.ceil(cfg.sft_batch / processes)
        tokens = max(tokens, min(cfg.prompts_per_pass or rows, rows) * (prompt + t))
    one_layer = tokens * (11 * d + width + 4 * shape.inner) * size
    if cfg.lora_rank and size == 2:
        # peft has each linear's input in float32; the frozen linear keeps none
        one_layer += tokens * ((6 * d + shape.inner) * 4 - (3 * d + shape.inner) * size)
    inputs = tokens * d * size * layers
    kept = inputs if cfg.gradient_checkpointing else one_layer * (layers - 1)
    activations = kept + one_layer + mask + 3 * 4 * 2**26
    if a_pass < own:  # the gradients of the prompts' keys and values
        activations += key * at_once * prompt
    if sharded and not cfg.lora_rank:  # or the gradients outside the layers, before they are shared
        activations = max(activations, outside * (size + 4))
    # sharded: what is outside the layers, and two layers at a time
    outermost = (outside + shape.vision + 2 * shape.linears / layers) * size
    frozen = whole / shards if cfg.lora_rank else 0  # beside these, a shard of all
    other = {"judge": beside(cfg.judge) or 0.0, "diffusion": 0.0}
    if cfg.negatives == "diffusion":
        other["diffusion"] = beside(cfg.diffusion) or 0.0
    parts = {"weights": outermost + frozen if sharded else whole, **training}
    parts |= {"reference": reference, "activations": activations, **other}

    def cache(prompts: int, responses: int) -> float:
        return key * prompts * (prompt * wide + responses * t * (wide if static else 1))

    # what a token reads: the prompts, and of its own half the room on average, in half precision
    # also written and read in float32; or all of the room
    reads = prompt * wide + own * (wide if static else 0.5 + wide * (wide > 1))

    generation = [
        # of one prompt: sampling takes all that a process has, and fewer where they do not fit
        cache(1, cfg.group_size) + reference + optimizer + frozen * sharded + sum(other.values()),
        cache(cfg.eval_batch, 1) + other["judge"],
    ]
    if cfg.selection:
        generation.append(cache(cfg.select_batch, cfg.responses) + other["judge"])
    step = cfg.prompts_per_step / processes * (prompt + own)
    passes = 1 + 2 + cfg.gradient_checkpointing + (cfg.beta > 0)
    passes -= bool(cfg.lora_rank)  # frozen weights need no gradient
    return {
        "parts": parts,
        "training": sum(parts.values()),
        "generation": whole + max(generation),
        "trained": trained,
        "flops": 2 * step * passes * shape.linears + 2 * step * (4 + 1) * shape.head,
        "read": t * ((shape.linears + shape.head) * size + key * share * reads),
        "launches": t * (layers * KERNELS[bool(cfg.lora_rank)] + KERNELS_OUTSIDE),
    }


def listed(parts: dict[str, float]) -> str:
    """The parts that are worth a word, in GB."""
    return ", ".join(f"{name} {n / 1e9:.1f}" for name, n in parts.items() if n > 5e7)


def most(cfg, shape: Shape, prompt: int, processes: int = 1, sharded: bool = False) -> float:
    """Bytes of the hungrier of training and generation."""
    need = needs(cfg, shape, prompt, processes, sharded)
    return max(need["training"], need["generation"])


def check(cfg, run, visual_tokens: int) -> None:
    """Say, before anything is loaded, that this GPU is too small for the run. visual_tokens: of the
    longest row."""
    if run.is_main and run.device.type == "cuda":
        card = torch.cuda.get_device_properties(run.device).total_memory
        shape, prompt = shape_of(opened(cfg.start)[2]), visual_tokens + QUESTION
        said = advice(cfg, shape, prompt, card, run.processes, run.sharded)
        if said != "fits":
            run.say(f"warning: this GPU of {card / 1e9:.0f} GB is {said} (computed)")


def advice(
    cfg, shape: Shape, prompt: int, card: float, processes: int = 1, sharded: bool = False
) -> str:
    """Does the run fit on cards of so many bytes? If not: how much it needs, and what would fit."""

    def need(changes: dict, shards: int) -> float:
        changed = SimpleNamespace(**vars(cfg) | changes)
        how = (shards, True) if shards > 1 else (processes, sharded)
        return most(changed, shape, prompt, *how)

    def fitting(always: dict) -> str | None:
        batches = (cfg.prompts_per_step, cfg.sft_batch, *[cfg.pairs] * (cfg.method == "ovip"))
        for shards in (1, 2, 4, 8):
            changes = always | {k: v for k, v in EXACT.items() if getattr(cfg, k) != v}
            if not cfg.splits:
                changes.pop("completions_per_pass", None)
            if need(changes, shards) > USABLE * card or any(n % shards for n in batches):
                continue
            for name in [*changes]:  # those that are not needed go
                fewer = {k: v for k, v in changes.items() if k != name}
                changes = fewer if need(fewer, shards) <= USABLE * card else changes
            flags = " ".join(f"--{name} {str(value).lower()}" for name, value in changes.items())
            return ", ".join([flags] * bool(flags) + [f"FSDP2 on {shards} GPUs"] * (shards > 1))
        return None

    now = need({}, 1)
    if now <= USABLE * card:
        return "fits"
    found = [fitting({})]
    if not (cfg.lora_rank or cfg.train_vision):  # another method, with another learning rate
        found.append(fitting({"lora_rank": RANK}))
    ways = "; or ".join(dict.fromkeys(filter(None, found)))
    return (
        f"too small: {now / 1e9:.0f} GB are needed, and {USABLE * card / 1e9:.0f} can be used. "
        f"Would fit: {ways or 'nothing that is known here'}"
    )
