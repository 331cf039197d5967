"""The embedded world: coloured shapes on a grid, questions about them, a tiny policy and a tiny
judge.

    python -m world --out DIR [--seed N]    # DIR/data, DIR/policy, DIR/judge; each is made once

It exercises every real path without a download. The data are PNG pictures and MP4 clips in the
official schema (`scenes`); the policy is a Qwen2_5_VLForConditionalGeneration and the judge a
Qwen2ForCausalLM, built from config and saved in Hugging Face format (`models`). Whatever trains or
evaluates on them knows only files on disk.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from engine import ConfigError
from engine.files import lock, rewrite
from world import models, scenes

VERSION = 4  # of what a seed builds: data, models and their training
JUDGE_RIGHT = 0.97  # of the true captions that are held out of its training, a judge must read
JUDGE_TRIES = 4


def build(folder: Path, quiet: bool = False, seed: int | None = None) -> Path:
    """Write data, policy and judge under `folder`, each once: a part that is there is whole,
    because it is written beside and renamed when it is finished. seed None: the folder's own, or 0.
    Raises ConfigError where the folder holds another version or seed."""
    seed = _identity(folder, seed)["seed"]
    parts = {
        "data": lambda part: scenes.write_data(part, seed=seed),
        "judge": lambda part: _train_judge(part, seed, quiet),
        "policy": lambda part: models.train_policy(part, seed=seed, quiet=quiet),
    }
    if all((folder / name).exists() for name in ("world.json", *parts)):
        return folder
    with lock(folder, wait=True) or nullcontext():  # another process may be building it
        _build(folder, seed, parts, quiet)
    return folder


def _build(folder: Path, seed: int, parts: dict[str, Callable], quiet: bool) -> None:
    rewrite(folder / "world.json", json.dumps(_identity(folder, seed)))
    for number, (name, make) in enumerate(parts.items(), 1):
        if (folder / name).exists():
            continue
        if not quiet:
            print(
                f"building the embedded world in {folder}, once, in a few minutes: {name}, "
                f"{number} of 3",
                flush=True,
            )
        unfinished = folder / f".{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        make(unfinished)
        unfinished.rename(folder / name)


def _identity(folder: Path, seed: int | None) -> dict[str, int]:
    """Version and seed of what the folder holds or is to hold; ConfigError where they differ."""
    file = folder / "world.json"
    there = json.loads(file.read_text()) if file.exists() else {}
    made = {"version": VERSION, "seed": there.get("seed", 0) if seed is None else seed}
    others = folder.iterdir() if folder.is_dir() else ()
    if there != made and not all(path.name.startswith(".") for path in others):
        holds = f"a world of {there}" if there else "no world of this version"
        raise ConfigError(
            f"world: {folder} holds {holds}, and {made} is wanted. Delete it, or give another "
            "folder"
        )
    return made


def _train_judge(folder: Path, seed: int, quiet: bool) -> None:
    """The judge, from another start where it does not read captions well enough: of seven
    starts, one learned all but one kind of question. Raises ConfigError if none does."""
    for start in range(JUDGE_TRIES):
        models.train_judge(folder, 320, seed, quiet, start)
        right = models.judge_accuracy(folder)
        if not quiet:
            print(
                f"judge: {right['true']:.1%} right on captions held out of its training "
                f"({right['different']} different), {right['empty']:.1%} without a caption "
                f"(the best constant answer to each question: {right['floor']:.1%})"
            )
        if right["true"] >= JUDGE_RIGHT:
            return
    raise ConfigError(
        f"world: the judge was trained {JUDGE_TRIES} times, and is right on {right['true']:.1%} of "
        f"the true captions held out of its training. It needs {JUDGE_RIGHT:.0%}. Report this with "
        "your versions of torch and transformers"
    )
