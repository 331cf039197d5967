"""Score a checkpoint on held-out rows: right answers, hallucinated captions, benchmarks.

    accelerate launch eval.py --model RUN_OR_CHECKPOINT --data DIR --judge JUDGE
    accelerate launch eval.py --model RUN_OR_CHECKPOINT --benchmarks pope=DIR mmvu=DIR
    accelerate launch eval.py --model RUN_OR_CHECKPOINT --data DIR --stress
    python eval.py --compare RUN_A/benchmarks RUN_B/benchmarks

A run folder stands for its trained policy, or for its cold start until RL has finished. --data is a
dataset in the schema of data.py: its test*.json are evaluated, or train.json without any, as
train.py evaluates them (measures.py lists the measures). --stress asks every row again on corrupted
inputs (stress.py), on either kind of test. --benchmarks takes published files, or
names alone for the hub; both protocols of benchmarks/ score them, and an interrupted run resumes.
Several processes share the rows.
"""

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from transformers.utils import logging as transformers_logging

import corruption
import data
import measures
import stress
from benchmarks import TABLE
from benchmarks import results as benchmark_results
from benchmarks import run as benchmark_run
from caption_reward import MAX_TOKENS, CaptionReward, Judge
from engine import ConfigError, DataError
from engine.files import try_rewrite
from engine.judges import open_judge
from engine.pretrained import open_policy
from engine.run import Run, stop

# an option decides, else the run that trained the model, else these
INHERITED = {
    "dtype": "float32",
    "attention": "sdpa",
    "min_pixels": 3136,
    "max_pixels": 401_408,
    "fps": 2.0,
    "max_frames": 16,
    "max_new_tokens": 768,
}


class Settings(SimpleNamespace):
    """What an evaluation depends on. Its values, not its class's, are in config.yaml."""

    resumable = {"output_dir", "quiet", "tracker", "eval_batch"}  # may differ in a resumed run
    max_prompt_tokens = 0  # the model's own limit

    @property
    def four_stage(self) -> bool:
        return self.asked != "two_stage"


def settings_of(args: argparse.Namespace) -> Settings:
    """The options, and what the run that trained the model says. Raises ConfigError."""
    model, trained = checkpoint_of(Path(args.model))
    paths = by_name(args.benchmarks)
    for option in ("benchmarks", "media"):
        for name in by_name(getattr(args, option)):
            if name not in TABLE:
                raise ConfigError(f"{option}: {name!r} is not one of {', '.join(TABLE)}")
    for name, path in paths.items():
        if not (path or TABLE[name].hub):
            raise ConfigError(f"benchmarks: {name} is not on the hub; give {name}=FOLDER")
    template = Path(args.template).read_text() if args.template else ""
    if template and "{Question}" not in template:
        raise ConfigError(f"template: {args.template} has no {{Question}}")
    two_stage = args.two_stage or not (args.four_stage or trained.get("four_stage", True))
    stages = "two_stage" if two_stage else "four_stage"
    is_folder = Path(args.model).exists()
    parts = Path(args.model).resolve().parts[-3:] if is_folder else [args.model.replace("/", "-")]
    folder = Path(args.model) / "benchmarks" if trained else Path(f"runs/eval-{'-'.join(parts)}")
    inherited = {
        key: source[key]
        for source in (INHERITED, trained, vars(args))
        for key in INHERITED
        if source.get(key) is not None
    }
    return Settings(
        output_dir=str(args.output_dir or folder),
        # "./x" is a folder, and "x" may be on the hub
        model=str(model) if trained else args.model,
        asked="template" if template else "direct" if args.direct else stages,
        template=template,
        sample=args.sample,
        seed=args.seed,
        limit=args.limit,
        eval_batch=args.batch,
        eval_responses=args.responses,
        tracker="",
        quiet=False,
        **inherited,
    )


def checkpoint_of(path: Path) -> tuple[Path, dict[str, Any]]:
    """(model folder, configuration of the run) of a run folder; of a checkpoint, itself and {}.

    Raises ConfigError for a run without a finished stage.
    """
    config = path / "config.yaml"
    if not config.exists():
        return path, {}
    settings = yaml.safe_load(config.read_text())
    for stage in ("rl", "sft"):
        if (path / stage / "policy").exists():
            return path / stage / "policy", settings
    raise ConfigError(
        f"model: {path} is a run folder without a finished stage; let train.py finish its cold "
        "start first"
    )


def by_name(words: list[str] | None) -> dict[str, str]:
    """['pope=DIR', 'mmvu'] -> {'pope': 'DIR', 'mmvu': ''}"""
    return {name: path for name, _, path in (word.partition("=") for word in words or [])}


def open_tried_judge(args: argparse.Namespace, device: torch.device) -> Judge | None:
    """The judge of the options, once it has answered a question. Raises ConfigError."""
    if not args.judge:
        return None
    judge = open_judge(args.judge, args.judge_model, device, args.judge_max_tokens)
    if judge(["Which letter comes first in the alphabet?"]) == [None]:
        raise ConfigError(f"judge: {judge} does not answer. Its last error: {judge.last_error}")
    return judge


# --- the two evaluations --------------------------------------------------------------------------


def on_benchmarks(args: argparse.Namespace) -> None:
    cfg = settings_of(args)
    run = Run(cfg)
    paths, media = by_name(args.benchmarks), by_name(args.media)
    sets = benchmark_run.open_rows(paths, media, cfg, args.on_bad_row, run)
    judge = open_tried_judge(args, run.device) if run.is_main else None
    benchmark_run.evaluate(sets, cfg, run, judge, args.judge_model or args.judge or "", args.stress)
    run.accelerator.end_training()


class RunWithoutFolder(Run):
    """Processes that share rows, and write nothing but --out."""

    def _claim_folder(self) -> None:
        self.folder = None


