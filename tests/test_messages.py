"""Every message of an error names a file, a key or a flag, says what to do, and is in plain words.

The messages are read from the sources: what is raised as UserError or CheckpointError, what a list
called `wrong` collects for one, and what a parser reports. An f-string is looked at with its
placeholders in braces; a placeholder that stands for a text of the same file has that text. Where
a message has several forms, each is checked. What else people read (log lines, what is printed,
help) is only searched for words that nobody outside the project would understand.
"""

import ast
import re
from dataclasses import dataclass, field, fields
from itertools import product

import pytest

import compare
import evaluate
import generate
from tests.helpers import ROOT
from training import command_line
from training.config import Config, flatten

ERRORS = {"UserError", "CheckpointError"}
MANY = 64  # forms of a message that are looked at

KEYS = {*flatten(Config())} | {f.name for f in fields(Config)}
FLAGS = {
    f.name for part in (command_line, generate, evaluate, compare) for f in fields(part.Arguments)
}
FLAGS |= {key.split(".")[-1] for key in KEYS}

FILE = re.compile(
    r"\{[^}]*\b(path|file|folder|place|cache|run|runs|given|url|where|origin)\b[^}]*\}"
    r"|\b[\w*]+\.(json|jsonl|toml|safetensors|model)\b"
)
FLAG = re.compile(r"(?<![\w-])--[a-z_]+")
KEY = re.compile(
    "|".join(rf"(?<![\w.]){re.escape(key)}\b" for key in sorted(KEYS) if "." in key)
    + r"|\{(key|name|field\.name)\} = "
    + "|" + "|".join(rf"^{name} = |^{name}: " for name in sorted(FLAGS))
)  # fmt: skip

VERBS = """add allow ask change check choose delete download fix free give install leave list lower
make move pass raise read remove rename restore resume retry run save see set shorten split start
stop train try use wait write"""
ACTION = re.compile(
    rf"(?:[;:]|, or) ({'|'.join(VERBS.split())})\b|\bmust (be|have|hold)\b|did you mean "
)

# what an expression with {error} says to do is said by the error, which has been checked itself
INNER = re.compile(r"\{[^}]*\berror\b[^}]*\}")

PRIVATE = """mend\\w*|rooms?|house|capsule|narrow|(an)?other shape|another form|(was|is) another|of
another model|pass(ed|es)? over|got through|leave it$|going on|goes on|go on( with)?|set aside|is no
(run|checkpoint|file|step)|(that|which) is none|is none$|could not be had|has been told|the
dice|as many as suit|as it was|as they were|are due|seal(ed)?|trained it on"""
FORBIDDEN = re.compile(rf"(?i)(?<![\w-])({' '.join(PRIVATE.split())})(?!\w)")

# (file, how the message begins): why it lacks a name or what to do
EXCEPTIONS = {
    (
        "common/device.py",
        "--device {name}: not on this machine ({",
    ): "the fix is in the placeholder",
    ("data/tokenizers/char.py", "{unknown"): "names the characters of the prompt; there is no file",
    ("data/tokenizers/sentencepiece.py", "not a SentencePiece model"): "taken for somebody else's",
    ("data/prepared/token_files.py", "{path}"): "open_dataset says to remove the folder",
    ("data/packing.py", "{path}.windows: damaged"): "open_plan says to remove the folder",
    ("data/dataset.py", "data.{fault}"): "lists what DataConfig says of each setting",
    ("data/sources/source.py", "data.{fault}"): "lists what DataConfig says of each setting",
    ("data/prepared/manifest.py", "{folder / name}"): "open_dataset says to remove the folder",
    ("data/dataset.py", "data.path = {folder}: prepared data, but {b"): "what_is_begun says it",
    ("data/dataset.py", "{folder}: its tokenizer"): "open_dataset says to remove the folder",
    ("generation/sequential.py", "prompt {i}"): "of the arguments of a Python function",
    ("training/config.py", "{origin}"): "lists what `describe` says of each key; see test_config",
    ("common/cli.py", "{before}: takes no value"): "names the flag that was given",
    ("common/cli.py", "{value}: belongs to no flag"): "names the value that was given",
    ("training/sharding.py", "{name}"): "names the tensor",
    ("common/processes.py", "rank {"): "the reason is an error that names its place itself",
    ("tools/verify_resume.py", "{name}: this program"): "the name is that of a flag of train.py",
}


