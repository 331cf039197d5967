"""The pipeline as a user starts it: `accelerate launch train.py`, in miniature, with every
stage."""

import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from commands import launch
from safetensors.torch import load_file, save_file
from transformers import Trainer, get_cosine_schedule_with_warmup

import conflict
import data
import engine
import eval as evaluation
import measures
import ntk_infonce
import rollouts
import selection
import train
from engine import DataError, files, judges, learner, pretrained, shared_prefix
from engine.vlm import VLM

ROOT = Path(__file__).parent.parent
SMALL = (
    "--sft_steps 40 --sft_batch 8 --sft_lr 3e-3 --responses 4 --rl_steps 9 --prompts_per_step 4 "
    "--group_size 4 "
    "--prompts_per_pass 3 --save_every 2 --show_every 2 --max_new_tokens 40 --rl_lr 1e-3"
).split()


def command(*options, script=("train.py",)):
    file, *arguments = script
    line = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / file), *arguments]
    return [*line, *map(str, options)]


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """A whole run: (its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    line = command("--world", world, "--output_dir", folder, *SMALL)
    done = subprocess.run(line, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


def metrics_of(folder, stage="rl"):
    return (folder / stage / "metrics.jsonl").read_bytes()


def test_every_stage_leaves_its_output(finished):
    folder, _ = finished
    for name in (
        "config.yaml",
        "sft/policy",
        "select/selected.json",
        "rl/policy",
        "eval/before.json",
        "report.html",
    ):
        assert (folder / name).exists(), name
    scores = [
        json.loads(line) for line in (folder / "select/scores.jsonl").read_text().splitlines()
    ]
    assert len(scores) == 12 and all(len(line["caption"]) == 4 for line in scores)
    lines = [json.loads(line) for line in metrics_of(folder).splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-7), (
        "at the first update the policy is the reference"
    )
    assert abs(lines[0]["loss"]) < 1e-5 and lines[0]["grad_norm"] > 0
    assert all(line["nce/active"] >= 0 and "reward/caption" in line for line in lines)
    for line in lines:
        assert (
            0 <= line["nce/active"] <= 4
            and 0 <= line["nce/positive"] <= 1
            and -1 <= line["nce/cosine_mean"] <= 1
        )
    assert not list(folder.rglob("*.unfinished")) and not list(folder.rglob("checkpoint-*"))


def test_the_end_names_the_run_folder_and_the_report(finished):
    folder, printed = finished
    assert str(folder / "report.html") in printed and "test" in printed


def test_the_trained_policy_loads_with_plain_transformers(finished):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder, _ = finished
    assert AutoModelForImageTextToText.from_pretrained(folder / "rl/policy").num_parameters() > 1e6
    assert AutoProcessor.from_pretrained(folder / "rl/policy").tokenizer.eos_token == "<|im_end|>"


def test_the_same_command_again_only_reports(finished, world):
    folder, _ = finished
    before = metrics_of(folder)
    done = launch("--world", world, "--output_dir", folder, *SMALL)
    assert metrics_of(folder) == before and "rl    1/9" not in done.stdout


def test_the_papers_sentences_are_measured_on_a_finished_run(finished):
    """bench/claims.py, the numbers of the README, in miniature."""
    done = launch(
        "--run", finished[0], "--prompts", "4", "--batches", "1", script="bench/claims.py"
    )
    assert "| all |" in done.stdout and all(
        f"`{name}`" in done.stdout for name in ntk_infonce.FEATURES
    )


def test_another_configuration_is_refused(finished, world):
    """Another configuration is refused. The message says which fields differ."""
    folder, _ = finished
    done = launch("--world", world, "--output_dir", folder, *SMALL, "--beta", "0.5", check=False)
    assert done.returncode != 0 and "beta: 0.04 there, 0.5 now" in done.stderr


def test_interrupted_and_resumed_equals_uninterrupted(finished, world, tmp_path):
    """Two runs with one seed give the same metrics, also when one of them is stopped in two of its
    stages. They are equal bit for bit."""
    folder, _ = finished
    other = tmp_path / "again"
    for moment in ("sft-5", "rl-4"):
        done = subprocess.run(
            command(
                "--world",
                world,
                "--output_dir",
                other,
                *SMALL,
                script=["tests/stops.py", moment, "INT"],
            ),
            capture_output=True,
            text=True,
            start_new_session=True,  # the signal goes to all of it, the launcher too
            # background jobs ignore it
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            timeout=900,
        )
        assert done.returncode != 0 and "interrupted. The same command" in done.stderr, done.stderr[
            -3000:
        ]
        stage, number = moment.split("-")
        assert (
            len(metrics_of(other, stage).splitlines()) == int(number) - 1
            and not (other / stage / "policy").exists()
        )
    done = launch("--world", world, "--output_dir", other, *SMALL)
    assert "resumed after update" in done.stdout
    for stage in ("sft", "rl"):
        assert metrics_of(other, stage) == metrics_of(folder, stage)
    for file in (
        "rl/policy/model.safetensors",
        "eval/after.json",
        "rl/rollouts.jsonl",
        "select/scores.jsonl",
    ):
        assert (other / file).read_bytes() == (folder / file).read_bytes(), file


def test_the_baselines_and_lora_run(finished, world, tmp_path):
    small = [*SMALL, "--rl_steps", "2"]
    twice = [
        "--iterations",
        "2",
        "--rl_lr",
        "0.1",
        "--warmup",
        "0",
    ]  # the second update is off-policy: the clip acts
    start = [
        "--model",
        finished[0] / "sft/policy",
        "--sft_steps",
        "0",
        "--four_stage",
        "true",
        "--lora_rank",
        "4",
    ]
    launch(
        "--world",
        world,
        "--output_dir",
        tmp_path / "grpo",
        "--method",
        "grpo",
        *small,
        *start,
        *twice,
    )
    line = json.loads(metrics_of(tmp_path / "grpo").splitlines()[0])
    assert (
        "reward/caption" not in line
        and "nce" not in line
        and line["kl"] > 1e-3
        and line["clipped"] > 0
    )
    launch("--world", world, "--output_dir", tmp_path / "sft", "--method", "sft", *small)
    assert not (tmp_path / "sft/rl").exists()
    judged = json.loads((tmp_path / "sft/eval/before.json").read_text())["test"]["metrics"][
        "answerable captions"
    ]
    assert judged["n"] == 10, "captions are judged also where they earn no reward"


def plain_logp(policy, sample, cfg, ids):
    """log pi of each token of one response, one row by itself, all logits at once.   [T] -> [T]"""
    inputs = policy.encode(data.prompts([sample], cfg.four_stage, cfg.fps, cfg.max_frames))
    hidden, (weight, bias) = policy.score_plain(inputs, ids[None, None]).hidden[0, 0], policy.head()
    return (hidden @ weight.T + bias).log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def answer_ids(policy, sample):
    tokenizer = policy.processor.tokenizer
    return torch.tensor(
        [*tokenizer(f"<answer>{sample.answer}</answer>").input_ids, tokenizer.eos_token_id]
    )


@pytest.mark.parametrize("feature", ["reference", "own_prefix", "best", "advantage", "greedy"])
def test_f_is_the_autograd_gradient_of_the_chosen_log_prob(world, feature, monkeypatch):
    """Row by row, with ids laid by hand, against the head's gradient from torch.autograd."""
    policy = pretrained.load(str(world / "policy"), dtype="float64")
    cfg = train.Config(nce_feature=feature, group_size=3, max_new_tokens=6)
    batch, n = data.load(world / "data")["train"][:3], 3
    torch.manual_seed(0)
    part = rollouts.roll_out(batch, policy, cfg, feature=feature)
    part.adv = torch.tensor([[1.0, -1.2, 0.2], [-0.5, 0.7, -0.2], [0.1, 0.4, -0.5]])
    with torch.no_grad():
        got = train.Conflict([part], policy, cfg).cosine(0, policy(part.inputs, part.branches))
    mask, rows = part.mask.unflatten(0, (n, 3)), []
    for i, sample in enumerate(batch):
        responses = [part.branches[i, g][mask[i, g]] for g in range(3)]
        mean = [plain_logp(policy, sample, cfg, ids).mean() for ids in responses]
        answer = answer_ids(policy, sample)
        if feature == "reference":
            objective = plain_logp(policy, sample, cfg, answer).mean()
        elif feature == "own_prefix":
            own = policy.processor.tokenizer(part.text[i][0].split("<answer>")[0]).input_ids
            ids = torch.cat([torch.tensor(own, dtype=torch.long), answer])
            objective = plain_logp(policy, sample, cfg, ids)[len(own) :].mean()
        elif feature == "greedy":
            inputs = policy.encode(data.prompts([sample], cfg.four_stage, cfg.fps, cfg.max_frames))
            greedy = policy.generate(inputs, 1, 6, sample=False)
            objective = plain_logp(policy, sample, cfg, greedy.ids[0, 0][greedy.mask[0, 0]]).mean()
        else:
            objective = mean[int(part.adv[i].argmax())]
            if feature == "advantage":
                objective = sum(a * m for a, m in zip(part.adv[i], mean))
        rows.append(torch.autograd.grad(objective, policy.core.lm_head.weight)[0].flatten())
    rows = torch.stack(rows)
    want = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    monkeypatch.setattr(conflict, "DENSE_LOGITS", 0)
    with torch.no_grad():
        chunked = train.Conflict([part], policy, cfg).cosine(0, policy(part.inputs, part.branches))
        cfg.nce_sketch = 2**16  # in one chunk a token: DENSE_LOGITS is 0
        sketched = train.Conflict([part], policy, cfg).cosine(0, policy(part.inputs, part.branches))
    torch.testing.assert_close(chunked, want, atol=1e-6, rtol=0)
    # six standard deviations
    torch.testing.assert_close(sketched, want, atol=6 * 1.4 / 2**8, rtol=0)
    assert got.triu(1).abs().max() > 1e-4


