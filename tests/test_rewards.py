"""rewards.py: the caption rewards of other papers, and reward functions of one's own."""

import json
import math
from types import SimpleNamespace

import commands
import pytest
import torch

import data
import grpo
import rewards
import train
from caption_reward import CaptionReward, judge_prompt
from engine import ConfigError, DataError
from engine.judges import PolicyJudge

FORM = "<prethink>p</prethink><caption>{}</caption><think>t</think><answer>A</answer>"


@pytest.fixture(scope="module")
def samples(world):
    return data.load(world / "data")["train"]


def rolls(samples, captions):
    text = [[FORM.format(c) if c is not None else "no stages" for c in row] for row in captions]
    return SimpleNamespace(samples=samples, text=text)


class Judge:
    """Right (None: fails) by whether the caption holds a word; `blind`: the answer to an empty one.
    A question's answer is what stands behind its last blank."""

    def __init__(self, right=("good",), blind=False):
        self.right, self.blind, self.prompts = right, blind, []

    def __call__(self, prompts):
        self.prompts += prompts
        return [self.reply(p) for p in prompts]

    def reply(self, prompt):
        caption = prompt.split("\n")[1]
        question = prompt.split("Question:\n")[1].split("\n\nAnswer")[0]
        if "fails" in caption:
            return None
        knows = any(word in caption for word in self.right) if caption else self.blind
        return question.split()[-1] if knows or question.split()[-2] in caption.split() else "wrong"


def question(samples, i, words="what?", answer="yes", **more):
    from dataclasses import replace

    return replace(
        samples[i], problem=f"{words} {answer}", options=(), problem_type="free-form",
        answer=answer, **more,
    )  # fmt: skip


def table(kind, samples, captions, judge):
    cfg = train.Config(caption_reward=kind, sft_steps=0)
    [(found, replies)] = rewards.reward([rolls(samples, captions)], CaptionReward(judge), cfg)
    return found["caption"], replies


@pytest.mark.parametrize("blind", [False, True])
def test_gain_is_the_verdict_less_that_of_no_caption(samples, blind):
    """And GRPO's advantages are those of `external`, because within a prompt the second term is one
    constant (D-94)."""
    some = [question(samples, 0, "one"), question(samples, 1, "two")]
    captions = [["good", "bad", "", None], ["good", "good", "fails", "bad"]]
    external, _ = table("external", some, captions, Judge(blind=blind))
    gain, replies = table("gain", some, captions, Judge(blind=blind))
    torch.testing.assert_close(gain, external - float(blind), equal_nan=True)
    assert external[0].tolist() == [1, 0, 0, 0] and math.isnan(external[1, 2])
    torch.testing.assert_close(
        *(grpo.group_advantages(x) for x in (gain, external)), atol=1e-6, rtol=0
    )
    assert replies[0][:2] == ["yes", "wrong"]


def test_an_unknown_blind_verdict_leaves_the_gain_unknown(samples):
    judge = Judge()
    judge.reply = lambda prompt: None if not prompt.split("\n")[1] else "yes"
    gain, _ = table("gain", [question(samples, 0)], [["good", "bad"]], judge)
    assert gain.isnan().all()


def test_shared_is_the_mean_over_all_questions_about_a_picture(samples):
    some = [
        question(samples, i, f"{word}", answer)
        for i, word, answer in ((0, "colour", "red"), (0, "row", "top"), (1, "colour", "blue"))
    ]
    some = [s.__class__(**vars(s) | {"id": str(i)}) for i, s in enumerate(some)]
    linked = rewards.with_other_questions(some)
    assert [s.others for s in linked] == [
        (("row top", "top", "free-form"),), (("colour red", "red", "free-form"),), (),
    ]  # fmt: skip
    captions = [["colour and row", "colour", "nothing", "fails"]] * 3
    found, replies = table("shared", linked, captions, Judge())
    wanted = [[1, 0.5, 0, math.nan], [1, 0.5, 0, math.nan], [1, 1, 0, math.nan]]
    torch.testing.assert_close(found, torch.tensor(wanted), equal_nan=True)
    assert replies[1][1] == "wrong", "the reply to its own question"
    alone = [s for s in some if s.id != "1"]
    with pytest.raises(DataError, match="no two rows of train share theirs"):
        rewards.with_other_questions(alone)


