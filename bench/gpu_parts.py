"""The parts of gpu.py. Each runs in a process of its own and prints what it found, as JSON."""

import json
import platform
import subprocess
import tempfile
import traceback

import torch
from peft import LoraConfig
from transformers.utils import logging

from bench import gpu_checks, one_step
from bench.gpu_models import NAMES, RANK, TINY_TEXT, TINY_VISION, NotRun, make, policy_of
from config import Config
from engine import memory, pretrained, reason
from engine.learner import AdamW

STEPS, SPARE = 3, 2e9  # the first is warm-up; bytes that CUDA itself takes
WORK = {"prompts": 4, "group": 8, "length": 128, "visual": 576, "words": 8, "micro": 8}
TINY = {"prompts": 2, "group": 2, "length": 4, "visual": 16, "words": 1, "micro": 2}


# --- steps ----------------------------------------------------------------------------------------


def preset(part: str, work: dict) -> Config:
    """The options of a part: `3b-lora`, `7b-full`."""
    size, how = part.split("-")
    return Config(
        method="grpo",
        sft_steps=0,
        eval_batch=1,
        model=f"Qwen/{NAMES[size]}",
        dtype="bfloat16",
        lora_rank=RANK if how == "lora" else 0,
        gradient_checkpointing=True,
        max_pixels=work["visual"] * 784,
        prompts_per_step=work["prompts"],
        group_size=work["group"],
        max_new_tokens=work["length"],
        beta=one_step.BETA,
    )


def predicted(part: str, work: dict) -> float:
    """Bytes, by engine/memory.py."""
    cfg = preset(part, work)
    shape = memory.shape_of(memory.published(cfg.model))
    return memory.most(cfg, shape, memory.prompt_tokens(cfg, clips=False))


def too_small(part: str, needed: dict[str, float], card: float) -> str:
    """Why a part does not fit on a card of so many bytes, and what does; "" if it fits."""
    if needed[part] + SPARE <= card:
        return ""
    fit = [f"{name} ({n / 1e9:.0f})" for name, n in needed.items() if n + SPARE <= card]
    return (
        f"{part} needs {needed[part] / 1e9:.0f} GB (computed by engine/memory.py), the card has "
        f"{card / 1e9:.0f}. " + (f"What fits: {', '.join(fit)}" if fit else "No other part fits")
    )


def step(part: str, device: torch.device, work: dict) -> dict:
    """Our step: seconds by part, the peak of memory, and what no step can do without."""
    size, how = part.split("-")
    needed = {name: predicted(name, work) for name in ("3b-lora", "7b-lora", "3b-full", "7b-full")}
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(0).total_memory
        if why := too_small(part, needed, card):
            raise NotRun(why)
        torch.set_float32_matmul_precision("high")  # as `Run` does
    policy = policy_of(
        size, device, "bfloat16", lora_rank=RANK * (how == "lora"), gradient_checkpointing=True
    )
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = AdamW([{"params": trained}], lr=one_step.RATE, fused=True)
    reference = policy_of(size, device, "bfloat16", trainable=False) if how == "full" else None

    def score(inputs, ids):
        if reference:
            return reference(inputs, ids)
        with policy.base():
            return policy(inputs, ids)

    chats = one_step.chats(one_step.prompts(work["visual"], work["prompts"], work["words"]))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [one_step.ours(policy, score, optimizer, [chats], work)[0] for _ in range(STEPS)]
    inputs, highest = policy.encode(chats), peak(device)
    prompt = inputs["input_ids"].shape[1]
    return {
        "seconds": one_step.medians(seconds[1:]),
        "least": one_step.least(policy, prompt, work),
        "tokens": work["prompts"] * work["group"] * work["length"],
        "prompt": prompt,
        "peak": highest,
        "predicted": needed[part],
        **static(policy, inputs, work),
    }


def static(policy, inputs, work: dict) -> dict:
    """Seconds of `generate` with --static_decoding, recording included; or why it failed."""
    policy.static_decoding = True
    try:
        start = one_step.now(policy.device)
        policy.generate(inputs, work["group"], work["length"])
        return {"static": one_step.now(policy.device) - start}
    except Exception as broken:
        traceback.print_exc()
        return {"static failed": f"{type(broken).__name__}: {reason(broken)}"}


def trl(part: str, device: torch.device, work: dict) -> dict:
    """TRL's step, with one prompt's completions in a micro-batch."""
    model, processor = make(part.split("-")[0], device, "bfloat16")
    model.model.visual.requires_grad_(False)
    model.generation_config.eos_token_id = model.lm_head.weight.shape[0] - 1
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    pairs = one_step.prompts(work["visual"], work["prompts"], work["words"])
    with tempfile.TemporaryDirectory() as scratch:
        trainer, seconds = one_step.trl(
            model,
            processor,
            pairs,
            work,
            STEPS,
            output_dir=scratch,
            use_cpu=device.type == "cpu",
            bf16=True,
            gradient_checkpointing=True,
            peft_config=LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules=pretrained.LORA_TARGETS
            ),
        )
        trainer.train()
    return {
        "seconds": one_step.medians([{"step": s} for s in seconds[1:]]),
        "tokens": work["prompts"] * work["group"] * work["length"],
        "peak": peak(device),
    }


def peak(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


# --- the card -------------------------------------------------------------------------------------


def card(device: torch.device) -> dict:
    """What the parts run on, and how fast it multiplies and reads."""
    if device.type == "cpu":
        found = {"name": platform.machine(), "memory": None, "driver": None}
        return found | one_step.rates(device, 64, torch.bfloat16, 2**16)
    if not torch.cuda.is_available():
        raise NotRun(
            f"torch {torch.__version__} sees no GPU (none there, a driver too old for CUDA "
            f"{torch.version.cuda}, or a torch for CPUs); --dry runs on a CPU"
        )
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise NotRun(f"{torch.cuda.get_device_name()} has no bfloat16; --dry runs on a CPU")
    here = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()[0]
    except (OSError, IndexError):
        driver = "unknown"
    found = {"name": here.name, "memory": here.total_memory, "driver": driver}
    return found | one_step.rates(device, 8192, torch.bfloat16, 2**30)


def main(part: str, dry: bool) -> None:
    """Print what a part found, as one line of JSON."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device, work = torch.device("cpu" if dry else "cuda"), TINY if dry else WORK
    if dry:
        for shape in memory.TEXT.values():
            shape.update(TINY_TEXT)
        memory.VISION.update(TINY_VISION)
    try:
        if part == "card":
            found = card(device)
        elif part in gpu_checks.CHECKS:
            found = gpu_checks.checks(part, device)
        elif part.startswith("trl-"):
            found = trl(part.removeprefix("trl-"), device, work)
        else:
            found = step(part, device, work)
    except NotRun as why:
        found = {"not run": str(why)}
    except Exception as broken:
        traceback.print_exc()
        found = {"failed": f"{type(broken).__name__}: {reason(broken)}"}
    print(json.dumps(found), flush=True)