UPDATES = {  # options of an update that is written out again below
    "fixed tau": "--tau 0.3 --prompts_per_pass 2",
    "quantile": "--tau_quantile 0.5 --prompts_per_pass 3",
    "quantile, passes of one": "--tau_quantile 0.5 --prompts_per_pass 1 --loss_norm token --kl_kind k2",
    "LoRA": "--tau_quantile 0.3 --lora_rank 4 --gradient_checkpointing true --prompts_per_pass 2 --kl_kind rho_k3",
    "vision": "--tau_quantile 0.7 --train_vision true --loss_norm constant --kl_kind k1",
    "responses in passes": "--tau_quantile 0.4 --completions_per_pass 1 --prompts_per_pass 2",
    "LoRA, responses in passes": "--tau_quantile 0.4 --lora_rank 4 --completions_per_pass 2 --gradient_checkpointing true",
}


@pytest.mark.parametrize("options", UPDATES.values(), ids=UPDATES)
def test_the_update_s_gradient_is_eq_1_and_eq_4_written_out(world, tmp_path, monkeypatch, options):
    """`main` up to its first optimiser step against plain rows, one forward pass each, autograd and
    Python's loops."""
    parts, gradients, weights, n = [], {}, {}, 4
    cfg = train.parse_config(
        f"--dtype float64 --sft_steps 0 --selection false --rl_steps 1 --prompts_per_step {n} "
        "--group_size 3 "
        "--max_new_tokens 6 --nce_weight 2 --nce_temperature 0.4 --beta 0.2 --held_out_rows 0 "
        f"--quiet true {options} "
        f"--model {world}/policy --judge {world}/judge --data {world}/data --output_dir {tmp_path}".split()
    )

    def refer(micro_batches, reference):
        for part in micro_batches:
            part.mask[0, 4:] = False  # responses of different lengths
            part.mask[-1, 2:] = False
        original(micro_batches, reference)
        for part in micro_batches:  # a reference that is not the policy
            part.ref_logp = part.ref_logp + 0.3 * torch.randn_like(part.ref_logp)
        parts.extend(micro_batches)

    def reward(parts, judge, cfg):
        shapes = [(len(part.samples), 3) for part in parts]
        return [
            ({"accuracy": torch.randn(s), "format": torch.zeros(s)}, [[None] * 3] * s[0])
            for s in shapes
        ]

    class Stop(Exception):
        pass

    def update(learner):
        gradients.update(
            {n: p.grad.clone() for n, p in learner.policy.named_parameters() if p.grad is not None}
        )
        weights.update(learner.policy.state_dict())
        raise Stop

    original = rollouts.refer
    monkeypatch.setattr(rollouts, "refer", refer)
    monkeypatch.setattr(rollouts, "reward", reward)
    monkeypatch.setattr(train, "evaluate", lambda *_: None)
    monkeypatch.setattr(train.Learner, "update", update)
    with pytest.raises(Stop):
        train.main(cfg)
    assert sum(len(part.samples) for part in parts) == n and len(parts) == -(
        -n // (cfg.prompts_per_pass or n)
    )

    policy = pretrained.load(
        f"{world}/policy", dtype="float64", lora_rank=cfg.lora_rank, train_vision=cfg.train_vision
    )
    policy.load_state_dict(weights)
    loss, features, tokens = 0.0, [], sum(part.mask.sum().item() for part in parts)
    # under LoRA too: f_i is the gradient with respect to it
    head = policy.core.lm_head.weight.requires_grad_()
    for part in parts:
        for i, sample in enumerate(part.samples):
            r = part.rewards["accuracy"][i].double()
            adv = (r - r.mean()) / (r.std() + 1e-4)
            for g in range(3):
                mask = part.mask[3 * i + g]
                logp = plain_logp(policy, sample, cfg, part.branches[i, g][mask])
                x, rho = part.ref_logp[3 * i + g][mask] - logp, (logp - logp.detach()).exp()
                k3 = x.exp() - x - 1
                kl = {"k1": -x, "k2": x * x / 2, "k3": k3, "rho_k3": rho * k3}[cfg.kl_kind]
                length = {"sequence": 3 * n * len(logp), "token": tokens, "constant": 3 * n * 6}[
                    cfg.loss_norm
                ]
                loss = loss + (-adv[g] * rho + 0.2 * kl).sum() / length
            objective = plain_logp(policy, sample, cfg, answer_ids(policy, sample)).mean()
            features.append(torch.autograd.grad(objective, head, create_graph=True)[0].flatten())
    s = torch.stack(
        [torch.stack([torch.cosine_similarity(a, b, 0) for b in features]) for a in features]
    )
    ordered, k = (
        sorted(s[i, j].item() for i in range(n) for j in range(i)),
        round(cfg.tau_quantile * n * (n - 1) / 2),
    )
    tau = (ordered[k - 1] + ordered[k]) / 2 if cfg.tau_quantile else 0.3
    terms = []
    for i in range(n):
        others = [k for k in range(n) if k != i]
        positives = [k for k in others if s[i, k] <= tau]
        if 0 < len(positives) < n - 1:
            terms.append(
                -((s[i, positives] / 0.4).exp().sum() / (s[i, others] / 0.4).exp().sum()).log()
            )
    assert terms, "tau splits no anchor's pairs: choose another"
    (loss + 2 * sum(terms) / len(terms)).backward()
    head.requires_grad_(not cfg.lora_rank)
    trained = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained.keys()
    largest = max(gradient.abs().max() for gradient in trained.values()).item()
    for name, gradient in trained.items():
        torch.testing.assert_close(
            gradients[name], gradient, atol=2e-6 * largest, rtol=0, msg=lambda m, n=name: n + m
        )


def test_where_memory_is_short_the_responses_are_the_same(world, tmp_path):
    """Fewer prompts at a time get the same responses where memory does not suffice."""
    policy, cfg = (
        pretrained.load(str(world / "policy"), dtype="float64"),
        train.Config(output_dir=str(tmp_path / "run")),
    )
    cfg.quiet, cfg.max_new_tokens = True, 12
    rows, sizes, run = data.load(world / "data")["train"][:7], [], train.Run(cfg)

    def roll_out(batch, most):
        sizes.append(len(batch))
        if len(batch) > most:  # what torch says when the memory of this machine is exhausted
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                "9 bytes"
            )
        return rollouts.roll_out(batch, policy, cfg, 3)

    [whole] = run.micro_batches(rows, 0, roll_out, 7)
    parts = run.micro_batches(rows, 0, roll_out, 2)
    assert sizes == [7, 7, 4, 2, 2, 2, 1]
    pairs = [
        (s.id, text) for part in parts for s, text in zip(part.samples, part.text, strict=True)
    ]
    assert sorted(pairs) == sorted(zip((s.id for s in whole.samples), whole.text, strict=True))
    sizes.clear()
    assert [len(part.samples) for part in run.micro_batches(rows, 0, roll_out, 7)] == [
        2,
        2,
        2,
        1,
    ]  # what sufficed is kept to
    with pytest.raises(RuntimeError, match="can't allocate"):
        run.micro_batches(rows, 0, roll_out, 0)
    with pytest.raises(RuntimeError, match="another"):
        run.micro_batches(rows, 0, lambda _: (_ for _ in ()).throw(RuntimeError("another error")))


@pytest.mark.parametrize("vision", ["false", "true"])
def test_a_reference_in_host_memory_gives_the_same_numbers(world, tmp_path, vision):
    """Its layers hold no weights between passes."""
    rows, found = data.load(world / "data")["train"][:2], []
    for where in ("copy", "cpu"):
        options = ["--reference", where, "--train_vision", vision]
        learner = learner_of(world, tmp_path / where, *options)
        reference = train.Reference(f"{world}/policy", learner, learner.cfg)
        inputs = learner.policy.encode(data.prompts(rows, True, 2.0, 4))
        ids = torch.arange(300, 324).view(2, 3, 4)
        found.append(reference.logp(inputs, ids, torch.ones_like(ids)))
    assert torch.equal(*found) and found[0].shape == (6, 4)
    away = [name for name, p in reference.frozen.named_parameters() if p.is_meta]
    assert sum(p.is_meta for p in reference.frozen.core.model.parameters()) == len(away) > 20
    assert "model.model.visual.patch_embed.proj.weight" in away


OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation"


@pytest.mark.parametrize(
    ("options", "at", "passes"),
    [("--iterations 2 --beta 0.2", (1, 5), [2, 4]), ("--lora_rank 2 --beta 0", (1, 3), [4])],
)
def test_an_update_in_less_memory_has_the_same_gradient(
    world, tmp_path, monkeypatch, options, at, passes
):
    """Memory runs out in these calls of `backward`. What fits is kept to, nothing counts twice."""
    calls, sizes, gradients = 0, [], []
    backward, update = train.Learner.backward, train.Learner.update

    def short(learner, loss):
        nonlocal calls
        calls += 1
        if calls in fails:
            raise RuntimeError(OUT_OF_MEMORY)
        backward(learner, loss)

    def watched(learner):
        gradients.append([slot.grad.clone() for slot in learner._slots()])
        sizes.append(len(learner.losses))
        update(learner)

    def rewarded(parts, judge, cfg):
        values = [
            torch.tensor(
                [[random.Random(f"{s.id}/{g}").random() for g in range(3)] for s in p.samples]
            )
            for p in parts
        ]
        return [({"accuracy": x}, [[None] * 3] * len(x)) for x in values]

    monkeypatch.setattr(train.Learner, "backward", short)
    monkeypatch.setattr(train.Learner, "update", watched)
    monkeypatch.setattr(rollouts, "reward", rewarded)
    seen = []
    for fails in ((), at):
        calls, sizes, gradients = 0, [], []
        folder = tmp_path / str(len(fails))
        cfg = train.parse_config(
            "--dtype float64 --rl_steps 1 --prompts_per_step 4 --group_size 3 --max_new_tokens 6 "
            "--nce_weight 2 --tau_quantile 0.5 "
            f"--warmup 0 --held_out_rows 0 --quiet true --world {world} --output_dir {folder} "
            f"{options}".split()
        )
        run, sets = train.Run(cfg), data.load(world / "data")
        train.reinforce(cfg.start, sets["train"], sets, None, cfg, run)
        lines = (folder / "rl/rollouts.jsonl").read_text()
        seen.append((gradients, json.loads(metrics_of(folder)), lines))
        assert sizes == (passes if fails else [1] * len(passes))
    assert run.micro_batch_limit == sys.maxsize  # what fits in an update says nothing of sampling
    (wanted, metrics, lines), (found, again, others) = seen
    assert lines == others and again == pytest.approx(metrics, abs=1e-6) and metrics["nce"] > 0
    for k, (a, b) in enumerate(zip(wanted, found, strict=True)):
        assert max(x.abs().max() for x in a) > 1e-3
        for x, y in zip(a, b, strict=True):  # norms round to float32, also of weights 1e-12 apart
            torch.testing.assert_close(y, x, atol=1e-6 if k else 1e-9, rtol=0)


def test_sampling_takes_all_prompts_and_an_update_its_passes(world, tmp_path, monkeypatch):
    """A token of one prompt's responses costs a GPU as many launches as one of all prompts'."""
    sampled, scored, pixels = [], [], []

    def generate(policy, inputs, *args, **options):
        sampled.append(len(inputs["input_ids"]))
        pixels.append("pixel_values" in inputs)
        return originals[0](policy, inputs, *args, **options)

    def forward(policy, inputs, ids, *rest):
        scored.append((len(ids), torch.is_grad_enabled()))
        return originals[1](policy, inputs, ids, *rest)

    originals = VLM.generate, VLM.forward
    monkeypatch.setattr(VLM, "generate", generate)
    monkeypatch.setattr(VLM, "forward", forward)
    sets, texts = data.load(world / "data"), []
    for n in (0, 2):
        folder = tmp_path / str(n)
        cfg = train.parse_config(
            "--rl_steps 1 --prompts_per_step 5 --group_size 2 --max_new_tokens 6 --nce_weight 0 "
            f"--held_out_rows 0 --quiet true --caption_reward= --prompts_per_pass {n} "
            f"--world {world} --output_dir {folder}".split()
        )
        train.reinforce(cfg.start, sets["train"], sets, None, cfg, train.Run(cfg))
        texts.append(files.read_jsonl(folder / "rl/rollouts.jsonl"))
    assert sampled == [5, 5] and texts[0] == texts[1] and not any(pixels)
    assert [rows for rows, _ in scored] == [5, 5, 2, 2, 1, 2, 2, 1]  # reference, then the update
    assert [grad for _, grad in scored] == [False, True, *[False] * 3, *[True] * 3]


@pytest.mark.parametrize("sharded", [False, True])
def test_memory_for_the_reference_is_found_with_fewer_prompts(
    world, tmp_path, monkeypatch, sharded
):
    """Where it scores nothing is communicated, so that FSDP2 is no obstacle."""

    def logp(reference, inputs, ids, mask):
        if len(ids) > 2:
            raise RuntimeError(OUT_OF_MEMORY)
        scored.append(len(ids))
        return torch.zeros(mask.shape).flatten(0, 1)

    monkeypatch.setattr(train.Reference, "logp", logp)
    scored, rows = [], data.load(world / "data")["train"][:5]
    cfg = train.Config(output_dir=str(tmp_path / "run"), max_new_tokens=4, group_size=2, quiet=True)
    cfg.nce_weight, cfg.caption_reward, cfg.world = 0.0, "", str(world)
    run = train.Run(cfg)
    learner = train.Learner("rl", f"{world}/policy", 1, 1e-4, cfg, run)
    run.sharded = sharded
    reference = object.__new__(train.Reference)
    parts = rollouts.explore(rows, learner, reference, None)
    assert scored == [2, 1, 2] or scored == [2, 2, 1], scored
    assert sorted(s.id for part in parts for s in part.samples) == sorted(s.id for s in rows)
    assert learner.limit == sys.maxsize


def test_a_part_of_rollouts_has_its_own_rows(policy, world, tmp_path):
    cfg = train.Config(output_dir=str(tmp_path / "run"), max_new_tokens=4, group_size=2, quiet=True)
    whole = rollouts.roll_out(data.load(world / "data")["train"][:5], policy, cfg)
    with torch.no_grad():
        wanted = policy(whole.inputs, whole.branches).logp
        for part, rows in zip(whole.split(2), (slice(0, 2), slice(2, 4), slice(4, 6))):
            assert part.samples == whole.samples[rows] and part.text == whole.text[rows]
            found = policy(part.inputs, part.branches).logp
            torch.testing.assert_close(found, wanted[rows], atol=1e-5, rtol=0)
    assert whole.split(5)[0] is whole


