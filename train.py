"""The whole method, top to bottom: `main` reads as the paper's Method section.

    accelerate launch train.py                    # the embedded world: minutes on a laptop
    accelerate launch train.py --data DIR         # your own pictures and clips (see data.py)
    accelerate launch train.py --method grpo      # the baseline; every mechanism is a switch

    paper                                         code
    Redefine the Reasoning Paradigm               reasoning.py, `cold_start`
    Caption Reward                                caption_reward.py
    Reward Variance-Guided Sample Selection       variance_select.py, `select_prompts`
    GRPO, Eq. 1                                   grpo.py, `reinforce`
    Conflict-Aware Regularization, Eq. 4          ntk_infonce.py, conflict.py

Options are in config.py, departures from the paper in DEPARTURES.md.
"""

import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Container
from functools import partial
from itertools import zip_longest
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

import corruption
import data
import grpo
import measures
import negatives
import ntk_infonce
import preference
import report
import stress
import world
from caption_reward import CaptionReward, Judge
from config import Config, parse_config
from conflict import Conflict
from engine import ConfigError, DataError, counted, is_out_of_memory, judges, memory, reason
from engine.learner import Diverged, Learner, Reference, batch_size, rows_of_update, updates
from engine.pretrained import open_policy
from engine.run import Run, stop
from engine.vlm import VLM
from rewards import (
    BUILT_IN,
    custom_reward,
    reward,
    reward_file,
    reward_judge,
    try_custom,
    weights_of,
    with_other_questions,
)
from rollouts import Rollouts, explore, global_counts, log_rollouts, reference_response
from selection import select_prompts, take_over
from variance_select import share_of

JUDGE_TRIAL = 64  # questions on which the judge is tried before anything is trained


def main(cfg: Config) -> None:
    run = Run(cfg)
    sets = open_data(cfg, run)
    take_over(cfg, run)
    judge = open_judge(sets, cfg, run)

    # Redefine the Reasoning Paradigm: a cold start teaches planning, caption, thinking and answer.
    start = cold_start(sets, cfg, run)
    evaluate("before", start, sets, judge, cfg, run)

    if cfg.method != "sft":
        # Reward Variance-Guided Sample Selection: 64 responses a prompt, the top half by variance.
        prompts = select_prompts(start, sets["train"], judge, cfg, run)

        # Reinforcement learning: GRPO with the Caption Reward and Conflict-Aware Regularization.
        learn = prefer if cfg.method == "ovip" else reinforce
        policy = learn(start, prompts, sets, judge, cfg, run)
        evaluate("after", policy, sets, judge, cfg, run)

    finish(run)


# --- the stages -----------------------------------------------------------------------------------


def cold_start(sets: dict[str, list[data.Sample]], cfg: Config, run: Run) -> str:
    """Supervised fine-tuning on reference responses, on the response's tokens only (D-74).

    Returns the model's folder. Without rows that have a reference response (`process`), or with
    --sft_steps 0, RL starts from --model as it is.
    """
    if not (rows := taught(sets, cfg)):
        asked = cfg.sft_steps or cfg.sft_epochs
        why = " (no row has a reference response in `process`)" if asked else ""
        run.say("cold start: skipped" + why)
        return cfg.start
    steps = updates(cfg.sft_steps, cfg.sft_epochs, len(rows), cfg.sft_batch, run.processes)
    learner = Learner("sft", cfg.start, steps, cfg.sft_lr, cfg, run)

    def encoded(some: list[data.Sample]) -> tuple[Tensor, Tensor]:
        texts = [reference_response(s, cfg.four_stage) for s in some]
        return learner.policy.encode_responses(texts)

    def imitate(micro_batches: list[list[data.Sample]], tokens: Tensor) -> None:
        for some in micro_batches:
            chats = data.prompts(some, cfg.four_stage, cfg.fps, cfg.max_frames)
            logp = learner.model(learner.policy.encode(chats), *encoded(some)).logp
            learner.backward(-logp.sum() / tokens)

    for step, batch in learner.batches(rows, cfg.sft_batch):
        tokens = run.all_reduce(encoded(batch)[1].sum())
        n = learner.rows_at_once(len(batch))
        micro_batches = [batch[i : i + n] for i in range(0, len(batch), n)]
        learner.accumulate(micro_batches, imitate, tokens)
        loss = sum(learner.losses).item()
        learner.update()
        learner.log({"loss": (loss, 0)}, show=step % 10 == 0)
    return learner.finish()


