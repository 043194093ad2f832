"""training/command_line.py, and the flags and keys of all programs that are paths: ~ is meant."""

import re
from pathlib import Path

import pytest

import compare
import generate
from checkpoint.reader import Checkpoint
from common.errors import UserError
from data.config import DataConfig
from data.dataset import prepare
from data.tokenizers.char import CharTokenizer
from tests.helpers import ROOT, TEXT, run, write_config
from tests.test_generate import TOKENIZERS, save_run
from training.command_line import read_command_line, refuse_empty
from training.config import load
from training.metrics import hyperparameters
from training.resume import RunSpec
from training.setup import given_tokenizer

TOML = """
[data]
path = "~/text.txt"
val_path = "~/text.txt"
tokenizer_path = "~/tokenizer.json"
cache_dir = "~/cache"
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a run, a configuration and a text; the current folder is another."""
    folder = tmp_path / "home"
    folder.mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))  # as Windows calls it
    monkeypatch.chdir(tmp_path / "here")
    save_run(folder / "runs" / "one", "lines")
    (folder / "my.toml").write_text(TOML)
    (folder / "text.txt").write_text(TEXT.read_text())
    (folder / "tokenizer.json").write_bytes(
        CharTokenizer(TEXT.read_text()).files()["tokenizer.json"]
    )
    yield folder
    assert list(Path().iterdir()) == []  # no folder named ~


def test_a_tilde_is_the_home_folder_in_every_flag_of_train(home):
    def spec(*flags) -> RunSpec:
        found = read_command_line(lambda line: None, list(flags))
        assert found is not None
        return found

    run = home / "runs" / "one"
    new = spec("--config=~/my.toml", "--runs_dir=~/new", "--data.cache_dir=~/other")
    assert new.run.parent == home / "new" and new.config.data.cache_dir == "~/other"
    assert spec("--runs_dir=~/runs", "--resume").run == run
    assert spec("--runs_dir=~/runs", "--resume", "--name=one").run == run
    assert spec("--runs_dir=~/runs", "--resume=~/runs/one").run == run
    weights = spec("--runs_dir=~/runs", "--init_from=~/runs/one/checkpoints").weights
    assert weights is not None and weights.path.parent.parent == run


def test_a_tilde_is_the_home_folder_in_every_key_of_data(home):
    config = load(home / "my.toml")
    tokenizer = given_tokenizer(RunSpec(home, config))
    data = prepare(config.data, lambda line: None, tokenizer)
    assert data.tokenizer_given and (home / "cache").is_dir()
    prepare(DataConfig(path=str(TEXT), tokenizer="char", cache_dir="~/more"), lambda line: None)
    assert (home / "more").is_dir()


def test_a_tilde_is_the_home_folder_in_every_flag_of_the_other_programs(home):
    (home / "prompts.txt").write_text("a\nb\n")
    assert generate.read_prompts("~/prompts.txt") == ["a", "b"]
    for given in ({"checkpoint": "~/runs/one"}, {"runs_dir": "~/runs"}):
        source = generate.open_source(generate.Arguments(**given))
        assert source.tokenizer.fingerprint == TOKENIZERS["lines"].fingerprint
    assert Checkpoint.find("~/runs/one").step == 10
    assert compare.new_folder(compare.Arguments(runs_dir="~/c", name="x")) == home / "c" / "x"


def test_nothing_else_expands_a_path():
    """One place knows what ~ means, and that is where a path of the user's has to go."""
    files = [f for f in ROOT.rglob("*.py") if not {"tests", ".venv"} & {*f.parts}]
    found = {f.relative_to(ROOT).as_posix() for f in files if "expanduser" in f.read_text("utf-8")}
    assert found == {"common/files.py"}


def test_a_flag_without_its_value_is_one_line():
    with pytest.raises(UserError, match=r"^--name: expected one argument$"):
        read_command_line(lambda line: None, ["--name", "-x"])


