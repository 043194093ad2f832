"""Reading checkpoints: a directory that is complete or absent. No torch, no pickle.

    checkpoint = Checkpoint.find("runs/my-run")       # its best step, else its newest
    checkpoint = Checkpoint("runs/my-run/checkpoints/step_00001000")
    checkpoint.verify()

Every file is read whole and compared with its size and sha256 in MANIFEST.json before anything in
it is believed. The hashes detect accidents, not attackers: who can change a file can change its
hash. Writing is in `writer.py`.
"""

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

from checkpoint.shards import INDEX, belongs_to
from common.errors import MISSING, UnreadableError, UserError
from common.files import read_checksummed_json, refuse_url, user_path
from data.prompt_format import are_pairs

FORMAT = 1
MANIFEST = "MANIFEST.json"
NAN_DUMPS = "nonfinite_step_*"  # folders of a run beside its checkpoints
NAN_DUMP_BATCH = "batch.safetensors"  # the file that a NaN dump has and no checkpoint
NAME = re.compile(r"[\w-][\w.-]*", re.ASCII)  # of a file in a checkpoint
STEP = re.compile(r"step_(\d{8,})")
FIX = "; use another checkpoint"  # as most messages end


class CheckpointError(UserError):
    """A checkpoint that is missing, incomplete, damaged or of another format."""

    @property
    def problem(self) -> str:
        """What is wrong, without what to do about it."""
        return str(self).removesuffix(FIX)


