"""OViP's training, Algorithm 1: pairs of own responses, and images that show the bad one.

    round:   prompts -> k responses each (`roll_out`) -> scores 0 to 10 -> pairs -> buffer
    update:  N pairs of the buffer -> a negative image each -> L_OViP -> one step

`ovip` has the mathematics. A round is a step of train.py: as many completions as one of GRPO. While
the buffer holds N pairs, they are taken out for an update, so a round has any number of updates,
all at one learning rate (D-85). All ranks hold one buffer and train on their shares of its pairs.
The buffer is a part of every checkpoint.

What a pair costs: the policy and its reference each score four texts, (A+, I+) and (A-, I+) behind
one prompt, A+ without an image, and A+ with I-. In the row without an image its tokens are cut out.
Without a valid pair, a negative image, or a known score, nothing is made up: it is counted.
"""

import math
import random
import warnings
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import data
import ovip
from caption_reward import Judge, as_one_line
from engine import ConfigError, counted
from engine.files import read_jsonl
from engine.learner import Learner, Reference, updates
from engine.run import Run
from engine.vlm import VLM
from negatives import Negatives, media_of, with_media, without_media
from rewards import reward, rewards_as_json
from rollouts import Rollouts, reference_response, roll_out, show


def prefer(
    start: str,
    prompts: list[data.Sample],
    judge: Judge | None,
    cfg,
    run: Run,
    held_out=None,
) -> str:
    """Train on preferences. Returns the policy's folder.

    judge: scores responses; None: a rule does, 9 for the right answer and 1 for the form (D-88).
    """
    steps = updates(cfg.rl_steps, cfg.rl_epochs, len(prompts), cfg.prompts_per_step, run.processes)
    learner = Learner("rl", start, steps, cfg.rl_lr, cfg, run, held_out)
    if learner.finished:
        return learner.finish()
    reference = Reference(start, learner, cfg, always=True)
    by_id = {s.id: s for s in prompts}
    images = Negatives(prompts, judge, cfg, run) if cfg.negatives else None
    by = judge or "the rule: 9 for the right answer, 1 for the form"
    run.say(f"OViP: responses are scored by {by}; negative images: {cfg.negatives or 'none'}")
    buffer = [Pair(**entry) for entry in learner.extra.get("buffer", [])]
    for step, batch in learner.batches(prompts, cfg.prompts_per_step):
        with run.unsharded(learner.policy):
            micro_batches = run.micro_batches(batch, 0, roll_out, learner.policy, cfg, step)
        lines, numbers = score_and_pair(micro_batches, judge, cfg)
        place = {name: i for i, name in enumerate(learner.ids)}
        lines = sorted(run.gather_object(lines), key=lambda line: place[line["id"]])
        buffer += [Pair(line["id"], step, *ids) for line in lines for ids in line.pop("ids")]
        made = gone = 0
        while len(buffer) >= cfg.pairs:
            gone += cfg.pairs
            some, buffer = taken(buffer, cfg.pairs, cfg.buffer, f"{cfg.seed}/{step}/{gone}")
            learner.ids = [p.id for p in some]
            made += learn(learner, reference, run.shard(some), by_id, images, cfg, numbers)
        with warnings.catch_warnings():  # of a round without an update
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            learner.schedule.step()  # one rate a round
        learner.extra = {"buffer": [vars(pair) for pair in buffer]}
        run.append(learner.folder / "rollouts.jsonl", [{"step": step, **line} for line in lines])
        numbers |= {"updates": (made, 1), "taken": (gone, 1), "buffer": (len(buffer), 1)}
        loss, _ = numbers.pop("loss")
        numbers |= {"loss": (loss / made, 0)} if made else {}
        metrics = learner.log(numbers)
        now = cfg.show_every and step % cfg.show_every == 0
        if metrics.get("lost") and (now or images.last_error):
            run.say(
                f"  {metrics['lost']:.0%} of the pairs had no negative image, and are not trained "
                f"on ({images.last_error or images.why})"
            )
        if not any(line["pairs"] for line in lines):
            run.say("  warning: no prompt of this round gave a pair of responses")
        if metrics.get("scored") == 0:
            why = getattr(judge, "last_error", "")
            run.say(f"  warning: no response of this round was scored. {why}".rstrip())
        first = micro_batches[0]
        show(run, cfg, step, metrics["truncated"], first.samples[0], first.text[0][0])
    if buffer:
        run.say(
            f"{counted(len(buffer), 'pair')} left in the buffer, not trained on: fewer than "
            f"--pairs {cfg.pairs}"
        )
    lines = run.from_main(lambda: read_jsonl(learner.folder / "metrics.jsonl", repair=False))
    if not any(line.get("updates") for line in lines):
        run.say(
            "warning: no update was made, so the policy is as it was: no pairs (no_pair, "
            "no_reference) or no negative images (lost), see rl/metrics.jsonl"
        )
    del reference
    return learner.finish()


