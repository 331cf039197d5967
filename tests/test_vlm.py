"""vlm.py against plain Hugging Face rows and plain Hugging Face `generate`, in float64 where it
matters."""

import copy
import json
import math
import random
import re
import shutil
import warnings
from itertools import accumulate

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from engine import judges, pretrained, shared_prefix, vlm
from world import models, scenes

torch.set_num_threads(1)
NEVER = (
    "<|im_start|>",
    "<|endoftext|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def close(got, want, tol=1e-9):
    torch.testing.assert_close(got, want, atol=tol, rtol=0)


# --- media and prompts ----------------------------------------------------------------------------


def photo(name: str, size=(112, 84)) -> dict:
    return {
        "type": "image",
        "image": Image.fromarray(getattr(skimage.data, name)()).convert("RGB").resize(size),
    }


def clip(direction: str = "right", fps: float = 2.0) -> dict:
    row, column = scenes.start_cell(random.Random(0), direction)
    scene = (scenes.Thing("circle", "red", row, column, direction),)
    frames = [frame.resize((84, 84)) for frame in scenes.frames(random.Random(0), scene)]
    return {"type": "video", "video": frames, "fps": fps}


def chat(*parts) -> list[dict]:
    return [
        {
            "role": "user",
            "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts],
        }
    ]


def prompts() -> dict[str, list[dict]]:
    return {
        "a picture": chat(photo("astronaut"), "What colour is the circle?"),
        "a clip": chat(clip(), "Which way does the circle move?\nOptions:\nA. left\nB. right"),
        "several pictures": chat(
            photo("coffee"), photo("chelsea", (56, 112)), photo("coffee", (84, 84)), "Same?"
        ),
        "a picture and a clip": chat(
            "See", photo("chelsea"), "and", clip("up"), "and say which is red."
        ),
        "text before and between": chat(
            "Look at this:", photo("coffee"), "then at", photo("astronaut"), "."
        ),
        # 8 seconds a grid: its time runs past the text's positions
        "a sparse clip": chat(clip(fps=0.25), "Which?"),
    }


KINDS = tuple(prompts())
WITHOUT_SPARSE = KINDS[:-1]


def media_of(inputs) -> dict:
    names = (
        "pixel_values",
        "image_grid_thw",
        "pixel_values_videos",
        "video_grid_thw",
        "second_per_grid_ts",
    )
    return {name: inputs[name] for name in names if name in inputs}


def ragged(*lengths: int, seed: int = 0, pad: int = 2) -> torch.Tensor:
    """Random completions [1, K, T] over the ordinary vocabulary, shorter ones filled up with
    `pad`."""
    random_ids = torch.Generator().manual_seed(seed)
    ids = torch.full((1, len(lengths), max(lengths)), pad)
    for k, n in enumerate(lengths):
        ids[0, k, :n] = torch.randint(20, 570, (n,), generator=random_ids)
    return ids


def never_ids(policy) -> list[int]:
    return policy.processor.tokenizer.convert_tokens_to_ids(list(NEVER))


def row_by_row(model, never, inputs, ids, lengths):
    """The plain form, with nothing of ours: each completion alone behind its prompt, through the
    whole HF model.

    -> for every completion, the log-probs of its tokens and the whole distributions [T_k], [T_k,
    V].
    """
    logps, tables = [], []
    for row, n in zip(ids, lengths, strict=True):
        y, types = row[None, :n], inputs["mm_token_type_ids"]
        logits = model(
            input_ids=torch.cat([inputs["input_ids"], y], 1),
            attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(y)], 1),
            mm_token_type_ids=torch.cat([types, torch.zeros_like(y)], 1),
            **media_of(inputs),
        ).logits[:, -n - 1 : -1]
        table = logits.index_fill(-1, torch.tensor(never), -math.inf).log_softmax(-1)[0]
        logps.append(table.gather(-1, y[0, :, None])[:, 0])
        tables.append(table)
    return logps, tables


def distribution(policy, scores):
    """log pi over the vocabulary at every completion token [B, K, T, V], all at once."""
    weight, bias = policy.head()
    return (scores.hidden @ weight.T + bias).log_softmax(-1)


@pytest.fixture
def in_double(monkeypatch):
    """transformers (and our log-softmax) computes in float32 whatever the model's type: here that
    is float64 too.

    What is then left between two forms of one computation is an error, not rounding.
    """

    def norm(self, x):
        return (
            self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        )

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(qwen.Qwen2_5_VLRMSNorm, "forward", norm)


@pytest.fixture
def exact(world, in_double):
    return pretrained.load(str(world / "policy"), dtype="float64", train_vision=True)


@pytest.fixture
def fresh(world):
    return pretrained.load(str(world / "policy"))


# --- scoring: the shared prefix is exact ----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_shared_prefix_scores_and_gradients_equal_plain_rows(exact, kind):
    """Shared-prefix scores and every gradient equal those of plain rows."""
    inputs, lengths = exact.encode([prompts()[kind]]), (5, 2, 1, 4)
    ids = ragged(*lengths)
    weights = torch.randn(
        sum(lengths), dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )

    scores = exact(inputs, ids)
    logp = torch.cat([row[:n] for row, n in zip(scores.logp[0], lengths, strict=True)])
    entropy = torch.cat([row[:n] for row, n in zip(scores.entropy[0], lengths, strict=True)])
    shared = torch.autograd.grad((weights * logp).sum(), list(exact.parameters()))

    logps, tables = row_by_row(exact.core, never_ids(exact), inputs, ids[0], lengths)
    plain = torch.autograd.grad((weights * torch.cat(logps)).sum(), list(exact.parameters()))
    close(logp, torch.cat(logps))
    close(entropy, torch.cat([torch.special.entr(table.exp()).sum(-1) for table in tables]))
    for (name, _), got, want in zip(exact.named_parameters(), shared, plain, strict=True):
        torch.testing.assert_close(
            got, want, atol=1e-9, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
        )
    # everything is reached, so that equality says something
    assert all(g.abs().max() > 1e-6 for g in shared)


@pytest.mark.parametrize("kind", WITHOUT_SPARSE)
def test_shared_prefix_equals_score_plain_in_every_field(exact, kind):
    inputs, ids = exact.encode([prompts()[kind]]), ragged(6, 3, 6)
    with torch.no_grad():
        shared, plain = exact(inputs, ids), exact.score_plain(inputs, ids)
    assert shared.logp.shape == (1, 3, 6) and shared.hidden.shape[:3] == (1, 3, 6)
    for got, want in zip(shared, plain, strict=True):
        close(got, want)


@pytest.mark.parametrize("group", [0.02, 0.2, 2])
def test_branches_in_groups_score_like_plain_rows(exact, group, monkeypatch):
    """Ragged branches, one of a single token last, behind prompts of two lengths: whichever attend
    together, scores and gradients are those of plain rows."""
    monkeypatch.setattr(shared_prefix, "GROUP", group)
    inputs = exact.encode([prompts()["a picture"], prompts()["a clip"]])
    lengths = [5, 1, 9, 3, 7, 1, 12, 1]
    ids = ragged(*lengths).expand(2, -1, -1)
    mask = (torch.arange(12) < torch.tensor(lengths)[:, None]).expand(2, -1, -1)
    made = shared_prefix.branch_mask(
        inputs["attention_mask"], [n - 1 for n in lengths], torch.float64, "shared_prefix"
    )
    p = inputs["input_ids"].shape[1]
    assert len(made.place) == min(5, math.ceil((sum(lengths) - 8) / (group * p)))
    found = []
    for form in (exact, exact.score_plain):
        scores = form(inputs, ids, mask)
        grads = torch.autograd.grad(scores.logp[mask].square().sum(), list(exact.parameters()))
        found.append((scores.logp[mask], scores.entropy[mask], *grads))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)


def test_a_completion_of_one_token_is_scored(exact):
    inputs, ids = exact.encode([prompts()["a clip"]]), ragged(1, 1)
    with torch.no_grad():
        logps, _ = row_by_row(exact.core, never_ids(exact), inputs, ids[0], (1, 1))
        close(exact(inputs, ids).logp[0, :, 0], torch.cat(logps))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_eager_and_sdpa_attention_both_keep_the_branches_apart(world, in_double, attention):
    policy = pretrained.load(
        str(world / "policy"), dtype="float64", attention=attention, trainable=False
    )
    inputs, ids = policy.encode([prompts()["a clip"]]), ragged(4, 3)
    with torch.no_grad():
        logps, _ = row_by_row(policy.core, never_ids(policy), inputs, ids[0], (4, 3))
        got = policy(inputs, ids).logp[0]
    close(torch.cat([got[0, :4], got[1, :3]]), torch.cat(logps), 1e-6)  # eager's softmax is float32


class TwoD:
    """Attention in the manner of flash attention: it gets the padding mask [B, L] and no other."""

    def __init__(self):
        self.calls = 0

    def mask(self, *args, attention_mask=None, **kwargs):
        assert attention_mask is None or attention_mask.ndim == 2
        return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)

    def attend(self, module, query, key, value, attention_mask, **kwargs):
        self.calls += 1
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def test_attention_without_4_d_masks_scores_plain_rows(world, in_double):
    """Attention without 4-D masks scores plain rows. It says so once."""
    two_d = TwoD()
    AttentionInterface.register("two_d", two_d.attend)
    AttentionMaskInterface.register("two_d", two_d.mask)
    results = []
    for attention in ("sdpa", "two_d"):
        policy = pretrained.load(str(world / "policy"), dtype="float64")
        policy.core.config.text_config._attn_implementation = attention
        inputs = policy.encode([prompts()["a clip"], prompts()["several pictures"]])
        ids = torch.cat([ragged(5, 3, seed=1), ragged(4, 5, seed=2)])
        mask = ids != 2
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            scores = [policy(inputs, ids, mask) for _ in range(3)][-1]
        assert len([w for w in caught if "4-D" in str(w.message)]) == (attention == "two_d")
        scores.logp.sum().backward()
        drawn = policy.generate(
            inputs, 2, 6, draws=torch.rand(2, 2, 6, generator=torch.Generator().manual_seed(0))
        )
        results.append((scores, drawn, [p.grad for p in policy.parameters() if p.grad is not None]))
    (shared, drawn, grads), (plain, again, same) = results
    assert two_d.calls > 0 and torch.equal(drawn.ids, again.ids)
    close(plain.logp, shared.logp)
    close(plain.entropy, shared.entropy)
    for a, b in zip(grads, same, strict=True):
        close(a, b)


