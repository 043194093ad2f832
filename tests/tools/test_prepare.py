"""tools/prepare.py: two processes that prepare one corpus, and the command line."""

import json
import os
import signal
import subprocess
import sys

import pytest

from common.errors import UserError
from data.config import DataConfig
from data.dataset import open_dataset, prepare
from tests.helpers import ROOT
from tools import prepare as tool


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": f"The text of number {i}. " * (1 + i % 4)} for i in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    return tool.main()


def test_two_processes_prepare_one_corpus(corpus, tmp_path):
    """Part 2 is there first, and waits for the tokenizer that part 1 trains."""
    flags = ["--data.path", corpus, "--data.vocab_size", "320", "--to", tmp_path / "to"]
    command = [sys.executable, "-m", "tools.prepare", *map(str, flags), "--part"]

    def start(part: str) -> subprocess.Popen:
        return subprocess.Popen(
            [*command, part], cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip

    second = start("2/2")
    assert any("waiting for" in line for line in second.stdout)
    first = start("1/2")
    said = "".join(process.communicate(timeout=100)[0] for process in (second, first))
    assert [second.returncode, first.returncode] == [0, 0]
    assert "to train on it" in said
    found = open_dataset(tmp_path / "to")
    config = DataConfig(path=str(corpus), vocab_size=320, cache_dir=str(tmp_path / "cache"))
    whole = prepare(config, lambda _: None)
    assert found.fingerprint == whole.fingerprint
    assert found.train.ids[:].tolist() == whole.train.ids.tolist()
    assert found.val.ids[:].tolist() == whole.val.ids.tolist()


def test_ctrl_c_says_that_it_can_be_continued(corpus, tmp_path):
    flags = ["--data.path", corpus, "--to", tmp_path / "to", "--part", "2/2"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tools.prepare", *map(str, flags)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert any("waiting for" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "stopped; the same command continues\n"
    assert process.returncode == 130


def test_what_it_has_made_is_what_train_finds(corpus, tmp_path, monkeypatch, capsys):
    flags = ["--data.path", corpus, "--data.cache_dir", tmp_path / "c", "--data.tokenizer", "char"]
    assert call(monkeypatch, *flags, "--jobs", 2) == 0
    assert "data: corpus (documents), train: " in capsys.readouterr().out
    said = []
    config = DataConfig(path=str(corpus), tokenizer="char", cache_dir=str(tmp_path / "c"))
    prepare(config, said.append)
    assert not any("tokens" in line for line in said)
    assert call(monkeypatch, *flags, "--to", tmp_path / "to") == 0
    assert call(monkeypatch, "--merge", tmp_path / "to") == 0
    assert call(monkeypatch, "--verify", tmp_path / "to") == 0
    assert "every hash is right" in capsys.readouterr().out
    (tmp_path / "to" / "1-of-1" / "manifest.json").unlink()
    assert call(monkeypatch, "--merge", tmp_path / "to") == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--part", "3/2", "--to", "x"], "--part 3/2: must be i/n"),
        (["--part", "x", "--to", "x"], "--part x: must be i/n"),
        (["--part", "1/2"], "--part 1/2: needs a folder"),
        (["--verify", "x", "--merge", "y"], "--verify, --merge: one at a time"),
        (["--jobs", "-1"], "--jobs -1 must be at least 0"),
        (["--merge", "nowhere"], "--merge nowhere: must have folders"),
        (["--verify", "nowhere"], "nowhere: no such folder; give one"),
        (["--data.pth", "x"], "see --data.path"),
    ],
)
def test_wrong_flags_are_refused(flags, said, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        call(monkeypatch, *flags)
    assert said in str(error.value)
