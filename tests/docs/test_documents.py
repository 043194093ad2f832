"""README, CONTRIBUTING and docs/: links resolve, paths and commands exist, the README stays short.

A command is not run here: its program must exist, and what `--help` prints must have its flags.
`bash docs/examples.sh` runs the quick ones.
"""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from tests.helpers import ROOT

README_LINES, README_WORDS = 200, 1900
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {file.relative_to(ROOT).as_posix(): file.read_text("utf-8") for file in FILES}

# Markdown -----------------------------------------------------------------------------------------

FENCE = re.compile(r"^(```+)([^\n`]*)\n(.*?)^\1[ \t]*$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(
    r"\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\[[^\]]+\]:\s*(\S+)|(?:src|href)=\"([^\"]+)\"", re.M
)
HEADING = re.compile(r"^#{1,6}[ \t]+(.+?)[ \t#]*$", re.M)
ELSEWHERE = re.compile(r"[a-z][a-z+.-]*:", re.I)  # https: and the like


def prose(text: str) -> str:
    """A document without its fenced blocks."""
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """The anchors of a document's headings as GitHub makes them; a second equal one ends in -1."""
    found, count = set(), {}
    for heading in HEADING.findall(prose(text)):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # of a link its text
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        count[slug] = count.get(slug, -1) + 1
        found.add(f"{slug}-{count[slug]}" if count[slug] else slug)
    return found


def broken_links(name: str, text: str, root: Path = ROOT) -> list[str]:
    """Links and images of the document `name` that lead to no file, or to no heading in it."""
    broken = []
    for match in LINK.finditer(SPAN.sub("", prose(text))):
        target = next(filter(None, match.groups()))
        if ELSEWHERE.match(target):
            continue
        path, _, anchor = target.partition("#")
        file = (root / name).parent / path if path else root / name
        page = text if not path else file.read_text("utf-8") if file.exists() and anchor else ""
        if (path and not file.exists()) or (anchor and anchor not in anchors(page)):
            broken.append(target)
    return broken


# Commands -----------------------------------------------------------------------------------------

SHELL = {"sh", "bash", "shell", "console"}
INDENTED = re.compile(r"^ {4,}(?:\$ )?((?:python3?|pip|pytest|tensorboard) .*)", re.M)
PATHS = re.compile(r"[\w.-]+(?:/[\w.-]+)+\.(?:py|toml|md|sh|json|txt|png)")
PLACEHOLDER = re.compile(r"NAME|FOLDER|PATH")  # in a path: not a file's own name
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = EXTRAS["optional-dependencies"].keys()
# what other lines may look like, besides those of `pip` and `python`
KNOWN = [
    r"python3 -m venv \.venv",
    r"\. \.venv/bin/activate",
    r"tensorboard --logdir [\w/.-]+",
    r"pytest(?: [\w/.=-]+)*",
    r"ruff (?:check|format --check) \.",
    r"pyrefly check",
    r"git clone \S+(?: \S+)?",
    r"cd \S+",
    r"curl -LO https://\S+",
]


def commands(text: str) -> list[str]:
    """The command lines of a document: in fenced sh blocks, after `$ `, and in `python ...`."""
    found = []
    for _, language, block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            shown = line.startswith("$ ")
            if line.strip() and (shown or language.strip() in SHELL):
                found.append(line.removeprefix("$ "))
    spans = SPAN.findall(prose(text))  # `python -m benchmarks.` heads a column of names
    return found + [s for s in spans if re.match(r"python3? [\w-]", s) and not s.endswith(".")]


def split(line: str) -> list[list[str]]:
    """The words of each command of a line, without its comment."""
    parts, words = [[]], shlex.split(line, comments=True)
    for word in words:
        if word == "&&":
            parts.append([])
        else:
            parts[-1].append(word)
    return [part for part in parts if part]


def program_of(words: list[str]) -> tuple[str, list[str]] | None:
    """(module or script, its arguments) of a `python` command; None for another command."""
    if words[0] != "python" or len(words) == 1:
        return None
    return (words[2], words[3:]) if words[1] == "-m" and words[2:] else (words[1], words[2:])


