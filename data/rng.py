"""Randomness as a pure function of what it is for: there is no state to save or to disturb.

`derive_seed("dropout", seed, step, micro_batch, 0)` is the same number in every process, and
nothing drawn for one purpose moves what is drawn for another.
"""

import hashlib

import numpy as np


def derive_seed(purpose: str, *numbers: int) -> int:
    """64 bits that depend on all the arguments and on nothing else."""
    text = "/".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def permutation(n: int, purpose: str, *numbers: int) -> np.ndarray:
    """A permutation of 0..n-1, int64, from raw Philox words.

    The order of the words is what is used, not `Generator.permutation`: NumPy promises the
    stream of a bit generator for ever, but not that of its distributions.
    """
    words = np.random.Philox(key=derive_seed(purpose, *numbers)).random_raw(n)
    return np.argsort(words, kind="stable")
