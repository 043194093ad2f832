"""manifest.json of a prepared folder: what it must hold, and what to do where it does not."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

from common.errors import MISSING, UnreadableError, UserError
from common.files import hash_file
from data.config import Kind
from data.prepared.token_files import check_shards
from data.prompt_format import are_pairs

PROGRESS = "progress.json"  # what is recorded in a folder that is not whole yet


@contextmanager
def explained(folder: Path) -> Generator[None]:
    """Says what to do about a prepared folder that is not as it was written."""
    try:
        yield
    except UnreadableError:
        raise
    except UserError as error:
        raise UserError(f"{error}; remove {folder} and it will be prepared again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in MISSING:
            raise UnreadableError(error, folder) from None
        if not (folder / "manifest.json").is_file():
            raise UserError(f"{folder}: {why_absent(folder)}") from None
        raise UserError(
            f"{folder}: not a prepared data set ({type(error).__name__}: {error}); "
            "remove it and it will be prepared again"
        ) from None


def why_absent(folder: Path) -> str:
    """Why a folder has no manifest.json, and what to do."""
    if not folder.is_dir():
        there = "not a folder" if folder.exists() else "no such folder"
        return f"{there}; give one that python -m tools.prepare --to has made"
    if begun := what_is_begun(folder):
        return begun
    return (
        "not prepared data: has no manifest.json; give a folder that python -m tools.prepare --to "
        "has made"
    )


def what_is_begun(folder: Path) -> str:
    """Of a folder that is not whole, but was begun to be prepared: what to do; else ""."""
    if any(folder.glob(f".*-of-*/{PROGRESS}")) or (folder / PROGRESS).exists():
        return "its preparing was ended; give the same python -m tools.prepare command to continue"
    parts = [*folder.glob("[1-9]*-of-[1-9]*/manifest.json")]
    if parts:
        number = parts[0].parent.name.partition("-of-")[2]
        return (
            f"has {len(parts)} of {number} parts; run python -m tools.prepare with --part for the "
            "others, or with --merge if all are there"
        )
    if any(folder.glob("train-*.ids")):
        return (
            "its manifest.json is missing or damaged; run python -m tools.prepare again, into an "
            "empty folder"
        )
    return ""


def check_manifest(manifest: dict, is_part: bool = False):
    """Raises ValueError unless a manifest is one that `build` could have written."""
    if not (
        manifest["dtype"] in ("<u2", "<u4")  # not of objects, say, which NumPy would map, too
        and manifest["kind"] in get_args(Kind)
        and isinstance(manifest["name"], str)
        and isinstance(manifest["fingerprint"], str)
        and are_pairs(manifest["held_out"])
        and isinstance(manifest.get("start_token", True), bool)
        and type(manifest["vocab_size"]) is int
        and manifest["splits"].keys() <= {"train", "val"}
        and (is_part or all(manifest["splits"].values()))
    ):
        raise ValueError("a field of manifest.json is missing or of the wrong type")
    for shards in manifest["splits"].values():
        check_shards(manifest["kind"], shards)


def check_files(folder: Path, hashes: dict[str, str]):
    """Raises UserError naming the first file that is not as it was written."""
    for name, digest in hashes.items():
        if Path(name).name != name or hash_file(folder / name) != digest:
            raise UserError(f"{folder / name}: damaged (its sha256 is not that of manifest.json)")