def source_of(program: str) -> Path | None:
    """The file of a module or a script of this project; None if there is none."""
    if program.endswith(".py"):
        return file if (file := ROOT / program).is_file() else None
    if not (ROOT / program.split(".")[0]).exists():
        return None  # find_spec would find packages of Python's as well
    try:
        spec = importlib.util.find_spec(program)
        if spec and spec.submodule_search_locations:  # a package is run by its __main__
            spec = importlib.util.find_spec(f"{program}.__main__")
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


def takes_flags(source: Path) -> bool:
    """Whether it has a command line. What has none would run at `--help`, which must not be."""
    return bool(re.search(r"argparse|cli\.|harness import .*\bparser\b", source.read_text("utf-8")))


def wrong_in(line: str, helps: dict[str, str]) -> list[str]:
    """What is wrong with a command line; `helps` has what `--help` prints, by program."""
    try:
        parts = split(line)
    except ValueError as error:
        return [f"{line}: {error}"]
    return [f"{line}: {wrong}" for words in parts for wrong in wrong_command(words, helps)]


def wrong_command(words: list[str], helps: dict[str, str]) -> list[str]:
    """What is wrong with one command."""
    if words[0] == "pip":
        return wrong_pip(words)
    if words[0] == "bash":
        return [] if len(words) == 2 and (ROOT / words[1]).is_file() else ["no such script"]
    if words[0] == "torchrun":
        try:
            launched = get_args_parser().parse_args(words[1:])
        except SystemExit:
            return ["torchrun does not take it"]
        words = ["python", launched.training_script, *launched.training_script_args]
    if words[0] != "python":
        known = any(re.fullmatch(form, " ".join(words)) for form in KNOWN)
        return [] if known else ["not a command that is known here"]
    program, arguments = program_of(words) or ("", [])
    source = source_of(program)
    if source is None:
        return [f"no module or script {program}"]
    flags = [a.partition("=")[0] for a in arguments if re.match(r"--?[A-Za-z]", a)]
    if not takes_flags(source):
        return [f"{program} takes no arguments"] if arguments else []
    text = helps[program]
    if re.search(
        r"train\.py\s+\(see\s+its\s+--help|python train.py --help", text
    ):  # it takes those
        text += helps["train.py"]
    if "Traceback" in text:
        return [f"{program} --help ends in an error: {text.strip().splitlines()[-1]}"]
    wrong = [f"no flag {f}" for f in flags if not re.search(rf"(?<![\w.-]){f}(?![\w.-])", text)]
    choices = re.search(r"positional arguments:\s+\{([^}]+)\}", text)
    if choices and arguments and arguments[0] not in choices[1].split(","):
        wrong.append(f"{arguments[0]} is none of {choices[1]}")
    given = [a for a in arguments if a.startswith(("configs/", "examples/", "tests/"))]
    return wrong + [f"no file {path}" for path in given if not (ROOT / path).exists()]


def wrong_pip(words: list[str]) -> list[str]:
    """`pip install [-q] [-c FILE] -e '.[extras]'`, and nothing else."""
    form = r"pip install (?:-q )?(?:-c (\S+) )?-e \.(?:\[([\w,]+)\])?"
    form = re.fullmatch(form, " ".join(words))
    if not form:
        return ["not a pip install that is known here"]
    wrong = [f"no extra {e}" for e in (form[2] or "").split(",") if e and e not in EXTRAS]
    if form[1] and not (ROOT / form[1]).is_file():
        wrong.append(f"no file {form[1]}")
    return wrong


def missing_paths(text: str) -> list[str]:
    """Files and modules that the prose names in `backquotes` and that are not there."""
    missing = []
    for span in SPAN.findall(prose(text)):
        for path in PATHS.findall(span):
            ours = (ROOT / path.split("/")[0]).is_dir() and not path.startswith("runs/")
            wanted = (ours or path.endswith(".py")) and not PLACEHOLDER.search(path)
            missing += [path] * (wanted and not (ROOT / path).exists())
        modules = re.findall(r"python3? -m ([a-z]\w*(?:\.\w+)*)(?![\w.])", span)
        missing += [m for m in modules if m not in ("venv", "pip") and source_of(m) is None]
    return missing


