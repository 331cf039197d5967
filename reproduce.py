"""The paper in miniature: every arm of its tables, over seeds, each with a world of its own.

    python reproduce.py --quick                    # two seeds, what each idea brings
    python reproduce.py --all --seeds 5            # everything in docs/replication.md
    python reproduce.py --table 2 --figure 4       # what these need
    python reproduce.py --write --results docs/replication     # the page from its results alone

An arm is train.py with other options. The arms of a seed share its world and its cold start, and
all make the same number of updates with as many completions, so they differ in RL alone (those of
two stages have a cold start of their own); how many prompts they see is counted. What is finished
is skipped, and an interrupted arm goes on from its last checkpoint. Each arm and seed leaves one
small JSON file in the folder of the results, and a page beside that folder is written from them.
Yours are in runs/replication/, ours are docs/replication/ and docs/replication.md. Results of other
code or another world are never mixed. The claims are in replication/claims.py.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

from transformers.utils import logging as transformers_logging

import world
from engine import ConfigError
from engine.files import lock
from replication import arms, page
from replication.arms import ARMS, FIGURES, QUICK, ROOT, TABLES, Job, code, fingerprint
from replication.collect import collect, spent


def cores() -> int:
    """Those that this process may use, where the system tells."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def wanted(args: argparse.Namespace) -> list[str]:
    """The arms that the tables and figures asked for need, parents first."""
    tables = list(TABLES) if args.all else args.table
    figures = list(FIGURES) if args.all else args.figure
    asked = {arm for name in tables for arm in TABLES[name]}
    asked |= {arm for name in figures for arm in FIGURES[name]} | set(args.arm)
    asked |= set(QUICK if args.quick else ())
    for arm in list(asked):
        while arm := ARMS[arm].after:
            asked.add(arm)
    return [arm for arm in ARMS if arm in asked]


def to_do(every: list[Job], results: Path) -> list[Job]:
    """The jobs without a result, and those whose run folder (world) they need and do not find."""
    jobs: dict[Job, None] = {}

    def add(job: Job) -> None:
        for needs in filter(None, (job.after, Job("", job.seed) if job.arm else None)):
            if not needs.done:
                add(needs)
        jobs[job] = None

    for job in every:
        if not job.result(results).exists():
            add(job)
    # worlds first, then in the order of the arms
    order = ["", *ARMS]
    return sorted(jobs, key=lambda job: order.index(job.arm))