@pytest.mark.parametrize(
    ("words", "short"),
    [
        (OUT_OF_MEMORY, True),
        ("CUDA error: out of memory\nCUDA kernel errors might be", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", True),
        ("The size of tensor a (3) must match the size of tensor b (2)", False),
    ],
)
def test_every_wording_of_too_little_memory_is_known(words, short):
    assert engine.is_out_of_memory(RuntimeError(words)) == short
    assert not engine.is_out_of_memory(ValueError(words))


def test_a_worker_that_dies_ends_the_run_in_one_line(tmp_path, monkeypatch):
    killed = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")
    monkeypatch.setattr(train, "main", lambda cfg: (_ for _ in ()).throw(killed))
    monkeypatch.setattr(sys, "argv", ["train.py", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: a process of --media_workers ended .*Killed"):
        train.cli()
    monkeypatch.setattr("config.sys.platform", "darwin")
    with pytest.raises(train.ConfigError, match="media_workers: .*Linux only"):
        train.Config(media_workers=1)


def test_the_cold_start_keeps_to_the_prompts_of_a_pass(world, tmp_path, monkeypatch):
    """The same gradient in smaller micro-batches."""
    seen, update = [], train.Learner.update

    def watched(learner):
        seen.append(([slot.grad.clone() for slot in learner._slots()], len(learner.losses)))
        update(learner)

    monkeypatch.setattr(train.Learner, "update", watched)
    for n in (0, 2):
        words = f"--method sft --sft_steps 1 --sft_batch 5 --dtype float64 --prompts_per_pass {n}"
        where = f"--world {world} --output_dir {tmp_path / str(n)} --quiet true"
        cfg = train.parse_config(f"{words} {where}".split())
        train.cold_start(data.load(world / "data"), cfg, train.Run(cfg))
    (wanted, one), (found, three) = seen
    assert (one, three) == (1, 3) and max(x.abs().max() for x in wanted) > 1e-3
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, atol=1e-9, rtol=0)


def test_one_prompt_that_does_not_fit_ends_the_run_with_advice(tmp_path, monkeypatch):
    """So does any lack of memory under FSDP2, whose passes cannot be repeated by one process."""
    run = train.Run(train.Config(output_dir=str(tmp_path / "run"), quiet=True))
    learner = SimpleNamespace(
        run=run, stage="rl", step=1, optimizer=SimpleNamespace(zero_grad=lambda: None), losses=[]
    )

    def fail(parts):
        tried.append([len(part) for part in parts])
        raise RuntimeError(OUT_OF_MEMORY)

    tried = []
    with pytest.raises(RuntimeError, match="^CUDA out of memory. Tried to allocate 2.00 GiB.$"):
        train.Learner.accumulate(learner, [[1, 2, 3], [4]], fail)
    assert tried == [[3, 1], [2, 1, 1], [1, 1, 1, 1]]
    run.sharded = True
    with pytest.raises(RuntimeError, match="out of memory.*Under FSDP2") as caught:
        train.Learner.accumulate(learner, [[1, 2]], fail)
    monkeypatch.setattr(train, "main", lambda cfg: (_ for _ in ()).throw(caught.value))
    monkeypatch.setattr(sys, "argv", ["train.py", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="error: out of memory .*FSDP2.*--prompts_per_pass"):
        train.cli()
    with pytest.raises(ZeroDivisionError):
        run.attempt(lambda: 1 / 0)


def test_gradients_of_half_precision_weights_add_up_in_float32():
    """64 micro-batches: their bfloat16 gradients as a float32 sum, and torch's own is far off."""
    torch.manual_seed(0)
    weight = torch.randn(64).bfloat16().requires_grad_()
    parts = [(1 + torch.rand(64)).bfloat16() for _ in range(64)]
    want = sum(part.float() for part in parts)

    def total(of):
        for part in parts:
            (weight * part).sum().backward()
        return (of.grad.float() - want).abs().max() / want.abs().max()

    assert total(weight) > 1e-3
    weight.grad = None
    [(_, slot)] = learner.AdamW([{"params": [weight]}], lr=1.0).pairs
    assert total(slot) < 1e-6 and weight.grad is None


def test_prompts_of_a_length_are_worked_on_together(world, tmp_path):
    run = train.Run(train.Config(output_dir=str(tmp_path / "run"), quiet=True))
    rows = data.load(world / "data")["train"][:9]
    parts = run.micro_batches(rows, 4, list)
    assert [len(part) for part in parts] == [4, 4, 1]
    assert sorted(s.id for part in parts for s in part) == sorted(s.id for s in rows)
    lengths = [s.length for part in parts for s in part]
    assert lengths == sorted(lengths) and all(pixels > 0 for pixels, _ in lengths)


def test_chance_depends_on_seed_update_and_prompt_only():
    """The chance behind a response depends on seed, update and prompt only."""
    table = shared_prefix.uniform_numbers(["a", "b", "c"], 2, 5, "0/1")
    assert torch.equal(shared_prefix.uniform_numbers(["c", "a"], 2, 5, "0/1"), table[[2, 0]])
    for other in (
        shared_prefix.uniform_numbers(["a"], 2, 5, "1/1"),
        shared_prefix.uniform_numbers(["a"], 2, 5, "0/2"),
        table[1:2],
    ):
        assert (other != table[:1]).all()
    assert (
        ((0 <= table) & (table < 1)).all()
        and table.dtype == torch.float64
        and len(table.unique()) == 30
    )


@pytest.mark.parametrize("sketch", [0, 64])
@pytest.mark.parametrize("feature", ntk_infonce.FEATURES)
def test_the_passes_of_a_batch_add_up_for_every_choice_of_f(world, feature, sketch):
    """Every choice of f has a gradient. The passes of a batch add up to it."""
    policy = pretrained.load(str(world / "policy"), dtype="float64")
    cfg = train.Config(
        nce_feature=feature, nce_sketch=sketch, tau_quantile=0.5, group_size=3, max_new_tokens=6
    )
    torch.manual_seed(0)
    batch = data.load(world / "data")["train"][:5]
    adv = torch.tensor(
        [[1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [-0.5, -0.5, 1.0], [0.7, 0.3, -1.0], [-1.0, 1.0, 0.0]]
    )

    def gradient(*sizes):
        torch.manual_seed(1)  # the same responses in every split
        whole = rollouts.roll_out(batch, policy, cfg, feature=feature)
        parts, start = [], 0
        for size in sizes:
            rows = slice(start, start + size)
            part = rollouts.roll_out(batch[rows], policy, cfg, feature=feature)
            part.branches, part.adv = whole.branches[rows], adv[rows]
            part.mask = whole.mask.unflatten(0, (5, 3))[rows].flatten(0, 1)
            part.feature_mask = whole.feature_mask[rows]
            parts, start = [*parts, part], start + size
        policy.zero_grad()
        conflict = train.Conflict(parts, policy, cfg)
        for i, part in enumerate(parts):
            cosine = conflict.cosine(i, policy(part.inputs, part.branches))
            # the tied prompt has no direction
            assert len(cosine) == (4 if feature == "advantage" else 5)
            loss, stats = ntk_infonce.info_nce(cosine, ntk_infonce.quantile_tau(cosine, 0.5))
            assert stats["active"] > 0
            loss.backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    whole, split = gradient(5), gradient(2, 3)
    assert whole.isfinite().all() and whole.norm() > 1e-4
    torch.testing.assert_close(split, whole, atol=1e-6 * whole.abs().max().item(), rtol=0)


def test_a_lora_run_leaves_an_adapter_or_merged_weights(finished, world, tmp_path):
    """A LoRA run leaves an adapter, or whole weights with merge. Plain transformers loads both."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    start = [
        "--model",
        finished[0] / "sft/policy",
        "--judge",
        world / "judge",
        "--data",
        world / "data",
    ]
    tiny = [
        *SMALL,
        "--sft_steps",
        "3",
        "--rl_steps",
        "2",
        "--selection",
        "false",
        "--lora_rank",
        "4",
    ]
    scores = []
    for merge in ("false", "true"):
        run = tmp_path / merge
        launch("--output_dir", run, *start, *tiny, "--merge", merge)
        folder = run / "rl/policy"
        assert (folder / "adapter_config.json").exists() == (merge == "false")
        # RL goes on with the cold start's adapter, which so is never rounded
        assert (run / "sft/policy/adapter_config.json").exists()
        first = files.read_jsonl(run / "rl/metrics.jsonl")[0]
        assert first["kl"] < 1e-6, "the reference is the cold start"
        card = (folder / "README.md").read_text()
        assert (f"`{start[1]}` alone" in card) == (merge == "false")
        assert (
            card.startswith("---\n")
            and str(world) not in card
            and "lora_rank: 4" in card
            and "2 updates" in card
        )
        assert AutoProcessor.from_pretrained(folder).tokenizer.eos_token == "<|im_end|>"
        plain = AutoModelForImageTextToText.from_pretrained(folder).eval()
        ours = pretrained.load(str(folder), trainable=False)
        inputs = ours.encode(data.prompts(data.load(world / "data")["train"][:1], True, 2.0, 4))
        inputs = {name: x for name, x in inputs.items() if not name.endswith("_features")}
        with torch.no_grad():
            logits = [model(**inputs).logits[0, -1] for model in (plain, ours.core)]
        torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=0)
        scores.append(logits[0])
    torch.testing.assert_close(scores[0], scores[1], atol=1e-4, rtol=0)
    with torch.no_grad():
        start = (
            pretrained.load(str(tmp_path / "true/sft/policy"), trainable=False)
            .core(**inputs)
            .logits[0, -1]
        )
    assert (scores[0] - start).abs().max() > 1e-4  # the adapter has learned something
    launch("--model", tmp_path / "false", "--data", world / "data", script="eval.py")
    (tmp_path / "false/sft").rename(tmp_path / "false/moved")
    pretrained.load(str(tmp_path / "false/rl/policy"))


@pytest.mark.parametrize(
    "file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda file: file.stem
)
def test_every_preset_names_a_source_for_each_value(file):
    """Every preset fits Config. It names a source for each value."""
    import yaml

    cfg, values = train.parse_config(["--config", str(file)]), yaml.safe_load(file.read_text())
    for name, value in values.items():
        assert getattr(cfg, name) == value and type(getattr(cfg, name)) in (type(value), float), (
            name
        )
    for line in file.read_text().splitlines():
        assert (
            not line
            or line.startswith("#")
            or re.search(r"  # (choice|official code|paper|released code|OViP)", line)
        ), line


def test_the_presets_hold_the_authors_numbers():
    seven, official = (
        train.parse_config(["--config", f"{ROOT}/configs/{n}.yaml"])
        for n in ("qwen2.5-vl-7b", "official")
    )
    for cfg in (seven, official):
        assert (cfg.sft_lr, cfg.sft_epochs, cfg.rl_lr, cfg.rl_epochs, cfg.weight_decay) == (
            1e-6,
            2,
            1e-6,
            1,
            0.01,
        )
        assert (cfg.beta, cfg.group_size, cfg.max_new_tokens, cfg.max_pixels) == (
            0.04,
            8,
            768,
            401_408,
        )
        assert (cfg.max_grad_norm, cfg.dtype, cfg.lora_rank) == (5, "bfloat16", 0)
    assert (official.nce_feature, official.tau, official.nce_temperature) == (
        "hidden_mean",
        0.5,
        0.5,
    )
    assert (seven.nce_feature, seven.tau, seven.nce_temperature) == ("reference", 0.54, 1.0)


def test_epochs_stand_for_as_many_updates_as_their_rows_take():
    assert train.updates(60, 0, 100, 8) == 60
    assert train.updates(60, 2, 100, 8) == 25 and train.updates(60, 0.5, 100, 8) == 7
    assert train.updates(60, 1, 3, 8) == 1  # fewer rows than a batch: each update sees them all
    # two processes: 6 rows an update
    assert train.updates(60, 1, 7, 8, 2) == 2 and train.updates(60, 6, 7, 8, 2) == 7
    # too few rows, which is refused when the stage begins
    assert train.updates(60, 1, 1, 8, 2) == 1


@pytest.mark.parametrize("n", [1, 2, 5, 7, 12, 13])
def test_every_epoch_holds_every_row_and_no_batch_a_row_twice(n, tmp_path):
    """At every batch size, over nine epochs; and a resumed stage sees the rows of one that was not
    stopped."""
    run = train.Run(train.Config(output_dir=str(tmp_path / "run"), quiet=True))
    stage = SimpleNamespace(stage="rl", run=run)
    for size in range(1, n + 1):
        rows = list(itertools.islice(train.Learner._rows(stage, n, size), 9 * n))
        epochs = [tuple(rows[i : i + n]) for i in range(0, 9 * n, n)]
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        batches = [rows[i : i + size] for i in range(0, 9 * n - size + 1, size)]
        assert all(len(set(batch)) == size for batch in batches)
        assert (
            list(itertools.islice(train.Learner._rows(stage, n, size), 5 * size, 9 * n))
            == rows[5 * size :]
        )
    assert len(set(epochs)) == 9 or n < 7  # of n a batch: each epoch has an order of its own


def test_the_rate_begins_above_zero_and_follows_a_cosine():
    """Behind the rise it is transformers' schedule; in the rise the first update counts, where
    transformers' is 0."""
    for warmup, total in ((0, 7), (1, 7), (4, 40), (40, 40)):
        slot = torch.nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([slot], lr=1.0)
        theirs, want = get_cosine_schedule_with_warmup(optimizer, warmup, total), []
        for _ in range(total):
            want.append(theirs.get_last_lr()[0])
            optimizer.step()
            theirs.step()
        rates = [learner.rate(i, warmup, total) for i in range(total)]
        assert rates[warmup:] == pytest.approx(want[warmup:]) and min(rates) > 0
        assert rates[:warmup] == pytest.approx([x + 1 / warmup for x in want[:warmup]])


def learner_of(world, folder, *options):
    cfg = train.parse_config(
        ["--output_dir", str(folder), "--quiet", "true", "--world", str(world), *options]
    )
    return train.Learner("rl", f"{world}/policy", 4, cfg.rl_lr, cfg, train.Run(cfg))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weight_decay_acts_where_transformers_trainer_lets_it(world, tmp_path, dtype):
    """With gradient 0 a step only decays: matrices by rate times decay, norms and biases not at
    all."""
    learner = learner_of(
        world, tmp_path / "run", "--weight_decay", "0.5", "--rl_lr", "0.1", "--dtype", dtype
    )
    before = {name: p.detach().clone() for name, p in learner.policy.named_parameters()}
    for slot in learner._slots():
        slot.grad = torch.zeros_like(slot)
    learner.optimizer.step()
    theirs = set(Trainer.get_decay_parameter_names(None, learner.policy))
    trained = {name for name, p in learner.policy.named_parameters() if p.requires_grad}
    moved = {
        name for name, p in learner.policy.named_parameters() if not torch.equal(p, before[name])
    }
    assert moved == theirs & trained and any("norm" in name for name in trained - moved)
    assert any(name.endswith("bias") for name in trained - moved) and len(moved) > 20
    first = learner.schedule.get_last_lr()[0]
    for name, p in learner.policy.named_parameters():
        if name in moved:
            torch.testing.assert_close(
                p, (before[name] * (1 - 0.5 * first)).to(p.dtype), atol=1e-6, rtol=2**-7
            )


def test_a_checkpoint_brings_back_both_groups_of_the_optimiser(world, tmp_path):
    def step(learner, seed):
        chance = torch.Generator().manual_seed(seed)
        for p in learner.policy.parameters():
            p.grad = torch.randn(p.shape, generator=chance) if p.requires_grad else None
        learner.gradient_norm, learner.losses = 1.0, [torch.zeros(())]
        learner.step += 1
        learner.update()

    learner = learner_of(world, tmp_path / "run", "--max_grad_norm", "1e9")
    step(learner, 1)
    learner._save_checkpoint()
    again = learner_of(world, tmp_path / "run", "--max_grad_norm", "1e9")
    assert again.step == 1 and [g["weight_decay"] for g in again.optimizer.param_groups] == [
        0.01,
        0.0,
    ]
    for each in (learner, again):
        step(each, 2)
    for (name, p), (_, q) in zip(
        learner.policy.named_parameters(), again.policy.named_parameters(), strict=True
    ):
        assert torch.equal(p, q), name
    assert learner.schedule.get_last_lr() == again.schedule.get_last_lr()


# --- what is held out -----------------------------------------------------------------------------


def rows_of(kinds):
    return [SimpleNamespace(id=str(i), category=kind) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize("n", [1, 5, 20, 26, 40, 80, 200])
def test_the_rows_held_out_are_of_every_category(n):
    rows = rows_of(["existence", "count", "colour", "row", "motion"] * 40)
    chosen = train.balanced(rows, n, 0)
    counts = Counter(row.category for row in chosen)
    assert len({row.id for row in chosen}) == n and max(counts.values()) - min(counts.values()) <= 1
    assert len(counts) == min(n, 5) and train.balanced(rows, n, 0) == chosen
    assert n == 200 or train.balanced(rows, n, 1) != chosen
    assert any(int(row.id) >= 100 for row in train.balanced(rows, 20, 0)), (
        "drawn from all of the file"
    )


def test_a_rare_category_gives_what_it_has():
    chosen = train.balanced(rows_of(["a"] * 50 + ["b"] * 3 + ["c"] * 50), 23, 0)
    assert Counter(row.category for row in chosen) == {"a": 10, "b": 3, "c": 10}
    assert (
        len(train.balanced(rows_of("aab"), 9, 0)) == 3
        and train.balanced(rows_of("aab"), 0, 0) == []
    )


SAY = "<prethink>x</prethink><caption>caption of {}</caption><think>x</think><answer>{}</answer>"


class Judge:
    """Says A; silent whenever `silent(prompt, how often it was asked this)` is true."""

    def __init__(self, silent=lambda prompt, times: False):
        self.silent, self.times, self.last_error = silent, Counter(), "503 away"

    def __call__(self, prompts):
        self.times.update(prompts)
        return [None if self.silent(prompt, self.times[prompt]) else "A" for prompt in prompts]


def held_out_reward(world, monkeypatch, tmp_path, judge, **options):
    rows = data.load(world / "data")["test"]
    monkeypatch.setattr(
        measures, "respond", lambda _, some, *__: [SAY.format(s.id, s.answer) for s in some]
    )
    cfg = train.Config(output_dir=str(tmp_path / "run"), quiet=True, **options)
    return train.held_out_reward(rows, train.CaptionReward(judge), cfg, train.Run(cfg), None)


def test_the_held_out_reward_is_the_same_or_unknown(world, monkeypatch, tmp_path):
    """The reward is the same whatever the network does, or it is unknown. Up, failing once, failing
    for one caption, and away: 1 + 0.1 + the share of captions, the same, NaN, NaN."""
    rows = data.load(world / "data")["test"]
    right = sum(s.answer == "A" and s.problem_type == "multiple choice" for s in rows) / len(rows)
    arguments = (world, monkeypatch, tmp_path)
    assert held_out_reward(*arguments, Judge()) == pytest.approx(1.1 + right)
    assert held_out_reward(*arguments, Judge(lambda _, times: times == 1)) == pytest.approx(
        1.1 + right
    )
    assert math.isnan(
        held_out_reward(*arguments, Judge(lambda prompt, _: f"of {rows[3].id}\n" in prompt))
    )
    assert math.isnan(held_out_reward(*arguments, Judge(lambda *_: True)))
    away = Judge(lambda *_: True)
    assert held_out_reward(
        world, monkeypatch, tmp_path / "0", away, caption_weight=0.0
    ) == pytest.approx(1.1)


# --- selection ------------------------------------------------------------------------------------


@pytest.fixture
def scoring(world, monkeypatch):
    """select_prompts with responses that are known: every second one of a prompt is right, and its
    captions differ."""
    samples = data.load(world / "data")["train"]

    def roll_out(batch, policy, cfg, when, n):
        text = [
            [SAY.format(f"{s.id} {k}", s.answer if k % 2 else "?") for k in range(n)] for s in batch
        ]
        return SimpleNamespace(samples=batch, text=text)

    monkeypatch.setattr(selection, "open_policy", lambda *_: None)
    monkeypatch.setattr(selection, "roll_out", roll_out)

    def select(folder, judge, **options):
        options = {"responses": 4, "select_batch": 3} | options
        cfg = train.Config(output_dir=str(folder), **options)
        kept = selection.select_prompts(
            "", samples, train.CaptionReward(judge), cfg, train.Run(cfg)
        )
        return [s.id for s in kept], json.loads((folder / "select/selected.json").read_text())

    return samples, select


def test_a_missing_verdict_is_asked_for_again_before_selection(scoring, tmp_path):
    """A verdict that is missing is asked for again before selection."""
    samples, select = scoring
    want = select(tmp_path / "up", Judge())
    flaky = Judge(lambda _, times: times == 1)  # every caption is unknown at first
    assert select(tmp_path / "flaky", flaky) == want and set(flaky.times.values()) == {2}
    scores = [
        (tmp_path / name / "select/scores.jsonl").read_text().splitlines()
        for name in ("up", "flaky")
    ]
    assert sorted(scores[0]) == sorted(scores[1]) and len(scores[0]) == len(samples)
    assert want[1]["unjudged"] == 0


def test_a_judge_that_is_away_stops_selection(scoring, tmp_path):
    """A judge that is away stops selection. The same command asks it again."""
    samples, select = scoring
    told = f"no verdict on most captions of {len(samples)} of {len(samples)} prompts.*Its last error: 503 away"
    with pytest.raises(train.ConfigError, match=told):
        select(tmp_path / "away", Judge(lambda *_: True))
    assert not (tmp_path / "away/select/selected.json").exists()
    assert select(tmp_path / "away", Judge()) == select(tmp_path / "up", Judge())


def test_a_prompt_without_verdicts_is_not_ranked_and_said_so(scoring, tmp_path, capsys):
    samples, select = scoring
    quiet, partly = samples[2].id, samples[3].id
    judge = Judge(lambda prompt, _: re.search(f"of ({quiet} [012]|{partly} [01])\n", prompt))
    kept, found = select(tmp_path / "run", judge, keep=1.0)
    assert (
        quiet not in kept
        and partly in kept
        and found["unjudged"] == 1
        and found["of"] == len(samples)
    )
    assert (
        f"1 of {len(samples)} prompts were not ranked: the judge gave no verdict"
        in capsys.readouterr().out
    )


def test_unknown_verdicts_are_in_the_line_of_an_update():
    assert learner.readable({"reward/caption": 1.0, "unknown": 0.5}) == "caption 1.00  unknown 0.50"
    assert learner.readable({"reward/caption": 1.0, "unknown": 0.0}) == "caption 1.00"


def test_unknown_verdicts_leave_the_variance_of_the_others(world):
    """The mean in their place would: here of 8 responses two captions are known, one of them
    answerable."""
    samples, some, cfg = (
        data.load(world / "data")["train"][:1],
        [1.0, 0.0] + [math.nan] * 6,
        train.Config(),
    )
    rewards = {"accuracy": torch.zeros(1, 8), "format": torch.ones(1, 8), "leak": torch.zeros(1, 8)}
    [line] = selection.score_lines(samples, rewards | {"caption": torch.tensor([some])}, cfg)
    assert (
        line["known"] == 2
        and line["variance"] == pytest.approx(0.5)
        and line["mean"] == pytest.approx(0.6)
    )
    [line] = selection.score_lines(
        samples, rewards | {"caption": torch.full((1, 8), math.nan)}, cfg
    )
    assert line["known"] == 0 and line["variance"] == 0


def test_a_caption_of_weight_0_needs_no_judge_for_selection(scoring, tmp_path):
    _, select = scoring
    up, away = (select(tmp_path / name, judge, caption_weight=0.0) for name, judge in
                (("up", Judge()), ("away", Judge(lambda *_: True))))  # fmt: skip
    assert up == away and up[0]


def test_selection_says_why_it_kept_fewer_than_asked(scoring, tmp_path, capsys):
    samples, select = scoring
    for sample in samples[2:]:
        object.__setattr__(sample, "answer", "?")
    select(tmp_path, Judge(), keep=0.5, caption_weight=0.0)
    said = capsys.readouterr().out
    assert "selection: 2 of 12 prompts kept" in said
    assert "--keep 0.5 stands for 6, but all responses to 10 prompts earn the same" in said


def test_selection_says_by_category_what_it_kept(scoring, tmp_path, capsys):
    """The answers of all categories but one vary; by variance alone that one is lost. Selection can
    keep some of each."""
    samples, select = scoring
    lost = samples[0].category
    for sample in samples:
        object.__setattr__(sample, "answer", "?" if sample.category == lost else sample.answer)
    kept, found = select(tmp_path / "all", Judge(), keep=0.5, caption_weight=0.0)
    of = Counter(s.category for s in samples)
    assert set(found["categories"]) == set(of) and found["categories"][lost] == [
        0,
        of[lost],
        of[lost],
    ]
    assert Counter(s.category for s in samples if s.id in kept) == {
        name: k for name, (k, *_) in found["categories"].items() if k
    }
    said = capsys.readouterr().out
    assert f"{lost}: 0 of {of[lost]}" in said
    _, within = select(
        tmp_path / "within", Judge(), keep=0.5, select_within="category", caption_weight=0.0
    )
    for name, (k, n, _) in within["categories"].items():
        assert k == (0 if name == lost else math.ceil(n / 2)) and n == of[name]


def test_the_journal_remembers_the_replies_of_its_judge(tmp_path):
    """The journal remembers replies of its judge whichever process wrote them."""
    first, second = (judges.Journal(tmp_path / f"{i}.jsonl", "judge") for i in range(2))
    assert not list(tmp_path.iterdir())  # nothing before the first reply
    first["q", "a\u2028caption"] = "A"
    second["q", "another"] = ""
    someone_else = judges.Journal(tmp_path / "0.jsonl", "someone else")
    someone_else["q", "another"] = someone_else["q", "a third"] = "B"
    with (tmp_path / "1.jsonl").open("a") as out:
        out.write('{"judge": "judge", "question": "caf')
    with (tmp_path / "1.jsonl").open("ab") as out:
        out.write("é".encode()[:1])  # a crash in the middle of a character
    again = judges.Journal(tmp_path / "2.jsonl", "judge")
    assert again == {("q", "a\u2028caption"): "A", ("q", "another"): ""}


def test_a_judge_that_answers_nothing_stops_the_run(world, tmp_path, monkeypatch):
    """A judge that answers nothing stops the run before training."""
    pytest.importorskip("openai")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    options = [
        "--judge",
        "http://127.0.0.1:9/v1",
        "--judge_model",
        "m",
        "--judge_deadline",
        "3",
        "--world",
        world,
    ]
    done = launch("--output_dir", tmp_path / "run", *options, *SMALL, check=False)
    words = "judge: m at http://127.0.0.1:9/v1 answered none of 3 questions. Its last error: "
    assert done.returncode != 0 and words in done.stderr
    assert not (tmp_path / "run/sft").exists()


def test_a_prompt_that_is_too_long_is_a_bad_row(world, tmp_path):
    """A prompt that is too long is a bad row before the model is loaded."""
    options = ["--world", world, "--output_dir", tmp_path / "run", "--max_prompt_tokens", "20"]
    done = launch(*options, *SMALL, check=False)
    assert done.returncode != 0 and "Correct these rows, or leave them out" in done.stderr
    assert "cold_start (" in done.stderr and "tokens, and the limit is 20" in done.stderr


def test_a_caption_that_only_states_the_answer_is_counted(world):
    """A caption that only states the answer is counted. It may cost reward."""
    samples = data.load(world / "data")["train"][:1]
    [sample] = samples
    say = "<prethink>x</prethink><caption>{}</caption><think>x</think><answer>{}</answer>"
    part = SimpleNamespace(samples=samples)
    part.text = [
        [
            say.format(f"The answer is {sample.answer}.", sample.answer),
            say.format("a red circle", "x"),
        ]
    ]
    cfg = train.Config(leak_penalty=0.5)
    judge = train.CaptionReward(lambda prompts: ["A" for _ in prompts])
    [(rewards, _)] = train.reward([part], judge, cfg)
    assert rewards["leak"].tolist() == [[-1.0, 0.0]] and cfg.reward_weights["leak"] == 0.5
    [line] = selection.score_lines(samples, rewards, cfg)
    total = [1 + 0.1 + rewards["caption"][0, 0].item() - 0.5, 0.1 + rewards["caption"][0, 1].item()]
    assert line["mean"] == pytest.approx(sum(total) / 2, abs=1e-5)


def test_the_judge_is_asked_once_for_all_parts_of_a_step(world):
    asked, samples = [], data.load(world / "data")["train"][:3]
    say = "<prethink>x</prethink><caption>caption {}</caption><think>x</think><answer>A</answer>"
    parts = [
        SimpleNamespace(samples=[s], text=[[say.format(2 * i), say.format(2 * i + 1)]])
        for i, s in enumerate(samples)
    ]
    judge = train.CaptionReward(
        lambda prompts: asked.append(len(prompts)) or [f"{p.split()[9]}" for p in prompts]
    )
    found = train.reward(parts, judge, train.Config())
    assert asked == [6] and [replies for _, replies in found] == [
        [["0", "1"]],
        [["2", "3"]],
        [["4", "5"]],
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_small_steps_on_half_precision_weights_add_up(dtype):
    """1000 steps of 1e-5 against float32 weights; plain AdamW on bfloat16 ones does not move at
    all. The steps survive a checkpoint."""
    torch.manual_seed(0)
    start, target = torch.randn(50).to(dtype), torch.randn(50)

    def train_from(weight, optimizer, steps):
        for _ in range(steps):
            (weight.float() - target).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return weight.detach().float()

    def fresh(kind, dtype=dtype):
        weight = start.to(dtype).clone().requires_grad_()
        return weight, kind([{"params": [weight]}], lr=1e-5, fused=True)

    want = train_from(*fresh(torch.optim.AdamW, torch.float32), 1000)
    moved = (want - start.float()).abs().mean()
    got = train_from(*fresh(learner.AdamW), 1000)
    assert (got - want).abs().max() <= (2**-8 * want.abs().max() if dtype == torch.bfloat16 else 0)
    if dtype == torch.bfloat16:
        lost = train_from(*fresh(torch.optim.AdamW), 1000)
        assert (
            (lost - start.float()).abs().mean()
            < 0.2 * moved
            < 0.5 * (got - start.float()).abs().mean()
        )
    weight, optimizer = fresh(learner.AdamW)
    train_from(weight, optimizer, 500)
    again, resumed = fresh(learner.AdamW)
    again.data.copy_(weight)
    for a, b in zip(resumed.param_groups[0]["params"], optimizer.param_groups[0]["params"]):
        a.data.copy_(b)  # as a checkpoint does
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(train_from(again, resumed, 500), got)


def test_failed_generation_leaves_the_policy_in_training_mode(world, monkeypatch):
    """Generation that fails leaves the policy in training mode."""
    policy = pretrained.load(str(world / "policy"))
    inputs = policy.encode(data.prompts(data.load(world / "data")["train"][:1], True, 2.0, 4))

    def fail(*_, **__):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(policy.core, "generate", fail)
    with pytest.raises(RuntimeError):
        policy.generate(inputs, 2, 4)
    assert policy.training  # or gradient checkpointing would be off from here on


def test_a_row_with_a_control_token_is_bad(world, tmp_path):
    """A row with a control token is bad. The run says so before the model is loaded."""
    rows = json.loads((world / "data/train.json").read_text())
    for row in rows:
        row["path"] = str(world / "data" / row["path"])
    rows[1]["problem"] += " <|image_pad|>"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    done = launch(
        "--data",
        tmp_path / "train.json",
        "--world",
        world,
        "--output_dir",
        tmp_path / "run",
        check=False,
    )
    assert done.returncode != 0 and "text: contains <|image_pad|>, a control token" in done.stderr


def test_the_lenient_rule_is_an_option(world):
    samples = [
        s for s in data.load(world / "data")["train"] if s.problem_type == "multiple choice"
    ][:1]
    part = SimpleNamespace(samples=samples)
    part.text = [[f"<think>x</think><answer>The answer is ({samples[0].answer}).</answer>"] * 2]
    for lenient in (False, True):
        [(rewards, _)] = train.reward([part], None, train.Config(method="grpo", lenient=lenient))
        assert rewards["accuracy"].tolist() == [[float(lenient)] * 2]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--method", "magic"], "method: 'magic' is not one of ours, grpo, sft"),
        (
            ["--attention", "flash"],
            "attention: 'flash' is not one of sdpa, eager, flex_attention, flash_attention_2",
        ),
        (
            ["--attention", "flash_attention_2"],
            "attention: flash_attention_2 needs a GPU, flash-attn",
        ),
        (
            ["--judge", "https://me:secret@host//v1", "--judge_model", "m"],
            "judge: its URL holds a key or password",
        ),
        (
            ["--judge", "https://host/v1?api-version=x", "--judge_model", "m"],
            "judge: its URL has a query. Remove",
        ),
        (
            ["--prompts_per_step", "2"],
            "prompts_per_step: Eq. 4 needs a positive and a negative beside a prompt",
        ),
        (
            ["--completions_per_pass", "2", "--nce_feature", "best"],
            "completions_per_pass: give 0 with --method ovip, with --nce_feature best",
        ),
        (["--min_pixels", "9999999"], "min_pixels: 9999999 is more than max_pixels, 401408"),
        (["--rl_epochs", "-1"], "rl_epochs: must be at least 0, got -1.0"),
        (
            ["--model", "no/such-model", "--judge", "x", "--data", str(ROOT / "tests/no.json")],
            "no.json does not exist",
        ),
        (["--nonsense", "1"], "unrecognized arguments: --nonsense"),
        (["--rl_steps", "many"], "invalid int value: 'many'"),
        (["--data", "/nowhere"], "/nowhere does not exist"),
        (["--group_size", "1"], "group_size: must be at least 2, got 1"),
        (["--tau", "3"], "tau: must be at least -1 and at most 1, got 3.0"),
        (["--four_stage", "false"], "no caption without four_stage"),
        (["--config", "/nowhere.yaml"], "cannot read /nowhere.yaml"),
    ],
)
def test_bad_input_is_one_clear_line_before_anything_is_built(options, says, tmp_path):
    done = launch(*options, check=False, cwd=tmp_path)
    assert done.returncode != 0 and says in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "shapes-world").exists()


@pytest.mark.parametrize("command", ["train.py", "eval.py"])
def test_a_text_only_model_is_refused_in_one_line(world, tmp_path, command):
    options = ["--model", world / "judge", "--data", world / "data"]
    options += (
        ["--judge", world / "judge", "--output_dir", tmp_path / "run"]
        if command == "train.py"
        else []
    )
    done = launch(*options, script=command, check=False, cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert "it is a qwen2 model, and only Qwen2.5-VL (qwen2_5_vl) is supported" in done.stderr


def damaged(policy, folder, how):
    """A copy of the policy as a download, another tool or another training may leave it."""
    shutil.copytree(policy, folder)
    file, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    if how == "no weights":
        file.unlink()
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-99])
    elif how == "quantised":
        config |= {"quantization_config": {"quant_method": "awq", "bits": 4}}
        (folder / "config.json").write_text(json.dumps(config))
    elif how == "part":
        weights = load_file(file)
        weights.pop("lm_head.weight")
        save_file(weights, file, metadata={"format": "pt"})
    elif how == "template":
        (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }")
    return folder


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no weights", "HERE holds no weights (model.safetensors)"),
        ("cut", "HERE/model.safetensors is incomplete ("),
        ("quantised", "it is quantised (awq); give the unquantised checkpoint"),
        (
            "part",
            "its files lack 1 weight (lm_head.weight); give a whole checkpoint, with any LoRA "
            "merged",
        ),
        (
            "template",
            "its chat template cannot be used (unexpected '}'); give an Instruct checkpoint's",
        ),
    ],
)
def test_a_damaged_model_is_refused_in_one_line_by_both_commands(world, tmp_path, how, says):
    folder = damaged(world / "policy", tmp_path / "policy", how)
    says, data_ = says.replace("HERE", str(folder)), ["--data", world / "data"]
    trained = ["--judge", world / "judge", "--output_dir", tmp_path / "run", *SMALL]
    for command, more in (("train.py", trained), ("eval.py", [])):
        done = launch("--model", folder, *data_, *more, script=command, check=False, cwd=tmp_path)
        assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
        [line] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: model: cannot load {folder}") and says in line
    assert not (tmp_path / "run/sft").exists()


