"""How much there is to each engine: lines of its own code, and what must be installed for it.

    python -m comparison.footprint

Standard library only. What all engines share (configuration, data, checkpoints, sampling rules) is
in no engine's count.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DECODING = "model/decoding.py"
MICRO = ("model/transformer_micro.py", "model/scalar_tape.py", "model/scalar_nn.py", DECODING)
FILES = {  # of each engine: names, or patterns
    "unfused": (*MICRO, "model/scalar_written_out.py"),
    "python": MICRO,
    "numpy": ("model/transformer_lite.py", "torchlite/*.py", DECODING),
    "torch": (
        "model/transformer_full.py",
        "model/narrow_attention.py",
        "model/generation.py",
        "model/choosing.py",
        "model/decode_step.py",
    ),
}
NEEDS = {"unfused": (), "python": (), "numpy": ("numpy",), "torch": ("torch",)}
SILENT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}


def code(engine: str) -> tuple[list[Path], int]:
    """The engine's files, and how many lines of them are neither blank, comment nor docstring."""
    found = [path for pattern in FILES[engine] for path in sorted(ROOT.glob(pattern))]
    counts = {path: code_lines(path.read_text(encoding="utf-8")) for path in found}
    return [path for path, lines in counts.items() if lines], sum(counts.values())


def pieces(engine: str) -> dict[str, int]:
    """Lines of code of each function and class of the engine's decoder, by their common names."""
    source = (ROOT / FILES[engine][0]).read_text(encoding="utf-8")
    lines, found = code_line_numbers(source), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = re.sub("(Lite|Micro)$", "", node.name)
            found[name] = len(lines.intersection(range(node.lineno, node.end_lineno + 1)))
    return found


def care(engine: str) -> dict[str, int]:
    """What can be counted of the code's quality: see the keys."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in code(engine)[0]]
    public = [node for tree in trees for node in definitions(tree) if node.name[0] != "_"]
    functions = [node for node in public if isinstance(node, ast.FunctionDef)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {
        "public functions and classes": len(public),
        "of these with a docstring": sum(ast.get_docstring(node) is not None for node in public),
        "public functions": len(functions),
        "of these with type annotations": sum(map(annotated, functions)),
        "checks that raise an error": sum(isinstance(n, ast.Raise | ast.Assert) for n in nodes),
    }


def definitions(parent: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Functions, classes and methods, but not what is inside functions."""
    for node in parent.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from definitions(node)


def annotated(function: ast.FunctionDef) -> bool:
    """Whether anything of its signature has a type."""
    arguments = [node for node in ast.walk(function.args) if isinstance(node, ast.arg)]
    return bool(function.returns) or any(argument.annotation for argument in arguments)


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
        alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if alone and isinstance(node.value.value, str):
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
                waiting.append(re.match(r"[\w.-]+", requirement)[0])
    return sorted(found.values(), key=lambda package: -package[2])


if __name__ == "__main__":
    for engine in FILES:
        files, lines = code(engine)
        packages = dependencies(engine)
        megabytes = sum(size for _, _, size in packages) / 1e6
        print(f"{engine:8} {len(files)} files, {lines:,} lines of code; ", end="")
        print(f"{len(packages)} packages, {megabytes:,.0f} MB")
