"""run.py in one process: what a run folder binds, what follows from the seed, files that grow, sums
and counts.

Several processes are in test_processes.py, kills and checkpoints in test_nothing_lost.py.
"""

import errno
import fcntl
import json
import random
from types import SimpleNamespace

import commands
import pytest
import torch

import config
from engine import run


def run_of(folder, **options):
    return run.Run(config.Config(output_dir=str(folder), quiet=True, **options))


# --- the run folder -------------------------------------------------------------------------------


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(run.ConfigError, match="is not empty and not a run folder"):
        run_of(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_begun_run_goes_on_with_its_own_options_only(tmp_path):
    run_of(tmp_path, beta=0.1)
    (tmp_path / "sft").mkdir()
    with pytest.raises(
        run.ConfigError,
        match="another configuration .group_size: 8 there, 4 now; beta: 0.1 there, 0.2 now.*same "
        "options",
    ):
        run_of(tmp_path, beta=0.2, group_size=4)
    free = {
        "judge_concurrency": 3,
        "judge_deadline": 5.0,
        "judge_max_tokens": 7,
        "eval_batch": 2,
        "select_batch": 2,
    }
    free |= {
        "show_every": 1,
        "save_every": 2,
        "keep_last": 2,
        "max_skipped": 2,
        "prompts_per_pass": 2,
    }
    run_of(tmp_path, beta=0.1, max_truncated=0.5, gradient_checkpointing=True, **free)


def test_a_run_from_before_an_option_had_its_default(tmp_path):
    run_of(tmp_path)
    (tmp_path / "sft").mkdir()
    file = tmp_path / "config.yaml"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("corrupt_")]
    file.write_text("\n".join(lines))
    with pytest.raises(run.ConfigError, match="corrupt_train: '' there, 'blank' now"):
        run_of(tmp_path, corrupt_train="blank")
    run_of(tmp_path)


def test_a_folder_is_the_same_with_a_slash_at_its_end(tmp_path):
    run_of(tmp_path, data="mine/")
    (tmp_path / "sft").mkdir()
    run_of(tmp_path, data="mine")
    file = tmp_path / "config.yaml"  # of a run that kept the slash
    file.write_text(file.read_text().replace("data: mine", "data: mine/"))
    run_of(tmp_path, data="mine")
    assert config.Config(data="/").data == "/"


def test_only_the_same_judge_may_move_to_another_address(tmp_path):
    """The same judge may move to another address. No other judge may."""
    run_of(tmp_path, judge="http://one/v1", judge_model="m")
    (tmp_path / "sft").mkdir()
    run_of(tmp_path, judge="https://two/v1", judge_model="m")
    for other in (
        {"judge": "https://two/v1", "judge_model": "n"},
        {"judge": "folder", "judge_model": "m"},
    ):
        with pytest.raises(run.ConfigError, match="judge"):
            run_of(tmp_path, **other)


def test_what_a_killed_process_was_writing_goes_and_nothing_else(tmp_path):
    run_of(tmp_path)
    for name in ("rl/.policy.unfinished", "rl/.checkpoint-2.gone", "rl/checkpoint-4"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "rl/.held_out.jsonl.unfinished").write_text("{")
    run_of(tmp_path)
    assert [path.name for path in (tmp_path / "rl").iterdir()] == ["checkpoint-4"]


def test_a_folder_in_use_is_refused_until_its_process_ends(tmp_path):
    """A second process in a run folder would mix its lines with the first one's."""
    unfinished = tmp_path / ".data.json.unfinished"
    with commands.another_process_in(tmp_path) as pid:
        unfinished.write_text("{")  # what the other one is writing
        with pytest.raises(run.ConfigError, match=f"in use by another process .{pid} on .*end it"):
            run_of(tmp_path)
        assert unfinished.exists() and not (tmp_path / "config.yaml").exists()
    first, second = run_of(tmp_path), run_of(tmp_path)  # in one process: one after the other
    assert not unfinished.exists() and first.lock and second.lock


def test_a_disk_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert run_of(tmp_path).lock is None and (tmp_path / "config.yaml").exists()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(run.ConfigError, match="output_dir: cannot write in .*Give another"):
            run_of(folder)


# --- chance ---------------------------------------------------------------------------------------


def drawn(seed, folder, *where):
    here = run_of(folder / str(seed), seed=seed)
    here.reseed(*where)
    return here.permutation("rl", 0, 20), torch.rand(3).tolist(), random.random()