def reinforce(
    start: str,
    prompts: list[data.Sample],
    sets: dict[str, list[data.Sample]],
    judge: CaptionReward | None,
    cfg: Config,
    run: Run,
) -> str:
    """GRPO (Eq. 1) with the Caption Reward and the conflict regulariser (Eq. 4).

    Returns the trained policy's folder. Batch sizes and loss denominators are global: any number of
    ranks and of micro-batches makes the same update.
    """
    steps = updates(cfg.rl_steps, cfg.rl_epochs, len(prompts), cfg.prompts_per_step, run.processes)
    learner = Learner("rl", start, steps, cfg.rl_lr, cfg, run, held_out(sets, judge, cfg, run))
    reference = Reference(start, learner, cfg)  # the model after the cold start, frozen
    least = least_prompts(cfg)
    size = batch_size(len(prompts), cfg.prompts_per_step, run.processes)
    if size == least == 2 and not learner.finished:
        run.say("warning: Eq. 4 is 0 in updates of 2 prompts: it needs a positive and a negative")
    for _, batch in learner.batches(prompts, cfg.prompts_per_step, least):
        with run.unsharded(learner.policy):
            micro_batches = explore(batch, learner, reference, judge)
        options = cfg.grpo_options | global_counts(micro_batches, run)

        for _ in range(cfg.iterations):
            micro_batches = learner.accumulate(micro_batches, policy_gradient, learner, options)
            learner.update()
        log_rollouts(learner, micro_batches)
    del reference  # its memory is free before another model is loaded
    return learner.finish()


def policy_gradient(micro_batches: list[Rollouts], learner: Learner, options: dict) -> None:
    """The gradient of Eq. 1 and Eq. 4, summed over this rank's micro-batches."""
    cfg = learner.cfg
    conflict = Conflict(micro_batches, learner.policy, cfg, learner.run, learner.step)
    for i, m in enumerate(micro_batches):
        for part, scores, is_last in learner.passes(m):
            logp = scores.logp[:, : part.adv.shape[1]].flatten(0, 1)  # [B * G, T]
            part.old_logp = logp.detach() if part.old_logp is None else part.old_logp
            loss, part.stats = grpo.grpo_loss(  # Eq. 1
                logp, part.old_logp, part.adv.flatten(), part.mask, part.ref_logp, **options
            )
            nce = loss.new_zeros(())
            if cfg.nce_weight and is_last:  # Eq. 4, f_i = d log pi(y_i | x_i) / d head
                cosine = conflict.cosine(i, scores)  # among all prompts of the global batch
                tau = cfg.tau
                if cfg.tau_quantile:
                    tau = ntk_infonce.quantile_tau(cosine, cfg.tau_quantile)
                nce, part.nce_stats = ntk_infonce.info_nce(
                    cosine, tau, cfg.nce_temperature, conflict.order(len(cosine))
                )
            learner.backward(loss + cfg.nce_weight * nce)
            part.record(scores, loss, nce)
        part = scores = None  # before the next prompts run


def prefer(
    start: str,
    prompts: list[data.Sample],
    sets: dict[str, list[data.Sample]],
    judge: CaptionReward | None,
    cfg: Config,
    run: Run,
) -> str:
    """OViP's preference learning in place of GRPO. --judge scores the responses. Without one a
    rule does: the embedded world's judge reads captions only."""
    scorer = judge.judge if judge and cfg.judge else None
    scored = held_out(sets, judge, cfg, run)
    return preference.prefer(start, prompts, scorer, cfg, run, scored)


