"""Two hosts that train one run; one goes down in the middle, and later comes back.

python -m tests.distributed.two_hosts            about a minute, for root
python -m tests.distributed.two_hosts --unplug   its cable goes first: nothing tells the other

A host is a network namespace with one end of a cable (a veth pair) and a torchrun of one process.
The run has to end with the losses and the tensors of one that a single process has trained.
"""

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

from checkpoint.reader import list_steps
from common import cli
from common.errors import UserError
from tests.faults.campaign import finished, same_run
from tests.helpers import ROOT, run, write_config

PORT = 29400
STEPS = 4000  # so many that a host is down and back before they end
TRAIN = ["--config", "tiny.toml", "--max_steps", str(STEPS), "--train.save_interval", "100"]
TRAIN += ["--train.eval_interval", "1000", "--train.collective_timeout", "15"]
# PyTorch waits half a minute for more hosts to come, and 15 s until it believes that one has gone
HASTE = "last_call_timeout=3,keep_alive_interval=1"


class Host:
    """A network namespace: `address` at its end of the cable, and what runs there.

    folder: where its torchrun runs and says what it does, which both hosts share.
    """

    def __init__(self, number: int, folder: Path):
        self.name, self.address = f"host{number}-{os.getpid()}", f"10.77.0.{number}"
        self.folder, self.output = folder, folder / f"host{number}.txt"
        self.processes: list[subprocess.Popen] = []

    def ip(self, *arguments: str):
        """`ip` with these arguments, inside."""
        ip("-n", self.name, *arguments)

    def launch(self, first: "Host") -> subprocess.Popen:
        """A torchrun that meets the others at `first`."""
        flags = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_id=tiny"]
        flags += ["--rdzv_backend=c10d", f"--rdzv_endpoint={first.address}:{PORT}"]
        # names are not resolved here, by which torchrun would know itself
        flags += [f"--rdzv_conf={HASTE},is_host={int(self is first)}"]
        flags += [f"--local_addr={self.address}", str(ROOT / "train.py"), "--name", "two"]
        inside = ["ip", "netns", "exec", self.name, sys.executable, "-m", "torch.distributed.run"]
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # examples/cluster/README.md
        with open(self.output, "a") as output:
            process = subprocess.Popen(
                [*inside, *flags, "--resume", "auto", *TRAIN], cwd=self.folder, stdout=output,
                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env={**environment, "PYTHONPATH": ""},
            )  # fmt: skip
        self.processes.append(process)
        return process

    def kill(self):
        """SIGKILL to all that runs in it."""
        for pid in ip("netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        for process in self.processes:
            process.wait()


def ip(*arguments: str) -> str:
    """What `ip` answers; raises CalledProcessError."""
    return subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True).stdout


@contextlib.contextmanager
def two_hosts(folder: Path) -> Generator[tuple[Host, Host]]:
    """Both, connected; nothing of them is left afterwards."""
    hosts = (Host(1, folder), Host(2, folder))
    try:
        for host in hosts:
            ip("netns", "add", host.name)
        ends = [f"name cable netns {host.name}".split() for host in hosts]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for host in hosts:
            host.ip("address", "add", f"{host.address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                host.ip("link", "set", device, "up")
        yield hosts
    finally:
        for host in hosts:
            with contextlib.suppress(subprocess.CalledProcessError):  # never made
                host.kill()
                ip("netns", "delete", host.name)


def log(text: str):
    """A line of progress, with the seconds since the beginning."""
    print(f"{time.monotonic() - BEGAN:6.1f} s  {text}", flush=True)


def wait_for(what: str, condition: Callable[[], bool], hosts: tuple[Host, ...]):
    """Waits for it; raises RuntimeError with what the hosts said last where it does not come."""
    until = time.monotonic() + 180
    while not condition():
        if time.monotonic() > until:
            said = "\n".join(f"{h.output}:\n{h.output.read_text()[-3000:]}" for h in hosts)
            raise RuntimeError(f"not within 180 s: {what}\n{said}")
        time.sleep(0.05)
    log(what)


def main() -> int:
    parser = cli.Parser(
        prog="python -m tests.distributed.two_hosts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--unplug", action="store_true", help="the second host's cable goes first")
    options = parser.parse_args()
    if not hasattr(os, "geteuid") or os.geteuid() or not shutil.which("ip"):
        raise UserError(
            "makes network namespaces, for which it needs Linux, `ip` and root; run it with sudo"
        )
    with tempfile.TemporaryDirectory(prefix="two-hosts-") as folder:
        return try_it(Path(folder), options.unplug)


def try_it(folder: Path, unplug: bool) -> int:
    """The whole story, in `folder`. 1 if the bits differ."""
    write_config(folder)
    finished(run("train.py", *TRAIN, "--name", "one", cwd=folder, timeout=600))
    log(f"one process has trained {STEPS:,} steps")
    two = folder / "runs" / "two"

    def saved() -> int:
        steps = list_steps(two) if two.is_dir() else []
        return int(steps[-1].name.removeprefix("step_")) if steps else 0

    with two_hosts(folder) as hosts:
        first, second = hosts
        staying = first.launch(first)
        second.launch(first)
        together = "in each of 2 processes"
        wait_for("both train", lambda: together in first.output.read_text(), hosts)
        wait_for("they have saved step 300", lambda: saved() >= 300, hosts)
        if unplug:
            second.ip("link", "set", "cable", "down")
        second.kill()
        if not unplug:
            second.ip("link", "set", "cable", "down")
        lost = saved()
        log(f"the second host is down; step {lost} is saved")
        wait_for("the first goes on alone", lambda: saved() > lost + 100, hosts)
        second.ip("link", "set", "cable", "up")
        returning, starts = second.launch(first), first.output.read_text().count(together)
        wait_for(
            "both train again", lambda: first.output.read_text().count(together) > starts, hosts
        )
        wait_for("the first has ended", lambda: staying.poll() is not None, hosts)
        wait_for("the second has ended", lambda: returning.poll() is not None, hosts)
        for line in re.findall(r"^resuming .*", first.output.read_text(), re.MULTILINE):
            log(line)
        ends = [staying.returncode, returning.returncode]
        if ends != [0, 0]:
            print(*(h.output.read_text()[-3000:] for h in hosts), sep="\n", file=sys.stderr)
    different = f"exit statuses {ends}" if any(ends) else same_run(folder / "runs" / "one", two)
    log(different or "all losses and tensors are those of one process, bit for bit")
    return int(bool(different))


BEGAN = time.monotonic()

if __name__ == "__main__":
    sys.exit(cli.run("python -m tests.distributed.two_hosts", main))
