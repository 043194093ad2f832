"""Several processes that work on one run, as torchrun starts them. No torch where there is one.

    with join("train.py") as processes:
        settings = processes.decide(read_settings)   # by the first, for all
        processes.connect(device, timeout)           # from here on they can send tensors
        everyone = processes.gather([loss, tokens])

torchrun puts who a process is into its environment: RANK of WORLD_SIZE processes, LOCAL_RANK on its
host, and MASTER_ADDR and MASTER_PORT of a store, a dictionary that all share. Decisions go through
that store, which waits as long as it takes; tensors through torch.distributed: NCCL between GPUs,
Gloo between CPUs. A process alone does all of this by doing nothing.

What goes wrong in one of them is told once, with its rank. The others end without a word: all they
see is that somebody has gone.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from common import cli
from common.errors import UserError
from common.signals import INTERRUPT, defer_interrupts

if TYPE_CHECKING:
    from torch import Tensor
    from torch import device as Device
    from torch.distributed import Store, Work

T = TypeVar("T")
POLL = 0.02  # seconds between looks into the store
LOOK = 0.3  # seconds between looks whether somebody asks who is there
GRACE, ROUNDS = 1.0, 5  # seconds in which all say so who are there; as often, while several do not


class ProcessLostError(RuntimeError):
    """Another process has failed, as the store says."""


class ProcessLateError(RuntimeError):
    """Another process has not answered for too long."""


class Processes:
    """This process and the others.

    index: its rank, from 0. count: how many there are. local_index: its rank on this host.
    step: where it is, which is told if it loses another. program: whose errors it tells.
    """

    def __init__(self, index: int = 0, count: int = 1, local_index: int = 0, program: str = ""):
        self.index, self.count, self.local_index = index, count, local_index
        self.is_launched = count > 1  # so that signals come from a launcher, perhaps twice
        self.program, self.step, self.timeout = program, 0, timedelta(0)
        self.decisions = 0
        self._store: Store | None = None
        self.asked, self.leaving = False, threading.Event()
        self.watcher: threading.Thread | None = None

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.index == 0

    # Decisions, through the store -----------------------------------------------------------------

    @property
    def store(self) -> Store:
        """What all processes of this start, and of no earlier one, share."""
        if self._store is None:
            with defer_interrupts():
                from torch.distributed import rendezvous

            store, _, _ = next(rendezvous("env://"))
            self._store = meet(store, self.index, self.count)
            # with a connection of its own: one that waits keeps others from using it
            own = self._store.clone()  # pyrefly: ignore[missing-attribute], its stub lacks it
            self.watcher = threading.Thread(target=self.answer, args=[own])
            self.watcher.start()
        return self._store

    def decide(self, make: Callable[[], T], timeout: timedelta = timedelta.max) -> T:
        """What make() returns in the first process, in all of them: something that JSON can hold.

        Called by all, as often by each. timeout: how long the others wait for it.
        """
        if self.count == 1:
            return make()
        key = f"decided/{self.decisions}"
        if self.is_first:
            result = make()
            self.store.set(key, json.dumps(result))
        else:
            result = json.loads(self.wait_for(key, timeout=timeout))
        self.decisions += 1
        return result

    def first_on_host(self, make: Callable[[], T]) -> T:
        """make() in each process, in the first of each host before the others."""
        key = f"ready/{self.index - self.local_index}"
        if self.local_index:
            self.wait_for(key)
        result = make()
        if self.count > 1 and not self.local_index:
            self.store.set(key, "")
        return result

    def wait_for(self, *keys: str, timeout: timedelta = timedelta.max) -> bytes:
        """The value of a key of the store, once all are there.

        Raises ProcessLostError, and ProcessLateError after `timeout`.
        """
        last = time.monotonic() + timeout.total_seconds()
        while not self.store.check(list(keys)):
            if self.store.check(["failed"]):
                raise ProcessLostError("another process has failed")
            if time.monotonic() > last:
                raise ProcessLateError("timed out")
            time.sleep(POLL)
        return self.store.get(keys[0])

    # Numbers, through torch.distributed -----------------------------------------------------------

    def connect(self, device: Device, timeout: timedelta):
        """Makes the processes ready to send each other what lies on `device`, or on a CPU.

        timeout: how long one waits for the others before it gives up. Once is enough.
        """
        if self.count == 1:
            return
        import torch.distributed as dist

        if dist.is_initialized():
            return
        self.timeout = timeout
        with defer_interrupts():  # who has said that it connects does so: the others wait for it
            # who fails before has said so in the store, for which nothing else would wait; who was
            # killed, on a host whose launcher is another one, has not
            self.store.set(f"connects/{self.index}", "")
            self.wait_for(*(f"connects/{index}" for index in range(self.count)), timeout=timeout)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=self.store,
                rank=self.index,
                world_size=self.count,
                timeout=timeout,
            )

    def gather(self, values: Sequence[float]) -> list[list[float]]:
        """The numbers of each process, as many from each, in the order of processes."""
        if self.count == 1:
            return [list(values)]
        import torch

        own = torch.tensor(values, dtype=torch.float64)
        found = own.new_empty(self.count * len(values))
        all_gather(found, own)
        return found.view(self.count, -1).tolist()

    def largest(self, value: int) -> int:
        """The largest of the whole numbers of all processes, each below 2^53."""
        return value if self.count == 1 else int(max(row[0] for row in self.gather([value])))

    # The end --------------------------------------------------------------------------------------

    def __enter__(self):
        return self

    def __exit__(self, kind, error: BaseException | None, trace):
        if self.count == 1:
            return
        # the launcher's signal, sent as soon as one has ended, may cut what the loss had begun
        cut = error.__context__ if isinstance(error, KeyboardInterrupt) else None
        error = cut if cut and is_loss(cut) else error
        try:
            if error is None:
                import torch.distributed as dist

                if dist.is_initialized():
                    dist.destroy_process_group()
                self.let_others_go()
            elif not isinstance(error, KeyboardInterrupt | SystemExit):
                with defer_interrupts():
                    try:
                        self.fail(error)
                    finally:
                        self.let_others_go()
            elif self._store is not None:  # others may wait for a decision of this one
                with contextlib.suppress(RuntimeError):
                    self._store.add("failures", 1)  # a signal needs no words
                    self._store.set("failed", "")
                self.let_others_go()
        finally:
            self.leaving.set()
            if self.watcher:
                self.watcher.join()

    def fail(self, error: BaseException):
        """Tells what is wrong, if nobody else has; a bug is raised as it is."""
        if isinstance(error, ProcessLostError):  # who has failed has told it
            raise SystemExit(1)
        lost, missing, is_told = is_loss(error), "", False
        try:
            missing = self.find_missing(error) if lost else ""
            is_told = self.store.add("failures", 1) > 1
            self.store.set("failed", "")
        except RuntimeError:  # the host of the store may be what has gone
            # or, if somebody has asked who is there, and told it, has left
            missing, is_told = "the host of the store has gone", self.asked
        if lost:
            if not is_told:
                fix = "continue from the last checkpoint with --resume"
                print(f"{self.program}: {missing}, at step {self.step:,}; {fix}", file=sys.stderr)
            raise SystemExit(1)
        reason = error if isinstance(error, UserError) else cli.explain_error(error, self.program)
        if reason and is_told:
            raise SystemExit(2)
        if reason and self.decisions:  # before, the first one alone has read the settings
            raise UserError(f"rank {self.index} of {self.count}: {reason or error}") from None
        raise error  # here, or the launcher's signal would be raised instead of it

    def let_others_go(self):
        """Where the first process is the host of the store: it leaves when nobody reads there."""
        if self._store is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return  # the launcher is
        last = time.monotonic() + ROUNDS * GRACE  # some may have been killed
        everybody = [f"leaves/{index}" for index in range(self.count)]
        with contextlib.suppress(RuntimeError):  # the host has gone
            self._store.set(f"leaves/{self.index}", "")
            while self.is_first and not self._store.check(everybody) and time.monotonic() < last:
                time.sleep(POLL)

    def answer(self, store: Store):
        """In a thread: says that this process is there, whatever it does, when somebody asks."""
        with contextlib.suppress(RuntimeError):  # the host of the store may have gone
            while not self.leaving.wait(LOOK):
                if store.check(["asked"]):
                    self.asked = True
                    store.set(f"present/{self.index}", "")
                    return

    def find_missing(self, error: BaseException) -> str:
        """Who has gone, or does not answer.

        Of one that has gone only its neighbours know at once: the rest compute, or wait for these.
        So all that are still there are asked. If it only does not answer, all wait in vain as long.
        """
        late = "imed out" in str(error) or "imeout" in str(error)
        self.store.set(f"late/{self.index}" if late else f"misses/{self.index}", "")
        self.store.set("asked", "")
        everybody, silent = range(self.count), []
        for _ in range(ROUNDS):
            time.sleep(GRACE)
            late = late or any(self.store.check([f"late/{rank}"]) for rank in everybody)
            said = ("late", "misses") if late else ("present",)
            silent = [
                str(rank)
                for rank in everybody
                if not any(self.store.check([f"{key}/{rank}"]) for key in said)
            ]
            if len(silent) < 2:
                break
        ranks = f"rank {', '.join(silent[:8])}" if silent else "a process"
        if late:
            return (
                f"{ranks} of {self.count} has not answered for {self.timeout.total_seconds():g} s"
            )
        return f"{ranks} of {self.count} has gone"


def all_gather(output: Tensor, own: Tensor, async_op: bool = False) -> Work:
    """Puts each process's tensor into `output`, one after another."""
    import torch.distributed as dist

    # which PyTorch 2.13 renames
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output, own, async_op=async_op)


