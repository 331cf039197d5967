"""preference.py: the step against plain rows, rounds and their buffer, negative images, refusals."""

import dataclasses
import json
import math
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import commands
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from skimage import data as photographs
from test_nothing_lost import lines_in

import corruption
import data
import negatives
import ovip
import preference
import train
from engine import DataError, pretrained, run, shared_prefix
from engine.vlm import VLM
from world import scenes

SMALL = (
    "--method ovip --sft_steps 60 --sft_batch 8 --sft_lr 3e-3 --rl_steps 10 --prompts_per_step 4 "
    "--group_size 8 --pairs 3 --max_new_tokens 40 --rl_lr 1e-3 --save_every 2 --held_out_rows 4 "
    "--quiet true"
).split()


@pytest.fixture(scope="module")
def samples(world):
    global MODEL
    MODEL = world / "policy"
    return data.load(world / "data")["train"]


@pytest.fixture(scope="module")
def ran(world, tmp_path_factory):
    """The folder of a whole run."""
    folder = tmp_path_factory.mktemp("ran") / "run"
    commands.launch(*SMALL, "--world", world, "--output_dir", folder)
    return folder


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def config(**options):
    return train.Config(**{"method": "ovip", **options})


# --- the step -------------------------------------------------------------------------------------


def make_pairs(policy, samples):
    rng, end = random.Random(0), policy.end_ids[0]
    said = [[rng.randrange(300, 500) for _ in range(n)] + [end] for n in (3, 7, 5, 2, 6)]
    return [
        preference.Pair(samples[0].id, 1, said[0], said[1], "", ""),
        preference.Pair(samples[1].id, 1, [], said[2], "<think>x</think><answer>A</answer>", ""),
        preference.Pair(samples[2].id, 1, said[3], said[4], "", ""),
    ]


def blanked(part):
    return part | {part["type"]: corruption.blank(part[part["type"]])}


