"""checkpoint/shards.py: tensors in several files are read as those in one, by everything."""

import json
import sys
from itertools import chain

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors
from transformers.trainer_utils import load_sharded_checkpoint

import generate
from checkpoint.__main__ import main as verify
from checkpoint.reader import MANIFEST, Checkpoint, CheckpointError, list_steps, step_path
from checkpoint.shards import INDEX, deal_out, index_json, shard_names
from checkpoint.writer import begin, finish, is_saved, prune, save, set_best, write_files
from common import cli
from model.engines import decoder_class
from model.transformer_full import TransformerDecoder
from tests.faults.fuzz_checkpoints import checkpoint_files
from tests.helpers import in_shards, write_config
from training.command_line import read_command_line
from training.optimizer import state_tensors
from training.setup import build

MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
MOMENTS = {f"exp_avg/{i}": np.full((i, 3), i, np.float32) for i in range(5)}
MOMENTS |= {"step/0": np.array(7.0, np.float32), "half": np.ones((3, 1), np.float16)}
FILES = checkpoint_files() | {OPTIMIZER: to_safetensors(MOMENTS)}


def publish(run, step: int, count: int, files=FILES):
    """A checkpoint that `count` processes have written."""
    hidden = begin(step_path(run, step))
    entries = {}
    for share in in_shards(files, count):
        entries |= write_files(hidden, share)
    return finish(hidden, entries)


@pytest.mark.parametrize("files", [1, 2, 3, 7, 40])
def test_tensors_are_dealt_out_evenly_and_always_the_same_way(files):
    dice = np.random.default_rng(files)
    sizes = {f"{i}": int(size) for i, size in enumerate(dice.integers(0, 1000, 30))}
    sizes["large"] = 5000
    dealt = deal_out(sizes, files)
    assert len(dealt) == files and sorted(chain(*dealt)) == sorted(sizes)
    assert [bool(names) for names in dealt] == [i < len(sizes) for i in range(files)]
    loads = [sum(sizes[name] for name in names) for names in dealt]
    best = max(5000, -(-sum(sizes.values()) // files))  # no way has a smaller largest file
    assert max(loads) <= 4 / 3 * best
    order = list(sizes)
    assert all(names == sorted(names, key=order.index) for names in dealt)
    turned = deal_out(dict(reversed(sizes.items())), files)
    assert [set(names) for names in turned] == [set(names) for names in dealt]


@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_what_is_saved_in_shards_is_read_as_from_one_file(tmp_path, count):
    whole, parts = Checkpoint(save(tmp_path, 1, FILES)), Checkpoint(publish(tmp_path, 2, count))
    assert MODEL not in parts.verify().manifest["files"]
    for name in (MODEL, OPTIMIZER):
        arrays, expected = parts.tensors(name), whole.tensors(name)
        assert arrays.keys() == expected.keys()
        for key, array in arrays.items():
            np.testing.assert_array_equal(array, expected[key], strict=True)
        assert parts.lists(name) == whole.lists(name)
        shards = parts.tensors_by_file(name)
        assert len(shards) == min(count, len(expected)) == len(list(parts.parts(name)))
        index = parts.json(name + INDEX)
        assert index["metadata"] == {"total_size": sum(a.nbytes for a in expected.values())}
        for file, tensors in shards.items():  # their reader
            assert load_file(parts.path / file).keys() == tensors
            assert {index["weight_map"][tensor] for tensor in tensors} == {file}
    assert list_steps(tmp_path) == [whole.path, parts.path]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_no_tensors_are_an_index_alone(tmp_path):
    empty = Checkpoint(publish(tmp_path, 1, 3, FILES | {OPTIMIZER: to_safetensors({})}))
    assert empty.tensors(OPTIMIZER) == empty.lists(OPTIMIZER) == {}
    assert empty.files_of(OPTIMIZER) == [OPTIMIZER + INDEX]


def test_transformers_finds_the_shards(tmp_path):
    path = publish(tmp_path, 1, 3)
    model = torch.nn.Module()
    for name, array in Checkpoint(path).tensors(MODEL).items():
        *modules, last = name.split(".")
        inner = model
        for module in modules:
            if not hasattr(inner, module):
                inner.add_module(module, torch.nn.Module())
            inner = getattr(inner, module)
        inner.register_parameter(last, torch.nn.Parameter(torch.zeros(array.shape)))
    load_sharded_checkpoint(model, str(path))
    for name, array in Checkpoint(path).tensors(MODEL).items():
        np.testing.assert_array_equal(model.get_parameter(name).detach().numpy(), array)


@pytest.mark.parametrize("engine", ["torch", "numpy", "python"])
def test_every_engine_writes_the_same_text(tmp_path, engine, monkeypatch, capsys):
    save(tmp_path / "whole", 3, FILES)
    publish(tmp_path / "parts", 3, 4)
    texts = []
    for name in ("whole", "parts"):
        argv = ["generate.py", "--checkpoint", str(tmp_path / name), "--engine", engine]
        argv += ["--device", "cpu", "--prompt", "ab", "--max_new_tokens", "8", "--seed", "1"]
        monkeypatch.setattr(sys, "argv", argv)
        assert cli.run("generate.py", generate.main) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""
    assert decoder_class(engine).from_checkpoint(tmp_path / "parts").num_parameters() > 0


def test_a_run_goes_on_from_shards(tmp_path, monkeypatch):
    """Every weight and every number of the optimizer's state; by `build`, as train.py does."""
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path)
    flags = ["--config", "tiny.toml", "--name", "new"]
    state = build(read_command_line(print, flags), print)
    for parameter in state.model.parameters():
        parameter.grad = torch.randn(parameter.shape)
    for optimizer in state.optimizers:
        optimizer.step()
    state.progress.step = 5
    files = {
        name: content if isinstance(content, bytes) else b"".join(content)
        for name, content in state.checkpoint_files().items()
    }
    publish(tmp_path / "runs" / "parts", 5, 3, files)
    resumed = build(read_command_line(print, ["--resume", "--name", "parts"]), print)
    assert resumed.progress.step == 5
    for name, parameter in state.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name))
    before, after = (state_tensors(s.model, s.optimizers) for s in (state, resumed))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_damage_is_found_where_it_matters(tmp_path, monkeypatch, capsys):
    for step in (1, 2):
        publish(tmp_path, step, 3)
    newest = step_path(tmp_path, 2)
    for file in (newest / (OPTIMIZER + INDEX), next(newest.glob("optimizer-00002*"))):
        file.write_bytes(b"damaged")
    found = Checkpoint.find(tmp_path)  # which does not read the optimizer's state
    assert found.path == newest
    with pytest.raises(CheckpointError, match=r"optimizer\S+: damaged"):
        found.verify()
    shard = next(newest.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert Checkpoint.find(tmp_path, print).path == step_path(tmp_path, 1)
    assert f"skipped: {shard}: damaged" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["checkpoint", "verify", str(tmp_path)])
    assert verify() == 1
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(words) == ["damaged"] * 3 + ["whole"]