def run(jobs: list[Job], workers: int, results: Path) -> bool:
    """Run what is not done, `workers` at a time, each as soon as what it needs is there. Returns
    whether all of it succeeded."""
    threads = max(1, cores() // workers)
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    waiting, running, failed = list(jobs), {}, set()
    try:
        while waiting or running:
            for job in list(waiting):
                needs = job.after
                if needs and needs in failed:
                    failed.add(job)
                    waiting.remove(job)
                elif len(running) < workers and not (needs and not needs.done):
                    waiting.remove(job)
                    if (now := fingerprint()) != code():
                        sys.exit(
                            f"error: the code has changed since the start ({code()} then, {now} "
                            "now), so its results would mix. The same command begins anew"
                        )
                    job.folder.parent.mkdir(parents=True, exist_ok=True)
                    log = job.folder.with_name(f"{job.folder.name}.log")
                    with log.open("w") as out:
                        command = [sys.executable, *job.command()]
                        child = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
                    running[job] = child, time.time(), log
            time.sleep(0.5)
            for job, (child, began, log) in list(running.items()):
                if child.poll() is None:
                    continue
                del running[job]
                seconds = time.time() - began
                ok, why = child.returncode == 0, ""
                if not ok:
                    last = "\n".join(log.read_text().splitlines()[-5:])
                    why = f"{last}\n(all of it: {log})"
                if job.arm and job.folder.exists():
                    total = spent(job, seconds)
                    try:
                        if ok:
                            collect(job, total, threads, results)
                    except ConfigError as error:
                        ok, why = False, str(error)
                what = f"seed {job.seed}: {ARMS[job.arm].words if job.arm else 'its world'}"
                print(f"{'done  ' if ok else 'FAILED'} {seconds:4.0f} s  {what}", flush=True)
                if not ok:
                    failed.add(job)
                    print(why, flush=True)
    finally:
        for child, _, _ in running.values():
            child.terminate()
    return not failed


def check(results: Path) -> None:
    """Exit where the results there are of other code, another world or other options: new ones
    would mix with them. Exit too where no result could be written."""
    here, found_all = (code(), world.VERSION), page.read(results)
    for found in found_all:
        if (found["code"], found["world"]) != here:
            sys.exit(
                f"error: {results} holds results of other code or another world (code "
                f"{found['code']}, world {found['world']}; here {here[0]}, {here[1]}). They are "
                "not mixed: give another --results, or work at their commit (git worktree add "
                f"../there {found['commit'].rstrip('+')})"
            )
        if found["arm"] not in ARMS:
            sys.exit(f"error: {results} holds results of {found['arm']}, which is no arm now")
        there, now = found["config"], ARMS[found["arm"]].decisive()
        differ = [name for name in there | now if there.get(name) != now.get(name)]
        if differ:
            sys.exit(
                f"error: {found['arm']} in {results} was run with other options: "
                + ", ".join(f"{name} {there.get(name)}, here {now.get(name)}" for name in differ)
                + f". Delete its results, and {Job(found['arm'], found['seed']).folder}"
            )
    page.by_arm(found_all)
    try:
        results.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=results):
            pass
    except OSError as error:
        sys.exit(f"error: no result can be written to {results}: {error}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # fmt: off
    add("--table", nargs="+", choices=TABLES, default=[], help="the arms of these tables")
    add("--figure", nargs="+", choices=FIGURES, default=[], help="the arms of these figures")
    add("--arm", nargs="+", choices=ARMS, default=[], metavar="ARM", help=
        f"single arms: {', '.join(ARMS)}")
    add("--all", action="store_true", help="all tables and figures")
    add("--quick", action="store_true", help=
        "plain GRPO, ours, and what each idea brings, with two seeds")
    add("--write", action="store_true", help="train nothing; write what the results there give")
    add("--seeds", type=int, help="how many, from 0 (default: 5; 2 with --quick)")
    add("--workers", type=int, default=cores(), help=
        "arms at a time (default: one on each core)")
    add("--results", type=Path, default=arms.RUNS / code() / "results", help=
        "folder of the result files (default: one for this code in runs/replication)")
    # fmt: on
    args = parser.parse_args()
    args.seeds = args.seeds if args.seeds is not None else 2 if args.quick else 5
    if not (args.table or args.figure or args.arm or args.all or args.quick or args.write):
        parser.error("say what: --table, --figure, --arm, --all, --quick or --write")
    if args.seeds < 1 or args.workers < 1:
        parser.error("--seeds and --workers must be at least 1")
    return args


def main() -> None:
    args, ok = parse(), True
    transformers_logging.disable_progress_bar()
    if not args.write:
        check(args.results)
        chosen, seeds = wanted(args), range(args.seeds)
        # arm by arm: the first question is asked of all seeds before the second
        every = [Job(arm, seed) for arm in chosen for seed in seeds]
        jobs = to_do(every, args.results)
        folder = arms.RUNS / code()
        left = sum(job.minutes for job in jobs) / args.workers
        there = sum(job.result(args.results).exists() for job in every)
        print(
            f"{len(chosen)} arms of {args.seeds} seed(s), {len(every)} results: {there} are there. "
            f"About {timedelta(minutes=round(left))} h with {args.workers} at a time. Run folders: "
            f"{folder}",
            flush=True,
        )
        try:
            held = lock(folder)
        except ConfigError as error:
            sys.exit(f"error: {error}")
        with held or nullcontext():
            ok = run(jobs, args.workers, args.results)
    elif not page.read(args.results):
        sys.exit(
            f"error: {args.results} holds no results (ARM-seed0.json). Give --results a folder"
        )
    written = page.write(args.results, args.results.with_suffix(".md"), list(ARMS))
    print(written.read_text() if args.write else f"wrote {written}")
    if not ok:
        sys.exit("error: some arms failed (above). The same command tries them again")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("\nstopped. The same command goes on"))
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted. The same command goes on where it stopped")