def test_the_world_has_three_questions_a_picture(world):
    rows = data.load(world / "data")["train_shared"]
    linked = rewards.with_other_questions(rows)
    assert all(len(s.others) == 2 for s in linked) and len(rows) % 3 == 0
    for i in range(0, len(rows), 3):
        assert len({data.picture_of(s) for s in rows[i : i + 3]}) == 1
        assert [s.category for s in rows[i : i + 3]] == ["colour", "row", "count"]
        assert len({s.question for s in rows[i : i + 3]}) == 3
    assert len({data.picture_of(s) for s in rows}) == len(rows) // 3


def test_the_policy_judges_as_any_judge_is_asked(policy, samples):
    """It gets the judge's prompt without a picture, and its reply is read as any is. Cut off, it
    is wrong: the same weights would say the same again."""
    judge = PolicyJudge(policy, 6, batch=2)
    prompts = [judge_prompt(s.question, "a <|image_pad|> caption") for s in samples[:5]]
    replies = judge(prompts)
    content = [[{"type": "text", "text": p}] for p in prompts]
    for reply, text in zip(replies, content, strict=True):
        inputs = policy.encode([[{"role": "user", "content": text}]])
        assert policy.core.config.image_token_id not in inputs["input_ids"]
        said = policy.generate(inputs, 1, 6, sample=False)
        assert reply == (said.text[0][0].strip() if said.ended[0, 0] else "")
    assert "" in replies


def test_a_run_that_judges_itself_needs_no_judge(world, tmp_path):
    """On own data and an own model, through RL and both evaluations."""
    options = {
        "model": world / "policy", "data": world / "data", "caption_reward": "self",
        "sft_steps": 40, "sft_batch": 8, "sft_lr": 3e-3, "selection": False, "rl_steps": 2,
        "prompts_per_step": 3, "group_size": 2, "max_new_tokens": 40, "held_out_rows": 2,
    }  # fmt: skip
    folder = tmp_path / "run"
    commands.launch(*(f"--{k}={v}" for k, v in options.items()), "--output_dir", folder)
    for side in ("before", "after"):
        result = json.loads((folder / f"eval/{side}.json").read_text())
        rows = [row for split in result.values() for row in split["rows"]]
        assert all("answerable to itself" in row and "answerable" not in row for row in rows)
        known = [row["answerable to itself"] is not None for row in rows]
        assert any(known) and "answerable to itself" in result["test"]["metrics"]
    lines = (folder / "rl/metrics.jsonl").read_text().splitlines()
    assert all("reward/caption" in json.loads(line) for line in lines) and len(lines) == 2


def write(folder, text):
    (folder / "mine.py").write_text(text)
    return f"{folder / 'mine.py'}:score"


