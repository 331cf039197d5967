"""reproduce.py and replication.py: the arms, what runs when, and what the results say."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import config
import replication
import reproduce
from reproduce import ARMS, Job

ROOT = Path(__file__).parent.parent
SETS = ("test", "test_pairs", "test_prior_breaking")


def result(arm: str, seed: int, numbers: dict, **changes) -> dict:
    """A result file's content, with the same numbers on every set, before and after RL."""
    sides = {side: {split: numbers[side] for split in SETS} for side in numbers}
    return {
        "arm": arm,
        "words": ARMS[arm].words,
        "seed": seed,
        "code": "abc",
        "commit": "c0ffee",
        "world": 2,
        "versions": {"torch": "2", "transformers": "5"},
        "machine": "m",
        "seconds": 60,
        "updates": 40,
        "completions": 7680,
        "prompts seen": 960,
        "metrics": sides,
        "curves": {},
    } | changes


def put(folder: Path, *results: dict) -> Path:
    folder.mkdir(exist_ok=True)
    for found in results:
        name = f"{found['arm']}-seed{found['seed']}.json"
        (folder / name).write_text(json.dumps(found))
    return folder


# --- arms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_is_a_configuration_of_train_py(arm):
    """Its options are taken, and but for them it is ours."""
    script, *words = Job(arm, 3).command()
    cfg = config.parse_config(words)
    assert script == "train.py" and cfg.seed == 3 and cfg.world.endswith("world-3")
    assert all(getattr(cfg, name) == value for name, value in ARMS[arm].options.items())
    if ARMS[arm].after:
        # the cold start that it takes over is one that train.py lets it share
        parent = config.parse_config(Job(arm, 3).after.command()[1:])
        assert all(getattr(cfg, name) == getattr(parent, name) for name in config.SHARED)


def test_arms_with_rl_make_equal_updates_of_equal_size():
    sizes = {
        (cfg.rl_steps, cfg.prompts_per_step, cfg.group_size)
        for arm in ARMS
        for cfg in [config.parse_config(Job(arm, 0).command()[1:])]
        if cfg.method != "sft"
    }
    assert len(sizes) == 1


def test_arms_that_select_take_the_scores_of_ours():
    order = list(ARMS)
    for name, arm in ARMS.items():
        assert not arm.after or order.index(arm.after) < order.index(name)
        two_stage = arm.options.get("four_stage") is False or arm.options.get("method") == "grpo"
        assert arm.after != "ours" or not two_stage


def test_tables_and_claims_need_only_known_arms():
    shown = {
        arm for arms in (*reproduce.TABLES.values(), *reproduce.FIGURES.values()) for arm in arms
    }
    assert shown <= set(ARMS)
    claims = [*replication.CRITERIA, *(c for some in replication.CLAIMS.values() for c in some)]
    assert {arm for c in claims for arm, _ in (c.more, c.less)} <= shown


def test_jobs_wait_for_their_world_and_their_cold_start(tmp_path, monkeypatch):
    """The world, then the arms that others share; what has a result is left out, but made again
    where an arm without one needs its folder."""
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    results = put(tmp_path / "results", result("cold", 0, {}), result("plain", 0, {}))
    every = [Job(arm, 0) for arm in ("cold", "plain", "ours", "easy")]
    jobs = [job.arm for job in reproduce.to_do(every, results)]
    assert jobs == ["", "cold", "ours", "easy"]
    put(results, result("ours", 0, {}), result("easy", 0, {}))
    assert reproduce.to_do(every, results) == []


def test_a_failure_stops_only_what_needs_it(tmp_path, monkeypatch):
    """With commands that only leave a mark; ours fails, and what shares it is not tried."""
    monkeypatch.setattr(reproduce, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(
        reproduce, "collect", lambda job, *rest: (job.folder / "result.json").touch()
    )
    code = (
        "import sys, time, pathlib; p = pathlib.Path(sys.argv[1]); p.mkdir(parents=True);"
        "(p / 'policy').touch(); time.sleep(0.2); sys.exit(sys.argv[2] == 'ours')"
    )

    def command(job):
        return ["-c", code, str(job.folder if job.arm else job.world), job.arm]

    monkeypatch.setattr(Job, "command", command)
    every = [Job(arm, seed) for arm in ("cold", "plain", "ours", "easy") for seed in (0, 1)]
    jobs = reproduce.to_do(every, tmp_path)
    assert not reproduce.run(jobs, 2, tmp_path)
    made = {str(p.relative_to(tmp_path / "runs")) for p in (tmp_path / "runs").rglob("result.json")}
    assert made == {f"seed-{s}/{arm}/result.json" for s in (0, 1) for arm in ("cold", "plain")}
    assert not (tmp_path / "runs/seed-0/easy").exists()


# --- what results say -----------------------------------------------------------------------------


def test_the_quantiles_are_student_s():
    """The density of t, integrated numerically."""
    x = np.linspace(0, 400, 2_000_001)
    for k, quantile in enumerate(replication.STUDENT, 1):
        density = (1 + x**2 / k) ** (-(k + 1) / 2)
        cumulated = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)]) * (
            x[1] - x[0]
        )
        # the tail beyond the grid: integral of x^-(k+1) times the leading constant
        tail = k ** ((k + 1) / 2) * 400.0**-k / k
        share = np.interp(quantile, x, cumulated) / (cumulated[-1] + tail)
        assert share == pytest.approx(0.95, abs=2e-4), k