# --- pairs ----------------------------------------------------------------------------------------


@dataclass
class Pair:
    """A+ and A- to the prompt `id`, as token ids. positive: empty, the reference answer. negative
    text is what an image is made of."""

    id: str
    step: int
    positive: list[int]
    negative: list[int]
    positive_text: str
    negative_text: str


def score_and_pair(
    micro_batches: list[Rollouts], judge: Judge | None, cfg
) -> tuple[list[dict], dict[str, tuple[float, float]]]:
    """A line for each prompt, with its scores, pairs and their ids, and (sum, count) by name."""
    rewards = [tables for tables, _ in reward(micro_batches, None, cfg)]
    lines, numbers = [], defaultdict(lambda: [0.0, 0.0])
    for m, tables in zip(micro_batches, rewards):
        scores = scores_of(m, tables, judge, cfg)
        ids, mask = m.branches[:, : cfg.group_size], m.mask.unflatten(0, (len(m.samples), -1))
        for i, sample in enumerate(m.samples):
            pairs, alone = choose_pairs(m.text[i], scores[i], sample, cfg)
            said = [ids[i, j][mask[i, j].bool()].tolist() for j in range(len(m.text[i]))]
            full = []
            for p, n in pairs:
                good = reference_text(sample, cfg) if p is None else m.text[i][p]
                full.append(([] if p is None else said[p], said[n], good, m.text[i][n]))
            known = scores[i][~scores[i].isnan()].tolist()
            lines.append(
                {
                    "id": sample.id,
                    "text": m.text[i],
                    **rewards_as_json(tables | {"score": scores}, i),
                    "pairs": pairs,
                    "ids": full,
                }
            )
            for name, value, count in (
                ("reward/accuracy", tables["accuracy"][i].sum().item(), len(said)),
                ("reward/format", tables["format"][i].sum().item(), len(said)),
                ("score", sum(known), len(known)),
                ("scored", len(known), len(said)),
                ("length", mask[i].sum().item(), len(said)),
                ("truncated", (~m.ended[i]).sum().item(), len(said)),
                ("pairs", len(pairs), 1),
                ("no_pair", not pairs, 1),
                ("no_reference", alone, 1),
                ("of_reference", any(p is None for p, _ in pairs), 1),
            ):
                numbers[name][0] += value
                numbers[name][1] += count
    # the same names on every rank
    names = ("loss", "text_margin", "image_margin", "text_right", "image_right", "lost")
    return lines, dict.fromkeys(names, (0.0, 0)) | {k: tuple(v) for k, v in numbers.items()}


def scores_of(m: Rollouts, rewards: dict[str, Tensor], judge: Judge | None, cfg) -> Tensor:
    """The score of each response, 0 to 10, NaN for unknown.   -> [B, k]"""
    if judge is None:
        return 9 * rewards["accuracy"] + rewards["format"]
    asked = [
        ovip.score_prompt(s.question, as_one_line(text), reference_text(s, cfg))
        for s, texts in zip(m.samples, m.text)
        for text in texts
    ]
    new = sorted(set(asked))  # equal responses get one score
    replies = dict(zip(new, judge(new), strict=True))
    scores = torch.tensor([ovip.read_score(replies[prompt]) for prompt in asked])
    return scores.view(len(m.text), -1)


def choose_pairs(
    texts: list[str], scores: Tensor, sample: data.Sample, cfg
) -> tuple[list[tuple[int | None, int]], bool]:
    """The pairs of one prompt by --pair_rule, and whether one is missing because the row has no
    reference response (`process`, D-86)."""
    if cfg.pair_rule == "code":
        first = [i for i, text in enumerate(texts) if text not in texts[:i]]
        found = ovip.released_pairs(scores[first])
        pairs = [(None if p is None else first[p], first[n]) for p, n in found][:3]
    else:
        pairs = ovip.select_pairs(scores)
    if pairs and pairs[0][0] is None and not has_reference(sample):
        return [], True
    return pairs, False


def has_reference(sample: data.Sample) -> bool:
    return bool(sample.process)


def reference_text(sample: data.Sample, cfg) -> str:
    """A*: the row's reference response, in the stages of this run; its answer, if it has none."""
    return reference_response(sample, cfg.four_stage) if has_reference(sample) else sample.answer


def try_scores(judge: Judge, samples: list[data.Sample]) -> None:
    """Raises ConfigError where the judge scores none of these right answers."""
    replies = judge([ovip.score_prompt(s.question, s.answer, s.answer) for s in samples])
    if all(math.isnan(ovip.read_score(reply)) for reply in replies):
        said = next(filter(None, replies), None) or getattr(judge, "last_error", "")
        raise ConfigError(
            f"judge: {judge} gave none of {len(samples)} right answers a score from 0 to 10. It "
            f"said: {said[:200]}"
        )


