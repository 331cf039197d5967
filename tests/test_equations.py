"""examples/equations.py: the worked examples print numbers that were checked by hand, and both
plots are drawn."""

import subprocess
import sys
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parent.parent


def test_the_walk_prints_and_draws(tmp_path):
    command = [sys.executable, "-m", "examples.equations", "--plot", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for number in ("H = 1.2125 nats", "p* = 0.4726", "loss = 1.370, active anchors 2", "-0.707"):
        assert number in done.stdout
    for name in ("entropy", "cosines"):
        assert Image.open(tmp_path / f"{name}.png").size[0] > 500
