"""One training step, ours and TRL's, side by side: the same weights, prompts, pictures, completion
length and loss.

    pip install -e '.[bench]'
    python -m bench.step --out bench-step                        # two CPU cores, an hour
    python -m bench.step --visual 144 --micro 1 --repeats 1      # one workload, one size of TRL

Both use Hugging Face generation, fp32, AdamW, beta 0.04, no clip in effect (one update a batch),
sequence-mean loss, 4 prompts x 8 completions of 48 tokens, an 18.5 M-parameter Qwen2.5-VL (hidden
256, 6 layers, vision depth 4, vocabulary 32,768) with frozen vision tower. TRL's micro-batch is
swept, and each figure is compared with the one that suits TRL best for it; ours is swept over
prompts per pass in the same way. Every measurement is a process of its own, ours and TRL's in turn,
so that peak memory (the highest resident set) is its own and noise hits both. The first step of a
process is warm-up. Times are medians over processes, with the smallest and the largest.

The floor is the arithmetic that cannot be avoided, over the rate at which this machine multiplies
1024 x 1024 fp32 matrices, measured in our processes: the body on prompts and completions forward
once and backward twice, the head on completion tokens forward, backward twice. For decoding it is
bytes: the weights and the cache, read once a token.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from bench import one_step

PROMPTS, GROUP, LENGTH = 4, 8, 48
NEVER = 32767  # an end token that is never sampled
ROOT = Path(__file__).parent.parent


def write_model(folder: Path) -> None:
    """The policy of the benchmark, random but for its shape, with the embedded world's tokenizer
    and template."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from world import models

    torch.manual_seed(0)
    small, processor = models.make_policy(models.make_tokenizer())
    text, vision = small.config.text_config.to_dict(), small.config.vision_config.to_dict()
    text |= dict(
        vocab_size=32768,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        layer_types=None,
    )
    text |= dict(max_window_layers=6, num_attention_heads=4, num_key_value_heads=2)
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [8, 12, 12],
    }
    vision |= dict(
        depth=4,
        hidden_size=256,
        intermediate_size=512,
        out_hidden_size=256,
        fullatt_block_indexes=[3],
    )
    tokens = {
        name: value for name, value in small.config.to_dict().items() if name.endswith("_token_id")
    }
    model = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    )
    model.generation_config = small.generation_config
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


# --- the two sides --------------------------------------------------------------------------------


def ours(folder: Path, steps: int, work: dict) -> dict:
    """`size` prompts per pass. Every second step has Eq. 4, so that what it adds is measured side
    by side."""
    from engine import pretrained

    processes = int(os.environ.get("WORLD_SIZE", 1))
    policy = pretrained.load(str(folder), max_pixels=one_step.PIXELS)
    reference = pretrained.load(str(folder), max_pixels=one_step.PIXELS, trainable=False)
    policy.end_ids = [NEVER]
    model = policy
    if processes > 1:
        torch.distributed.init_process_group("gloo")
        model = torch.nn.parallel.DistributedDataParallel(policy, find_unused_parameters=False)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=one_step.RATE, fused=True)
    chats = one_step.chats(one_step.prompts(work["visual"], work["prompts"]))
    chats = chats[int(os.environ.get("RANK", 0)) :: processes]
    parts = [chats[i : i + work["size"]] for i in range(0, len(chats), work["size"])]
    loaded, out = peak(), {False: [], True: []}
    for step in range(2 * steps):
        nce = step % 2 == 1
        seconds, rolls = one_step.ours(policy, reference, optimizer, parts, work, model, nce)
        out[nce].append(seconds)
    # one token in 32,768 is the end
    most = len(chats) * work["group"] * work["length"]
    assert sum(r.mask.sum() for r in rolls) > 0.95 * most
    return {
        "steps": out[False][1:],
        "with Eq. 4": out[True][1:],
        "peak": peak(),
        "loaded": loaded,
        "floor": floor(policy, policy.encode(parts[0])["input_ids"].shape[1], work),
    }