@pytest.mark.slow
def test_flex_attention_blocks_score_like_the_dense_mask(world):
    """Forward only: PyTorch has no backward pass of it on a CPU."""
    rows, scores, drawn = [prompts()["a picture"], prompts()["several pictures"]], [], []
    for attention in ("sdpa", "flex_attention"):
        policy = pretrained.load(str(world / "policy"), attention=attention, trainable=False)
        ids = torch.cat([ragged(5, 3, seed=1), ragged(4, 5, seed=2)])
        with torch.no_grad():
            scores.append(policy(policy.encode(rows), ids, ids != 2))
        drawn.append(policy.generate(policy.encode(rows), 1, 4, sample=False).ids)
    close(scores[0].logp, scores[1].logp, 1e-5)
    assert torch.equal(*drawn)
    assert scores[0].logp.abs().max() > 1


def test_lora_shared_prefix_gives_the_gradients_of_plain_rows(world, in_double):
    """The shared prefix and plain rows give every LoRA adapter the same gradient."""
    torch.manual_seed(0)
    policy = pretrained.load(str(world / "policy"), dtype="float64", lora_rank=4)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    inputs, lengths = policy.encode([prompts()["a picture and a clip"]]), (5, 2, 4)
    ids, trained_ = ragged(*lengths), [p for p in policy.parameters() if p.requires_grad]
    scores = policy(inputs, ids).logp[0]
    logp = torch.cat([row[:n] for row, n in zip(scores, lengths, strict=True)])
    plain = torch.cat(row_by_row(policy.core, never_ids(policy), inputs, ids[0], lengths)[0])
    close(logp, plain)
    weights = torch.randn(len(plain), dtype=torch.float64)
    shared, alone = (torch.autograd.grad((weights * x).sum(), trained_) for x in (logp, plain))
    for got, want in zip(shared, alone, strict=True):
        close(got, want)
        assert want.abs().max() > 1e-6


PREFIXED = {  # how the policy is opened
    "vision": {"train_vision": True},
    "LoRA": {"lora_rank": 4, "gradient_checkpointing": True},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("options", PREFIXED.values(), ids=PREFIXED)
def test_passes_behind_a_prompt_that_runs_once_are_exact(world, in_double, options, monkeypatch):
    """Each pass has a backward of its own. Scores, the prompt's states and every gradient are those
    of plain rows and of one pass, in padded batches, with one group of branches or many."""
    monkeypatch.setattr(shared_prefix, "GROUP", 0.2)
    torch.manual_seed(0)
    policy = pretrained.load(str(world / "policy"), dtype="float64", **options)
    for name, p in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    chats = [prompts()["a picture"], prompts()["a picture and a clip"], prompts()["a sparse clip"]]
    inputs, k = policy.encode(chats), 5
    ids = torch.cat([ragged(4, 1, 6, 5, 2, seed=i) for i in range(3)]).clamp_max(560)
    mask = ids != 2
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(ids.shape, dtype=torch.float64, generator=random) * mask
    of_prompt = torch.randn(3, 1, 128, dtype=torch.float64, generator=random)

    def gradients(score, *sizes) -> dict:
        """of sum(weight logp), and in the last pass of the prompts' hidden states"""
        policy.zero_grad(set_to_none=True)
        logp, start, prefix = [], 0, None
        if len(sizes) > 1:
            hidden, prefix = policy.prefix(inputs)
            prefix.cut(hidden)
        for size in sizes:
            at = slice(start, start + size)
            start += size
            scores = score(inputs, ids[:, at], mask[:, at], *[prefix] * (prefix is not None))
            loss = (weight[:, at] * scores.logp).sum()
            if start == k:
                valid = inputs["attention_mask"][..., None]
                loss = loss + (of_prompt * torch.where(valid == 1, scores.prompt, 0.0)).sum()
            loss.backward()
            logp.append(scores.logp.detach())
        if prefix:
            prefix.backward()
        found = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
        return found | {"logp": torch.cat(logp, 1)}

    plain = gradients(policy.score_plain, k)
    assert len(plain) > 40
    for sizes in ((5,), (2, 3), (1, 1, 1, 1, 1)):
        found = gradients(policy, *sizes)
        assert found.keys() == plain.keys()
        for name, want in plain.items():
            close(found[name], want, 1e-9 * max(1.0, want.abs().max().item()))
    with torch.no_grad():  # nothing but first tokens, which the prompt predicts
        hidden, prefix = policy.prefix(inputs)
        prefix.cut(hidden)
        first = ids[:, :2, :1]
        close(policy(inputs, first, None, prefix).logp, policy.score_plain(inputs, first).logp)


def test_gradient_checkpointing_changes_no_gradient(world, in_double):
    grads = []
    for checkpointing in (False, True):
        policy = pretrained.load(
            str(world / "policy"), dtype="float64", gradient_checkpointing=checkpointing
        )
        policy(policy.encode([prompts()["a picture"]]), ragged(4, 2)).logp.sum().backward()
        grads.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 40
    for name in grads[0]:
        close(grads[0][name], grads[1][name])


# --- scoring: batches and padding -----------------------------------------------------------------


def test_a_sample_alone_equals_the_sample_in_a_padded_batch(exact):
    """A sample alone equals the sample in a left-padded batch of pictures and clips."""
    rows = [
        prompts()[kind]
        for kind in ("a clip", "several pictures", "a picture", "a picture and a clip")
    ]
    ids = torch.cat([ragged(5, 3, seed=i) for i in range(len(rows))])
    batch = exact.encode(rows)
    padding = (batch["attention_mask"] == 0).sum(1)
    assert padding.min() == 0 and len(set(padding.tolist())) == len(rows)
    assert (batch["attention_mask"][:, -1] == 1).all()  # on the left
    with torch.no_grad():
        together = exact(batch, ids)
        for b, row in enumerate(rows):
            alone = exact(exact.encode([row]), ids[b : b + 1])
            for got, want in zip(together[:-1], alone[:-1], strict=True):
                close(got[b], want[0])
            close(together.prompt[b, padding[b] :], alone.prompt[0])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heavy_padding_gives_finite_scores_and_gradients(world, dtype):
    """Heavy padding gives finite scores and gradients in every type."""
    policy = pretrained.load(str(world / "policy"), dtype=dtype)
    rows = [prompts()["a picture"], chat(photo("coffee"), "Describe all shapes. " * 30)]
    scores = policy(policy.encode(rows), torch.cat([ragged(4, 2), ragged(3, 4)]))
    # the log-softmax is never in half precision
    assert scores.logp.dtype == scores.entropy.dtype == torch.float32
    scores.logp.sum().backward()
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    assert (
        torch.isfinite(scores.logp).all()
        and all(torch.isfinite(g).all() for g in grads)
        and len(grads) > 40
    )


def test_scores_in_training_mode_are_those_in_evaluation_mode(fresh):
    """No dropout anywhere, or the first update of a batch would not be at ratio 1."""
    inputs, ids = fresh.encode([prompts()["a picture"]]), ragged(4, 2)
    with torch.no_grad():
        training, evaluation = fresh.train()(inputs, ids), fresh.eval()(inputs, ids)
    assert torch.equal(training.logp, evaluation.logp)


def test_changing_a_token_changes_nothing_before_it(policy):
    """Changing a token changes nothing before it and nothing in other completions."""
    inputs, ids = policy.encode([prompts()["a picture"]]), ragged(6, 6, 6)
    changed = ids.clone()
    changed[0, 1, 3] = 77
    with torch.no_grad():
        before, after = policy(inputs, ids).logp[0], policy(inputs, changed).logp[0]
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert torch.equal(before[1, :3], after[1, :3])
    assert (before[1, 3:] - after[1, 3:]).abs().min() > 1e-4


def test_what_follows_the_end_token_never_matters(policy):
    inputs, ids = policy.encode([prompts()["a clip"]]), ragged(3, 6)
    noise = ids.clone()
    noise[0, 0, 3:] = torch.tensor([100, 200, 300])
    with torch.no_grad():
        close(policy(inputs, ids).logp[0, 0, :3], policy(inputs, noise).logp[0, 0, :3], 0)
        close(policy(inputs, ids).logp[0, 1], policy(inputs, noise).logp[0, 1], 0)


# --- scoring: the picture is seen, and it is the right one ----------------------------------------


@pytest.mark.parametrize("media", ["picture", "clip"])
def test_swapping_the_media_of_two_rows_swaps_their_scores(policy, media):
    """Swapping the media of two rows swaps their scores. Blanking one changes that row only."""
    if media == "picture":
        a, b, blank = (
            photo("astronaut"),
            photo("chelsea"),
            {"type": "image", "image": Image.new("RGB", (112, 84))},
        )
    else:
        a, b = clip("left"), clip("up")
        blank = {**a, "video": [Image.new("RGB", (84, 84))] * 4}
    ids = ragged(5).expand(2, 1, 5)

    def logp(first, second):
        with torch.no_grad():
            return policy(
                policy.encode([chat(first, "What is it?"), chat(second, "What is it?")]), ids
            ).logp

    straight, swapped, blanked = logp(a, b), logp(b, a), logp(blank, b)
    close(straight[0], swapped[1], 2e-5)
    close(straight[1], swapped[0], 2e-5)
    assert (straight[0] - straight[1]).abs().max() > 1e-3  # the picture is seen
    assert (straight[0] - blanked[0]).abs().max() > 1e-3
    close(straight[1], blanked[1], 2e-5)


def test_pictures_of_one_prompt_are_not_exchanged(policy):
    a, b = photo("astronaut"), photo("chelsea")
    with torch.no_grad():
        ab, ba = (
            policy(policy.encode([chat(x, y, "?")]), ragged(5)).logp for x, y in ((a, b), (b, a))
        )
    assert (ab - ba).abs().max() > 1e-3


def test_shuffling_the_frames_of_a_clip_changes_its_scores(policy):
    straight = clip("right")
    backwards = {**straight, "video": straight["video"][::-1]}
    inputs = policy.encode([chat(straight, "Which way?")])
    assert inputs["video_grid_thw"][0, 0] == 2
    with torch.no_grad():
        a, b = (
            policy(inputs, ragged(5)).logp,
            policy(policy.encode([chat(backwards, "Which way?")]), ragged(5)).logp,
        )
    assert (a - b).abs().max() > 1e-3


def test_the_frame_rate_of_a_clip_reaches_generation_and_scoring(policy):
    outputs = []
    for fps in (2.0, 0.5):
        inputs = policy.encode(
            [chat(clip(fps=fps), "Which way does the circle move? Options: A. left B. right")]
        )
        assert torch.as_tensor(inputs["second_per_grid_ts"]).tolist() == [
            2 / fps
        ]  # two frames a grid
        with torch.no_grad():
            hidden = policy.core.model(**inputs, use_cache=False).last_hidden_state[:, -1]
            outputs.append((policy(inputs, ragged(5)), hidden))
    (fast, fast_hidden), (slow, slow_hidden) = outputs
    assert (fast.logp - slow.logp).abs().max() > 1e-4
    # what generation starts from is what is scored
    close(fast.hidden[0, 0, 0], fast_hidden[0], 2e-5)
    close(slow.hidden[0, 0, 0], slow_hidden[0], 2e-5)


def test_scoring_does_not_depend_on_what_was_generated_before(fresh):
    inputs, ids = fresh.encode([prompts()["a clip"]]), ragged(5, 4)
    with torch.no_grad():
        before = fresh(inputs, ids).logp
        fresh.generate(fresh.encode([prompts()["a picture"], prompts()["several pictures"]]), 3, 4)
        assert torch.equal(before, fresh(inputs, ids).logp)


# --- encoding -------------------------------------------------------------------------------------


def test_the_tower_sees_what_the_untouched_one_sees(world, exact):
    """Against a model that plain transformers loaded, with its own convolution."""
    plain = AutoModelForImageTextToText.from_pretrained(world / "policy", dtype=torch.float64)
    inputs = exact.encode([prompts()["several pictures"], prompts()["a clip"]])
    with torch.no_grad():
        seen = exact._see(inputs)
        want = plain.model.get_image_features(
            inputs["pixel_values"], inputs["image_grid_thw"]
        ).pooler_output
        close(seen["image_features"], torch.cat(list(want)))
        want = plain.model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"]
        ).pooler_output
        close(seen["video_features"], torch.cat(list(want)))
    assert "_patches" not in repr(plain.model.visual.patch_embed.proj.forward)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_a_photo_keeps_its_shape_within_the_pixel_limits(world, name):
    """A real photograph keeps its shape within the pixel limits. A merged patch has one token."""
    policy = pretrained.load(str(world / "policy"), trainable=False, max_pixels=100_000)
    image = Image.fromarray(getattr(skimage.data, name)())
    inputs = policy.encode([chat({"type": "image", "image": image}, "?")])
    t, h, w = inputs["image_grid_thw"][0].tolist()
    assert t == 1 and h * w * 14 * 14 <= 100_000 < (h + 4) * (w + 4) * 14 * 14
    assert w / h == pytest.approx(image.width / image.height, rel=0.15)
    assert (inputs["input_ids"] == policy.core.config.image_token_id).sum() == h * w // 4
    assert inputs["pixel_values"].shape == (h * w, 3 * 2 * 14 * 14)