def index_of(dealt: list[list[str]], **more: str) -> dict:
    """An index of FILES' weights, with changes."""
    index = json.loads(index_json(MODEL, dealt, dict.fromkeys(chain(*dealt), 0)))
    index["weight_map"] |= more
    return index


def test_an_index_that_is_not_true_is_one_line(tmp_path):
    shares = in_shards(FILES, 2)
    files = {
        name: content if isinstance(content, bytes) else b"".join(content)
        for share in shares for name, content in share.items()
    }  # fmt: skip
    arrays = Checkpoint(save(tmp_path, 1, FILES)).tensors(MODEL)
    dealt = deal_out({name: array.nbytes for name, array in arrays.items()}, 2)
    first, second = shard_names(MODEL, dealt)
    one = dealt[0][0]
    missing = index_of(dealt)
    del missing["weight_map"][one]
    twice = json.dumps(index_of(dealt)).replace("{", '{"weight_map": {"x": "x"}, ', 1)
    tried = {
        "outside": (index_of(dealt, **{one: "../../outside"}), f"{one!r} in '../../outside'"),
        "absolute": (index_of(dealt, **{one: "/etc/passwd"}), "weight_map: must give the file"),
        "not a shard": (index_of(dealt, **{one: "state.json"}), "weight_map: must give the file"),
        "the other's": (index_of(dealt, x=first.replace("model", OPTIMIZER[:9])), "weight_map"),
        "not there": (index_of(dealt, **{one: first.replace("-0000", "-0009")}), "weight_map"),
        "a list": (index_of(dealt, **{one: [first]}), "weight_map: must give the file"),
        "no map": ({"metadata": {}}, "found not an object"),
        "no object": ([], "must hold a JSON object"),
        "unlisted": (missing, f"{first}: has the tensor {one!r}"),
        "moved": (index_of(dealt, **{one: second}), f"{first}: has the tensor {one!r}"),
        "invented": (index_of(dealt, **{"x\n": second}), rf"{second}: lacks the tensor 'x\n'"),
        "very long": (index_of(dealt, **{"y" * 9999: second}), f"{second}: lacks the tensor 'yyy"),
    }  # fmt: skip
    for step, (index, message) in enumerate(tried.values(), 10):
        content = json.dumps(index).encode()
        checkpoint = Checkpoint(save(tmp_path, step, files | {MODEL + INDEX: content})).verify()
        for read in (checkpoint.tensors, checkpoint.lists):
            with pytest.raises(CheckpointError) as error:
                read(MODEL)
            said = str(error.value)
            assert message in said and said.isprintable() and len(said) < 500, said
            assert said.startswith(str(checkpoint.path))
    repeated = save(tmp_path, 30, files | {MODEL + INDEX: twice.encode()})
    assert Checkpoint(repeated).tensors(MODEL).keys() == arrays.keys()  # JSON: the last one counts
    in_two = to_safetensors({name: arrays[name] for name in [*dealt[1], one]})
    changed = Checkpoint(save(tmp_path, 31, files | {second: in_two}))
    with pytest.raises(CheckpointError, match=f"{second}: has the tensor '{one}'"):
        changed.tensors(MODEL)
    torn = Checkpoint(save(tmp_path, 32, files | {second: b"x"}))
    with pytest.raises(CheckpointError, match=f"{second}: not a safetensors file"):
        torn.tensors(MODEL)
    del files[second]
    with pytest.raises(CheckpointError, match="weight_map: must give the file"):
        Checkpoint(save(tmp_path, 33, files)).tensors(MODEL)


