"""reproduce.py and replication/: the arms, what runs when, and what the results say."""

import json
import re
import statistics
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import commands
import numpy as np
import pytest

import config
import reproduce
import world
from engine import ConfigError
from replication import arms, collect, page
from replication.arms import ARMS, FIGURES, PLAIN, QUICK, TABLES, Job
from replication.claims import CLAIMS, CRITERIA, IDEAS, Claim
from world import scenes

ROOT = Path(__file__).parent.parent
SETS = ("test", "test_pairs", "test_prior_breaking")


def result(arm: str, seed: int, numbers: dict, **changes) -> dict:
    """A result file's content, with the same numbers on every set, before and after RL."""
    sides = {
        side: {split: {"by category": {}} | numbers[side] for split in SETS} for side in numbers
    }
    return {
        "arm": arm,
        "words": ARMS[arm].words,
        "seed": seed,
        "begins as": "cold",
        "start": "s",
        "floor": {},
        "representations": {},
        "options": ARMS[arm].options,
        "config": ARMS[arm].decisive(),
        "models": "m",
        "code": "abc",
        "commit": "c0ffee",
        "world": world.VERSION,
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
    shown = {arm for some in (*TABLES.values(), *FIGURES.values()) for arm in some}
    assert shown <= set(ARMS)
    claims = [*CRITERIA, *(c for _, some in CLAIMS.values() for c in some)]
    assert {arm for c in claims for arm, _ in (c.more, c.less)} <= shown
    assert {arm for _, *both in IDEAS for arm in both} <= shown and set(QUICK) <= set(ARMS)
    for command, some in CLAIMS.values():  # the command beside them runs what they compare
        needed = {arm for c in some for arm, _ in (c.more, c.less)}
        what, name = command.split()
        assert needed <= set((TABLES if what == "--table" else FIGURES)[name]), command


def test_jobs_wait_for_their_world_and_their_cold_start(tmp_path, monkeypatch):
    """The world, then the arms that others share; what has a result is left out, but made again
    where an arm without one needs its folder."""
    monkeypatch.setattr(arms, "RUNS", tmp_path / "runs")
    results = put(tmp_path / "results", result("cold", 0, {}), result("plain", 0, {}))
    every = [Job(arm, 0) for arm in ("cold", "plain", "ours", "easy")]
    jobs = [job.arm for job in reproduce.to_do(every, results)]
    assert jobs == ["", "cold", "ours", "easy"]
    put(results, result("ours", 0, {}), result("easy", 0, {}))
    assert reproduce.to_do(every, results) == []


def test_a_failure_stops_only_what_needs_it(tmp_path, monkeypatch):
    """With commands that only leave a mark; ours fails, and what shares it is not tried."""
    monkeypatch.setattr(arms, "RUNS", tmp_path / "runs")
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
    here = tmp_path / "runs" / arms.code()
    made = {str(p.relative_to(here)) for p in here.rglob("result.json")}
    assert made == {f"seed-{s}/{arm}/result.json" for s in (0, 1) for arm in ("cold", "plain")}
    assert not (here / "seed-0/easy").exists()


# --- what results say -----------------------------------------------------------------------------


def test_the_quantiles_are_student_s():
    """The density of t, integrated numerically."""
    x = np.linspace(0, 400, 2_000_001)
    for k, quantile in enumerate(page.STUDENT, 1):
        density = (1 + x**2 / k) ** (-(k + 1) / 2)
        cumulated = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)]) * (
            x[1] - x[0]
        )
        # the tail beyond the grid: integral of x^-(k+1) times the leading constant
        tail = k ** ((k + 1) / 2) * 400.0**-k / k
        share = np.interp(quantile, x, cumulated) / (cumulated[-1] + tail)
        assert share == pytest.approx(0.95, abs=2e-4), k


