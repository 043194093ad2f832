"""The PyTorch decoder reading one token a row on a CUDA GPU, as fast as it can.

    decoder = borrow(model, rows=2, places=144)
    logits = decoder(ids, decoder.cache)       # (B, 1), on the CPU -> (B, V), on the GPU
    give_back(model, decoder)                  # for the next call, which then has nothing to record

A GPU is done with a token sooner than Python has launched the kernels for it. So a step is recorded
once in a CUDA graph, which launches all of them in one call, and Q, K and V are one product. What
comes after what is the model's own `DecoderLayer.forward`, as in `cpu_decoder`.

A graph has fixed shapes and reads and writes fixed memory. So there is one for each number of rows
(the powers of two: what would come of rows that are none is ignored) and each bucket of 128 keys,
recorded when it is first needed: a text crosses into a bucket once in 128 tokens, and rows halve
once. What differs between steps, each row's token and place, is one copy from the host.

Shapes: B rows of text, R >= B rows of the graph, H heads of width D, C = H D, S keys,
V = vocab_size.
"""

import contextlib
import gc
from collections.abc import Callable
from functools import cache as memoize
from functools import partial
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F

from generation.cpu_decoder import Attention, Decoder, Layer, OneTokenLayer
from generation.kv_cache import KVCache

BUCKET = 128  # keys: attention reads as many as the longest row has, rounded up to a multiple
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_KEPT = 2**30  # bytes of a cache that may stay allocated between calls

Step = Callable[[], torch.Tensor]
Capture = Callable[[Step], Step]


class CaptureError(RuntimeError):
    """A step could not be recorded; the cache is as it was."""


def is_supported(model: Decoder) -> bool:
    """Whether a CUDADecoder can stand in for the module: on CUDA, in float32 or less.

    In float64 the module itself gives the CPU's text. Under autocast it decides what is computed in
    low precision. While it trains, no memory is to be held for its samples.
    """
    weight = model.embed.weight
    if weight.device.type != "cuda" or torch.is_autocast_enabled("cuda"):
        return False
    return weight.dtype in DTYPES and not model.training


# The step -----------------------------------------------------------------------------------------


class FusedAttention:
    """`MultiHeadAttention` for one token a row: (R, C) -> (R, C)."""

    def __init__(self, attention: Attention):
        self.n_heads, self.output = attention.n_heads, attention.W_o.forward
        self.linears = (attention.W_q, attention.W_k, attention.W_v)
        self.weight = torch.cat([linear.weight for linear in self.linears]).detach()  # (3 C, C)
        self.bias = None
        if attention.W_q.bias is not None:
            self.bias = torch.cat([linear.bias for linear in self.linears]).detach()  # (3 C,)

    def refresh(self):
        """Takes the weights as they are now, into the memory that graphs read."""
        self.weight.copy_(torch.cat([linear.weight for linear in self.linears]))
        if self.bias is not None:
            self.bias.copy_(torch.cat([linear.bias for linear in self.linears]))

    def __call__(self, x: torch.Tensor, mask: torch.Tensor, cache: "StepCache") -> torch.Tensor:
        qkv = F.linear(x, self.weight, self.bias).view(len(x), 3, self.n_heads, -1)  # (R, 3, H, D)
        K, V = cache.extend(qkv[:, 1:])  # (R, H, S, D)
        y = F.scaled_dot_product_attention(qkv[:, 0, :, None], K, V, mask)  # (R, H, 1, D)
        return self.output(y.reshape(x.shape))


