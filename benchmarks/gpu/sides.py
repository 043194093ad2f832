"""The processes of benchmarks/gpu.py that use PyTorch: what each finds is a line, a JSON object.

    python -m benchmarks.gpu.sides first cuda
    python -m benchmarks.gpu.sides train ours-compiled gpt2_124m 16 cuda    then lines on stdin

Those that take turns get ready, say so, and wait for a line: a number of seconds to train for, or
`profile`. The end of stdin ends them.
"""

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness, peers
from common import cli
from common.device import choose_device, memory_used, synchronize
from common.errors import UserError
from model import loss as loss_of_model
from model.transformer_full import TransformerDecoder

WARM_UP = 6  # steps before a turn: shapes are met, kernels chosen, CUDA graphs captured
PROFILED = 3  # steps
LONGEST = 25  # kernels that are listed
BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")

Step = Callable[..., int]  # takes one, and returns how many tokens it was


def say(found: dict):
    """One object, in one write: stderr goes to the same file."""
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


# Taking turns -------------------------------------------------------------------------------------


def take_turns(device: torch.device, step: Step, known: dict):
    """Gets `step` ready, says what is `known` and what that took, and does what stdin asks for."""
    began = time.perf_counter()
    step()
    synchronize(device)
    first = time.perf_counter() - began
    for _ in range(WARM_UP):
        step()
    synchronize(device)
    say({**known, "first_step_seconds": first, "ready_after_seconds": time.perf_counter() - began})
    for line in sys.stdin:
        say(
            profiled(device, step) if line.strip() == "profile" else turn(device, step, float(line))
        )


def turn(device: torch.device, step: Step, seconds: float) -> dict:
    """Trains for about so many seconds."""
    tokens = steps = 0
    synchronize(device)
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or steps == 0:
        tokens += step()
        steps += 1
    synchronize(device)
    seconds = time.perf_counter() - began
    return {
        "tokens_per_second": tokens / seconds,
        "ms_a_step": 1e3 * seconds / steps,
        "steps": steps,
        "peak_memory": memory_used(device),
    }


def train(side: str, name: str, rows: str, device_name: str, checkout: str = ""):
    """ours-compiled, ours-eager or nanogpt on random ids, `rows` sequences a step."""
    device = choose_device(device_name)
    shape, _, length = peers.MODELS[name]
    ids, targets = torch.randint(0, shape.vocab_size, (2, int(rows), length), device=device)
    if side == "nanogpt":
        train_step = peers.make(side, shape, length, device, checkout)
    else:
        compiled = side == "ours-compiled"
        train_step = peers.make("bf16", shape, length, device, compiled=compiled)

    def step(**how) -> int:
        train_step(ids, targets, **how)
        return ids.numel()

    take_turns(device, step, {"flops_per_token": flops_per_token(name), "side": side})


def flops_per_token(name: str) -> int:
    """Of a model of peers.MODELS, as training counts them."""
    shape, _, length = peers.MODELS[name]
    with torch.device("meta"):
        return TransformerDecoder.from_config(shape).flops_per_token(length)


def config(*flags: str):
    """The run that train.py would start with these flags: its own parts and data, nothing saved."""
    from data.batches import Prefetch
    from training.command_line import read_command_line
    from training.compile import compile_loss
    from training.cuda_graphs import choose_step
    from training.optimizer import set_lr
    from training.schedule import lr_factor
    from training.setup import build
    from training.timing import StepTimer

    notes = []

    def log(line: str):
        print(line, flush=True)
        if line.startswith(("compile:", "cuda_graphs:", "attention:")):
            notes.append(line)

    spec = read_command_line(log, list(flags))
    assert spec is not None  # there is something to train
    state = build(spec, log)
    settings, timer, number = state.config, StepTimer(state.device), 0
    batches = Prefetch(state.batches, settings.train.accumulation_steps)
    loss_module = state.loss_module
    if settings.compile:
        loss_module = compile_loss(state, *batches(0), log)
    take_step = choose_step(state, loss_module, log)
    timer.on = False  # parts are timed in logged steps alone

    def step() -> int:
        nonlocal number
        set_lr(state.optimizers, lr_factor(settings.optimizer, number, settings.horizon))
        result = take_step(*batches(number), number, timer)
        number += 1
        return result.tokens

    take_turns(state.device, step, {"notes": notes})
    batches.close()


