"""A SLURM cluster on this machine for one test: munged, slurmctld and slurmd with a configuration of their own."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=10
SchedulerParameters=sched_interval=2,batch_sched_delay=0
OverTimeLimit=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


def missing() -> list[str]:
    """The programs that are not installed (Debian: slurmctld, slurmd, slurm-client, munge)."""
    return [name for name in PROGRAMS if not shutil.which(name)] + ([] if os.getuid() == 0 else ["root"])


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """Start it, give the environment in which SLURM's commands find it, and end it."""
    for name in ("state", "spool", "etc"):
        (folder / name).mkdir(parents=True)
    os.chmod(folder, 0o755)  # munged refuses folders that others may change
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "etc" / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(
        host=host, folder=folder, controller=free_port(), daemon=free_port(), cpus=os.cpu_count()))  # fmt: skip
    (folder / "etc" / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    environment = {**os.environ, "SLURM_CONF": str(configuration)}
    commands = [
        ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket",
         f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"],
        ["slurmctld", "-D", "-f", str(configuration)],
        ["slurmd", "-D", "-f", str(configuration)],
    ]  # fmt: skip
    running = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("w") as output:
                running.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
            time.sleep(1)
        wait_for_node(environment, "idle")
        yield environment
    finally:
        subprocess.run(["scancel", "--user=root", "--signal=KILL"], env=environment, check=False)
        for process in reversed(running):
            process.send_signal(signal.SIGTERM)
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def wait_for_node(environment: dict[str, str], state: str, seconds: float = 60) -> None:
    """Until the node is in a state that begins so."""
    end = time.monotonic() + seconds
    while True:
        done = subprocess.run(["sinfo", "--noheader", "--format=%t"], env=environment, capture_output=True, text=True)
        if done.stdout.startswith(state):
            return
        assert time.monotonic() < end, f"the node is {done.stdout or done.stderr}, not {state}"
        time.sleep(0.5)
