"""Every option of Config, away from its default, arrives where it acts: two small runs, watched."""

import json
import math
from collections import defaultdict
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

import config
import data
import grpo
import measures
import ntk_infonce
import rollouts
import selection
import train
import variance_select
from engine import judges, learner, pretrained, run, vlm

RUNS = {
    "ours": {  # LoRA, every mechanism on
        "seed": 3,
        "fps": 1.0,
        "max_frames": 2,
        "min_pixels": 3920,
        "max_pixels": 50_176,
        "max_prompt_tokens": 400,
        "media_workers": 1,
        "dtype": "float64",
        "attention": "eager",
        "static_decoding": True,
        "lora_rank": 2,
        "merge": True,
        "gradient_checkpointing": True,
        "sft_steps": 2,
        "sft_batch": 5,
        "sft_lr": 1e-3,
        "responses": 4,
        "keep": 0.75,
        "select_within": "category",
        "select_batch": 7,
        "rl_steps": 4,
        "prompts_per_step": 4,
        "prompts_per_pass": 3,
        "group_size": 3,
        "max_new_tokens": 12,
        "rl_lr": 2e-4,
        "warmup": 0.25,
        "weight_decay": 0.3,
        "max_grad_norm": 1e-3,
        "beta": 0.3,
        "kl_kind": "k2",
        "eps_low": 0.1,
        "eps_high": 0.3,
        "loss_norm": "constant",
        "iterations": 2,
        "accuracy_weight": 2.0,
        "format_weight": 0.3,
        "caption_weight": 0.5,
        "leak_penalty": 0.25,
        "nce_weight": 0.5,
        "nce_feature": "best",
        "tau": 0.2,
        "nce_temperature": 0.7,
        "nce_sketch": 64,
        "nce_control": True,
        "eval_responses": 5,
        "corrupt_train": "random_media",
        "corrupt_share": 0.5,
        "corrupt_eval": "blank mislead",
        "eval_batch": 3,
        "show_every": 2,
        "save_every": 1,
        "keep_last": 2,
        "held_out_rows": 3,
        "max_truncated": 0.1,
    },
    "grpo": {  # full fine-tuning, epochs, data and models of one's own
        "method": "grpo",
        "four_stage": True,
        "caption_reward": "gain",
        "train_set": "train_shared",
        "selection": True,
        "model": "policy",
        "data": "data",
        "judge": "http://127.0.0.1:9/v1",
        "judge_model": "somebody",
        "judge_concurrency": 3,
        "judge_deadline": 77.0,
        "judge_max_tokens": 33,
        "on_bad_row": "skip",
        "train_vision": True,
        "select_class": "medium",
        "sft_epochs": 0.2,
        "rl_epochs": 1.0,
        "completions_per_pass": 1,
        "tau_quantile": 0.3,
        "max_skipped": 2,
        "max_truncated": 1.0,
    },
}
# given to every run here; with tests of their own below; and in test_train.py,
# "the_lenient_rule_is_an_option", "a_run_takes_over_the_cold_start" and "in_host_memory";
# test_rewards.py; test_dry_run.py; and
# test_preference.py, "every_option_acts" and "a_diffusion_model_paints"
ELSEWHERE = {"world", "output_dir", "quiet", "tracker", "lenient", "share", "reward", "reference"}
ELSEWHERE |= {"dry_run"}
ELSEWHERE |= {"negatives", "pairs", "pair_rule", "buffer", "dpo_beta", "image_loss", "image_weight"}
ELSEWHERE |= {"temperature", "top_p"}
ELSEWHERE |= {f"diffusion{name}" for name in ("", "_size", "_steps", "_guidance")}
BASE = {
    "sft_batch": 8,
    "responses": 3,
    "prompts_per_step": 4,
    "group_size": 2,
    "max_new_tokens": 4,
    "nce_weight": 0.1,
}
PLACES = {  # where values act: calls that are watched
    "load": (pretrained, "load"),
    "rows": (data, "load"),
    "fitting": (data, "fitting"),
    "prompts": (data, "prompts"),
    "loader": (DataLoader, "__init__"),
    "generate": (vlm.VLM, "generate"),
    "LocalJudge": (judges, "LocalJudge"),
    "total_reward": (grpo, "total_reward"),
    "loss": (grpo, "grpo_loss"),
    "select": (variance_select, "select_top_variance"),
    "info_nce": (ntk_infonce, "info_nce"),
    "quantile_tau": (ntk_infonce, "quantile_tau"),
    "sketch": (ntk_infonce, "tensor_sketch"),
    "weights": (ntk_infonce, "feature_weights"),
    "adamw": (torch.optim.AdamW, "__init__"),
    "rate": (learner, "rate"),
    "clip": (train.Run, "clip_grad_norm"),
    "respond": (measures, "respond"),
    "seed": (train.Run, "reseed"),
    "backward": (train.Learner, "backward"),
    "prefix": (vlm.VLM, "prefix"),
    "held out": (train, "held_out_reward"),
}


