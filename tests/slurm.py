"""A Slurm cluster of this machine alone for tests: its own daemons, ports, key and folder."""

import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from pool import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue", "setpriv")
# Seconds; every wait is for something that takes at most a minute when the machine is quiet.
LIMIT = 300.0
# cred_expire: how long Slurm lets a job wait that is put back, 120 s unless set, 5 s at least.
CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=normal Nodes={host} Default=YES PriorityTier=1
PartitionName=urgent Nodes={host} PriorityTier=2
"""


def not_supported_reason() -> str | None:
    """Why there can be no cluster here."""
    if os.environ.get("TWOLEVEL_TEST_SLURM") != "1":
        return "set TWOLEVEL_TEST_SLURM=1 to start a Slurm cluster (minutes)"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"no {', '.join(missing)} here; on Debian: apt-get install slurm-wlm munge"
    return None if os.getuid() == 0 else "Slurm's daemons need root"


def until(condition: Callable[[], bool], told: Callable[[], str]) -> None:
    """Wait for it; `told` is what a failure shows."""
    end = time.monotonic() + LIMIT
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"still waiting after {LIMIT:.0f} s:\n{told()}")
        threading.Event().wait(0.2)


class Cluster:
    """One node of two processors and two partitions, of which `urgent` preempts `normal`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.host = socket.gethostname().split(".")[0]
        self.daemons: list[subprocess.Popen] = []
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environ = clean | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        conf = CONF.format(host=self.host, ports=[free_port(), free_port()], folder=self.folder)
        (self.folder / "slurm.conf").write_text(conf)
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(128))
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid"}
        files |= {"seed-file": "munged.seed", "log-file": "munged.log"}
        # --force: the folders of pytest are for their owner alone, where munged wants its socket open to all.
        words = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._daemon("munged", "--foreground", "--force", *words)
        until((self.folder / "munge.socket").exists, self.logs)
        self._daemon("slurmctld", "-D", "-c")
        self._daemon("slurmd", "-D")
        until(lambda: "State=IDLE" in self._words("scontrol", "show", "node"), self.logs)

    def close(self) -> None:
        """End all jobs, then the daemons."""
        try:
            if len(self.daemons) == 3:
                for state in ("PENDING", "RUNNING"):
                    self.control("scancel", f"--state={state}")
                until(lambda: not self._words("squeue", "--noheader"), self.logs)
        finally:
            for daemon in reversed(self.daemons):
                daemon.terminate()
                try:
                    daemon.wait(30)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()

    def sbatch(self, *words: object, **environ: str) -> str:
        """Submit a job; returns its number."""
        argv = ["sbatch", "--parsable", *map(str, words)]
        done = subprocess.run(argv, env=self.environ | environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What Slurm says of a job, by name: JobState, Restarts, ExitCode, ..."""
        words = self._words("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def control(self, *argv: str) -> None:
        """scontrol or scancel, which has to succeed."""
        subprocess.run(argv, env=self.environ, check=True)

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in self.folder.glob("*.log"))

    def _words(self, *argv: str) -> str:
        return subprocess.run(argv, env=self.environ, capture_output=True, text=True).stdout

    def _daemon(self, name: str, *words: str) -> None:
        """It ends with this process, even if that is killed."""
        argv = ["setpriv", "--pdeathsig", "TERM", str(shutil.which(name)), *words]
        with open(self.folder / f"{name}.out.log", "w") as file:
            self.daemons.append(subprocess.Popen(argv, env=self.environ, stdout=file, stderr=file))