# Profiling ----------------------------------------------------------------------------------------


class Parts:
    """Milliseconds of the parts of some steps, by the device's own clock: nothing is waited for."""

    def __init__(self, device: torch.device):
        self.device, self.spans = device, []

    def now(self) -> Any:
        """This moment: an event in the stream, or on a CPU the time."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def __call__(self, name: str):
        began = self.now()
        yield
        self.spans.append((name, began, self.now()))

    def milliseconds(self) -> dict[str, float]:
        """The sum of each part."""
        synchronize(self.device)
        found: dict[str, float] = {}
        for name, began, ended in self.spans:
            cuda = self.device.type == "cuda"
            ms = began.elapsed_time(ended) if cuda else 1e3 * (ended - began)
            found[name] = found.get(name, 0.0) + ms
        return found


def profiled(device: torch.device, step: Step) -> dict:
    """Where the time of a step goes: parts, kernels, and how often the CPU launches something."""
    found: dict[str, Any] = {}
    with contextlib.suppress(TypeError):  # a step that takes no `part`
        found["parts_ms"] = parts_of(device, step)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as record:
        for _ in range(PROFILED):
            step()
        synchronize(device)
    events = [
        e for e in record.key_averages() if not e.is_user_annotation and not e.key.startswith("##")
    ]
    if device.type != "cuda":
        longest, found["launches"] = [(e.key, e.self_cpu_time_total, e.count) for e in events], None
    else:
        gpu = [e for e in events if e.device_type == DeviceType.CUDA]
        longest = [(e.key, e.self_device_time_total, e.count) for e in gpu]
        launching = [e for e in events if "LaunchKernel" in e.key or "GraphLaunch" in e.key]
        found["launches"] = sum(e.count for e in launching) / PROFILED
        kernels = [e.count for e in gpu if not e.key.startswith(("Memcpy", "Memset"))]
        found["kernels"] = sum(kernels) / PROFILED
    longest.sort(key=lambda kernel: -kernel[1])
    found["device_ms_a_step"] = sum(kernel[1] for kernel in longest) / 1e3 / PROFILED
    found["longest"] = [
        {"name": name[:160], "ms_a_step": us / 1e3 / PROFILED, "calls_a_step": count / PROFILED}
        for name, us, count in longest[:LONGEST]
    ]
    return found


def parts_of(device: torch.device, step: Step) -> dict[str, float]:
    """Milliseconds a step of forward (without the loss), loss, backward and optimizer."""
    parts = Parts(device)
    plain = loss_of_model.linear_cross_entropy

    def timed(*arguments, **more):
        with parts("loss"):
            return plain(*arguments, **more)

    loss_of_model.linear_cross_entropy = timed  # which nothing compiles
    try:
        for _ in range(PROFILED):
            step(part=parts)
    finally:
        loss_of_model.linear_cross_entropy = plain
    ms = {name: total / PROFILED for name, total in parts.milliseconds().items()}
    ms["forward"] -= ms.get("loss", 0.0)
    return ms


# The machine and its ceilings ---------------------------------------------------------------------


def first(device_name: str):
    """Versions, and a step of the tiny model: whether anything works at all."""
    device = choose_device(device_name)
    say(
        {
            "machine": harness.machine(),
            "cuda": torch.version.cuda,
            "threads": torch.get_num_threads(),
        }
    )
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        say(
            {
                "capability": torch.cuda.get_device_capability(device),
                "multiprocessors": properties.multi_processor_count,
                "memory": total, "free_memory": free,
                "cudnn": torch.backends.cudnn.version(),
            }
        )  # fmt: skip
    shape, rows, length = peers.MODELS["tiny"]
    ids, targets = torch.randint(0, shape.vocab_size, (2, rows, length), device=device)
    step = peers.make("bf16", shape, length, device, compiled=False)
    say({"losses": [step(ids, targets) for _ in range(3)]})


def prepare(*flags: str):
    """The data of a run, made once so that no later process has to wait for it."""
    from data.dataset import prepare as make
    from training.command_line import read_command_line

    spec = read_command_line(print, list(flags))
    assert spec is not None
    data = make(spec.config.data, print)
    say({"train": data.train.describe(), "vocabulary": data.tokenizer.vocab_size})


def seconds_of(device: torch.device, work: Callable[[], object], calls: int = 20) -> float:
    """Seconds of a call, median of seven times `calls` of them."""
    for _ in range(3):
        work()
    parts, found = Parts(device), []
    for _ in range(7):
        parts.spans.clear()
        with parts("calls"):
            for _ in range(calls):
                work()
        found.append(parts.milliseconds()["calls"] / 1e3 / calls)
    return statistics.median(found)


def copy_bandwidth(device: torch.device, nbytes: int, calls: int) -> float:
    """Bytes per second, read and written, of a copy of so many."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * nbytes / seconds_of(device, lambda: target.copy_(source), calls)