class Seen(defaultdict):
    """What one run did: (arguments, named arguments) of each call at a place, its folder, what it
    printed."""

    def one(self, place, name):
        """The one value that a named argument has in all calls that have it."""
        [value] = {json.dumps(named[name]) for _, named in self[place] if name in named}
        return json.loads(value)


def watch(monkeypatch, calls):
    for place, (owner, name) in PLACES.items():
        original = getattr(owner, name)

        def wrapped(*args, place=place, original=original, **named):
            calls[place].append((args, named))
            return original(*args, **named)

        monkeypatch.setattr(owner, name, wrapped)


def varied(parts, judge, cfg, original=train.reward):
    """Rewards as they are, but for the accuracy: the untrained policy is never right, and nothing
    would vary."""
    found = original(parts, judge, cfg)
    for rewards, _ in found:
        rewards["accuracy"] = (
            (torch.arange(rewards["accuracy"].shape[1]) % 2).expand_as(rewards["accuracy"]).float()
        )
    return found


@pytest.fixture(scope="module")
def ran(world, tmp_path_factory):
    runs = {}
    for name, options in RUNS.items():
        with pytest.MonkeyPatch.context() as monkeypatch:
            folder, calls = tmp_path_factory.mktemp(name) / "run", defaultdict(list)
            options = BASE | options
            for given in ("model", "data"):
                if given in options:
                    options[given] = str(world / options[given])
            watch(monkeypatch, calls)

            def endpoint(*args, calls=calls, **named):
                calls["endpoint"].append((args, named))
                return lambda prompts: ["A"] * len(prompts)

            monkeypatch.setattr(judges, "EndpointJudge", endpoint)
            for stage in (rollouts, selection, train):
                monkeypatch.setattr(stage, "reward", varied)

            def save(learner, calls=calls, original=train.Learner._save_checkpoint):
                original(learner)
                calls["saved"].append((learner.stage, learner.step, len(learner.checkpoints())))

            monkeypatch.setattr(train.Learner, "_save_checkpoint", save)
            printed = []
            monkeypatch.setattr(
                train.Run, "say", lambda self, text, printed=printed: printed.append(text)
            )
            words = [f"--{key}={value}" for key, value in options.items()]
            cfg = train.parse_config([*words, f"--world={world}", f"--output_dir={folder}"])
            assert all(getattr(cfg, key) == value for key, value in options.items())
            train.main(cfg)
            seen = runs[name] = Seen(list, calls)
            seen.folder, seen.printed, seen.cfg = folder, printed, cfg
    return runs


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_every_option_is_tried_here():
    defaults = {field.name: field.default for field in fields(train.Config)}
    tried = {
        name for run in RUNS.values() for name, value in run.items() if value != defaults[name]
    }
    assert set(defaults) - tried - ELSEWHERE == set()