def test_a_verdict_is_that_of_the_interval_over_seeds():
    claim = Claim("c", ("ours", "after"), ("plain", "after"), "test", "accuracy", 1)
    numbers = [0.02, 0.03, 0.01, 0.02, 0.04]
    low, high = page.interval(numbers)
    half = 2.776 * statistics.stdev(numbers) / 5**0.5
    assert (low, high) == pytest.approx((0.024 - half, 0.024 + half))
    assert page.verdict(claim, numbers) == "holds"
    assert page.verdict(claim, [-x for x in numbers]) == "does not hold"
    assert page.verdict(claim, [0.02, -0.03, 0.01]) == "undecided"
    assert page.verdict(claim, [0.5]) == "one seed: no interval"
    assert page.verdict(claim, []) == "no result"
    less = Claim("c", ("ours", "after"), ("plain", "after"), "test", "accuracy", -1)
    assert page.verdict(less, [-x for x in numbers]) == "holds"
    ten = Claim("c", claim.more, claim.less, "test", "accuracy", 1, least=0.1)
    assert page.verdict(ten, [0.12, 0.13, 0.125]) == "holds"
    assert page.verdict(ten, numbers) == "does not hold"


def test_differences_are_taken_seed_by_seed(tmp_path):
    """Only seeds that have both arms count, and `share` weighs the second side."""
    folder = put(
        tmp_path / "r",
        *(result("ours", s, {"after": {"accuracy": 0.8 + s / 100}}) for s in (0, 1, 2)),
        *(result("plain", s, {"after": {"accuracy": 0.7}}) for s in (1, 2, 3)),
    )
    found = page.by_arm(page.read(folder))
    claim = Claim("c", ("ours", "after"), ("plain", "after"), "test", "accuracy", 1)
    assert page.differences(claim, found) == pytest.approx({1: 0.11, 2: 0.12})
    claim = Claim("c", claim.more, claim.less, "test", "accuracy", 1, share=0.5)
    assert page.differences(claim, found) == pytest.approx({1: 0.46, 2: 0.47})


def test_the_summary_of_the_ideas_by_hand(tmp_path):
    """Each idea's mean difference and interval; bold where the interval leaves out 0."""
    gains = {"caption": (0.02, 0.03, 0.04), "select": (-0.1, 0.0, 0.1)}
    some = [result("plain", s, {"after": {"accuracy": 0.5}}) for s in range(3)]
    some += [
        result(arm, s, {"after": {"accuracy": 0.5 + gain}})
        for arm, by_seed in gains.items()
        for s, gain in enumerate(by_seed)
    ]
    table = page.idea_table(page.by_arm(some)).splitlines()
    name = "| Caption Reward, added to plain GRPO | 3 |"
    assert table[2].startswith(f"{name} **+3.0 [+0.5, +5.5]** better |")
    assert table[3].startswith("| selection, added to plain GRPO | 3 | +0.0 [-24.8, +24.8] |")
    assert len(table) == 4, "an idea without results has no row"
    one = [found for found in some if found["seed"] == 1]
    assert "added to plain GRPO | 1 | +3.0 |" in page.idea_table(page.by_arm(one))


def test_results_of_other_code_or_another_world_are_never_mixed(tmp_path, monkeypatch):
    for other, says in (
        ({"seed": 1, "code": "def"}, "differ in code or world"),
        ({"seed": 1, "config": {"tau": 0.5}}, "differ in options"),
        ({"arm": "plain", "models": "other"}, "differ in models of the world, or versions"),
        (
            {"arm": "plain", "versions": {"torch": "1"}},
            "differ in models of the world, or versions",
        ),
        ({"arm": "plain", "start": "other"}, "differ in cold start"),
    ):
        both = [result("ours", 0, {}), result("ours", 0, {}) | other]
        with pytest.raises(SystemExit, match=f"{says} .*and are not mixed"):
            page.by_arm(both)
    page.by_arm([result("ours", 0, {}), result("grpo", 0, {}, start="x", **{"begins as": "cold2"})])
    folder = put(tmp_path / "s", result("ours", 0, {}))
    monkeypatch.setattr(reproduce, "code", lambda: "abc")
    reproduce.check(folder)
    monkeypatch.setattr(reproduce, "code", lambda: "xyz")
    with pytest.raises(SystemExit, match="code abc, world .; here xyz, .*worktree add ../there c0"):
        reproduce.check(folder)


