"""Which run train.py works on: a new one, or one that it resumes, with which settings. No torch."""

import contextlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from checkpoint.reader import (
    Checkpoint,
    CheckpointError,
    list_steps,
    newest_run,
    place,
    step_path,
)
from checkpoint.writer import newest_complete
from common.errors import UserError
from common.jsonl import read_records
from model.config import read_model_config
from training import config as configuration
from training.config import Change, Config
from training.run_folder import check_run_name, refuse_if_busy

Log = Callable[[str], object]


@dataclass(frozen=True)
class RunSpec:
    """What train.py is about to do."""

    run: Path
    config: Config
    resume: Checkpoint | None = None  # continues from this step
    weights: Checkpoint | None = None  # starts anew from these weights
    changes: tuple[Change, ...] = ()
    is_new: bool = True  # the run's folder must not exist yet

    @property
    def continued(self) -> Checkpoint | None:
        """The checkpoint from which the run that has this folder goes on; None for a new run."""
        return None if self.is_new else self.resume


def to_json(spec: RunSpec | None) -> dict | None:
    """What the first of several processes tells the others of what is to be done."""
    if spec is None:
        return None
    steps = list_steps(spec.run) if spec.run.is_dir() else []
    return {
        "run": str(spec.run),
        "config": asdict(spec.config),
        "resume": spec.resume and str(spec.resume.path),
        "weights": spec.weights and str(spec.weights.path),
        "is_new": spec.is_new,
        "steps": [path.name for path in steps],
    }


def from_json(told: dict | None) -> RunSpec | None:
    """The same in another process, which must see the same files. Raises UserError."""
    if told is None:
        return None
    run = Path(told["run"])
    seen = [path.name for path in list_steps(run)] if run.is_dir() else []
    fix = "give a --runs_dir that all hosts share"
    if more := [name for name in seen if name not in told["steps"]]:
        raise UserError(f"{run}: has {more[-1]} here, which the first process does not see; {fix}")
    sources = {}
    for name in ("resume", "weights"):
        path = told[name]
        try:
            sources[name] = Checkpoint(path).verify() if path else None
        except CheckpointError as error:
            raise UserError(
                f"{path}: not whole here, but for the first process ({error.problem}); {fix}"
            ) from None
    config = configuration.check(told["config"], "the settings of the first process")
    return RunSpec(run, config, sources["resume"], sources["weights"], is_new=told["is_new"])


def find_resume(
    runs_dir: Path, path: str | None, name: str, log: Log
) -> tuple[Path, Checkpoint, bool]:
    """The run and the checkpoint that `--resume [path]` means, and whether it forks the run.

    Without a path: the newest complete checkpoint of the run called `name`, or of the newest run.
    A step given by path is that one or an error; it never falls back to another, and if it is not
    the newest, what follows is a run of its own.
    """
    if path is None:
        if name:
            check_run_name(name)
        run = runs_dir / name if name else newest_run(runs_dir, log)
        if run is None:
            raise UserError(f"--resume: no run with a checkpoint in {runs_dir}; start a run first")
        if not run.is_dir():
            raise UserError(f"--resume: {run}: no such run; choose a folder in {runs_dir}")
        refuse_if_busy(run)
        return run, newest_complete(run, log), False
    given = place(path)
    if not given.exists():
        raise UserError(
            f"--resume {given}: no such checkpoint or run; give a folder such as runs/NAME"
        )
    if (given / "checkpoints").is_dir():
        refuse_if_busy(given)
        return given, newest_complete(given, log), False
    checkpoint = Checkpoint(given).verify()
    if checkpoint.is_nan_dump:
        raise UserError(
            f"--resume {given}: a NaN dump, not a checkpoint to resume; see it with python -m "
            "tools.replay, and resume the run's last checkpoint"
        )
    run = given.resolve().parent.parent
    with contextlib.suppress(ValueError):  # Windows: on another drive
        run = Path(os.path.relpath(run))
    return run, checkpoint, list_steps(run)[-1:] != [step_path(run, checkpoint.step)]


def plan_resume(stored: Config, wanted: Config, extend: bool) -> tuple[Config, list[Change]]:
    """The settings of a resumed run and what changes. Raises UserError if any must not."""
    found = configuration.changes(stored, wanted, extend)
    refused = [f"{c.key} {c.before!r} -> {c.after!r}: {c.refused}" for c in found if c.refused]
    if refused:
        raise UserError(
            f"--resume: {'; '.join(refused)}; leave these settings out, or start a new run with "
            "--init_from"
        )
    return configuration.resumed(stored, wanted, extend), found


def keep_resolved(stored: Config, wanted: Config) -> Config:
    """`wanted` with what a run has settled once: a setting left to "auto" does not change it."""
    settled = {}
    for key in ("device", "precision"):
        if getattr(wanted, key) == "auto":
            settled[key] = getattr(stored, key)
    if wanted.data.kind == "auto" and bool(wanted.data.path) == bool(stored.data.path):
        settled["data"] = replace(wanted.data, kind=stored.data.kind)
    if len(wanted.data.sources) == len(stored.data.sources):
        pairs = zip(wanted.data.sources, stored.data.sources, strict=True)
        sources = [replace(w, kind=s.kind) if w.kind in (None, "auto") else w for w, s in pairs]
        settled["data"] = replace(settled.get("data", wanted.data), sources=tuple(sources))
    if wanted.model.vocab_size == 0:
        settled["model"] = replace(wanted.model, vocab_size=stored.model.vocab_size)
    if wanted.train.threads == 0:
        settled["train"] = replace(wanted.train, threads=stored.train.threads)
    return replace(wanted, **settled)


def stored_config(checkpoint: Checkpoint) -> Config:
    """The checked configuration that a checkpoint carries."""
    read_model_config(checkpoint)  # of a size that its weights can have
    return configuration.check(checkpoint.config, str(checkpoint.path / "config.json"))


def is_finished(run: Path, checkpoint: Checkpoint, max_steps: int) -> bool:
    """Whether a run at its last step has had its last evaluation, which comes after the save."""
    if checkpoint.step > max_steps:
        return True
    if not checkpoint.state.get("validates"):
        return True
    records = read_records(run / "metrics.jsonl")
    return any("loss/val" in r and r["step"] == checkpoint.step for r in records)


def load_weights_of(path: str) -> Checkpoint:
    """The checkpoint that `--init_from` names: a step, or a run's best."""
    try:
        return Checkpoint.find(path).verify()
    except CheckpointError as error:
        raise UserError(f"--init_from {error}") from None