def test_resume_auto_continues_what_there_is_or_begins(tmp_path, monkeypatch):
    """What a launcher that restarts processes needs: one command for both."""
    monkeypatch.chdir(tmp_path)
    tiny = str(write_config(tmp_path))

    def spec(*flags) -> RunSpec | None:
        return read_command_line(lambda _: None, ["--config", tiny, "--resume", "auto", *flags])

    new = spec("--name", "big")
    assert new is not None and new.is_new and new.resume is None and new.run == Path("runs/big")
    for steps in ("10", "20"):
        run("train.py", "--config", tiny, "--name", "big", "--resume", "auto",
            "--max_steps", steps, "--optimizer.schedule_steps", "40", cwd=tmp_path)  # fmt: skip
    more = ("--max_steps", "40", "--optimizer.schedule_steps", "40")
    going = spec("--name", "big", *more)
    assert going is not None and not going.is_new and going.resume and going.resume.step == 20
    # without a name it is the newest run; a run of another name begins
    newest, other = spec(*more), spec("--name", "other")
    assert newest is not None and newest.resume and newest.resume.step == 20
    assert other is not None and other.is_new
    # weights to start from are for the start alone
    begun = spec("--name", "third", "--init_from", "runs/big")
    assert begun is not None and begun.weights and begun.weights.step == 20
    going = spec("--name", "big", "--init_from", "nowhere", *more)
    assert going is not None and going.weights is None and going.resume
    # a folder of this name is given as a path
    (tmp_path / "auto").mkdir()
    with pytest.raises(UserError, match=r"auto/MANIFEST\.json: no such file"):
        read_command_line(lambda _: None, ["--config", tiny, "--resume", "./auto"])


@pytest.mark.parametrize(
    ("flags", "paths"),
    [
        (["--data.path", "a"], "a"),
        (["--data.path=a"], "a"),
        (["--data.path", "a", "b", "--seed", "3"], ("a", "b")),
        (["--data.path", "a", "--seed", "3", "--data.path=b"], ("a", "b")),
        (["--data.path=a", "b", "--data.path", "c", "d"], ("a", "b", "c", "d")),
    ],
)
def test_data_path_may_be_given_several_times(tmp_path, flags, paths):
    argv = [f"--runs_dir={tmp_path}", "--device", "cpu", *flags]
    spec = read_command_line(lambda line: None, argv)
    assert spec is not None and spec.config.data.path == paths
    shown = hyperparameters(spec.config)["data.path"]  # TensorBoard takes no tuple
    assert shown == (paths if isinstance(paths, str) else ", ".join(paths))


@pytest.mark.parametrize(
    "flag", ["--data.path", "--data.sources.0.path", "--init_from", "--resume", "--verify"]
)
@pytest.mark.parametrize("given", [["{}", ""], ["{}="], ["{}", "a", ""], ["{}=a", "{}", ""]])
def test_an_empty_path_is_none_that_was_left_out(flag, given):
    """A shell's variable that is not set leaves one, and what then happens is not what is meant.

    In TOML it is the default. Other settings can be emptied.
    """
    argv = [word.format(flag) for word in given]
    key = flag[2:] if "." in flag else flag
    with pytest.raises(UserError, match=f'^{re.escape(key)} = "": is empty; give a file or folder'):
        read_command_line(lambda line: None, argv)
    assert refuse_empty(["--data.path", "a", "--data.val_path", "", "--data.separator="]) is None


def test_a_separator_is_refused_with_a_kind_that_ignores_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    separated = ["--data.separator", "|"]
    mixture = tmp_path / "mixture.toml"
    mixture.write_text('[[data.sources]]\nsource = "names"\nweight = 1.0\n' * 2)
    for key, flags in {
        "data": ["--data.kind", "stream", *separated],
        "data.sources.0": ["--data.sources.0.kind", "lines", "--data.sources.0.separator", "|"],
    }.items():
        argv = flags if key == "data" else [f"--config={mixture}", *flags]
        wrong = rf"^{key}\.separator = '\|': stands between documents, but the kind "
        with pytest.raises(UserError, match=wrong):
            read_command_line(lambda line: None, argv)
    for kind in ("auto", "documents"):
        argv = ["--data.path", str(TEXT), "--data.kind", kind, *separated]
        spec = read_command_line(lambda line: None, argv)
        assert spec is not None and spec.config.data.separator == "|"