def test_the_encoded_pixels_are_those_of_the_picture(policy):
    # multiples of 28: nothing is resized
    image = Image.fromarray(skimage.data.astronaut()).resize((112, 84))
    pixels = policy.encode([chat({"type": "image", "image": image}, "?")])["pixel_values"]
    # merged rows, columns, 2 x 2 patches; channel, time, y, x
    patches = pixels.view(3, 4, 2, 2, 3, 2, 14, 14)
    got = patches[:, :, :, :, :, 0].permute(0, 2, 5, 1, 3, 6, 4).reshape(84, 112, 3)
    processor = policy.processor.image_processor
    want = torch.tensor(np.asarray(image)) / 255
    close(
        got, (want - torch.tensor(processor.image_mean)) / torch.tensor(processor.image_std), 1e-5
    )


def test_a_tiny_picture_is_enlarged_and_odd_frames_are_taken(policy):
    """A tiny picture is enlarged. An odd number of frames is taken."""
    tiny = {"type": "image", "image": Image.new("RGB", (10, 10), "red")}
    inputs = policy.encode([chat(tiny, "?")])
    assert inputs["image_grid_thw"][0].prod() * 14 * 14 >= policy.min_pixels
    three = {**clip(), "video": clip()["video"][:3]}
    inputs = policy.encode([chat(three, "?")])
    assert inputs["video_grid_thw"].tolist() == [[2, 6, 6]]
    assert torch.isfinite(policy(inputs, ragged(3)).logp).all()


def test_nothing_of_a_long_prompt_is_cut(policy):
    text = "Is there a red circle in the picture? " * 400
    inputs = policy.encode([chat(photo("coffee"), text + "FIRST"), prompts()["a picture"]])
    ids = inputs["input_ids"][0]
    assert (
        policy.processor.tokenizer.decode(ids).count("Is there a red circle in the picture?") == 400
    )
    assert "FIRST" in policy.processor.tokenizer.decode(ids[-20:])
    assert (ids == policy.core.config.image_token_id).sum() == 12


def test_the_beginning_of_a_response_is_fed_but_not_counted(policy):
    texts, after = ["<answer>A</answer>", "<answer>3</answer>"], ["<think>a circle</think>", ""]
    ids, mask = policy.encode_responses(texts, after)
    plain, plain_mask = policy.encode_responses([a + b for a, b in zip(after, texts)])
    assert torch.equal(ids, plain) and torch.equal(mask[1], plain_mask[1])
    counted = policy.processor.tokenizer.decode(ids[0, 0][mask[0, 0]], skip_special_tokens=True)
    assert counted.replace(" ", "") == "<answer>A</answer>" and mask[0].sum() < plain_mask[0].sum()


def test_responses_are_closed_by_the_end_token_and_masked(policy):
    texts = ["<answer>A</answer>", "", "a red circle, a green star\n<answer>B</answer>"]
    ids, mask = policy.encode_responses(texts)
    tokenizer = policy.processor.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert ids.shape == mask.shape == (3, 1, mask.sum(-1).max())
    for text, row, keep in zip(texts, ids[:, 0], mask[:, 0], strict=True):
        n = int(keep.sum())
        assert keep.tolist() == [True] * n + [False] * (len(row) - n)  # right-padded
        assert row[n - 1] == end and end not in row[: n - 1]
        assert tokenizer.decode(row[: n - 1]) == text


# --- generation -----------------------------------------------------------------------------------


def plain_greedy(policy, inputs, max_new_tokens: int) -> torch.Tensor:
    """HF `generate` as it comes: no shared prefill, no cache of ours."""
    tokenizer = policy.processor.tokenizer
    out = policy.core.generate(
        **inputs,
        generation_config=GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            suppress_tokens=never_ids(policy),
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        ),
    )
    return out[:, inputs["input_ids"].shape[1] :]


def end_often(policy) -> None:
    """Let a checkpoint treat a hundred ordinary tokens as ends, so that completions end early, at
    different places."""
    policy.end_ids = [*policy.end_ids, *range(300, 400)]


def test_greedy_shared_prefill_equals_plain_generate(exact):
    """Greedy shared prefill equals plain generate token by token."""
    exact.eval()
    rows = [prompts()[kind] for kind in WITHOUT_SPARSE]
    inputs = exact.encode(rows)
    assert (inputs["attention_mask"] == 0).any()
    got = exact.generate(inputs, 2, 12, sample=False)
    want = plain_greedy(exact, inputs, 12)
    assert got.ids.shape == (len(rows), 2, want.shape[1])
    assert torch.equal(got.ids[:, 0], want) and torch.equal(got.ids[:, 1], want)
    assert len({tuple(row) for row in want.tolist()}) == len(rows)  # they do not all say the same
    for row, ids in zip(rows, want, strict=True):  # and each alone says what it says in the batch
        assert plain_greedy(exact, exact.encode([row]), 12)[0].tolist() == ids.tolist()