def is_loss(error: BaseException) -> bool:
    """Whether it says that another process has gone or does not answer."""
    if not isinstance(error, RuntimeError) or cli.is_out_of_memory(error):
        return False
    import torch.distributed as dist

    said = str(error)
    return isinstance(error, ProcessLateError | dist.DistError) or "gloo" in said or "NCCL" in said


def meet(store: Store, index: int, count: int) -> Store:
    """A part of `store` for the processes that are there now.

    A launcher that restarts processes keeps its store, and what their predecessors wrote. Each of
    the others calls itself by a name that nobody had, and the first answers each with its own.
    """
    from torch.distributed import PrefixStore

    name = uuid.uuid4().hex
    if index:
        store.set(f"here/{index}", name)
        while not store.check([f"meet/{name}"]):
            time.sleep(POLL)
        name = store.get(f"meet/{name}").decode()
        store.set(f"{name}/met/{index}", "")
    missing = set(range(1, count)) if index == 0 else set()
    while missing:
        for other in sorted(missing):
            if store.check([f"{name}/met/{other}"]):
                missing.discard(other)
            elif store.check([f"here/{other}"]):  # perhaps of a predecessor, whom it does no harm
                store.set(f"meet/{store.get(f'here/{other}').decode()}", name)
        time.sleep(POLL / 4)
    return PrefixStore(name, store)


def join(program: str) -> Processes:
    """This process among those that a launcher has started; alone where there was none.

    Raises UserError where the environment says only half of it.
    """
    values = {}
    for key, default in (("WORLD_SIZE", "1"), ("RANK", ""), ("LOCAL_RANK", "")):
        try:
            values[key] = int(os.environ.get(key, default))
        except ValueError:
            found = os.environ.get(key)
            raise UserError(
                f"{key} = {found!r:.40}: must be a whole number; start the processes with torchrun"
            ) from None
        if values["WORLD_SIZE"] == 1:
            alone = Processes(program=program)
            alone.is_launched = "RANK" in os.environ
            return alone
    for key in ("MASTER_ADDR", "MASTER_PORT"):
        if key not in os.environ:
            raise UserError(f"{key} = None: must be set; start the processes with torchrun")
    INTERRUPT.launched = True
    return Processes(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"], program)
