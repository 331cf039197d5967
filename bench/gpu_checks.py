"""The checks of gpu.py: each returns (what was compared, what was found, what is allowed).

Shapes: B prompts, K completions a prompt, T tokens a completion.
"""

import copy
import math
import os
import tempfile
import traceback
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bench import one_step
from bench.gpu_models import RANK, TINY_TEXT, TINY_VISION, NotRun, policy_of
from config import Config
from engine import reason
from engine.learner import Learner
from engine.run import Run
from engine.vlm import VLM
from grpo import grpo_loss

CLOSE = {"float32": 1e-4, "bfloat16": 1e-2}  # a difference
RATIO, SIGMAS = 1.5, 5.0  # an error over the plain form's; standard deviations
FLIPPED = 0.1  # AdamW's first step is the gradient's sign, which rounding flips where it is about 0


def two_layers(size: str, device: torch.device, dtype: str, lora: bool = False, **options) -> VLM:
    """The policy that is checked. An adapter begins at zero, where it would hide what it does."""
    vision = {"depth": 2, "fullatt_block_indexes": [1]}
    options |= {"lora_rank": RANK * lora}
    policy = policy_of(size, device, dtype, {"num_hidden_layers": 2}, vision, **options)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    return policy


def shared_prefix(device: torch.device, dtype: str, lora: bool = False) -> list[tuple]:
    """The shared prefix against plain rows: in float32 against each other, in bfloat16 each against
    plain rows of the same weights in float32."""
    policy = two_layers("3b", device, dtype, lora)
    inputs, allowed = policy.encode(padded_chats()), CLOSE[dtype]
    shared, plain = (score(policy, inputs, form) for form in (VLM.forward, VLM.score_plain))
    if dtype == "float32":
        return [
            ("log-probs, largest difference", (shared[0] - plain[0]).abs().max().item(), allowed),
            ("gradient, relative difference", error(shared[1], plain[1]), allowed),
        ]
    exact = score(copy.deepcopy(policy).float(), inputs, VLM.score_plain)
    return against(exact, shared, plain)


def against(exact: tuple, new: tuple, old: tuple) -> list[tuple]:
    """How much further the new form is from the exact numbers than the old."""
    rows = [("log-probs, error / plain error", error([new[0]], [exact[0]], [old[0]]), RATIO)]
    if exact[1]:
        rows.append(("gradient, error / plain error", error(new[1], exact[1], old[1]), RATIO))
    return rows


def error(got: list[Tensor], want: list[Tensor], other: list[Tensor] | None = None) -> float:
    """|got - want| / |want|, or / |other - want|, of all tensors together."""

    def norm(a: list[Tensor], b: list[Tensor] | None = None) -> float:
        pairs = zip(a, b) if b else ((x, 0) for x in a)
        return math.sqrt(sum((x.float() - y).square().sum().item() for x, y in pairs))

    return norm(got, want) / norm(*([other, want] if other else [want]))


def score(policy: VLM, inputs, form, backward: bool = True) -> tuple[Tensor, list[Tensor]]:
    """log pi of ragged random completions of two prompts, and the gradient of a weighted sum."""
    random = torch.Generator().manual_seed(2)
    ids = torch.randint(20, 500, (2, 4, 16), generator=random).to(policy.device)
    lengths = torch.tensor([[16, 9, 1, 12], [5, 16, 16, 2]], device=policy.device)
    mask = torch.arange(16, device=policy.device) < lengths[..., None]
    with torch.set_grad_enabled(backward):
        logp = form(policy, inputs, ids, mask).logp[mask]
    if not backward:
        return logp, []
    weights = torch.randn(len(logp), generator=random).to(policy.device)
    trained = [p for p in policy.parameters() if p.requires_grad]
    return logp.detach(), list(torch.autograd.grad((weights * logp).sum(), trained))


def padded_chats() -> list:
    """Two prompts, of which the first is padded."""
    (picture, text), other = one_step.prompts(64, 2)
    return one_step.chats([(picture, text), (other[0], 3 * text)])


