"""What `--completions_per_pass` costs and saves in an update: CPU seconds of one thread, and memory
above the loaded model.

    python -m bench.passes    # 20 minutes of one core

The model is that of step.py. Each point has a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from bench import one_step, step
from engine import pretrained

# prompts, visual tokens of each, completions, their tokens, gradient checkpointing, and how many
# completions a pass takes (0: all)
POINTS = [(4, 144, n, 48, False, of) for n in (8, 16, 32, 64) for of in (0, 8, 4) if of < n]
POINTS += [(1, visual, 8, 48, False, of) for visual in (576, 1296, 4096) for of in (0, 4, 2)]
POINTS += [(1, 144, 8, 512, False, of) for of in (0, 2)]
POINTS += [(4, 144, 32, 48, True, of) for of in (0, 8, 4)]


def measure(
    folder: Path, prompts: int, visual: int, group: int, length: int, checkpointing: bool, of: int
) -> dict:
    torch.set_num_threads(1)
    policy = pretrained.load(
        str(folder), max_pixels=one_step.PIXELS, gradient_checkpointing=checkpointing
    )
    inputs = policy.encode(one_step.chats(one_step.prompts(visual, prompts)))
    torch.manual_seed(0)
    ids = torch.randint(100, 30_000, (prompts, group, length))
    weight = torch.randn(ids.shape)

    def update() -> None:
        prefix = None
        if of:
            hidden, prefix = policy.prefix(inputs)
            prefix.cut(hidden)
        for start in range(0, group, of or group):
            at = slice(start, start + (of or group))
            (policy(inputs, ids[:, at], None, prefix).logp * weight[:, at]).sum().backward()
        if prefix:
            prefix.backward()
        policy.zero_grad(set_to_none=False)

    Path("/proc/self/clear_refs").write_text("5")  # Linux's highest resident set begins anew
    loaded = highest()
    update()
    found, seconds = {"MB": highest() - loaded}, []
    for _ in range(2):
        begun = time.process_time()
        update()
        seconds.append(time.process_time() - begun)
    return found | {"seconds": min(seconds)}


def highest() -> float:
    """The highest resident set, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        print(json.dumps(measure(*json.loads(args.point))))
        return
    with tempfile.TemporaryDirectory() as folder:
        step.write_model(Path(folder))
        print(
            "| prompts | visual tokens | completions | tokens | checkpointing | a pass | s | MB |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for point in POINTS:
            command = [sys.executable, "-m", "bench.passes", "--point"]
            done = subprocess.run(
                [*command, json.dumps([folder, *point])], capture_output=True, text=True
            )
            if done.returncode:
                raise SystemExit(f"error: {point} failed\n{done.stderr[-2000:]}")
            found = json.loads(done.stdout.splitlines()[-1])
            shown = [
                *point[:-1],
                point[-1] or "all",
                f"{found['seconds']:.2f}",
                f"{found['MB']:.0f}",
            ]
            print(f"| {' | '.join(map(str, shown))} |", flush=True)


if __name__ == "__main__":
    main()
