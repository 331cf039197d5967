"""How the cost of a step grows: with the prompt, the group, the completions, the prompts and the
processes.

    python -m bench.scaling --out bench-scaling    # two CPU cores, 8 to 40 minutes

One step of ours (see step.py for the model and what is timed) from a middle point, one quantity
varied at a time; every point in a process of its own. The column for a quantity's doubling is the
slope of log time: 2^slope times as long. Processes split the same prompts, one thread each, under
DistributedDataParallel.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
from pathlib import Path

from bench import step

MIDDLE = {"visual": 144, "group": 8, "length": 48, "prompts": 4}
VARIED = {
    "visual": [36, 144, 576, 1296, 4096],
    "group": [2, 8, 32, 64],
    "length": [12, 48, 192],
    "prompts": [1, 4, 16],
    "processes": [1, 2],
}
NAMES = {
    "visual": "visual tokens a prompt",
    "group": "completions a prompt",
    "length": "tokens a completion",
    "prompts": "prompts",
    "processes": "processes",
}


def point(folder: Path, what: str, value: int, steps: int) -> dict:
    work = MIDDLE | ({} if what == "processes" else {what: value})
    processes = value if what == "processes" else 1
    os.environ["OMP_NUM_THREADS"] = "1" if what == "processes" else str(os.cpu_count())
    found = step.measure("ours", folder, steps, processes, size=work["prompts"], **work)
    seconds = {
        name: statistics.median(s[name] for s in found["steps"]) for name in found["steps"][0]
    }
    return seconds | {"MB": found["peak"] - found["loaded"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--vary", nargs="+", choices=VARIED, default=list(VARIED), help="quantities [default all]"
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="steps a point, the first is warm-up [default 3]"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench-scaling"), help="folder for scaling.json and .png"
    )
    args = parser.parse_args()
    results: dict[str, dict[int, dict]] = {}
    with tempfile.TemporaryDirectory() as folder:
        step.write_model(Path(folder))
        print(
            "| | | generate, s | reference, s | update, s | step, s | above the loaded model, MB "
            "| step per doubling |"
        )
        print("|---|---|---|---|---|---|---|---|")
        for what in args.vary:
            values = VARIED[what]
            for value in values:
                found = results.setdefault(what, {})[value] = point(
                    Path(folder), what, value, args.steps
                )
                before = [v for v in values if v < value]
                slope = ""
                if before:
                    grown = found["step"] / results[what][before[-1]]["step"]
                    slope = f"x {2 ** (math.log(grown) / math.log(value / before[-1])):.2f}"
                seconds = " | ".join(
                    f"{found[name]:.2f}" for name in ("generate", "reference", "update", "step")
                )
                print(
                    f"| {NAMES[what]} | {value} | {seconds} | {found['MB']:.0f} | {slope} |",
                    flush=True,
                )
    args.out.mkdir(exist_ok=True, parents=True)
    (args.out / "scaling.json").write_text(json.dumps(results, indent=1))
    plot(results, args.out / "scaling.png")
    print(f"wrote {args.out}/scaling.json and scaling.png")


def plot(results: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1,
        len(results),
        figsize=(3 * len(results), 3),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    axes = axes[0]
    for axis, (what, points) in zip(axes, results.items()):
        for name in ("generate", "reference", "update", "step"):
            seconds = [found[name] for found in points.values()]
            axis.plot(
                list(points),
                seconds,
                marker="o",
                label=name,
                color="black" if name == "step" else None,
            )
        axis.set(xscale="log", yscale="log", xlabel=NAMES[what])
        axis.set_xticks(list(points), list(map(str, points)), minor=False)
        axis.set_xticks([], minor=True)
    axes[0].set_ylabel("seconds")
    axes[0].legend()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