def test_models_are_loaded_as_asked(ran):
    for seen in ran.values():
        names = ("dtype", "attention", "static_decoding", "lora_rank", "train_vision")
        for name in (*names, "gradient_checkpointing"):
            assert seen.one("load", name) == getattr(seen.cfg, name)
        assert (seen.one("load", "min_pixels"), seen.one("load", "max_pixels")) == (
            seen.cfg.min_pixels,
            seen.cfg.max_pixels,
        )
    first = {name: seen["load"][0][0][0] for name, seen in ran.items()}
    assert (
        first["ours"] == str(Path(ran["ours"].cfg.world) / "policy")
        and first["grpo"] == ran["grpo"].cfg.model
    )
    assert not (ran["ours"].folder / "rl/policy/adapter_config.json").exists(), "merged"
    names = load_file(ran["grpo"].folder / "rl/policy/model.safetensors")
    before = load_file(ran["grpo"].folder / "sft/policy/model.safetensors")
    assert any("visual" in name and not torch.equal(names[name], before[name]) for name in names), (
        "vision is trained"
    )


def test_rows_and_prompts_are_as_asked(ran):
    for seen in ran.values():
        assert seen["fitting"] and all(args[3] is seen.cfg for args, _ in seen["fitting"])
        assert all(
            args[1:] == (True, seen.cfg.fps, seen.cfg.max_frames) for args, _ in seen["prompts"]
        )
    assert ran["ours"].one("loader", "num_workers") == 1 and not ran["grpo"]["loader"]
    assert [args[:2] for args, _ in ran["grpo"]["rows"]] == [(ran["grpo"].cfg.data, "skip")]


def test_rl_and_tests_are_corrupted_as_asked(ran):
    """RL's prompts in part, the cold start's never, the test sets once intact and once for each."""
    ours, pictures = ran["ours"], {}
    for args, _ in ours["prompts"]:
        for s in args[0]:
            pictures.setdefault(s.id, set()).add(s.corruption)
    train = {s.id for s in data.load(Path(ours.cfg.world) / "data")["train"]}
    kinds = {seen for i in train for seen in pictures[i]}
    assert kinds == {None, ("random_media", 3)} and all(len(pictures[i]) == 1 for i in train)
    assert all(pictures[i] == {None} for i in pictures if "cold_start" in i)
    result = json.loads((ours.folder / "eval/before.json").read_text())
    tests = [name for name in result if not name.endswith(("_blank", "_mislead"))]
    assert set(result) == {f"{t}{k}" for t in tests for k in ("", "_blank", "_mislead")}
    assert "Hint: the answer is" in result[f"{tests[0]}_mislead"]["rows"][0]["problem"]
    assert any(" rows with random_media" in text for text in ours.printed)


def test_the_judge_is_the_one_that_was_asked_for(ran):
    [(args, named)] = ran["grpo"]["endpoint"]
    assert args[:2] == ("http://127.0.0.1:9/v1", "somebody")
    assert named["concurrency"] == 3 and named["deadline"] == 77.0 and named["max_tokens"] == 33
    [(args, named)] = ran["ours"]["LocalJudge"]
    assert args[0] == str(Path(ran["ours"].cfg.world) / "judge") and named["max_new_tokens"] == 1024


