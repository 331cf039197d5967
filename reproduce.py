"""The paper in miniature: every arm of its tables, over seeds, each with a world of its own.

    python reproduce.py --quick                    # two seeds of Tables 1 to 4, within an hour
    python reproduce.py --all --seeds 5            # everything in docs/replication.md
    python reproduce.py --table 2 --figure 4       # what these need
    python reproduce.py --write                    # tables and figures from the results alone

An arm is train.py with other options. The arms of a seed share its world and its cold start, and
all make the same number of updates with as many completions, so they differ in RL alone; how many
prompts they see is counted. What is finished is skipped, and an interrupted arm goes on from its
last checkpoint. Each arm and seed leaves one small JSON file in docs/replication/, from which
replication.py writes docs/replication.md. Results of another commit or world are never mixed.
"""

import argparse
import ast
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path

import torch
import transformers
import yaml

import data
import ntk_infonce
import replication
import world
from config import Config
from engine.files import read_jsonl, rewrite
from engine.pretrained import open_policy

ROOT = Path(__file__).parent
RUNS = ROOT / "runs" / "replication"
CODE = (  # what decides the numbers of a result
    "answers caption_reward config conflict data grpo measures ntk_infonce reasoning rollouts "
    "selection train variance_select engine/* world/*"
).split()
PLAIN = {"caption_reward": False, "selection": False, "nce_weight": 0.0}
TWO_STAGE = {"four_stage": False, "caption_reward": False}
BASE = {"method": "sft", **TWO_STAGE, "sft_steps": 0}


@dataclass(frozen=True)
class Arm:
    """One way to train: options of train.py, the arm whose cold start it takes over, and what it is
    in words."""

    words: str
    options: dict
    after: str = ""
    minutes: float = 2.0  # on one core, for the estimate


ARMS = {  # in the order in which they run
    "cold": Arm("cold start", {"method": "sft"}),
    # one idea at a time, then all
    "plain": Arm("plain four-stage GRPO", PLAIN, "cold"),
    "caption": Arm("plain + Caption Reward", {"selection": False, "nce_weight": 0.0}, "cold"),
    "ours": Arm("ours", {}, "cold", 4),
    "no-reward": Arm("ours without Caption Reward", {"caption_reward": False}, "ours"),
    "full": Arm("ours without selection: all prompts", {"selection": False}, "ours"),
    "no-eq4": Arm("ours without Eq. 4", {"nce_weight": 0.0}, "ours"),
    "select": Arm("plain + selection", {"caption_reward": False, "nce_weight": 0.0}, "ours"),
    "eq4": Arm("plain + Eq. 4", {"caption_reward": False, "selection": False}, "cold"),
    "within": Arm("ours, top half of each kind", {"select_within": "category"}, "ours"),
    # two stages, Tables 1 and 2
    "cold2": Arm("two-stage cold start", {"method": "sft", **TWO_STAGE}),
    "grpo": Arm("two-stage GRPO", {"method": "grpo"}, "cold2"),
    "base": Arm("base policy, asked directly", BASE, minutes=1),
    "no-stage": Arm("ours without caption stage", TWO_STAGE, "cold2", 4),
    # Table 3
    "easy": Arm("ours, easy prompts", {"select_class": "easy", "keep": 1.0}, "ours"),
    "hard": Arm("ours, hard prompts", {"select_class": "hard", "keep": 1.0}, "ours"),
    "medium": Arm("ours, medium prompts", {"select_class": "medium", "keep": 1.0}, "ours"),
    "top30": Arm("ours, top 30 % of medium", {"select_class": "medium", "keep": 0.3}, "ours"),
    "top60": Arm("ours, top 60 % of medium", {"select_class": "medium", "keep": 0.6}, "ours"),
    # Table 4, Figure 5
    "shuffled": Arm("ours, Eq. 4 with shuffled positives", {"nce_control": True}, "ours"),
    **{f"tau-{x}": Arm(f"ours, tau {x}", {"tau": x}, "ours") for x in (0.1, 0.3, 0.7, 0.9)},
    **{f"weight-{x}": Arm(f"ours, Eq. 4 times {x}", {"nce_weight": x}, "ours") for x in (0.1, 1.0)},
    **{
        f"feature-{name}": Arm(f"ours, y_i {name}", {"nce_feature": name}, "ours")
        for name in ("own_prefix", "best", "advantage", "greedy", "hidden_mean")
    },
}
TABLES = {
    "1": ("base", "cold", "grpo", "plain", "ours"),
    "2": ("cold", "plain", "caption", "no-stage", "no-reward", "ours"),
    "3": ("cold", "full", "easy", "hard", "medium", "top30", "top60", "within", "select", "ours"),
    "4": ("cold", "no-eq4", "eq4", "plain", "shuffled", "caption", "full", "ours"),
}
FIGURES = {
    "1b": ("full", "easy", "hard", "medium", "top30", "top60", "ours"),
    "3": ("full",),
    "4": ("cold", "full", "easy", "hard", "medium", "top30", "top60"),
    "5": ("cold", "ours", "no-eq4", *(a for a in ARMS if a.startswith(("tau", "feat", "wei")))),
}

