"""The examples of docs/exchange.md, run as they stand there, where their packages are installed."""

import re
import runpy
from dataclasses import replace

import pytest

from data.tokenizers.train_sentencepiece import train_sentencepiece
from tests.exchange.helpers import PRE, exchanged, save_run
from tests.helpers import ROOT

PAGE = (ROOT / "docs" / "exchange.md").read_text("utf-8")
EXAMPLES = dict(re.findall(r"### (\S+)\n.*?```python\n(.*?)```", PAGE, re.S))
NEEDS = {
    "transformers": [],
    "PyTorch": [],
    "NumPy": [],
    "llama.cpp": ["gguf", "llama_cpp"],
    "onnxruntime": ["onnxscript", "onnxruntime"],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the run that the page exports."""
    home = tmp_path_factory.mktemp("home")
    text = (ROOT / "docs" / "training.md").read_text("utf-8")
    tokenizer = train_sentencepiece([text], "bpe", 400)
    shape = replace(PRE, d_model=32, n_layers=1, max_len=128)
    save_run(home / "runs" / "my-run", shape, "pairs", tokenizer)
    return home


def test_each_program_has_an_example():
    assert EXAMPLES.keys() == NEEDS.keys()


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs(name, home, monkeypatch, capsys):
    for package in NEEDS[name]:
        pytest.importorskip(package)
    monkeypatch.chdir(home)
    exports = re.findall(r"python -m exchange (export \S+ (elsewhere/\S+).*?) *#", PAGE)
    assert len(exports) == 3
    for command, folder in exports:
        if folder in EXAMPLES[name]:
            assert exchanged(monkeypatch, *command.split()) == 0
    (home / "example.py").write_text(EXAMPLES[name])
    capsys.readouterr()
    runpy.run_path(str(home / "example.py"))
    assert capsys.readouterr().out.strip()