class Checkpoint:
    """One step's directory. Files are read when asked for, and verified when read."""

    def __init__(self, path: Path | str):
        self.path = place(path)
        self.manifest = read_manifest(self.path)

    @property
    def step(self) -> int:
        """Optimizer steps behind these weights."""
        return self.state["step"]

    @property
    def run(self) -> Path:
        """The folder of its run; of a checkpoint that stands alone, its own."""
        return self.path.parent.parent if self.path.parent.name == "checkpoints" else self.path

    @property
    def is_nan_dump(self) -> bool:
        """Whether it holds a step that was not finite (training/nan_dump.py)."""
        return NAN_DUMP_BATCH in self.manifest["files"]

    @cached_property
    def config(self) -> dict:
        """The whole resolved configuration of the run, as `config.json` holds it."""
        config = self.json("config.json")
        if not all(isinstance(config.get(part), dict) for part in ("model", "data")):
            raise CheckpointError(
                f"{self.path / 'config.json'}: has no [model] or no [data] settings; "
                "use another checkpoint"
            )
        return config

    @cached_property
    def state(self) -> dict:
        """Step, tokens seen, best validation loss, scaler, hashes, versions."""
        state = self.json("state.json")
        if type(state.get("step")) is not int or state["step"] < 0:
            raise CheckpointError(
                f"{self.path / 'state.json'}: step: must be an integer of at least 0 "
                f"(found {state.get('step')!r:.40}); use another checkpoint"
            )
        numbers = ("tokens", "skipped", "best_step")
        known = {
            "held_out": (are_pairs(state.get("held_out", [])), "a list of prompts and completions"),
            "scaler": (isinstance(state.get("scaler", {}), dict), "an object"),
            "best_val_loss": (
                isinstance(state.get("best_val_loss"), float | int | None),
                "a number or null",
            ),
            **{n: (type(state.get(n, 0)) is int, "an integer") for n in numbers},
        }
        for name, (right, expected) in known.items():
            if not right:
                raise CheckpointError(
                    f"{self.path / 'state.json'}: {name}: must be {expected} "
                    f"(found {state[name]!r:.40}); use another checkpoint"
                )
        return state

    def read(self, name: str) -> bytes:
        """The verified bytes of one file. Raises CheckpointError, UnreadableError."""
        entry = self.manifest["files"].get(name)
        if entry is None:
            raise CheckpointError(
                f"{self.path}: {name} is not part of this checkpoint; use another checkpoint"
            )
        file = self.path / name
        try:
            found = file.stat()
            size = found.st_size
            if size != entry["bytes"] or not stat.S_ISREG(found.st_mode):  # a device may never end
                raise CheckpointError(
                    f"{file}: damaged ({size} bytes, but {MANIFEST} says {entry['bytes']}); "
                    "use another checkpoint"
                )
            content = file.read_bytes()
        except OSError as error:
            if error.errno not in MISSING:
                raise UnreadableError(error, file) from None
            raise CheckpointError(f"{file}: {error.strerror}; use another checkpoint") from None
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise CheckpointError(
                f"{file}: damaged (its sha256 is not the one in {MANIFEST}); use another checkpoint"
            )
        return content

    def json(self, name: str) -> dict:
        """A verified JSON file."""
        try:
            content = json.loads(self.read(name))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{self.path / name}: must hold a JSON object, but does not; use another checkpoint"
            )
        return content

    def tensors(self, name: str) -> dict:
        """The tensors of `name`, one file or its shards, as NumPy arrays by name; verified."""
        return {key: array for part in self.parts(name) for key, array in part.items()}

    def lists(self, name: str) -> dict:
        """The same as nested lists of Python numbers, with the standard library alone."""
        from checkpoint.safetensors_python import read_lists

        return {key: value for part in self.parts(name, read_lists) for key, value in part.items()}

    def parts(self, name: str, read: Callable[[bytes], dict] | None = None) -> Iterator[dict]:
        """What `tensors` gives, file by file, so that memory need not hold more than one of them.

        read: makes the tensors of a file's bytes; None: NumPy arrays. Raises CheckpointError.
        """
        if read is None:
            from checkpoint.safetensors_python import read_arrays as read  # settings need no NumPy

        for file, expected in self.tensors_by_file(name).items():
            yield self.part(file, read, expected)

    def part(self, file: str, read: Callable[[bytes], dict], expected: set[str] | None) -> dict:
        """The tensors of one file, which have to be the `expected` ones; None: any."""
        content = self.read(file)
        try:
            tensors = read(content)
        except ValueError as error:
            raise CheckpointError(
                f"{self.path / file}: not a safetensors file: {error}; use another checkpoint"
            ) from None
        if expected is not None and tensors.keys() != expected:
            wrong = min(tensors.keys() ^ expected)
            has, says = ("has", "does not") if wrong in tensors else ("lacks", "does")
            raise CheckpointError(
                f"{self.path / file}: {has} the tensor {wrong!r:.80}, which the index of the "
                f"shards {says} list for it; use another checkpoint"
            )
        return tensors

    def tensors_by_file(self, name: str) -> dict[str, set[str] | None]:
        """The files that hold the tensors of `name`, and which each has to hold; None: any."""
        index = name + INDEX
        if name in self.manifest["files"] or index not in self.manifest["files"]:
            return {name: None}
        weight_map, wrong = self.json(index).get("weight_map"), "not an object"
        shards = [file for file in self.files_of(name) if file != index]
        if isinstance(weight_map, dict):
            stray = [item for item in weight_map.items() if item[1] not in shards]
            if not stray:
                return {f: {key for key, file in weight_map.items() if file == f} for f in shards}
            wrong = f"{stray[0][0]!r:.80} in {stray[0][1]!r:.80}"
        raise CheckpointError(
            f"{self.path / index}: weight_map: must give the file of each tensor, a shard of this "
            f"checkpoint (found {wrong}); use another checkpoint"
        )

    def files_of(self, name: str) -> list[str]:
        """The files of this checkpoint that `name` stands for: itself, or its shards and index."""
        return [file for file in self.manifest["files"] if belongs_to(file, name)]

    def size_of(self, name: str) -> int:
        """The bytes of `files_of`; 0 if there are none."""
        return sum(self.manifest["files"][file]["bytes"] for file in self.files_of(name))

    def verify(self, without: tuple[str, ...] = ()) -> "Checkpoint":
        """Reads every file but `without`; raises CheckpointError at the first that is not whole.

        Raises UnreadableError at one of which nobody knows. A name stands for its shards, too.
        """
        skipped = {file for name in without for file in self.files_of(name)}
        for file in self.manifest["files"]:
            if file not in skipped:
                self.read(file)
        return self

    @classmethod
    def find(cls, path: Path | str, log: Callable[[str], object] = print) -> "Checkpoint":
        """The checkpoint at `path` (see `place`): a step, or a run's best step, else its newest.

        The optimizer's state is not read. `log` gets a line for each one that is skipped, because
        it is damaged; one that cannot be read now raises UnreadableError.
        """
        path = place(path)
        if not path.exists():
            raise CheckpointError(
                f"{path}: no such checkpoint or run; give a folder such as runs/NAME"
            )
        if (path / MANIFEST).exists() or not (path / "checkpoints").is_dir():
            return cls(path)
        best, steps = read_best(path), list_steps(path)
        candidates = [step_path(path, best["step"])] if best else []
        for candidate in [*candidates, *reversed(steps)]:
            try:
                return cls(candidate).verify(without=("optimizer.safetensors",))
            except CheckpointError as error:
                log(f"skipped: {error.problem}")
        if list_steps(path)[-1:] != steps[-1:]:  # training has published another meanwhile
            return cls.find(path, log)
        raise CheckpointError(
            f"{path}: no complete checkpoint in this run yet; wait until train.py saves one"
        )


def check_fit(own: dict, arrays: dict):
    """Raises UserError unless both have the same names, and the same shape under each."""
    wrong = [f"{name} is missing" for name in sorted(own.keys() - arrays.keys())]
    wrong += [f"the model has no {name}" for name in sorted(arrays.keys() - own.keys())]
    for name in sorted(own.keys() & arrays.keys()):
        shape, needed = tuple(arrays[name].shape), tuple(own[name].shape)
        if shape != needed:
            wrong.append(f"{name} has shape {shape}, the model needs {needed}")
    if wrong:
        raise UserError(
            f"model.safetensors: {', '.join(wrong[:3])}; use weights of a model with the same "
            "config.json"
        )