REPRESENTED = ("ours", "no-eq4")  # arms whose final-layer representations are kept


@dataclass(frozen=True)
class Job:
    """The world of a seed (arm ""), or one arm on it."""

    arm: str
    seed: int

    @property
    def world(self) -> Path:
        return RUNS / f"world-{self.seed}"

    @property
    def folder(self) -> Path:
        return RUNS / f"seed-{self.seed}" / self.arm

    @property
    def after(self) -> "Job | None":
        return Job(ARMS[self.arm].after, self.seed) if self.arm else None

    @property
    def minutes(self) -> float:
        return ARMS[self.arm].minutes if self.arm else 5.0

    @property
    def done(self) -> bool:
        """Is its run folder (its world) there and finished?"""
        last = "policy" if not self.arm else "result.json"
        return ((self.folder if self.arm else self.world) / last).exists()

    def result(self, results: Path) -> Path:
        return results / f"{self.arm}-seed{self.seed}.json"

    def command(self) -> list[str]:
        if not self.arm:
            return ["-m", "world", "--out", str(self.world), "--seed", str(self.seed), "--quiet"]
        options = {"world": self.world, "seed": self.seed, "output_dir": self.folder}
        options |= {"quiet": True, **ARMS[self.arm].options}
        if ARMS[self.arm].after:
            options["share"] = self.after.folder
        return ["train.py", *(f"--{name}={value}" for name, value in options.items())]


def wanted(args: argparse.Namespace) -> list[str]:
    """The arms that the tables and figures asked for need, parents first."""
    tables = list(TABLES) if args.all or args.quick else args.table
    figures = list(FIGURES) if args.all else args.figure
    asked = {arm for name in tables for arm in TABLES[name]}
    asked |= {arm for name in figures for arm in FIGURES[name]} | set(args.arm)
    for arm in list(asked):
        while arm := ARMS[arm].after:
            asked.add(arm)
    return [arm for arm in ARMS if arm in asked]


def to_do(every: list[Job], results: Path) -> list[Job]:
    """The jobs without a result, and those whose run folder (world) they need and do not find."""
    jobs: dict[Job, None] = {}

    def add(job: Job) -> None:
        if (needs := job.after) and not needs.done:
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
    threads = max(1, (os.cpu_count() or 1) // workers)
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
                    job.folder.parent.mkdir(parents=True, exist_ok=True)
                    log = job.folder.parent / f"{job.arm or 'world'}.log"
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
                if child.returncode == 0 and job.arm:
                    collect(job, seconds, threads, results)
                ok = child.returncode == 0
                what = f"seed {job.seed}: {ARMS[job.arm].words if job.arm else 'its world'}"
                print(f"{'done  ' if ok else 'FAILED'} {seconds:4.0f} s  {what}", flush=True)
                if not ok:
                    failed.add(job)
                    print("\n".join(log.read_text().splitlines()[-5:]) + f"\n(all of it: {log})")
    finally:
        for child, _, _ in running.values():
            child.terminate()
    return not failed


def collect(job: Job, seconds: float, threads: int, results: Path) -> None:
    """What is kept of a finished arm: RESULTS/ARM-seedN.json."""
    folder, selected = job.folder, job.folder / "select" / "selected.json"
    evals = {side: folder / "eval" / f"{side}.json" for side in ("before", "after")}
    rolls = read_jsonl(folder / "rl" / "rollouts.jsonl", repair=False)
    found = {
        "arm": job.arm,
        "words": ARMS[job.arm].words,
        "seed": job.seed,
        "options": ARMS[job.arm].options,
        **provenance(job.world),
        "machine": f"{platform.machine()}, {threads} thread(s)",
        "seconds": round(seconds),
        "updates": len({line["step"] for line in rolls}),
        "completions": sum(len(line["text"]) for line in rolls),
        "prompts seen": len({line["id"] for line in rolls}),
        "variance seen": variance_seen(job, rolls),
        "selected": json.loads(selected.read_text()) if selected.exists() else {},
        "metrics": {
            side: {
                split: replication.values(scored["metrics"])
                for split, scored in json.loads(file.read_text()).items()
            }
            for side, file in evals.items()
            if file.exists()
        },
        "curves": curves(job, rolls),
        "representations": representations(job) if job.arm in REPRESENTED else {},
    }
    found["selected"].pop("kept", None)
    results.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found)
    rewrite(job.result(results), text)
    rewrite(folder / "result.json", text)