def test_stages_take_as_many_updates_of_as_many_rows(ran):
    ours, other = ran["ours"], ran["grpo"]
    for seen, sft, rl in ((ours, 2, 4), (other, 2, 2)):  # a fifth of 60 rows by 8; 6 prompts by 4
        assert [len(lines(seen.folder, f"{stage}/metrics.jsonl")) for stage in ("sft", "rl")] == [
            sft,
            rl,
        ]
        rollouts = lines(seen.folder, "rl/rollouts.jsonl")
        assert len(rollouts) == rl * 4 and {len(line["text"]) for line in rollouts} == {
            seen.cfg.group_size
        }
        scores = lines(seen.folder, "select/scores.jsonl")
        assert {len(line["accuracy"]) for line in scores} == {seen.cfg.responses}
        asked = {args[2:4] for args, _ in seen["generate"]}  # n, max_new_tokens
        assert asked == {
            (n, seen.cfg.max_new_tokens)
            for n in (seen.cfg.responses, seen.cfg.group_size, seen.cfg.eval_responses, 1)
        }
    rows = [len(args[0]) for args, _ in ours["prompts"]][:4]
    assert rows == [3, 2] * 2, "sft_batch in prompts_per_pass"
    sizes = {
        n: [len(args[1]["input_ids"]) for args, _ in ours["generate"] if args[2] == n]
        for n in (4, 3)
    }
    assert sizes[4] == [7, 5], "select_batch"
    assert sizes[3] == [4] * 4, "all prompts of an update, whatever prompts_per_pass"
    assert [len(args[2]) for args, _ in ours["loss"]] == [9, 3] * 2 * 4, "prompts_per_pass"
    grpo_sizes = {len(args[2]) for args, _ in ran["grpo"]["loss"]}
    assert grpo_sizes == {4} and not ours["prefix"], "completions_per_pass: 4 prompts, 1 response"
    assert 2 * len(ran["grpo"]["prefix"]) == len(ran["grpo"]["loss"])
    assert max(len(args[1]) for args, _ in ours["respond"]) == 3, "eval_batch"
    assert {args[0].cfg.seed for args, _ in ours["seed"]} == {3}


def test_selection_keeps_what_was_asked_for(ran):
    [(args, _)] = ran["ours"]["select"]
    assert args[2] == 0.75 and set(args[3]) == {
        s.category for s in data.load(Path(ran["ours"].cfg.world) / "data")["train"]
    }
    [(args, _)] = ran["grpo"]["select"]
    assert args[2:] == (0.5, None)


def test_the_loss_is_the_one_that_was_asked_for(ran):
    names = ("beta", "eps_low", "eps_high", "kl_kind", "loss_norm")
    for seen in ran.values():
        for name in names:
            assert seen.one("loss", name) == getattr(seen.cfg, name)
        assert seen.one("loss", "max_tokens") == seen.cfg.max_new_tokens
        assert all(args[1] == seen.cfg.reward_weights for args, _ in seen["total_reward"])
    assert ran["ours"].cfg.reward_weights == {
        "accuracy": 2.0,
        "format": 0.3,
        "caption": 0.5,
        "leak": 0.25,
    }


def test_eq_4_is_the_one_that_was_asked_for(ran):
    ours, other = ran["ours"], ran["grpo"]
    assert {args[1:3] for args, _ in ours["info_nce"]} == {(0.2, 0.7)} and not ours["quantile_tau"]
    orders = [args[3].sort().values.tolist() for args, _ in ours["info_nce"]]
    assert all(order == list(range(len(order))) for order in orders), "nce_control"
    assert {args[3] for args, _ in other["info_nce"]} == {None}
    assert {args[1] for args, _ in other["quantile_tau"]} == {0.3}
    assert {args[0] for args, _ in ours["weights"]} == {"best"} and {
        args[5] for args, _ in ours["sketch"]
    } == {64}
    assert {args[0] for args, _ in other["weights"]} == {"reference"} and not other["sketch"]
    assert {args[2] for args, _ in other["info_nce"]} == {1.0}
    for seen in ran.values():  # the loss that is handed on is Eq. 1 plus the weight times Eq. 4
        cfg = seen.cfg
        parts = math.ceil(cfg.sft_batch / (cfg.prompts_per_pass or cfg.sft_batch))
        passes = [args[1] for args, _ in seen["backward"]][2 * parts :]  # two of the cold start
        assert len(passes) == len(seen["loss"])
        # once for each micro-batch, in its last pass
        assert len(seen["info_nce"]) == (len(seen["prefix"]) or len(passes))