class StepCache:
    """One layer's keys and values, of which each row's newest is written at its own place."""

    def __init__(self, kv: torch.Tensor, rows: torch.Tensor, places: torch.Tensor):
        self.kv, self.at = kv, (slice(None), rows, slice(None), places)  # kv: (2, R, H, S, D)

    def extend(self, kv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores K and V (R, 2, H, D); all that is stored, R x (H, S, D) each."""
        self.kv[self.at] = kv
        return self.kv[0], self.kv[1]


class CUDADecoder:
    """A decoder that reads one token of each row, and the cache that it reads and writes.

    It holds a second copy of the weights for Q, K and V, and the model's other weights as they are.
    """

    def __init__(self, model: Decoder, rows: int, places: int, capture: Capture):
        self.capture, self.failed = capture, False
        # whole buckets, which also gives attention's kernel the alignment that it asks of a mask
        self.cache = KVCache(model, rows, whole_buckets(places))
        self.embed, self.positions = model.embed.weight, model.pos_encoding
        self.scale = model.embedding_scale
        self.embed_norm, self.final_norm = model.embed_norm.forward, model.final_norm.forward
        layers = [cast(Layer, layer) for layer in model.layers]
        self.attentions = [FusedAttention(layer.self_attn) for layer in layers]
        self.layers = [
            OneTokenLayer(layer, attention, layer.feed_forward.forward)
            for layer, attention in zip(layers, self.attentions, strict=True)
        ]
        self.output = model.output.forward
        device = self.embed.device
        self.rows, self.every = (
            torch.arange(n, device=device) for n in (rows, self.cache.keys.shape[3])
        )
        self.recorded: dict[tuple[int, int], tuple[torch.Tensor, Step]] = {}
        self.memory = weights_memory(model)

    def fits(self, model: Decoder, rows: int, places: int) -> bool:
        """Whether it holds so much, and its graphs read the model's weights where they are now."""
        _, _, most_rows, _, most_places, _ = self.cache.kv.shape
        enough = rows <= most_rows and places <= most_places
        return enough and self.memory == weights_memory(model)

    def renew(self, rows: int):
        """Forgets what was read, and takes the weights as they are now."""
        self.cache.lengths = [0] * rows
        for attention in self.attentions:
            attention.refresh()

    def __call__(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits (B, V) after `ids` (B, 1), on the CPU, which follow on what its cache has seen.

        They are good until the next call. Nothing here makes the host wait for the device. Raises
        CaptureError.
        """
        if cache is not self.cache:
            raise ValueError("a CUDADecoder reads its own cache alone")
        B, last, (_, most_rows, _, places, _) = len(ids), max(cache.lengths), cache.keys.shape
        if last + 1 > places:
            raise ValueError(f"the cache has {places} places, and {last + 1} are needed")
        R, S = min(power_of_two(B), most_rows), whole_buckets(last + 1)
        # a row that is none reads token 0 at place 0, and writes where no text is
        given = torch.zeros(2, R, dtype=torch.int64, pin_memory=self.embed.is_cuda)
        given[0, :B], given[1, :B] = ids[:, 0], torch.tensor(cache.lengths)
        if (R, S) not in self.recorded:
            inputs = given.to(self.embed.device, copy=True)
            try:
                step = self.capture(partial(self.compute, inputs, R, S))
            except Exception as error:
                self.failed = True
                # of several lines, such as CUDA's, the first says what it is
                raise CaptureError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
            self.recorded[R, S] = inputs, step
        inputs, step = self.recorded[R, S]
        inputs.copy_(given, non_blocking=True)
        logits = step()[:B]
        cache.lengths = [n + 1 for n in cache.lengths]
        return logits

    def compute(self, inputs: torch.Tensor, R: int, S: int) -> torch.Tensor:
        """What is recorded: logits (R, V) after the tokens inputs[0] at the places inputs[1]."""
        ids, places = inputs
        x = F.embedding(ids, self.embed)
        if self.scale != 1:
            x = x * self.scale
        x = self.embed_norm(x + F.embedding(places, self.positions))  # (R, C)
        # added to scores: numbers, because from booleans each layer would make them anew
        mask = torch.zeros(R, S, dtype=x.dtype, device=x.device)
        mask.masked_fill_(self.every[:S] > places[:, None], -torch.inf)
        kv = self.cache.kv[:, :, :R, :, :S]
        for i, layer in enumerate(self.layers):
            x = layer(x, mask[:, None, None], StepCache(kv[:, i], self.rows[:R], places))
        return self.output(self.final_norm(x))


def whole_buckets(places: int) -> int:
    return -(-places // BUCKET) * BUCKET


def power_of_two(n: int) -> int:
    """The least that is n or more."""
    return 1 << (n - 1).bit_length()


def weights_memory(model: Decoder) -> list[tuple[int, torch.dtype]]:
    """Where the numbers are that graphs read."""
    tensors = [model.pos_encoding, *model.parameters()]
    return [(tensor.data_ptr(), tensor.dtype) for tensor in tensors]


# Recording ----------------------------------------------------------------------------------------


class GraphCapture:
    """Records functions of no arguments on one device, in CUDA graphs that share memory.

    They may, because of what one of them leaves there the next reads nothing: a step's inputs and
    cache are outside, and its result is good until the next step only.
    """

    def __init__(self, device: torch.device):
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def __call__(self, function: Step) -> Step:
        """A function that does the same by one launch, into the same result each time."""
        stream = capture_stream(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), attention_kernels(self.device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                # for real first: kernels are loaded, and cuBLAS takes its workspace for this
                # stream from memory that is not the graph's
                function()
                # not torch.cuda.graph, which empties the allocator's cache each time
                with no_garbage_collection():
                    graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
                    try:
                        result = function()
                    finally:
                        graph.capture_end()
            torch.cuda.current_stream().wait_stream(stream)

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay


@memoize
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all graphs of a device: cuBLAS keeps a workspace for each stream it has seen."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def no_garbage_collection():
    """Where no cycle is freed: what CUDA does to free some objects would end a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def attention_kernels(device: torch.device) -> contextlib.AbstractContextManager:
    """Where no attention is cuDNN's, which PyTorch prefers on some GPUs: it makes a plan for each
    number of keys, so for each token."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


# Between calls ------------------------------------------------------------------------------------

# what has been recorded of a model, as long as the model lives; a decoder that is lent is not here,
# so a call within a call, or in another thread, makes its own
kept: WeakKeyDictionary[Decoder, CUDADecoder] = WeakKeyDictionary()


def borrow(model: Decoder, rows: int, places: int, capture: Capture | None = None) -> CUDADecoder:
    """A decoder whose cache has room for so many rows and tokens, and holds none.

    capture: how a step is recorded; None: in a CUDA graph.
    """
    decoder = kept.pop(model, None)
    if decoder is not None and decoder.fits(model, rows, places):
        decoder.renew(rows)
        return decoder
    decoder = None  # its memory first
    return CUDADecoder(model, rows, places, capture or GraphCapture(model.embed.weight.device))


def give_back(model: Decoder, decoder: CUDADecoder):
    """Keeps a decoder for the next call, unless it failed or its cache is too large to stay."""
    if not decoder.failed and decoder.cache.nbytes <= MAX_KEPT:
        kept[model] = decoder
