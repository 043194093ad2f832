"""What the engines are made of: how they work, how much code that is, and what it needs.

    python -m comparison.code_size

Lines of code are counted, and the packages that must be installed. What all engines share
(configuration, data, checkpoints, sampling rules) is in no engine's count.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from comparison.markdown import NONE, figure, plain, table
from comparison.trainers import BUILT_ON, LABELS

ROOT = Path(__file__).resolve().parent.parent
DECODING = "generation/sequential.py"
MICRO = (
    "model/transformer_micro.py",
    "torchmicro/vector.py",
    "torchmicro/nn.py",
    "torchmicro/optim.py",
    DECODING,
)  # fmt: skip
FILES = {  # of each engine: names, or patterns
    "unfused": (*MICRO, "torchmicro/scalar.py"),
    "python": MICRO,
    "numpy": ("model/transformer_lite.py", "torchlite/*.py", DECODING),
    "torch": (
        "model/transformer_full.py",
        "model/bf16_attention.py",
        "generation/batched.py",
        "generation/torch_sampling.py",
        "generation/cpu_decoder.py",
        "generation/cuda_decoder.py",
    ),
}
NEEDS = {"unfused": (), "python": (), "numpy": ("numpy",), "torch": ("torch",)}
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
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def counted(engine: str) -> tuple[list[Path], int]:
    """The engine's files, and how many lines of them are neither blank, comment nor docstring."""
    found = [path for pattern in FILES[engine] for path in sorted(ROOT.glob(pattern))]
    counts = {path: code_lines(path.read_text(encoding="utf-8")) for path in found}
    return [path for path, lines in counts.items() if lines], sum(counts.values())


def lines_by_definition(engine: str) -> dict[str, int]:
    """Lines of code of each function and class of the engine's decoder, by their common names."""
    source = (ROOT / FILES[engine][0]).read_text(encoding="utf-8")
    lines, found = code_line_numbers(source), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert node.end_lineno is not None  # ast.parse sets it
            name = re.sub("(Lite|Micro)$", "", node.name)
            found[name] = len(lines.intersection(range(node.lineno, node.end_lineno + 1)))
    return found


def code_lines(source: str) -> int:
    """How many lines of a Python source are neither blank, comment nor docstring."""
    return len(code_line_numbers(source))


def code_line_numbers(source: str) -> set[int]:
    """The lines of a Python source that are neither blank, comment nor docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        # any string that stands alone: under a class's fields as under its name
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            assert node.end_lineno is not None  # ast.parse sets it
            lines.difference_update(range(node.lineno, node.end_lineno + 1))
    return lines


def dependencies(engine: str) -> list[tuple[str, str, int]]:
    """(name, version, bytes on disk) of all packages the engine needs, and that these need."""
    found, waiting = {}, list(NEEDS[engine])
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            package = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # required on another system, or by another Python: else it would be here
        files = (file.locate() for file in package.files or ())
        size = sum(Path(file).stat().st_size for file in files if Path(file).is_file())
        found[name] = (name, package.version, size)
        for requirement in package.requires or ():
            if not re.search(r"\bextra\b", requirement.partition(";")[2]):
                begins = re.match(r"[\w.-]+", requirement)
                assert begins is not None  # with the name of a package
                waiting.append(begins[0])
    return sorted(found.values(), key=lambda package: -package[2])


# Sections of the report --------------------------------------------------------------------------


def columns(names: Iterable[str]) -> list[str]:
    """The engines with code of their own among these, or that these are built on."""
    own = {name if name in FILES else BUILT_ON[name] for name in names}
    return [engine for engine in FILES if engine in own]


def label(engine: str) -> str:
    """The engine's name, for what its variants have in common."""
    return "PyTorch" if engine == "torch" else LABELS[engine]


def how_they_work(engines: list[str]) -> list[str]:
    """What stands behind a number, a node, a call."""
    rows = [[what, *(by[engine] for engine in engines)] for what, by in WORKS.items()]
    lines = []
    for engine in engines:
        files = (path.relative_to(ROOT) for path in counted(engine)[0])
        lines.append(f"- {plain(label(engine))}: {', '.join(f'`{f.as_posix()}`' for f in files)}")
    return [table(["", *map(label, engines)], rows), "Their files:", "\n".join(lines)]


def size_table(engines: list[str]) -> list[str]:
    """What there is to read of each engine, and what must be installed for it."""
    files = [counted(engine) for engine in engines]
    needs = [dependencies(engine) for engine in engines]
    rows = [
        ["files", *(str(len(paths)) for paths, _ in files)],
        ["lines of code", *(f"{lines:,}" for _, lines in files)],
        ["packages to install", *(str(len(packages)) for packages in needs)],
        ["installed [MB]", *(figure(sum(p[2] for p in packages) / 1e6) for packages in needs)],
    ]
    pieces = {engine: lines_by_definition(engine) for engine in engines if engine != "unfused"}
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


if __name__ == "__main__":
    for engine in FILES:
        files, lines = counted(engine)
        packages = dependencies(engine)
        megabytes = sum(size for _, _, size in packages) / 1e6
        print(f"{engine:8} {len(files)} files, {lines:,} lines of code; ", end="")
        print(f"{len(packages)} packages, {megabytes:,.0f} MB")