def test_options_may_be_spelt_with_hyphens():
    cfg = train.parse_config(["--rl-steps", "9", "--select-within=category", "--quiet"])
    assert (cfg.rl_steps, cfg.select_within, cfg.quiet) == (9, "category", True)


def test_defaults_are_the_same_wherever_they_stand():
    """data.py check and eval.py have the defaults of training, eval.py but for the longest
    response."""
    evaluated = {**evaluation.INHERITED, "max_new_tokens": train.Config.max_new_tokens}
    for values in (vars(data.LIMITS), evaluated):
        assert values == {name: getattr(train.Config(), name) for name in values}


def test_a_loader_s_error_is_one_line_unless_memory_is_short(monkeypatch):
    """Out of memory says nothing about the checkpoint, and is for the caller to handle."""

    def broken(*_, **__):
        raise RuntimeError(message)

    monkeypatch.setattr(pretrained, "load", broken)
    message = "PytorchStreamReader failed reading zip archive\nmore"
    with pytest.raises(train.ConfigError, match="model: cannot load x: PytorchStreamReader"):
        pretrained.open_policy("x", train.Config(), "cpu")
    message = "CUDA out of memory. Tried to allocate 2 GiB"
    with pytest.raises(RuntimeError, match="out of memory"):
        pretrained.open_policy("x", train.Config(), "cpu")


