"""The arms of the paper's tables and figures: options of train.py, and where their runs are."""

import ast
import hashlib
import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

from config import Config

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "runs" / "replication"  # a folder for each code, so that no run is taken for another
CODE = (  # what decides the numbers of a result, beside the values of the options
    "answers caption_reward config conflict corruption data grpo measures negatives ntk_infonce "
    "ovip preference reasoning rewards rollouts selection stress train variance_select engine/* "
    "world/*"
).split()
PLAIN = {"caption_reward": "", "selection": False, "nce_weight": 0.0}
TWO_STAGE = {"four_stage": False, "caption_reward": ""}
ALONE = {"selection": False, "nce_weight": 0.0}
SHARING = {"train_set": "train_shared"}
BASE = {"method": "sft", **TWO_STAGE, "sft_steps": 0}
CUES = ("blank", "random_media", "remove_text")  # BI, RI, TR of Hallucination-as-Cue
# Figure 5: beside tau 0.54, weight 0.01 and the reference answer as y_i
TAUS, WEIGHTS = (0.1, 0.3, 0.7, 0.9), (0.1, 1.0)
FEATURES = ("own_prefix", "best", "advantage", "greedy", "hidden_mean")
CUE = {"method": "grpo", "corrupt_eval": " ".join(CUES)}


@dataclass(frozen=True)
class Arm:
    """One way to train: options of train.py, the arm whose cold start it takes over, and what it is
    in words."""

    words: str
    options: dict
    after: str = ""
    minutes: float = 3.5  # on one of two busy cores, for the estimate

    def decisive(self) -> dict:
        """Every option that decides its numbers, those by default too."""
        return decisive(Config(**self.options))


ARMS = {  # in the order in which they run
    "cold": Arm("cold start", {"method": "sft"}),
    # one idea at a time, then all
    "plain": Arm("plain four-stage GRPO", PLAIN, "cold"),
    "caption": Arm("plain + Caption Reward", ALONE, "cold"),
    "ours": Arm("ours", {}, "cold", 10),
    "no-reward": Arm("ours without Caption Reward", {"caption_reward": ""}, "ours"),
    "full": Arm("ours without selection: all prompts", {"selection": False}, "ours"),
    "no-eq4": Arm("ours without Eq. 4", {"nce_weight": 0.0}, "ours"),
    "select": Arm("plain + selection", {"caption_reward": "", "nce_weight": 0.0}, "ours"),
    "eq4": Arm("plain + Eq. 4", {"caption_reward": "", "selection": False}, "cold"),
    "within": Arm("ours, top half of each kind", {"select_within": "category"}, "ours"),
    # two stages, Tables 1 and 2
    "cold2": Arm("two-stage cold start", {"method": "sft", **TWO_STAGE}),
    "grpo": Arm("two-stage GRPO", {"method": "grpo"}, "cold2"),
    "base": Arm("base policy, asked directly", BASE, minutes=1),
    "no-stage": Arm("ours without caption stage", TWO_STAGE, "cold2", 10),
    # Table 3
    "easy": Arm("ours, easy prompts", {"select_class": "easy", "keep": 1.0}, "ours"),
    "hard": Arm("ours, hard prompts", {"select_class": "hard", "keep": 1.0}, "ours"),
    "medium": Arm("ours, medium prompts", {"select_class": "medium", "keep": 1.0}, "ours"),
    "top30": Arm("ours, top 30 % of medium", {"select_class": "medium", "keep": 0.3}, "ours"),
    "top60": Arm("ours, top 60 % of medium", {"select_class": "medium", "keep": 0.6}, "ours"),
    # Table 4, Figure 5
    "shuffled": Arm("ours, Eq. 4 with shuffled positives", {"nce_control": True}, "ours"),
    **{f"tau-{x}": Arm(f"ours, tau {x}", {"tau": x}, "ours") for x in TAUS},
    **{f"weight-{x}": Arm(f"ours, Eq. 4 times {x}", {"nce_weight": x}, "ours") for x in WEIGHTS},
    **{f"feature-{x}": Arm(f"ours, y_i {x}", {"nce_feature": x}, "ours") for x in FEATURES},
    # Hallucination-as-Cue: trained on each input, tested on all
    "cue": Arm("RL on intact inputs", CUE, "cold2", 5),
    **{f"cue-{x}": Arm(f"RL on {x}", CUE | {"corrupt_train": x}, "cold2", 5) for x in CUES},
    # the caption rewards of other papers, each added to plain GRPO; the last two with prompts of
    # which three ask about one picture
    "self": Arm("plain + self", ALONE | {"caption_reward": "self"}, "cold", 5),
    "gain": Arm("plain + gain", ALONE | {"caption_reward": "gain"}, "cold"),
    "shared": Arm("plain + shared", ALONE | SHARING | {"caption_reward": "shared"}, "cold"),
    "unshared": Arm("plain + Caption Reward, the prompts of shared", ALONE | SHARING, "cold"),
    "ovip": Arm("OViP", {"method": "ovip"}, "cold"),
}
TABLES = {
    "1": ("base", "cold", "grpo", "plain", "ours"),
    "2": ("cold", "plain", "caption", "no-stage", "no-reward", "ours"),
    "3": tuple("cold plain full easy hard medium top30 top60 within select ours".split()),
    "4": ("cold", "no-eq4", "eq4", "plain", "shuffled", "caption", "full", "ours"),
    "cue": ("cue", *(f"cue-{x}" for x in CUES)),  # the grid of Hallucination-as-Cue
    "neighbours": tuple("cold plain caption self gain unshared shared ovip ours".split()),
}
BASIS = {"cold", "plain", "caption", "ours"}  # arms of several tables
FIGURES = {
    "1b": ("full", "easy", "hard", "medium", "top30", "top60", "ours"),
    "3": ("full",),
    "4": ("cold", "full", "easy", "hard", "medium", "top30", "top60"),
    "5": ("cold", "ours", "no-eq4", *(a for a in ARMS if a.startswith(("tau", "feat", "wei")))),
}
# plain GRPO, ours, and what each idea brings; two seeds take less than an hour on two cores
QUICK = "base cold plain caption ours no-reward full no-eq4 cold2 grpo".split()

