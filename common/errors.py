"""Errors that a user can fix, and the checks of settings that raise them. Standard library only."""

import math


class UserError(ValueError):
    """Something the user can fix. The programs print it as one line and exit with status 2."""

    def __init__(self, message: object = ""):
        # part of it may be what a file holds, which must not command a terminal or fill it
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))
        super().__init__(text if len(text) <= 1200 else f"{text[:800]} ... {text[-300:]}")


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