def floor(policy, prompt: int, work: dict) -> dict:
    """Seconds that arithmetic alone takes, by part, at the machine's measured rates."""
    least = one_step.least(policy, prompt, work)
    rates = one_step.rates(torch.device("cpu"), 1024, torch.float32, 32 * 2**20)
    return {
        "reference": least["reference"] / rates["flops"],
        "update": least["update"] / rates["flops"],
        "decode, arithmetic": least["decode"] / rates["flops"],
        "decode, bytes": least["bytes"] / rates["read"],
        "GFLOP/s": rates["flops"] / 1e9,
        "GB/s": rates["read"] / 1e9,
    }


def trl(folder: Path, steps: int, work: dict) -> dict:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    model.model.visual.requires_grad_(False)
    model.generation_config.eos_token_id = NEVER
    processor.image_processor.size = {"shortest_edge": 3136, "longest_edge": one_step.PIXELS}
    pairs = one_step.prompts(work["visual"], work["prompts"])
    with tempfile.TemporaryDirectory() as scratch:
        trainer, seconds = one_step.trl(
            model,
            processor,
            pairs,
            work | {"micro": work["size"]},
            steps,
            output_dir=scratch,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        )
        loaded = peak()
        trainer.train()
    return {"steps": [{"step": s} for s in seconds[1:]], "peak": peak(), "loaded": loaded}


