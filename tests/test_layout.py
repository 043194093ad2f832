"""The folders and their imports: one direction, no cycles, and each program loads what it uses."""

import ast
import json
import shutil
import subprocess
import sys
import tomllib
import zipfile
from graphlib import CycleError, TopologicalSorter

import pytest

from tests.helpers import ROOT
from tests.test_generate import save_run

# from the ground up: a folder imports its own level's folders never, and lower ones freely
LEVELS = (
    {"common"},
    {"data", "torchlite", "torchmicro"},
    {"checkpoint", "generation"},
    {"model"},
    {"evaluation"},
    {"training"},
    {"tools", "comparison", "exchange"},
    {"train", "generate", "evaluate", "compare"},
    {"benchmarks", "examples", "docs"},
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
INSIDE_DATA = ("data.tokenizers", "data.sources", "data.prepared")  # likewise
PROGRAMS = {"train", "generate", "evaluate", "compare"}


def sources() -> dict[str, ast.Module]:
    """The syntax tree of every module of the project but its tests, by dotted name."""
    files = [*ROOT.glob("*.py"), *(f for name in LEVEL for f in (ROOT / name).rglob("*.py"))]
    return {
        ".".join(file.relative_to(ROOT).with_suffix("").parts): ast.parse(file.read_text("utf-8"))
        for file in files
    }


def imports(tree: ast.Module, known: set[str]) -> set[str]:
    """The project's modules that a module imports anywhere in it, in functions too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names} & known
            found |= names or {node.module}
    return found & known


def graph() -> dict[str, set[str]]:
    """Each module's imports."""
    trees = sources()
    return {name: imports(tree, trees.keys()) for name, tree in trees.items()}


def wrong_direction(edges: dict[str, set[str]]) -> list[str]:
    """Imports that lead up, or across to a folder of the same level."""
    return [
        f"{name} imports {target}"
        for name, targets in edges.items()
        for target in targets
        if (a := name.split(".")[0]) != (b := target.split(".")[0]) and LEVEL[a] <= LEVEL[b]
    ]


def by_folder(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The imports of folders inside folders, each of them taken for one module."""
    found: dict[str, set[str]] = {}
    for name, targets in edges.items():
        unit, *others = (".".join(module.split(".")[:2]) for module in (name, *targets))
        found.setdefault(unit, set()).update({*others} - {unit})
    return found


def test_every_folder_with_code_has_its_level():
    here = {f.relative_to(ROOT).parts[0].removesuffix(".py") for f in ROOT.glob("[!.]*/*.py")}
    here |= {f.stem for f in ROOT.glob("*.py")}
    assert here - {"tests", "build"} == LEVEL.keys()


def test_imports_point_one_way():
    assert wrong_direction(graph()) == []


def test_no_file_imports_itself_by_way_of_others():
    TopologicalSorter(graph()).prepare()  # raises CycleError


def test_folders_inside_folders_import_one_way():
    edges = by_folder(graph())
    TopologicalSorter(edges).prepare()  # raises CycleError
    folders = [init.parent.name for init in (ROOT / "data").glob("*/__init__.py")]
    assert {f"data.{name}" for name in folders} == {*INSIDE_DATA}
    for i, folder in enumerate(INSIDE_DATA):
        assert not edges[folder] & {*INSIDE_DATA[i:]}


def test_nothing_imports_a_program():
    found = {(n, t) for n, targets in graph().items() for t in targets & PROGRAMS}
    assert found == set()


def test_the_checks_find_what_they_look_for():
    known = {"common.cli", "model.loss", "train"}
    tree = ast.parse("def f():\n    from model import loss\nimport train\n")
    assert imports(tree, known) == {"model.loss", "train"}
    assert wrong_direction({"common.cli": {"model.loss"}}) == ["common.cli imports model.loss"]
    assert wrong_direction({"generation.a": {"checkpoint.b"}})
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
    with pytest.raises(CycleError):
        TopologicalSorter(by_folder({"a.b.c": {"a.d"}, "a.d": {"a.b.e"}})).prepare()


@pytest.mark.parametrize("folder", [name for name in sorted(LEVEL) if name not in PROGRAMS])
def test_every_init_is_empty(folder):
    assert all(file.read_text() == "" for file in (ROOT / folder).rglob("__init__.py"))


def test_tests_mirror_the_folders():
    """Each folder of tests but these is named after the folder that it tests, inside data/ too."""
    others = {"faults", "golden", "parity", "fixtures", "cuda", "distributed"}
    folders = {f.name for f in (ROOT / "tests").iterdir() if f.is_dir() and f.name[0] not in "._"}
    assert folders - others <= LEVEL.keys()
    for folder in folders - others:
        for file in (ROOT / "tests" / folder).rglob("test_*.py"):
            assert (ROOT / file.relative_to(ROOT / "tests").parent).is_dir(), file


def test_installed_it_is_found_from_anywhere_and_hides_nothing(tmp_path):
    """As `pip install -e .` does it, with the clone and the environment in folders of their own."""
    pytest.importorskip("setuptools", "77.0.1")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages, clone = project["tool"]["setuptools"]["packages"], tmp_path / "clone"
    top = set().union(*LEVELS[:6])
    inits = [file.relative_to(ROOT) for name in top for file in (ROOT / name).rglob("__init__.py")]
    assert packages == sorted(".".join(init.parent.parts) for init in inits)
    for name in top:
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("*cache*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    build = "from setuptools.build_meta import build_editable; build_editable('..')"
    subprocess.run([sys.executable, "-c", build], cwd=clone, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "theirs" / "data").mkdir(parents=True)  # which need not have an __init__.py
    (tmp_path / "theirs" / "data" / "loader.py").write_text("")
    (tmp_path / "theirs" / "model.py").write_text("theirs = True")
    for folder, code in (
        ("notebooks", "from model.transformer_micro import TransformerDecoderMicro"),
        ("notebooks", "import data.config, training.config"),
        ("theirs", "import model, data.loader; assert model.theirs"),
        ("theirs", f"sys.path.insert(0, {str(clone)!r}); import model.transformer_micro"),
    ):
        code = f"import site, sys; site.addsitedir({str(tmp_path / 'site')!r}); {code}"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path / folder, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


# What a program loads -----------------------------------------------------------------------------

# torch and what it loads by itself come first, so that these are not held against generate.py
CODE = """
import json, runpy, sys
if sys.argv[1] == "torch":
    import torch
before = set(sys.modules)
sys.argv = ["generate.py", "--engine", sys.argv[1], "--checkpoint", sys.argv[2], "--device", "cpu"]
try:
    runpy.run_path("generate.py", run_name="__main__")
except SystemExit as end:
    assert not end.code
print(json.dumps(sorted(set(sys.modules) - before)))
"""
HEAVY = ("torch._dynamo", "torch._inductor", "torch.distributed", "torch.onnx", "sympy", "pandas")
HEAVY += ("tensorboard", "torch.utils.tensorboard", "pydantic", "matplotlib", "rich", "tqdm")
OWN = {  # what generate.py loads of the project, but for common/, checkpoint/ and data/
    "torch": {
        "generation.batched", "generation.cpu_decoder", "generation.cuda_decoder",
        "generation.kv_cache", "generation.torch_sampling", "model.transformer_full",
        "model.bf16_attention",
    },
    "numpy": {
        "model.transformer_lite", "torchlite.functional", "torchlite.nn", "torchlite.tensor",
    },
    "python": {
        "model.transformer_micro", "torchmicro.nn", "torchmicro.scalar", "torchmicro.vector",
    },
}  # fmt: skip
ALWAYS = {"generation.explain", "generation.sampling", "generation.sequential"}
ALWAYS |= {"generation.streaming", "model.config", "model.engines"}


@pytest.mark.parametrize("kind", ["pairs", "lines"])
@pytest.mark.parametrize("engine", OWN)
def test_generating_loads_nothing_it_does_not_use(tmp_path, engine, kind):
    save_run(tmp_path / "run", kind)
    done = subprocess.run(
        [sys.executable, "-c", CODE, engine, tmp_path / "run"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert not [m for m in loaded if any(m == name or m.startswith(f"{name}.") for name in HEAVY)]
    own = {m for m in loaded if "." in m and m.split(".")[0] in LEVEL}
    own = {m for m in own if m.split(".")[0] not in ("common", "checkpoint", "data")}
    assert own == OWN[engine] | ALWAYS
    others = {"torch": set(), "numpy": {"torch"}, "python": {"torch", "numpy", "safetensors"}}
    assert not others[engine] & set(loaded)