def taken(buffer: list[Pair], n: int, how: str, seed: str) -> tuple[list[Pair], list[Pair]]:
    """N pairs out of the buffer, and what is left: the oldest (fifo), or drawn ones (random)."""
    chosen = set(range(n))
    if how == "random":
        chosen = set(random.Random(seed).sample(range(len(buffer)), n))
    return [p for i, p in enumerate(buffer) if i in chosen], [
        p for i, p in enumerate(buffer) if i not in chosen
    ]


# --- the update -----------------------------------------------------------------------------------


def learn(
    learner: Learner,
    reference: Reference,
    pairs: list[Pair],
    by_id: dict[str, data.Sample],
    images: Negatives | None,
    cfg,
    numbers: dict,
) -> bool:
    """One step on L_OViP of this rank's pairs, a mean over the pairs of all ranks that have a
    negative image (D-87). Returns whether there was one. Adds to `numbers`."""
    run, policy = learner.run, learner.policy
    samples = [by_id[p.id] for p in pairs]
    chats = data.prompts(samples, cfg.four_stage, cfg.fps, cfg.max_frames)
    shown: list = images(pairs, samples, chats) if images else [media_of(chat) for chat in chats]
    live = [m is not None for m in shown]
    total = run.all_reduce(torch.tensor(float(sum(live)), device=run.device)).item()
    add(numbers, "lost", len(live) - sum(live), len(live))
    if not total:
        return False
    before = dict(numbers)

    def gradient(parts: list[list[tuple]]) -> None:
        numbers.update(before)  # an earlier attempt has added to them
        for part in parts:
            some, turns, others = map(list, zip(*part))
            weight = torch.tensor([m is not None for m in others], device=run.device).float()
            ids, mask = encode_pairs(policy, some)
            inputs = policy.encode(turns)
            h, ref = log_ratios(learner, reference, inputs, ids, mask)
            loss = ovip.text_loss(h[:, 0], ref[:, 0], h[:, 1], ref[:, 1], cfg.dpo_beta)
            if images:
                bare = policy.encode([without_media(turn) for turn in turns])
                other = policy.encode([with_media(turn, m) for turn, m in zip(turns, others)])
                first = ids[:, :1], mask[:, :1]  # apart: one prompt is long and one is short
                none, ref_none = (x[:, 0] for x in log_ratios(learner, reference, bare, *first))
                negative, ref_negative = (
                    x[:, 0] for x in log_ratios(learner, reference, other, *first)
                )
                image = ovip.image_loss(
                    h[:, 0], ref[:, 0], none, ref_none, negative, ref_negative,
                    cfg.dpo_beta, cfg.dpo_beta, cfg.image_loss,
                )  # fmt: skip
                loss = loss + cfg.image_weight * image
                record(numbers, "image", (h[:, 0] - ref[:, 0]) - (negative - ref_negative), weight)
            record(numbers, "text", (h[:, 0] - ref[:, 0]) - (h[:, 1] - ref[:, 1]), weight)
            loss = torch.where(weight > 0, loss, 0.0).sum() / total
            add(numbers, "loss", loss.item(), 0)
            learner.backward(loss)

    n, rows = learner.rows_at_once(len(pairs)), list(zip(pairs, chats, shown, strict=True))
    learner.accumulate([rows[i : i + n] for i in range(0, len(rows), n)], gradient)
    learner.update(scheduled=False)
    return True


@torch.no_grad()
def record(numbers: dict, name: str, gap: Tensor, weight: Tensor) -> None:
    """The sum of the differences of the pairs that count, and how many are above 0. One of 0 is
    half: at the start the policy is the reference."""
    above = torch.heaviside(gap, gap.new_tensor(0.5))
    add(numbers, f"{name}_margin", (gap * weight).sum().item(), weight.sum().item())
    add(numbers, f"{name}_right", (above * weight).sum().item(), weight.sum().item())


def add(numbers: dict, name: str, value: float, count: float) -> None:
    before = numbers[name]
    numbers[name] = (before[0] + value, before[1] + count)


def encode_pairs(policy: VLM, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
    """ids and mask [n, 2, T] of A+ and A-."""
    rows = []
    for p in pairs:
        first = p.positive or policy.encode_responses([p.positive_text])[0][0, 0].tolist()
        rows += [torch.tensor(first), torch.tensor(p.negative)]
    end = policy.end_ids[0]
    ids = pad_sequence(rows, batch_first=True, padding_value=end)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return tuple(x.to(policy.device).unflatten(0, (-1, 2)) for x in (ids, mask.bool()))


def log_ratios(
    learner: Learner, reference: Reference, inputs, ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """log pi and log pi_ref of whole responses.   [B, P], [B, K, T], [B, K, T] -> [B, K] twice"""
    ref = reference.logp(inputs, ids, mask).view(ids.shape)
    logp = learner.model(inputs, ids, mask).logp
    return (logp * mask).sum(-1), (ref * mask).sum(-1)
