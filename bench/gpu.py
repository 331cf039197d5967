"""One command for one GPU: is it right there, and how fast is it?

    python -m bench.gpu --out bench-gpu            # at most 8 minutes on one card
    python -m bench.gpu --dry                      # every part, tiny, on a CPU
    python -m bench.gpu --parts flex 7b-lora       # some of them

It needs the repository and the packages of `NEEDED`; TRL's parts also those of `FOR_TRL`. Nothing
is downloaded: weights are random. Each part runs in a process of its own with a limit of time; one
that fails is told, and the others go on. gpu.json and gpu.md are written after every part.

    card               its rates: bf16 products of 8192 x 8192, sums of 4 GB
    float32, bfloat16  shared prefix against plain rows, with LoRA too, and the sampler against the
                       scores
    fsdp2              an update sharded over one process against one that is not
    flex               flex attention's forward and backward against the dense mask
    3b-lora, ...       our step: 4 prompts of 576 visual tokens x 8 completions of 128, with
                       gradient checkpointing
    trl-3b-lora, ...   the same in TRL with transformers' generation

A share is what the part cannot do without (`one_step.least`) at the card's rate, over its seconds.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from engine.files import rewrite

PARTS = {  # in order of value: the most seconds each may take
    "card": 90,
    "float32": 60,
    "bfloat16": 60,
    "fsdp2": 60,
    "flex": 90,
    "3b-lora": 80,
    "7b-lora": 100,
    "7b-full": 100,
    "trl-3b-lora": 100,
    "3b-full": 80,
    "trl-7b-lora": 120,
}
NEEDED = {  # what is imported: its package
    "torch": "torch",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "accelerate": "accelerate",
    "peft": "peft",
    "safetensors": "safetensors",
    "qwen_vl_utils": "qwen-vl-utils",
    "av": "av",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "tqdm": "tqdm",
}
FOR_TRL = {name: name for name in "trl datasets dill multiprocess xxhash pyarrow pandas".split()}
SHOWN = "torch triton transformers accelerate peft qwen-vl-utils trl".split()


def missing(packages: dict[str, str]) -> list[str]:
    return [package for name, package in packages.items() if not importlib.util.find_spec(name)]


def how_to_get(packages: list[str]) -> str:
    names = " ".join(packages)
    return (
        f"not installed: {', '.join(packages)}. pip install {names}; or, for a machine without a "
        f"network, pip download --no-deps -d wheels {names} elsewhere, and there "
        "pip install --no-index --no-deps wheels/*.whl"
    )


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    names = [*NEEDED.values(), *FOR_TRL, "triton"]
    found = importlib.metadata.distributions()
    there = {each.name.lower().replace("_", "-"): each.version for each in found}
    return {name: there[name] for name in names if name in there}


def too_old(there: dict[str, str], pyproject: str) -> list[str]:
    """The packages older than pyproject.toml asks for."""

    def number(version: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", version)[:3]]

    asked = dict(re.findall(r'"([\w-]+)>=([\d.]+)"', pyproject))
    return [
        f"{name} {there[name]} (at least {least} is needed)"
        for name, least in asked.items()
        if name in there and number(there[name]) < number(least)
    ]


# --- parts ----------------------------------------------------------------------------------------


def play(part: str, dry: bool, out: str, err: str) -> None:
    """What the process of a part does."""
    os.setsid()  # with all that it starts it can be killed
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    from bench import gpu_parts

    gpu_parts.main(part, dry)


def run_part(part: str, seconds: float, dry: bool) -> dict:
    """What a part finds, in a process of its own; {"failed": why} where it says nothing."""
    # a CUDA process is a new one; on a CPU they are forked from one that has imported everything
    context = multiprocessing.get_context("forkserver" if dry else "spawn")
    if dry:
        context.set_forkserver_preload(["bench.gpu_parts"])
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = context.Process(target=play, args=(part, dry, str(out), str(err)))
        process.start()
        try:
            process.join(seconds)
        finally:
            code = process.exitcode
            if code is None:
                kill(process)
        printed, said = (
            file.read_text(errors="replace").splitlines() if file.exists() else []
            for file in (out, err)
        )
    log = [line for line in said if line.strip()]
    if code is None:
        why = f"stopped after {seconds:.0f} s"
    else:
        why = log[-1].strip()[:300] if log else f"ended with exit code {code}"
    # a part that has its result may fail to end
    result = next((line for line in reversed(printed) if line.startswith("{")), None)
    found = json.loads(result) if result else {"failed": why}
    return found | ({"log": log[-40:]} if is_broken(found) else {})


def kill(process: multiprocessing.Process) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # not yet a group of its own
        process.kill()
    process.join()


def is_broken(found: dict) -> bool:
    rows = found.get("checks", ())
    return "failed" in found or any("failed" in row or row.get("passed") is False for row in rows)


# --- the table ------------------------------------------------------------------------------------


def summary(found: dict) -> str:
    """A part in one line."""
    for way in ("not run", "failed"):
        if way in found:
            return f"{way}: {found[way]}"
    if "checks" in found:
        passed = sum(row.get("passed", False) for row in found["checks"])
        return f"{passed} of {len(found['checks'])} checks passed"
    if "flops" in found:
        return rates(found)
    return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found["seconds"].items())


def listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)


def rates(card: dict) -> str:
    """The card and what it was measured to do."""
    memory = f", {card['memory'] / 1e9:.0f} GB, driver {card['driver']}" if card["memory"] else ""
    return (
        f"{card['name']}{memory}: bf16 products {card['flops'] / 1e12:.3g} TFLOP/s, memory read at "
        f"{card['read'] / 1e12:.3g} TB/s"
    )


def table(results: dict) -> str:
    """Everything found, in Markdown."""
    card, parts = results["parts"].get("card", {}), results["parts"]
    lines = [rates(card) if "flops" in card else summary(card)] if card else []
    lines += [listed(results["versions"]), ""]
    lines += ["**--dry: tiny sizes on a CPU. Its seconds say nothing of a card.**", ""] * results[
        "dry"
    ]
    checks = [(p, row) for p, found in parts.items() for row in found.get("checks", ())]
    if checks:
        lines += ["| part | check | found | allowed | |", "|---|---|---|---|---|"]
    for part, row in checks:
        if "value" in row:
            numbers = f"{row['value']:.2g} | {row['allowed']:g}"
            verdict = "passed" if row["passed"] else "**failed**"
        else:
            numbers = f"{row.get('failed') or row['not run']} |"
            verdict = "**failed**" if "failed" in row else "not run"
        lines.append(f"| {part} | {row['check']} | {numbers} | {verdict} |")
    steps = {part: found for part, found in parts.items() if "seconds" in found}
    if steps:
        lines += [
            "",
            "| part | step, s | generate, s | tokens/s | of memory's rate | --static_decoding, s "
            "| reference, s | of bf16 rate | update, s | of bf16 rate | peak, GB | computed, GB |",
            "|---" * 12 + "|",
            *(f"| {part} | {' | '.join(cells(found, card))} |" for part, found in steps.items()),
        ]
    told = {part: summary(found) for part, found in parts.items()}
    told = {p: words for p, words in told.items() if words.startswith(("not run", "failed"))}
    lines += [""] * bool(told) + [f"- {part}: {words}" for part, words in told.items()]
    return "\n".join(lines) + "\n"


def cells(found: dict, card: dict) -> list[str]:
    """The cells of a step."""
    seconds, least = found["seconds"], found.get("least")

    def share(part: str, work: str, rate: str) -> str:
        if not least or rate not in card:
            return "-"
        return f"{least[work] / card[rate] / seconds[part]:.2%}"

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    generate = seconds.get("generate")
    return [
        number(seconds["step"], ".2f"),
        number(generate, ".2f"),
        number(found["tokens"] / generate if generate else None, ".0f"),
        share("generate", "bytes", "read"),
        found.get("static failed") or number(found.get("static"), ".2f"),
        number(seconds.get("reference"), ".2f"),
        share("reference", "reference", "flops"),
        number(seconds.get("update"), ".2f"),
        share("update", "update", "flops"),
        *(
            number(found[name] / 1e9 if found.get(name) else None, ".1f")
            for name in ("peak", "predicted")
        ),
    ]


def write(folder: Path, results: dict) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    rewrite(folder / "gpu.json", json.dumps(results, indent=1))
    rewrite(folder / "gpu.md", table(results))


# --- the command ----------------------------------------------------------------------------------


def measure(parts: list[str], minutes: float, dry: bool, folder: Path) -> dict:
    """Run the parts in turn, as long as there is time."""
    end = time.time() + 60 * minutes
    results = {"dry": dry, "versions": versions(), "parts": {}}
    print(listed(results["versions"]), flush=True)
    without_trl = missing(FOR_TRL)
    if without_trl and any(part.startswith("trl") for part in parts):
        print(f"TRL's parts need what is {how_to_get(without_trl)}", flush=True)
    for part in parts:
        begun, left = time.time(), max(0, end - time.time())
        if part.startswith("trl") and without_trl:
            found = {"not run": f"not installed: {', '.join(without_trl)}"}
        elif left < PARTS[part] / 3:
            found = {"not run": f"{left:.0f} s left"}
        else:
            # a busy CPU may take any time
            found = run_part(part, left if dry else min(PARTS[part], left), dry)
        took = time.time() - begun
        results["parts"][part] = found | {"took": took}
        print(f"{part}: {summary(found)} [{took:.0f} s]", flush=True)
        write(folder, results)
        if part == "card" and "flops" not in found and left:
            sys.exit(1)  # there is nothing to run the others on
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dry", action="store_true", help="every part with tiny sizes, on a CPU")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="some parts [default all]"
    )
    parser.add_argument("--minutes", type=float, default=8, help="for all parts [default 8]")
    parser.add_argument(
        "--out", type=Path, default=Path("bench-gpu"), help="folder for gpu.json and gpu.md"
    )
    args = parser.parse_args()
    if lacking := missing(NEEDED):
        sys.exit(f"error: {how_to_get(lacking)}")
    if old := too_old(versions(), Path("pyproject.toml").read_text()):
        sys.exit(f"error: too old: {', '.join(old)}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    # one card, also where there are several
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if args.dry else visible
    parts = [part for part in PARTS if part in args.parts or part == "card"]
    results = measure(parts, args.minutes, args.dry, args.out)
    print(f"\n{table(results)}\nwrote {args.out}/gpu.json and gpu.md")
    sys.exit(any(map(is_broken, results["parts"].values())))


if __name__ == "__main__":
    main()