def test_a_verdict_is_that_of_the_interval_over_seeds():
    claim = replication.Claim("c", ("ours", "after"), ("plain", "after"), "test", "accuracy", 1)
    numbers = [0.02, 0.03, 0.01, 0.02, 0.04]
    low, high = replication.interval(numbers)
    half = 2.776 * statistics.stdev(numbers) / 5**0.5
    assert (low, high) == pytest.approx((0.024 - half, 0.024 + half))
    assert replication.verdict(claim, numbers) == "holds"
    assert replication.verdict(claim, [-x for x in numbers]) == "does not hold"
    assert replication.verdict(claim, [0.02, -0.03, 0.01]) == "undecided"
    assert replication.verdict(claim, [0.5]) == "one seed: no interval"
    assert replication.verdict(claim, []) == "no result"
    less = replication.Claim("c", ("ours", "after"), ("plain", "after"), "test", "accuracy", -1)
    assert replication.verdict(less, [-x for x in numbers]) == "holds"
    ten = replication.Claim("c", claim.more, claim.less, "test", "accuracy", 1, least=0.1)
    assert replication.verdict(ten, [0.12, 0.13, 0.125]) == "holds"
    assert replication.verdict(ten, numbers) == "does not hold"


def test_differences_are_taken_seed_by_seed(tmp_path):
    """Only seeds that have both arms count, and `share` weighs the second side."""
    folder = put(
        tmp_path / "r",
        *(result("ours", s, {"after": {"accuracy": 0.8 + s / 100}}) for s in (0, 1, 2)),
        *(result("plain", s, {"after": {"accuracy": 0.7}}) for s in (1, 2, 3)),
    )
    arms = replication.by_arm(replication.read(folder))
    claim = replication.Claim("c", ("ours", "after"), ("plain", "after"), "test", "accuracy", 1)
    assert replication.differences(claim, arms) == pytest.approx({1: 0.11, 2: 0.12})
    claim = replication.Claim("c", claim.more, claim.less, "test", "accuracy", 1, share=0.5)
    assert replication.differences(claim, arms) == pytest.approx({1: 0.46, 2: 0.47})


def test_results_of_other_code_or_another_world_are_never_mixed(tmp_path, monkeypatch):
    folder = put(tmp_path / "r", result("ours", 0, {}), result("ours", 1, {}, code="def"))
    with pytest.raises(SystemExit, match="code abc, world 2; code def, world 2"):
        replication.by_arm(replication.read(folder))
    folder = put(tmp_path / "s", result("ours", 0, {}))
    monkeypatch.setattr(reproduce, "code", lambda: "abc")
    reproduce.check(folder)
    monkeypatch.setattr(reproduce, "code", lambda: "xyz")
    with pytest.raises(
        SystemExit, match="code abc, world 2; here xyz, 2.*worktree add ../there c0"
    ):
        reproduce.check(folder)


def test_the_code_of_a_result_is_what_decides_its_numbers(tmp_path, monkeypatch):
    """Comments, docstrings and the help of an option do not change it; a number does."""
    (tmp_path / "engine").mkdir()
    source = '"""Doc."""\n\n\ndef f(x):\n    """Say."""\n    return option(x + 1, help="some")\n'
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)

    def code(text: str) -> str:
        (tmp_path / "engine/vlm.py").write_text(text)
        return reproduce.code.__wrapped__()

    first = code(source)
    for old, new in (("Doc", "Other"), ("Say", "Tell"), ("some", "more"), ("x + 1", "x+1  # one")):
        assert code(source.replace(old, new)) == first
    assert code(source.replace("x + 1", "x + 2")) != first
    (tmp_path / "report.py").write_text("1")  # decides no number
    assert code(source) == first


def test_the_page_keeps_what_is_written_by_hand(tmp_path):
    """It says which arms have no result, and that one seed gives no interval."""
    folder = put(
        tmp_path / "r",
        result("cold", 0, {"before": {"accuracy": 0.6, "right, caption wrong": 0.2}}),
        result("plain", 0, {
            "before": {"accuracy": 0.6, "right, caption wrong": 0.2},
            "after": {"accuracy": 0.8, "right, caption wrong": 0.35},
        }),
    )  # fmt: skip
    page = tmp_path / "page.md"
    page.write_text("# By hand\n")
    text = replication.write(folder, page, list(ARMS)).read_text()
    assert text.startswith("# By hand\n") and text.count(replication.MARK) == 1
    assert "| accuracy | +10.0 | - | 1 | one seed: no interval |" in text.replace("+20.0", "+10.0")
    assert (
        "Not measured yet: ours beats" in text
        and "| plain four-stage GRPO | 1 | 960 | 80.0 |" in text
    )
    again = replication.write(folder, page, list(ARMS)).read_text()
    assert again == text


def test_the_committed_page_is_what_its_results_say(tmp_path):
    """docs/replication.md below its mark follows from docs/replication/ alone."""
    page, folder = ROOT / "docs/replication.md", ROOT / "docs/replication"
    if not folder.exists():
        pytest.skip("no results are committed")
    copy = tmp_path / "replication.md"
    copy.write_text(page.read_text().split(replication.MARK)[0])
    (tmp_path / "replication").mkdir()
    for file in folder.glob("*.json"):
        (tmp_path / "replication" / file.name).write_text(file.read_text())
    assert (
        replication.write(tmp_path / "replication", copy, list(ARMS)).read_text()
        == page.read_text()
    )
    for name in re.findall(r"\]\((replication/\S+\.svg)\)", page.read_text()):
        assert (folder.parent / name).exists(), name


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "say what: --table, --figure"),
        (["--table", "5"], "invalid choice: '5'"),
        (["--all", "--seeds", "0"], "must be at least 1"),
    ],
)
def test_bad_options_are_one_line(options, says):
    done = subprocess.run(
        [sys.executable, "reproduce.py", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and says in done.stderr.splitlines()[-1]
