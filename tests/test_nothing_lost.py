"""A run that is killed, whose disk fills or whose numbers break loses minutes at most; what it
keeps is safe to read.

pytest -m soak tests/test_nothing_lost.py      # a hundred kills, twenty in each stage (minutes)
"""

import json
import math
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import commands
import pytest
import torch
from safetensors.torch import load_file
from test_processes import accelerate

import train
from engine import checkpoint, pretrained, run

ROOT = Path(__file__).parent.parent
SMALL = (
    "--sft_steps 12 --sft_batch 4 --sft_lr 3e-3 --responses 4 --select_batch 2 --rl_steps 12 "
    "--prompts_per_step 4 "
    "--group_size 4 --save_every 2 --keep_last 2 --max_new_tokens 24 --rl_lr 1e-3 --held_out_rows "
    "4 --eval_responses 0 --quiet true"
).split()


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """Starts train.py with options; what it prints is in `fork.log`."""
    log = tmp_path_factory.mktemp("log") / "log"

    def start(*options, moment=""):
        return commands.start("train.py", *options, out=log, err=log, moment=moment)

    start.log = log
    return start


@pytest.fixture(scope="module")
def able(world, tmp_path_factory, fork):
    """A policy after a real cold start: responses differ in their rewards, so that selection has
    something to keep."""
    folder = tmp_path_factory.mktemp("able") / "run"
    steps = "--method sft --sft_steps 60 --sft_batch 8 --sft_lr 3e-3 --max_new_tokens 40 --quiet true".split()
    process = fork("--world", world, "--output_dir", folder, *steps)
    process.join()
    assert process.exitcode == 0
    return [
        "--model",
        folder / "sft/policy",
        "--judge",
        world / "judge",
        "--data",
        world / "data",
        *SMALL,
    ]


@pytest.fixture(scope="module")
def undisturbed(able, tmp_path_factory, fork):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    process = fork("--output_dir", folder, *able)
    process.join()
    assert process.exitcode == 0
    return folder


def lines_in(file):
    return file.read_text().count("\n") if file.exists() else 0


STAGES = {  # when a stage is under way
    "cold start": lambda folder: lines_in(folder / "sft/metrics.jsonl") >= 3,
    "scoring": lambda folder: lines_in(folder / "select/scores.jsonl") >= 2,
    "selection": lambda folder: lines_in(folder / "select/scores.jsonl") >= 12,
    "rl": lambda folder: lines_in(folder / "rl/metrics.jsonl") >= 3,
    "checkpoint": lambda folder: bool(list(folder.glob("rl/.checkpoint-*.unfinished"))),
}
SPAN = {
    "cold start": 0.2,
    "scoring": 0.3,
    "selection": 0.05,
    "rl": 0.5,
    "checkpoint": 0.02,
}  # seconds


def assert_same(folder, other):
    """Bit for bit: weights, metrics, responses, rewards, scores, evaluation."""
    names = [
        "rl/policy/model.safetensors",
        "sft/policy/model.safetensors",
        "rl/metrics.jsonl",
        "sft/metrics.jsonl",
    ]
    names += [
        "rl/rollouts.jsonl",
        "rl/held_out.jsonl",
        "select/scores.jsonl",
        "select/selected.json",
        "eval/after.json",
    ]
    for name in names:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
    assert [p.name for p in folder.glob("rl/best-*")] == [p.name for p in other.glob("rl/best-*")]
    assert not [
        path
        for path in folder.rglob(".*")
        if path.is_dir() or path.suffix in (".unfinished", ".gone")
    ]


def kill_in_every_stage(fork, options, folder, chance):
    """Kill -9 once in each stage, at a random moment of it. Returns the stages in which it met a
    run."""
    killed = []
    for stage, under_way in STAGES.items():
        process = fork("--output_dir", folder, *options)
        while not under_way(folder) and process.is_alive():
            time.sleep(0.0005)
        time.sleep(chance.random() * SPAN[stage])
        process.kill()
        process.join()
        killed += [stage] if process.exitcode == -9 else []
        # what follows is a resumption, not a new start
        if stage in ("cold start", "rl") and process.exitcode == -9:
            assert list(folder.glob(f"{'rl' if stage == 'rl' else 'sft'}/checkpoint-*")), stage
    process = fork("--output_dir", folder, *options)
    process.join()
    assert process.exitcode == 0
    return killed


