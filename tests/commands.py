"""The commands as a user gives them, in processes forked from one that has imported what takes
seconds to import."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["stops", "eval"])


def start(*command, out: Path, err: Path, cwd: Path | None = None, moment: str = "") -> BaseProcess:
    """Begin `python COMMAND`, a script of ours with its options. moment: of stops.py, when it kills
    itself."""
    place = str(cwd or Path.cwd()), str(out), str(err), dict(os.environ)
    process = CONTEXT.Process(target=_run, args=(list(map(str, command)), *place, moment))
    process.start()
    return process


def launch(*options, script="train.py", check=True, cwd=None) -> subprocess.CompletedProcess:
    """`python SCRIPT OPTIONS`, to its end."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(script, *options, out=out, err=err, cwd=cwd)
        process.join(900)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(out.read_text()[-3000:] + err.read_text()[-3000:])
        done = subprocess.CompletedProcess(
            (script, *options), process.exitcode, out.read_text(), err.read_text()
        )
    if check:
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


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
