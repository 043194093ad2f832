"""The data that a checkpoint's run was trained on: its settings, and where its files are found."""

import glob
import os
from collections.abc import Callable
from dataclasses import replace

from checkpoint.reader import Checkpoint, CheckpointError
from common.files import is_address, user_path
from data.config import DataConfig, SourceConfig, as_paths

Log = Callable[[str], object]


def data_config(checkpoint: Checkpoint, log: Log) -> DataConfig:
    """The settings of a run's data, its paths as they are found from here. Raises UserError."""
    stored, default = dict(checkpoint.config["data"]), DataConfig()
    if isinstance(stored.get("path"), list):
        stored["path"] = tuple(stored["path"])
    for name, value in stored.items():
        if name == "sources":
            continue
        known = getattr(default, name, None)
        number = isinstance(known, float) and type(value) is int
        if type(value) is not type(known) and not number and not is_paths(name, value):
            raise CheckpointError(
                f"{checkpoint.path / 'config.json'}: data.{name}: must be a setting of this "
                f"version, of its type (found {value!r:.40}); use the version that wrote it"
            )
    try:
        stored["sources"] = tuple(SourceConfig(**as_source(s)) for s in stored.get("sources", ()))
    except TypeError as error:  # of keys or values that it does not know
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: data.sources: {error}; "
            "use the version that wrote it"
        ) from None
    return locate_data(DataConfig(**stored), checkpoint, log)


def was_imported(checkpoint: Checkpoint) -> bool:
    """Whether another program's model is all there is of a run, which then has no data."""
    return "imported_from" in checkpoint.state and "data" not in checkpoint.state


def as_source(stored: dict) -> dict:
    """A source of a mixture as it was before it became JSON."""
    path = stored.get("path")
    return stored | ({"path": tuple(path)} if isinstance(path, list) else {})


def is_paths(name: str, value: object) -> bool:
    """Whether a setting is a list of paths."""
    return name == "path" and isinstance(value, tuple) and all(isinstance(p, str) for p in value)


def locate_data(data: DataConfig, checkpoint: Checkpoint, log: Log) -> DataConfig:
    """`data` with the relative paths that a run has stored as they are found from this folder.

    They stand for files in the folder where it was started; where there are none, for those here.
    """
    started = checkpoint.state.get("cwd")
    if not isinstance(started, str) or started == os.getcwd():
        return data

    def located(part, stored: dict, prefix: str, started: str = started):
        found = {}
        for key in ("path", "val_path", "cache_dir"):
            paths = as_paths(getattr(part, key, ""))
            if paths != as_paths(stored.get(key, "")):
                continue
            there = tuple(there_or_here(path, started) for path in paths)
            if there != paths:
                found[key] = there if isinstance(getattr(part, key), tuple) else there[0]
                log(f"{prefix}{key}: {', '.join(there)}, relative to where the run was started")
        return replace(part, **found)

    stored = checkpoint.config["data"]
    known = [*stored.get("sources", ()), *[{}] * len(data.sources)]  # {}: one that is new
    sources = tuple(
        located(source, known[i], f"data.sources.{i}.") for i, source in enumerate(data.sources)
    )
    return located(replace(data, sources=sources), stored, "data.")


def there_or_here(path: str, started: str) -> str:
    """A path or a pattern as it is found from the folder `started`, if there is something."""
    if is_address(path) or user_path(path).is_absolute():
        return path
    if glob.has_magic(path) and glob.glob(path, root_dir=started, recursive=True):
        return os.path.join(glob.escape(started), path)
    there = os.path.join(started, path)
    return there if os.path.exists(there) else path