def on_own_rows(args: argparse.Namespace) -> None:
    if args.out:
        try_rewrite("out", args.out)  # before the evaluation, which would be lost
    cfg = settings_of(args)
    run = RunWithoutFolder(cfg)
    with run.local_main_first():
        sets = data.load(args.data, args.on_bad_row, run.say)
    tests = {name: rows for name, rows in sets.items() if name.startswith("test")}
    sets = tests or {"train": sets["train"]}
    sets = data.fit_to_model(sets, cfg.model, cfg, args.on_bad_row, run.say)
    judge = open_tried_judge(args, run.device)
    reward = CaptionReward(judge) if judge else None
    policy = open_policy(cfg.model, cfg, run.device)
    made = stress.corrupted_tests(sets, args.stress, run.say)
    # another row's media may be larger
    made = data.fit_to_model(made, cfg.model, cfg, "skip", run.say) if made else {}
    result = measures.evaluate(policy, sets | made, reward, cfg, run, "evaluate")
    for split in sets:
        scored = result[split]
        run.say(f"{split}: {measures.one_line(scored)}")
        for name, some in scored["metrics"]["by category"].items():
            value = some["accuracy"]
            both = f"[{value['low']:.1%}, {value['high']:.1%}]"
            run.say(f"  {name:<16} {value['value']:6.1%}  {both}  n {value['n']}")
        if existence := scored["metrics"].get("existence"):
            shown = "  ".join(f"{key} {v:.3f}" for key, v in existence.items() if key != "n")
            run.say(f"  existence        {shown}")
        if args.stress:
            by_input = {stress.INTACT: split} | {k: f"{split}_{k}" for k in args.stress}
            right = {
                name: {row["id"]: row["right"] for row in result[key]["rows"]}
                for name, key in by_input.items()
                if key in result
            }
            found = list(stress.lines(stress.questions_of(sets[split]), right))
            scored["stress"] = stress.as_json(found)
            run.say(stress.table(split, found))
    if args.out:
        run.write(args.out, result)
    run.accelerator.end_training()


# --- command line ---------------------------------------------------------------------------------


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    # fmt: off
    add("--model", help="run folder, or checkpoint or adapter folder or hub id")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, help="dataset folder or file in the schema of data.py")
    what.add_argument("--benchmarks", nargs="+", metavar="NAME=PATH", help=f"of {', '.join(TABLE)}")
    what.add_argument("--compare", nargs=2, type=Path, metavar="FOLDER", help=
        "two folders of --benchmarks")
    add("--media", nargs="+", metavar="NAME=PATH", help=
        "where pictures or clips are, if not beside the rows")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--four_stage", action="store_true", help=
        "the prompt of training (default, unless the run had none)")
    how.add_argument("--direct", action="store_true", help="the benchmark's own prompt")
    how.add_argument("--template", help=
        "file with a wording of the stages, {Question} in it, for other checkpoints")
    how.add_argument("--two_stage", action="store_true", help=
        "prompt for thinking and answer only (default for such a run)")
    add("--limit", type=int, default=0, help="first rows of each benchmark only (0: all)")
    add("--sample", action="store_true", help="sample at T = 1 instead of greedy responses")
    add("--seed", type=int, default=0, help="of --sample and --responses")
    add("--judge", help=
        "causal LM, or URL: captions (--data), or what no rule decides (--benchmarks)")
    add("--judge_model", default="", help=
        "model at the judge's URL; its key comes from OPENAI_API_KEY")
    add("--judge_max_tokens", type=int, default=MAX_TOKENS, help="longest reply, thought included")
    add("--max_new_tokens", type=int, help="longest response (default: the run's, or 768)")
    add("--max_pixels", type=int, help="of a picture or frame (default: the run's, or 401408)")
    add("--max_frames", type=int, help="of a clip (default: the run's, or 16)")
    add("--dtype", choices=("float32", "bfloat16"), help="(default: the run's, or float32)")
    add("--batch", type=int, default=64, help="rows at a time in each process")
    add("--output_dir", help="folder of --benchmarks (default: benchmarks/ in the run folder)")
    add("--responses", type=int, default=0, help=
        "with --data: sampled to each row with a judge, for the slope (0: none)")
    add("--stress", nargs="*", choices=corruption.KINDS, metavar="KIND", help=
        "ask again on corrupted inputs: how much of the score needs eyes; of "
        f"{', '.join(corruption.KINDS)} (default: the first three)")
    add("--out", type=Path, help="with --data: also write scores and responses to this JSON file")
    add("--on_bad_row", choices=("error", "skip"), default="error", help="skip: leave bad rows out")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.compare and not args.model:
        parser.error("--model is needed")
    if args.batch < 1 or args.limit < 0:
        parser.error("--batch must be at least 1, --limit 0 or more")
    if args.stress is not None:  # the question alone is always asked
        args.stress = [corruption.NO_MEDIA, *(args.stress or corruption.KINDS[:3])]
    args.stress = args.stress or []
    own, published = ["out"], "media direct template limit sample output_dir".split()
    for name in own if args.benchmarks else published if args.data else []:
        if getattr(args, name):
            parser.error(f"--{name} is for {'--data' if args.benchmarks else '--benchmarks'}")
    return args


def main() -> None:
    args = parse()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        if args.compare:
            benchmark_results.compare(*args.compare)
        elif args.benchmarks:
            on_benchmarks(args)
        else:
            on_own_rows(args)
    except (DataError, ConfigError, OSError) as error:
        stop(f"error: {error}")
    except KeyboardInterrupt:
        resumes = ". The same command resumes after the rows that are answered"
        stop(f"\ninterrupted{resumes if args.benchmarks else ''}", everyone=True)


if __name__ == "__main__":
    main()