def test_greedy_on_a_sparse_clip_equals_plain_generate(exact):
    """A clip whose temporal positions run past the last text position: the next token follows the
    text, as in HF."""
    exact.eval()
    inputs = exact.encode([prompts()["a sparse clip"]])
    position, _ = exact.core.model.get_rope_index(
        **{k: v for k, v in inputs.items() if not k.startswith("pixel_values")}
    )
    assert position.max() > position[:, 0, -1].max()
    assert (
        exact.generate(inputs, 1, 12, sample=False).ids[0].tolist()
        == plain_greedy(exact, inputs, 12).tolist()
    )


def plain_sample(policy, inputs, draws, ends) -> list[int]:
    """One completion, nothing of ours: the whole row through the model at every token, its
    cumulative sum in a loop."""
    ids, never = [], never_ids(policy)
    for u in draws.tolist():
        y = torch.tensor([ids], dtype=torch.long)
        logits = policy.core(
            input_ids=torch.cat([inputs["input_ids"], y], 1),
            attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(y)], 1),
            mm_token_type_ids=torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(y)], 1),
            use_cache=False,
            **media_of(inputs),
        ).logits[0, -1]
        total = 0.0
        for token, p in enumerate(
            logits.index_fill(-1, torch.tensor(never), -math.inf).softmax(-1).tolist()
        ):
            total += p
            if total > u:
                ids.append(token)
                break
        if ids[-1] in ends:
            break
    return ids


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("segment", [1, 3, 32])
def test_the_same_numbers_give_the_tokens_of_plain_rows(exact, segment, static, monkeypatch):
    """The same numbers give plain rows' tokens in any batch while ended completions leave."""
    monkeypatch.setattr(vlm, "SEGMENT", segment)
    monkeypatch.setattr(exact, "static_decoding", static)
    policy, n, length = exact.eval(), 3, 8
    end_often(policy)
    rows = [prompts()[kind] for kind in ("a picture", "a clip", "several pictures")]
    draws = torch.rand(
        len(rows), n, length, dtype=torch.float64, generator=torch.Generator().manual_seed(7)
    )
    widths = []
    layer = policy.core.model.language_model.layers[0]
    hook = layer.register_forward_hook(lambda m, args, out: widths.append(args[0].shape[0]))
    together = policy.generate(policy.encode(rows), n, length, draws=draws)
    hook.remove()
    with torch.no_grad():
        for b, row in enumerate(rows):
            inputs = policy.encode([row])
            alone = policy.generate(inputs, n, length, draws=draws[b : b + 1])
            for k in range(n):
                want = plain_sample(policy, inputs, draws[b, k], policy.end_ids)
                assert together.ids[b, k][together.mask[b, k]].tolist() == want
                assert alone.ids[0, k][alone.mask[0, k]].tolist() == want
    lengths = together.mask.sum(-1)
    assert (
        lengths.min() < lengths.max()
        and bool(together.ended.any())
        and together.ids.shape[-1] == lengths.max()
    )
    assert (together.ids[~together.mask] == policy.processor.tokenizer.pad_token_id).all()
    if segment == 1:  # every ended completion has left, but for those that fill up
        left = [int((lengths > t).sum(1).max()) * len(rows) for t in range(int(lengths.max()))]
        assert left[-1] < left[0]
        if static:  # or stays until more than a quarter leaves
            left = list(
                accumulate(left, lambda before, now: now if now < 0.75 * before else before)
            )
        assert widths[1:] == left


@pytest.mark.parametrize("kind", ["a picture", "a clip", "a sparse clip"])
def test_the_first_token_is_sampled_from_exactly_the_scores(fresh, kind):
    """Pearson's chi-square of sampled first tokens, in a left-padded batch, against exp(logp) of
    every token."""
    policy, vocabulary = fresh.eval(), fresh.core.config.text_config.vocab_size
    never = never_ids(policy)
    with torch.no_grad():
        policy.core.lm_head.weight.mul_(3)  # peaked, so that a slightly wrong temperature shows
        inputs = policy.encode([prompts()[kind]])
        every = torch.arange(vocabulary).view(1, -1, 1)
        p = policy(inputs, every).logp[0, :, 0].double().exp()
        # were they not suppressed, nothing else would be sampled: twice the logit of the likeliest
        # token
        policy.core.lm_head.weight[never] = 2 * policy.core.lm_head.weight[p.argmax()]
        p = policy(inputs, every).logp[0, :, 0].double().exp()
        assert p[never].max() == 0 and p.sum() == pytest.approx(1, abs=1e-5)
        longer = chat(
            photo("coffee"),
            photo("coffee"),
            "What is the colour of the circle in the north of the picture?",
        )
        batch = policy.encode([prompts()[kind], longer])
        assert batch["attention_mask"][0, 0] == 0
        torch.manual_seed(0)
        sampled = torch.cat([policy.generate(batch, 1000, 1).ids[0, :, 0] for _ in range(4)])
    assert not torch.isin(sampled, torch.tensor(never)).any()
    observed, expected = torch.bincount(sampled, minlength=vocabulary).double(), len(sampled) * p
    often = expected >= 5
    observed = torch.cat([observed[often], observed[~often].sum()[None]])
    expected = torch.cat([expected[often], expected[~often].sum()[None]])
    chi_square, degrees = ((observed - expected) ** 2 / expected).sum(), len(expected) - 1
    assert degrees > 30
    assert chi_square < degrees + 5 * math.sqrt(2 * degrees), (float(chi_square), degrees)


def test_every_later_token_is_sampled_from_the_scores_too(fresh):
    """Under the sampling distribution E[logp] = -entropy at every token: z of the sum, and of its
    second moment."""
    policy = fresh.eval()
    end_often(policy)
    torch.manual_seed(0)
    inputs = policy.encode([prompts()["a clip"], prompts()["several pictures"]])
    with torch.no_grad():
        policy.core.lm_head.weight.mul_(3)
        out = policy.generate(inputs, 200, 8)
        scores = policy(inputs, out.ids)
        table = distribution(fresh, scores)
        p = table.exp()
        variance = (p * (table.clamp(min=-1e4) + scores.entropy[..., None]) ** 2).sum(-1)
    surprise = (scores.logp + scores.entropy)[out.mask]
    for position in (slice(0, 1), slice(1, 4), slice(4, 8)):
        keep = out.mask[..., position]
        total = (scores.logp + scores.entropy)[..., position][keep].sum()
        assert total.abs() < 4 * variance[..., position][keep].sum().sqrt(), position
    spread = (surprise**2).sum() / variance[out.mask].sum()
    assert spread == pytest.approx(1, abs=0.1)


def test_banned_tokens_are_never_sampled_even_if_likeliest(fresh):
    """Banned tokens have no probability. They are never sampled even if likeliest."""
    policy = fresh.eval()
    never = never_ids(policy)
    assert policy.banned_ids == sorted(never)
    with torch.no_grad():
        policy.core.lm_head.weight[never] *= 5
        inputs = policy.encode([prompts()["a clip"], prompts()["a picture"]])
        out = policy.generate(inputs, 100, 6)
        scores = policy(inputs, out.ids)
    assert not torch.isin(out.ids[out.mask], torch.tensor(never)).any()
    assert distribution(fresh, scores).exp()[..., never].max() == 0
    assert torch.isfinite(scores.logp[out.mask]).all() and torch.isfinite(scores.entropy).all()


def test_the_mask_keeps_exactly_the_first_end_token(fresh):
    policy = fresh.eval()
    end_often(policy)
    torch.manual_seed(3)
    out = policy.generate(policy.encode([prompts()["a picture"], prompts()["a clip"]]), 100, 10)
    assert out.mask.dtype == torch.bool and out.ids.shape == out.mask.shape
    lengths = set()
    for b in range(2):
        for k in range(100):
            ids = out.ids[b, k].tolist()
            ends = [t for t, i in enumerate(ids) if i in policy.end_ids]
            n = ends[0] + 1 if ends else len(ids)
            assert out.mask[b, k].tolist() == [True] * n + [False] * (len(ids) - n)
            assert bool(out.ended[b, k]) == bool(ends)
            assert out.text[b][k] == policy.processor.tokenizer.decode(ids[: n - bool(ends)])
            lengths.add(n)
    assert len(lengths) > 5 and 0 < out.ended.float().mean() < 1  # ragged, and some were cut off


def test_completions_of_a_prompt_stay_with_their_prompt(fresh):
    """Greedy ids of [A, B] x n are those of A n times, then those of B: no A, B, A, B."""
    policy = fresh.eval()
    a, b = prompts()["a picture"], prompts()["several pictures"]
    both = policy.generate(policy.encode([a, b]), 3, 6, sample=False)
    assert both.text[0][0] != both.text[1][0]
    assert both.text == [[both.text[0][0]] * 3, [both.text[1][0]] * 3]
    swapped = policy.generate(policy.encode([b, a]), 3, 6, sample=False)
    assert swapped.text == both.text[::-1]


def test_samples_of_one_prompt_differ_and_a_seed_repeats_them(policy):
    inputs = policy.encode([prompts()["a picture"]])
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(policy.generate(inputs, 6, 8).ids)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    assert len({tuple(row) for row in runs[0][0].tolist()}) == 6


