"""Writes docs/side_by_side.md: the engines' code, topic by topic, copied out of their sources.

    python docs/side_by_side.py              writes it anew
    python docs/side_by_side.py --check      exit status 1 if that would change it

The words are those of docs/side_by_side.in.md. A line of it may stand for code:

    {{model/transformer_lite.py:attention}}                a function, class or method
    {{torchmicro/vector.py:Vector.mix, Vector.softmax}}    several of a file in one block
    {{model/transformer_full.py:attention | F.scaled}}    statements with this in their first line
    {{table}}                                              where all the code above it comes from
"""

import argparse
import ast
import difflib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE, DOCUMENT = "docs/side_by_side.in.md", "docs/side_by_side.md"
COMMAND = "python docs/side_by_side.py"
NOTE = f"<!-- Made by `{COMMAND}` from {TEMPLATE} and the sources: change those, not this. -->"
ENGINES = {  # the files of each; of several for a shared one
    "PyTorch": (
        "model/transformer_full.py",
        "generation/batched.py",
        "generation/kv_cache.py",
        "training/visuals.py",
        "training/step.py",
        "model/loss.py",
        "training/optimizer.py",
    ),
    "NumPy": (
        "model/transformer_lite.py",
        "torchlite/functional.py",
        "torchlite/nn.py",
        "torchlite/tensor.py",
        "torchlite/optim.py",
        "generation/sequential.py",
        "generation/sampling.py",
    ),
    "Plain Python": (
        "model/transformer_micro.py",
        "torchmicro/nn.py",
        "torchmicro/vector.py",
        "torchmicro/scalar.py",
        "torchmicro/optim.py",
        "generation/sequential.py",
        "generation/sampling.py",
    ),
}
PLACEHOLDER = re.compile(r"\{\{(?P<file>[^:]+):(?P<names>[^|]+?)(?: \| (?P<text>.+))?\}\}")


class TemplateError(ValueError):
    """A line of the template stands for nothing."""


def definitions(
    parent: ast.Module | ast.ClassDef, prefix: str = ""
) -> Iterator[tuple[str, ast.stmt]]:
    """Functions, classes and methods, each with its qualified name."""
    for node in parent.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name, node  # nested functions come with the one they are in
        if isinstance(node, ast.ClassDef):
            yield from definitions(node, f"{prefix}{node.name}.")


@cache
def known_in(source: str) -> dict[str, ast.stmt]:
    """All definitions of a file by name."""
    return dict(definitions(ast.parse(source)))


def statements(parent: ast.AST, lines: list[str], text: str) -> list[ast.stmt]:
    """Statements inside whose first line has `text`; of one that is found, none inside it."""
    found = []
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.stmt) and text in lines[node.lineno - 1]:
            found.append(node)
        else:
            found += statements(node, lines, text)
    return found


def written(node: ast.stmt, lines: list[str]) -> str:
    """A statement as it is written, decorators and comments with it, moved to the left edge."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    return dedent("\n".join(lines[first - 1 : node.end_lineno]))


def extract(root: Path, file: str, name: str, text: str | None = None) -> str:
    """The code of a definition, or those of its statements whose first line has `text`.

    Raises TemplateError if there is no such file, definition or statement.
    """
    try:
        source = (root / file).read_text(encoding="utf-8")
    except OSError as error:
        raise TemplateError(f"{file} cannot be read: {error.strerror}") from None
    lines, known = source.split("\n"), known_in(source)
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, cutoff=0)
        raise TemplateError(f"{file} has no {name}" + "".join(f"; is it {n}?" for n in near))
    if text is None:
        return written(known[name], lines)
    found = statements(known[name], lines, text)
    if not found:
        raise TemplateError(f"{file}: no statement of {name} has {text!r} in its first line")
    code = [written(found[0], lines)]
    for before, node in pairwise(found):
        left_out = any(line.strip() for line in lines[before.end_lineno : node.lineno - 1])
        code += ["# ..."] * left_out + [written(node, lines)]
    return "\n".join(code)


def block(root: Path, file: str, names: list[str], text: str | None) -> str:
    """Whose code it is, from where, and the code."""
    owners = [engine for engine, files in ENGINES.items() if file in files]
    if not owners:
        raise TemplateError(f"{file} is of none of the engines that {COMMAND.split()[1]} knows")
    heading = f"**{', '.join(owners)}**, {link(file)}: {'from ' if text else ''}{quoted(names)}"
    code = "\n\n".join(extract(root, file, name, text) for name in names)
    return f"{heading}\n\n```python\n{code}\n```"


def link(file: str) -> str:
    """Without a line number, which would change with every edit above the code."""
    return f"[{file}](../{file})"


def quoted(names) -> str:
    return ", ".join(f"`{name}`" for name in names)


def table(shown: dict) -> str:
    """A row for each topic; in each engine's column its files and what of them is shown."""
    rows = [["topic", *ENGINES], ["---"] * (1 + len(ENGINES))]
    for topic, files in shown.items():
        row = [f"[{topic}](#{topic.lower().replace(' ', '-')})"]
        for own in ENGINES.values():
            cell = [f"{link(file)}: {quoted(files[file])}" for file in files if file in own]
            row.append("<br>".join(cell))
        rows.append(row)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def document(root: Path) -> str:
    """The whole text. Raises TemplateError, with the line, for a placeholder without a meaning."""
    lines, topic = [NOTE, ""], ""
    shown = defaultdict(lambda: defaultdict(dict))  # topic -> file -> names, in order
    template = (root / TEMPLATE).read_text(encoding="utf-8")
    for number, line in enumerate(template.split("\n"), 1):
        if line.startswith("## "):
            topic = line[3:]
        try:
            if line == "{{table}}":
                line = table(shown)
            elif match := PLACEHOLDER.fullmatch(line):
                file, names = match["file"], match["names"].split(", ")
                line = block(root, file, names, match["text"])
                shown[topic][file].update(dict.fromkeys(names))
            elif "{{" in line or "}}" in line:
                raise TemplateError("not a placeholder: see the top of the script")
        except TemplateError as error:
            raise TemplateError(f"{TEMPLATE}:{number}: {error}") from None
        lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """The exit status: 1 if --check finds a difference, 2 for a faulty template."""
    summary = __doc__.splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("--check", action="store_true", help="only report whether it is up to date")
    check = parser.parse_args(arguments).check
    path = root / DOCUMENT
    try:
        text = document(root)
    except TemplateError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not check:
        path.write_text(text, encoding="utf-8", newline="\n")
    elif not path.exists() or path.read_text(encoding="utf-8") != text:
        print(f"{DOCUMENT} is out of date; run {COMMAND}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