def test_a_run_that_is_killed_in_every_stage_ends_the_same(fork, able, undisturbed, tmp_path):
    """It kills itself at a moment of each stage, so that no moment is missed on a slow or fast
    machine. Its media are read ahead at times, those of the undisturbed run never."""
    left = {
        "sft-5": "sft/checkpoint-4",
        "scoring-2": "select/scores.jsonl",
        "selection": "select/scores.jsonl",
    }
    left |= {"checkpoint-4": "rl/.checkpoint-4.unfinished", "rl-7": "rl/checkpoint-6"}
    for i, (moment, name) in enumerate(left.items()):
        workers = "--media_workers", i % 3
        process = fork("--output_dir", tmp_path / "run", *able, *workers, moment=moment)
        process.join()
        assert process.exitcode == -9 and (tmp_path / "run" / name).exists(), moment
    assert not (tmp_path / "run/rl/policy").exists()
    process = fork("--output_dir", tmp_path / "run", *able)
    process.join()
    assert process.exitcode == 0
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.soak
def test_a_hundred_kills(fork, able, undisturbed, tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print("seed", seed)
    chance, killed = random.Random(seed), []
    for i in range(20):
        killed += kill_in_every_stage(fork, able, tmp_path / str(i), chance)
        assert_same(tmp_path / str(i), undisturbed)
        shutil.rmtree(tmp_path / str(i))
    counts = {stage: killed.count(stage) for stage in STAGES}
    print(counts)
    assert min(counts.values()) >= 18


@pytest.fixture(scope="module")
def pair(able, tmp_path_factory):
    """(the end of a run of two processes, one of which one was killed in its fifth update of RL,
    options)"""
    options = [*able, "--sft_steps", "0", "--dtype", "float64", "--save_every", "4"]
    whole, killed = (tmp_path_factory.mktemp("pair") / name for name in ("whole", "killed"))
    commands.launch("--output_dir", whole, *options, processes=2)
    done = accelerate(
        "cpu2", 2, ROOT / "tests/stops.py", "rl-5", "KILL", "--output_dir", killed, *options
    )
    assert done.returncode != 0, "the launcher ends the other one, or this would have timed out"
    assert (killed / "rl/checkpoint-4").exists() and lines_in(killed / "rl/metrics.jsonl") == 4
    return whole, killed, options


def test_a_run_with_a_killed_process_goes_on_to_the_same_end(pair, tmp_path):
    """A run one process of which is killed goes on to the same end."""
    whole, killed, options = pair
    shutil.copytree(killed, tmp_path / "run")
    commands.launch("--output_dir", tmp_path / "run", *options, processes=2)
    for name in (
        "rl/policy/model.safetensors",
        "rl/metrics.jsonl",
        "rl/rollouts.jsonl",
        "eval/after.json",
    ):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name


def test_another_number_of_processes_goes_on(pair, tmp_path, fork):
    """Another number of processes goes on. It says what is not exact."""
    whole, killed, options = pair
    folder = tmp_path / "run"
    shutil.copytree(killed, folder)
    process = fork("--output_dir", folder, *options, "--quiet", "false")
    process.join()
    assert process.exitcode == 0
    assert (
        "note: checkpoint-4 was written on 2 process(es) and is resumed on 1: rows and responses stay"
        in fork.log.read_text()
    )
    ends = [load_file(run / "rl/policy/model.safetensors") for run in (whole, folder)]
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, atol=1e-6, rtol=0)
    assert not all(torch.equal(ends[1][name], value) for name, value in ends[0].items())