def test_yaml_gives_options_and_the_command_line_wins(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("beta: 0.1\nrl_steps: 7\nselection: false\n")
    cfg = train.parse_config(["--config", str(file), "--rl_steps", "9"])
    assert (cfg.beta, cfg.rl_steps, cfg.selection, cfg.caption_reward) == (
        0.1,
        9,
        False,
        "external",
    )
    file.write_text("corrupt_eval: [blank, mislead]\n")
    assert train.parse_config(["--config", str(file)]).corrupt_eval == "blank mislead"
    words = ["--config", str(file), "--corrupt_eval", "blur", "occlude", "--quiet"]
    assert train.parse_config(words).corrupt_eval == "blur occlude"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("betta: 0.1", "betta"),
        ("1: 2", "unknown options 1"),
        ("- a", "option: value"),
        ("corrupt_eval: [blank, fog]", "corrupt_eval: 'fog' is not one of blank"),
        ("corrupt_share: 0.5", "corrupt_share: say how with --corrupt_train"),
        ("{corrupt_train: blank, method: sft}", "corrupt_train: --method sft has no RL"),
        ("seed: [", "cannot read"),
    ],
)
def test_a_yaml_file_without_options_is_refused_in_one_line(tmp_path, text, says):
    """A YAML file that gives no options is refused in one line."""
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(train.ConfigError, match=says):
        train.parse_config(["--config", str(file)])