def test_generation_leaves_the_training_mode_as_it_was(fresh):
    """Generation leaves the training mode as it was. It makes no graph."""
    inputs = fresh.encode([prompts()["a picture"]])
    assert fresh.training
    out = fresh.generate(inputs, 2, 3)
    assert fresh.training and all(m.training for m in fresh.core.model.language_model.modules())
    assert not out.ids.requires_grad
    fresh.eval().generate(inputs, 2, 3)
    assert not fresh.training


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_decoding_attends_as_plain_attention_does(dtype):
    """A completion attends to its prompt and its own tokens. Grouped query heads, padding, two
    prompts of three completions; in half precision as close as PyTorch's own."""
    torch.manual_seed(0)
    b, n, heads, h, p, t, d = 2, 3, 8, 2, 9, 5, 32
    prompt = DynamicLayer()
    prompt.keys, prompt.values = (3 * torch.randn(b, h, p, d, dtype=dtype) for _ in range(2))
    valid = torch.ones(b, p)
    valid[1, :4] = 0
    layer = shared_prefix.BranchCache(prompt, valid, n, t + 2)
    own = [3 * torch.randn(b * n, h, t, d, dtype=dtype) for _ in range(2)]
    for at in range(t):
        keys, values = layer.update(*(x[:, :, at : at + 1] for x in own))
    assert layer.get_seq_length() == p + t
    query = torch.randn(b * n, heads, 1, d, dtype=dtype)
    got, _ = shared_prefix.branch_attention(None, query, keys, values, None, scaling=d**-0.5)

    def plain(dtype):
        k, v = (
            torch.cat([shared.repeat_interleave(n, 0), mine], 2)
            .repeat_interleave(heads // h, 1)
            .to(dtype)
            for shared, mine in zip((prompt.keys, prompt.values), own)
        )
        mask = torch.cat([valid.repeat_interleave(n, 0), torch.ones(b * n, t)], 1).bool()[
            :, None, None
        ]
        return (
            torch.nn.functional.scaled_dot_product_attention(query.to(dtype), k, v, mask)
            .transpose(1, 2)
            .double()
        )

    want = plain(torch.float64)
    assert got.shape == want.shape and got.dtype == dtype
    error = (got.double() - want).abs().max()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0}[dtype]
    assert error <= max(tolerance, 1.1 * (plain(dtype) - want).abs().max())


SHIPPED = {
    "released": {
        "repetition_penalty": 5.0,
        "temperature": 1e-6,
        "top_k": 1,
        "top_p": 0.01,
        "do_sample": True,
    },
    "length": {
        "min_new_tokens": 12,
        "exponential_decay_length_penalty": [2, 50.0],
        "max_new_tokens": 3,
    },
    "repeats": {"no_repeat_ngram_size": 1, "encoder_repetition_penalty": 9.0},
    "words": {
        "bad_words_ids": [[i] for i in range(20, 500)],
        "begin_suppress_tokens": [50],
        "forced_eos_token_id": 60,
    },
    "beams": {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 3.0},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "strings": {"stop_strings": ["a", "e"]},
    "output": {"return_dict_in_generate": True, "output_scores": True, "renormalize_logits": True},
    "guidance": {"guidance_scale": 3.0},
    "lookup": {"prompt_lookup_num_tokens": 3},
}


def test_gradient_checkpointing_is_off_while_generating(world):
    """Gradient checkpointing is off while generating. It is on again after."""
    texts = []
    for checkpointing in (False, True):
        policy = pretrained.load(str(world / "policy"), gradient_checkpointing=checkpointing)
        texts.append(policy.generate(policy.encode([prompts()["a clip"]]), 2, 8, sample=False).text)
        assert (
            policy.training
            and policy.core.model.language_model.gradient_checkpointing == checkpointing
        )
    assert texts[0] == texts[1]


@pytest.fixture
def shipped(world, tmp_path):
    """The policy as another would ship it: shipped(file, values) -> a folder in which `file` has
    these values too."""

    def ship(file, values):
        folder = tmp_path / "shipped"
        shutil.copytree(world / "policy", folder)
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))
        return folder

    return ship


@pytest.mark.parametrize("kind", SHIPPED)
def test_generation_settings_a_checkpoint_ships_change_nothing(shipped, tmp_path, policy, kind):
    """Neither samples nor greedy responses, alone and in a batch; and what is saved keeps the
    checkpoint's file."""
    theirs = pretrained.load(str(shipped("generation_config.json", SHIPPED[kind])), trainable=False)
    for name, value in SHIPPED[kind].items():
        assert getattr(theirs.core.generation_config, name) == value
    for sample in (True, False):
        found = []
        for each in (policy, theirs):
            torch.manual_seed(0)
            inputs = each.encode([prompts()["a clip"], prompts()["a picture"]])
            found.append(each.generate(inputs, 6, 20, sample=sample))
        assert torch.equal(found[0].ids, found[1].ids) and found[0].text == found[1].text
        assert len(set(found[0].text[0])) == (6 if sample else 1)
    theirs.save(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert {name: saved[name] for name in SHIPPED[kind]} == SHIPPED[kind]


def test_no_cache_and_no_generation_config_generate_alike(shipped, policy):
    """A config without cache and a missing generation config change no generated token."""
    folder = shipped("config.json", {"use_cache": False})
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["use_cache"] = False
    (folder / "config.json").write_text(json.dumps(config))
    theirs = pretrained.load(str(folder), trainable=False)
    assert not theirs.core.config.text_config.use_cache
    found = [
        each.generate(each.encode([prompts()["a clip"]]), 1, 12, sample=False)
        for each in (policy, theirs)
    ]
    assert torch.equal(found[0].ids, found[1].ids)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_in_a_checkpoint_does_not_act(shipped, tmp_path, checkpointing):
    """Scores in training mode equal those in evaluation mode: the ratio of a first update is 1. The
    checkpoint's file keeps its dropout."""
    config = json.loads((shipped("config.json", {}) / "config.json").read_text())
    config["text_config"]["attention_dropout"] = config["vision_config"]["attention_dropout"] = 0.5
    (tmp_path / "shipped/config.json").write_text(json.dumps(config))
    for options in ({}, {"attention": "eager"}, {"lora_rank": 2}, {"train_vision": True}):
        policy = pretrained.load(
            str(tmp_path / "shipped"), gradient_checkpointing=checkpointing, **options
        )
        inputs, ids = policy.encode([prompts()["a clip"]]), ragged(5, 3)
        assert policy.training
        logp = policy(inputs, ids).logp.detach()
        close(logp, policy(inputs, ids).logp.detach(), 1e-5)
        close(logp, policy.eval()(inputs, ids).logp.detach(), 1e-5)
    policy.save(tmp_path / "saved")
    assert (
        json.loads((tmp_path / "saved/config.json").read_text())["text_config"]["attention_dropout"]
        == 0.5
    )


@pytest.fixture
def padded(world, tmp_path):
    """A policy whose vocabulary has 37 rows that stand for no token, all likelier than any other,
    as are controls."""
    policy = pretrained.load(str(world / "policy"))
    model, size = policy.core, len(policy.processor.tokenizer)
    model.resize_token_embeddings(size + 37)
    with torch.no_grad():
        model.lm_head.weight[size:] = 4 * torch.randn(37, model.lm_head.in_features)
        model.lm_head.weight[never_ids(policy)] *= 5
    policy.save(tmp_path / "padded")
    return pretrained.load(str(tmp_path / "padded"), trainable=False), size


def test_rows_without_a_token_are_never_sampled_nor_scored(padded):
    """Rows of the head without a token are never sampled nor scored."""
    policy, size = padded
    assert policy.core.lm_head.weight.shape[0] == size + 37
    assert policy.banned_ids == sorted([*never_ids(policy), *range(size, size + 37)])
    torch.manual_seed(0)
    inputs = policy.encode([prompts()["a picture"], prompts()["a clip"]])
    out = policy.generate(inputs, 50, 8)
    assert not torch.isin(out.ids[out.mask], torch.tensor(policy.banned_ids)).any()
    p = (
        policy(inputs, torch.arange(size + 37).view(1, -1, 1).expand(2, -1, 1))
        .logp[..., 0]
        .double()
        .exp()
    )
    assert p[:, policy.banned_ids].max() == 0
    torch.testing.assert_close(p.sum(1), torch.ones(2, dtype=torch.float64), atol=1e-5, rtol=0)


def test_stage_tags_that_are_special_tokens_are_said_and_scored(world, tmp_path, policy):
    """A checkpoint may have added them as such: what is decoded keeps them, or every format reward
    would be 0."""
    tags = [
        f"<{end}{tag}>" for tag in ("prethink", "caption", "think", "answer") for end in ("", "/")
    ]
    shutil.copytree(world / "policy", tmp_path / "special")
    special = pretrained.load(str(tmp_path / "special"), trainable=False)
    special.processor.tokenizer.add_special_tokens({"additional_special_tokens": tags})
    special = vlm.VLM(special.core, special.processor, 3136, 401_408)
    ids = special.processor.tokenizer.convert_tokens_to_ids(tags)
    assert set(ids) <= set(special.processor.tokenizer.all_special_ids) and not set(ids) & set(
        special.banned_ids
    )
    # the world's instructions are one token each whose text holds all the tags: none is said here
    words = special.processor.tokenizer.get_vocab().items()
    special.bias[[i for word, i in words if "<answer>" in word and word not in tags]] = -1e30
    with torch.no_grad():
        special.core.lm_head.weight[ids] *= 4
    torch.manual_seed(0)
    out = special.generate(special.encode([prompts()["a picture"]]), 20, 12)
    said = torch.isin(out.ids, torch.tensor(ids)) & out.mask
    assert said.sum() > 20
    for row, keep, text in zip(out.ids[0], said[0], out.text[0], strict=True):
        want = policy.processor.tokenizer.convert_ids_to_tokens(row[keep].tolist())
        assert [tag for tag in re.findall(r"</?\w+>", text) if tag in tags] == want


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_a_padded_prompt_samples_what_it_samples_alone(world, attention, dtype):
    policy = pretrained.load(
        str(world / "policy"), dtype=dtype, attention=attention, trainable=False
    )
    rows = [prompts()[kind] for kind in ("a picture", "several pictures", "a clip")]
    batch = policy.encode(rows)
    assert batch["attention_mask"].sum(1).unique().numel() == 3
    draws = torch.rand(3, 2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    together = policy.generate(batch, 2, 6, draws=draws)
    scores = policy(batch, together.ids, together.mask)
    assert scores.logp.isfinite().all() and scores.logp[together.mask].exp().mean() > 1e-3
    if dtype == "float64":
        for b, row in enumerate(rows):
            alone = policy.generate(policy.encode([row]), 2, 6, draws=draws[b : b + 1])
            assert alone.text[0] == together.text[b]


def test_nothing_to_score_gives_nothing_or_one_clear_error(policy):
    """Nothing to score or to draw gives nothing or one clear error."""
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(5, 4, requires_grad=True)
    ids, bias = torch.zeros(0, dtype=torch.long), torch.zeros(5)
    logp, entropy = shared_prefix.log_prob(hidden, weight, ids, bias)
    logp.sum().backward()
    assert logp.shape == entropy.shape == (0,) and torch.equal(weight.grad, torch.zeros(5, 4))
    assert shared_prefix.inverse_cdf(torch.zeros(0, 5), torch.zeros(0, 1)).shape == (0, 1)
    assert shared_prefix.uniform_numbers([], 2, 3, "0/1").shape == (0, 2, 3)
    inputs = policy.encode([prompts()["a picture"]])
    none = policy.generate(inputs, 2, 0)
    assert none.ids.shape == (1, 2, 0) and none.text == [["", ""]] and not none.ended.any()
    scores = policy(inputs, ragged(3, 2), torch.zeros(1, 2, 3))
    assert not scores.logp.any() and not scores.entropy.any()
    for call, says in (
        (lambda: policy.encode([]), "no conversation"),
        (lambda: policy.encode_responses([]), "no response"),
        (lambda: policy.generate(inputs, 0, 3), "at least 1 completion"),
        (lambda: policy(inputs, torch.zeros(1, 0, 3, dtype=torch.long)), "at least one token each"),
        (lambda: policy(inputs, torch.zeros(1, 2, 0, dtype=torch.long)), "at least one token each"),
    ):
        with pytest.raises(ValueError, match=says):
            call()


def test_the_padding_token_is_no_end_even_where_listed(world, policy):
    """The padding token is no end even where a checkpoint lists it as one."""
    tokenizer = policy.processor.tokenizer
    model = copy.copy(policy.core)
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.pad_token_id, 50, tokenizer.eos_token_id]
    )
    listed = vlm.VLM(model, policy.processor, 3136, 401_408)
    assert listed.end_ids == [
        tokenizer.eos_token_id,
        50,
    ]  # the end of turn first: responses are closed by it
    assert tokenizer.pad_token_id in listed.banned_ids and 50 not in listed.banned_ids


