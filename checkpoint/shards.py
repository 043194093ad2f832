"""Tensors in several files and an index of them, as Hugging Face has it. Standard library only.

`model.safetensors` is then `model-00001-of-00002.safetensors`, `model-00002-of-00002.safetensors`
and `model.safetensors.index.json`:

    {"metadata": {"total_size": BYTES}, "weight_map": {TENSOR: FILE, ...}}

Each tensor is whole in one of the files, which is all that the index can say
(https://huggingface.co/docs/transformers/big_models#sharded-checkpoints).
"""

import heapq
import json
import re

SUFFIX = ".safetensors"
INDEX = ".index.json"  # after the name of the file that is in shards
SHARD = re.compile(r"(.+)-[0-9]{5}-of-[0-9]{5}\.safetensors")


def deal_out(sizes: dict[str, int], files: int) -> list[list[str]]:
    """The names in `sizes` (bytes) dealt out to `files` lists of about the same size together.

    The largest first, each to the list that has the least by then: none gets more than 4/3 of what
    the best way would give it (Graham, 1969). Processes with the same `sizes` deal the same way.
    A list keeps the order of `sizes`; where there are fewer names than lists, the last are empty.
    """
    place: dict[str, int] = {}
    least = [(0, 0, i) for i in range(files)]  # bytes, names, list
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        size, names, place[name] = heapq.heappop(least)
        heapq.heappush(least, (size + sizes[name], names + 1, place[name]))
    dealt: list[list[str]] = [[] for _ in range(files)]
    for name in sizes:
        dealt[place[name]].append(name)
    return dealt


def shard_names(name: str, dealt: list[list[str]]) -> list[str]:
    """What the files of `name` (model.safetensors) are called, one for each list that has names."""
    stem, count = name.removesuffix(SUFFIX), sum(map(bool, dealt))
    return [f"{stem}-{i + 1:05d}-of-{count:05d}{SUFFIX}" for i in range(count)]


def index_json(name: str, dealt: list[list[str]], sizes: dict[str, int]) -> bytes:
    """The content of the file `name` + INDEX: which of `shard_names` holds which tensor."""
    files = zip(shard_names(name, dealt), filter(None, dealt), strict=True)
    weight_map = {tensor: file for file, tensors in files for tensor in tensors}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    return (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()


def belongs_to(file: str, name: str) -> bool:
    """Whether a file is `name`, one of its shards, or their index."""
    shard = SHARD.fullmatch(file)
    return file in (name, name + INDEX) or bool(shard and shard[1] + SUFFIX == name)