def test_a_reward_of_ones_own(samples, tmp_path):
    """It sees rows, responses and pictures, counts with weight 1, and may not know."""
    spec = write(
        tmp_path,
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "import torch\n"
        "@dataclass\n"
        "class Weights:\n"
        "    width: float = 1.0\n"
        "def score(samples, responses, media):\n"
        "    width = [[float(m[0][0].size[0] if isinstance(m[0], list) else m[0].size[0])] * len(r)\n"
        "             for m, r in zip(media, responses)]\n"
        "    length = torch.tensor([[float(len(t)) for t in row] for row in responses])\n"
        "    length[0, 0] = float('nan')\n"
        "    return {'width': width, 'length': length}\n",
    )
    cfg = train.Config(method="grpo", reward=spec)
    clip = next(s for s in samples if s.data_type == "video")
    m = rolls([samples[0], clip], [["a", "bb"], ["ccc", None]])
    [(found, _)] = rewards.reward([m], None, cfg)
    assert set(found) == {"accuracy", "format", "width", "length"}
    assert found["width"].tolist() == [[56, 56], [56, 56]]
    assert math.isnan(found["length"][0, 0]) and found["length"][0, 1] == len(m.text[0][1])
    total = rewards.total(found, cfg)
    by_hand = found["accuracy"] + 0.1 * found["format"] + 56 + found["length"]
    by_hand[0, 0] = by_hand[0, 1]  # the mean of what is known in the group
    torch.testing.assert_close(total, by_hand)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("def other(): pass", "mine.py has no function score"),
        ("score = 3", "mine.py has no function score"),
        ("1 +", "cannot load .*mine.py: .*invalid syntax"),
        ("raise OSError('no disk')", "cannot load .*mine.py: .*no disk"),
        ("def score(s, r, m): return {'x': [[1.0]]}", r"must return \[B, G\] = \[1, 2\]"),
        ("def score(s, r, m): return {'x': [[1.0, float('inf')]]}", "finite numbers or NaN as x"),
        ("def score(s, r, m): return {'format': [[1.0, 2.0]]}", "must not name a reward format"),
        (
            "def score(s, r, m): return {str(len(A.append(1) or A)): [[1.0, 2.0]]}\nA = []",
            "same names",
        ),
        ("def score(s, r, m): return None", "must return a dict of names"),
        ("def score(s, r, m): return [[1.0, 2.0]]", "must return a dict of names"),
        ("def score(s, r, m): return {'x': 'good'}", "must return a dict of names"),
        ("def score(s, r, m):\n    return 1 / 0", r"ZeroDivisionError: .* \(mine.py, line 2\)"),
    ],
)
def test_a_bad_reward_function_is_said(samples, tmp_path, text, says):
    cfg = train.Config(method="grpo", reward=write(tmp_path, text))
    with pytest.raises(ConfigError, match=f"reward: .*{says}"):
        rewards.reward([rolls(samples[:1], [["a", "b"]])] * 2, None, cfg)


def test_a_missing_reward_file_stops_a_run_at_once(world, tmp_path):
    for spec in ("nowhere.py:score", "score", "nowhere.txt:score"):
        options = ["--reward", spec, "--world", world, "--output_dir", tmp_path / "run"]
        done = commands.launch(*options, check=False)
        assert "error: reward: " in done.stderr and done.returncode == 1
        assert not (tmp_path / "run/sft").exists()


def test_a_reward_is_tried_before_anything_is_loaded_and_kept(world, tmp_path):
    """A mistake is found at once, and a run is not resumed with another file."""
    spec = write(tmp_path, "def score(s, r, m): return {'short': [1.0]}")
    options = ["--method", "grpo", "--reward", spec, "--world", world, "--sft_steps", "0"]
    options += ["--rl_steps", "0", "--output_dir", tmp_path / "run", "--max_new_tokens", "4"]
    done = commands.launch(*options, check=False)
    assert "must return [B, G] = [2, 2]" in done.stderr and not (tmp_path / "run/eval").exists()
    spec = write(tmp_path, "def score(s, r, m): return {'short': [[1.0] * len(t) for t in r]}")
    done = commands.launch(*options)
    write(tmp_path, "def score(s, r, m): return {'short': [[2.0] * len(t) for t in r]}")
    done = commands.launch(*options, check=False)
    assert "the file of --reward have changed" in done.stderr and done.returncode == 1


def test_the_words_for_on_and_off():
    for word, kind in (("true", "external"), ("True", "external"), ("false", ""), ("gain", "gain")):
        assert train.parse_config([f"--caption_reward={word}"]).caption_reward == kind
    assert train.Config(caption_reward=True).caption_reward == "external"
    assert train.Config(caption_reward=False).caption_reward == ""
    with pytest.raises(
        ConfigError, match="'other' is not one of external, self, gain, shared, false"
    ):
        train.Config(caption_reward="other")
    with pytest.raises(ConfigError, match="select_class: with --reward"):
        train.Config(reward="a.py:b", select_class="easy")
