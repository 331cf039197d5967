"""Selection's 64 responses per prompt: ours against plain `generate` with num_return_sequences=64.

    python -m bench.selection --run runs/ours-seed0 --out bench-select

Same policy (a run's cold start), same prompts, T = 1 from the whole distribution, same limit; in
turn, in one process for time and in processes of their own for the highest resident set. Writes
JSON and a plot to --out.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

RESPONSES = 64


def open_policy(args):
    import torch
    import yaml
    from transformers.utils import logging as transformers_logging

    import data
    from engine import pretrained

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    settings = yaml.safe_load((args.run / "config.yaml").read_text())
    policy = pretrained.load(str(args.run / "sft" / "policy"), trainable=False)
    samples = data.load(settings["data"] or Path(settings["world"]) / "data")["train"][
        : args.prompts
    ]
    inputs = policy.encode(
        data.prompts(samples, settings["four_stage"], settings["fps"], settings["max_frames"])
    )
    length = settings["max_new_tokens"]

    def ours():
        return int(policy.generate(inputs, RESPONSES, length).mask.sum())

    def plain():
        names = [name for name in inputs if not name.endswith("_features")]
        with torch.no_grad():
            out = policy.core.generate(
                **{name: inputs[name] for name in names},
                do_sample=True,
                num_return_sequences=RESPONSES,
                max_new_tokens=length,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                suppress_tokens=policy.banned_ids,
                eos_token_id=policy.end_ids,
                pad_token_id=policy.processor.tokenizer.pad_token_id,
            )[:, inputs["input_ids"].shape[1] :]
        end = torch.isin(out, torch.tensor(policy.end_ids))
        return int(((end.cumsum(1) - end.int()) == 0).sum())

    return {"ours": ours, "plain": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--run", type=Path, required=True, help="run folder whose cold start has finished"
    )
    parser.add_argument("--prompts", type=int, default=16, help="prompts at a time [default 16]")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("bench-select"),
        help="folder for select.json and select.png",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        open_policy(args)[args.worker]()
        print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024))
        return
    forms, found = open_policy(args), {name: {"rates": []} for name in ("ours", "plain")}
    for repeat in range(args.repeats + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            tokens = form()
            if repeat:  # the first is warm-up
                found[name]["rates"].append(tokens / (time.perf_counter() - start))
    command = [
        sys.executable,
        "-m",
        "bench.selection",
        "--run",
        str(args.run),
        "--prompts",
        str(args.prompts),
        "--worker",
    ]
    for name, result in found.items():
        done = subprocess.run([*command, name], capture_output=True, text=True, check=True)
        result["MB"] = json.loads(done.stdout.splitlines()[-1])
    rate = {name: statistics.median(result["rates"]) for name, result in found.items()}
    print(f"{args.prompts} prompts x {RESPONSES} responses, {args.repeats} times in turn\n")
    print("| | tokens a second | highest resident set, MB |\n|---|---|---|")
    for name, result in found.items():
        low, high = min(result["rates"]), max(result["rates"])
        print(f"| {name} | {rate[name]:.0f} ({low:.0f} to {high:.0f}) | {result['MB']:.0f} |")
    print(f"\nours is {rate['ours'] / rate['plain']:.2f} times as fast")
    args.out.mkdir(exist_ok=True, parents=True)
    (args.out / "select.json").write_text(json.dumps(found, indent=1))

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(4, 3), layout="constrained")
    axis.bar_label(axis.bar(list(rate), list(rate.values())), fmt="%.0f")
    axis.set_title("tokens a second")
    figure.savefig(args.out / "select.png", dpi=150)


if __name__ == "__main__":
    main()
