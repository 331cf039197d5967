"""What a response earns: the answer, the form, the caption, and rewards of one's own.

    Rollouts -> rewards by name [B, G] -> their weighted sum [B, G] (`total`)

Shapes: B prompts of a micro-batch, G responses each. NaN rewards are unknown.
"""

import hashlib
import importlib.util
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import answers
import data
import grpo
import reasoning
from caption_reward import CaptionReward, only_states_the_answer
from engine import ConfigError, DataError, reason, vlm
from engine.judges import PolicyJudge

BUILT_IN = ("accuracy", "format", "caption", "leak")
NAMES: dict[str, Iterable[str]] = {}  # of the rewards of --reward, after its first call


def reward(
    micro_batches: list, judge: CaptionReward | None, cfg
) -> list[tuple[dict[str, Tensor], list]]:
    """For each micro-batch (its samples and text) the rewards of every response, by name [B, G],
    and the judge's replies.

    accuracy, format and, with the Caption Reward, caption and leak (D-14), and those of --reward.
    The judge is asked once for all.
    """
    stages = [[[reasoning.parse(text) for text in row] for row in m.text] for m in micro_batches]
    verdicts: list[list] = [[] for _ in micro_batches]
    if cfg.caption_reward:
        verdicts = _caption_verdicts(micro_batches, stages, judge, cfg)
    return [_rewards(*three, cfg) for three in zip(micro_batches, stages, verdicts)]


def reward_judge(judge: CaptionReward | None, policy: vlm.VLM, cfg) -> CaptionReward | None:
    """The judge that rewards captions now: with `self` the policy, with its weights of now."""
    if cfg.caption_reward == "self":
        return CaptionReward(PolicyJudge(policy, cfg.max_new_tokens))
    return judge


def _caption_verdicts(
    micro_batches: list, stages: list, judge: CaptionReward, cfg
) -> list[list[tuple[float, str | None]]]:
    """(verdict, reply) of each response of each micro-batch. Where a row knows other questions
    about its picture (`shared`), the mean of the known verdicts on all of them."""
    asked = [
        [(q, p.caption, *rest) for q, *rest in ((s.question, s.answer, s.problem_type), *s.others)]
        for m, rows in zip(micro_batches, stages)
        for s, row in zip(m.samples, rows)
        for p in row
    ]
    ask = judge.gain if cfg.caption_reward == "gain" else judge
    flat = iter(ask([item for some in asked for item in some]))
    means = []
    for some in asked:
        found = [next(flat) for _ in some]
        known = [v for v, _ in found if v == v]
        means.append((sum(known) / len(known) if known else float("nan"), found[0][1]))
    each = iter(means)
    return [[next(each) for row in rows for _ in row] for rows in stages]


def weights_of(rewards: dict[str, Tensor], cfg) -> dict[str, float]:
    """The weight of each reward by name: 1 for those of --reward."""
    return dict.fromkeys(rewards, 1.0) | cfg.reward_weights


def total(rewards: dict[str, Tensor], cfg) -> Tensor:
    """grpo.total_reward with the weights of the options.   dict of [B, G] -> [B, G]"""
    return grpo.total_reward(rewards, weights_of(rewards, cfg))


@cache
def custom_reward(spec: str) -> Callable:
    """The function of --reward FILE.py:NAME, called as NAME(samples, responses, media).

    samples: B `data.Sample`; responses[b][g]: text; media[b]: the pictures (PIL), or one list of
    frames. It returns a dict of names to [B, G], the same names in every call: numbers, NaN for
    unknown. An unknown one takes its group's mean, and adds nothing where all of the group are
    unknown. Raises ConfigError where there is none.
    """
    file, _, name = spec.rpartition(":")
    module_spec = importlib.util.spec_from_file_location("custom_reward", file)
    if module_spec is None or not name:
        raise ConfigError(f"reward: give FILE.py:NAME, not {spec!r}")
    module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # it is the user's code
        raise ConfigError(f"reward: cannot load {file}: {reason(error)}") from error
    if not callable(found := getattr(module, name, None)):
        raise ConfigError(f"reward: {file} has no function {name}")
    return found


def reward_file(spec: str) -> str:
    """The file of --reward and its fingerprint, so that a run is not resumed with another one."""
    file = Path(spec.rpartition(":")[0])
    return f"reward {file.name} {hashlib.sha256(file.read_bytes()).hexdigest()[:12]}"