def test_the_code_of_a_result_is_what_decides_its_numbers(tmp_path, monkeypatch):
    """Comments, docstrings and the values of options do not change it; a number does."""
    (tmp_path / "engine").mkdir()
    source = '"""Doc."""\n\n\ndef f(x):\n    """Say."""\n    return x + 1\n\n\na = option(5)\n'
    monkeypatch.setattr(arms, "ROOT", tmp_path)

    def code(text: str) -> str:
        (tmp_path / "engine/vlm.py").write_text(text)
        return arms.fingerprint()

    first = code(source)
    for old, new in (
        ("Doc", "Other"),
        ("Say", "Tell"),
        ("option(5)", "option(6)"),
        ("x + 1", "x  +  1"),
        ("return", "# one\n    return"),
    ):
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
    file = tmp_path / "page.md"
    file.write_text("# By hand\n")
    text = page.write(folder, file, list(ARMS)).read_text()
    assert text.startswith("# By hand\n") and text.count(page.MARK) == 1
    assert "| accuracy | +10.0 | - | 1 | one seed: no interval |" in text.replace("+20.0", "+10.0")
    assert (
        "Not measured yet: two-stage GRPO, after RL against before it, answers" in text
        and "| plain four-stage GRPO | 1 | 960 | 80.0 |" in text
    )
    again = page.write(folder, file, list(ARMS)).read_text()
    assert again == text


def test_the_grid_has_each_training_on_each_input(tmp_path):
    """Hallucination-as-Cue alone: the rest of the page, whose arms have no results, is left out."""
    inputs = ("test", "test_blank", "test_random_media", "test_remove_text")

    def on_all(arm, seed, before, after):
        sides = {
            side: {
                name: {"by category": {}, "accuracy": x + seed / 50} for name, x in zip(inputs, of)
            }
            for side, of in {"before": before, "after": after}.items()
        }
        return result(arm, seed, {}, metrics=sides, **{"begins as": "cold2"})

    start = (0.4, 0.3, 0.2, 0.1)
    found = [
        on_all(arm, seed, start, after)
        for seed in (0, 1)
        for arm, after in {
            "cue": (0.8, 0.4, 0.3, 0.2), "cue-blank": (0.6, 0.5, 0.3, 0.2)
        }.items()
    ]  # fmt: skip
    folder = put(tmp_path / "r", *found)
    text = page.write(folder, tmp_path / "page.md", list(ARMS)).read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| before RL")]
    assert [cell.split()[0] for cell in rows[0][1:]] == ["2", "41.0", "31.0", "21.0", "11.0"]
    assert "| RL on blank | 2 | 61.0 [" in text and "| RL on intact inputs | 2 | 81.0 [" in text
    assert "RL on intact inputs answers better than on blank pictures | accuracy | +20.0" in text
    assert "guesses better on them | accuracy on blank pictures | +20.0" in text
    assert "disease" not in text and "Table 1" not in text and "no-eq4" not in text
    assert "Not run yet: cue-random_media, cue-remove_text." in text


@pytest.mark.parametrize("name", ["replication", "neighbours"])
def test_the_committed_page_is_what_its_results_say(tmp_path, name):
    """docs/NAME.md below its mark follows from docs/NAME/ alone."""
    file, folder = ROOT / f"docs/{name}.md", ROOT / f"docs/{name}"
    if not folder.exists():
        pytest.skip("no results are committed")
    copy = tmp_path / f"{name}.md"
    copy.write_text(file.read_text().split(page.MARK)[0])
    (tmp_path / name).mkdir()
    for one in folder.glob("*.json"):
        (tmp_path / name / one.name).write_text(one.read_text())
    assert page.write(tmp_path / name, copy, list(ARMS)).read_text() == file.read_text()
    for figure in re.findall(rf"\]\(({name}/\S+\.svg)\)", file.read_text()):
        assert (folder.parent / figure).exists(), figure


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "say what: --table, --figure"),
        (["--table", "5"], "invalid choice: '5'"),
        (["--all", "--seeds", "0"], "must be at least 1"),
    ],
)
def test_bad_options_are_one_line(options, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *options])
    with pytest.raises(SystemExit, match="2"):
        reproduce.main()
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_no_page_is_written_of_a_folder_without_results(monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["reproduce.py", "--write", "--results", str(tmp_path / "typo")]
    )
    with pytest.raises(SystemExit, match="error: .*typo holds no results"):
        reproduce.main()
    assert not any(tmp_path.iterdir())