# --- held-out rows --------------------------------------------------------------------------------


def held_out(
    sets: dict, judge: CaptionReward | None, cfg: Config, run: Run
) -> Callable[[VLM], float] | None:
    """Scores a policy on some rows that are not trained on; None without such rows."""
    tests = (rows for name, rows in sets.items() if name.startswith("test"))
    rows = balanced(sets.get("validation") or next(tests, []), cfg.held_out_rows, cfg.seed)
    return partial(held_out_reward, rows, judge, cfg, run) if rows else None


def balanced(rows: list[data.Sample], n: int, seed: int) -> list[data.Sample]:
    """n rows drawn at random, as evenly over the categories as their numbers allow."""
    kinds: dict[str, list] = defaultdict(list)
    for row in random.Random(f"{seed}/held out").sample(rows, len(rows)):
        kinds[row.category].append(row)
    return [row for turn in zip_longest(*kinds.values()) for row in turn if row][:n]


def held_out_reward(
    rows: list, judge: CaptionReward | None, cfg: Config, run: Run, policy: VLM
) -> float:
    """Mean total reward of greedy responses. NaN where a verdict is missing although it was asked
    for twice: policies are not compared on a failing network."""

    def respond(some: list[data.Sample]) -> SimpleNamespace:
        said = measures.respond(
            policy, some, cfg.four_stage, cfg.max_new_tokens, cfg.fps, cfg.max_frames
        )
        return SimpleNamespace(samples=some, text=[[text] for text in said])

    micro_batches = run.local_micro_batches(run.shard(rows), cfg.eval_batch, respond)
    judge = reward_judge(judge, policy, cfg)
    for _ in range(2):  # the second time asks for missing verdicts only
        rewards = [tables for tables, _ in reward(micro_batches, judge, cfg)]
        totals = []
        for tables in rewards:  # of one's own, an unknown one adds nothing, as in training
            known = {k: x if k in BUILT_IN else x.nan_to_num(0.0) for k, x in tables.items()}
            weights = weights_of(known, cfg).items()
            totals.append(sum(w * known[name] for name, w in weights if w))
        if not any(total.isnan().any() for total in totals):
            break
    found = run.gather_object([value for total in totals for value in total[:, 0].tolist()])
    return sum(found) / len(found)


def evaluate(
    name: str, model: str, sets: dict, judge: CaptionReward | None, cfg: Config, run: Run
) -> None:
    """Greedy responses on every test set -> eval/NAME.json, and a few pictures for the report."""
    file = run.folder / "eval" / f"{name}.json"
    tests = {k: v for k, v in sets.items() if k.startswith("test")}
    if not tests:
        run.say("evaluation: skipped (the data have no test*.json)")
    if run.from_main(file.exists) or not tests:
        return
    policy = open_policy(model, cfg, run.device)
    result = measures.evaluate(policy, tests, judge, cfg, run, f"evaluate {name}")
    if run.is_main:
        gallery = run.folder / "eval" / "gallery"
        intact = {k: v for k, v in tests.items() if not v[0].corruption}
        measures.save_gallery(gallery, intact, cfg.fps, cfg.max_frames)
    run.write(file, result)
    for split, scored in result.items():
        run.say(f"{name:>6} | {split}: {measures.one_line(scored)}")


# --- what a run works on --------------------------------------------------------------------------