def place(path: Path | str) -> Path:
    """The folder of a run or step that a user means, also by a file or `checkpoints` in it."""
    path = user_path(path)
    folder, is_file = path.parent, path.is_file()
    if is_file and (folder / MANIFEST).exists():
        return folder
    return folder if (is_file or path.name == "checkpoints") and list_steps(folder) else path


def read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint's directory. Raises CheckpointError, UnreadableError."""
    file = path / MANIFEST
    try:
        manifest = read_checksummed_json(file)
        version = manifest["format"]
        files = {
            name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])}
            for name, entry in manifest["files"].items()
        }
    except (FileNotFoundError, NotADirectoryError):
        newest = newest_run(path, lambda _: None)  # of a folder of runs
        example = f", such as {newest}" if newest else ""
        raise CheckpointError(
            f"{file}: no such file, so this is not a complete checkpoint; give the folder of a run "
            f"or of one of its checkpoints{example}"
        ) from None
    except OSError as error:
        if error.errno not in MISSING:
            raise UnreadableError(error, file) from None
        raise CheckpointError(f"{file}: {error.strerror}; use another checkpoint") from None
    except (KeyError, TypeError, AttributeError, OverflowError):
        raise CheckpointError(
            f"{file}: not the manifest of a checkpoint; use another checkpoint"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}; use another checkpoint") from None
    if version != FORMAT:
        raise CheckpointError(
            f"{file}: format {version!r}, but this version reads format {FORMAT}; "
            "use the version that wrote it"
        )
    if not all(NAME.fullmatch(name) for name in files):
        raise CheckpointError(
            f"{file}: lists a file outside the checkpoint; use another checkpoint"
        )
    return {**manifest, "files": files}


def step_path(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return Path(run) / "checkpoints" / f"step_{step:08d}"


def step_of(path: Path) -> int:
    """The step that the name of a checkpoint's folder says."""
    found = STEP.fullmatch(path.name)
    assert found is not None  # list_steps and step_path give no other name
    return int(found[1])


def list_steps(run: Path) -> list[Path]:
    """The run's published checkpoints, oldest first; not verified. Raises UnreadableError."""
    entries = list_folder(Path(run) / "checkpoints")
    return sorted((Path(e) for e in entries if STEP.fullmatch(e.name) and e.is_dir()), key=step_of)


def read_best(run: Path) -> dict | None:
    """{"step", "val_loss"} of a run's best checkpoint; None if none is noted, or damaged.

    Raises UnreadableError.
    """
    file = Path(run) / "checkpoints" / "best.json"
    try:
        best = read_checksummed_json(file)
        return {"step": int(best["step"]), "val_loss": float(best["val_loss"])}
    except OSError as error:
        if error.errno in MISSING:
            return None
        raise UnreadableError(error, file) from None
    except (ValueError, KeyError, TypeError, OverflowError):
        return None


def named_or_newest(named: str, runs_dir: str, log: Callable[[str], object] = print) -> str | Path:
    """What --checkpoint names, or else the newest run in --runs_dir. Raises UserError for none."""
    refuse_url(named, f"--checkpoint {named}")
    path = named or newest_run(user_path(runs_dir), log)
    if path is None:
        raise UserError(
            f"--runs_dir {runs_dir}: no run with a checkpoint there; "
            "train one with python train.py, or name it with --checkpoint"
        )
    return path


def newest_run(runs_dir: Path, log: Callable[[str], object] = print) -> Path | None:
    """The training run whose newest checkpoint was published last.

    `log` gets a line for each folder that cannot be read; raises UnreadableError if no other has a
    checkpoint.
    """
    published, unreadable = {}, []
    for run in map(Path, list_folder(runs_dir)):
        try:
            for step in list_steps(run)[-1:]:
                with contextlib.suppress(FileNotFoundError), (step / MANIFEST).open():
                    pass  # somebody else's, say, which may not be read
                published[run] = step.stat().st_mtime_ns
        except UnreadableError as error:
            unreadable.append(error)
        except OSError as error:
            if error.errno not in MISSING:  # pruned meanwhile
                unreadable.append(UnreadableError(error, run))
    if unreadable and not published:
        raise unreadable[0]
    for error in unreadable:
        log(f"skipped: {error.problem}")
    return max(published, key=published.__getitem__, default=None)


def list_folder(folder: Path) -> list[os.DirEntry]:
    """What is in a folder; [] if it is missing. Raises UnreadableError; glob() does not."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        if error.errno in MISSING:
            return []
        raise UnreadableError(error, folder) from None
