"""What one process of test_processes.py runs: train.main with rewards that are known, and a record
of what it did.

    accelerate launch --config_file FILE tests/worker.py OUT.json VARIANTS.json

VARIANTS: {name: [options of train.py..., FAULT=...]}. OUT: {name: what was seen}; gradients and
weights of every update go to OUT.json.NAME.safetensors.
"""

import json
import random
import sys
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import negatives
import preference
import rollouts
import train
from engine import judges, media_check
from engine.vlm import VLM

torch.set_num_threads(1)
REWARDS = ("accuracy", "format", "caption")
ORIGINAL = {
    "update": train.Learner.update,
    "forward": VLM.forward,
    "backward": train.Learner.backward,
    "roll_out": rollouts.roll_out,
    "reward": train.reward,
    "order": train.Run.permutation,
    "negatives": negatives.Negatives.__call__,
    "check_media": media_check.check_media,
}


class Variant:
    """One run of train.main, with what `faults` ask for."""

    def __init__(self, options: list[str]):
        self.faults = dict(word.split("=") for word in options if word[0].isupper())
        self.cfg = train.parse_config([word for word in options if not word[0].isupper()])
        self.updates, self.tensors, self.run, self.opened = [], {}, None, 0
        self.start, self.calls = collectives(), Counter()

    def play(self) -> dict:
        train.Learner.update = lambda learner, **how: self.update(learner, **how)
        train.Learner.backward = lambda learner, loss: self.backward(learner, loss)
        VLM.forward = lambda policy, *args: self.forward(policy, *args)
        train.reward = rollouts.reward = (
            self.reward if self.faults.get("REWARD") != "real" else ORIGINAL["reward"]
        )
        rollouts.roll_out = preference.roll_out = self.roll_out
        train.Run.permutation = lambda run, *where: self.order(run, *where)
        media_check.check_media = self.check_media
        if "SCORES" in self.faults:
            preference.scores_of = self.scores
            negatives.Negatives.__call__ = lambda maker, *args: self.negatives(maker, *args)
        train.main(self.cfg)
        counts, opened = (
            self.run.gather_object([count]) for count in (collectives() - self.start, self.opened)
        )
        seen = {
            "processes": len(counts),
            "collectives": counts,
            "opened": opened,
            "updates": self.updates,
        }
        return seen | {"sharded": self.run.sharded}

    def check_media(self, *args):
        self.opened += 1
        return ORIGINAL["check_media"](*args)

    def update(self, learner, **how) -> None:
        """Keep what the optimiser is given and what it makes of it."""
        self.run, k, passes = learner.run, len(self.updates), len(learner.losses)
        tensors = [*learner.policy.parameters(), *learner._slots()]
        tensors += [p.grad for p in tensors if p.grad is not None] + [
            x for pair in optimizer_of(learner).pairs for x in pair
        ]
        share = max(
            x.to_local().numel() / x.numel() if hasattr(x, "to_local") else 1.0
            for x in tensors
            if x.numel() > 99
        )
        for name, slot in zip(learner.names, learner._slots(), strict=True):
            self.tensors[f"gradient/{k}/{name}"] = full(slot.grad)
        ORIGINAL["update"](learner, **how)
        norm = learner.gradient_norm
        self.updates.append(
            {"stage": learner.stage, "norm": norm, "share": share, "passes": passes}
        )
        for name, p in learner._weights().items():
            self.tensors[f"weight/{k}/{name}"] = full(p)

    def forward(self, policy, *args):
        self.short("FORWARD", torch.is_grad_enabled())
        return ORIGINAL["forward"](policy, *args)

    def backward(self, learner, loss) -> None:
        self.short("BACKWARD")
        ORIGINAL["backward"](learner, loss)

    def short(self, fault: str, here: bool = True) -> None:
        """In one process, memory runs out in these calls."""
        self.calls[fault] += here
        if here and rank() == 1 and str(self.calls[fault]) in self.faults.get(fault, "").split(","):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    def reward(self, parts, judge, cfg):
        """Three rewards that follow from prompt and response number; some are unknown, some groups
        tied."""
        found = []
        for part in parts:
            n = len(part.text[0])
            tables = {
                name: torch.zeros(len(part.samples), n, dtype=torch.float64) for name in REWARDS
            }
            for i, sample in enumerate(part.samples):
                chance = random.Random(sample.id)
                for table in tables.values():
                    table[i] = torch.tensor(
                        [chance.choice((0.0, 1.0, 1.0, float("nan"))) for _ in range(n)]
                    )
                    if sample.data_type == self.faults.get("TIED"):
                        table[i] = 1.0
            tables["leak"] = torch.zeros(len(part.samples), n, dtype=torch.float64)
            found.append((tables, [[None] * n for _ in part.samples]))
        return found

    def scores(self, part, *of):
        """One good response in each group, and one bad one."""
        found = torch.full((len(part.samples), len(part.text[0])), 5.0)
        for row, sample in zip(found, part.samples, strict=True):
            good, bad = random.Random(sample.id).sample(range(len(row)), 2)
            row[good], row[bad] = 10.0, 0.0
        return found

    def negatives(self, maker, pairs, *args):
        """None for every third row: one rank may lack all."""
        found = ORIGINAL["negatives"](maker, pairs, *args)
        return [None if int(p.id[-2:]) % 3 == 0 else m for p, m in zip(pairs, found, strict=True)]

    def roll_out(self, batch, *args, **named):
        if rank() == 1 and len(batch) > int(self.faults.get("MEMORY", 10**9)):
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                "9 bytes"
            )
        part = ORIGINAL["roll_out"](batch, *args, **named)
        if "JUDGE" in self.faults:  # an untrained policy writes no captions
            form = (
                "<prethink>x</prethink><caption>{} {}</caption><think>y</think><answer>A</answer>"
            )
            part.text = [
                [form.format(s.id, k) for k in range(len(row))]
                for s, row in zip(part.samples, part.text)
            ]
        return part

    def order(self, run, stage, epoch, n):
        return (
            list(range(n))
            if "UNSHUFFLED" in self.faults
            else ORIGINAL["order"](run, stage, epoch, n)
        )


def optimizer_of(learner):
    return learner.optimizer.optimizer  # inside accelerate's


def full(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def collectives() -> int:
    """How many this process has taken part in, counted by the process group itself."""
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    return group._get_sequence_number_for_group() if group else 0


def dying(
    judge: judges.LocalJudge, prompts: list[str], original=judges.LocalJudge.__call__
) -> list[str | None]:
    """A judge that is reached when it is tried, and afterwards in one process no more."""
    judge.asked = getattr(judge, "asked", 0) + 1
    return [None] * len(prompts) if judge.asked > 2 and rank() == 1 else original(judge, prompts)


def main(out: Path, variants: dict[str, list[str]]) -> None:
    results = {}
    # draws the report, and takes the process group from the next variant
    train.finish = lambda run: None
    for name, options in variants.items():
        variant = Variant(options)
        if name != "plain":  # once in each launch is enough, and half of a variant's time
            train.evaluate = lambda *of: None
        if variant.faults.get("JUDGE") == "dies":
            judges.LocalJudge.__call__ = dying
        results[name] = variant.play()
        if rank() == 0:
            save_file(variant.tensors, f"{out}.{name}.safetensors")
            out.write_text(json.dumps(results))
    # threads of it that outlive the interpreter abort the process
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
