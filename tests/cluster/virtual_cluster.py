"""A real SLURM cluster on one machine: a network, host name and mount namespace for each node, joined by a bridge.

slurmctld, slurmd, munged and sshd are Debian's; only the machines are virtual. Needs root.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from datetime import datetime
from pathlib import Path
from types import TracebackType

NEEDS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "runuser")
_NETWORK = "10.78.0"


def unavailable(*programs: str) -> str | None:
    """Why no cluster with ``programs`` can be started here, None if one can."""
    if os.geteuid() != 0:
        return "the virtual cluster needs root (network namespaces)"
    missing = [name for name in (*NEEDS, *programs) if not shutil.which(name, path=_path())]
    if missing:
        return f"{', '.join(missing)} not installed: bash tests/cluster/install.sh"
    probe = _space("probe")
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


class VirtualCluster:
    """Context: ``nodes`` nodes n1, n2, ... and a controller vctl; files in ``root``.

    ``cpus`` and ``gpus``: what SLURM believes that a node has, and gives to jobs."""

    def __init__(self, root: Path, nodes: int, cpus: int = 2, gpus: int = 2) -> None:
        self.root, self.cpus, self.gpus = root, cpus, gpus
        self.nodes = [f"n{i + 1}" for i in range(nodes)]
        self._daemons: list[Path] = []

    def __enter__(self) -> VirtualCluster:
        for name in ("state", "log", "run", "munge"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        try:
            self._make_network()
            self._start_munge()
            (self.root / "slurm.conf").write_text(self._slurm_conf())
            for gpu in range(self.gpus):
                (self.root / f"gpu{gpu}").touch()  # SLURM wants a file for each, and has no other use for it
            (self.root / "gres.conf").write_text(f"Name=gpu File={self.root}/gpu[0-{self.gpus - 1}]\n")
            self.run("vctl", ["slurmctld"])
            self._daemons.append(self.root / "run/slurmctld.pid")
            for node in self.nodes:
                (self.root / f"spool.{node}").mkdir(exist_ok=True)
                self.run(node, ["slurmd"])
                self._daemons.append(self.root / f"run/slurmd.{node}.pid")
            self.wait_idle()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if any(path.name == "slurmctld.pid" for path in self._daemons):
            self.run("vctl", ["scancel", "--full", "--user=root"], check=False, timeout=20)
            time.sleep(1)
        for path in self._daemons:
            if path.exists():
                subprocess.run(["kill", path.read_text().strip()], check=False, capture_output=True)
        time.sleep(1)
        for name in map(_space, ("vctl", *self.nodes)):
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            if inside:
                subprocess.run(["kill", "-9", *inside], check=False, capture_output=True)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)

    def popen(self, node: str, command: list[str], cwd: Path | None = None, **env: str) -> subprocess.Popen[str]:
        """Start ``command`` on ``node``, its output in a pipe."""
        inside = 'hostname "$0"; for f in "$1"/*; do mount --bind "$f" "/etc/${f##*/}"; done; shift; exec "$@"'
        # /sys stays as it is (`ip netns exec` would hide /sys/fs/cgroup, without which slurmd does not start).
        network = ["nsenter", f"--net=/run/netns/{_space(node)}"]
        machine = ["unshare", "--uts", "--mount", "--propagation", "private", "sh", "-c", inside, node]
        environ = {**os.environ, "PATH": _path(), "SLURM_CONF": str(self.root / "slurm.conf"), **env}
        for key in [k for k in environ if k.startswith(("SLURM_", "RANK", "MASTER_")) and k != "SLURM_CONF"]:
            if key not in env:
                del environ[key]
        return subprocess.Popen(
            [*network, *machine, str(self.root / "etc"), *command], cwd=cwd, env=environ, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(
        self,
        node: str,
        command: list[str],
        cwd: Path | None = None,
        timeout: float = 60,
        check: bool = True,
        **env: str,
    ) -> str:
        """What ``command`` prints on ``node``; raises with it if the status is not 0."""
        process = self.popen(node, command, cwd, **env)
        out = ""
        try:
            if command[0] in ("slurmctld", "slurmd", "/usr/sbin/sshd"):
                process.wait(timeout)  # the daemon keeps the pipe open
            else:
                out = process.communicate(timeout=timeout)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            raise TimeoutError(f"{shlex.join(command)} on {node}: no end after {timeout} s") from None
        if check and process.returncode:
            raise RuntimeError(f"{shlex.join(command)} on {node}: status {process.returncode}\n{out}")
        return out

    def start_ssh(self) -> None:
        """sshd on every node; root of any node enters every other one by key."""
        folder = self.root / "etc/ssh"
        folder.mkdir()
        for key in ("host_key", "key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
        Path("/run/sshd").mkdir(exist_ok=True)
        server = {"HostKey": "/etc/ssh/host_key", "AuthorizedKeysFile": "/etc/ssh/key.pub", "StrictModes": "no"}
        (folder / "sshd_config").write_text(_ssh_settings({**server, "UsePAM": "no", "PermitRootLogin": "yes"}))
        client = {"IdentityFile": "/etc/ssh/key", "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null"}
        (folder / "ssh_config").write_text(_ssh_settings({**client, "LogLevel": "ERROR"}))
        for node in self.nodes:
            pid_file = self.root / f"run/sshd.{node}.pid"
            self.run(node, ["/usr/sbin/sshd", "-o", f"PidFile={pid_file}"])
            self._daemons.append(pid_file)

    def submit(self, cwd: Path, *arguments: str, **env: str) -> int:
        """``sbatch arguments``; the job's number."""
        return int(self.run("vctl", ["sbatch", "--parsable", *arguments], cwd, **env).split(";")[0])

    def job(self, number: int | str) -> dict[str, str]:
        """What ``scontrol show job`` says, by key."""
        text = self.run("vctl", ["scontrol", "--oneliner", "show", "job", str(number)])
        return dict(pair.split("=", 1) for pair in text.split() if "=" in pair)

    def start_soon(self, number: int | str) -> None:
        """SLURM holds a requeued job back for two minutes: three seconds are enough. (Started in the second in which it
        was ended, slurmd would refuse it as killed.)"""
        begin = datetime.fromisoformat(self.job(number)["EligibleTime"])
        if (begin - datetime.now()).total_seconds() > 5:
            self.run("vctl", ["scontrol", "update", f"JobId={number}", "StartTime=now+3"], check=False)

    def wait(self, number: int | str, timeout: float) -> dict[str, str]:
        """The job's record once it has ended."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            job = self.job(number)
            if job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"):
                return job
            if job["JobState"] == "PENDING" and job.get("Reason") == "BeginTime":
                self.start_soon(number)
            time.sleep(0.5)
        raise TimeoutError(f"job {number} is {job['JobState']} ({job.get('Reason')}) after {timeout} s")

    def wait_idle(self, timeout: float = 60) -> None:
        """Until every node is free."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            states = self.run("vctl", ["sinfo", "-h", "-N", "-o", "%T"], check=False).split()
            if states == ["idle"] * len(self.nodes):
                return
            time.sleep(0.2)
        raise TimeoutError(f"nodes are {states} after {timeout} s; {self.root}/log says why")

    def bytes_sent(self, node: str) -> int:
        """What ``node`` has sent to other nodes so far: its interface's count, headers included."""
        shown = subprocess.run(
            ["ip", "-n", _space(node), "-s", "-j", "link", "show", "eth0"], capture_output=True, text=True, check=True
        )
        return int(json.loads(shown.stdout)[0]["stats64"]["tx"]["bytes"])

    def _make_network(self) -> None:
        hosts = [f"{_NETWORK}.{i + 1} {node}" for i, node in enumerate(self.nodes)]
        files = {
            "hosts": "\n".join(["127.0.0.1 localhost", f"{_NETWORK}.254 vctl", *hosts, ""]),
            "nsswitch.conf": "hosts: files\npasswd: files\ngroup: files\nshadow: files\n",
            "resolv.conf": "",
        }
        (self.root / "etc").mkdir()
        for file, text in files.items():
            (self.root / "etc" / file).write_text(text)
        controller = _space("vctl")
        for name in map(_space, ("vctl", *self.nodes)):
            _ip(f"netns add {name}")
            _ip(f"-n {name} link set lo up")
        _ip(f"-n {controller} link add br0 type bridge")
        _ip(f"-n {controller} addr add {_NETWORK}.254/24 dev br0")
        _ip(f"-n {controller} link set br0 up")
        for i, node in enumerate(map(_space, self.nodes)):
            _ip(f"-n {controller} link add p{i} type veth peer name eth0 netns {node}")
            _ip(f"-n {controller} link set p{i} master br0 up")
            _ip(f"-n {node} addr add {_NETWORK}.{i + 1}/24 dev eth0")
            _ip(f"-n {node} link set eth0 up")

    def _start_munge(self) -> None:
        folder = self.root / "munge"
        for parent in (self.root, *self.root.parents):
            if parent.is_relative_to("/tmp") and parent != Path("/tmp"):
                parent.chmod(0o755)  # munge's own user must reach its folder
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        shutil.chown(folder, "munge", "munge")
        shutil.chown(key, "munge", "munge")
        key.chmod(0o400)
        files = {"key-file": key.name, "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        flags = [f"--{flag}={folder / file}" for flag, file in {**files, "seed-file": "munged.seed"}.items()]
        subprocess.run(["runuser", "-u", "munge", "--", "munged", "--force", *flags], check=True, env={"PATH": _path()})
        self._daemons.append(folder / "munged.pid")

    def _slurm_conf(self) -> str:
        settings = {
            "ClusterName": "virtual", "SlurmctldHost": f"vctl({_NETWORK}.254)", "AuthType": "auth/munge",
            "CredType": "cred/munge", "AuthInfo": f"socket={self.root}/munge/munge.socket", "SlurmUser": "root",
            "SlurmdUser": "root", "ProctrackType": "proctrack/linuxproc", "TaskPlugin": "task/none",
            "JobAcctGatherType": "jobacct_gather/none", "AccountingStorageType": "accounting_storage/none",
            "SelectType": "select/cons_tres", "SelectTypeParameters": "CR_Core", "SchedulerType": "sched/backfill",
            "SchedulerParameters": "batch_sched_delay=0,sched_interval=5,bf_interval=5", "SwitchType": "switch/none",
            "MpiDefault": "none", "ReturnToService": "2", "JobRequeue": "1", "KillWait": "30", "MinJobAge": "3600",
            "SlurmctldTimeout": "30", "SlurmdTimeout": "30", "SlurmctldPidFile": f"{self.root}/run/slurmctld.pid",
            "SlurmdPidFile": f"{self.root}/run/slurmd.%n.pid", "StateSaveLocation": f"{self.root}/state",
            "SlurmdSpoolDir": f"{self.root}/spool.%n", "SlurmctldLogFile": f"{self.root}/log/slurmctld.log",
            "SlurmdLogFile": f"{self.root}/log/slurmd.%n.log", "SlurmdParameters": "config_overrides",
            "GresTypes": "gpu",
        }  # fmt: skip
        lines = [f"{key}={value}" for key, value in settings.items()]
        names = f"n[1-{len(self.nodes)}]"
        lines.append(f"NodeName={names} CPUs={self.cpus} Gres=gpu:{self.gpus} RealMemory=8000 State=UNKNOWN")
        lines.append(f"PartitionName=main Nodes={names} Default=YES MaxTime=60 State=UP OverSubscribe=NO")
        return "\n".join([*lines, ""])


def _space(name: str) -> str:
    """The network namespace, of this process: a cluster that was killed before it was torn down is in nobody's way."""
    return f"{name}-{os.getpid()}"


def _ssh_settings(settings: dict[str, str]) -> str:
    return "".join(f"{key} {value}\n" for key, value in settings.items())


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
