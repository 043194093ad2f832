"""Safetensors files with the standard library: bytes to numbers, and nothing believed; and NumPy.

    tensors = read(Path("model.safetensors").read_bytes())
    tensors["embed.weight"].shape     # (V, C)
    tensors["embed.weight"].tolist()  # V lists of C floats

A file is 8 bytes, the length of a header; the header, JSON in UTF-8, that gives each tensor's
dtype, shape and place; then the numbers, little-endian, without a gap
(https://github.com/huggingface/safetensors#format). This reader takes and refuses what
`safetensors.numpy.load` does, which is more than that page says: the order of tensors is free,
unknown keys of a tensor are skipped, and its three fields may stand in a list. Two things differ:
BF16 is read, which NumPy lacks, and C64 is not. tests/test_safetensors_reader.py compares the two.
"""

import json
import math
import struct
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Kind = tuple[np.dtype, tuple[int, ...]]  # dtype and shape of an array

MAX_HEADER = 100_000_000  # bytes
MAX_DEPTH = 127  # lists and objects within each other
MAX_DIMENSIONS = 64  # of a NumPy array
MAX_BYTES = 2**63  # of a NumPy array, were none of its dimensions 0
MAX_EMPTY_LISTS = 2**20

# How `struct` calls them. It has no name for BF16, which is the upper half of an F32.
FORMATS = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H"}
FORMATS |= {"I64": "q", "I32": "i", "I16": "h", "I8": "b"}
FORMATS |= {"U64": "Q", "U32": "I", "U16": "H", "U8": "B", "BOOL": "?"}
OTHERS = ("C64", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")  # not read here
OTHERS += ("F6_E2M3", "F6_E3M2", "F4")
FIELDS = ("dtype", "shape", "data_offsets")


class Pairs(list):
    """A JSON object as its pairs of key and value, in order, so that repeated keys are seen."""


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file, its numbers still as bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: memoryview

    def tolist(self) -> list | float:
        """Nested lists of Python numbers, as `numpy.ndarray.tolist` gives; a scalar is a number.

        Raises ValueError for shapes such as (2**40, 0): no number in more lists than memory holds.
        """
        size = math.prod(self.shape)
        if size == 0 and math.prod(self.shape[: self.shape.index(0)]) > MAX_EMPTY_LISTS:
            raise ValueError(f"shape {self.shape} is too many empty lists")
        numbers: list | tuple
        if self.dtype == "BF16":
            wide = bytearray(4 * size)
            wide[2::4], wide[3::4] = self.data[0::2], self.data[1::2]
            numbers = struct.unpack(f"<{size}f", wide)
        else:
            numbers = struct.unpack(f"<{size}{FORMATS[self.dtype]}", self.data)
        for axis in range(len(self.shape) - 1, -1, -1):  # the innermost lists first
            n = self.shape[axis]
            rows = math.prod(self.shape[:axis])
            numbers = [list(numbers[i * n : (i + 1) * n]) for i in range(rows)]
        return numbers[0]


def read(content: bytes) -> dict[str, Tensor]:
    """The tensors of a whole file by name. Raises ValueError, with the reason, for any other."""
    if len(content) < 8:
        raise ValueError(f"{len(content)} bytes are too few for the length of a header")
    (length,) = struct.unpack_from("<Q", content)
    if length > MAX_HEADER:
        raise ValueError(f"a header of {length} bytes is longer than the {MAX_HEADER} allowed")
    if length > len(content) - 8:
        raise ValueError(f"a header of {length} bytes in a file of {len(content)}")
    infos = read_header(content[8 : 8 + length])
    data, end = memoryview(content)[8 + length :], 0
    tensors = {}
    for name, (dtype, shape, offsets) in sorted(infos.items(), key=lambda item: item[1][2]):
        first, last = offsets
        if dtype not in FORMATS:
            raise ValueError(f"tensor {name!r}: this reader has no dtype {dtype}")
        if not first == end <= last <= len(data):
            raise ValueError(
                f"tensor {name!r}: bytes {first} to {last} of {len(data)}, where {end} is the next"
            )
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r}: {len(shape)} dimensions, at most {MAX_DIMENSIONS}")
        width = struct.calcsize("<" + FORMATS[dtype])
        if math.prod(n for n in shape if n) * width >= MAX_BYTES:
            raise ValueError(f"tensor {name!r}: shape {shape} is too large")
        if last - first != math.prod(shape) * width:
            raise ValueError(f"tensor {name!r}: {last - first} bytes for {dtype} of shape {shape}")
        tensors[name] = Tensor(dtype, shape, data[first:last])
        end = last
    if end != len(data):
        raise ValueError(f"{len(data) - end} bytes after the last tensor")
    return tensors