def test_a_model_that_cannot_be_in_its_shards_is_refused_before_memory_is_taken(tmp_path):
    config = json.loads(FILES["config.json"])
    config["model"]["vocab_size"] = 2**24
    publish(tmp_path, 1, 2, FILES | {"config.json": json.dumps(config).encode()})
    with pytest.raises(CheckpointError, match=r"do not fit into the \d+ bytes of model"):
        TransformerDecoder.from_checkpoint(tmp_path)


def test_until_the_manifest_is_written_there_is_no_checkpoint(tmp_path):
    """Each place at which the writing processes may have been killed, and a save after it."""
    publish(tmp_path, 1, 2)
    set_best(tmp_path, 1, 1.0)
    shares = in_shards(FILES, 3)
    for written in range(3):
        hidden = begin(step_path(tmp_path, 2))
        for share in in_shards(FILES, 3)[:written]:
            write_files(hidden, share)
        assert list_steps(tmp_path) == [step_path(tmp_path, 1)]
        assert Checkpoint.find(tmp_path).path == step_path(tmp_path, 1)
        assert not is_saved(step_path(tmp_path, 2))
    hidden = begin(step_path(tmp_path, 2))
    assert list(hidden.iterdir()) == []
    prune(tmp_path, 3)
    assert not hidden.exists()
    hidden = begin(step_path(tmp_path, 2))
    entries = {}
    for share in shares:
        entries |= write_files(hidden, share)
    path = finish(hidden, entries)
    assert is_saved(path) and (path / MANIFEST).exists()


def test_a_tensor_is_asked_for_when_its_turn_comes(tmp_path):
    """So that one at a time need be in memory, and each is written before the next is made."""
    from checkpoint.safetensors_python import in_file_order, pieces

    kinds = {f"t{i}": (np.dtype("f4"), (1 << 18,)) for i in range(4)}
    sizes = []

    def arrays():
        for i in range(4):
            sizes.append((tmp_path / MODEL).stat().st_size)
            yield np.full(1 << 18, i, np.float32)

    entries = write_files(tmp_path, {MODEL: pieces(kinds, arrays())})
    assert all(size >= i << 20 for i, size in enumerate(sizes)) and len(sizes) == 4
    found = load_file(tmp_path / MODEL)
    assert [found[name][0] for name in in_file_order(kinds)] == [0, 1, 2, 3]
    assert entries[MODEL]["bytes"] == (tmp_path / MODEL).stat().st_size
