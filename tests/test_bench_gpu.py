"""bench/gpu.py where there is no GPU: every part with tiny sizes, and what goes wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench import gpu

ROOT = Path(__file__).parent.parent
CARD = {"name": "a card", "memory": 80e9, "driver": "580", "flops": 8e14, "read": 3e12}


def test_some_parts_run_dry(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--dry", "--out", tmp_path]
    command += ["--parts", "card", "fsdp2", "3b-lora"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "gpu.md").read_text()
    assert table in done.stdout and table.count("| passed |") == 6 and "\n| 3b-lora | " in table
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"]["3b-lora"]["static"] > 0


@pytest.mark.slow
def test_every_part_runs_dry(tmp_path):
    """Each with its checks passed or its seconds; TRL's only where TRL is installed."""
    command = [sys.executable, "-m", "bench.gpu", "--dry", "--out", tmp_path, "--minutes", 30]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    results = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert done.returncode == 0, done.stdout + json.dumps(results, indent=1)
    assert list(results) == list(gpu.PARTS)
    left_out = {part for part, found in results.items() if "not run" in found}
    assert left_out == ({"trl-3b-lora", "trl-7b-lora"} if gpu.missing(gpu.FOR_TRL) else set())
    checks = {part: len(found["checks"]) for part, found in results.items() if "checks" in found}
    assert checks == {"float32": 6, "bfloat16": 6, "fsdp2": 6, "flex": 1}
    table = (tmp_path / "gpu.md").read_text()
    assert table in done.stdout and table.count("| passed |") == 19
    for part in ("3b-lora", "7b-lora", "3b-full", "7b-full"):
        assert f"\n| {part} | " in table and results[part]["seconds"]["update"] > 0


def test_a_broken_part_is_told_and_the_others_run(monkeypatch, tmp_path):
    """The files are rewritten after each part: a killed command loses nothing."""
    row = {"check": "sampler", "value": 7.0, "allowed": 5.0, "passed": False}
    least = {"reference": 8e13, "update": 8e13, "bytes": 3e11}
    seconds = {"generate": 2.0, "reference": 0.5, "update": 1.0, "step": 3.5}
    step = {"seconds": seconds, "least": least, "tokens": 4096, "peak": 2e10, "predicted": 1e10}
    finds = {
        "card": CARD,
        "float32": {"checks": [row, {"check": "LoRA", "failed": "RuntimeError: no"}]},
        "flex": {"failed": "CUDA error: an illegal memory access was encountered"},
        "3b-lora": step,
        "7b-full": {"not run": "7b-full needs 155 GB"},
    }

    def run_part(part, seconds, dry):
        before = list(finds)[: list(finds).index(part)]
        if before:
            assert list(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == before
        return finds[part]

    monkeypatch.setattr(gpu, "run_part", run_part)
    results = gpu.measure(list(finds), 8, False, tmp_path)
    assert [part for part, found in results["parts"].items() if gpu.is_broken(found)] == [
        "float32",
        "flex",
    ]
    table = (tmp_path / "gpu.md").read_text()
    assert "a card, 80 GB, driver 580: bf16 products 800 TFLOP/s, memory read at 3 TB/s" in table
    assert "| float32 | sampler | 7 | 5 | **failed** |" in table
    assert "| float32 | LoRA | RuntimeError: no | | **failed** |" in table
    assert "- flex: failed: CUDA error" in table and "- 7b-full: not run: 7b-full needs" in table
    cells = "3.50 | 2.00 | 2048 | 5.00% | - | 0.50 | 20.00% | 1.00 | 10.00% | 20.0 | 10.0"
    assert f"| 3b-lora | {cells} |" in table


def dies(part: str, dry: bool, out: str, err: str) -> None:
    """In place of `gpu.play`: a part's process that ends in one way or another."""
    os.setsid()
    said = {"words": "Traceback\nCUDA error: busy\n\n", "late": "terminate called\n"}
    Path(err).write_text(said.get(part, ""))
    Path(out).write_text('loading\n{"seconds": {"step": 1.0}}\n' if part == "late" else "")
    if part == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    if part == "hangs":
        subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
    os._exit(3)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("words", "CUDA error: busy"),
        ("signal", "ended with exit code -9"),
        ("hangs", "stopped after 3 s"),
        ("late", None),
    ],
)
def test_a_part_that_dies_is_one_line(monkeypatch, part, says):
    """Its last words, or how it ended. One that dies after its result has found it."""
    monkeypatch.setattr(gpu, "play", dies)
    begun = time.time()
    found = gpu.run_part(part, 3 if part == "hangs" else 60, dry=False)
    assert found.get("failed") == says and time.time() - begun < 50
    assert gpu.is_broken(found) == (says is not None)


def test_without_time_a_part_is_not_begun(monkeypatch, tmp_path):
    monkeypatch.delattr(gpu, "run_part")
    parts = gpu.measure(list(gpu.PARTS), 0, True, tmp_path)["parts"]
    assert len(parts) == 11 and parts["3b-lora"]["not run"] == "0 s left"


def test_without_a_card_nothing_else_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "run_part", lambda *_: {"not run": "torch 2.11 sees no GPU"})
    with pytest.raises(SystemExit, match="1"):
        gpu.measure(["card", "float32"], 8, False, tmp_path)
    assert "card: not run: torch 2.11 sees no GPU" in capsys.readouterr().out


def test_a_card_too_small_is_refused_with_what_fits():
    from bench import gpu_parts  # here: the processes of `dies` import this file

    found = {p: gpu_parts.predicted(p, gpu_parts.WORK) for p in ("3b-lora", "7b-lora", "7b-full")}
    assert [round(n / 1e9) for n in found.values()] == [11, 22, 159]
    needed = {"3b-lora": 11e9, "7b-lora": 22e9, "7b-full": 159e9}
    assert gpu_parts.too_small("7b-lora", needed, 80e9) == ""
    assert gpu_parts.too_small("7b-full", needed, 24e9) == (
        "7b-full needs 159 GB (computed by engine/memory.py), the card has 24. "
        "What fits: 3b-lora (11), 7b-lora (22)"
    )
    assert gpu_parts.too_small("3b-lora", needed, 8e9).endswith("No other part fits")


def test_missing_and_old_packages_are_named(monkeypatch):
    monkeypatch.setitem(gpu.NEEDED, "no_such_module", "no-such-package")
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry"])
    with pytest.raises(SystemExit, match="error: not installed: no-such-package. pip install no-"):
        gpu.main()
    there = {"torch": "2.11.0+cu130", "transformers": "4.57.1", "av": "15"}
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert gpu.too_old(there, pyproject) == ["transformers 4.57.1 (at least 5.5.4 is needed)"]


@pytest.mark.parametrize("name, says", [
    ("memory", "memory by part, floors of time."),
    ("scaling", "the prompts and the processes."),
    ("step", "completion length and loss."),
    ("passes", "above the loaded model."),
    ("one_step", "Run python -m bench.step"),
])  # fmt: skip
def test_the_help_of_a_benchmark_is_whole(name, says):
    command = [sys.executable, "-m", f"bench.{name}", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert says in " ".join(done.stdout.split())