def test_scores_of_two_processes_are_continued_by_one(pair, tmp_path, fork):
    whole, _, options = pair
    folder, scores = tmp_path / "run", (whole / "select/scores.jsonl").read_text()
    shutil.copytree(
        whole, folder, ignore=shutil.ignore_patterns("rl", "selected.json", "after.json")
    )
    # killed while it wrote
    cut = "".join(scores.splitlines(keepends=True)[:5]) + scores.splitlines()[5][:40]
    (folder / "select/scores.jsonl").write_text(cut)
    process = fork("--output_dir", folder, *options)
    process.join()
    assert process.exitcode == 0
    assert (folder / "select/scores.jsonl").read_text().startswith(cut[:-40])
    read = [
        sorted(map(json.loads, (run / "select/scores.jsonl").read_text().splitlines()), key=str)
        for run in (whole, folder)
    ]
    assert read[0] == read[1] and len(read[0]) == 12
    assert (folder / "select/selected.json").read_bytes() == (
        whole / "select/selected.json"
    ).read_bytes()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MB, on which a checkpoint of the tiny policy (12 MB) fits once."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_keeps_the_last_checkpoint(world, small_disk):
    """A disk that fills during a checkpoint keeps the last one."""
    options = ["--world", world, "--output_dir", small_disk / "run", *SMALL, "--method", "sft"]
    done = commands.launch(*options, check=False)
    assert (
        done.returncode != 0
        and "the disk is full" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert [path.name for path in (small_disk / "run/sft").glob("*checkpoint-*")] == [
        "checkpoint-2"
    ]
    assert (
        "the last checkpoint is kept" in done.stderr
        and not (small_disk / "run/sft/policy").exists()
    )
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    done = commands.launch(*options, "--quiet", "false")
    assert "resumed after update 2" in done.stdout


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def stored(tmp_path):
    """(a run, a checkpoint of two weights, what it holds)"""
    here = run.Run(train.Config(output_dir=str(tmp_path / "run"), quiet=True))
    tensors = {
        f"{kind}/{name}": torch.randn(3, 2) for kind in ("weight", "exp_avg") for name in ("a", "b")
    }
    tensors |= {"step/a": torch.tensor(3.0), "step/b": torch.tensor(3.0)}
    folder = tmp_path / "run/rl/checkpoint-3"
    checkpoint.save(here, folder, {"step": 3}, tensors)
    return here, folder, tensors


def test_a_checkpoint_gives_back_what_it_was_given(stored):
    here, folder, tensors = stored
    state, found = checkpoint.load(here, folder, {"a": torch.zeros(3, 2), "b": torch.zeros(3, 2)})
    assert state["step"] == 3 and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


@pytest.mark.parametrize(
    ("breaks", "says"),
    [
        (
            lambda f: (f / "state.safetensors").write_bytes(
                (f / "state.safetensors").read_bytes()[:-9]
            ),
            "is incomplete",
        ),
        (lambda f: (f / "state.safetensors").unlink(), "is incomplete"),
        (lambda f: (f / "state.json").unlink(), "is incomplete"),
        (lambda f: (f / "state.json").write_text('{"step": 3'), "is incomplete"),
    ],
)
def test_half_a_checkpoint_is_refused_in_one_line(stored, breaks, says):
    """Half a checkpoint is refused in one line that says what to do."""
    here, folder, _ = stored
    breaks(folder)
    with pytest.raises(
        run.ConfigError,
        match=f"checkpoint-3 {says}.*Delete .*checkpoint-3; the same command then resumes from the checkpoint before",
    ):
        checkpoint.load(here, folder, {"a": torch.zeros(3, 2), "b": torch.zeros(3, 2)})


@pytest.mark.parametrize(
    "like", [{"a": (3, 2)}, {"a": (3, 2), "c": (3, 2)}, {"a": (3, 2), "b": (4, 2)}]
)
def test_a_checkpoint_of_another_model_is_refused(stored, like):
    here, folder, _ = stored
    with pytest.raises(run.ConfigError, match="checkpoint-3 is of another model"):
        checkpoint.load(here, folder, {name: torch.zeros(shape) for name, shape in like.items()})


def test_a_checkpoint_that_fails_leaves_the_one_before(stored, monkeypatch):
    """A checkpoint that fails leaves the one before it. It leaves no rest of its own."""
    here, folder, tensors = stored
    monkeypatch.setattr(
        checkpoint,
        "save_file",
        lambda *_: (_ for _ in ()).throw(OSError("No space left on device")),
    )
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(here, folder.with_name("checkpoint-6"), {"step": 6}, tensors)
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint-3"]


# --- guards ---------------------------------------------------------------------------------------


def broken_loss(monkeypatch, steps):
    """Eq. 1 is not a number in the given calls."""
    calls, original = [], train.grpo.grpo_loss

    def loss(*args, **options):
        calls.append(len(calls) + 1)
        value, stats = original(*args, **options)
        return (value * float("nan") if calls[-1] in steps else value), stats

    monkeypatch.setattr(train.grpo, "grpo_loss", loss)


def guarded(world, folder, *options):
    where = [
        "--world",
        str(world),
        "--output_dir",
        str(folder),
        "--sft_steps",
        "0",
        "--selection",
        "false",
    ]
    more = (
        "--rl_steps 4 --prompts_per_step 3 --group_size 2 --max_new_tokens 6 --save_every 1".split()
    )
    train.main(train.parse_config([*where, *more, "--held_out_rows", "0", *options]))


def test_an_update_that_is_not_finite_changes_no_weight(world, tmp_path, monkeypatch, capsys):
    """An update that is not finite changes no weight. It is counted."""
    broken_loss(monkeypatch, {2})
    kept, log = [], train.log_rollouts

    def keep(learner, parts):
        kept.append(learner.policy.core.lm_head.weight.detach().clone())
        log(learner, parts)

    monkeypatch.setattr(train, "log_rollouts", keep)
    guarded(world, tmp_path / "run", "--nce_weight", "1", "--tau_quantile", "0.5")
    assert len(kept) == 4 and torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[2])
    lines = [
        json.loads(line) for line in (tmp_path / "run/rl/metrics.jsonl").read_text().splitlines()
    ]
    assert [line.get("skipped") for line in lines] == [None, 1, None, None]
    assert "loss" not in lines[1] and all(
        isinstance(v, (int, float)) and v == v for line in lines for v in line.values()
    )
    [skipped] = [
        json.loads(line) for line in (tmp_path / "run/rl/skipped.jsonl").read_text().splitlines()
    ]
    assert skipped["step"] == 2 and len(skipped["ids"]) == 3
    printed = capsys.readouterr().out
    assert "rl 2: non-finite loss or gradient; update skipped" in printed
    assert "all responses to each prompt earn the same" in printed
    assert "100% of responses were cut at --max_new_tokens 6" in printed