def read_lists(content: bytes) -> dict:
    """The tensors of a file as nested lists of numbers by name. Raises ValueError."""
    return {name: tensor.tolist() for name, tensor in read(content).items()}


# The header ---------------------------------------------------------------------------------------


def read_header(header: bytes) -> dict[str, tuple]:
    """(dtype, shape, (first byte, last + 1)) by name; of a repeated name the last one."""
    try:
        parsed = json.loads(
            header.decode(),  # or json guesses UTF-16 and UTF-32
            object_pairs_hook=Pairs,
            parse_int=parse_integer,
            parse_float=parse_real,
            parse_constant=parse_real,  # NaN and Infinity, which JSON has not
        )
        check_nesting(parsed)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON: {error}") from None
    if not isinstance(parsed, Pairs):
        raise ValueError("its header is not a JSON object")
    metadata = [value for name, value in parsed if name == "__metadata__"]
    if len(metadata) > 1:
        raise ValueError("__metadata__ stands twice in its header")
    for value in metadata:
        if value is not None and not (
            isinstance(value, Pairs) and all(isinstance(text, str) for _, text in value)
        ):
            raise ValueError("__metadata__ is not an object of strings")
    return {name: read_info(name, info) for name, info in parsed if name != "__metadata__"}


def read_info(name: str, info: object) -> tuple[str, tuple[int, ...], tuple[int, int]]:
    """What the header says of one tensor, if it has the form: dtype, shape, offsets."""
    if isinstance(info, Pairs):
        found = [[value for key, value in info if key == field] for field in FIELDS]
        info = [values[0] for values in found if len(values) == 1]
    if not isinstance(info, list) or len(info) != 3:
        raise ValueError(f"tensor {name!r}: does not have {', '.join(FIELDS)}, each once")
    dtype, shape, offsets = info
    if isinstance(dtype, Pairs) and len(dtype) == 1 and dtype[0][1] is None:
        dtype = dtype[0][0]  # {"F32": null}, the long form of an enumeration in Rust
    if not isinstance(dtype, str) or dtype not in (*FORMATS, *OTHERS):
        raise ValueError(f"tensor {name!r}: its dtype is none of {', '.join(FORMATS)}")
    for numbers in (shape, offsets):
        if type(numbers) is not list or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"tensor {name!r}: its shape and offsets are not lists of integers")
    if len(offsets) != 2:
        raise ValueError(f"tensor {name!r}: its data_offsets are not two")
    return dtype, tuple(shape), tuple(offsets)


def parse_integer(text: str) -> int | float:
    """An integer of at most 64 bits; to the real reader others, and -0, are no integers."""
    number = int(text) if len(text) <= 20 else 2**64
    return number if -(2**63) <= number < 2**64 and text != "-0" else parse_real(text)


def parse_real(text: str) -> float:
    """A finite number. The real reader rounds a little worse, so the largest is refused too."""
    if not abs(float(text)) < sys.float_info.max:  # refuses NaN as well
        raise ValueError(f"the number {text[:40]} is out of range")
    return float(text)


