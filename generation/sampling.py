"""How a token is chosen from logits: the definition every engine meets. Standard library only.

    rules = Sampling(temperature=0.8, top_k=50)
    token = sample_token(logits, rules, uniform(seed, sample, position))

`torch_sampling.py` does the same for a batch of rows, fast: a new rule belongs in both.

The order is temperature, then top-k, then top-p. Probabilities are the softmax of the logits
divided by the temperature, and sums of them are taken in float64, which Python's floats are. All
that is random is one number a token, which is a hash: the same in each engine and in any batch.
"""

import hashlib
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from common.errors import refuse

MAX_BEAMS = 64  # texts that a beam search keeps
MAX_NEW_TOKENS = 10**6  # tokens, or texts, that are asked for at once: more is a slip of the finger


@dataclass(frozen=True)
class Sampling:
    """How text is sampled, and how much of it."""

    temperature: float = 1.0
    """Divides the logits: below 1 less varied, above 1 more varied text; 0: greedy."""
    top_k: int = 0
    """Sample from the k most probable tokens, and ties with the last of them; 0: all."""
    top_p: float = 1.0
    """Sample from the fewest most probable tokens that together have this probability; 1: all."""
    max_new_tokens: int = 64
    """Most tokens to generate in a text."""
    greedy: bool = False
    """Always take the most probable token, whatever the other settings."""

    def __post_init__(self):
        wrong = []
        if not 0 <= self.temperature < math.inf:  # refuses NaN as well
            wrong.append(f"temperature = {self.temperature} must be 0 (greedy) or more, and finite")
        if self.top_k < 0:
            wrong.append(f"top_k = {self.top_k} must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            wrong.append(f"top_p = {self.top_p} must be above 0 and at most 1 (all)")
        if not 1 <= self.max_new_tokens <= MAX_NEW_TOKENS:
            wrong.append(f"max_new_tokens = {self.max_new_tokens} must be 1 to {MAX_NEW_TOKENS}")
        refuse(wrong)

    @property
    def deterministic(self) -> bool:
        """No number is drawn: the most probable token it is."""
        return self.greedy or self.temperature == 0


def uniform(seed: int, sample: int, position: int) -> float:
    """The number in [0, 1) that decides one token: 53 bits of a hash of where it stands.

    sample: which of several continuations of one prompt, from 0.
    position: the token's index in its whole text, the prompt's tokens counted, whatever part of the
    text the model still sees. Generating 20 tokens is generating 10, then 10 more from there.
    """
    text = f"sampling/{seed}/{sample}/{position}"
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)


def window(length: int, max_len: int) -> int:
    """How many of a text's last tokens the model reads, when it has `length` and holds `max_len`.

    All of them up to max_len. Then the later half is kept, and grows again to max_len: so a cache,
    whose entries a moved window makes void, is filled anew only once in half a window. The length
    alone decides, so a long prompt is read as if it had been generated.
    """
    if length <= max_len:
        return length
    half = max(1, max_len // 2)
    return half + (length - max_len - 1) % (max_len + 1 - half)


def ranked(logits: Sequence[float], rules: Sampling) -> tuple[list[int], int, int]:
    """All ids, most probable first, equal ones by id; how many top-k leaves, how many then top-p.

    Greedily both leave the first alone.
    """
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if rules.deterministic:
        return order, 1, 1
    by_k = len(order)
    if 0 < rules.top_k < by_k:
        least = logits[order[rules.top_k - 1]]
        by_k = sum(logit >= least for logit in logits)
    by_p = by_k
    if rules.top_p < 1:
        reached = cumulative(logits, order[:by_k], rules.temperature)
        by_p = bisect_left(reached, rules.top_p * reached[-1]) + 1
    return order, by_k, by_p


def keep(logits: Sequence[float], rules: Sampling) -> list[int]:
    """The ids, ascending, that the rules leave to choose from."""
    order, _, kept = ranked(logits, rules)
    return sorted(order[:kept])


def sample_token(logits: Sequence[float], rules: Sampling, number: float) -> int:
    """The kept token, in the order of ids, at which the cumulative probability passes `number`."""
    kept = keep(logits, rules)
    if rules.deterministic:
        return kept[0]
    reached = cumulative(logits, kept, rules.temperature)
    return kept[bisect_right(reached, number * reached[-1])]


@dataclass(frozen=True)
class Explanation:
    """Where a token stood among all others, and what the rules did to these.

    All but `drawn` is of the distribution before any token is removed: the softmax of the logits
    divided by the temperature. Greedy is explained at temperature 1, with nothing removed, as
    no rule takes part.
    """

    probability: float
    """Of the token, before top-k and top-p."""
    drawn: float
    """The probability it was drawn with: its share of what the rules left; greedily 1."""
    rank: int
    """1 for the most probable token; of equal ones the lower id comes first."""
    entropy: float
    """Of the distribution, in bits: 0 is certain, log2(V) knows nothing."""
    top_k_removed: int
    """Tokens."""
    top_k_probability: float
    """Theirs together."""
    top_p_removed: int
    """Tokens, of those that top-k left."""
    top_p_probability: float
    """Theirs together."""


def explain(logits: Sequence[float], rules: Sampling, token: int) -> Explanation:
    """What stands behind the choice of `token`. Raises ValueError for a token that is none."""
    order, by_k, by_p = ranked(logits, rules)
    temperature = 1.0 if rules.deterministic else rules.temperature
    weights = [math.exp((logits[i] - logits[order[0]]) / temperature) for i in order]
    total = math.fsum(weights)
    p = [weight / total for weight in weights]  # most probable first
    rank = order.index(token)
    drawn = p[rank] / math.fsum(p[:by_p]) if rank < by_p else 0.0
    if rules.deterministic:
        by_k = by_p = len(order)
    return Explanation(
        probability=p[rank],
        drawn=drawn,
        rank=rank + 1,
        entropy=0.0 - math.fsum(x * math.log2(x) for x in p if x > 0),
        top_k_removed=len(order) - by_k,
        top_k_probability=math.fsum(p[by_k:]),
        top_p_removed=by_k - by_p,
        top_p_probability=math.fsum(p[by_p:by_k]),
    )


def cumulative(logits: Sequence[float], ids: list[int], temperature: float) -> list[float]:
    """Running sums of the softmax over `ids`, without its divisor, which the last one is.

    The largest logit is taken off before the division, so that no temperature overflows.
    """
    largest = max(logits)
    return list(accumulate(math.exp((logits[i] - largest) / temperature) for i in ids))
