"""A real SLURM of two nodes on this machine: a controller and two slurmd that share the host, with their own keys."""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.support.jobs import alive

PROGRAMS = ("munged", "slurmctld", "slurmd")
INSTALL = "export DEBIAN_FRONTEND=noninteractive; apt-get update && apt-get install -y --no-install-recommends "
INSTALL += "slurm-wlm munge"
NODES = ("node1", "node2")
HOSTS = Path("/etc/hosts")
CONF = """
ClusterName=spmd
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=cred_expire=5,socket={root}/munge.socket
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=5
WaitTime=0
MailProg=/bin/true
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} {node}
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} {node}
PartitionName=ci Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""
NODE = "Sockets=1 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=1000 Gres=gpu:8"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")


def missing() -> str | None:
    """Why there can be no SLURM here, if so. In a container of Debian's it is installed."""
    if os.geteuid() != 0:
        return "needs root: slurmd starts jobs as their users"
    if not all(map(shutil.which, PROGRAMS)) and shutil.which("apt-get") and not Path("/run/systemd/system").exists():
        subprocess.run(["timeout", "60", "sh", "-c", INSTALL], capture_output=True)
    lacking = [name for name in PROGRAMS if not shutil.which(name)]
    return f"{', '.join(lacking)} not installed: apt-get install slurm-wlm munge" if lacking else None


class Cluster:
    """The daemons' folder and what a person does at the prompt."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.env = {"SLURM_CONF": str(root / "slurm.conf")}

    def run(self, *command: str) -> str:
        """What a SLURM command prints."""
        done = subprocess.run(command, env=os.environ | self.env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What the controller knows of a job, as `scontrol show job` names it."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str) -> dict[str, str]:
        """Wait for a job to end for good."""
        until(lambda: self.job(job)["JobState"] in ENDED, f"job {job} to end")
        return self.job(job)

    def warn(self, job: str) -> None:
        """Tell a job's script that its time is nearly up, as `--signal=B:USR1@…` does."""
        self.run("scancel", "--batch", "--signal=USR1", job)


@contextlib.contextmanager
def cluster(root: Path) -> Iterator[Cluster]:
    """Start the daemons in a folder of root's own, wait for both nodes, stop them and what jobs left at the end."""
    _configure(root)
    slurm, names = Cluster(root), f"127.0.0.1 {' '.join(NODES)}  # {root}\n"
    HOSTS.write_text(f"{HOSTS.read_text()}{names}")
    try:
        _start(root)
        until(lambda: slurm.run("sinfo", "--noheader", "--format=%t %D").split() == ["idle", "2"], "the nodes")
        yield slurm
        slurm.run("scancel", "--user=root")
        until(lambda: not slurm.run("squeue", "--noheader"), "jobs to end")
    finally:
        _stop(root)
        HOSTS.write_text(HOSTS.read_text().replace(names, ""))


def _configure(root: Path) -> None:
    for folder in ("state", "gpu"):
        (root / folder).mkdir()
    for index in range(8):
        (root / "gpu" / str(index)).touch()
    (root / "munge.key").write_bytes(secrets.token_bytes(128))
    (root / "munge.key").chmod(0o600)
    (root / "gres.conf").write_text(f"Name=gpu File={root}/gpu/[0-7]\n")
    (root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # else slurmd looks for cgroups it doesn't need
    (root / "slurm.conf").write_text(CONF.format(root=root, ports=_free_ports(3), node=NODE))


def _start(root: Path) -> None:
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    conf = str(root / "slurm.conf")
    for command in (
        ["munged", "--force", *(f"--{option}={root}/munge.{name}" for option, name in files.items())],
        ["slurmctld", "-c", "-f", conf],
        *(["slurmd", "-N", node, "-f", conf] for node in NODES),
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=30)


def _stop(root: Path) -> None:
    """SLURM's daemons first: they need munge to end in peace."""
    for name in (*(f"slurmd.{node}.pid" for node in NODES), "slurmctld.pid", "munge.pid"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, ValueError):
            pid = int((root / name).read_text())
            os.kill(pid, signal.SIGTERM)
            until(lambda: not alive(pid), "a daemon to end")  # noqa: B023


def until(there: Callable[[], bool], what: str, timeout: float = 300) -> None:
    """Wait for something to come true."""
    deadline = time.monotonic() + timeout
    while not there():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.2)  # what is looked at often costs a process


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
