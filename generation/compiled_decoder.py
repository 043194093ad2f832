"""The decode step on a CPU as one call, compiled by the machine's own C++ compiler.

    decoder = CompiledDecoder(model, load())     # while the weights stay as they are
    logits = decoder(ids, cache)                 # as CPUDecoder: (B, 1) -> (B, V), float32

A CPUDecoder of a small model spends most of its time between products: in Python, in PyTorch's
calls, and where threads meet. `decode_step.cpp` has none of that. It needs no header of PyTorch's,
so it compiles in about a second, once on a machine. In bfloat16 are the weights, keys and values of
a model in bfloat16, and what its products read; all else is float32. A row that is cached gives the
same logits in any batch, to the last bit.

Shapes: B rows, C = d_model, N outputs of a linear layer, K its inputs, V = vocab_size.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache as remembered
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from common.device import processor
from common.errors import UserError
from generation import cpu_decoder
from generation.kv_cache import KVCache
from generation.sampling import Sampling
from generation.torch_sampling import not_finite, sample_tokens

SOURCE = Path(__file__).parent / "decode_step.cpp"
FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno"]
if platform.machine().lower() in ("x86_64", "amd64"):
    FLAGS.append("-mprefer-vector-width=512")
CACHE = SOURCE.parent / "cache"  # where the compiled step is kept
SECONDS = 120  # that the compiler may take
DTYPES = {torch.float32: 0, torch.bfloat16: 1}


class Linear(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("inputs", "outputs", "dtype")),
    ]


class Norm(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        ("eps", ctypes.c_float),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *((name, Linear) for name in ("qkv", "output", "linear1", "linear2")),
        *((name, Norm) for name in ("norm1", "norm2")),
    ]


class Step(ctypes.Structure):
    """`Decoder` of decode_step.cpp."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "d_model", "n_heads", "n_layers", "norm_first", "activation", "embed_dtype",
            )
        ),
        ("embedding_scale", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("embed", "positions")),
        *((name, Norm) for name in ("embed_norm", "final_norm")),
        ("layers", ctypes.POINTER(Layer)),
        ("logits", Linear),
    ]  # fmt: skip


class Cache(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
        *(
            (name, ctypes.c_int64)
            for name in ("dtype", "layer_stride", "row_stride", "head_stride")
        ),
    ]


@remembered
def load() -> ctypes.CDLL | None:
    """decode_step.cpp, compiled for this processor; None, and a line on stderr, if it cannot be."""
    try:
        library = ctypes.CDLL(str(compiled()))
    except (OSError, UserError, subprocess.SubprocessError) as error:
        why = error if isinstance(error, UserError) else f"--compile: {error}"
        print(f"{why}; generating without it, more slowly", file=sys.stderr)
        return None
    library.panel.restype = ctypes.c_int64
    for function in (library.step, library.sample_top_k):
        function.restype = None
    return library


def compiled() -> Path:
    """The shared library, made unless it is there. Raises OSError, UserError, SubprocessError."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0]) is None:
        raise UserError(f"--compile: no C++ compiler ({compiler[0]}); install one, or set CXX")
    # what one processor can do, another may not: its name and flags are part of the file's
    about = [SOURCE.read_text("utf-8"), *compiler, *FLAGS, processor(), instructions()]
    name = hashlib.sha256("\n".join(about).encode()).hexdigest()[:16]
    library = CACHE / f"{SOURCE.stem}-{name}.so"
    if library.exists():
        return library
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        made = Path(folder) / "step.o", Path(folder) / "step.so"
        # not linked with OpenMP: a second copy of it, with threads of its own, would fight for the
        # cores with the one that PyTorch has loaded
        for command in (
            [*compiler, *FLAGS, "-c", str(SOURCE), "-o", str(made[0])],
            [*compiler, "-shared", str(made[0]), "-o", str(made[1])],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)  # noqa: S603, ours
            if done.returncode:
                lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
                raise UserError(
                    f"--compile: {shlex.join(compiler)} failed ({lines[0]}); set CXX to a C++ "
                    "compiler that has OpenMP"
                )
        os.replace(made[1], library)
    return library


def instructions() -> str:
    """What /proc/cpuinfo says that this processor can do; "" where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