@pytest.mark.parametrize(
    "option",
    [
        "sft_steps=-1",
        "rl_steps=-1",
        "warmup=3",
        "beta=-1",
        "eps_low=-0.1",
        "rl_lr=0",
        "max_grad_norm=0",
    ],
)
def test_a_number_out_of_range_is_refused_by_name(option):
    with pytest.raises(train.ConfigError, match=option.split("=")[0]):
        train.parse_config([f"--{option}"])


def test_each_data_set_and_model_has_a_run_folder_of_its_own():
    assert train.Config().output_dir == "runs/ours-seed0"
    mine = train.Config(
        data="a/cats", model="Qwen/Qwen2.5-VL-3B-Instruct", judge="j", method="grpo", seed=3
    )
    assert mine.output_dir == "runs/grpo-cats-Qwen2.5-VL-3B-Instruct-seed3"


def test_rows_or_pictures_that_changed_stop_a_resumed_run(world, tmp_path):
    """An answer, a row less, another picture under the same name; before the first result they bind
    no one."""
    shutil.copytree(world / "data", tmp_path / "data")
    file, cfg = (
        tmp_path / "data/train.json",
        train.Config(output_dir=str(tmp_path / "run"), quiet=True),
    )
    rows = json.loads(file.read_text())

    def claim():
        train.Run(cfg).claim_data(data.fingerprint(data.load(tmp_path / "data")))

    claim()
    file.write_text(json.dumps(rows[1:]))
    claim()
    (tmp_path / "run/sft").mkdir()
    claim()
    file.write_text(json.dumps([*rows[1:-1], rows[-1] | {"problem": "Is there a circle in it?"}]))
    with pytest.raises(
        train.ConfigError,
        match="data: the rows, their media or .* have changed since.*train: 11 rows",
    ):
        claim()
    file.write_text(json.dumps(rows[1:]))
    claim()
    picture = tmp_path / "data" / rows[1]["path"]
    shutil.copy(tmp_path / "data" / rows[6]["path"], picture)
    os.utime(picture, (1, 1))
    with pytest.raises(train.ConfigError, match="or the data as they were"):
        claim()