@pytest.mark.parametrize(
    ("form", "size"),
    [("two_sigmoids", 0), ("two_sigmoids", 1), ("printed", 0), ("base", 0), ("", 1)],
)
def test_the_step_is_that_of_plain_rows(world, samples, form, size):
    """Loss and gradient of Eqs. 4 to 6 by one plain row for each text, in float64 (but for norms, which transformers computes in float32). A pair without a
    negative image takes no part."""
    policy = pretrained.load(str(world / "policy"), dtype="float64")
    frozen = pretrained.load(str(world / "policy"), dtype="float64", trainable=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in frozen.parameters():
            p.add_(0.02 * torch.randn_like(p))
    every = 2 if form else 3  # online DPO needs no image
    cfg = config(image_loss=form, image_weight=0.7, dpo_beta=0.3, prompts_per_pass=size)
    clip = next(s for s in samples if s.data_type == "video")
    some = [samples[0], clip, samples[4]]
    pairs = make_pairs(policy, some)

    def images(pairs, shown, chats):
        media = [preference.media_of(chat) for chat in chats]
        return [[blanked(part) for part in one] for one in media[:2]] + [None]

    seen = []

    def accumulate(parts, work):
        if size:  # an attempt that is made again leaves nothing behind
            work(parts)
            policy.zero_grad()
            seen.clear()
        work(parts)

    learner = SimpleNamespace(
        run=SimpleNamespace(all_reduce=lambda x: x, device="cpu"),
        rows_at_once=lambda rows: min(size or rows, 9),
        policy=policy,
        model=policy,
        accumulate=accumulate,
        backward=lambda loss: (seen.append(loss.detach()), loss.backward()),
        update=lambda scheduled: seen.append(scheduled),
    )
    with torch.no_grad():
        reference = SimpleNamespace(logp=lambda *of: frozen(*of).logp.detach().flatten(0, 1))
    numbers = dict.fromkeys(
        ("loss", "text_margin", "image_margin", "text_right", "image_right", "lost"), (0.0, 0)
    )
    if size:  # a mean over what is left in all micro-batches
        pairs, some = pairs[::-1], some[::-1]
        forward = images
        images = lambda p, s, c: forward(p, s, c[::-1])[::-1]  # noqa: E731
    by_id = {s.id: s for s in some}
    done = preference.learn(
        learner, reference, pairs, by_id, images if form else None, cfg, numbers
    )
    assert done and seen.pop() is False
    found = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()

    def h(pair_ids, chat):
        ids = torch.tensor(pair_ids)[None, None]
        inputs = policy.encode([chat])
        ours = policy.score_plain(inputs, ids).logp.sum()
        return ours - frozen.score_plain(inputs, ids).logp.sum().detach()

    total = 0.0
    for pair in pairs:
        sample = by_id[pair.id]
        if form and sample is (some[0] if size else some[2]):
            continue
        [chat] = data.prompts([sample], True, cfg.fps, cfg.max_frames)
        good = pair.positive or [
            *policy.processor.tokenizer(pair.positive_text).input_ids,
            policy.end_ids[0],
        ]
        shown = [part if part["type"] == "text" else blanked(part) for part in chat[0]["content"]]
        text = [part for part in chat[0]["content"] if part["type"] == "text"]
        a, b = h(good, chat), h(pair.negative, chat)
        none, other = (h(good, [{"role": "user", "content": x}]) for x in (text, shown))
        loss = -F.logsigmoid(0.3 * (a - b))
        image = {
            "two_sigmoids": -F.logsigmoid(0.3 * (a - none)) - F.logsigmoid(0.3 * (none - other)),
            "printed": -F.logsigmoid(0.3 * (a - none) + 0.3 * (none - other)),
            "base": -F.logsigmoid(0.3 * (a - other)),
            "": torch.zeros(()),
        }[form]
        total = total + (loss + 0.7 * image) / every
    total.backward()
    assert sum(seen).item() == pytest.approx(total.item(), abs=1e-7)
    assert numbers["loss"][0] == pytest.approx(total.item(), abs=1e-7)
    assert numbers["lost"] == (3 - every, 3) and numbers["text_margin"][1] == every
    wanted = {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}
    assert wanted.keys() == found.keys() and len(found) > 20
    for name, grad in wanted.items():
        torch.testing.assert_close(
            found[name], grad, atol=5e-7, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert max(g.abs().max() for g in found.values()) > 1e-4


def test_the_row_without_an_image_has_no_token_of_one(policy, samples):
    clip = next(s for s in samples if s.data_type == "video")
    for sample in (samples[0], clip):
        [chat] = data.prompts([sample], True, 2.0, 16)
        ids = policy.encode([chat])["input_ids"]
        bare = policy.encode([preference.without_media(chat)])["input_ids"]
        config, words = policy.core.config, []
        for token in (config.image_token_id, config.video_token_id):
            assert token not in bare
            words.append(int((ids == token).sum()))
        assert sum(words) > 0 and bare.shape[1] == ids.shape[1] - sum(words) - 2


def test_without_any_negative_image_nothing_is_learned(samples):
    learner = SimpleNamespace(
        run=SimpleNamespace(all_reduce=lambda x: x, device="cpu"), policy=None
    )
    pair = preference.Pair(samples[0].id, 1, [1], [2], "", "")
    numbers = {"lost": (0.0, 0)}
    cfg = config()
    preference.learn(
        learner, None, [pair], {samples[0].id: samples[0]}, lambda *_: [None], cfg, numbers
    )
    assert numbers == {"lost": (1, 1)}


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_pairs_its_own_responses(ran):
    """Every pair follows from its scores by Algorithm 1, the scores from the rule, and the counts
    from the lines."""
    rolls, metrics = lines(ran, "rl/rollouts.jsonl"), lines(ran, "rl/metrics.jsonl")
    assert len(rolls) == 40 and len(metrics) == 10
    for line in rolls:
        rule = [9 * a + f for a, f in zip(line["accuracy"], line["format"], strict=True)]
        assert line["score"] == rule and len(line["text"]) == 8 and "ids" not in line
        # no row of RL has a reference response, so its pairs are the policy's own
        found = [list(p) for p in ovip.select_pairs(torch.tensor(rule)) if p[0] is not None]
        assert line["pairs"] == found
    made, used, buffer = 0, 0, 0
    for step, metric in enumerate(metrics, 1):
        some = [line for line in rolls if line["step"] == step]
        made += sum(len(line["pairs"]) for line in some)
        used += int(metric["taken"])
        buffer = made - used
        assert metric["buffer"] == buffer < 3
        assert metric["no_pair"] == sum(not line["pairs"] for line in some) / 4
        known = [s for line in some for s in line["score"]]
        assert metric["score"] == pytest.approx(sum(known) / len(known))
        assert metric["scored"] == 1.0 and 0 <= metric.get("lost", 0) <= 1
    assert used >= 6 and (ran / "rl/policy/model.safetensors").exists()
    assert len({metric["lr"] for metric in metrics if metric["updates"]}) > 1
    assert "OViP" in (ran / "report.html").read_text() or (ran / "report.html").exists()


def test_a_killed_run_with_a_half_full_buffer_ends_the_same(ran, world, tmp_path):
    """kill -9 before an update of a later round, with pairs in the checkpoint's buffer."""
    folder, log = tmp_path / "run", tmp_path / "log"
    options = [*SMALL, "--world", world, "--output_dir", folder]
    updates = [m["step"] for m in lines(ran, "rl/metrics.jsonl") if m["updates"]]
    buffers = {m["step"]: m["buffer"] for m in lines(ran, "rl/metrics.jsonl")}
    step = next(s for s in updates if s > 2 and buffers[(s - 1) // 2 * 2])
    process = commands.start("train.py", *options, out=log, err=log, moment=f"rl-{step}")
    process.join()
    assert process.exitcode == -9, log.read_text()[-2000:]
    last = folder / f"rl/checkpoint-{(step - 1) // 2 * 2}"
    kept = json.loads((last / "state.json").read_text())["extra"]["buffer"]
    assert 0 < len(kept) < 3 and {"id", "positive", "negative"} < kept[0].keys()
    assert lines_in(folder / "rl/metrics.jsonl") == step - 1
    commands.launch(*options)
    for name in ("metrics.jsonl", "rollouts.jsonl", "held_out.jsonl", "policy/model.safetensors"):
        assert (folder / "rl" / name).read_bytes() == (ran / "rl" / name).read_bytes(), name
    assert (folder / "eval/after.json").read_bytes() == (ran / "eval/after.json").read_bytes()


def test_a_judge_that_scores_nothing_is_refused_at_once(world, tmp_path):
    """Before the cold start, with what it said."""
    options = {"model": world / "policy", "data": world / "data", "judge": world / "judge"}
    options |= {"four_stage": False, "negatives": "random", "judge_max_tokens": 1}
    words = (f"--{k}={v}" for k, v in options.items())
    where = ["--output_dir", tmp_path / "run"]
    done = commands.launch("--method=ovip", *words, *where, check=False)
    assert done.returncode == 1 and not (tmp_path / "run/sft").exists()
    assert re.search("error: judge: .* (answered none|gave none of 4 right answers)", done.stderr)
    with pytest.raises(run.ConfigError, match="judge: .*gave none of 2 .*said: a lovely picture"):
        preference.try_scores(
            lambda prompts: ["a lovely picture"] * len(prompts),
            data.load(world / "data")["train"][:2],
        )


def test_unscored_rounds_are_said(world, tmp_path, monkeypatch):
    """All scores unknown: no pair, no update, weights as they were, and a warning each round."""
    unknown = torch.full((2, 4), math.nan)
    monkeypatch.setattr(preference, "scores_of", lambda m, *of: unknown[: len(m.samples)])
    printed = []
    monkeypatch.setattr(train.Run, "say", lambda self, text: printed.append(text))
    words = (
        "--method=ovip --sft_steps=0 --rl_steps=2 --prompts_per_step=2 --group_size=4 "
        "--max_new_tokens=4 --held_out_rows=0 --lora_rank=2 --eval_responses=0"
    ).split()
    cfg = train.parse_config([*words, f"--world={world}", f"--output_dir={tmp_path / 'run'}"])
    train.main(cfg)
    metrics = lines(tmp_path / "run", "rl/metrics.jsonl")
    assert [(m["scored"], m["updates"], m["buffer"]) for m in metrics] == [(0, 0, 0)] * 2
    assert all(not {"grad_norm", "lr", "loss"} & set(m) for m in metrics)
    text = "\n".join(printed)
    assert text.count("no response of this round was scored") == 2
    assert text.count("no prompt of this round gave a pair") == 2
    assert "responses were cut at --max_new_tokens 4" in text
    assert "warning: no update was made, so the policy is as it was" in text
    weights = load_file(tmp_path / "run/rl/policy/adapter_model.safetensors")
    assert all(not w.any() for name, w in weights.items() if "lora_B" in name)


def test_every_option_acts(world, tmp_path, monkeypatch):
    """What a run hands to the sampler, the rule, the buffer and the losses; a pair's A+ is the row's
    reference response where none of its own is good."""
    seen = {name: [] for name in ("generate", "rule", "taken", "text", "image", "blur")}

    def watch(owner, name, key):
        original = getattr(owner, name)

        def wrapped(*args, **named):
            seen[key].append((args, named))
            return original(*args, **named)

        monkeypatch.setattr(owner, name, wrapped)

    watch(VLM, "generate", "generate")
    watch(ovip, "released_pairs", "rule")
    watch(preference, "taken", "taken")
    watch(ovip, "text_loss", "text")
    watch(ovip, "image_loss", "image")
    watch(corruption, "blur", "blur")
    folder = tmp_path / "data"
    shutil.copytree(world / "data", folder)
    shutil.copy(folder / "cold_start.json", folder / "train.json")  # rows with a reference response
    options = {
        "data": folder, "model": world / "policy", "negatives": "blur", "pair_rule": "code",
        "buffer": "fifo", "dpo_beta": 0.3, "image_loss": "base", "image_weight": 0.5,
        "temperature": 1.2, "top_p": 0.8, "pairs": 2, "sft_steps": 0, "rl_steps": 1, "quiet": True,
        "prompts_per_step": 3, "group_size": 4, "max_new_tokens": 6, "held_out_rows": 0,
    }  # fmt: skip
    words = [f"--{name}={value}" for name, value in options.items()]
    train.main(train.parse_config(["--method=ovip", *words, f"--output_dir={tmp_path / 'run'}"]))
    ways = {(n.get("temperature"), n.get("top_p")) for _, n in seen["generate"] if "draws" in n}
    assert ways == {(1.2, 0.8)} and len(seen["rule"]) == 3
    assert all(len(args[0]) <= 4 for args, _ in seen["rule"])
    assert [args[1:3] for args, _ in seen["taken"]] == [(2, "fifo")]
    assert seen["text"][0][0][4] == 0.3 and seen["image"][0][0][6:] == (0.3, 0.3, "base")
    assert len(seen["blur"]) == 2
    [metric], rolls = (lines(tmp_path / "run", f"rl/{n}.jsonl") for n in ("metrics", "rollouts"))
    assert [line["pairs"][0][0] for line in rolls] == [None] * 3 and metric["of_reference"] == 1
    # at the start policy and reference agree: each loss is log 2
    assert metric["loss"] == pytest.approx(1.5 * math.log(2), abs=1e-5)


# --- pairs ----------------------------------------------------------------------------------------


def rollouts(samples, texts):
    ids = torch.arange(len(texts) * len(texts[0]) * 4).view(len(texts), len(texts[0]), 4)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[..., 3] = False
    return SimpleNamespace(
        samples=samples, text=texts, branches=ids, mask=mask.flatten(0, 1),
        ended=torch.ones(ids.shape[:2], dtype=torch.bool),
    )  # fmt: skip


GOOD = "<prethink>p</prethink><caption>c</caption><think>t</think><answer>{}</answer>"


def test_pairs_hold_the_tokens_of_their_responses(samples):
    """A+ and A- are the sampled tokens; the reference answer is the row's own; a row without one
    gives no pair of it."""
    right, wrong = GOOD.format(samples[0].answer), GOOD.format("Z")
    with_reference = dataclasses.replace(samples[1], process=GOOD.format(samples[1].answer))
    some = [samples[0], with_reference, samples[2]]
    texts = [[wrong, right, "nothing", "nothing"], [wrong] * 4, [wrong] * 4]
    m = rollouts(some, texts)
    cfg = config(group_size=4)
    found, numbers = preference.score_and_pair([m], None, cfg)
    assert [line["score"] for line in found] == [[1, 10, 0, 0], [1] * 4, [1] * 4]
    assert [line["pairs"] for line in found] == [[(1, 2)], [(None, 0)], []]
    [pair] = found[1]["ids"]
    assert pair == ([], m.branches[1, 0, :3].tolist(), with_reference.process, wrong)
    assert numbers["no_reference"] == (1, 3) and numbers["of_reference"] == (1, 3)
    [(good, bad, *said)] = found[0]["ids"]
    assert good == m.branches[0, 1, :3].tolist() and bad == m.branches[0, 2, :3].tolist()
    assert said == [right, "nothing"]


def test_the_released_rule_takes_distinct_responses(samples):
    texts = [["bad", "good", "good", "bad", "bad", "fair"]]
    scores = torch.tensor([[2.0, 8, 8, 2, 2, 6]])
    cfg = config(group_size=6, pair_rule="code")
    # twice the sigma of all six is 6.02: no pair; of the three distinct ones the first and the last are one
    assert preference.choose_pairs(texts[0], scores[0], samples[0], cfg)[0] == [(1, 0)]
    cfg = config(group_size=6)
    assert preference.choose_pairs(texts[0], scores[0], samples[0], cfg) == ([], True)


def test_a_judge_scores_each_response_once(samples):
    asked = []

    def judge(prompts):
        asked.extend(prompts)
        said = {"one": "Score: 8\n", "two": "Score: [3]", "three": None}
        return [said[re.search(r"instruction:\n(.*)\n", p)[1]] for p in prompts]

    m = rollouts([samples[0]], [["one", "two", "two", "three"]])
    scores = preference.scores_of(m, {}, judge, config())
    torch.testing.assert_close(scores, torch.tensor([[8.0, 3, 3, float("nan")]]), equal_nan=True)
    assert len(asked) == 3 and all(samples[0].question in p for p in asked)
    assert all(f"Reference answer:\n{samples[0].answer}" in p for p in asked)


@pytest.mark.parametrize("how", ["fifo", "random"])
def test_the_buffer_gives_each_pair_once(how):
    buffer, gone = [preference.Pair(str(i), 1, [], [], "", "") for i in range(10)], []
    while len(buffer) >= 3:
        some, buffer = preference.taken(buffer, 3, how, f"seed/{len(buffer)}")
        assert len(some) == 3
        gone += [p.id for p in some]
    assert sorted(gone + [p.id for p in buffer]) == [str(i) for i in range(10)]
    assert (gone == [str(i) for i in range(9)]) == (how == "fifo")


# --- sampling -------------------------------------------------------------------------------------


def test_temperature_and_nucleus_are_those_asked_for(policy, samples):
    """Frequencies of the first token against softmax(z / T), cut at top_p, renormalised."""
    inputs = policy.encode(data.prompts(samples[:1], True, 2.0, 16))
    n = 4000
    draws = torch.rand(1, n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = policy.generate(inputs, n, 1, draws=draws, temperature=1.5, top_p=0.6).ids[0, :, 0]
    with torch.no_grad():
        hidden = policy(inputs, ids[:1, None, None]).hidden[0, 0, 0]
        z = hidden @ policy.core.lm_head.weight.T
    z[policy.banned_ids] = -torch.inf
    p, order = (z / 1.5).softmax(-1).sort(descending=True)
    kept = p.cumsum(0) - p < 0.6
    wanted = torch.zeros(len(z)).index_add(0, order[kept], p[kept] / p[kept].sum())
    counts = torch.bincount(ids, minlength=len(z)).float() / n
    assert (counts[wanted == 0] == 0).all() and kept.sum() > 3
    assert (counts - wanted).abs().max() < 5 * (wanted.max() / n) ** 0.5


def test_the_sampler_without_warpers_is_as_before():
    scores = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
    draws = torch.full((3, 1), 0.3, dtype=torch.float64)
    bias = torch.tensor([-1e30, 0, 0, 0, 0, 0, 0])
    plain = shared_prefix.TokenSampler(bias, 1, torch.zeros(3, dtype=torch.bool), draws)
    chosen = plain(None, scores.clone()).argmax(-1)
    cut = scores.index_fill(1, torch.tensor([0]), -torch.inf).softmax(-1).double().cumsum(-1)
    assert chosen.tolist() == [int((row <= 0.3).sum()) for row in cut]


# --- negative images ------------------------------------------------------------------------------


def make_negatives(samples, kind, judge=None, **options):
    if kind != "draw":
        options = {"model": str(MODEL), "data": "d", "judge": "j"} | options
    cfg = config(negatives=kind, **options)
    negatives.check(samples, cfg)
    run_ = SimpleNamespace(device="cpu", say=print, reseed=lambda *of: torch.manual_seed(0))
    return negatives.Negatives(samples, judge, cfg, run_)


def asked(samples, text=""):
    pairs = [preference.Pair(s.id, 1, [1], [2], "", text) for s in samples]
    return pairs, samples, data.prompts(samples, True, 2.0, 16)


@pytest.mark.parametrize("kind", ["crop", "blur", "random"])
def test_negatives_of_pictures_and_clips(samples, kind):
    """Another picture each, of as many frames and the same size, the same every time; the intact
    one is unchanged."""
    clip = next(s for s in samples if s.data_type == "video")
    some = [samples[0], clip]
    images = make_negatives(samples, kind)
    pairs, _, chats = asked(some)
    intact = [preference.media_of(chat) for chat in chats]
    before = [[np.asarray(x).tobytes() for x in flat(one)] for one in intact]
    found, again = images(pairs, some, chats), images(pairs, some, chats)
    for one, two, other in zip(found, again, intact, strict=True):
        a, b, c = ([np.asarray(x) for x in flat(media)] for media in (one, two, other))
        assert all((x == y).all() for x, y in zip(a, b, strict=True))
        assert [x.shape for x in a] == [x.shape for x in c]
        assert any((x != y).any() for x, y in zip(a, c))
    assert before == [[np.asarray(x).tobytes() for x in flat(one)] for one in intact]
    swapped = preference.with_media(chats[1], found[1])
    assert preference.media_of(swapped) == found[1] and preference.media_of(chats[1]) == intact[1]
    texts = [[p for p in c[0]["content"] if p["type"] == "text"] for c in (swapped, chats[1])]
    assert texts[0] == texts[1]


def flat(parts):
    media = [part[part["type"]] for part in parts]
    return [x for m in media for x in (m if isinstance(m, list) else [m])]


def test_a_crop_of_a_photograph():
    """80 % of it or more, in its proportions, enlarged; the same for the same id."""
    picture = Image.fromarray(photographs.astronaut())
    before = picture.tobytes()
    one = corruption.crop(picture, 0, "a")
    assert one.size == picture.size and one.tobytes() == corruption.crop(picture, 0, "a").tobytes()
    assert one.tobytes() != corruption.crop(picture, 0, "b").tobytes()
    assert picture.tobytes() == before and corruption.crop(picture, 0, "a", 1.0).tobytes() == before
    # it holds the middle of the picture: no more than a fifth is lost
    small = np.asarray(one.resize((64, 64))).astype(float) - np.asarray(picture.resize((64, 64)))
    assert 1 < np.abs(small).mean() < 60
    frames = corruption.crop([picture, picture], 1, "a")
    assert frames[0].tobytes() == frames[1].tobytes()
    with pytest.raises(ValueError, match="least must lie"):
        corruption.crop(picture, 0, "a", 0)


def test_a_described_scene_is_drawn(samples):
    """What a caption in the world's words says, objects and clips; other words give none."""
    rng = random.Random(1)
    for kind in scenes.KINDS * 8:
        scene, query = scenes.make_row(rng, kind)
        here = scenes.of_shape(scene, query["shape"])
        said = scenes.describe(scene, query["shape"])
        assert sorted(scenes.read_description(said), key=str) == sorted(here, key=str)
    wrong = ("", "a red circle", "northwest red circle and more", "northwest red circle, and more")
    for text in (*wrong, "no elephant", "no circle, "):
        assert scenes.read_description(text) is None
    images = make_negatives(samples, "draw")
    clip = next(s for s in samples if s.data_type == "video")
    text = GOOD.replace(">c<", ">northwest red star, southeast blue cross<")
    for sample in (samples[0], clip):
        pairs, some, chats = asked([sample], text)
        [drawn] = images(pairs, some, chats)
        first = flat(drawn)[0]
        assert len(drawn) == 1 and isinstance(flat(drawn), list)
        assert drawn[0]["type"] == ("video" if sample is clip else "image")
        colours = {scenes.COLOURS["red"]: (14, 14), scenes.COLOURS["blue"]: (42, 42)}
        for colour, place in colours.items():
            assert first.getpixel(place) == colour
        assert first.getpixel((42, 14)) not in scenes.COLOURS.values()
    pairs, some, chats = asked([samples[0]], GOOD)
    assert images(pairs, some, chats) == [None], "c is no description"


def test_random_needs_other_pictures(samples):
    same = [dataclasses.replace(samples[0], id=str(i)) for i in range(3)]
    with pytest.raises(DataError, match="random needs rows with other pictures"):
        make_negatives(same, "random")
    several = dataclasses.replace(samples[0], media=samples[0].media * 2)
    with pytest.raises(DataError, match=f"makes one picture, and row {several.id} has 2 pictures"):
        make_negatives([several], "draw")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A tiny text-to-image pipeline of diffusers, built from config, as a folder."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("diffusion")
    letters = [chr(i) for i in range(33, 127)]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *[f"{x}</w>" for x in letters]]
    (folder / "vocab.json").write_text(json.dumps({x: i for i, x in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(32, 64), layers_per_block=1, down_block_types=down,
        up_block_types=up, cross_attention_dim=32,
    )  # fmt: skip
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4}
    text = CLIPTextConfig(
        **sizes, num_hidden_layers=2, vocab_size=len(words), bos_token_id=0, eos_token_id=1,
        pad_token_id=1,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=diffusers.AutoencoderKL(
            block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(*files, model_max_length=77),
        unet=unet,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, image_encoder=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipe.save_pretrained(folder / "pipe")
    return folder / "pipe"


class Describes:
    """A judge that describes, and fails on one pair."""

    last_error = ""

    def sampling(self, **options):
        self.options = options
        return self

    def __call__(self, prompts):
        self.asked = [*getattr(self, "asked", []), *prompts]
        return [None if "lost" in p else "a red star" if "red" in p else "x" for p in prompts]


def test_a_diffusion_model_paints_what_the_judge_says(pipeline, samples, monkeypatch):
    pictures = [s for s in samples if s.data_type == "image"][:4]
    judge = Describes()
    options = {"diffusion": str(pipeline), "diffusion_size": 32, "diffusion_steps": 2}
    images = make_negatives(pictures, "diffusion", judge, **options)
    assert judge.options == {"temperature": 0.1, "top_p": 0.9, "max_tokens": 128}
    pairs, some, chats = asked(pictures)
    for pair, text in zip(pairs, ("red", "red", "lost", "blue"), strict=True):
        pair.negative_text = text
    found = images(pairs, some, chats)
    assert found[2] is None, "no description, no picture, and the others are there"
    made = [flat(parts)[0] for parts in found[:2] + found[3:]]
    assert all(image.size == (32, 32) and image.mode == "RGB" for image in made)
    assert made[0].tobytes() == made[1].tobytes() != made[2].tobytes()
    assert some[3].question in judge.asked[-1] and len(judge.asked) == 4

    original = images.paint.pipe

    def fails(text, **options):
        if text == "x":
            raise RuntimeError("the model is gone")
        return original(text, **options)

    images.paint.pipe = fails
    found = images(pairs, some, chats)
    assert [one is None for one in found] == [False, False, True, True]
    assert "the model is gone" in images.last_error


def test_a_diffusion_model_that_is_not_there_is_said(samples, tmp_path):
    pytest.importorskip("diffusers")
    pictures = [s for s in samples if s.data_type == "image"][:2]
    with pytest.raises(run.ConfigError, match=f"diffusion: cannot load {tmp_path}"):
        make_negatives(pictures, "diffusion", Describes(), diffusion=str(tmp_path))
    with pytest.raises(DataError, match="makes one picture, and row .* has a clip"):
        make_negatives(samples, "diffusion", Describes(), diffusion=str(tmp_path))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"selection": True}, "selection: OViP has none"),
        ({"nce_weight": 0.1}, "nce_weight: OViP has none"),
        ({"caption_reward": "external"}, "caption_reward: OViP has none"),
        ({"data": "d"}, r"judge: --negatives diffusion \(default with --data\) needs one"),
        ({"data": "d", "negatives": "draw"}, "negatives: draw shows what a caption says"),
        ({"four_stage": False}, "negatives: draw shows what a caption says"),
        ({"method": "grpo", "top_p": 0.9}, "temperature, top_p: GRPO samples what it scores"),
        ({"pairs": 0}, "pairs: must be at least 1"),
        ({"iterations": 2}, "iterations: OViP takes each pair once"),
        ({"completions_per_pass": 2}, "completions_per_pass: give 0 with --method ovip"),
    ],
)
def test_options_that_cannot_work(options, says):
    with pytest.raises(run.ConfigError, match=says):
        config(**options)


@pytest.mark.parametrize("name", ["ovip-paper", "ovip-code"])
def test_the_presets_are_configurations(name):
    root = Path(__file__).parent.parent
    cfg = train.parse_config(
        ["--config", str(root / f"configs/{name}.yaml"), "--data", "d", "--judge", "j"]
    )
    paper = name == "ovip-paper"
    assert cfg.method == "ovip" and cfg.dpo_beta == 0.1 and cfg.group_size == 16
    assert (cfg.pair_rule, cfg.buffer) == (("paper", "random") if paper else ("code", "fifo"))
    assert (cfg.temperature, cfg.top_p) == ((1.0, 1.0) if paper else (1.2, 0.8))
    assert cfg.image_loss == ("printed" if paper else "two_sigmoids")
    assert (cfg.pairs, cfg.image_weight) == ((16, 1.0) if paper else (8, 0.5))
