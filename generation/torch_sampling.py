"""How the PyTorch engine chooses the next token of each row: `sampling.sample_token`, fast.

    tokens = sample_tokens(logits, rules, numbers)     # (B, V) and one number a row -> B ids

The result is that of the definition in `sampling`, whose sums are in float64. What float32 can
decide is decided in it, and where rounding would have a say, float64 is asked. On CUDA, where a
copy to the host waits for all that came before it, one small copy a token is made.

Shapes: B rows, V = vocab_size, N candidates.
"""

import numpy as np
import torch

from common.errors import UserError
from generation.sampling import Sampling

EXTRA_CANDIDATES = 14  # logits that are looked at beyond the k of top-k: these may tie
SMALL_VOCABULARY = 1024  # tokens of a vocabulary that needs no short cuts
BLOCK = 512  # tokens whose weights are summed first
SKEW = 16  # how much heavier than the mean the tokens that top-p keeps are expected to be
FLOAT32_TEMPERATURES = (1e-30, 1e30)  # beyond, float32 may take a temperature for 0 or infinity
FLOAT32_SUM_ERROR = 2.0**-18  # share of all weight by which a sum of float32 numbers may be wrong
FLOAT64_SUM_ERROR = 2.0**-28  # the same of float64 numbers: V 2^-53, and V is 2^24 at most


def sample_tokens(
    logits: torch.Tensor, rules: Sampling, numbers: list[float], on_device: bool | None = None
) -> list[int]:
    """`sampling.sample_token` for each row of logits (B, V), with one number a row.

    on_device: whether to look at the logits where they are, which needs float64 there; None: on
    CUDA, unless algorithms have to be deterministic, which CUDA's cumsum is not. The tokens are the
    same either way.
    """
    if on_device is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
        on_device = logits.device.type == "cuda" and not deterministic
    if rules.deterministic:
        largest, ids = to_cpu(*logits.max(-1), packed=on_device)  # the lowest id of equal ones
        check_finite(largest)
        return ids.long().tolist()
    V = logits.shape[-1]
    least, most = FLOAT32_TEMPERATURES
    usual = least < rules.temperature < most and (on_device or logits.dtype != torch.float64)
    if usual and V > SMALL_VOCABULARY and rules.top_p == 1 and not 0 < rules.top_k < V:
        return draw_from_all(logits, rules, numbers, on_device)
    return draw(logits, rules, numbers, on_device)


def draw(
    logits: torch.Tensor, rules: Sampling, numbers: list[float], on_device: bool = False
) -> list[int]:
    """The token of each row at which the sum of its candidates' weights passes its number."""
    ids, weights = candidates(logits, rules, on_device)
    reached = weights.cumsum(-1)
    thresholds = torch.tensor(numbers, dtype=torch.float64)[:, None] * reached[:, -1:]
    chosen = torch.searchsorted(reached, thresholds, right=True)
    return ids.gather(-1, chosen).flatten().tolist()


def draw_from_all(
    logits: torch.Tensor, rules: Sampling, numbers: list[float], on_device: bool = False
) -> list[int]:
    """`draw` where no rule drops a token, but with a number's block found first.

    A row whose number comes so near to a border that rounding could decide is drawn by `draw`.
    """
    values = logits if on_device else logits.cpu()
    wanted = torch.tensor(numbers, dtype=torch.float64, pin_memory=values.is_cuda)
    wanted = wanted.to(values.device, non_blocking=True)
    found = search_blocks(values, wanted[:, None], rules.temperature, in_float64=on_device)
    tokens, sure, largest = to_cpu(*found, packed=on_device)
    check_finite(largest)
    tokens = tokens.long().tolist()
    for row in (sure == 0).nonzero().flatten().tolist():
        tokens[row] = draw(values[row : row + 1], rules, [numbers[row]])[0]
    return tokens


