"""JSON files that carry their own sha256, so that any changed byte of them is noticed."""

import hashlib
import json
from pathlib import Path


def seal(content: dict) -> bytes:
    """The bytes of a file that holds `content` and its sha256."""
    digest = hashlib.sha256(canonical(content)).hexdigest()
    return canonical({**content, "sha256": digest})


def canonical(content: dict) -> bytes:
    """The one way in which it is written."""
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def read_sealed(file: Path) -> dict:
    """What `seal` has written, without the hash. Raises OSError, and ValueError for a damaged one.

    Only the bytes are vouched for: whoever can change a file can change its hash.
    """
    if file.exists() and not file.is_file():  # a device may never end
        raise ValueError("is not a file")
    content = file.read_bytes()
    try:
        stored = json.loads(content)
        del stored["sha256"]
        whole = seal(stored) == content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("is not what this project writes, or damaged") from None
    if not whole:
        raise ValueError("does not match its own sha256, so it is damaged")
    return stored


def hash_file(path: Path) -> str:
    """Hex hash of a file's content. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