# --- what is trained, LoRA, saving ----------------------------------------------------------------


def trained(policy) -> set[str]:
    policy.zero_grad(set_to_none=True)
    policy(policy.encode([prompts()["a picture"]]), ragged(4, 4)).logp.sum().backward()
    return {
        name
        for name, p in policy.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 0
    }


def test_vision_is_frozen_by_default_and_train_vision_trains_it(world):
    everything = {name for name, _ in pretrained.load(str(world / "policy")).named_parameters()}
    vision = {name for name in everything if ".visual." in name}
    assert 10 < len(vision) < len(everything)
    assert trained(pretrained.load(str(world / "policy"))) == everything - vision
    assert trained(pretrained.load(str(world / "policy"), train_vision=True)) == everything


def test_an_untrainable_policy_is_frozen_and_in_evaluation_mode(world):
    policy = pretrained.load(str(world / "policy"), trainable=False, lora_rank=4, train_vision=True)
    assert not policy.training and not any(p.requires_grad for p in policy.parameters())
    assert not hasattr(policy.model, "peft_config")


@pytest.fixture
def lora(world):
    torch.manual_seed(0)
    policy = pretrained.load(str(world / "policy"), lora_rank=4)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)
    return policy


def test_the_adapter_adds_two_b_a_to_every_linear(lora):
    """lora_alpha is twice the rank: W + (alpha / r) B A."""
    count = 0
    for module in lora.core.modules():
        if hasattr(module, "lora_A"):
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            x = torch.randn(3, a.shape[1])
            close(module(x) - module.base_layer(x), 2 * x @ a.T @ b.T, 1e-4)
            count += 1
    assert count == 7 * lora.core.config.text_config.num_hidden_layers


def renamed(folder, rename, drop=""):
    """The adapter in `folder` with its weights under other names, less those that hold `drop`."""
    weights = load_file(folder / "adapter_model.safetensors")
    kept = {rename(name): value for name, value in weights.items() if not drop or drop not in name}
    save_file(kept, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_of_older_transformers_has_its_effect(lora, tmp_path):
    """Its weights are called model.layers..., which is model.language_model.layers... today."""
    lora.save(tmp_path, merge=False)
    renamed(tmp_path, lambda name: name.replace("model.language_model.", "model."))
    inputs, ids = lora.encode([prompts()["a picture"]]), ragged(4, 2)
    loaded = pretrained.load(str(tmp_path), trainable=False)
    close(loaded(inputs, ids).logp, lora.eval()(inputs, ids).logp.detach(), 1e-4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"drop": "layers.1.mlp.up_proj.lora_A"},
            "lacks weights that its adapter_config.json describes",
        ),
        ({"rename": lambda name: name.replace("layers.1", "layers.9")}, "lacks weights"),
        (
            {"config": {"target_modules": ["q_proj"]}},
            "holds 56 weights, of which its adapter_config.json has places",
        ),
    ],
)
def test_an_adapter_that_would_load_in_part_is_refused(lora, tmp_path, change, says):
    lora.save(tmp_path, merge=False)
    renamed(tmp_path, change.get("rename", lambda name: name), change.get("drop", ""))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change.get("config", {})))
    with pytest.raises(ValueError, match=says):
        pretrained.load(str(tmp_path), trainable=False)


def adapter_alone(lora, folder, **config):
    """As PEFT saves an adapter, with no file of the processor or the tokenizer."""
    lora.model.save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))
    return folder


def test_an_adapter_alone_takes_the_processor_of_its_base(lora, tmp_path):
    folder = adapter_alone(lora, tmp_path)
    assert not list(folder.glob("*token*")) and not list(folder.glob("*processor*"))
    most, tokenizer = pretrained.context(str(folder))
    assert most == lora.core.config.text_config.max_position_embeddings
    assert tokenizer.get_vocab() == lora.processor.tokenizer.get_vocab()
    loaded, ids = pretrained.load(str(folder), trainable=False), ragged(4, 2)
    inputs = [each.encode([prompts()["a picture"]]) for each in (loaded, lora)]
    assert torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"])
    close(loaded(inputs[0], ids).logp, lora.eval()(inputs[1], ids).logp.detach(), 1e-4)


def test_an_adapter_with_a_tokenizer_alone_keeps_it(lora, tmp_path):
    """As a trainer saves it that knows the tokenizer only."""
    folder, tokenizer = adapter_alone(lora, tmp_path), copy.deepcopy(lora.processor.tokenizer)
    tokenizer.chat_template = "{{ 'Listen. ' }}" + lora.processor.chat_template
    tokenizer.save_pretrained(folder)
    assert pretrained.context(str(folder))[1].chat_template == tokenizer.chat_template
    loaded = pretrained.load(str(folder), trainable=False)
    texts = [
        each.processor.tokenizer.decode(each.encode([prompts()["a picture"]])["input_ids"][0])
        for each in (loaded, lora)
    ]
    assert texts[0] == "Listen. " + texts[1]


@pytest.mark.parametrize(
    ("config", "lost", "says"),
    [
        (
            {"base_model_name_or_path": None},
            "",
            "adapter_config.json names no base_model_name_or_path; write",
        ),
        (
            {"base_model_name_or_path": "/gone/base"},
            "",
            "is an adapter of /gone/base, which is not there. Put it back",
        ),
        (
            {"base_model_name_or_path": "a/gone/base"},
            "",
            "is an adapter of a/gone/base, which is not there",
        ),
        ({"peft_type": "MAGIC"}, "", r"adapter_config.json cannot be read \('MAGIC'\)"),
        (
            {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2},
            "",
            "is a PROMPT_TUNING adapter, which cannot be merged",
        ),
        ({}, "adapter_model.safetensors", r"holds no weights \(adapter_model.safetensors\)"),
    ],
)
def test_an_adapter_that_cannot_be_put_on_is_refused(lora, tmp_path, config, lost, says):
    """An adapter that cannot be put on is refused before its base is loaded."""
    folder = adapter_alone(lora, tmp_path, **config)
    if lost:
        (folder / lost).unlink()
    for opened in (pretrained.context, pretrained.load):
        with pytest.raises((ValueError, OSError), match=says) as caught:
            opened(str(folder))
        assert "\n" not in str(caught.value)


def test_an_adapter_of_another_rank_is_refused_with_the_sizes(lora, tmp_path):
    folder = adapter_alone(lora, tmp_path, r=8)
    with pytest.raises(
        ValueError, match=r"differ: size mismatch for .*lora_A.*\[4, \d+\].*\[8, \d+\]"
    ) as caught:
        pretrained.load(str(folder), trainable=False)
    assert str(caught.value).startswith(
        f"{folder} and its adapter_config.json"
    ) and "\n" not in str(caught.value)