def ceilings(device_name: str, name: str, rows: str):
    """What this machine can do at most: copies, products, attention."""
    device, cuda = choose_device(device_name), device_name == "cuda"
    calls = 20 if cuda else 1

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    def product(m: int, k: int, n: int) -> float:  # FLOP/s of (m, k) @ (k, n), on random numbers
        a, b = normal(m, k), normal(k, n)
        return 2 * m * k * n / seconds_of(device, lambda: a @ b, calls)

    say({"copy_bytes_per_second": copy_bandwidth(device, 2**31 if cuda else 2**24, calls)})
    for n in (8192, 4096) if cuda else (256, 128):
        say({f"product_{n}": product(n, n, n)})
    shape, _, length = peers.MODELS[name]
    N, C, V = int(rows) * length, shape.d_model, shape.vocab_size
    layer = {"QKV": (C, 3 * C), "attention output": (C, C)}
    layer |= {"up": (C, shape.d_ff), "down": (shape.d_ff, C)}
    rates, seconds = {}, 0.0
    for what, (m, n) in {**layer, "output": (C, V)}.items():
        found = {  # X W, dY W^T, X^T dY
            "forward": product(N, m, n), "input gradient": product(N, n, m),
            "weight gradient": product(m, N, n),
        }  # fmt: skip
        rates[what] = found
        times = shape.n_layers if what in layer else 1
        seconds += times * sum(2 * N * m * n / rate for rate in found.values())
        say({"products": rates})
    say({"products_tokens_per_second": N / seconds})
    say(
        {
            "attention": {
                name: attention(device, name, shape, int(rows), length) for name in BACKENDS
            }
        }
    )


def attention(device, backend: str, shape, rows: int, length: int) -> dict:
    """Milliseconds of causal attention by one backend, forward and backward."""
    size = (rows, shape.n_heads, length, shape.d_model // shape.n_heads)
    Q, K, V = (
        torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    gradient = torch.randn(size, device=device, dtype=torch.bfloat16)
    calls = 10 if device.type == "cuda" else 1

    def forward():
        return F.scaled_dot_product_attention(Q, K, V, is_causal=True)

    def both():
        torch.autograd.grad(forward(), (Q, K, V), gradient)

    try:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return {
                "forward_ms": 1e3 * seconds_of(device, forward, calls),
                "both_ms": 1e3 * seconds_of(device, both, calls),
            }
    except RuntimeError as error:
        return {"error": str(error).splitlines()[0][:150]}


PROCESSES = {
    "first": first, "prepare": prepare, "ceilings": ceilings, "train": train, "config": config,
}  # fmt: skip


def main():
    name, *arguments = sys.argv[1:] or [""]
    if name not in PROCESSES:
        raise UserError(f"{name or 'no argument'}: give one of {', '.join(PROCESSES)}")
    PROCESSES[name](*arguments)


if __name__ == "__main__":
    sys.exit(cli.run("benchmarks.gpu.sides", main))