def check_nesting(value: object, depth: int = 1):
    """Raises ValueError where the real reader does and Python's json does not."""
    if isinstance(value, str):
        value.encode()  # lone surrogates have no UTF-8
    elif isinstance(value, list | tuple):
        if isinstance(value, list) and depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_DEPTH} levels")
        for part in value:
            check_nesting(part, depth + isinstance(value, list))


# Writing ------------------------------------------------------------------------------------------


def write(arrays: dict) -> bytes:
    """A file of nested lists of floats by name, each as F64."""
    header, parts = {}, []
    for name, nested in arrays.items():
        shape, numbers = [], nested
        while isinstance(numbers, list):
            shape.append(len(numbers))
            numbers = numbers[0] if numbers else None
        flat = nested if shape else [nested]
        for _ in shape[1:]:
            flat = [x for row in flat for x in row]
        parts.append(struct.pack(f"<{len(flat)}d", *flat))
        header[name] = {"dtype": "F64", "shape": shape}
    return b"".join([head(header, [len(part) for part in parts]), *parts])


def head(
    header: dict[str, dict], sizes: Sequence[int], metadata: dict[str, str] | None = None
) -> bytes:
    """What stands before the numbers, for dtype and shape by name, and the bytes of each."""
    ends = list(accumulate(sizes))
    for info, end, size in zip(header.values(), ends, sizes, strict=True):
        info["data_offsets"] = [end - size, end]
    if metadata:
        header = {"__metadata__": metadata, **header}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of their size
    return struct.pack("<Q", len(text)) + text


# With NumPy ---------------------------------------------------------------------------------------
# `safetensors.numpy` aborts the process, panics or waits forever where memory is full (0.8.0, in
# which order depends on RUST_BACKTRACE); these raise MemoryError.


def read_arrays(content: bytes) -> "dict[str, np.ndarray]":
    """The tensors of a file as arrays of their own by name. Raises ValueError, MemoryError."""
    import numpy as np

    arrays = {}
    for name, tensor in read(content).items():
        if tensor.dtype == "BF16":
            raise ValueError(f"tensor {name!r}: NumPy has no dtype BF16")
        kind = np.dtype(FORMATS[tensor.dtype]).newbyteorder("<")
        arrays[name] = np.ndarray(tensor.shape, kind, tensor.data).copy()
    return arrays


def write_arrays(arrays: "dict[str, np.ndarray]") -> bytes:
    """A file of arrays by name; the only large block that it takes is the file. MemoryError."""
    kinds = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    return b"".join(pieces(kinds, (arrays[name] for name in in_file_order(kinds))))


def in_file_order(kinds: "dict[str, Kind]") -> list[str]:
    """The names as a file has them: the widest numbers first, so that each begins at a multiple of
    its size. So a file of some of them has them in the same order."""
    return sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))


def pieces(
    kinds: "dict[str, Kind]",
    arrays: "Iterable[np.ndarray]",
    metadata: dict[str, str] | None = None,
) -> Iterator[bytes | memoryview]:
    """A file in pieces, which are views of bytes: its head, then each array's numbers.

    kinds: dtype and shape of each tensor. arrays: these tensors in the order of `in_file_order`;
    one is asked for when its turn comes, so that only one at a time need be in memory.
    """
    import numpy as np

    ordered = {name: kinds[name] for name in in_file_order(kinds)}
    header = {
        name: {"dtype": dtype_name(dtype), "shape": list(shape)}
        for name, (dtype, shape) in ordered.items()
    }
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in ordered.values()]
    yield head(header, sizes, metadata)
    for kind, array in zip(ordered.values(), arrays, strict=True):
        assert (array.dtype, array.shape) == kind
        yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def dtype_name(dtype: "np.dtype") -> str:
    """What the format calls a dtype of NumPy: F32, I64, BOOL."""
    return "BOOL" if dtype.kind == "b" else f"{dtype.kind.upper()}{8 * dtype.itemsize}"