def reweighed(folder, change):
    """The checkpoint in `folder` with the weights that `change` makes of its own."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return folder


QUERY = "model.layers.0.self_attn.q_proj.weight"  # as the file calls it


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: {k: v for k, v in w.items() if k != QUERY}, r"lack 1 weight \(.*0.self_attn.q_proj.weight\);"),
        (lambda w: {k: v for k, v in w.items() if k != "lm_head.weight"}, r"lack 1 weight \(lm_head.weight\);"),
        (lambda w: {k: v for k, v in w.items() if "visual" not in k}, r"lack 30 weights \(model.visual."),
        (lambda w: w | {"foo.bar": torch.zeros(2)}, r"files hold 1 that the model has no place for \(foo.bar\);"),
        (lambda w: {f"module.{k}": v for k, v in w.items()}, r"lack 81 .* and hold 81 .* \(module.lm_head.weight\);"),
        (lambda w: {f"base_model.model.{k}": v for k, v in w.items()}, r"lack 81 .* hold 81 .* \(base_model\."),
        (
            lambda w: {k.replace("q_proj.", "q_proj.base_layer."): v for k, v in w.items()},
            r"lack 8 weights .* and hold 8 .*q_proj.base_layer.bias\); give a whole checkpoint, "
            r"with any LoRA merged",
        ),
        (lambda w: w | {QUERY: torch.zeros(2, 3)}, r"1 of another size .*q_proj.weight: \[2, 3\], not \[128, 128\]"),
    ],
    ids=["a weight", "head", "tower", "too many", "module", "base_model", "base_layer", "size"],
)  # fmt: skip
def test_a_checkpoint_that_would_load_in_part_is_refused(shipped, change, says):
    folder = reweighed(shipped("config.json", {}), change)
    with pytest.raises(ValueError, match=says) as caught:
        pretrained.load(str(folder))
    assert "\n" not in str(caught.value)


def test_a_head_that_is_the_embedding_is_not_missed(shipped):
    folder = reweighed(
        shipped("config.json", {"tie_word_embeddings": True}),
        lambda w: {name: value for name, value in w.items() if name != "lm_head.weight"},
    )
    core = pretrained.load(str(folder)).core
    assert core.lm_head.weight is core.get_input_embeddings().weight


def weights_in_parts(folder):
    core = pretrained.load(str(folder)).core
    (folder / "model.safetensors").unlink()
    core.save_pretrained(folder, max_shard_size="200KB")
    return sorted(folder.glob("model-*"))


@pytest.mark.parametrize(
    "how", ["gone", "cut", "git-lfs", "cut, older", "a part gone", "a part cut"]
)
def test_files_that_are_not_whole_are_refused(shipped, how):
    """Files that are not whole are refused before anything is loaded."""
    folder = shipped("config.json", {})
    file = folder / "model.safetensors"
    if how == "gone":
        file.unlink()
    elif how == "git-lfs":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    elif how == "cut, older":
        torch.save(load_file(file), folder / "pytorch_model.bin")
        file.unlink()
        pretrained.load(str(folder))  # a whole one is read
        file = folder / "pytorch_model.bin"
    elif how.startswith("a part"):
        _, file, *_ = weights_in_parts(folder)
        pretrained.context(str(folder))
    if "part gone" in how:
        file.unlink()
    elif "cut" in how:
        file.write_bytes(file.read_bytes()[:-99])
    says = (
        f"{folder} holds no weights (model.safetensors)"
        if how == "gone"
        else f"{file} is incomplete ("
    )
    for opened in (pretrained.context, pretrained.load):
        with pytest.raises((ValueError, OSError), match=re.escape(says)) as caught:
            opened(str(folder))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "method"),
    [
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"load_in_4bit": True}, "bitsandbytes"),
    ],
)
def test_a_quantised_model_is_refused_before_it_is_loaded(shipped, lora, tmp_path, config, method):
    folder = shipped("config.json", {"quantization_config": config})
    adapter = adapter_alone(lora, tmp_path / "adapter", base_model_name_or_path=str(folder))
    for opened in (pretrained.context, pretrained.load):
        for path, it in ((folder, "it"), (adapter, f"its base {folder}")):
            with pytest.raises(
                ValueError, match=re.escape(f"{it} is quantised ({method}); give the unquantised")
            ):
                opened(str(path))


@pytest.mark.parametrize("lost", [("tokenizer.json", "tokenizer_config.json"), ("tokenizer.json",)])
def test_a_folder_without_a_tokenizer_is_refused(shipped, lost):
    folder = shipped("config.json", {})
    for name in lost:
        (folder / name).unlink()
    for opened in (pretrained.context, pretrained.load):
        with pytest.raises(
            ValueError, match=r"its tokenizer lacks .* the image token of its config.json"
        ):
            opened(str(folder))


def test_a_tokenizer_of_another_model_is_refused(shipped):
    folder = shipped("config.json", {"image_token_id": 77})
    with pytest.raises(
        ValueError, match=r"lacks .* the image token of its config.json \(<\|image_pad\|>, 77\)"
    ):
        pretrained.context(str(folder))


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.role }", "its chat template cannot be used (unexpected '}')"),
        ("{{ raise_exception('no user') }}", "its chat template cannot be used (no user)"),
        (
            "{{ messages[0].a.b }}",
            "its chat template cannot be used ('dict object' has no attribute 'a')",
        ),
        (
            "{% for m in messages %}{{ 'x' + m.content }}{% endfor %}",
            "its chat template cannot be used (",
        ),
        ("{{ 'who cares' }}", "its chat template leaves out pictures or words"),
        (
            "{% for m in messages %}{{ m.content | string }}{% endfor %}",
            "its chat template leaves out pictures or words",
        ),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(shipped, template, says):
    folder = shipped("config.json", {})
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        pretrained.context(str(folder))
    assert "\n" not in str(caught.value)


def test_a_chat_template_that_only_the_tokenizer_has_is_found(shipped, policy):
    folder = shipped("config.json", {})
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    assert pretrained.context(str(folder))[1].chat_template == template
    theirs = pretrained.load(str(folder), trainable=False)
    found = [each.encode([prompts()["a clip"]])["input_ids"] for each in (policy, theirs)]
    assert torch.equal(*found)


def test_a_chat_template_that_only_the_processor_has_is_found(shipped, policy):
    folder = shipped("config.json", {})
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    most, tokenizer = pretrained.context(str(folder))
    assert (
        tokenizer.chat_template == template
        and most == policy.core.config.text_config.max_position_embeddings
    )
    theirs = pretrained.load(str(folder), trainable=False)
    found = [each.encode([prompts()["a clip"]])["input_ids"] for each in (policy, theirs)]
    assert torch.equal(*found)
    (folder / "chat_template.json").unlink()
    with pytest.raises(ValueError, match="it has no chat template; give an Instruct checkpoint"):
        pretrained.context(str(folder))


def test_a_model_of_another_family_is_refused(world, tmp_path):
    """A model of another family is refused before it is loaded."""
    with pytest.raises(ValueError, match="it is a qwen2 model, and only Qwen2.5-VL"):
        pretrained.context(str(world / "judge"))
    config = {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="it is a qwen3_vl model, and only Qwen2.5-VL"):
        pretrained.context(str(tmp_path))


@pytest.mark.parametrize("train_vision", [False, True])
def test_rows_of_a_batch_are_what_encode_gives(world, train_vision):
    """Several pictures, clips and none in a row, in any part of a batch."""
    policy = pretrained.load(str(world / "policy"), train_vision=train_vision)
    chats = [*prompts().values(), chat("No picture."), prompts()["a clip"]]
    whole = policy.encode(chats)
    assert {"image_grid_thw", "video_grid_thw", "second_per_grid_ts"} <= set(whole)
    for start in range(len(chats)):
        for stop in range(start + 1, len(chats) + 1):
            part = vlm.rows_of(whole, slice(start, stop))
            alone = policy.encode(chats[start:stop])
            assert set(part) == set(alone), (start, stop)
            for name, x in alone.items():
                atol = 1e-5 if "features" in name else 0  # of the tower
                torch.testing.assert_close(part[name], x, atol=atol, rtol=0, msg=name)


def test_lora_gradients_reach_the_language_model_s_adapters(lora):
    """LoRA gradients reach the language model's adapters and nothing else."""
    names = trained(lora)
    layers = lora.core.config.text_config.num_hidden_layers
    assert len(names) == layers * 7 * 2  # q, k, v, o, gate, up, down; A and B
    assert all("lora_" in name and "language_model" in name for name in names)
    assert names == {name for name, p in lora.named_parameters() if p.requires_grad}


def test_a_new_adapter_changes_nothing(world, lora, policy):
    """A new adapter changes nothing. `base` takes a trained one away."""
    inputs, ids = (
        policy.encode([prompts()["a picture"], prompts()["a clip"]]),
        ragged(4, 3).expand(2, 2, 4),
    )
    with torch.no_grad():
        plain = policy(inputs, ids).logp
        new = pretrained.load(str(world / "policy"), lora_rank=4)
        close(new(inputs, ids).logp, plain, 1e-5)
        assert (lora(inputs, ids).logp - plain).abs().max() > 0.1
        with lora.base():
            close(lora(inputs, ids).logp, plain, 1e-5)
        assert (lora(inputs, ids).logp - plain).abs().max() > 0.1  # and it is back afterwards
        with policy.base():  # without an adapter there is nothing to take away
            assert torch.equal(policy(inputs, ids).logp, plain)


@pytest.fixture
def faint(world):
    """In bfloat16, with an adapter as a short cold start leaves it."""
    torch.manual_seed(0)
    policy = pretrained.load(str(world / "policy"), lora_rank=4, dtype="bfloat16")
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=3e-3)
    return policy


