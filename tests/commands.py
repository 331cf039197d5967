"""The commands as a user gives them, in processes forked from one that has imported what takes
seconds to import."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["stops", "eval"])


def start(
    *command, out: Path, err: Path, cwd: Path | None = None, moment: str = "", **environment
) -> BaseProcess:
    """Begin `python COMMAND`, a script of ours with its options. moment: of stops.py, when it kills
    itself."""
    place = str(cwd or Path.cwd()), str(out), str(err), os.environ | environment
    process = CONTEXT.Process(target=_run, args=(list(map(str, command)), *place, moment))
    process.start()
    return process


def launch(
    *options, script="train.py", check=True, cwd=None, processes=1
) -> subprocess.CompletedProcess:
    """`python SCRIPT OPTIONS`, to its end; several processes as torchrun starts them."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        ranks = [
            start(script, *options, out=out, err=err, cwd=cwd, **place)
            for place in places(processes)
        ]
        end = time.time() + 900
        while (left := [r.sentinel for r in ranks if r.exitcode is None]) and time.time() < end:
            wait(left, timeout=1)
            if any(rank.exitcode for rank in ranks):  # the others would wait for it
                end = min(end, time.time() + 15)
        code = max((rank.exitcode for rank in ranks if rank.exitcode), key=abs, default=0)
        for rank in ranks:
            if rank.exitcode is None:
                rank.kill()
                code = code or 1
        done = subprocess.CompletedProcess(
            (script, *options), code, out.read_text(), err.read_text()
        )
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


@contextmanager
def another_process_in(folder: Path, busy: str = "time.sleep(600)") -> Iterator[int]:
    """A process that holds the lock of a folder and works there. Its pid. It is killed with the
    block."""
    held = "import os, sys, time; from pathlib import Path; from engine.files import lock"
    held += f"; os.chdir({str(folder)!r}); kept = lock(Path('.')); print('held', flush=True)"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{held}; {busy}"], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert holder.stdout.readline() == "held\n"
    try:
        yield holder.pid
    finally:
        holder.kill()
        holder.wait()


def places(processes: int) -> list[dict[str, str]]:
    """The environment of each rank."""
    if processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    both |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    return [both | {"RANK": str(i), "LOCAL_RANK": str(i)} for i in range(processes)]


def _run(
    command: list[str], cwd: str, out: str, err: str, environment: dict[str, str], moment: str
) -> None:
    for path, number in ((out, 1), (err, 2)):
        with open(path, "a") as file:
            os.dup2(file.fileno(), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = command
    if not moment:
        runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        return
    import stops  # there already; here, because a test needs no training to import this file

    stops.stop_at(moment, "KILL")
    stops.train.cli()