class CompiledDecoder:
    """A decoder that reads one token of each row. Holds a second copy of all weights it multiplies.

    The copy is of the weights as they are now: make a new one when they have changed.
    """

    def __init__(self, model: cpu_decoder.Decoder, library: ctypes.CDLL):
        self.library, self.panel = library, library.panel()
        self.kept: list = []  # what only addresses in `step` refer to
        given = [cast(cpu_decoder.Layer, layer) for layer in model.layers]
        layers, first = [self.layer(layer) for layer in given], given[0]
        embed = self.keep(model.embed.weight)
        self.n_outputs = model.config.vocab_size
        self.step = Step(
            d_model=model.config.d_model,
            n_heads=model.config.n_heads,
            n_layers=len(layers),
            norm_first=first.norm_first,
            activation=1 if isinstance(first.feed_forward.activation, nn.ReLU) else 2,
            embed_dtype=DTYPES[model.embed.weight.dtype],
            embedding_scale=model.embedding_scale,
            embed=embed,
            positions=self.floats(model.pos_encoding),
            embed_norm=self.norm(model.embed_norm),
            final_norm=self.norm(model.final_norm),
            layers=(Layer * len(layers))(*layers),
            logits=self.linear(model.output),
        )

    def keep(self, tensor: torch.Tensor) -> int:
        """The address of a contiguous tensor's numbers, which stay there."""
        self.kept.append(tensor.detach().contiguous())
        return self.kept[-1].data_ptr()

    def floats(self, tensor: torch.Tensor | None, padded: int = 0) -> int | None:
        """The address of a float32 copy, the end filled up with zeros; None: nothing is there."""
        if tensor is None:
            return None
        copy = tensor.new_zeros(max(padded, len(tensor)), *tensor.shape[1:], dtype=torch.float32)
        copy[: len(tensor)] = tensor.detach()
        return self.keep(copy)

    def norm(self, norm: nn.Module) -> Norm:
        if isinstance(norm, nn.LayerNorm):
            return Norm(1, self.floats(norm.weight), self.floats(norm.bias), norm.eps)
        if isinstance(norm, nn.RMSNorm):
            return Norm(2, eps=norm.eps)
        return Norm(0)

    def linear(self, *linears: nn.Linear) -> Linear:
        """Several linear layers side by side, as one."""
        weight = linears[0].weight.detach()
        if len(linears) > 1:
            weight = torch.cat([linear.weight.detach() for linear in linears])
        N, K = weight.shape
        numbers = weight
        if weight.dtype == torch.bfloat16:  # two inputs side by side: as one number
            numbers = F.pad(weight, (0, K % 2)).contiguous().view(torch.int32)
        whole, panels, steps = N // self.panel, -(-N // self.panel), numbers.shape[1]
        packed = numbers.new_empty(panels, steps, self.panel)
        rows = numbers[: whole * self.panel].view(whole, self.panel, steps)
        packed[:whole] = rows.transpose(1, 2)
        if whole < panels:
            packed[-1] = 0
            packed[-1, :, : N - whole * self.panel] = numbers[whole * self.panel :].T
        bias = None
        if linears[0].bias is not None:
            bias = torch.cat([linear.bias for linear in linears])
        return Linear(
            weight=self.keep(packed),
            bias=self.floats(bias, panels * self.panel),
            inputs=K, outputs=N, dtype=DTYPES[weight.dtype],
        )  # fmt: skip

    def layer(self, layer: cpu_decoder.Layer) -> Layer:
        attention, feed_forward = layer.self_attn, layer.feed_forward
        return Layer(
            qkv=self.linear(attention.W_q, attention.W_k, attention.W_v),
            output=self.linear(attention.W_o),
            linear1=self.linear(feed_forward.linear1),
            linear2=self.linear(feed_forward.linear2),
            norm1=self.norm(layer.norm1),
            norm2=self.norm(layer.norm2),
        )

    def __call__(self, ids: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """Logits (B, V) after `ids` (B, 1), which follow on what the KVCache has seen."""
        B, keys, ids = len(ids), cache.keys, ids.contiguous()
        places = (ctypes.c_int64 * B)(*cache.advance(1))
        logits = torch.empty(B, -(-self.n_outputs // self.panel) * self.panel)
        there = Cache(
            keys.data_ptr(), cache.values.data_ptr(), DTYPES[keys.dtype], *keys.stride()[:3]
        )
        self.library.step(
            ctypes.byref(self.step), ctypes.byref(there), ctypes.c_int64(B),
            ctypes.c_void_p(ids.data_ptr()), places, ctypes.c_void_p(logits.data_ptr()),
            ctypes.c_int64(torch.get_num_threads()),
        )  # fmt: skip
        return logits[:, : self.n_outputs]

    def sample_tokens(
        self, logits: torch.Tensor, rules: Sampling, numbers: list[float]
    ) -> list[int]:
        """`torch_sampling.sample_tokens`."""
        B, V = logits.shape
        if rules.deterministic or rules.top_p < 1 or not 0 < rules.top_k < V:
            return sample_tokens(logits, rules, numbers)
        tokens = (ctypes.c_int64 * B)()
        self.library.sample_top_k(
            ctypes.c_void_p(logits.data_ptr()), ctypes.c_int64(logits.stride(0)),
            *map(ctypes.c_int64, (B, V, rules.top_k)), ctypes.c_double(rules.temperature),
            (ctypes.c_double * B)(*numbers), tokens, ctypes.c_int64(torch.get_num_threads()),
        )  # fmt: skip
        if min(tokens) < 0:
            raise not_finite()
        return list(tokens)