def test_a_run_whose_numbers_stay_broken_stops_with_its_rows(world, tmp_path, monkeypatch):
    broken_loss(monkeypatch, {2, 3, 4})
    with pytest.raises(train.Diverged, match=r"rl: 2 updates in a row.*skipped.jsonl.*--rl_lr"):
        guarded(world, tmp_path / "run", "--max_skipped", "2")
    assert len((tmp_path / "run/rl/skipped.jsonl").read_text().splitlines()) == 2
    assert (tmp_path / "run/rl/checkpoint-1").exists() and not (tmp_path / "run/rl/policy").exists()
    assert not (tmp_path / "run/rl/checkpoint-2").exists(), (
        "none is made while updates are left out"
    )


def test_an_update_with_an_iteration_left_out_counts_once(world, tmp_path, monkeypatch):
    """An update one of whose iterations is left out is counted once."""
    broken_loss(monkeypatch, {3, 6})  # the first iteration of update 2, the second of update 3
    guarded(world, tmp_path / "run", "--iterations", "2", "--max_skipped", "3", "--nce_weight", "0")
    lines = [
        json.loads(line) for line in (tmp_path / "run/rl/metrics.jsonl").read_text().splitlines()
    ]
    assert [line.get("skipped") for line in lines] == [None, 1, 1, None]
    with pytest.raises(train.Diverged, match="2 updates in a row"):
        broken_loss(monkeypatch, {3, 6})
        guarded(
            world, tmp_path / "two", "--iterations", "2", "--max_skipped", "2", "--nce_weight", "0"
        )