def open_data(cfg: Config, run: Run) -> dict[str, list[data.Sample]]:
    """Check every row and every file before any model is loaded; build the embedded world if
    needed."""
    if cfg.reward:
        custom_reward(cfg.reward)  # one that is not there is found before any media are opened
    with run.local_main_first():
        sets = data.load(cfg.data, cfg.on_bad_row, run.say, cfg.staged) if cfg.data else None
    if not (cfg.data and cfg.model and (cfg.judge or cfg.caption_reward in ("", "self"))):
        if run.is_main:
            world.build(Path(cfg.world), cfg.quiet)
        run.accelerator.wait_for_everyone()
    if sets is None:
        with run.local_main_first():
            sets = data.load(Path(cfg.world) / "data")
    sets = data.fit_to_model(sets, cfg.start, cfg, cfg.on_bad_row, run.say)
    memory.check(cfg, run, data.most_visual_tokens(sets, cfg))
    file = f"; {reward_file(cfg.reward)}" if cfg.reward else ""
    run.claim_data(run.from_main(lambda: data.fingerprint(sets) + file))
    run.say("data: " + ", ".join(f"{len(rows)} {name}" for name, rows in sets.items()))
    return with_corrupted(learnable(sets, cfg, run.processes), cfg, run)


def learnable(sets: dict[str, list], cfg: Config, processes: int) -> dict[str, list[data.Sample]]:
    """The sets, with --train_set as `train`. Raises DataError for rows that a stage cannot learn
    from, and where they are too few."""
    check_train_set(sets, cfg)
    if cfg.train_set != "train":
        sets = {"cold_start": sets.get("train", [])} | sets | {"train": sets[cfg.train_set]}
    if cfg.caption_reward == "shared":
        sets["train"] = with_other_questions(sets["train"])
    if cfg.reward:
        try_custom(sets["train"][:2], cfg)
    if cfg.method == "ovip":
        negatives.check(sets["train"], cfg)
    if cfg.method != "sft":
        keep = cfg.keep if cfg.selection and not cfg.select_within else 1.0
        left = share_of(len(sets["train"]), keep)
        rows_of_update("rl", left, cfg.prompts_per_step, processes, least_prompts(cfg))
    return sets


def check_train_set(names: Container[str], cfg: Config) -> None:
    """Raises DataError where --train_set is none of the sets."""
    if cfg.train_set not in names:
        where = cfg.data or cfg.world
        raise DataError(f"data: {where} has no {cfg.train_set}.json to learn from")


def taught(sets: dict[str, list[data.Sample]], cfg: Config) -> list[data.Sample]:
    """The rows of the cold start: those with a reference response."""
    rows = sets.get("cold_start", sets["train"]) if cfg.sft_steps or cfg.sft_epochs else []
    return [s for s in rows if s.process]


def least_prompts(cfg: Config) -> int:
    """Prompts that an update of RL needs: Eq. 4 compares them."""
    return 2 if cfg.nce_weight else 1


def with_corrupted(sets: dict[str, list[data.Sample]], cfg: Config, run: Run) -> dict:
    """Hallucination-as-Cue: RL's prompts corrupted, the cold start's rows intact, and corrupted
    test sets beside the intact ones. The tests do not depend on --seed, so that runs compare."""
    kinds, made = cfg.corrupt_eval.split(), {}
    if cfg.corrupt_train:
        sets.setdefault("cold_start", sets["train"])
        made["train"], notes = corruption.corrupt(
            sets["train"], cfg.corrupt_train, cfg.seed, cfg.corrupt_share, data.picture_of
        )
        count = sum(s.corruption is not None for s in made["train"])
        run.say("; ".join([f"train: {counted(count, 'row')} with {cfg.corrupt_train}", *notes]))
        if not made["train"]:
            raise DataError(f"corrupt_train: no row of train can have {cfg.corrupt_train}")
    tests = {name: rows for name, rows in sets.items() if name.startswith("test")}
    made |= stress.corrupted_tests(tests, kinds, run.say)
    # another row's media may be larger
    return sets | (data.fit_to_model(made, cfg.start, cfg, "skip", run.say) if made else {})