def search_blocks(
    values: torch.Tensor, numbers: torch.Tensor, temperature: float, in_float64: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each row of values (B, V): its token, whether that is sure, its largest value; (B,) each.

    numbers: (B, 1), beside the values. Weights are in float32, which a CPU computes faster, or in
    float64, of which a GPU has enough and which leaves next to nothing in doubt. Nothing here makes
    the host wait for the device. Where the largest value is no number, the token means nothing.
    """
    B, V = values.shape
    dtype, error = (
        (torch.float64, FLOAT64_SUM_ERROR) if in_float64 else (torch.float32, FLOAT32_SUM_ERROR)
    )
    largest = values.amax(-1, keepdim=True)
    weights = torch.zeros(B, -(-V // BLOCK) * BLOCK, dtype=dtype, device=values.device)
    torch.sub(values.to(dtype), largest.to(dtype), out=weights[:, :V]).div_(temperature).exp_()
    weights = weights.view(B, -1, BLOCK)
    reached = weights.sum(-1, dtype=torch.float64).cumsum(-1)  # up to the end of each block
    total = reached[:, -1:]
    wanted = numbers * total
    block = torch.searchsorted(reached, wanted, right=True)  # (B, 1)
    block.clamp_(max=weights.shape[1] - 1)  # of NaN: an index beyond the end would kill CUDA
    before = torch.nn.functional.pad(reached, (1, 0)).gather(-1, block)
    inside = weights.gather(1, block[..., None].expand(B, 1, BLOCK))[:, 0]  # (B, BLOCK)
    inside = before + inside.double().cumsum(-1)
    least = torch.searchsorted(inside, wanted - error * total, right=True)
    most = torch.searchsorted(inside, wanted + error * total, right=True)
    sure = (least == most) & (most < BLOCK) & (wanted - error * total >= before)
    return (block * BLOCK + least)[:, 0], sure[:, 0], largest[:, 0]


def to_cpu(*tensors: torch.Tensor, packed: bool) -> list[torch.Tensor]:
    """Tensors of one shape on the CPU.

    packed: by one copy, as float64, which holds each of their numbers: a logit, an id, True.
    """
    if packed:
        return list(torch.stack([tensor.double() for tensor in tensors]).cpu())
    return [tensor.cpu() for tensor in tensors]


def check_finite(largest: torch.Tensor):
    """Raises UserError if the largest logit of a row, NaN counting as such, is no number."""
    if not largest.isfinite().all():
        raise not_finite()


def not_finite() -> UserError:
    """What to raise for such logits."""
    return UserError(
        "the logits are not finite (training diverged); lower optimizer.lr, or use an earlier "
        "checkpoint"
    )


def candidates(
    logits: torch.Tensor, rules: Sampling, on_device: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, N), ascending, and their weights, float64: softmax without its divisor, 0 if dropped.

    N is V, or with top-k about as many as are kept. All but top-k is done on the CPU, where sums
    have one order (CUDA's have none, mps lacks float64), so each device chooses the same.
    """
    V = logits.shape[-1]
    if 0 < rules.top_k < V:
        values, ids = most_probable(logits, rules.top_k, on_device)
    else:
        values, ids = logits.cpu(), torch.arange(V).expand_as(logits)
    largest = values.amax(-1, keepdim=True)
    check_finite(largest)
    if rules.top_p < 1 and values.shape[-1] > SMALL_VOCABULARY:
        few = likely_candidates(values, largest, rules)
        if few is not None:
            return few
    weights = weigh(values, largest, rules.temperature)
    if rules.top_p < 1:
        # not masked_fill_, which branches at each number
        dropped = dropped_by_top_p(values, largest, rules)
        assert dropped is not None  # all values are there: no doubt is left
        weights = torch.where(dropped, 0.0, weights)
    return ids, weights


def most_probable(
    logits: torch.Tensor, k: int, on_device: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and ids, ascending, of a row's k largest and of all that tie with the last of them.

    Both (B, N), on the CPU, where N is at least what any row needs; what it does not is -inf.
    """
    N = min(k + EXTRA_CANDIDATES, logits.shape[-1])
    values, ids = to_cpu(*logits.topk(N), packed=on_device)
    least = values[:, k - 1 : k]
    if (values[:, -1:] == least).any():  # perhaps still others tie
        N = int((logits >= logits.topk(k).values[:, -1:]).sum(-1).max())
        values, ids = to_cpu(*logits.topk(N), packed=on_device)
    ids, by_id = ids.long().sort()
    values = values.gather(-1, by_id)
    return values.masked_fill_(values < least, -torch.inf), ids


def weigh(values: torch.Tensor, largest: torch.Tensor, temperature: float) -> torch.Tensor:
    """exp((values - largest) / temperature) in float64, on the CPU."""
    exact = values.double()
    exact = exact.sub_(largest) if exact is not values else exact - largest
    exact = exact.div_(temperature).numpy()
    return torch.from_numpy(np.exp(exact, out=exact))  # NumPy's is twice as fast


def likely_candidates(
    values: torch.Tensor, largest: torch.Tensor, rules: Sampling
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What `candidates` returns, from those tokens alone that top-p may keep; None if in doubt.

    Those that weigh less than (1 - top_p) / V of all are together less than 1 - top_p, so none of
    them is kept. Most often none that weighs SKEW times as much is either, which shows when the
    others are ranked. Which is which, weights in float32 tell.
    """
    V, array = values.shape[-1], as_numpy(values)
    rough = (values.float() - largest.float()).div_(rules.temperature).exp_()
    total = rough.sum(-1, keepdim=True, dtype=torch.float64)
    bound = total * ((1 - rules.top_p) / V * (1 - FLOAT32_SUM_ERROR) ** 2)
    for skew in (SKEW, 1):
        places = np.flatnonzero((rough >= (skew * bound).float()).numpy())
        if len(places) > array.size // 4:  # so flat that it pays no more
            return None
        ids, head = gather_padded(array, places)
        dropped = dropped_by_top_p(head, largest, rules, total, slack=FLOAT32_SUM_ERROR)
        if dropped is not None:
            return ids, torch.where(dropped, 0.0, weigh(head, largest, rules.temperature))
    return None


def gather_padded(array: np.ndarray, places: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Columns and values (B, N) at some places of a flattened array (B, V), in their order.

    Rows that have fewer than others end in columns 0 and values -inf, which weigh nothing.
    """
    rows, columns = np.divmod(places, array.shape[-1])
    counts = np.bincount(rows, minlength=len(array))
    slots = np.arange(len(rows)) - np.repeat(counts.cumsum() - counts, counts)
    ids = np.zeros((len(array), counts.max()), np.int64)
    values = np.full(ids.shape, -np.inf, array.dtype)
    ids[rows, slots], values[rows, slots] = columns, array.ravel()[places]
    return torch.from_numpy(ids), torch.from_numpy(values)


def dropped_by_top_p(
    values: torch.Tensor,
    largest: torch.Tensor,
    rules: Sampling,
    total: torch.Tensor | None = None,
    slack: float = 0.0,
) -> torch.Tensor | None:
    """Which of `values` (B, N) top-p drops, as a mask.

    total, slack: the weight (B, 1) of all, where `values` are but the largest of them, and what
    share of it may be wrong. None is returned where `values` or the slack do not allow an answer.
    """
    array = as_numpy(values)
    ranked = torch.from_numpy(np.sort(array)).flip(-1)  # NumPy sorts many times faster
    reached = weigh(ranked, largest, rules.temperature).cumsum(-1)
    border = rules.top_p * (reached[:, -1:] if total is None else total)
    last = torch.searchsorted(reached, border * (1 - slack))  # (B, 1): of those that are kept
    if total is not None:
        latest = torch.searchsorted(reached, border * (1 + slack))
        if not last.equal(latest) or (last == reached.shape[-1]).any():
            return None
    values, least = torch.from_numpy(array), ranked.gather(-1, last)
    dropped = values < least
    surplus = (~dropped).sum(-1, keepdim=True) - (last + 1)
    if surplus.any():  # of equal ones the lowest ids are kept
        tied = values == least
        dropped |= tied & (tied.cumsum(-1) > tied.sum(-1, keepdim=True) - surplus)
    return dropped


def as_numpy(values: torch.Tensor) -> np.ndarray:
    """As an array; NumPy has no bfloat16."""
    return (values.float() if values.dtype in (torch.bfloat16, torch.float16) else values).numpy()