def test_the_optimiser_is_the_one_that_was_asked_for(ran):
    for seen in ran.values():
        cfg = seen.cfg
        rates = [(named["lr"], named["weight_decay"]) for _, named in seen["adamw"]]
        assert rates == [(cfg.sft_lr, cfg.weight_decay), (cfg.rl_lr, cfg.weight_decay)]
        assert {args[2] for args, _ in seen["clip"]} == {cfg.max_grad_norm}
        steps = {"ours": (2, 4 * 2), "grpo": (2, 2)}[cfg.method]  # iterations count
        rates = {(named["warmup"], named["total"]) for _, named in seen["rate"]}
        assert rates == {(round(cfg.warmup * n), n) for n in steps}
    ours = lines(ran["ours"].folder, "rl/metrics.jsonl")
    shares = [line["lr"] / 2e-4 for line in ours]  # of the second iteration of each update
    assert shares == pytest.approx([learner.rate(i, 2, 8) for i in (1, 3, 5, 7)])
    assert len(ran["ours"]["clip"]) == 2 + 4 * 2


def test_what_a_run_keeps_and_says_is_as_asked(ran):
    ours, other = ran["ours"], ran["grpo"]
    assert [saved for saved in ours["saved"] if saved[0] == "rl"] == [
        ("rl", 1, 1),
        ("rl", 2, 2),
        ("rl", 3, 2),
    ]
    assert not other["saved"]
    rows = [{len(args[0]) for args, _ in seen["held out"]} for seen in (ours, other)]
    assert rows == [{3}, {10}], "all ten test rows by default"
    shown = [
        text for text in ours.printed if text.startswith("  ") and "[" in text and "\n" in text
    ]
    assert len(shown) == 2, "of updates 2 and 4"
    cut = "of responses were cut at --max_new_tokens"
    assert any(cut in text for text in ours.printed) and not any(
        cut in text for text in other.printed
    )


def test_a_run_says_nothing_where_it_is_quiet(world, tmp_path, capsys):
    options = f"--world {world} --output_dir {tmp_path}/run --method sft --sft_steps 0 --quiet true".split()
    run = train.Run(train.parse_config(options))
    run.say("something")
    assert capsys.readouterr().out == ""


def test_a_tracker_is_handed_to_accelerate(world, tmp_path, monkeypatch):
    asked = []

    class Stop(Exception):
        pass

    def accelerator(**options):
        asked.append(options["log_with"])
        raise Stop

    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(run, "Accelerator", accelerator)
    with pytest.raises(Stop):
        train.Run(train.Config(output_dir=str(tmp_path / "run"), tracker="tensorboard"))
    assert asked == ["tensorboard"]


def test_the_number_of_updates_that_may_be_skipped_is_as_asked(world, tmp_path, monkeypatch):
    original = grpo.grpo_loss
    monkeypatch.setattr(
        grpo,
        "grpo_loss",
        lambda *a, **k: [x * float("nan") if not i else x for i, x in enumerate(original(*a, **k))],
    )
    options = "--sft_steps 0 --selection false --rl_steps 5 --prompts_per_step 3 --group_size 2 --max_new_tokens 3"
    for most in (1, 3):
        words = f"{options} --max_skipped {most} --world {world} --output_dir {tmp_path}/{most} --quiet true".split()
        with pytest.raises(train.Diverged, match=f"{most} updates? in a row"):
            train.main(train.parse_config(words))


def test_a_gradient_is_clipped_to_the_norm_that_was_asked_for(world, tmp_path):
    """What the optimiser is given has that norm; a bound that is never met leaves the gradient
    alone."""
    for most in (0.5, 1e9):
        cfg = train.Config(output_dir=f"{tmp_path}/{most}", max_grad_norm=most, quiet=True)
        layer = torch.nn.Linear(4, 3)
        layer(torch.full((8, 4), 9.0)).sum().backward()
        parameters = list(layer.parameters())
        norm = torch.cat([p.grad.flatten() for p in parameters]).norm().item()
        run = train.Run(cfg)
        assert run.clip_grad_norm(parameters, cfg.max_grad_norm) == pytest.approx(norm)
        clipped = torch.cat([p.grad.flatten() for p in layer.parameters()]).norm().item()
        assert clipped == pytest.approx(min(norm, most), rel=1e-4)
