"""What one process of test_processes.py runs: train.main with rewards that are known, and a record of what it did.

    torchrun --nproc_per_node P tests/worker.py OUT.json VARIANTS.json

VARIANTS: {name: options}. OUT: {name: {"processes", "collectives" of each process, "updates": [...]}}; the gradients of
every update and the weights after it go to OUT.NAME.safetensors.
"""

import json
import random
import sys
from pathlib import Path

import accelerate
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent))
import run as run_module
import train

torch.set_num_threads(1)


def known_reward(parts, judge, cfg):
    """Three rewards that follow from prompt and response number; some unknown, some groups tied."""
    found = []
    for part in parts:
        names, n = ("accuracy", "format", "caption"), len(part.text[0])
        tables = {name: torch.zeros(len(part.samples), n, dtype=torch.float64) for name in names}
        for i, sample in enumerate(part.samples):
            chance = random.Random(sample.id)
            for name in names:
                tables[name][i] = torch.tensor([chance.choice((0.0, 1.0, 1.0, float("nan"))) for _ in range(n)])
            if sample.id in TIED or TIED == ["all"]:
                tables = {name: table.index_fill(0, torch.tensor(i), 1.0) for name, table in tables.items()}
        found.append((tables, [[None] * n for _ in part.samples]))
    return found


def full(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def main(out: Path, variants: dict[str, list[str]]) -> None:
    global TIED
    results = {}
    accelerate.Accelerator.end_training = lambda self: None  # it would take the process group from the next variant
    for name, options in variants.items():
        TIED = [word.split("=")[1] for word in options if word.startswith("TIED=")]
        cfg = train.parse_config([word for word in options if not word.startswith("TIED=")])
        updates, tensors, before = [], {}, collectives()

        def update(learner, original=ORIGINAL):
            k = len(updates)
            for n, p in learner._weights().items():
                tensors[f"{k}/gradient/{n}"] = full(p.grad)
            loss = learner.run.gather([sum(loss.item() for loss in learner.losses)])
            original(learner)
            updates.append({"stage": learner.stage, "loss": sum(loss), "norm": learner.gradient_norm})
            for n, p in learner._weights().items():
                tensors[f"{k}/weight/{n}"] = full(p)

        train.Learner.update, train.reward = update, known_reward
        train.main(cfg)
        run = run_module.Run(cfg)
        counts = run.gather([collectives() - before])
        results[name] = {"processes": run.processes, "collectives": counts, "updates": updates, "sharded": run.sharded}
        if run.is_main:
            save_file(tensors, f"{out}.{name}.safetensors")
            out.write_text(json.dumps(results))


def collectives() -> int:
    """How many this process has taken part in, counted by the process group itself."""
    group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
    return group._get_sequence_number_for_group() if group else 0


TIED: list[str] = []
ORIGINAL = train.Learner.update

if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
