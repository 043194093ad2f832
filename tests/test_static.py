"""No code that runs what it reads: no pickle, eval, exec or shell, but where a reason is given."""

import ast
import re
import tomllib

import pytest

from tests.helpers import ROOT

# (file, what): why it may be there
ALLOWED = {
    ("tests/faults/malicious.py", "pickle"): "makes the malicious files that must be refused",
    ("tests/faults/malicious.py", "allow_pickle=True"): "writes one such file",
    ("tests/torchlite/test_optim.py", "pickle"): "reads back what the line itself has pickled",
}
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load", "yaml.load"}
ARGUMENTS = {("weights_only", False), ("allow_pickle", True), ("shell", True)}
SAMPLES = {
    "import dill.source as p, os": "dill",
    "from marshal import loads": "marshal",
    "__import__('pickle')": "pickle",
    "importlib.import_module('shelve')": "shelve",
    "eval(text)": "eval",
    "map(eval, texts)": "eval",
    "builtins.exec(text)": "exec",
    "compile(text, 'x', 'exec')": "compile",
    "os.system('ls')": "os.system",
    "from os import popen": "os.popen",
    "torch.load(file)": "torch.load",
    "yaml.load(file)": "yaml.load",
    "f(file, weights_only=False)": "weights_only=False",
    "np.load(file, allow_pickle=True)": "allow_pickle=True",
    "subprocess.run(line, shell=True)": "shell=True",
}
HARMLESS = ["model.eval()", "re.compile('exec')", "'import pickle'", "# eval(x)", "import pickled"]


def found_in(text: str) -> set[str]:
    """What stands in Python source that could run what it reads."""
    return {name for node in ast.walk(ast.parse(text)) for name in named(node) if name}


def named(node: ast.AST):
    """The names of what is forbidden in one node of the syntax tree."""
    if isinstance(node, ast.Import):
        yield from {a.name.split(".")[0] for a in node.names} & MODULES
    elif isinstance(node, ast.ImportFrom):
        yield from {str(node.module).split(".")[0]} & MODULES
        yield from {f"{node.module}.{a.name}" for a in node.names} & CALLS
    elif isinstance(node, ast.Name | ast.Attribute):
        yield from {ast.unparse(node).removeprefix("builtins.")} & CALLS
    elif isinstance(node, ast.Call):
        called = ast.unparse(node.func)
        values = {a.value for a in node.args if isinstance(a, ast.Constant)}
        yield "compile" if called == "compile" and values & {"exec", "eval", "single"} else ""
        if called.endswith(("__import__", "import_module")):
            yield from values & MODULES
        for key in node.keywords:
            if isinstance(key.value, ast.Constant) and (key.arg, key.value.value) in ARGUMENTS:
                yield f"{key.arg}={key.value.value}"


def sources() -> dict[str, str]:
    """The text of every Python file of the project, by its path."""
    paths = {p.relative_to(ROOT): p for p in sorted(ROOT.rglob("*.py"))}
    hidden = re.compile(r"(^|/)(\.|v?env/|site-packages/)")
    texts = {path.as_posix(): file.read_text("utf-8") for path, file in paths.items()}
    return {path: text for path, text in texts.items() if not hidden.search(path)}


def test_nothing_runs_what_it_reads():
    found = {(file, what) for file, text in sources().items() for what in found_in(text)}
    assert found - ALLOWED.keys() == set()
    assert ALLOWED.keys() - found == set(), "no longer needed"
    assert all(ALLOWED.values())


@pytest.mark.parametrize("text", SAMPLES)
def test_each_kind_is_found(text):
    assert found_in(text) == {SAMPLES[text]}


def test_what_is_harmless_is_not_found():
    assert [text for text in HARMLESS if found_in(text)] == []


def test_ruff_looks_for_unsafe_code_and_each_exception_has_its_reason():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "S" in settings["tool"]["ruff"]["lint"]["select"]
    rules = re.compile(r"# noqa: (S\d+(?:, ?[A-Z]+\d+)*)(.*)")
    bare = [
        f"{file}:{number}"
        for file, text in sources().items()
        for number, line in enumerate(text.splitlines(), 1)
        if (rule := rules.search(line)) and not re.match(r",? \w+", rule[2])
    ]
    assert bare == []