def open_judge(sets: dict[str, list[data.Sample]], cfg: Config, run: Run) -> CaptionReward | None:
    """The judge, tried on a few questions without a caption: that it answers, and the reward's
    floor.

    Its replies are kept in the run folder. Where there are a judge and captions, these are judged
    at evaluation also if they earn no reward, so that runs can be compared.
    """
    scores = cfg.method == "ovip" and cfg.judge
    there = scores or cfg.four_stage and (cfg.judge or not cfg.model)
    if not there or run.from_main((run.folder / "eval" / "after.json").exists):
        return None
    judge, name = judge_of(cfg, run.device)
    journal = judges.Journal(run.folder / "judge" / f"{run.rank}.jsonl", name)
    run.accelerator.wait_for_everyone()  # all have read what there was before one writes
    asked, few = CaptionReward(judge, journal), sets["train"][: 4 * JUDGE_TRIAL : 4]
    right = asked.floor([(s.question, s.answer, s.problem_type) for s in few])
    if not right:
        raise ConfigError(
            f"judge: {judge} answered none of {counted(len(few), 'question')}. "
            f"Its last error: {judge.last_error}"
        )
    floor, tried = sum(right) / len(right), counted(len(right), "question")
    lost = len(few) - len(right)
    but = f". It did not answer {lost} more. Its last error: {judge.last_error}" if lost else ""
    run.say(f"judge: {name}, right on {floor:.0%} of {tried} without a caption{but}")
    if scores:
        preference.try_scores(judge, few[:4])
    if refused := getattr(judge, "refused", None):
        run.say(
            f"warning: the judge's server refuses {' and '.join(refused)}: replies may differ "
            "from call to call"
        )
    return asked


def judge_of(cfg: Config, device: torch.device | str) -> tuple[Judge, str]:
    """The judge of a configuration, and the name that its replies are kept under."""
    where = cfg.judge or str(Path(cfg.world) / "judge")
    name = cfg.judge_model if judges.is_url(where) else where
    bounds = {"concurrency": cfg.judge_concurrency, "deadline": cfg.judge_deadline}
    return judges.open_judge(where, name, device, cfg.judge_max_tokens, **bounds), name


def finish(run: Run) -> None:
    """The report, the table, and where everything is."""
    if run.is_main:
        page = report.write(run.folder)
        print(report.table(run.folder))
        print(f"{time.time() - run.began:.0f} s. Run folder: {run.folder}   Report: {page}")
    run.accelerator.end_training()


def cli() -> None:
    """Entry point: one clear line for bad input, a full disk, too little memory, and Ctrl-C."""
    folder = Path(".")
    try:
        cfg = parse_config(sys.argv[1:])
        folder = Path(cfg.output_dir)
        if cfg.dry_run:
            from dry_run import dry_run  # which imports this file

            return dry_run(cfg)
        main(cfg)
    except (ConfigError, DataError, Diverged) as error:
        stop(f"error: {error}")
    except KeyboardInterrupt:
        stop("\ninterrupted. The same command resumes from the last checkpoint", everyone=True)
    except Exception as error:
        if is_out_of_memory(error):
            stop(
                f"error: out of memory ({reason(error)}); the last checkpoint is kept. Try "
                "--prompts_per_pass 1, --completions_per_pass 2, --select_batch 1, --eval_batch 1, "
                "a lower --max_pixels or --max_frames, --gradient_checkpointing true, --lora_rank "
                "16 or, with full fine-tuning, --reference cpu. docs/speed.md has what takes memory"
            )
        if "DataLoader" in str(error):
            stop(
                f"error: a process of --media_workers ended ({reason(error)}); the last checkpoint "
                "is kept. Give fewer, or 0: the machine's memory may be full"
            )
        # torch and safetensors report a full disk in their own ways
        is_full = folder.exists() and shutil.disk_usage(folder).free <= 2**20
        if "No space left" not in str(error) and not is_full:
            raise
        stop(
            f"error: the disk is full ({error}); the last checkpoint is kept. Free some space; "
            "the same command then resumes"
        )


if __name__ == "__main__":
    cli()
