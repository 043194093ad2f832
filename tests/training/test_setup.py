"""training/setup.py, command_line.py: what is told of the data before anything is trained."""

import json
from dataclasses import replace

import pytest
import torch

from checkpoint.reader import Checkpoint
from common.errors import UserError
from common.processes import Processes
from common.signals import StopRequest
from data.batches import ORDER
from data.dataset import prepare
from data.mixture import MixedBatches, MixedExamples
from data.tokenizers.char import CharTokenizer
from tests.helpers import ROOT, TINY, write_config
from training.command_line import read_command_line
from training.config import Config, check, load
from training.resume import RunSpec, keep_resolved
from training.setup import build, check_same_device, given_tokenizer, open_batches
from training.state import restore_order
from training.visuals import attention_image

MIXTURE = """
[[data.sources]]
path = "a.txt"
weight = 3
[[data.sources]]
path = "b.txt"
name = "other"
weight = 1
"""
PAIR = json.dumps({"prompt": "p", "completion": "c"})


def test_characters_that_a_given_tokenizer_lacks_are_counted(tmp_path):
    config = load(write_config(tmp_path))
    (tmp_path / "val.txt").write_text("\u0436" * 60 + "a" * 40)
    data = replace(config.data, val_path=str(tmp_path / "val.txt"))
    for tokenizer, expected in (
        (CharTokenizer(map(chr, range(10, 127))), "60 of the 100 validation tokens are <unk>"),
        (None, ""),  # one made of both texts knows their characters
    ):
        said = []
        dataset = prepare(data, said.append, tokenizer)
        open_batches(dataset, config, said.append)
        notes = [line for line in said if line.startswith("note: ")]
        assert len(notes) == bool(expected) and expected in "".join(notes)


def test_the_kind_of_a_configuration_is_that_of_its_own_data(tmp_path):
    file, given = write_config(tmp_path), ["--runs_dir", str(tmp_path / "runs")]
    file.write_text(file.read_text().replace("[data]", '[data]\nkind = "lines"'))
    for name, content, flags, expected in (
        ("words.txt", "a\nb", [], "lines"),
        ("pairs.ndjson", PAIR, [], "auto"),
        ("pairs.jsonl.txt", PAIR, [], "auto"),
        ("pairs.jsonl", PAIR, ["--data.kind", "lines"], "lines"),
        ("pairs.jsonl", PAIR, ["--data.kind=stream"], "stream"),
    ):
        (tmp_path / name).write_text(content)
        argv = ["--config", str(file), "--data.path", str(tmp_path / name), *given, *flags]
        spec = read_command_line(lambda line: None, argv)
        assert spec is not None and spec.config.data.kind == expected, name
    spec = read_command_line(lambda line: None, ["--config", str(file), *given])
    assert spec is not None and spec.config.data.kind == "lines"


def test_a_mixture_is_trained_and_validated_by_its_sources(tmp_path):
    text = TINY.replace("path = {path!r}\n", "") + MIXTURE
    for name, count in (("a.txt", 9), ("b.txt", 4)):
        (tmp_path / name).write_text(" ".join(f"{name} has {n}" for n in range(count * 100)))
    file = write_config(tmp_path, text=text)
    flags = ["--config", str(file), "--runs_dir", str(tmp_path / "runs")]
    said = []
    spec = read_command_line(said.append, flags)
    assert spec is not None
    data = [replace(s, path=str(tmp_path / str(s.path))) for s in spec.config.data.sources]
    data = replace(spec.config.data, sources=tuple(data))
    state = build(replace(spec, config=replace(spec.config, data=data)), said.append)
    assert isinstance(state.batches, MixedBatches) and isinstance(state.val, MixedExamples)
    assert [source.kind for source in state.config.data.sources] == ["stream", "stream"]
    assert [len(batch.ids) for batch in state.batches(10**9, 2)] == [4, 4]
    values = state.validate(StopRequest())
    assert values["loss/val/a"] != values["loss/val/other"]
    mean = 0.75 * values["loss/val/a"] + 0.25 * values["loss/val/other"]
    assert values["loss/val"] == pytest.approx(mean, rel=1e-12)
    for split in ("train", "validation"):
        for name in ("a", "other"):
            assert any(line.startswith(f"data: {name} (stream), {split}: ") for line in said)
    assert attention_image(state.model, state.val).ndim == 3
    stored = json.loads(state.config_json())
    assert keep_resolved(check(stored, "config.json"), spec.config).data.sources[0].kind == "stream"


def test_the_order_is_that_with_which_a_run_began():
    checkpoint = Checkpoint(ROOT / "tests/fixtures/version_0_1/run/checkpoints/step_00000004")
    spec = RunSpec(checkpoint.path, Config(), resume=checkpoint)
    assert restore_order(RunSpec(checkpoint.path, Config(), weights=checkpoint)) == ORDER
    assert restore_order(spec) == 1
    for order in (1, ORDER):
        checkpoint.state["order"] = order
        assert restore_order(spec) == order
    for order in (0, ORDER + 1, "2", None):
        checkpoint.state["order"] = order
        with pytest.raises(UserError, match=r"state.json: order: must be from 1 to .* use the ver"):
            restore_order(spec)


@pytest.mark.parametrize("flag", ["--config", "--init_from", "--resume"])
def test_a_url_is_named_as_it_was_given(flag):
    with pytest.raises(UserError, match=f"^{flag} https://a.b/c: a URL is not a file"):
        read_command_line(print, [flag, "https://a.b/c"])


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("nowhere", "no such file"),
        ("https://a.b/c", "a URL is not a file"),
        ("-", "a pipe"),
        ("tokenizer.bin", r"tokenizer.bin: must be a .json, .model or .tiktoken file"),
        ("theirs.json", r"theirs.json: tokenizers .* cannot read it: .*; install a newer one"),
    ],
)
def test_a_tokenizer_that_is_not_there(tmp_path, monkeypatch, path, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tokenizer.bin").write_bytes(b"x")
    (tmp_path / "theirs.json").write_text('{"version": "1.0", "model": {}}')
    flags = ["--config", str(write_config(tmp_path)), "--runs_dir", str(tmp_path)]
    spec = read_command_line(lambda line: None, [*flags, "--data.tokenizer_path", path])
    assert spec is not None
    with pytest.raises(UserError, match=f"^data.tokenizer_path( =|:) .*{expected}"):
        given_tokenizer(spec)


def test_no_process_computes_on_another_kind_of_device(monkeypatch):
    processes = Processes(1, 2, 1)
    monkeypatch.setattr(processes, "decide", lambda make: "cuda")
    check_same_device("auto", torch.device("cuda", 1), processes)
    with pytest.raises(UserError, match="--device auto: cpu here, but cuda for rank 0; "):
        check_same_device("auto", torch.device("cpu"), processes)
