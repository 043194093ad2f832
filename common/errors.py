"""Errors that a user can fix, and the checks of settings that raise them. Standard library only."""

import errno
import math

# what open() says of a file that is not there, or is something else than a file
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk says that is full


class UserError(ValueError):
    """Something the user can fix. The programs print it as one line and exit with status 2."""

    def __init__(self, message: object = ""):
        # part of it may be what a file holds, which must not command a terminal or fill it
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))
        super().__init__(text if len(text) <= 1200 else f"{text[:800]} ... {text[-300:]}")


class UnreadableError(UserError):
    """A file that is there but cannot be read now: no permission, a failing disk, too many files.

    It may be sound: nothing is renamed or removed for it, and nothing older taken in its place.
    """

    def __init__(self, error: OSError, path: object = "", fix: str = "make it readable"):
        self.problem = f"{error.filename or path}: {error.strerror}"
        super().__init__(f"{self.problem}; {fix}, and try again")


def refuse(wrong: list[str]):
    """Raises UserError with everything that is wrong, if anything is."""
    if wrong:
        raise UserError("; ".join(wrong))


def at_least(config: object, least: int, *names: str) -> list[str]:
    """What is wrong with the fields `names` of a dataclass: those below `least`, and NaN."""
    return [
        f"{name} = {getattr(config, name)} must be at least {least}"
        + ("" if math.isfinite(getattr(config, name)) else " and finite")
        for name in names
        if not least <= getattr(config, name) < math.inf
    ]
