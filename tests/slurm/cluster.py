"""A real Slurm cluster of two nodes on this machine, for tests: start it, submit to it, stop it.

Everything of a cluster (configuration, key, sockets, logs) is in one folder, its ports are free
ones and its munge daemon is its own, so that it meets neither another cluster on the machine nor
what an earlier one left behind. Needs root, and the programs that tests/slurm/install.sh installs.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Names that every task can look up, as MASTER_ADDR must be, without an entry in /etc/hosts.
NODES = ("127.0.0.1", "127.0.0.2")
DAEMONS = ("munged", "slurmctld", "slurmd")
_ENDED = (
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"),
    "PREEMPTED",
)
# The kernel allows 108 bytes; the longest socket here is "spool-127.0.0.1/127.0.0.1_<job>.<step>".
_MAX_FOLDER_BYTES = 60

JobId = int | str  # an element of a job array is "ARRAY_INDEX"

# SchedulerParameters: schedule at once; a job otherwise waits 3 s for the next round, and one of
# several parts 30 s.
# cred_expire: a requeued job waits this long before it starts (120 s unless set).
# config_overrides: believe the CPUs and memory given here, whatever the machine has.
# Jobs of the partition `urgent` preempt those of `spare`; nothing else preempts.
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=5
SlurmdTimeout=12
GresTypes=gpu
SlurmdParameters=config_overrides
FirstJobId={first_job_id}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE State=UP PreemptMode=OFF
PartitionName=debug Default=YES
PartitionName=spare PreemptMode=REQUEUE PriorityTier=1
PartitionName=urgent PriorityTier=2
"""
_NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2"
    " RealMemory=1000 Gres=gpu:2 State=UNKNOWN\n"
)
# Pretended GPUs: device files that exist everywhere.
_GRES = "NodeName={name} Name=gpu File=/dev/null\nNodeName={name} Name=gpu File=/dev/zero\n"


class ClusterError(RuntimeError):
    """The cluster did not start, or a job did not end as expected; the message holds the logs."""


@dataclass(frozen=True)
class Job:
    """A job that has ended."""

    id: JobId
    state: str  # COMPLETED, FAILED, ...
    exit_code: int
    log: str


def missing_requirement() -> str | None:
    """Why no cluster can be started on this machine, or None."""
    if os.geteuid() != 0:
        return "starting Slurm needs root"
    missing = [name for name in (*DAEMONS, "sbatch") if _which(name) is None]
    if missing:
        return f"no {', '.join(missing)}: run tests/slurm/install.sh (Debian or Ubuntu)"
    return None