@torch.no_grad()
def sampler(device: torch.device, dtype: str) -> list[tuple]:
    """First tokens against the scored distribution, by chi-square; all later ones by
    E[log pi(y)] = -H. Both in standard deviations."""
    policy = two_layers("7b", device, dtype, trainable=False)  # its head is not its embedding
    inputs = policy.encode(padded_chats())
    weight, bias = policy.head()
    hidden = policy(inputs, torch.full((2, 1, 1), 20, device=device)).hidden[0, 0, 0]
    logits = hidden @ weight.T
    # peaked, so that a slightly wrong temperature shows
    policy.core.lm_head.weight = nn.Parameter(weight * (3.6 / logits.std()), requires_grad=False)
    likely = (logits + bias).topk(256).indices
    p = policy(inputs, likely.expand(2, -1)[..., None]).logp[0, :, 0].double().exp()
    n = 512 if device.type == "cuda" else 128
    drawn = torch.cat([policy.generate(inputs, n, 1).ids[0, :, 0] for _ in range(8)])  # [8 n]
    observed = (drawn[:, None] == likely).sum(0).double()
    expected = len(drawn) * p
    often = expected >= 5
    observed, expected = (
        torch.cat([x[often], len(drawn) - x[often].sum()[None]]) for x in (observed, expected)
    )
    degrees = len(expected) - 1
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    out = policy.generate(inputs, n // 8, 16)
    scores = policy(inputs, out.ids, out.mask)
    surprise = (scores.logp + scores.entropy)[:, :, 1:][out.mask[:, :, 1:]].double()
    return [
        ("first token, chi-square", (chi_square - degrees) / math.sqrt(2 * degrees), SIGMAS),
        ("later tokens, surprise", (surprise.sum().abs() / surprise.norm()).item(), SIGMAS),
    ]


def flex(device: torch.device) -> list[tuple]:
    """Flex attention's blocks against the dense mask, each against plain rows in float32. A CPU has
    no backward pass of it, and here no compiled forward pass."""
    on_card, found = device.type == "cuda", []
    with nullcontext() if on_card else torch.compiler.set_stance("force_eager"):
        for attention in ("flex_attention", "sdpa"):
            policy = two_layers("3b", device, "bfloat16", attention=attention)
            inputs = policy.encode(padded_chats())
            found.append(score(policy, inputs, VLM.forward, on_card))
    exact = score(policy.float(), inputs, VLM.score_plain, on_card)
    return against(exact, *found)


# --- FSDP2 ----------------------------------------------------------------------------------------


def fsdp2(device: torch.device, dtype: str) -> list[tuple]:
    """One update by `Run` and `Learner`, sharded over one process against not: completions,
    gradient and the step of the optimiser."""
    if device.type == "cuda" and not torch.distributed.is_nccl_available():
        raise NotRun("this torch has no NCCL")
    with tempfile.TemporaryDirectory() as folder:
        here = torch.device("cpu")
        policy_of("3b", here, dtype, TINY_TEXT, TINY_VISION).save(f"{folder}/model")
        plain = update(f"{folder}/model", f"{folder}/plain", dtype)
        with launched_sharded():
            sharded = update(f"{folder}/model", f"{folder}/sharded", dtype)
    return [
        ("completions that differ", (plain[0] != sharded[0]).sum().item(), 0),
        ("gradient, relative difference", error(sharded[1], plain[1]), CLOSE[dtype]),
        ("update, relative difference", error(sharded[2], plain[2]), FLIPPED),
    ]


@contextmanager
def launched_sharded():
    """The environment of `accelerate launch --config_file fsdp2.yaml --num_processes 1`."""
    new = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    new |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    new |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    AcceleratorState._reset_state(True)
    os.environ.update(new)
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(True)
        for name in new:
            del os.environ[name]


def update(model: str, folder: str, dtype: str) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The completions, the gradient and what the optimiser adds to the weights, whole."""
    cfg = Config(
        method="grpo", model=model, dtype=dtype, output_dir=folder, quiet=True, warmup=0, rl_lr=1e-3
    )
    run = Run(cfg)
    torch.set_float32_matmul_precision("highest")
    learner = Learner("rl", model, 1, cfg.rl_lr, cfg, run)
    policy, sharded = learner.policy, run.sharded
    if sharded != ("ACCELERATE_USE_FSDP" in os.environ):
        raise RuntimeError("accelerate did not shard the policy")
    before = [whole(slot).clone() for slot in learner._slots()]
    inputs = policy.encode(padded_chats())
    draws = torch.rand(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with run.unsharded(policy):
        roll = policy.generate(inputs, 4, 8, draws=draws)
    adv = torch.tensor([1.0, -1.0, 0.5, -0.5] * 2, device=run.device)

    def work(_) -> None:
        logp = learner.model(inputs, roll.ids, roll.mask).logp.flatten(0, 1)
        learner.backward(grpo_loss(logp, logp.detach(), adv, roll.mask.flatten(0, 1))[0])

    learner.accumulate([[0]], work)
    gradient = [whole(slot.grad).clone() for slot in learner._slots()]
    learner.update()
    return roll.ids, gradient, [whole(a) - b for a, b in zip(learner._slots(), before)]


def whole(x: Tensor) -> Tensor:
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()


def of_type(dtype: str) -> dict:
    return {
        "shared prefix": partial(shared_prefix, dtype=dtype),
        "LoRA": partial(shared_prefix, dtype=dtype, lora=True),
        "sampler": partial(sampler, dtype=dtype),
    }


CHECKS = {
    "float32": of_type("float32"),
    "bfloat16": of_type("bfloat16"),
    "fsdp2": {dtype: partial(fsdp2, dtype=dtype) for dtype in CLOSE},
    "flex": {"flex attention": flex},
}


def checks(part: str, device: torch.device) -> dict:
    """The checks of a part; one that breaks is told and the others go on."""
    torch.set_float32_matmul_precision("highest")
    rows = []
    for name, check in CHECKS[part].items():
        try:
            found = check(device)
        except NotRun as why:
            rows.append({"check": name, "not run": str(why)})
            continue
        except Exception as broken:
            traceback.print_exc()
            rows.append({"check": name, "failed": f"{type(broken).__name__}: {reason(broken)}"})
            continue
        for what, value, allowed in found:
            row = {"check": f"{name}: {what}", "value": value, "allowed": allowed}
            rows.append(row | {"passed": value <= allowed})
    return {"checks": rows}