@dataclass
class Scope:
    """What names stand for in one place of a file: texts, and functions that return them."""

    names: dict[str, list[ast.expr]] = field(default_factory=dict)
    functions: dict[str, ast.FunctionDef] = field(default_factory=dict)

    def inside(self, function: ast.AST) -> "Scope":
        """The same with what is assigned in a function."""
        return Scope(self.names | assigned(function), self.functions)


def assigned(node: ast.AST) -> dict[str, list[ast.expr]]:
    """The expressions that are assigned to each name in a node, functions in it included."""
    found: dict[str, list[ast.expr]] = {}
    for each in ast.walk(node):
        if isinstance(each, ast.Assign):
            for target in each.targets:
                if isinstance(target, ast.Name):
                    found.setdefault(target.id, []).append(each.value)
                elif isinstance(target, ast.Tuple) and isinstance(each.value, ast.Tuple):
                    for name, value in zip(target.elts, each.value.elts, strict=False):
                        if isinstance(name, ast.Name):
                            found.setdefault(name.id, []).append(value)
        elif isinstance(each, ast.AugAssign) and isinstance(each.target, ast.Name):
            before = found.get(each.target.id, [])
            found[each.target.id] = [ast.BinOp(value, ast.Add(), each.value) for value in before]
    return found


def rendered(node: ast.expr, scope: Scope, depth: int = 4) -> list[str]:
    """The forms of a text, with placeholders in braces; [] if it is no text that is known here."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.JoinedStr):
        parts = [placeholder(part, scope, depth) for part in node.values]
        return ["".join(form) for form, _ in zip(product(*parts), range(MANY), strict=False)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        sides = [rendered(side, scope, depth) for side in (node.left, node.right)]
        return [a + b for a, b in product(*sides)]
    if isinstance(node, ast.IfExp):
        return rendered(node.body, scope, depth) + rendered(node.orelse, scope, depth)
    if isinstance(node, ast.BoolOp):
        return [form for value in node.values for form in rendered(value, scope, depth)]
    if depth and isinstance(node, ast.Name):
        values = scope.names.get(node.id, [])
        return [form for value in values for form in rendered(value, scope, depth - 1)]
    if depth and isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        function = scope.functions.get(node.func.id)
        returns = [n.value for n in ast.walk(function or node) if isinstance(n, ast.Return)]
        inner = scope.inside(function) if function else scope
        return [form for v in returns if v for form in rendered(v, inner, depth - 1)]
    return []


def placeholder(part: ast.expr, scope: Scope, depth: int) -> list[str]:
    """The forms of one part of an f-string: a text, or the source of an expression in braces."""
    if not isinstance(part, ast.FormattedValue):
        return rendered(part, scope, depth)
    known = rendered(part.value, scope, depth) if part.conversion == -1 else []
    return known or ["{" + ast.unparse(part.value) + "}"]


def scopes(tree: ast.Module) -> list[tuple[ast.AST, Scope]]:
    """Each function, and the module's own statements, with what names stand for in it."""
    functions = {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    constants = assigned(ast.Module([n for n in tree.body if isinstance(n, ast.Assign)], []))
    top = Scope(constants, functions)
    inner = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    return [(n, top.inside(n)) for n in inner]


def errors_in(text: str) -> set[str]:
    """The messages of errors in Python source, with their placeholders in braces."""
    found = set()
    for function, scope in scopes(ast.parse(text)):
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                if node.args and (name in ERRORS or name == "parser.error"):
                    found.update(rendered(node.args[0], scope) or unknown(node.args[0]))
                if name == "refuse":
                    found.update(elements(node.args[0], scope))
        if lists_what_is_wrong(function):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "wrong.append":
                    found.update(rendered(node.args[0], scope))
                if isinstance(node, ast.Assign | ast.AugAssign | ast.Return) and node.value:
                    found.update(elements(node.value, scope))
    return {message for message in found if message}


def unknown(node: ast.expr) -> set[str]:
    """An argument that is no text: {} where its parts are checked by themselves, or as it is."""
    checked = {"; ".join(("x",)), "'; '.join(wrong)", "message", "error"}
    return set() if ast.unparse(node) in checked else {"{" + ast.unparse(node) + "}"}


def lists_what_is_wrong(function: ast.AST) -> bool:
    """Whether a function has a list whose elements are messages, each whole."""
    source = ast.unparse(function)
    return bool(
        re.search(r"refuse\(wrong\)|UserError\('; '\.join\(wrong\)\)|return wrong$", source, re.M)
    ) or source.startswith(("def at_least(", "def wrong_types("))


def elements(node: ast.expr, scope: Scope) -> set[str]:
    """The texts in lists and list comprehensions of an expression."""
    found = set()
    for each in ast.walk(node):
        if isinstance(each, ast.List):
            found.update(form for e in each.elts for form in rendered(e, scope))
        elif isinstance(each, ast.ListComp):
            found.update(rendered(each.elt, scope))
    return found


def faults(message: str) -> list[str]:
    """What a message lacks, or has that it must not have."""
    found = []
    if not (FILE.search(message) or FLAG.search(message) or KEY.search(message)):
        found.append("names no file, key or flag")
    if not (ACTION.search(message) or INNER.search(message)):
        found.append("does not say what to do")
    if private := FORBIDDEN.search(message):
        found.append(f"says {private[0]!r}")
    if "\n" in message:
        found.append("has more than one line")
    return found


def sources() -> dict[str, str]:
    """The text of every Python file that people run, by its path."""
    left_out = {"tests", "benchmarks", "docs", "build"}
    hidden = re.compile(r"^\.|^v?env$|^site-packages$")
    texts = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = file.relative_to(ROOT).parts
        if parts[0] not in left_out and not any(map(hidden.search, parts)):
            texts["/".join(parts)] = file.read_text("utf-8")
    return texts


def is_excepted(file: str, message: str) -> bool:
    return any(file == where and message.startswith(start) for where, start in EXCEPTIONS)


# What else people read ----------------------------------------------------------------------------

SHOWN = {"print", "log", "self.log", "report", "row", "self.bar.write"}
SETTINGS = re.compile(r"Arguments|Sampling|Data|\w*Config")  # whose docstrings --help shows


def shown_in(text: str) -> set[str]:
    """Log lines, what is printed, help, and the docstrings of settings, in Python source."""
    found, tree = set(), ast.parse(text)
    for function, scope in scopes(tree):
        for node in ast.walk(function):
            if isinstance(node, ast.Call):
                if ast.unparse(node.func) in SHOWN:
                    found.update(f for a in node.args for f in rendered(a, scope))
                for key in node.keywords:
                    if key.arg in ("help", "description"):
                        found.update(rendered(key.value, scope))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and SETTINGS.fullmatch(node.name):
            alone = (n.value for n in node.body if isinstance(n, ast.Expr))
            found.update(n.value for n in alone if isinstance(n, ast.Constant))
    return {line for line in found if isinstance(line, str)}


# The checks ---------------------------------------------------------------------------------------


def test_every_error_names_its_place_and_says_what_to_do():
    found = [
        f"{file}: {message!r} {', '.join(wrong)}"
        for file, text in sources().items()
        for message in sorted(errors_in(text))
        if not is_excepted(file, message) and (wrong := faults(message))
    ]
    assert not found, "\n".join(found)


def test_the_exceptions_are_still_needed():
    messages = {(file, m) for file, text in sources().items() for m in errors_in(text)}
    for file, start in EXCEPTIONS:
        meant = [m for where, m in messages if where == file and m.startswith(start)]
        assert meant, f"{file}: {start}"
        assert any(map(faults, meant)), f"{file}: {start} is no exception any more"


def test_enough_messages_are_found():
    """A number below this says that the search misses a way to make them."""
    assert sum(len(errors_in(text)) for text in sources().values()) > 120


def test_nothing_shown_has_private_words():
    found = [
        f"{file}: {line!r} says {private[0]!r}"
        for file, text in sources().items()
        for line in sorted(shown_in(text))
        if (private := FORBIDDEN.search(line))
    ]
    assert not found, "\n".join(found)


GOOD = [
    'raise UserError(f"{path}: not UTF-8 at byte {n}; save it as UTF-8")',
    'raise UserError("--name x: exists; choose another name")',
    'raise CheckpointError(f"{file}: damaged ({size} bytes); use another checkpoint")',
    'raise UserError(f"data.val_path = {p}: no such file; fix the path")',
    'raise UserError(f"data.path = {p}: no such file; " + fix)',
    'raise UserError(f"--init_from {error}")',
    'refuse([f"d_model = {d} must be at least 1"])',
]
BAD = {
    'raise UserError(f"there is no file {x}: mend the path")': "names no file, key or flag",
    'raise UserError("the weights do not fit; use others")': "names no file, key or flag",
    'raise UserError(f"{path}: is of another form; use another checkpoint")': "says",
    'raise UserError(f"{path}: its model has another shape: leave it")': "says",
    'raise CheckpointError(f"{path}: its model has another shape")': "does not say what to do",
    'raise UserError(f"{path}: it was another; use --init_from")': "says",
    'raise CheckpointError(f"{path}: the checkpoint is none")': "says",
    'raise UserError(f"--device {name}: not on this machine")': "does not say what to do",
    'raise UserError("--x: one\\ntwo; use y")': "more than one line",
    'refuse(wrong)\nwrong = [f"{name} is bad; use 1"]': "names no file, key or flag",
    'wrong.append("no file; use 1")\nrefuse(wrong)': "names no file, key or flag",
    'raise UserError("; ".join(wrong))\nwrong.append("no; use 1")': "names no file, key or flag",
    "raise UserError(text)\ntext = 'no file'": "names no file, key or flag",
    "raise UserError(text)": "names no file, key or flag",
}


@pytest.mark.parametrize("text", GOOD)
def test_a_good_message_passes(text):
    source = in_function(text, "fix = 'give another'")
    assert errors_in(source) and not [w for m in errors_in(source) for w in faults(m)]


@pytest.mark.parametrize("text", BAD)
def test_a_bad_message_is_found(text):
    found = [wrong for m in errors_in(in_function(text)) for wrong in faults(m)]
    assert any(BAD[text] in wrong for wrong in found), found


def in_function(*lines: str) -> str:
    body = "\n".join(line for text in lines for line in text.splitlines())
    return "def f(path):\n" + "\n".join(f"    {line}" for line in body.splitlines())


@pytest.mark.parametrize("word", ["mend", "capsule", "passed over", "got through", "going on"])
def test_a_private_word_is_found_in_what_is_shown(word):
    for text in (f"log(f'{word} {{x}}')", f"print('now {word} it')", f"row('{word}', '')"):
        assert any(map(FORBIDDEN.search, shown_in(in_function(text))))
    settings = f'class Arguments:\n    x: int = 1\n    """It was {word}."""\n'
    assert any(map(FORBIDDEN.search, shown_in(settings)))
    assert not any(map(FORBIDDEN.search, shown_in(in_function("log('resuming a run')"))))
