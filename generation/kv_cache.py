"""Keys and values of what has been read, for the PyTorch decoder.

Shapes: B rows, T tokens, L layers, H heads of width D, S places in the cache.
"""

from typing import Protocol

import torch
from torch import nn


class Shape(Protocol):
    """What is asked here of a decoder's `config`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_layers(self) -> int: ...


class CachedModel(Protocol):
    """What a cache is made for: a decoder's shape, and where its numbers are."""

    @property
    def config(self) -> Shape: ...
    @property
    def embed(self) -> nn.Embedding: ...


class KVCache:
    """Keys and values of the tokens each row has read, in memory allocated once.

    The decoder's forward pass, without gradients, calls `reserve` and then each layer's `extend`. A
    pass over several tokens needs an empty cache (prefill); a pass over one token adds it to each
    row at that row's own place (decode). `lengths` may be set by who knows that the end of a row
    was padding.
    """

    def __init__(
        self, model: CachedModel, rows: int, places: int, dtype: torch.dtype | None = None
    ):
        config, like = model.config, model.embed.weight
        width = config.d_model // config.n_heads
        shape = (2, config.n_layers, rows, config.n_heads, places, width)  # (2, L, B, H, S, D)
        # zeros, because attention multiplies also what it masks, and 0 times NaN is NaN
        self.kv = torch.zeros(shape, dtype=dtype or like.dtype, device=like.device)
        self.keys, self.values = self.kv  # (L, B, H, S, D) each
        self.lengths = [0] * rows
        # (B, 1, 1, S): which keys each row's token sees; None: all, or causal
        self.mask: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of memory: 2 L B H S D times the size of a number."""
        return self.kv.nbytes

    @property
    def layers(self) -> list["LayerCache"]:
        """Its layers. Made when asked for: a cycle of references would keep its memory."""
        return [LayerCache(self, i) for i in range(len(self.keys))]

    def reserve(self, table: torch.Tensor, T: int) -> torch.Tensor:
        """Makes room for T more tokens a row; their positions in `table`: (T, C) or (B, 1, C)."""
        starts = self.advance(T)
        first, last, B = min(starts), max(starts), len(starts)
        self.seen_keys = self.keys[:, :B, :, : last + T].unbind()  # L times (B, H, S, D)
        self.seen_values = self.values[:, :B, :, : last + T].unbind()
        self.new_keys = self.keys[:, :B, :, last : last + T].unbind()  # L times (B, H, T, D)
        self.new_values = self.values[:, :B, :, last : last + T].unbind()
        if first == last:  # the new tokens are the last ones of every row: no mask
            self.mask = self.places = None
            return table[last : last + T]
        rows, every = (torch.arange(n, device=table.device) for n in (B, last + 1))
        places = torch.tensor(self.lengths, device=table.device) - 1  # (B,)
        self.mask = (every <= places[:, None])[:, None, None]
        self.places = (rows, slice(None), places)
        return table[places][:, None]

    def advance(self, T: int) -> list[int]:
        """Counts T more tokens to each row, and says at which places they begin: (B,).

        Raises ValueError where there is no room.
        """
        starts, last = self.lengths, max(self.lengths)
        if T > 1 and last > 0:
            raise ValueError(f"{T} tokens at once need an empty cache; this one holds {last}")
        if last + T > self.keys.shape[3]:
            raise ValueError(
                f"the cache has {self.keys.shape[3]} places, and {last + T} are needed"
            )
        self.lengths = [n + T for n in starts]
        return starts

    def drop(self, row: int):
        """Forgets a row; the last one takes its place."""
        last = len(self.lengths) - 1
        if row != last:
            self.keys[:, row] = self.keys[:, last]
            self.values[:, row] = self.values[:, last]
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()


class LayerCache:
    """One layer's part of a cache."""

    def __init__(self, cache: KVCache, layer: int):
        self.cache, self.layer = cache, layer

    def extend(self, K: torch.Tensor, V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores K and V (B, H, T, D) at the places taken; all that is stored: (B, H, S, D)."""
        cache, layer = self.cache, self.layer
        keys, values = cache.seen_keys[layer], cache.seen_values[layer]
        if cache.places is None:
            cache.new_keys[layer].copy_(K)
            cache.new_values[layer].copy_(V)
        else:
            keys[cache.places] = K[:, :, 0].type_as(keys)
            values[cache.places] = V[:, :, 0].type_as(values)
        return keys.type_as(K), values.type_as(V)  # a cache may be wider than what comes