def scored(job: Job) -> dict[str, dict]:
    """The scores of the seed's prompts by id, from the arm that scored them all."""
    file = Job("ours", job.seed).folder / "select" / "scores.jsonl"
    return {line["id"]: line for line in read_jsonl(file, repair=False)}


def variance_seen(job: Job, rolls: list[dict]) -> float | None:
    """Mean over the prompts of all updates of their reward variance before RL."""
    scores = scored(job)
    known = [scores[line["id"]]["variance"] for line in rolls if line["id"] in scores]
    return round(sum(known) / len(known), 5) if known else None


def curves(job: Job, rolls: list[dict]) -> dict:
    """Means over every fifth of the updates: the metrics, and the rewards by class of prompt."""
    metrics = read_jsonl(job.folder / "rl" / "metrics.jsonl", repair=False)
    if not metrics:
        return {}
    kind = {name: line["class"] for name, line in scored(job).items()}
    last = max(line["step"] for line in metrics)

    def fifth(line: dict) -> int:
        return (line["step"] - 1) * 5 // last

    sums: dict[str, list[list[float]]] = defaultdict(lambda: [[] for _ in range(5)])
    for line in metrics:
        for name, value in line.items():
            if isinstance(value, int | float) and name not in ("step", "lr", "seconds"):
                sums[name][fifth(line)].append(value)
    for line in rolls:
        for name in ("accuracy", "caption"):
            known = [r for r in line.get(name, ()) if r is not None]
            if known and line["id"] in kind:
                sums[f"{name}, {kind[line['id']]}"][fifth(line)] += known
    return {
        name: [round(sum(v) / len(v), 5) if v else None for v in parts]
        for name, parts in sorted(sums.items())
    }


def representations(job: Job, n: int = 129) -> dict:
    """Figure 5b, c. Final-layer representations of n prompts (mean over the tokens of the reference
    answer) before and after RL. By the cosines of f_i before, prompts are positives of an anchor of
    Eq. 4 (cosine <= tau) or negatives.

    positive, negative: mean distance to the anchor over mean distance of all pairs, over all
    anchors. points: the first two principal components, shown for the first anchor.
    """
    cfg = Config(**yaml.safe_load((job.folder / "config.yaml").read_text()))
    rows = data.load(Path(cfg.world) / "data")["train"][:n]
    positive, found = None, {}
    for side, stage in (("before", "sft"), ("after", "rl")):
        policy = open_policy(str(job.folder / stage / "policy"), cfg, "cpu")
        inputs = policy.encode(data.prompts(rows, cfg.four_stage, cfg.fps, cfg.max_frames))
        ids, mask = policy.encode_responses([f"<answer>{s.answer}</answer>" for s in rows])
        with torch.no_grad():
            hidden = policy(inputs, ids, mask).hidden
            weight, bias = policy.head()
            where = mask.nonzero(as_tuple=True)
            tokens, scale = hidden[where], 1 / mask.sum((1, 2))[where[0], None]
            cosine = ntk_infonce.gradient_cosine(
                tokens * scale, tokens @ weight.T + bias, ids[where], where[0], n
            )
        others = ~torch.eye(n, dtype=torch.bool)
        if positive is None:
            positive = (cosine <= cfg.tau) & others
        mean = (hidden * mask[..., None]).sum((1, 2)) / mask.sum((1, 2))[:, None]
        distance = torch.cdist(mean, mean)
        distance /= distance[others].mean()
        centred = mean - mean.mean(0)
        axes = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
        flat = centred @ (axes * axes.sum(1, keepdim=True).sign()).T
        found[side] = {
            "positive": round(distance[positive].mean().item(), 4),
            "negative": round(distance[~positive & others].mean().item(), 4),
            "share positive": round(positive[others].float().mean().item(), 4),
            "points": [[round(x, 2) for x in point] for point in flat.tolist()],
        }
    return found | {"is positive": positive[0].int().tolist()}


