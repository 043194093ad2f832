"""What the engines are made of: how they work, how much code that is, and what it needs.

works(engines), code(engines)    sections of `comparison.report`: lists of blocks
columns(names)                   the engines they are about
"""

from collections.abc import Iterable

from comparison import footprint
from comparison.text import NONE, figure, plain, table
from comparison.trainers import BUILT_ON, LABELS

WORKS = {
    "what it is for": {
        "unfused": "to believe: seven derivatives, and all else is made of them",
        "python": "to see every number, with nothing installed",
        "numpy": "to see every operation and its gradient, at a usable speed",
        "torch": "to train for real, on CPU or CUDA",
    },
    "a number is": {
        "unfused": "a Python object (Value): a float, its gradient, its tape",
        "python": "a Python float in the list of a vector (Vector)",
        "numpy": "4 or 8 bytes in a NumPy array (Tensor)",
        "torch": "4 or 8 bytes in a tensor's storage",
    },
    "a node of the graph is": {
        "unfused": "a record for each +, *, power, exp, log, tanh or ReLU of numbers",
        "python": "a record for an operation on a vector, such as a linear layer for one token",
        "numpy": "an entry for an operation on a whole batch: output, inputs, a function",
        "torch": "an object of C++ (grad_fn) for an operation on a whole batch",
    },
    "backward visits": {
        "unfused": "the tape in reverse",
        "python": "the tape in reverse",
        "numpy": "the tape in reverse",
        "torch": "a node once all its users are done, which it counts",
    },
    "memory is freed": {
        "unfused": "when backward has cleared the tape, by Python's count of references",
        "python": "when backward has cleared the tape, by Python's count of references",
        "numpy": "gradients on the way as each is passed on, the rest when the tape is cleared",
        "torch": "what a node kept for its gradient as soon as the node has run",
    },
    "operations are called by": {
        "unfused": "the Python interpreter, number by number",
        "python": "the Python interpreter: a loop in each operation, zeros of a ReLU left out",
        "numpy": "the Python interpreter; the loops are NumPy's, the products BLAS's",
        "torch": "PyTorch's dispatcher, which picks a kernel by device and type; "
        "compiled: one call for many operations",
    },
}


def columns(names: Iterable[str]) -> list[str]:
    """The engines with code of their own among these, or that these are built on."""
    own = {name if name in footprint.FILES else BUILT_ON[name] for name in names}
    return [engine for engine in footprint.FILES if engine in own]


def label(engine: str) -> str:
    """The engine's name, for what its variants have in common."""
    return "PyTorch" if engine == "torch" else LABELS[engine]


def works(engines: list[str]) -> list[str]:
    """What stands behind a number, a node, a call."""
    rows = [[what, *(by[engine] for engine in engines)] for what, by in WORKS.items()]
    lines = []
    for engine in engines:
        files = (path.relative_to(footprint.ROOT) for path in footprint.code(engine)[0])
        lines.append(f"- {plain(label(engine))}: {', '.join(f'`{f.as_posix()}`' for f in files)}")
    return [table(["", *map(label, engines)], rows), "Their files:", "\n".join(lines)]


def code(engines: list[str]) -> list[str]:
    """What there is to read of each engine, and what must be installed for it."""
    files = [footprint.code(engine) for engine in engines]
    needs = [footprint.dependencies(engine) for engine in engines]
    care = [footprint.care(engine) for engine in engines]
    rows = [
        ["files", *(str(len(paths)) for paths, _ in files)],
        ["lines of code", *(f"{lines:,}" for _, lines in files)],
        *([what, *(f"{counts[what]:,}" for counts in care)] for what in care[0]),
        ["packages to install", *(str(len(packages)) for packages in needs)],
        ["installed [MB]", *(figure(sum(p[2] for p in packages) / 1e6) for packages in needs)],
    ]
    pieces = {engine: footprint.pieces(engine) for engine in engines if engine != "unfused"}
    shared = dict.fromkeys(name for found in pieces.values() for name in found)
    blocks = [
        "Lines of code are those that are neither blank, comment nor docstring. Of each engine its "
        "files above are counted: the decoder, generation, and what of its autograd, layers and "
        "optimizer is in this project. For PyTorch that is the decoder and generation alone: "
        "PyTorch's own code, by far the largest, is not counted, and neither is NumPy's. Nor is "
        "what all engines share (the configuration, data, checkpoints, sampling rules).",
        table(["", *map(label, engines)], rows),
    ]
    if pieces:
        head = ["", *(label(engine).split(",")[0] for engine in pieces)]
        body = [[n, *(str(found.get(n, NONE)) for found in pieces.values())] for n in shared]
        blocks += ["Lines of code of each piece of the decoder:", table(head, body)]
    lines = []
    for engine, packages in zip(engines, needs, strict=True):
        listed = ", ".join(f"{p} {v} ({figure(b / 1e6, 2)} MB)" for p, v, b in packages)
        lines.append(f"- {plain(label(engine))} needs {plain(listed) or 'nothing but Python'}.")
    return [*blocks, "\n".join(lines)]
