"""Media read ahead by worker processes: the same rows, order, tensors and errors."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import corruption
import data
import train
from engine import DataError, loader

LIMITS = {"fps": 2.0, "max_frames": 4, "min_pixels": 3136, "max_pixels": 401_408}


def settings(workers, **changes):
    return SimpleNamespace(**{"media_workers": workers, "reward": "", **LIMITS, **changes})


@pytest.fixture(scope="module")
def rows(world):
    """Pictures, clips, one that is occluded and one without media."""
    rows = data.load(world / "data")["train"][:7]
    assert {row.data_type for row in rows} == {"image", "video"}
    hidden = corruption.corrupt(rows[:1], "occlude", 0)[0]
    return [*hidden, *rows[1:], replace(rows[0], id="bare", media=(), sizes=())]


@pytest.mark.parametrize("workers", [1, 2])
def test_order_and_tensors_are_those_without_workers(rows, policy, workers):
    batches = [rows[:3], rows[3:6], rows[6:]]
    for row in rows:  # what a process has read, one that is forked from it reads too
        loader.media_parts(row, 2.0, 4)
    state = torch.get_rng_state()
    found = list(loader.read_ahead(batches, settings(workers)))
    assert torch.equal(torch.get_rng_state(), state)
    assert found == batches and all(row.decoded is not None for batch in found for row in batch)
    for batch, plain in zip(found, batches):
        got, want = (policy.encode(data.prompts(some, True, 2.0, 4)) for some in (batch, plain))
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_media_that_were_read_ahead_are_read_once(rows, tmp_path):
    [[row]] = loader.read_ahead([rows[1:2]], settings(1))
    [turn] = data.messages(replace(row, media=(tmp_path / "gone",)), "?")
    assert turn["content"][:-1] == row.decoded


def test_without_workers_rows_are_left_as_they_are(rows):
    [found] = loader.read_ahead([rows], settings(0))
    assert all(row.decoded is None for row in found)
    assert list(loader.read_ahead([[], []], settings(2))) == [[], []]


def test_a_picture_is_resized_once():
    """Near limits that lie close together a second time would change the size again."""
    part = {"type": "image", "image": Image.new("RGB", (300, 200))}
    limits = 60_000, 60_000
    once = loader.resized(part, *limits)
    again = loader.resized({"type": "image", "image": once["image"]}, *limits)
    assert again["image"].size != once["image"].size
    assert loader.resized(once, *limits) is once


def test_a_reward_of_ones_own_gets_pictures_as_they_are(rows):
    """The model gets the size that its limits ask for."""
    row, small = next(row for row in rows if row.data_type == "image"), {"min_pixels": 784}
    small |= {"max_pixels": 784}
    for reward, size in (("file.py:name", (56, 56)), ("", (28, 28))):
        [[found]] = loader.read_ahead([[row]], settings(1, reward=reward, **small))
        [part] = found.decoded
        assert part["image"].size == size


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_that_breaks_stops_the_run_in_one_line(world, tmp_path, monkeypatch, workers):
    """At its own update, in the words of reading without workers."""
    broken = []

    def open_data(cfg, run, original=train.open_data):
        sets = original(cfg, run)
        bad = tmp_path / "bad.png"
        bad.write_bytes(b"cut off after the check")
        order = run.permutation("sft", 0, len(sets["cold_start"]))
        row = sets["cold_start"][order[4]]  # of the third update
        sets["cold_start"][order[4]] = replace(row, media=(bad,), data_type="image")
        broken.append(bad)
        return sets

    monkeypatch.setattr(train, "open_data", open_data)
    options = ["--method", "sft", "--sft_steps", "4", "--sft_batch", "2", "--quiet", "true"]
    where = ["--world", str(world), "--output_dir", str(tmp_path / "run")]
    cfg = train.parse_config([*options, *where, "--media_workers", str(workers)])
    with pytest.raises(DataError) as error:
        train.main(cfg)
    with pytest.raises(DataError) as plain:
        loader.read_image(broken[0])
    assert str(error.value) == str(plain.value) and "\n" not in str(error.value)
    assert (tmp_path / "run/sft/metrics.jsonl").read_text().count("\n") == 2