def test_a_start_that_failed_does_not_bind_the_folder(world, tmp_path):
    """A start that failed before any result does not bind the folder."""
    rows = json.loads((world / "data/train.json").read_text())
    for row in rows:
        row["path"] = str(world / "data" / row["path"])
    del rows[1]["solution"]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    options = [
        "--data",
        tmp_path / "train.json",
        "--world",
        world,
        "--sft_steps",
        "0",
        "--method",
        "sft",
    ]
    options += ["--output_dir", tmp_path / "run"]
    failed = launch(*options, check=False)
    assert (
        failed.returncode == 1
        and "--on_bad_row skip" in failed.stderr
        and (tmp_path / "run/config.yaml").exists()
    )
    assert "skipped: train.json row 1" in launch(*options, "--on_bad_row", "skip").stdout


def test_help_explains_every_field_with_its_source(capsys):
    with pytest.raises(SystemExit):
        train.parse_config(["--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(train.Config):
        assert f"--{field.name}" in text
        assert field.metadata["help"].rstrip().endswith("]"), f"{field.name} names no source"


def test_main_reads_on_one_screen():
    import inspect

    assert len(inspect.getsource(train.main).splitlines()) <= 60


def test_concept_files_import_no_model_library():
    """Concept files import no model library and nothing upward."""
    for name in (
        "reasoning",
        "answers",
        "caption_reward",
        "grpo",
        "variance_select",
        "ntk_infonce",
    ):
        source = (ROOT / f"{name}.py").read_text()
        for word in ("transformers", "peft", "accelerate", "vlm", "train"):
            assert f"import {word}" not in source and f"from {word}" not in source, (name, word)


# --- runs that share a cold start -----------------------------------------------------------------


def test_a_run_takes_over_the_cold_start_and_what_was_scored(finished, world, tmp_path):
    """Its cold start is the other's to the byte; variance is that of its own rewards."""
    source, _ = finished
    arm = ["--caption_reward", "false", "--share", source, "--rl_steps", 2]
    done = launch("--world", world, "--output_dir", tmp_path / "arm", *SMALL, *arm)
    assert "sft   1" not in done.stdout and "select" in done.stdout
    for name in ("sft/policy/model.safetensors", "sft/metrics.jsonl", "eval/before.json"):
        assert (tmp_path / "arm" / name).read_bytes() == (source / name).read_bytes()
    there, here = (
        [json.loads(x) for x in (folder / "select/scores.jsonl").read_text().splitlines()]
        for folder in (source, tmp_path / "arm")
    )
    for one, two in zip(there, here, strict=True):
        assert one["accuracy"] == two["accuracy"] and "caption" not in two
        total = [a + 0.1 * f for a, f in zip(one["accuracy"], one["format"])]
        assert two["variance"] == pytest.approx(statistics.variance(total), abs=1e-6)
    assert "caption" not in json.loads((tmp_path / "arm/rl/rollouts.jsonl").open().readline())
    # the same command goes on, and nothing is taken over twice
    launch("--world", world, "--output_dir", tmp_path / "arm", *SMALL, *arm)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--seed", 1], "has another cold start: seed: 0"),
        (["--sft_steps", 41], "has another cold start: sft_steps: 40"),
        (["--method", "grpo"], "has another cold start: four_stage: True"),
        (["--share", "/nowhere"], "/nowhere is not a run folder with a finished cold start"),
    ],
)
def test_another_cold_start_is_not_shared(finished, world, tmp_path, options, says):
    source, _ = finished
    line = ["--world", world, "--output_dir", tmp_path / "arm", *SMALL, "--share", source, *options]
    done = launch(*line, check=False)
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "arm" / "sft").exists()


def test_a_cold_start_whose_adapter_was_merged_is_not_shared(tmp_path):
    """RL goes on with the adapter of its cold start, and here would put a new one beside it."""
    there = train.Config(method="sft", lora_rank=4, merge=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dataclasses.asdict(there)))
    (tmp_path / "sft" / "policy").mkdir(parents=True)
    with pytest.raises(train.ConfigError, match="has merged the adapter that RL would go on with"):
        selection.shared_options(train.Config(lora_rank=4, share=str(tmp_path)))


def test_only_prompts_of_the_class_are_kept(world, tmp_path):
    """The top share within the class; the other classes are never trained."""
    lines = [
        {"id": f"{kind}-{i}", "known": 4, "mean": 0.5, "variance": 0.1 * i, "class": kind}
        for kind in ("easy", "medium", "hard")
        for i in range(4)
    ]
    samples = [SimpleNamespace(id=line["id"], category="c") for line in lines]
    cfg = train.Config(responses=4, keep=0.5, select_class="medium", world=str(world))
    found = selection._selected(samples, lines, None, cfg, None)
    assert found["kept"] == ["medium-3", "medium-2"] and found["of"] == 4
    assert found["unjudged"] == 0 and found["categories"] == {"c": [2, 4, 1]}
    with pytest.raises(DataError, match="of class hard"):
        some = [line | {"variance": 0.0} for line in lines]
        cfg = train.Config(responses=4, select_class="hard", world=str(world))
        selection._selected(samples, some, None, cfg, None)