def peak() -> float:
    """The highest resident set of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- the comparison -------------------------------------------------------------------------------


def measure(side: str, folder: Path, steps: int, processes: int = 1, **work) -> dict:
    """One measurement in a process of its own."""
    work = {"prompts": PROMPTS, "group": GROUP, "length": LENGTH} | work
    command = [sys.executable] + (
        ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] * (processes > 1)
    )
    command += [
        "-m",
        "bench.step",
        "--worker",
        side,
        json.dumps([str(folder), steps, work]),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {side} with {work} failed\n{done.stderr[-2000:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"')))


def middle(values: list[float], form: str = "{:.1f}") -> str:
    return form.format(statistics.median(values)) + (
        f" ({form} to {form})".format(min(values), max(values)) if len(values) > 1 else ""
    )


def compare(visual: int, micro: list[int], repeats: int, folder: Path) -> dict:
    """Ours and TRL in turn, every size once; then what suits each best again, `repeats` times in
    all."""
    sizes = {"ours": [PROMPTS, 1], "trl": micro}
    found = {side: {size: [] for size in sizes[side]} for side in sizes}

    def run(side: str, size: int) -> None:
        result = measure(side, folder, 2 if side == "trl" else 3, visual=visual, size=size)
        found[side][size].append(result)
        seconds = statistics.median(step["step"] for step in result["steps"])
        name = "micro-batch" if side == "trl" else "prompts per pass"
        print(
            f"{visual} visual tokens, {side}, {name} {size}: {seconds:.2f} s, "
            f"{result['peak']:.0f} MB",
            flush=True,
        )

    def time_of(side: str, size: int) -> float:
        return statistics.median(
            step["step"] for result in found[side][size] for step in result["steps"]
        )

    for k in range(max(map(len, sizes.values()))):
        for side in sizes:
            if k < len(sizes[side]):
                run(side, sizes[side][k])
    for _ in range(repeats - 1):
        for side in sizes:
            run(side, min(sizes[side], key=lambda size: time_of(side, size)))
    return found


def summary(visual: int, found: dict) -> tuple[str, dict]:
    """The table of one workload, in Markdown, and its numbers."""
    best = {}
    for side in ("ours", "trl"):
        by_size = found[side]
        steps = {
            size: [s["step"] for r in results for s in r["steps"]]
            for size, results in by_size.items()
        }
        peaks = {size: [r["peak"] for r in results] for size, results in by_size.items()}
        over = {
            size: [r["peak"] - r["loaded"] for r in results] for size, results in by_size.items()
        }
        fast = min(steps, key=lambda size: statistics.median(steps[size]))
        lean = min(peaks, key=lambda size: statistics.median(peaks[size]))
        best[side] = {
            "fast": fast,
            "lean": lean,
            "step": steps[fast],
            "peak": peaks[lean],
            "over": over[lean],
        }
    mine, theirs = best["ours"], best["trl"]
    fastest = found["ours"][mine["fast"]]
    part = {
        name: statistics.median(s[name] for r in fastest for s in r["steps"])
        for name in fastest[0]["steps"][0]
    }
    nce = statistics.median(s["step"] for r in fastest for s in r["with Eq. 4"]) / part["step"] - 1
    limit = {
        name: statistics.median(r["floor"][name] for r in fastest) for name in fastest[0]["floor"]
    }
    ratio = {
        name: statistics.median(theirs[name]) / statistics.median(mine[name])
        for name in ("step", "peak", "over")
    }
    scoring = limit["reference"] + limit["update"]
    decoding = max(limit["decode, arithmetic"], limit["decode, bytes"])

    def row(title: str, name: str, form: str) -> str:
        both = f"{middle(theirs[name], form)} | {middle(mine[name], form)}"
        return f"| {title} | {both} | {ratio[name]:.1f} |"

    text = "\n".join(
        (
            f"### {visual} visual tokens a prompt",
            "| | TRL | ours | TRL / ours |\n|---|---|---|---|",
            row("seconds a step", "step", "{:.2f}"),
            row("highest resident set, MB", "peak", "{:.0f}"),
            row("of it above the loaded model, MB", "over", "{:.0f}"),
            f"\nTRL: fastest micro-batch {theirs['fast']}, leanest {theirs['lean']}. Ours: fastest "
            f"with {mine['fast']} "
            f"prompts per pass, leanest with {mine['lean']}; generate {part['generate']:.2f} s, "
            "reference "
            f"{part['reference']:.2f} s, update {part['update']:.2f} s. Reference and update "
            "together are "
            f"{(part['reference'] + part['update']) / scoring:.2f} times the arithmetic floor "
            f"({scoring:.2f} s at "
            f"{limit['GFLOP/s']:.0f} GFLOP/s); the floor of decoding is {decoding:.2f} s "
            "(arithmetic "
            f"{limit['decode, arithmetic']:.2f}, bytes {limit['decode, bytes']:.2f} at "
            f"{limit['GB/s']:.0f} GB/s). "
            f"Eq. 4 adds {nce:+.1%}.\n",
        )
    )
    return text, {"best": best, "parts": part, "floor": limit, "ratio": ratio}


def plot(results: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for axis, name, title in zip(
        axes, ("step", "peak"), ("seconds a step", "highest resident set, MB")
    ):
        for k, side in enumerate(("trl", "ours")):
            values = [statistics.median(r["best"][side][name]) for r in results.values()]
            bars = axis.bar(
                [i + 0.4 * k for i in range(len(values))],
                values,
                width=0.38,
                label=side.replace("trl", "TRL"),
            )
            axis.bar_label(bars, fmt="%.1f" if name == "step" else "%.0f")
        axis.set_xticks(
            [i + 0.2 for i in range(len(results))],
            [f"{visual} visual tokens" for visual in results],
        )
        axis.set_title(title)
    axes[0].legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--visual", type=int, nargs="+", default=[144, 576], help="visual tokens a prompt"
    )
    parser.add_argument(
        "--micro",
        type=int,
        nargs="+",
        default=[1, 2, 4, 8, 16, 32],
        help="TRL's micro-batches [completions]",
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="processes per side at its best size"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("bench-step"), help="folder for step.json and step.png"
    )
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, (folder, steps, work) = args.worker[0], json.loads(args.worker[1])
        result = {"ours": ours, "trl": trl}[side](Path(folder), steps, work)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result), flush=True)
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        for visual in args.visual:
            text, results[visual] = summary(
                visual, compare(visual, args.micro, args.repeats, Path(folder))
            )
            print("\n" + text, flush=True)
    args.out.mkdir(exist_ok=True, parents=True)
    (args.out / "step.json").write_text(json.dumps(results, indent=1))
    plot(results, args.out / "step.png")
    print(f"wrote {args.out}/step.json and step.png")


if __name__ == "__main__":
    main()
