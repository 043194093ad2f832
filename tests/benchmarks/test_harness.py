"""The benchmarks' harness and report; the benchmarks themselves on a tiny model."""

import json
import subprocess
import sys

import pytest
import torch

from benchmarks import report
from benchmarks.cost import fit
from benchmarks.harness import Result, cell, folder_of, machine, text_of
from benchmarks.peers import MODELS, make
from tests.helpers import ROOT


def test_throughput_on_a_tiny_model(tmp_path):
    """The command whole, as it measures on a GPU too: two sides, each in its own process."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.train_throughput", "--models", "tiny"]
    command += ["--rounds", "1", "--seconds", "0.01", "--peers", "--device", "cpu", "--json", out]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    result = json.loads(out.read_text())
    (table,) = result["tables"]
    assert [row[0] for row in table["rows"]] == ["**Triptych, bf16**", "**Triptych, fp32**"]
    assert all(row[1] > 0 for row in table["rows"])
    assert "--json PATH" in result["command"] and str(tmp_path) not in json.dumps(result)


@pytest.mark.parametrize("side", ["fp32", "bf16", "gpt2-fp32", "encoder-bf16"])
def test_every_side_trains_the_model_it_is_given(side):
    """From near ln(65), the loss on one batch falls; so what is timed is training."""
    shape, rows, length = MODELS["tiny"]
    device = torch.device("cpu")
    step = make(side, shape, length, device)
    ids, targets = torch.randint(0, shape.vocab_size, (2, rows, length))
    losses = [step(ids, targets) for _ in range(30)]
    assert abs(losses[0] - 4.17) < 0.5
    assert losses[-1] < losses[0] - 0.3


def test_accumulation_and_recomputing_train_the_same():
    shape, rows, length = MODELS["tiny"]
    ids, targets = torch.randint(0, shape.vocab_size, (2, rows, length))
    found = []
    for how in ({}, {"recompute": True}, {"accumulation": 2}):
        step = make("fp32", shape, length, torch.device("cpu"), **how)
        found.append([step(ids, targets) for _ in range(5)])
    assert found[0] == found[1]
    assert found[2] == pytest.approx(found[0], abs=1e-4)


def test_the_fit_finds_what_the_points_were_made_of():
    sizes = [(n, k) for n in (1e5, 1e6, 1e7) for k in (1e3, 1e5)]
    points = [{"multiplied": n, "keys": k, "us": 3 + 2e-6 * n + 1e-5 * k} for n, k in sizes]
    assert fit(points) == pytest.approx([3, 2e-6, 1e-5])
    below = [{**p, "us": 2e-6 * p["multiplied"] - 1e-7 * p["keys"]} for p in points[2:]]
    assert (fit(below) >= 0).all()  # a cost below zero is none


def test_a_claim_says_whether_it_is_met():
    result = Result("x", "X")
    result.claim("speed", 1.9, 2.0)
    result.claim("memory", 1.9, 2.0, at_most=True)
    result.table("t", ["a"], [[1234.5]], "a note")
    assert [c["met"] for c in result.claims] == [False, True]
    text = text_of(vars(result))
    assert "| speed: at least 2 x | 1.9 x | **missed** |" in text
    assert "| memory: at most 2 x | 1.9 x | met |" in text
    assert "| 1,234 |" in text and "a note" in text


@pytest.mark.parametrize(
    ("value", "shown"), [("as it is", "as it is"), (0.01234, "0.0123"), (7, "7"), (1e4, "10,000")]
)
def test_cells(value, shown):
    assert cell(value) == shown


def test_the_document_is_what_the_results_give():
    found = report.results()
    assert found
    assert report.DOCUMENT.read_text(encoding="utf-8") == report.document(found)
    for result in found:
        for number, _ in enumerate(result["plots"]):
            assert (report.DOCUMENT.parent / report.plot_file(result, number)).is_file()


def test_a_result_says_whose_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("benchmarks.harness.RESULTS", tmp_path)
    result = Result("x", "X")
    result.claim("speed", 2.0, 1.0)
    result.finish()
    (file,) = tmp_path.glob("*/x.json")
    found = json.loads(file.read_text())["machine"]
    assert file.parent.name == folder_of(found) == folder_of(machine())
    assert {"processor", "instructions", "cores", "torch", "commit"} <= found.keys()
    assert str(tmp_path) not in file.read_text()


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({"processor": "AMD EPYC", "instructions": "AVX512-BF16", "cores": 2},
         "amd-epyc-avx512-bf16-2-cores"),
        ({"processor": "AMD EPYC", "family and model": "25 17", "cores": 2},
         "amd-epyc-25-17-2-cores"),
        ({"processor": "Intel(R) Xeon(R) @ 2.1GHz", "instructions": "AMX", "cores": 1},
         "intel-r-xeon-r-2-1ghz-amx-1-core"),
        ({"processor": "AMD EPYC", "cores": 16, "accelerator": "NVIDIA H200"}, "nvidia-h200"),
    ],
)  # fmt: skip
def test_a_machine_has_a_folder(found, name):
    assert folder_of(found) == name


def test_the_bars_have_a_column_for_each_machine():
    machines = [
        {"processor": "A", "instructions": "AVX2", "cores": 2},
        {"processor": "B", "cores": 16, "accelerator": "NVIDIA H200"},
    ]
    found = []
    for folder, on, measured in zip("ab", machines, (1.5, 0.5), strict=True):
        result = Result("x", "X", machine=on)
        result.claim("speed", measured, 1.0)
        found.append({**vars(result), "folder": folder})
    found[1]["claims"] += [{**found[1]["claims"][0], "claim": "of b alone"}]
    lines = report.bars(found).splitlines()
    assert "| bar |  | A, AVX2, 2 cores | NVIDIA H200 |" in lines
    assert "| speed | at least 1 x | 1.5 x | 0.5 x (missed) |" in lines
    assert "| of b alone | at least 1 x |  | 0.5 x (missed) |" in lines