def try_custom(samples: list[data.Sample], cfg) -> None:
    """Call --reward once, on rows with made-up responses, before anything is loaded."""
    text = [[s.process or f"<answer>{s.answer}</answer>", "no answer"] for s in samples]
    _custom_rewards(SimpleNamespace(samples=samples, text=text), cfg)


def _custom_rewards(m, cfg) -> dict[str, Tensor]:
    turns = [data.messages(s, "", cfg.fps, cfg.max_frames)[0]["content"] for s in m.samples]
    media = [[part[part["type"]] for part in turn if part["type"] != "text"] for turn in turns]
    shape = (len(m.text), len(m.text[0]))
    try:
        found = custom_reward(cfg.reward)(m.samples, m.text, media)
    except Exception as error:  # it is the user's code
        line = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"reward: {cfg.reward} failed on {m.samples[0].id}: {type(error).__name__}: {error} "
            f"({Path(line.filename).name}, line {line.lineno})"
        ) from error
    try:
        tables = {name: torch.as_tensor(table).float().cpu() for name, table in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"reward: {cfg.reward} must return a dict of names to [B, G] numbers ({error})"
        ) from error
    if tables.keys() != NAMES.setdefault(cfg.reward, tables.keys()):
        raise ConfigError(f"reward: {cfg.reward} must return the same names for all rows")
    for name, table in tables.items():
        if name in BUILT_IN:
            raise ConfigError(f"reward: {cfg.reward} must not name a reward {name}, which is ours")
        if table.shape != shape or table.isinf().any():
            raise ConfigError(
                f"reward: {cfg.reward} must return [B, G] = {list(shape)} finite numbers or NaN as "
                f"{name}, got shape {list(table.shape)}"
            )
    return tables


def _rewards(m, stages: list, verdicts: list, cfg) -> tuple[dict[str, Tensor], list]:
    rows = zip(m.samples, m.text, stages, strict=True)
    flat = [(s, text, parsed) for s, texts, some in rows for text, parsed in zip(texts, some)]
    shape, n = (len(m.text), -1), len(m.text[0])
    correct = [
        answers.is_correct(answers.extract(p.answer, t), s.answer, s.problem_type, cfg.lenient)
        for s, t, p in flat
    ]
    formed = [reasoning.format_reward(t, cfg.four_stage) for _, t, _ in flat]
    rewards = {
        "accuracy": torch.tensor(correct).float().view(shape),
        "format": torch.tensor(formed).view(shape),
    }
    replies = [reply for _, reply in verdicts] or [None] * len(flat)
    if verdicts:
        rewards["caption"] = torch.tensor([verdict for verdict, _ in verdicts]).view(shape)
        leaks = [only_states_the_answer(p.caption, s.answer, s.problem_type) for s, _, p in flat]
        rewards["leak"] = 0.0 - torch.tensor(leaks).float().view(shape)
    if cfg.reward:
        rewards |= _custom_rewards(m, cfg)
    return rewards, [replies[i : i + n] for i in range(0, len(replies), n)]


def rewards_as_json(rewards: dict[str, Tensor], i: int) -> dict[str, list[float | None]]:
    """Every reward of prompt i by name. An unknown one is null, because JSON has no NaN."""
    return {
        name: [None if r != r else r for r in table[i].tolist()] for name, table in rewards.items()
    }


def with_other_questions(samples: list[data.Sample]) -> list[data.Sample]:
    """Each sample with the questions of all others about its picture or clip, in `others`.

    Raises DataError where no two share one.
    """
    pictures, alike = [data.picture_of(s) for s in samples], defaultdict(list)
    for picture, s in zip(pictures, samples):
        alike[picture].append(s)
    if len(alike) == len(samples):
        raise DataError(
            "caption_reward: shared needs several questions about a picture, and no two rows of "
            "train share theirs. Give such rows (in the embedded world, --train_set "
            "train_shared), or --caption_reward external"
        )

    def others(s: data.Sample, picture: tuple) -> tuple:
        some = [o for o in alike[picture] if o is not s]
        return tuple((o.question, o.answer, o.problem_type) for o in some)

    return [replace(s, others=others(s, picture)) for s, picture in zip(samples, pictures)]
