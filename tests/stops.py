"""train.py, whose last process is killed before the optimiser's step in update STEP of RL. Arguments: STEP, options."""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import train

STEP, ORIGINAL = int(sys.argv.pop(1)), train.Learner.update


def update(learner) -> None:
    if learner.stage == "rl" and learner.step == STEP and learner.run.rank == learner.run.processes - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ORIGINAL(learner)


train.Learner.update = update
train.cli()