def test_the_best_policy_is_kept_or_the_last_if_as_good(world, tmp_path, monkeypatch):
    """The best policy is kept. The last stands for it where it is as good."""
    scores = iter([0.2, 0.5, 0.1, 0.4])
    monkeypatch.setattr(train, "held_out_reward", lambda *_: next(scores))
    guarded(world, tmp_path / "a", "--keep_last", "2", "--held_out_rows", "1")
    assert [path.name for path in (tmp_path / "a/rl").glob("best-*")] == ["best-2"]
    assert (tmp_path / "a/rl/best-2/model.safetensors").exists()
    scores = iter([0.2, 0.5, 0.1, 0.6])
    guarded(world, tmp_path / "b", "--held_out_rows", "1")
    assert not list((tmp_path / "b/rl").glob("best-*"))


def test_as_many_checkpoints_are_kept_as_asked_for(world, tmp_path, monkeypatch):
    broken_loss(monkeypatch, {4})
    with pytest.raises(train.Diverged):
        guarded(world, tmp_path / "run", "--keep_last", "2", "--max_skipped", "1")
    assert sorted(path.name for path in (tmp_path / "run/rl").glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]


def test_a_checkpoint_of_unknown_reward_is_compared_with_none(world, tmp_path, monkeypatch, capsys):
    """The best of those that are known stays, whether the judge was away in between or at the
    end."""
    scores = iter([0.2, math.nan, 0.1, math.nan])
    monkeypatch.setattr(train, "held_out_reward", lambda *_: next(scores))
    guarded(world, tmp_path / "run", "--keep_last", "2", "--held_out_rows", "1")
    assert [path.name for path in (tmp_path / "run/rl").glob("best-*")] == ["best-1"]
    lines = [
        json.loads(line) for line in (tmp_path / "run/rl/held_out.jsonl").read_text().splitlines()
    ]
    assert [line["reward"] for line in lines] == [0.2, None, 0.1, None]
    assert (
        capsys.readouterr().out.count(
            "held-out reward unknown: the judge gave no verdict on some captions"
        )
        == 2
    )


def test_a_run_killed_in_its_first_write_can_start_again(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".config.yaml.unfinished").write_text("beta: 0.0")
    run.Run(train.Config(output_dir=str(folder), quiet=True))
    assert [path.name for path in folder.glob("[!.]*")] == ["config.yaml"]
    assert not list(folder.glob(".*.unfinished"))


def test_half_precision_weights_are_checkpointed_in_float32(world, tmp_path, monkeypatch):
    """Half-precision weights are checkpointed in float32. They come back so."""
    ends = []
    for name in ("whole", "stopped"):
        options = ["--dtype", "bfloat16", "--nce_weight", "0", "--rl_lr", "1e-4"]
        if name == "stopped":
            broken_loss(monkeypatch, {4})
            with pytest.raises(train.Diverged):
                guarded(world, tmp_path / name, *options, "--max_skipped", "1")
            monkeypatch.undo()
            state = load_file(tmp_path / name / "rl/checkpoint-3/state.safetensors")
            assert {value.dtype for value in state.values()} == {torch.float32}
            assert {key.partition("/")[0] for key in state} == {
                "weight",
                "exp_avg",
                "exp_avg_sq",
                "step",
            }
        guarded(
            world, tmp_path / name, *options, *(["--max_skipped", "1"] if name == "stopped" else [])
        )
        ends.append((tmp_path / name / "rl/policy/model.safetensors").read_bytes())
    assert ends[0] == ends[1]


def test_another_size_of_the_batch_is_refused(world, tmp_path):
    cfg = train.Config(
        output_dir=str(tmp_path / "run"), quiet=True, world=str(world), nce_weight=0.0
    )
    learner = train.Learner("rl", f"{world}/policy", 3, 1e-4, cfg, run.Run(cfg))
    learner.size = 4
    with pytest.raises(run.ConfigError, match="took 4 .*the earlier number of processes"):
        next(learner.batches(train.data.load(world / "data")["train"], 3))


