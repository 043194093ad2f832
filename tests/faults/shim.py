"""Faults of the disk in real programs: shim.c under their calls, and small disks of their own."""

import contextlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.faults.campaign import Skip
from tests.helpers import command

CHANGES = "create,write,fsync,rename,mkdir,truncate,"  # what a disk can refuse for want of room


def build(folder: Path) -> Path:
    """The compiled shim, in `folder`."""
    compiler = shutil.which("cc")
    if not sys.platform.startswith("linux") or compiler is None:
        raise Skip("needs Linux and a C compiler called cc")
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl", "-pthread"], check=True
    )
    return library


def faulty(library: Path, under: Path, **told) -> dict[str, str]:
    """The environment of a program whose disk fails below `under`; shim.c says what is `told`.

    The log is beside `library`, and empty again.
    """
    log = library.with_name("calls.log")
    log.unlink(missing_ok=True)
    return {
        **os.environ,
        "PYTHONPATH": "",
        "LD_PRELOAD": str(library),
        "FAULT_UNDER": str(under.resolve()),
        "FAULT_LOG": str(log),
        **{f"FAULT_{name.upper()}": str(value) for name, value in told.items()},
    }


def attempt(folder: Path, *arguments, environment=None, inside=(), **more):
    """train.py in `folder`, in an environment or a namespace of its own, to its end."""
    return subprocess.run(
        [*inside, *command("train.py", "--config", "tiny.toml", *arguments)], cwd=folder,
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
        **more,
    )  # fmt: skip


def calls(library: Path) -> list[tuple[str, str]]:
    """Kind and path of every call that the last program's shim has counted."""
    log = library.with_name("calls.log")
    lines = log.read_text().splitlines() if log.exists() else []
    return [tuple(line.split(" ", 1)) for line in lines]


@dataclass(frozen=True)
class Disk:
    """A small disk in memory that only some processes see."""

    place: Path  # where those see it
    seen: Path  # the same from here
    inside: list[str]  # before a command that shall be one of them

    def remount(self, options: str):
        """Changes it while it is in use: its size, or whether it can be written."""
        change = ["mount", "-t", "tmpfs", "-o", f"remount,{options}", "disk", str(self.place)]
        subprocess.run([*self.inside, *change], check=True, capture_output=True)


@contextlib.contextmanager
def disk(folder: Path, options: str):
    """A Disk at `folder`/disk, in a mount namespace of its own, gone after the block."""
    place = folder.resolve() / "disk"
    place.mkdir()
    mount = f'mount -t tmpfs -o {options} disk "$0" && echo mounted && exec sleep 3600'
    alone = ["unshare", "--mount"]
    join = ["nsenter", "--mount"]
    if os.getuid():  # who is not root may mount where he is
        alone += ["--map-root-user"]
        join += ["--user", "--preserve-credentials"]
    try:
        holder = subprocess.Popen(
            [*alone, "sh", "-c", mount, str(place)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError:
        raise Skip("needs Linux and unshare") from None
    inside = [*join, f"--target={holder.pid}", f"--wd={folder.resolve()}"]
    try:
        if holder.stdout.readline() != b"mounted\n":
            raise Skip("this user may not mount a disk in memory")
        yield Disk(place, Path(f"/proc/{holder.pid}/root{place}"), inside)
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
        place.rmdir()