def test_a_second_reproduction_beside_a_first_is_refused(monkeypatch, tmp_path):
    """Both would work at the same arms."""
    monkeypatch.setattr(arms, "RUNS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "--quick", "--results", str(tmp_path / "r")])
    monkeypatch.setattr(reproduce, "run", lambda *_: pytest.fail("it began"))
    folder = tmp_path / reproduce.code()
    folder.mkdir()
    with commands.another_process_in(folder) as pid:
        with pytest.raises(SystemExit, match=f"error: .*in use by another process .{pid} on "):
            reproduce.main()


# --- what is kept of an arm -----------------------------------------------------------------------


def test_an_arm_whose_options_have_changed_is_not_taken(tmp_path, monkeypatch):
    """Also where it is a default that has changed. What decides no number may be another."""
    was = ARMS["top30"].decisive()
    assert was["keep"] == 0.3 and was["tau"] == 0.54 and not {"world", "save_every"} & set(was)
    monkeypatch.setattr(reproduce, "code", lambda: "abc")
    folder = put(tmp_path / "r", result("top30", 0, {}))
    reproduce.check(folder)
    folder = put(tmp_path / "r", result("top30", 0, {}, config=was | {"tau": 0.5}))
    with pytest.raises(SystemExit, match="top30 in .* other options: tau 0.5, here 0.54. Delete"):
        reproduce.check(folder)


def test_the_rise_of_a_reward_by_hand():
    """From the first to the last fifth of the updates, and by the second."""
    curves = {
        "caption, medium": [0.2, 0.5, 0.6, 0.6, 0.7],
        "caption, hard": [0.1, 0.1, 0.1, 0.1, 0.2],
        "accuracy, medium": [0.5, 0.6, 0.8, 0.9, None],
    }
    found = {"curves": curves}
    assert page.value(found, "medium", "rise", "caption") == pytest.approx(0.5)
    assert page.value(found, "hard", "rise", "caption") == pytest.approx(0.1)
    assert page.value(found, "caption", "early rise", "caption") == pytest.approx(0.3)
    assert page.value(found, "accuracy", "early rise", "caption") == pytest.approx(0.1)
    assert page.value(found, "medium", "rise", "accuracy") is None
    assert page.value(found, "easy", "rise", "caption") is None


def test_a_true_caption_is_true_of_its_scene(tmp_path, monkeypatch):
    """Against the scenes that write_data wrote: what they hold is true; another colour, another
    place, another shape's description or no caption is not."""
    seen, write = [], scenes._write_row

    def spy(rng, folder, split, i, scene, query, drawn):
        seen.append((scene, query))
        return write(rng, folder, split, i, scene, query, drawn)

    monkeypatch.setattr(scenes, "_write_row", spy)
    scenes.write_data(tmp_path / "data", {"test": 10}, seed=3)
    rows = json.loads((tmp_path / "data/test.json").read_text())

    def share(caption) -> float | None:
        said = [{**row, "id": "1", "text": f"<caption>{caption(*x)}</caption>"}
                for row, x in zip(rows, seen)]  # fmt: skip
        return collect.truth(said, "test", Job("cold", 3)).get("true captions")

    assert share(lambda scene, query: scenes.describe(scene, query["shape"])) == 1.0
    assert share(lambda scene, query: "") is None
    assert share(lambda *_: "no such thing") == 0.0
    assert share(lambda scene, query: f"northwest mauve {query['shape']}") == 0.0
    asked = [scenes.of_shape(scene, query["shape"]) for scene, query in seen]
    other = [next((t for t in scene if t.shape != query["shape"]), None) for scene, query in seen]
    assert any(asked) and any(other)
    found = iter([t.describe() if t else "" for t in other])
    assert share(lambda *_: next(found) or "x") == 0.0  # true, and about another shape
    with pytest.raises(ConfigError, match="is not of the world of 4"):
        collect.truth([{**row, "id": "1", "text": "<caption>x</caption>"} for row in rows],
                      "test", Job("cold", 4))  # fmt: skip


def test_a_finished_run_is_kept_in_one_file(world, tmp_path, monkeypatch):
    """train.py's own run folder, collected; then the arm that scores gives the others classes."""
    monkeypatch.setattr(arms, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(collect, "REPRESENTED", ("plain", "ours"))
    monkeypatch.setattr(collect, "representations", partial(collect.representations, n=6))
    home = tmp_path / "runs" / arms.code()
    home.mkdir(parents=True)
    (home / "world-0").symlink_to(world)
    small = {"sft_steps": 30, "sft_batch": 8, "sft_lr": 3e-3, "responses": 4, "rl_steps": 5}
    small |= {"prompts_per_step": 4, "group_size": 4, "eval_responses": 2}
    for arm in ("cold", "plain", "ours"):
        less = replace(ARMS[arm], options=ARMS[arm].options | small)
        monkeypatch.setitem(ARMS, arm, less)
        job = Job(arm, 0)
        commands.launch(*job.command()[1:])
        collect.collect(job, collect.spent(job, 7.0), 1, tmp_path / "results")
    plain = json.loads((tmp_path / "results/plain-seed0.json").read_text())
    ours = json.loads((tmp_path / "results/ours-seed0.json").read_text())
    cold = json.loads((tmp_path / "results/cold-seed0.json").read_text())
    assert plain["start"] == ours["start"] == cold["start"] and plain["begins as"] == "cold"
    assert plain["updates"] == 5 and plain["completions"] == 5 * 4 * 4 and plain["seconds"] == 7
    lines = [json.loads(x) for x in (Job("ours", 0).folder / "select/scores.jsonl").open()]
    rolls = [json.loads(x) for x in (Job("plain", 0).folder / "rl/rollouts.jsonl").open()]
    variance = {line["id"]: line["variance"] for line in lines}
    assert plain["variance seen"] == pytest.approx(
        statistics.fmean(variance[x["id"]] for x in rolls), abs=1e-4
    )
    assert set(cold["floor"]) == {"test", "test_pairs"}
    assert set(plain["representations"]) == {"before", "after", "is positive"}
    scored = json.loads((Job("plain", 0).folder / "eval/after.json").read_text())
    kept = plain["metrics"]["after"]["test"]
    assert kept["accuracy"] == pytest.approx(scored["test"]["metrics"]["accuracy"]["value"])
    page.write(tmp_path / "results", tmp_path / "results.md", list(ARMS))
    with pytest.raises(ConfigError, match="is the world of seed 0"):
        (home / "world-1").symlink_to(world)
        collect.provenance(Job("cold", 1), 1)
    # what was run otherwise, or began otherwise, than what is there
    monkeypatch.setitem(ARMS, "plain", replace(ARMS["plain"], options=PLAIN))
    with pytest.raises(ConfigError, match="run with another sft_steps, .*rl_steps"):
        collect.collect(Job("plain", 0), 7.0, 1, tmp_path / "results")
    (tmp_path / "results/cold-seed0.json").write_text(json.dumps(cold | {"start": "other"}))
    with pytest.raises(ConfigError, match="cold-seed0.json: it began with another cold start"):
        collect.collect(Job("cold", 0), 7.0, 1, tmp_path / "results")


def test_a_cold_start_is_the_same_one_beside_corrupted_tests(tmp_path, monkeypatch):
    """Arms of the grid have more test sets than the cold start that they share."""
    monkeypatch.setattr(arms, "RUNS", tmp_path)
    found = []
    for arm, names in (("cold2", SETS), ("cue-blank", (*SETS, "test_blank", "test_pairs_blank"))):
        job = Job(arm, 0)
        (job.folder / "eval").mkdir(parents=True)
        said = {name: {"rows": [{"text": name}]} for name in names}
        (job.folder / "eval" / "before.json").write_text(json.dumps(said))
        for part in ("policy", "judge"):
            (job.world / part).mkdir(parents=True, exist_ok=True)
            (job.world / part / "model.safetensors").touch()
        (job.world / "world.json").write_text('{"version": 4, "seed": 0}')
        found.append(collect.provenance(job, 1))
    assert found[0]["start"] == found[1]["start"]
    page.by_arm([result("cold2", 0, {}) | found[0], result("cue-blank", 0, {}) | found[1]])