# one process for all of them, so that PyTorch is loaded once
PRINT_HELP = """
import contextlib, io, json, runpy, sys, traceback
found = {}
for program in sys.argv[1:]:
    sys.argv = [program, "--help"]
    output = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            if program.endswith(".py"):
                runpy.run_path(program, run_name="__main__")
            else:
                runpy.run_module(program, run_name="__main__", alter_sys=True)
        except SystemExit:
            pass
        except BaseException:
            traceback.print_exc()
        output.flush()
    found[program] = output.buffer.getvalue().decode()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def helps() -> dict[str, str]:
    """What `--help` prints, for each program that any document calls."""
    programs = {"train.py", "generate.py", "checkpoint"}
    for text in TEXTS.values():
        for line in commands(text):
            programs |= {p[0] for words in split(line) if (p := program_of(words))}
    sources = {program: source_of(program) for program in sorted(programs)}
    called = [program for program, source in sources.items() if source and takes_flags(source)]
    done = subprocess.run(
        [sys.executable, "-c", PRINT_HELP, *called],
        cwd=ROOT, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def too_long(text: str) -> list[str]:
    """By what a README exceeds its limits."""
    lines, words = len(text.splitlines()), len(text.split())
    return [f"{lines} lines"] * (lines > README_LINES) + [f"{words} words"] * (words > README_WORDS)


# The documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_links_and_images_resolve(name):
    assert broken_links(name, TEXTS[name]) == []


@pytest.mark.parametrize("name", TEXTS)
def test_commands_name_what_exists(name, helps):
    assert [wrong for line in commands(TEXTS[name]) for wrong in wrong_in(line, helps)] == []


@pytest.mark.parametrize("name", TEXTS)
def test_paths_and_modules_exist(name):
    assert missing_paths(TEXTS[name]) == []


@pytest.mark.parametrize("name", TEXTS)
def test_commands_stand_in_fenced_blocks(name):
    """So that the tests above see them."""
    assert INDENTED.findall(prose(TEXTS[name])) == []


@pytest.mark.parametrize("name", TEXTS)
def test_tables_are_whole(name):
    """An empty line ends a table: rows after it have no header, and are shown as raw text."""
    tables = re.findall(r"^(\|.*)\n(.*)(?:\n\|.*)*", prose(TEXTS[name]), re.MULTILINE)
    assert [first for first, rule in tables if not re.fullmatch(r"\|[-:| ]+\|", rule)] == []


def test_readme_is_short():
    assert too_long(TEXTS["README.md"]) == []


def test_there_is_something_to_check(helps):
    assert len([line for text in TEXTS.values() for line in commands(text)]) > 50
    assert "--model.d_model" in helps["train.py"] and "--top_k" in helps["generate.py"]
    assert len(LINK.findall(TEXTS["docs/README.md"])) > 8


def test_every_page_is_in_the_index():
    pages = {f.name for f in FILES if f.parent == ROOT / "docs" and ".in." not in f.name}
    linked = {match[0] for match in LINK.findall(TEXTS["docs/README.md"])}
    assert pages - {"README.md"} <= linked


# The checks find what they look for ---------------------------------------------------------------

PAGE = """# A page
## What it does, and `why`
## Again
## Again
```sh
# not a heading
```
"""


def test_anchors_are_those_of_github():
    assert anchors(PAGE) == {"a-page", "what-it-does-and-why", "again", "again-1"}
    assert anchors("## A [link](x.md) & more\n### 4.1 x_y: a - b\n") == {
        "a-link--more",
        "41-x_y-a---b",
    }


@pytest.mark.parametrize(
    "link",
    [
        "[a](nowhere.md)",
        "![a](nowhere.png)",
        "[a](page.md#nothing)",
        "[a](page.md#not-a-heading)",
        "[a](#nothing)",
        "[a](../x.md)",
        "[a]: nowhere.md",
        '<img src="nowhere.png">',
    ],
)
def test_broken_links_are_found(tmp_path, link):
    (tmp_path / "page.md").write_text(PAGE)
    whole = "[a](page.md) [b](page.md#again-1) [c](https://example.com/x.md#y) `[d](nowhere.md)`\n"
    assert broken_links("other.md", whole, tmp_path) == []
    assert len(broken_links("other.md", f"{whole}{link}\n", tmp_path)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "python train.py --resume --name my-run   # --not_a_flag in a comment",
        "python train.py --model.d_model=256 --data.path PATH",
        "python generate.py --prompt 'a --b' --stop $'\\n'",
        "python -m checkpoint verify runs/my-run",
        "python3 -m venv .venv && . .venv/bin/activate && pip install -q -e '.[report]' && pytest",
        "tensorboard --logdir runs",
    ],
)
def test_right_commands_pass(line, helps):
    assert wrong_in(line, helps) == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("python trian.py", "no module or script trian.py"),
        ("python -m training.preflight", "no module or script training.preflight"),
        ("python -m json.tool", "no module or script json.tool"),
        ("python -m model", "no module or script model"),
        ("python train.py --model.d_modle 256", "no flag --model.d_modle"),
        ("python train.py --model.d 256", "no flag --model.d"),
        ("python generate.py --checkpoint=x --topk=50", "no flag --topk"),
        ("python -m checkpoint verfy runs/my-run", "verfy is none of verify,list"),
        ("python train.py --config configs/none.toml", "no file configs/none.toml"),
        ("python -m tests.record_golden --all", "no flag --all"),
        ("python train.py && pip install torch", "not a pip install"),
        ("pip install -e '.[none]'", "no extra none"),
        ("pip install -q -c none.txt -e '.[dev]'", "no file none.txt"),
        ("bash none.sh", "no such script"),
        ("torchrun --nprocs=2 train.py", "torchrun does not take it"),
        ("torchrun --nproc_per_node=2 train.py --model.d 256", "no flag --model.d"),
        ("rm -rf runs", "not a command that is known here"),
        ("python generate.py --prompt 'a", "No closing quotation"),
    ],
)
def test_wrong_commands_are_found(line, expected, helps):
    assert expected in "; ".join(wrong_in(line, helps))


def test_a_program_that_fails_is_found():
    helps = {"train.py": "Traceback (most recent call last):\nImportError: no x"}
    assert "ImportError: no x" in wrong_in("python train.py", helps)[0]


def test_commands_are_found():
    text = """
