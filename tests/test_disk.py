"""A full disk: the error says so, and nothing half-written is taken for whole."""

import shutil
import subprocess
import sys

import pytest
from test_train import ROOT, SMALL


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB; the tiny policy alone needs more."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_that_looks_whole(world, small_disk):
    options = ["--world", world, "--output_dir", small_disk / "run", *SMALL, "--sft_steps", "4"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *map(str, options)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode != 0 and "the disk is full" in done.stderr and "Traceback" not in done.stderr
    assert not list((small_disk / "run/sft").glob("checkpoint-*")) and not (small_disk / "run/sft/policy").exists()
