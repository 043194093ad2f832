"""Randomness as a pure function of what it is for: there is no state to save or to disturb.

`derive_seed("dropout", seed, step, micro_batch, 0)` is the same number in every process, and
nothing drawn for one purpose moves what is drawn for another.
"""

import hashlib
import math

import numpy as np

S1, S27, S30, S31 = (np.uint64(shift) for shift in (1, 27, 30, 31))
M1, M2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
ROUNDS = 12  # of a Permutation: from 10, some orders of 6 numbers still come oftener than others


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


class Permutation:
    """A permutation of 0..n-1 as a function: `order[i]` for an array of positions, as of an array.

    Whatever n is, it takes a few hundred bytes, and a position costs the same wherever it stands. A
    Feistel network over two digits, `high` below a and `low` below b, with a b >= n: by turns one
    of them has added to it a hash of the other, which can be taken off again, so that no two
    positions meet. What lands beyond n goes through it once more, until it does not (Black and
    Rogaway 2002, "Ciphers with Arbitrary Finite Domains": generalized Feistel, cycle walking). All
    of it is arithmetic of 64 bits, the same on every machine.
    """

    def __init__(self, n: int, purpose: str, *numbers: int):
        self.n = n
        a = math.isqrt(max(1, n) - 1) + 1  # the least whose square is n or more
        b = -(-n // a)  # fewer than a numbers are beyond n, so that few go through it twice
        self.a, self.b = np.uint64(a), np.uint64(max(1, b))
        self.keys = np.random.Philox(key=derive_seed(purpose, *numbers)).random_raw(ROUNDS)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """The numbers at an array of positions from 0 to n - 1, int64 and of its shape."""
        found = self.once(np.asarray(positions, np.uint64).reshape(-1))
        while len(beyond := np.flatnonzero(found >= self.n)):
            found[beyond] = self.once(found[beyond])
        return found.astype(np.int64).reshape(np.shape(positions))

    def once(self, numbers: np.ndarray) -> np.ndarray:
        """The numbers, uint64 and below a b, after all rounds."""
        high, low = np.divmod(numbers, self.b)
        for first, second in self.keys.reshape(-1, 2):
            high += mix(low + first)
            high %= self.a
            low += mix(high + second)
            low %= self.b
        return high * self.b + low


def mix(words: np.ndarray) -> np.ndarray:
    """A hash of each of an array of 64-bit words, in their place; of 63 bits, so that sums have
    room.

    SplitMix64's: Steele, Lea and Flood (2014), "Fast Splittable Pseudorandom Number Generators".
    """
    words ^= words >> S30
    words *= M1
    words ^= words >> S27
    words *= M2
    words ^= words >> S31
    words >>= S1
    return words