def test_every_draw_follows_from_seed_stage_and_step(tmp_path):
    first = drawn(0, tmp_path, "rl", 3)
    assert drawn(0, tmp_path, "rl", 3) == first and sorted(first[0]) == list(range(20))
    for a, b in zip(first, drawn(1, tmp_path, "rl", 3)):
        assert a != b, "the seed"
    for where in (("rl", 4), ("sft", 3)):
        for a, b in zip(first[1:], drawn(0, tmp_path, *where)[1:]):
            assert a != b, where
    here = run_of(tmp_path / "orders")
    orders = [here.permutation(stage, epoch, 20) for stage in ("sft", "rl") for epoch in range(3)]
    assert len(set(map(tuple, orders))) == 6


# --- files that grow ------------------------------------------------------------------------------


def items_of(count):
    return [SimpleNamespace(id=str(i), length=i % 4) for i in range(count)]


def test_each_item_has_one_line_also_where_a_chunk_was_cut(tmp_path):
    here, file, asked = run_of(tmp_path), tmp_path / "select/scores.jsonl", []

    def work(some):
        asked.extend(item.id for item in some)
        return [{"id": item.id} for item in reversed(some)]

    whole = here.resumable_map(file, items_of(7), 3, work, "select")
    assert len(asked) == 7 and {line["id"] for line in whole} == set(map(str, range(7)))
    text = file.read_text()
    # killed while it wrote the fifth
    file.write_text("".join(text.splitlines(keepends=True)[:4]) + '{"id": "')
    asked.clear()
    again = here.resumable_map(file, items_of(7), 3, work, "select")
    assert again == whole and file.read_text() == text and len(asked) == 4, (
        "the cut chunk whole, and the rest"
    )
    asked.clear()
    assert here.resumable_map(file, items_of(7), 3, work, "select") == whole and not asked


def test_lines_that_are_not_wanted_are_dropped(tmp_path):
    here, file = run_of(tmp_path), tmp_path / "rl/metrics.jsonl"
    here.keep_lines(file, lambda line: False)
    assert not file.exists()
    here.append(file, [{"step": i, "text": "a\u2028b"} for i in range(5)])
    here.keep_lines(file, lambda line: line["step"] <= 2)
    assert [json.loads(line)["step"] for line in file.read_text().split("\n")[:-1]] == [0, 1, 2]


# --- sums and counts ------------------------------------------------------------------------------


def test_means_are_over_what_was_counted(tmp_path):
    """Means are over what was counted. Nothing counted has no mean."""
    numbers = {"a": (3.0, 4), "none": (0.0, 0), "loss": (-0.5, 0)}
    assert run_of(tmp_path).average(numbers) == {"a": 0.75, "loss": -0.5}
    assert run.finite({"a": 1.0, "b": float("nan"), "c": float("inf")}) == {"a": 1.0}


# --- launching ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "gpus", "cores", "says"),
    [
        (
            {"LOCAL_WORLD_SIZE": "3"},
            2,
            64,
            "3 processes on a machine with 2 GPUs. Give num_processes: 2",
        ),
        ({"LOCAL_WORLD_SIZE": "9"}, 0, 8, "9 processes on a machine with no GPU and 8 CPU cores"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, 1, 1, "give fsdp_version: 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, 1, 1, "DEEPSPEED is not supported"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, 1, 1, "MEGATRON_LM is not supported"),
    ],
)
def test_a_launch_that_cannot_work_is_refused(env, gpus, cores, says):
    with pytest.raises(run.ConfigError, match=says):
        run.check_launch(env, gpus, cores)


def test_a_launch_that_can_work_is_not(tmp_path):
    for env, gpus, cores in (
        ({}, 0, 1),
        ({"LOCAL_WORLD_SIZE": "4"}, 0, 2),
        ({"LOCAL_WORLD_SIZE": "2"}, 2, 1),
    ):
        run.check_launch(env, gpus, cores)
    run.check_launch({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, 1, 1)


def test_batches_split_over_processes_or_are_refused(tmp_path, monkeypatch):
    accelerator = run.Accelerator
    monkeypatch.setattr(accelerator, "num_processes", property(lambda self: 3))
    for name, size in (("prompts_per_step", 32), ("sft_batch", 8)):
        options = {"prompts_per_step": 6, "sft_batch": 6} | {name: size}
        with pytest.raises(
            run.ConfigError, match=f"{name}: {size} is not a multiple of the 3 processes"
        ):
            run_of(tmp_path / name, **options)
