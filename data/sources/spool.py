"""What can be read only once, such as standard input, copied to a file. Standard library only."""

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import user_path
from data.config import DEFAULT_CACHE_DIR, DataConfig, as_paths

PIECE = 1 << 20  # bytes at a time
# how the names of compressed files and of those that are no text end, for bytes without a name
SUFFIXES = {
    b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst",
    b"PK\3\4": ".zip", b"PAR1": ".parquet", b"ARROW1": ".arrow",
}  # fmt: skip


def keep_standard_input(config: DataConfig, log: Callable[[str], object]) -> DataConfig:
    """`config` with the path of a copy of standard input in place of data.path's "-".

    So a run can be resumed, and its data be read several times. Raises UserError.
    """
    paths = as_paths(config.path)
    if "-" not in paths:
        return config
    if sys.stdin is None or sys.stdin.isatty():
        raise UserError("data.path = -: standard input is a terminal; give it a file or a pipe")
    folder = user_path(config.cache_dir or DEFAULT_CACHE_DIR).resolve()
    try:
        kept = str(spool(sys.stdin.buffer, folder))
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror}; set data.cache_dir to a folder on a disk that can "
            "hold all of standard input"
        ) from None
    log(f"data.path: {kept}, a copy of standard input")
    path = tuple(dict.fromkeys(kept if path == "-" else path for path in paths))
    return replace(config, path=path if isinstance(config.path, tuple) else path[0])


def spool(stream: Any, folder: Path, name: str = "stdin") -> Path:
    """Copies a stream to a file in `folder`, named by `name` and its content. Raises OSError.

    Without a suffix of its own it gets the one that its first bytes tell.
    """
    folder.mkdir(parents=True, exist_ok=True)
    digest, part, head = hashlib.sha256(), folder / f".{name}-{os.getpid()}.part", b""
    try:
        with part.open("wb") as file:
            while data := stream.read(PIECE):
                head = head or data[:16]
                digest.update(data)
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        stem, dot, end = name.partition(".")
        suffix = next((s for magic, s in SUFFIXES.items() if head.startswith(magic)), "")
        kept = folder / f"{stem}-{digest.hexdigest()[:16]}{dot}{end if dot else suffix}"
        os.replace(part, kept)
        return kept
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
