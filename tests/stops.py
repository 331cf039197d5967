"""train.py, stopped at a moment that it makes itself. Arguments: MOMENT SIGNAL, then options of
train.py.

MOMENT: sft-N or rl-N, before the optimiser's step in update N; scoring-N, before the N-th lines of
scores.jsonl are written; selection, before selected.json is; checkpoint-N, when checkpoint N is
written but has not got its name. SIGNAL: KILL, of the last process; INT, of the whole group, as a
terminal's Ctrl-C.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train


def stop_at(moment: str, kind: str) -> None:
    place, _, number = moment.partition("-")
    n, seen = int(number or 1), []

    def stop() -> None:
        os.killpg(0, signal.SIGINT) if kind == "INT" else os.kill(os.getpid(), signal.SIGKILL)

    def before(owner, name: str, here) -> None:
        original = getattr(owner, name)

        def wrapped(self, *args, **named):
            if here(self, *args):
                stop()
            return original(self, *args, **named)

        setattr(owner, name, wrapped)

    def nth_scores(run, file, lines) -> bool:
        seen.extend([file] * (file.name == "scores.jsonl"))
        return len(seen) == n and file.name == "scores.jsonl"

    def last_of_stage(learner) -> bool:
        return (
            learner.stage == place
            and learner.step == n
            and learner.run.rank == learner.run.processes - 1
        )

    def write_folder(run, folder, save, original=train.Run.write_folder):
        def save_and_stop(beside):
            save(beside)
            stop()

        original(run, folder, save_and_stop if folder.name == moment else save)

    if place == "checkpoint":
        train.Run.write_folder = write_folder
    elif place == "scoring":
        before(train.Run, "append", nth_scores)
    elif place == "selection":
        before(train.Run, "write", lambda run, file, value: file.name == "selected.json")
    else:
        before(train.Learner, "update", last_of_stage)


if __name__ == "__main__":
    stop_at(sys.argv.pop(1), sys.argv.pop(1))
    train.cli()
