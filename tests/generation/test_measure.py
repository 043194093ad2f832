"""generation/measure.py, and what `generate.py --precision auto` makes of it."""

import shutil
import sys

import pytest
import torch

import generate
from common import cli
from generation import compiled_decoder, measure
from model import engines
from model.config import ModelConfig
from model.transformer_full import TransformerDecoder
from tests.test_generate import save_run

SHAPE = ModelConfig(97, 32, 2, 5, 64, 16, 0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_token_is_timed_and_no_random_number_drawn(dtype):
    before = torch.get_rng_state()
    assert measure.seconds_of_a_token(TransformerDecoder, SHAPE, dtype) > 0
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("compiled, calls", [(True, 2), (False, 0)])
def test_the_step_is_timed_that_will_be_taken(monkeypatch, compiled, calls):
    made = []

    class Counted(compiled_decoder.CompiledDecoder):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(compiled_decoder, "CompiledDecoder", Counted)
    assert measure.seconds_of_a_token(TransformerDecoder, SHAPE, "bfloat16", compiled) > 0
    assert len(made) == calls


@pytest.mark.parametrize(("limit", "tokens"), [(0.0, 2), (1e9, 32)])
def test_no_more_tokens_are_read_than_there_is_time_for(monkeypatch, limit, tokens):
    read = []

    class Counted(measure.CPUDecoder):
        def __call__(self, ids, cache):
            read.append(len(ids))
            return super().__call__(ids, cache)

    monkeypatch.setattr(measure, "CPUDecoder", Counted)
    monkeypatch.setattr(measure, "SECONDS", limit)
    assert measure.seconds_of_a_token(TransformerDecoder, SHAPE, "float32") > 0
    assert len(read) == tokens


def test_all_layers_count(monkeypatch):
    monkeypatch.setattr(measure, "step_seconds", lambda _, config, *__: 2.0 + 3.0 * config.n_layers)
    assert measure.seconds_of_a_token(TransformerDecoder, SHAPE, "float32") == 2.0 + 3.0 * 5


@pytest.mark.parametrize(
    ("seconds", "name", "why"),
    [
        ({"float32": 2.0, "bfloat16": 1.0}, "bf16", "measured to be 2.00 times as fast as fp32"),
        ({"float32": 1.0, "bfloat16": 2.0}, "fp32", "bf16 is measured to be 0.50 times as fast"),
    ],
)
def test_the_faster_one_is_taken(monkeypatch, seconds, name, why):
    monkeypatch.setattr(measure, "seconds_of_a_token", lambda _, __, dtype, ___: seconds[dtype])
    assert engines.choose_precision("torch", SHAPE, "cpu", "auto") == (name, f"auto: {why}")


def test_nothing_is_measured_where_there_is_no_choice(monkeypatch):
    monkeypatch.setattr(measure, "seconds_of_a_token", lambda *_: pytest.fail("measured"))
    assert engines.choose_precision("torch", SHAPE, "cpu", "fp64") == ("fp64", "as requested")
    assert engines.choose_precision("numpy", SHAPE, "auto", "auto")[0] == "fp32"
    assert engines.choose_precision("python", SHAPE, "auto", "auto")[0] == "fp64"


@pytest.mark.parametrize("engine", ["torch", "numpy", "python"])
def test_generate_says_what_it_took(tmp_path, monkeypatch, capsys, engine):
    save_run(tmp_path / "run", "lines")
    argv = ["generate.py", "--checkpoint", str(tmp_path / "run"), "--engine", engine]
    monkeypatch.setattr(sys, "argv", [*argv, "--device", "cpu", "--precision", "auto"])
    assert cli.run("generate.py", generate.main) == 0
    out, err = capsys.readouterr()
    assert out.strip() and err.count("precision: ") == 1 and "(auto: " in err
