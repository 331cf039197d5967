"""What step.py, scaling.py and gpu.py time: one update of ours and of TRL's trainer on the same
prompts, and the arithmetic and the bytes that an update cannot do without.

`work` names its size: prompts, group (completions a prompt), length (tokens a completion).
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from PIL import Image

import grpo
import ntk_infonce

BETA, RATE = 0.04, 1e-5
PIXELS = 28 * 28 * 4096  # above every picture here
WORD = "find the red square and say where it is in the picture "


def prompts(visual: int, number: int, words: int = 1) -> list[tuple]:
    """(picture, question) with `visual` tokens of picture each, and about 12 `words` of text."""
    side = round(visual**0.5) * 28
    torch.manual_seed(1)
    pixels = torch.randint(256, (number, side, side, 3), dtype=torch.uint8).numpy()
    return [(Image.fromarray(pixels[i]), WORD * words + f"number {i}") for i in range(number)]


def chats(pairs: list[tuple]) -> list[list[dict]]:
    return [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": image}, {"type": "text", "text": text}],
            }
        ]
        for image, text in pairs
    ]


def now(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def ours(
    policy,
    reference: Callable,
    optimizer: torch.optim.Optimizer,
    parts: list,
    work: dict,
    model=None,
    nce: bool = False,
) -> tuple[dict, list]:
    """Seconds of one update, by part, and its completions.

    parts: chats, by micro-batch. reference(inputs, ids): token scores. model: the policy as DDP
    wraps it. nce: with Eq. 4.
    """
    model, device = model or policy, policy.device
    group, length = work["group"], work["length"]
    count = {"sequences": work["prompts"] * group, "tokens": work["prompts"] * group * length}
    clock = [now(device)]
    inputs = [policy.encode(part) for part in parts]
    rolls = [policy.generate(x, group, length) for x in inputs]
    clock.append(now(device))
    with torch.no_grad():
        ref_logp = [reference(x, r.ids).logp.flatten(0, 1) for x, r in zip(inputs, rolls)]
    clock.append(now(device))
    for i, (x, roll, ref) in enumerate(zip(inputs, rolls, ref_logp)):
        n, last = len(parts[i]), i == len(parts) - 1
        answer, answer_mask = policy.encode_responses(["<answer>A</answer>"] * n)
        pad = (0, length - answer.shape[-1])
        with nullcontext() if last else getattr(model, "no_sync", nullcontext)():
            if nce:
                branches = torch.cat([roll.ids, F.pad(answer, pad)], 1)
                scores = model(x, branches, torch.cat([roll.mask, F.pad(answer_mask, pad)], 1))
            else:
                scores = model(x, roll.ids, roll.mask)
            logp, mask = scores.logp[:, :group].flatten(0, 1), roll.mask.flatten(0, 1)
            adv = grpo.group_advantages(torch.rand(n, group)).flatten().to(device)
            loss, _ = grpo.grpo_loss(logp, logp.detach(), adv, mask, ref, BETA, **count)
            if nce:
                where = F.pad(answer_mask[:, 0], pad)
                segment = torch.arange(n, device=device)[:, None].expand_as(where)[where]
                hidden, (weight, bias) = scores.hidden[:, -1][where], policy.head()
                targets = F.pad(answer, pad)[:, 0][where]
                cosine = ntk_infonce.gradient_cosine(
                    hidden, hidden @ weight.T + bias, targets, segment, n
                )
                loss = loss + 0.01 * ntk_infonce.info_nce(cosine)[0]
            loss.backward()
    # the optimiser's, which may be float32 copies
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    clock.append(now(device))
    names = ("generate", "reference", "update")
    seconds = dict(zip(names, (b - a for a, b in zip(clock, clock[1:]))))
    return seconds | {"step": clock[-1] - clock[0]}, rolls


def least(policy, prompt: int, work: dict) -> dict[str, float]:
    """Operations of each part of `ours`, and the bytes that decoding reads: the body on prompts
    and completions forward once and backward twice, the head on completion tokens likewise. Frozen
    weights (LoRA's) need no gradient, so backward counts once. Decoding reads the weights and the
    cache once a token."""
    core = policy.core
    body = sum(p.numel() for p in core.model.language_model.layers.parameters())
    head, size = core.lm_head.weight.numel(), core.lm_head.weight.element_size()
    tokens = work["prompts"] * work["group"] * work["length"]  # sampled
    prompt_tokens = work["prompts"] * prompt
    forward = 2 * (body * (prompt_tokens + tokens) + head * tokens)
    config = core.config.text_config
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    # a prompt's keys and values, in float32, once for all its completions; of these half on average
    cache = 2 * config.num_hidden_layers * width * (4 * prompt_tokens + size * tokens / 2)
    passes = 3 if core.lm_head.weight.requires_grad else 2
    return {
        "reference": forward,
        "update": passes * forward,
        "decode": 2 * (body + head) * tokens,
        "bytes": work["length"] * (size * (body + head) + cache),
    }


def rates(device: torch.device, side: int, dtype: torch.dtype, number: int) -> dict[str, float]:
    """The best of several: operations a second in products of matrices `side` wide, and bytes read
    a second in sums of `number` float32."""

    def best(work: Callable, repeats: int = 7) -> float:
        times = []
        for _ in range(repeats):
            start = now(device)
            work()
            times.append(now(device) - start)
        return min(times)

    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    big = torch.randn(number, device=device)
    return {"flops": 2 * side**3 / best(lambda: a @ b), "read": big.nbytes / best(big.sum)}


def trl(model, processor, pairs: list[tuple], work: dict, steps: int, **options) -> tuple:
    """TRL's trainer of the same update, and the list that its steps' seconds go to. work: `micro`
    as well, the completions in a micro-batch."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    seconds, clock = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock[:] = [now(model.device)]

        def on_step_end(self, *_, **__):
            seconds.append(now(model.device) - clock[0])

    def random_reward(completions, **_):
        return torch.rand(len(completions)).tolist()

    rows = [
        {"prompt": [{"role": "user", "content": text}], "image": image} for image, text in pairs
    ]
    peft_config = options.pop("peft_config", None)
    config = GRPOConfig(
        per_device_train_batch_size=work["micro"],
        gradient_accumulation_steps=work["prompts"] * work["group"] // work["micro"],
        num_generations=work["group"],
        max_completion_length=work["length"],
        beta=BETA,
        loss_type="grpo",
        learning_rate=RATE,
        max_steps=steps,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=random_reward,
        args=config,
        train_dataset=Dataset.from_list(rows * steps),
        processing_class=processor,
        callbacks=[Clock()],
        peft_config=peft_config,
    )
    return trainer, seconds


def medians(steps: list[dict]) -> dict[str, float]:
    """The median of each part's seconds."""
    return {name: statistics.median(step[name] for step in steps) for name in steps[0]}


if __name__ == "__main__":
    print("one_step is what is timed. Run python -m bench.step, bench.scaling or bench.gpu")