class Cluster:
    """Two nodes with 2 CPUs and 2 pretended GPUs each, and their controller; a context manager.

    Raises:
        ClusterError: on entering, if the cluster does not come up; it is then stopped again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Not what a real cluster, a job around these tests, or the tests' own thread limit has set.
        foreign = ("SLURM", "SBATCH", "OMP_NUM_THREADS")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        self.env["SLURM_CONF"] = str(folder / "slurm.conf")
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}
        self._log_paths: dict[JobId, Path] = {}

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def submit(
        self,
        script: str | Path,
        *args: str | Path,
        nodes: int = 2,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
    ) -> int:
        """Submit a batch script from `cwd` and return the job's id.

        The job's log goes to the cluster's folder, not where the script says.

        Args:
            options: further options of sbatch, such as `--gpus-per-node=2`.
            env: variables to set in the submitting shell, from which Slurm hands them to the job.
        """
        output = f"--output={self.folder}/job-%j.out"
        command = ["sbatch", "--parsable", f"--nodes={nodes}", output, *options, script, *args]
        return int(self.run(*command, env=env, cwd=cwd))

    def run(
        self, *command: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT
    ) -> str:
        """Run a command (`squeue`, `scontrol`, ...) against this cluster; returns its output."""
        result = subprocess.run(
            command,
            env={**self.env, **(env or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if result.returncode:
            output = result.stdout + result.stderr
            raise ClusterError(f"{' '.join(map(str, command))} failed: {output}")
        return result.stdout

    def job(self, job_id: JobId) -> dict[str, str]:
        """What `scontrol show job` says about a job, such as JobState, ExitCode and StdOut."""
        line = self.run("scontrol", "show", "job", "--oneliner", str(job_id))
        return dict(field.split("=", 1) for field in line.split() if "=" in field)

    def wait(self, job_id: JobId, timeout: float = 60, state: str = "COMPLETED") -> Job:
        """Wait until a job has ended, and check how.

        Args:
            timeout: seconds; a job that takes longer is cancelled.
            state: the state it should end in.

        Raises:
            ClusterError: if it does not end in time or ends in another state, with the logs.
        """
        deadline = time.monotonic() + timeout
        while (info := self.job(job_id))["JobState"] not in _ENDED:
            if time.monotonic() > deadline:
                self.run("scancel", str(job_id))
                raise ClusterError(
                    f"job {job_id} is still {info['JobState']} ({info['Reason']}) after"
                    f" {timeout:.0f} s\n{self.logs(job_id)}"
                )
            time.sleep(0.1)
        if info["JobState"] != state:
            raise ClusterError(
                f"job {job_id} is {info['JobState']}, expected {state} (exit code and signal"
                f" {info['ExitCode']}, reason {info['Reason']})\n{self.logs(job_id)}"
            )
        exit_code = int(info["ExitCode"].split(":")[0])
        return Job(job_id, info["JobState"], exit_code, self.log(job_id))

    def wait_for(self, job_id: JobId, text: str, timeout: float = 60) -> None:
        """Wait until a job has printed `text`; raises ClusterError with the logs if it does not."""
        deadline = time.monotonic() + timeout
        while text not in self.log(job_id):
            if time.monotonic() > deadline or self.job(job_id)["JobState"] in _ENDED:
                raise ClusterError(f"job {job_id} printed no {text!r}\n{self.logs(job_id)}")
            time.sleep(0.1)

    def log(self, job_id: JobId) -> str:
        """What the job has printed so far."""
        path = self._log_paths.get(job_id)
        if path is None:
            info = self.job(job_id)
            path = Path(info["StdOut"])
            if info["JobState"] != "PENDING":  # when %j of an element is not known yet
                self._log_paths[job_id] = path  # tests poll logs, and scontrol is slow
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self, job_id: JobId | None = None) -> str:
        """The end of every log, for a failure's message."""
        texts = {path.name: path.read_text(errors="replace") for path in self.folder.glob("*.log")}
        if job_id is not None:
            texts[f"job {job_id}"] = self.log(job_id)
        return "\n".join(f"--- {name}\n{text[-6000:]}" for name, text in sorted(texts.items()))

    def kill_node(self, name: str, tasks: bool = True) -> None:
        """Kill a node's daemon and, unless not `tasks`, all that runs there: a power cut."""
        daemon = self.nodes.pop(name)
        daemon.kill()
        daemon.wait()
        self.daemons.remove(daemon)
        for process in self._steps(name) if tasks else ():
            self._signal(process, signal.SIGKILL)

    def freeze_node(self, name: str, daemon: bool = True) -> None:
        """Stop all that runs on a node, its daemon too unless not `daemon`; it goes on later."""
        for process in [*([self.nodes[name].pid] if daemon else []), *self._steps(name)]:
            self._signal(process, signal.SIGSTOP)

    def thaw_node(self, name: str) -> None:
        """Let a frozen node go on, where it stopped."""
        for process in [self.nodes[name].pid, *self._steps(name)]:
            self._signal(process, signal.SIGCONT)

    def _steps(self, name: str) -> list[int]:
        """The processes of a node's jobs: what they run, and the slurmstepd above."""
        mark, found = f"SLURMD_NODENAME={name}".encode(), []
        for process in self.processes():
            with contextlib.suppress(OSError):  # ended meanwhile
                if mark not in Path(f"/proc/{process}/environ").read_bytes().split(b"\0"):
                    continue
                parent = int(Path(f"/proc/{process}/stat").read_text().rsplit(")")[1].split()[1])
                if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
                    found.append(parent)
                found.append(process)
        return found

    def start_node(self, name: str) -> None:
        """Start a node's daemon."""
        self._launch("slurmd", "-D", "-N", name, log=f"slurmd-{name}.log")
        self.nodes[name] = self.daemons[-1]

    @staticmethod
    def _signal(process: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)

    def stop(self) -> None:
        """End the daemons, then kill the jobs that are left."""
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self.daemons.clear()
        deadline = time.monotonic() + 10
        while (left := self.processes()) and time.monotonic() < deadline:
            for process in left:
                self._signal(process, signal.SIGKILL)
            time.sleep(0.05)

    def processes(self) -> list[int]:
        """Every process of this cluster, that is with its SLURM_CONF: daemons, steps and tasks."""
        mark, found = f"SLURM_CONF={self.env['SLURM_CONF']}".encode(), []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended meanwhile
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append(int(process.name))
        return found

    def _start(self) -> None:
        if len(str(self.folder).encode()) > _MAX_FOLDER_BYTES:
            raise ClusterError(
                f"{self.folder} is too long a path for Unix sockets: set TMPDIR=/tmp, or give"
                " pytest a shorter --basetemp"
            )
        self._write_config()
        # --force: munge otherwise wants a folder that every user may enter; pytest's are private.
        self._launch(
            *("munged", "--foreground", "--force"),
            f"--socket={self.folder}/munge.socket",
            f"--key-file={self.folder}/munge.key",
            f"--pid-file={self.folder}/munged.pid",
            f"--log-file={self.folder}/munge-events.log",
            f"--seed-file={self.folder}/munge.seed",
            log="munged.log",
        )
        self._wait_until((self.folder / "munge.socket").exists, 10, "munged")
        self._launch("slurmctld", "-D", log="slurmctld.log")
        for node in NODES:
            self.start_node(node)
        self._wait_until(self._all_idle, 60, "both nodes to be idle")

    def reconfigure(self, conf: str) -> None:
        """Give the running daemons another slurm.conf.

        Nodes read it after `scontrol` has returned, maybe while the next one comes: it is replaced
        whole, for a slurmd that finds an empty file ends.
        """
        new = self.folder / "slurm.conf.new"
        new.write_text(conf)
        new.replace(self.folder / "slurm.conf")
        self.run("scontrol", "reconfigure")

    def _write_config(self) -> None:
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        host = socket.gethostname()
        controller_port, *ports = _free_ports(1 + len(NODES))
        conf = SLURM_CONF.format(
            host=host,
            folder=self.folder,
            controller_port=controller_port,
            # A job's MASTER_PORT and the folder of its notes come from its id: no two clusters of a
            # machine may count alike. The controller's port is its own; ids go up to 67 million.
            first_job_id=1013 * controller_port,
        )
        for name, port in zip(NODES, ports, strict=True):
            conf += _NODE.format(name=name, host=host, port=port)
        (self.folder / "slurm.conf").write_text(conf)
        (self.folder / "gres.conf").write_text("".join(_GRES.format(name=n) for n in NODES))

    def _launch(self, program: str, *args: str, log: str) -> None:
        path = _which(program)
        assert path is not None, f"{program} is not installed (missing_requirement)"
        with (self.folder / log).open("ab") as output:
            # setpriv: the daemon ends with this process, even one that is killed.
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", path, *args],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for pytest, which then stops them in order
            )
        self.daemons.append(daemon)

    def _all_idle(self) -> bool:
        try:
            states = self.run("sinfo", "--noheader", "--partition=debug", "--Node", "--format=%T")
        except ClusterError:
            return False  # the controller does not answer yet
        return states.split() == ["idle"] * len(NODES)

    def _wait_until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            dead = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            if dead or time.monotonic() > deadline:
                reason = f"a daemon ended: {dead}" if dead else f"not within {timeout:.0f} s"
                raise ClusterError(f"waited for {what}: {reason}\n{self.logs()}")
            time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    """Different ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        # All open at once: the kernel would otherwise hand out the same one again.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def _which(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