```sh
python a.py --x \\
    1          # why

tensorboard --logdir runs
```

    python indented.py

and `python -m b --y` beside `--z`, `x.py`, `python -m c.`
```
$ python shown.py
what it printed
```
"""
    assert [split(line) for line in commands(text)] == [
        [["python", "a.py", "--x", "1"]],
        [["tensorboard", "--logdir", "runs"]],
        [["python", "shown.py"]],
        [["python", "-m", "b", "--y"]],
    ]
    assert INDENTED.findall(prose(text)) == ["python indented.py"]


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("`training/curves.py`", ["training/curves.py"]),
        ("`rooms/house.py` and `configs/none.toml`", ["rooms/house.py", "configs/none.toml"]),
        ("`python -m data.rooms fetch NAME`", ["data.rooms"]),
        ("`train.py` `model/config.py` `tests/FOLDER/test_NAME.py` `runs/my-run/x.json`", []),
        ("`python -m tests.faults` `python3 -m venv .venv`", []),
    ],
)
def test_missing_paths_are_found(text, missing):
    assert missing_paths(text) == missing


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a b\n" * 200, []),
        ("a\n" * 201, ["201 lines"]),
        ("a " * 1900, []),
        ("a " * 1901, ["1901 words"]),
        ("a b c d e f g h i j\n" * 201, ["201 lines", "2010 words"]),
    ],
)
def test_a_long_readme_is_found(text, expected):
    assert too_long(text) == expected