def provenance(folder: Path) -> dict:
    """The code, the world and the versions behind a result."""
    return {
        "code": code(),
        "commit": commit(),
        "world": json.loads((folder / "world.json").read_text())["version"],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


@cache
def code() -> str:
    """A hash of CODE that comments, docstrings and the help of options do not change, and that is
    the same under every version of Python."""

    def outline(node) -> list:
        if isinstance(node, list):
            return [outline(x) for x in node if not isinstance(x, ast.keyword) or x.arg != "help"]
        if not isinstance(node, ast.AST):
            return [repr(node)]
        fields = {name: x for name, x in ast.iter_fields(node) if x not in (None, [])}
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            fields["body"] = fields["body"][1:]
        return [type(node).__name__, *([name, outline(x)] for name, x in fields.items())]

    files = sorted(file for name in CODE for file in ROOT.glob(f"{name}.py"))
    trees = [[file.name, outline(ast.parse(file.read_text(encoding="utf-8")))] for file in files]
    return hashlib.sha256(json.dumps(trees).encode()).hexdigest()[:10]


def commit() -> str:
    """The commit of the folder, with "+" where files differ from it; "" without git."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    return git("rev-parse", "--short=10", "HEAD") + "+" * bool(git("status", "--porcelain", "-uno"))


def check(results: Path) -> None:
    """Exit where the results there are of other code or another world: new ones would mix with
    them."""
    here = code(), world.VERSION
    for found in replication.read(results):
        if (found["code"], found["world"]) != here:
            sys.exit(
                f"error: {results} holds results of other code or another world (code "
                f"{found['code']}, world {found['world']}; here {here[0]}, {here[1]}). They are "
                "not mixed: give another --results, or work at their commit (git worktree add "
                f"../there {found['commit']})"
            )


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
    add("--quick", action="store_true", help="all tables with two seeds")
    add("--write", action="store_true", help="train nothing; write what the results there give")
    add("--seeds", type=int, help="how many, from 0 (default: 5; 2 with --quick)")
    add("--workers", type=int, default=os.cpu_count() or 1, help=
        "arms at a time (default: one on each core)")
    add("--results", type=Path, default=ROOT / "docs" / "replication", help=
        "folder of the result files (default: docs/replication)")
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
    if not args.write:
        check(args.results)
        arms, seeds = wanted(args), range(args.seeds)
        # arm by arm: the first question is asked of all seeds before the second
        every = [Job(arm, seed) for arm in arms for seed in seeds]
        jobs = to_do(every, args.results)
        left = sum(job.minutes for job in jobs) / args.workers
        there = sum(job.result(args.results).exists() for job in every)
        print(
            f"{len(arms)} arms of {args.seeds} seed(s), {len(every)} results: {there} are there. "
            f"About {timedelta(minutes=round(left))} h with {args.workers} at a time. Run folders: "
            f"{RUNS}",
            flush=True,
        )
        ok = run(jobs, args.workers, args.results)
    page = replication.write(args.results, ROOT / "docs" / "replication.md", list(ARMS))
    print(page.read_text() if args.write else f"wrote {page}")
    if not ok:
        sys.exit("error: some arms failed (above). The same command tries them again")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted. The same command goes on where it stopped")