REPRESENTED = ("ours", "no-eq4")  # arms whose final-layer representations are kept


@dataclass(frozen=True)
class Job:
    """The world of a seed (arm ""), or one arm on it."""

    arm: str
    seed: int

    @property
    def world(self) -> Path:
        return RUNS / code() / f"world-{self.seed}"

    @property
    def folder(self) -> Path:
        return RUNS / code() / f"seed-{self.seed}" / (self.arm or "world")

    @property
    def after(self) -> "Job | None":
        return Job(ARMS[self.arm].after, self.seed) if self.arm else None

    @property
    def minutes(self) -> float:
        return ARMS[self.arm].minutes if self.arm else 8.0

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


def decisive(cfg: Config) -> dict:
    """Every option that decides the numbers of a run, those by default too."""
    free = {"world", "output_dir", "share", "seed", "quiet"} | cfg.resumable
    return {f.name: getattr(cfg, f.name) for f in fields(Config) if f.name not in free}


@cache
def code() -> str:
    """The `fingerprint` when this process began."""
    return fingerprint()


def fingerprint() -> str:
    """A hash of CODE that comments, docstrings and the options' defaults, bounds and words do not
    change (each result keeps its options), and that is the same under every version of Python."""

    def outline(node) -> list:
        if isinstance(node, list):
            return [outline(x) for x in node]
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "option":
            return ["option"]
        if not isinstance(node, ast.AST):
            return [repr(node)]
        parts = {name: x for name, x in ast.iter_fields(node) if x not in (None, [])}
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            parts["body"] = parts["body"][1:]
        return [type(node).__name__, *([name, outline(x)] for name, x in parts.items())]

    files = sorted(file for name in CODE for file in ROOT.glob(f"{name}.py"))
    trees = [[file.name, outline(ast.parse(file.read_text(encoding="utf-8")))] for file in files]
    return hashlib.sha256(json.dumps(trees).encode()).hexdigest()[:10]
