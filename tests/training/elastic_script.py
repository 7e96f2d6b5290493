"""What a rank of test_elastic.py or test_slurm.py runs: `twolevel train`, in whose first round something happens.

LAUNCHER elastic_script.py {kill,grow,hold} STEP ARGUMENTS of twolevel train...
"""

import os
import signal
import sys
import threading

from twolevel.cli import main
from twolevel.training.epoch import Epochs

kind, step, *argv = sys.argv[1:]
take_step = Epochs.step


def killed(self, images, labels):
    """The last rank dies in this step, unless it has been started again."""
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and self.state.step + 1 == int(step) and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(self, images, labels)


def lengthened(self, images, labels):
    """One rank alone says that it trains and stays in this step until another has come, and it is asked to stop."""
    if self.state.step + 1 == int(step) and os.environ["WORLD_SIZE"] == "1":
        print("ready", flush=True)
        while self.stop.asked_at is None:
            threading.Event().wait(0.05)
    return take_step(self, images, labels)


def held(self, images, labels):
    """The last rank stays in this step until all agree to stop, or it is killed, unless Slurm has restarted the job."""
    first = "SLURM_RESTART_COUNT" not in os.environ
    if first and self.state.step + 1 == int(step) and os.environ["SLURM_PROCID"] == "1":
        print("held", os.getpid(), flush=True)
        self.stop.agreed.wait(300)
    return take_step(self, images, labels)


if __name__ == "__main__":
    Epochs.step = {"kill": killed, "grow": lengthened, "hold": held}[kind]
    code = main(argv)
    sys.stdout.flush()
    os._exit(code)  # as `twolevel.cli.entry`
