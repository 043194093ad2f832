"""A run of which each process holds a part: within rounding of one whose processes hold it all."""

import errno
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from checkpoint.reader import Checkpoint, list_steps, step_path
from common.errors import UnreadableError, UserError
from common.processes import Processes
from tests.distributed.test_one_curve import BOTH, FILES, curve, home, start  # noqa: F401
from tests.helpers import run
from training.config import Config
from training.setup import check_shard
from training.sharding import Shards, choose_owners, rows_of_each
from training.shared_save import save_together

ROWS = {  # 4 micro-batches a step, dropout everywhere; each has a short last batch in its epochs
    "stream": [],
    "pairs": ["--data.path", "pairs.jsonl", "--model.tie_embeddings", *BOTH],
    "bf16": [
        *("--precision", "bf16", "--train.batch_size", "21", "--train.checkpoint_activations"),
        *("--model.positions", "learned", *BOTH),
    ],
}
ROUNDING = {"stream": 1e-6, "pairs": 1e-6, "bf16": 1e-3}  # relative, of a loss in 12 steps


def flags(name: str, *more: str) -> list[str]:
    shared = ["--config", "tiny.toml", "--max_steps", "12", "--train.accumulation_steps", "4"]
    return [*shared, "--name", name, *more]


@pytest.fixture(scope="module")
def runs(home):  # noqa: F811
    """All rows, replicated and in parts; and one of them stopped, moved and resumed."""
    rows = [flags(row, *more) for row, more in ROWS.items()]
    rows += [flags(f"{row}-parts", "--train.shard", *more) for row, more in ROWS.items()]
    stopped = [*ROWS["pairs"], "--max_steps", "6", "--optimizer.schedule_steps", "12"]
    for name in ("again", "whole"):
        rows.append(flags(name, "--train.shard", *stopped))
    rows.append(["--resume", "runs/again", "--max_steps", "12"])
    rows.append(flags("files", "--train.shard", "--train.checkpoint_shards", *stopped))
    start(home, 2, rows)
    four = [flags(f"{row}-four", "--train.shard", *ROWS[row]) for row in ("pairs", "bf16")]
    # the state of two parts goes on in four, and then as a whole, in one process
    moved = [["--resume", f"runs/{name}", "--max_steps", "9"] for name in ("whole", "files")]
    start(home, 4, [*four, *moved])
    no_shard = ["--max_steps", "12", "--train.no-shard"]
    start(home, 1, [["--resume", f"runs/{name}", *no_shard] for name in ("whole", "files")])
    return home / "runs"


def losses(run_folder) -> np.ndarray:
    return np.array([r["loss/train"] for r in curve(run_folder) if "loss/train" in r])


def last(run_folder) -> Checkpoint:
    return Checkpoint(list_steps(run_folder)[-1])


@pytest.mark.parametrize("row", ROWS)
def test_losses_are_those_of_whole_weights(runs, row):
    others = [name for name in (f"{row}-parts", f"{row}-four") if (runs / name).exists()]
    for name in others:
        assert len(losses(runs / name)) == 12
        np.testing.assert_allclose(losses(runs / name), losses(runs / row), rtol=ROUNDING[row])
        vals = [[r["loss/val"] for r in curve(runs / n) if "loss/val" in r] for n in (name, row)]
        np.testing.assert_allclose(*vals, rtol=ROUNDING[row])


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("file", FILES)
def test_checkpoints_are_the_same_files(runs, row, file):
    whole, parts = (last(runs / name).tensors(file) for name in (row, f"{row}-parts"))
    assert [*whole] == [*parts]
    for name, array in whole.items():
        assert parts[name].shape == array.shape and parts[name].dtype == array.dtype, name
        if row != "bf16":
            np.testing.assert_allclose(parts[name], array, atol=1e-3, err_msg=name)


def test_resumed_on_as_many_processes_to_the_bit(runs):
    np.testing.assert_array_equal(losses(runs / "again"), losses(runs / "pairs-parts"))
    for file in FILES:
        assert last(runs / "again").read(file) == last(runs / "pairs-parts").read(file)


def test_resumed_on_other_numbers_and_whole(runs):
    assert last(runs / "whole").step == 12
    np.testing.assert_allclose(losses(runs / "whole"), losses(runs / "pairs"), rtol=1e-5)


def test_files_of_each_process(runs):
    """They hold the same tensors as whole files, to the bit, and any engine reads them."""
    six, whole = (Checkpoint(step_path(runs / name, 6)) for name in ("files", "whole"))
    assert "model-00002-of-00002.safetensors" in six.verify().manifest["files"]
    nine = Checkpoint(step_path(runs / "files", 9)).manifest["files"]
    assert "optimizer-00004-of-00004.safetensors" in nine
    for file in FILES:
        parts, expected = six.tensors(file), whole.tensors(file)
        assert parts.keys() == expected.keys()
        for name, array in expected.items():
            np.testing.assert_array_equal(parts[name], array)
    np.testing.assert_array_equal(losses(runs / "files"), losses(runs / "whole"))


def test_read_without_torch(runs):
    text = run("generate.py", "--checkpoint", runs / "stream-parts", "--engine", "numpy", cwd=runs)
    assert text.returncode == 0, text.stderr


@pytest.mark.parametrize("rows, processes", [(7, 4), (8, 4), (2, 4), (1, 3), (0, 2)])
def test_rows_are_cut_as_by_torch(rows, processes):
    pieces = torch.arange(rows).chunk(processes)
    sizes = [len(piece) for piece in pieces] + [0] * (processes - len(pieces))
    assert rows_of_each(rows, processes) == sizes


def test_owners_have_equal_work():
    owners = choose_owners([4.0, 1.0, 1.0, 1.0, 1.0, 4.0], 3)
    assert owners == [0, 2, 2, 2, 2, 1]
    assert choose_owners([], 2) == []


def test_fp16_is_refused():
    with pytest.raises(UserError, match=r"^train\.shard: .*; use --precision bf16 or fp32$"):
        check_shard(Config(precision="fp16"), print)


def test_where_a_step_cannot_be_read_the_others_are_told():
    processes, told = Processes(), []
    processes.decide = lambda make, timeout: told.append(make())
    state = SimpleNamespace(shards=True, processes=processes)

    def begin():
        raise UnreadableError(OSError(errno.EIO, "Input/output error"), "step_00000004")

    with pytest.raises(UnreadableError):
        save_together(state, begin)
    assert told == [""]


def test_a_device_too_full_for_a_whole_tensor_ends_all(monkeypatch):
    def full(tensor):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("training.sharding.whole", full)
    shards = Shards.__new__(Shards)
    with pytest.raises(UserError, match=r"^output\.weight: out of memory"):
        shards.gather({"output.weight": torch.zeros(2)})