def test_an_adapter_stays_one_and_is_the_reference(faint, tmp_path):
    """Evaluated or trained on, an adapter is what was saved, bit for bit, although bfloat16 weights
    would swallow it. `base` is the adapter as it was loaded."""
    inputs, ids = faint.encode([prompts()["a picture"]]), ragged(6)
    faint.save(tmp_path, merge=False)
    seen = pretrained.load(str(tmp_path), dtype="bfloat16", trainable=False)
    policy = pretrained.load(str(tmp_path), dtype="bfloat16", lora_rank=4)
    assert not any(p.requires_grad for p in seen.parameters())
    names = trained(policy)
    assert names == trained(faint) and all(".default." in name for name in names)
    with torch.no_grad():
        before = faint.eval()(inputs, ids).logp
        assert torch.equal(seen(inputs, ids).logp, before)
        assert torch.equal(policy(inputs, ids).logp, before)
        for name, p in policy.named_parameters():
            if name in names:
                p += 0.1
        after = policy(inputs, ids).logp
        assert (after - before).abs().max() > 0.1
        with policy.base():
            assert torch.equal(policy(inputs, ids).logp, before)
        assert torch.equal(policy(inputs, ids).logp, after)
    assert trained(policy) == names
    policy.save(tmp_path / "later", merge=False)
    assert not (tmp_path / "later" / "reference").exists()
    later = pretrained.load(str(tmp_path / "later"), dtype="bfloat16", trainable=False)
    with torch.no_grad():
        assert torch.equal(later(inputs, ids).logp, after)


@pytest.mark.parametrize("config", [{"lora_dropout": 0.3}, {"init_lora_weights": "pissa"}])
def test_the_reference_adapter_is_a_plain_copy(lora, tmp_path, config):
    """No dropout, and no second start: PiSSA's changes the weights below the adapter."""
    folder, ids = adapter_alone(lora, tmp_path, **config), ragged(6)
    seen = pretrained.load(str(folder), trainable=False)
    policy = pretrained.load(str(folder), lora_rank=4)
    assert policy.training
    inputs = seen.encode([prompts()["a picture"]])
    with torch.no_grad():
        before = seen(inputs, ids).logp
        assert torch.equal(policy(inputs, ids).logp, before)
        with policy.base():
            assert torch.equal(policy(inputs, ids).logp, before)


def test_an_adapter_merged_in_half_precision_is_said(faint, lora, tmp_path, recwarn):
    """An adapter of another rank, or full fine-tuning: merged in, and with what that costs."""
    faint.save(tmp_path / "half", merge=False)
    lora.save(tmp_path / "single", merge=False)
    inputs, ids = faint.encode([prompts()["a picture"]]), ragged(6)
    evaluated = {"trainable": False}  # in the same run, as its training begins
    for options in (
        {"lora_rank": 8},
        {},
        {"lora_rank": 8} | evaluated,
        {"lora_rank": 0} | evaluated,
    ):
        with pytest.warns(match="half is merged into bfloat16 weights, which rounds small changes"):
            policy = pretrained.load(str(tmp_path / "half"), dtype="bfloat16", **options)
        with torch.no_grad():
            lost = policy(inputs, ids).logp - faint(inputs, ids).logp
            assert lost.abs().max() > 0
            policy = pretrained.load(str(tmp_path / "single"), **options)
            close(policy(inputs, ids).logp, lora(inputs, ids).logp, 1e-4)
    assert not [w for w in recwarn if "is merged" in str(w.message)]


def hf_logp(folder, policy, conversation, ids) -> torch.Tensor:
    """Log-probs of one completion by a model that plain transformers loaded from the folder."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with torch.no_grad():
        return row_by_row(
            model, never_ids(policy), policy.encode([conversation]), ids[0], (ids.shape[-1],)
        )[0][0]


def test_a_saved_adapter_is_merged_and_training_goes_on(lora, tmp_path):
    """A saved adapter is merged and loads in plain transformers. Training goes on."""
    conversation, ids = prompts()["a picture"], ragged(5)
    inputs = lora.encode([conversation])
    with torch.no_grad():
        before = lora(inputs, ids).logp
    lora.save(tmp_path / "merged")
    close(hf_logp(tmp_path / "merged", lora, conversation, ids), before[0, 0], 1e-4)
    again = pretrained.load(str(tmp_path / "merged"), trainable=False)
    close(again(again.encode([conversation]), ids).logp, before, 1e-4)
    assert not (tmp_path / "merged" / "adapter_config.json").exists()

    with torch.no_grad():
        assert torch.equal(lora(inputs, ids).logp, before)  # saving changed nothing here
    assert len(trained(lora)) == lora.core.config.text_config.num_hidden_layers * 14
    torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=0.1).step()
    with torch.no_grad():
        after = lora(inputs, ids).logp
    assert (after - before).abs().max() > 1e-3
    lora.save(tmp_path / "later")
    close(hf_logp(tmp_path / "later", lora, conversation, ids), after[0, 0], 1e-4)


def test_a_trained_policy_reads_back_in_plain_transformers(fresh, tmp_path):
    """A fully trained policy saves what plain transformers and `load` read back."""
    with torch.no_grad():
        for p in fresh.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    conversation, ids = prompts()["a clip"], ragged(5)
    fresh.save(tmp_path / "policy")
    with torch.no_grad():
        want = fresh(fresh.encode([conversation]), ids).logp
    close(hf_logp(tmp_path / "policy", fresh, conversation, ids), want[0, 0], 1e-4)
    again = pretrained.load(str(tmp_path / "policy"), trainable=False)
    assert torch.equal(again(again.encode([conversation]), ids).logp, want)


# --- the head -------------------------------------------------------------------------------------


def test_no_head_tensor_grows_with_vocabulary_times_length():
    """No tensor of the head grows with vocabulary times length."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in torch.utils._pytree.tree_leaves(out):
                if isinstance(x, torch.Tensor):
                    self.numbers = max(self.numbers, x.numel())
            return out

    n, d, v, chunk = 3000, 8, 2000, 2**16
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=True)
    ids, bias = torch.randint(5, v, (n,)), torch.zeros(v)
    bias[[1, 2]] = -1e30
    with Largest() as largest:
        logp, entropy = shared_prefix.log_prob(hidden, weight, ids, bias, chunk)
        logp.sum().backward()
    assert largest.numbers <= max(chunk, n * d, v * d) < n * v / 50
    got = [logp, entropy, hidden.grad, weight.grad]
    hidden, weight = (x.detach().clone().requires_grad_() for x in (hidden, weight))
    table = (hidden @ weight.T).index_fill(-1, torch.tensor([1, 2]), -math.inf).log_softmax(-1)
    want = table.gather(-1, ids[:, None])[:, 0]
    want.sum().backward()
    for x, y in zip(
        got, [want, torch.special.entr(table.exp()).sum(-1), hidden.grad, weight.grad], strict=True
    ):
        torch.testing.assert_close(x, y, atol=2e-4, rtol=1e-4)


def test_a_sure_token_among_150_000_is_scored_exactly():
    """float32 against log_softmax in float64: the tail has a mass of 1e-3, and softmax's own sum
    over such a vocabulary is off by a tenth of that."""
    v = 150_000
    weight = torch.zeros(v, 1)
    weight[7] = math.log(999 * (v - 1))
    found = []
    for x in (torch.float32, torch.float64):
        hidden = torch.ones(2, 1, dtype=x, requires_grad=True)
        w, ids = weight.to(x, copy=True).requires_grad_(), torch.tensor([7, 8])
        if x == torch.float32:
            logp, entropy = shared_prefix.log_prob(hidden, w, ids, torch.zeros(v))
        else:
            table = (hidden @ w.T).log_softmax(-1)
            logp, entropy = table.gather(-1, ids[:, None])[:, 0], -(table.exp() * table).sum(-1)
        (logp * torch.tensor([1.0, 0.5])).sum().backward()
        found.append([logp, entropy, hidden.grad, w.grad])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-9)


# --- the local judge ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions():
    rng = random.Random(5)
    cases = [models.judge_case(rng) for _ in range(24)]
    return [
        models.caption_reward.judge_prompt(q, c * (1 + i % 3))
        for i, (q, c, _, _) in enumerate(cases)
    ]


def test_the_judge_does_not_depend_on_batch_or_order(world, questions):
    """The judge is deterministic. It does not depend on batch or order."""
    judge = judges.LocalJudge(str(world / "judge"))
    replies = judge(questions)
    assert len(replies) == len(questions) and len(set(replies)) > 3  # it tells questions apart
    assert judge(questions) == replies
    assert judge(questions[::-1]) == replies[::-1]
    assert judges.LocalJudge(str(world / "judge"), batch=1)(questions) == replies
    assert judges.LocalJudge(str(world / "judge"), batch=7)(questions) == replies
    assert judge([]) == []


def test_the_judges_replies_are_those_of_plain_greedy(world, questions):
    """The judge's replies are those of plain, unpadded, greedy generation."""
    tokenizer = AutoTokenizer.from_pretrained(world / "judge")
    model = AutoModelForCausalLM.from_pretrained(world / "judge").eval()
    replies = judges.LocalJudge(str(world / "judge"), max_new_tokens=3)(questions[:6])
    for question, reply in zip(questions[:6], replies, strict=True):
        text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids = torch.tensor([tokenizer(text).input_ids])
        for _ in range(3):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
        assert reply == tokenizer.decode(
            ids[0, len(tokenizer(text).input_ids) :], skip_special_tokens=True
        )


def test_sampling_settings_that_a_judge_ships_change_nothing(world, tmp_path, questions):
    shutil.copytree(world / "judge", tmp_path / "judge")
    path = tmp_path / "judge" / "generation_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | SHIPPED | {"temperature": 5.0, "top_k": 0})
    )
    assert judges.LocalJudge(str(tmp_path / "judge"))(questions) == judges.LocalJudge(
        str(world / "judge")
    )(questions)