def test_a_checkpoint_on_top_of_a_merged_adapter_is_refused(world, tmp_path):
    """Earlier versions merged the adapter that a run began with. Theirs would take its place."""
    start = tmp_path / "start"
    torch.manual_seed(0)
    pretrained.load(f"{world}/policy", lora_rank=2).save(start, merge=False)
    options = {"output_dir": str(tmp_path / "run"), "lora_rank": 2, "world": str(world)}
    cfg = train.Config(**options, quiet=True, held_out_rows=0)
    stage = "rl", str(start), 3, 1e-4, cfg, run.Run(cfg)
    learner = train.Learner(*stage)
    learner._save_checkpoint()
    train.Learner(*stage)
    file = tmp_path / "run/rl/checkpoint-0/state.json"
    state = json.loads(file.read_text())
    assert state.pop("of_adapter")
    file.write_text(json.dumps(state))
    with pytest.raises(run.ConfigError, match="is of an earlier version, which merged the adapter"):
        train.Learner(*stage)


def test_an_update_of_few_prompts_says_what_eq_4_makes_of_them(world, tmp_path, capsys):
    """One is refused, two are told that Eq. 4 is 0: it needs a positive and a negative beside a
    prompt."""
    rows = train.data.load(world / "data")["train"]
    for weight, size in ((1.0, 3), (1.0, 2), (0.0, 2), (1.0, 1)):
        options = {"world": str(world), "nce_weight": weight, "rl_steps": 0}
        cfg = train.Config(output_dir=f"{tmp_path}/{weight} {size}", **options)
        stage = f"{world}/policy", rows[:size], {}, None, cfg, run.Run(cfg)
        if size == 1:
            with pytest.raises(train.DataError, match="rl: too few rows .1.. .* at least 2"):
                train.reinforce(*stage)
            continue
        capsys.readouterr()
        train.reinforce(*stage)
        warned = "Eq. 4 is 0 in updates of 2 prompts" in capsys.readouterr().out
        assert warned == (weight > 0 and size == 2)


# --- safe to read, safe to share ------------------------------------------------------------------


def test_nothing_is_unpickled_and_no_secret_is_written(world, tmp_path):
    """A run is stopped and resumed under an audit hook that reports every class that pickle looks
    up. No remote code runs."""
    hook = "import sys\nsys.addaudithook(lambda name, args: name == 'pickle.find_class' and print('UNPICKLED', args))"
    (tmp_path / "sitecustomize.py").write_text(hook)
    secret = "sk-0123456789-not-to-be-seen"
    environment = os.environ | {
        "PYTHONPATH": str(tmp_path),
        "OPENAI_API_KEY": secret,
        "HF_TOKEN": secret,
        "OMP_NUM_THREADS": "1",
    }
    options = [
        "--world",
        world,
        "--output_dir",
        tmp_path / "run",
        *SMALL,
        *"--sft_steps 3 --rl_steps 4 --selection false".split(),
    ]
    control = [
        sys.executable,
        "-c",
        "import pathlib, pickle; pickle.loads(pickle.dumps(pathlib.Path()))",
    ]
    assert (
        "UNPICKLED"
        in subprocess.run(control, capture_output=True, text=True, env=environment).stdout
    )
    printed = ""
    for script, *moment in (("tests/stops.py", "rl-3", "KILL"), ("train.py",)):
        command = [sys.executable, str(ROOT / script), *moment, *map(str, options)]
        done = subprocess.run(
            [*command, "--quiet", "false"],
            capture_output=True,
            text=True,
            env=environment,
            timeout=900,
        )
        printed += done.stdout + done.stderr
    assert (
        done.returncode == 0 and "resumed after update 2" in printed and "UNPICKLED" not in printed
    )
    assert secret not in printed
    for file in (tmp_path / "run").rglob("*"):
        assert file.is_dir() or secret.encode() not in file.read_bytes(), file
        assert file.suffix not in (".bin", ".pt", ".pth", ".pkl", ".pickle"), file
    for source in ROOT.glob("*.py"):
        assert (
            "trust_remote_code=True" not in source.read_text()
            and "pickle" not in source.read_text()
        ), source
