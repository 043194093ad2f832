"""checkpoint/reader.py and checkpoint/writer.py: complete or absent, and verified when read."""

import contextlib
import json
import os
import random
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from safetensors.numpy import save as to_safetensors

from checkpoint.__main__ import main
from checkpoint.reader import (
    MANIFEST,
    Checkpoint,
    CheckpointError,
    list_steps,
    newest_run,
    place,
    read_best,
    step_path,
)
from checkpoint.writer import newest_complete, prune, save, set_best
from common.errors import UnreadableError, UserError
from common.files import checksummed_json
from data.tokenizers.load import load_tokenizer
from model.config import read_model_config
from training.resume import find_resume
from training.run_folder import check_run_name

WEIGHTS = {"embed.weight": np.arange(12, dtype=np.float32).reshape(3, 4)}
FILES = {
    "model.safetensors": to_safetensors(WEIGHTS),
    "state.json": b'{"step": 3}',
    "config.json": b'{"model": {"d_model": 2, "n_heads": 1, "n_layers": 1, "d_ff": 1}, "data": {}}',
}


def test_what_is_saved_is_read_back(tmp_path):
    path = save(tmp_path, 3, FILES)
    checkpoint = Checkpoint(path).verify()
    assert checkpoint.step == 3
    assert read_model_config(checkpoint).d_model == 2
    np.testing.assert_array_equal(
        checkpoint.tensors("model.safetensors")["embed.weight"], WEIGHTS["embed.weight"]
    )
    their_reader = load_file(path / "model.safetensors")
    np.testing.assert_array_equal(their_reader["embed.weight"], WEIGHTS["embed.weight"])


def test_every_flipped_bit_is_noticed(tmp_path):
    path = save(tmp_path, 3, FILES)
    dice = random.Random(0)
    names = [*FILES, MANIFEST]
    for _ in range(300):
        file = path / dice.choice(names)
        content = bytearray(file.read_bytes())
        at = dice.randrange(len(content))
        content[at] ^= 1 << dice.randrange(8)
        before = file.read_bytes()
        file.write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            Checkpoint(path).verify()
        assert file.name in str(error.value)
        file.write_bytes(before)
    Checkpoint(path).verify()


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_missing_and_truncated_files_are_noticed(tmp_path, name):
    path = save(tmp_path, 3, FILES)
    content = (path / name).read_bytes()
    for cut in (0, 1, len(content) // 2, len(content) - 1):
        (path / name).write_bytes(content[:cut])
        with pytest.raises(CheckpointError, match=name):
            Checkpoint(path).verify()
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        Checkpoint(path).verify()


def test_a_file_of_another_checkpoint_is_noticed(tmp_path):
    a = save(tmp_path, 1, FILES)
    b = save(tmp_path, 2, {**FILES, "state.json": b'{"step": 2}'})
    (b / "state.json").write_bytes((a / "state.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"state\.json"):
        Checkpoint(b).verify()


def test_another_format_version_is_refused(tmp_path):
    path = save(tmp_path, 3, FILES)
    manifest = json.loads((path / MANIFEST).read_bytes())
    manifest["format"] = 99
    del manifest["sha256"]
    (path / MANIFEST).write_bytes(checksummed_json(manifest))
    with pytest.raises(CheckpointError, match="format 99, but this version reads format 1"):
        Checkpoint(path)


@pytest.mark.parametrize("content", [b"[]", b"{", b"{}", b'{"step": "x"}', b"[" * 99999])
def test_wrong_contents_under_right_hashes_are_checkpoint_errors(tmp_path, content):
    path = save(tmp_path, 3, {name: content for name in FILES})
    checkpoint = Checkpoint(path).verify()
    for read in (
        lambda: checkpoint.step,
        lambda: checkpoint.config,
        lambda: read_model_config(checkpoint),
        lambda: checkpoint.tensors("model.safetensors"),
    ):
        with pytest.raises(CheckpointError, match=r"step_00000003"):
            read()


def test_a_manifest_cannot_name_files_elsewhere(tmp_path):
    path = save(tmp_path, 3, FILES)
    (tmp_path / "outside").write_bytes(b"x")
    entry = {"../../outside": {"bytes": 1, "sha256": "0" * 64}}
    (path / MANIFEST).write_bytes(checksummed_json({"format": 1, "files": entry}))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        Checkpoint(path)


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_save_that_fails_leaves_the_older_one(tmp_path, monkeypatch, failing):
    save(tmp_path, 1, FILES)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2, FILES)
    monkeypatch.undo()
    assert [p.name for p in list_steps(tmp_path)] == ["step_00000001"]
    assert list((tmp_path / "checkpoints").iterdir()) == list_steps(tmp_path)
    Checkpoint(list_steps(tmp_path)[0]).verify()


def test_the_protocols_order(tmp_path, monkeypatch):
    """Files are fsynced before the directory, the directory before the rename, the parent last."""
    events = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        real_fsync(descriptor)

    def rename(a, b):
        events.append("rename")
        real_rename(a, b)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc to see what is fsynced")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, 5, FILES)
    assert events == [*FILES, MANIFEST, ".step_00000005", "rename", "checkpoints"]


def test_the_newest_complete_one_is_found_and_others_are_told(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, {**FILES, "state.json": json.dumps({"step": step}).encode()})
    (tmp_path / "checkpoints" / "step_00000003" / "state.json").write_bytes(b"{}")
    said = []
    assert newest_complete(tmp_path, said.append).step == 2
    assert "step_00000003" in said[0]


def test_a_damaged_step_is_moved_aside_before_it_is_written_again(tmp_path):
    path = save(tmp_path, 3, FILES)
    (path / "state.json").write_bytes(b"damaged")
    save(tmp_path, 3, FILES)
    Checkpoint(path).verify()
    aside = tmp_path / "checkpoints" / "damaged_step_00000003_0" / "state.json"
    assert aside.read_bytes() == b"damaged"


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 7):
        save(tmp_path, step, FILES)
        if step == 2:
            set_best(tmp_path, 2, 0.5)
        prune(tmp_path, keep=2)
    assert [int(p.name[5:]) for p in list_steps(tmp_path)] == [2, 5, 6]
    assert read_best(tmp_path) == {"step": 2, "val_loss": 0.5}
    assert Checkpoint.find(tmp_path).path.name == "step_00000002"


def test_find_takes_the_newest_where_the_best_is_damaged(tmp_path):
    save(tmp_path, 1, FILES)
    save(tmp_path, 2, FILES)
    set_best(tmp_path, 1, 0.5)
    (tmp_path / "checkpoints" / "step_00000001" / "model.safetensors").unlink()
    assert Checkpoint.find(tmp_path).path.name == "step_00000002"
    with pytest.raises(CheckpointError, match="no such checkpoint or run"):
        Checkpoint.find(tmp_path / "nowhere")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        Checkpoint.find(tmp_path / "empty")


def test_find_looks_again_where_training_has_published_another_meanwhile(tmp_path):
    save(tmp_path, 1, FILES)
    (step_path(tmp_path, 1) / "model.safetensors").unlink()
    assert Checkpoint.find(tmp_path, lambda _: save(tmp_path, 2, FILES)).path.name[-1] == "2"


def test_newest_run_is_the_one_saved_last(tmp_path):
    assert newest_run(tmp_path) is None
    for name in ("b", "a"):
        save(tmp_path / name, 1, FILES)
    (tmp_path / "unfinished").mkdir()
    assert newest_run(tmp_path).name == "a"


def test_a_path_into_a_run_or_a_step_means_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, step = Path("runs/one"), Path("runs/one/checkpoints/step_00000001")
    save(run, 1, FILES)
    for path in (step, step / "model.safetensors", step / MANIFEST):
        assert Checkpoint.find(path).path == Checkpoint(path).path == place(path) == step
    (run / "metrics.jsonl").write_text("")
    for path in (run, run / "checkpoints", run / "metrics.jsonl"):
        assert Checkpoint.find(path).path == step
    save(Path("checkpoints/two"), 1, FILES)  # a folder of runs may have any name
    Path("other.txt").write_text("")
    for path in ("runs", "checkpoints", "other.txt"):
        with pytest.raises(CheckpointError, match="give the folder of a run or of one of") as error:
            Checkpoint.find(path)
        assert str(error.value).startswith(f"{path}/{MANIFEST}: ")
        newest = {"runs": "runs/one", "checkpoints": "checkpoints/two"}.get(path)
        assert str(error.value).endswith(f", such as {newest}" if newest else "checkpoints")


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "-x", "a b", "ü", "a\n", "a" * 201])
def test_run_names_stay_inside_the_folder_of_runs(name):
    with pytest.raises(UserError, match="--name"):
        check_run_name(name)


def test_reading_imports_neither_torch_nor_pickle_modules_of_it():
    import subprocess
    import sys

    from tests.helpers import ROOT

    code = "import sys, checkpoint.__main__, training.command_line, generation.sampling\n"
    code += "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_flipped_bit_of_best_json_is_never_believed(tmp_path):
    save(tmp_path, 1, FILES)
    set_best(tmp_path, 1, 2.25)
    file = tmp_path / "checkpoints" / "best.json"
    content = file.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        assert read_best(tmp_path) is None, flipped
    file.write_bytes(content)
    assert read_best(tmp_path) == {"step": 1, "val_loss": 2.25}


def test_a_save_whose_directory_could_not_be_synced_is_none(tmp_path, monkeypatch):
    save(tmp_path, 1, FILES)
    synced = []

    def fsync(descriptor):
        synced.append(descriptor)
        if len(synced) == len(FILES) + 3:  # the files, the manifest, the directory, its parent
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="checkpoints"):
        save(tmp_path, 2, FILES)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    save(tmp_path, 2, FILES)
    assert newest_complete(tmp_path).path.name == "step_00000002"


def test_verify_and_list_from_the_command_line(tmp_path, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["checkpoint", *map(str, arguments)])
        return main(), capsys.readouterr().out.splitlines()

    for step in (1, 2, 3):
        save(tmp_path, step, FILES)
    set_best(tmp_path, 2, 0.5)
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "loss/val": 0.5}\n')
    status, lines = command("verify", tmp_path)
    assert status == 0
    assert [line.split()[0] for line in lines] == ["whole"] * 3
    weights = tmp_path / "checkpoints" / "step_00000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "checkpoints" / "step_00000003" / MANIFEST).unlink()
    status, lines = command("verify", tmp_path)
    assert status == 1
    assert [line.split()[0] for line in lines] == ["whole", "damaged", "damaged"]
    assert str(weights) in lines[1]
    status, lines = command("verify", weights.parent)
    assert (status, len(lines)) == (1, 1)
    status, lines = command("list", tmp_path)
    assert status == 0
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "3"]
    assert lines[2].endswith("0.5000  best")
    assert command("list", tmp_path / "checkpoints") == (0, lines)
    for arguments in (("list", weights.parent), ("verify", tmp_path / "nowhere")):
        with pytest.raises(CheckpointError):
            command(*arguments)


# What cannot be read now --------------------------------------------------------------------------


@contextlib.contextmanager
def as_somebody():
    """As the user `nobody` where the tests are run by root, who may read everything."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def runs():
    """A folder that anybody may write, with the run `one` of three steps, the second the best."""
    if os.name == "nt":
        pytest.skip("Windows has other permissions")
    folder = Path(tempfile.mkdtemp())  # pytest's folders are for one user
    folder.chmod(0o777)
    with as_somebody():
        for step in (1, 2, 3):
            save(folder / "one", step, FILES)
        set_best(folder / "one", 2, 0.5)
        yield folder
        for path in folder.rglob("*"):
            path.chmod(0o755)
    shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["", MANIFEST, "state.json"])
def test_a_step_that_cannot_be_read_is_no_damage_and_nothing_is_touched(runs, name, capsys):
    run, step = runs / "one", step_path(runs / "one", 3)
    set_best(run, 3, 0.4)
    before = sorted((run / "checkpoints").rglob("*"))
    (step / name).chmod(0)
    for attempt in (
        lambda: find_resume(runs, None, "", print),
        lambda: find_resume(runs, str(run), "", print),
        lambda: newest_complete(run),
        lambda: Checkpoint.find(run),
        lambda: save(run, 3, FILES),
    ):
        with pytest.raises(UnreadableError, match=r"step_00000003.*: Permission denied; make it"):
            attempt()
    assert "skipped" not in capsys.readouterr().out
    (step / name).chmod(0o755)
    assert sorted((run / "checkpoints").rglob("*")) == before


def test_a_best_json_that_cannot_be_read_is_not_damaged(runs):
    (runs / "one" / "checkpoints" / "best.json").chmod(0)
    with pytest.raises(UnreadableError, match=r"best\.json: Permission denied"):
        read_best(runs / "one")


def test_verify_tells_what_is_unread_from_what_is_damaged(runs, monkeypatch, capsys):
    (step_path(runs / "one", 2) / "state.json").chmod(0)
    (step_path(runs / "one", 3) / MANIFEST).chmod(0)
    monkeypatch.setattr("sys.argv", ["checkpoint", "verify", str(runs / "one")])
    assert main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["whole", "unread", "unread"]


@pytest.mark.parametrize("closed", [".", "checkpoints", f"checkpoints/step_00000005/{MANIFEST}"])
def test_a_run_that_cannot_be_read_is_named_and_the_others_are_found(runs, closed):
    for step in (4, 5):
        save(runs / "other", step, FILES)
    (runs / "other" / closed).chmod(0)
    said = []
    assert newest_run(runs, said.append) == runs / "one"
    assert len(said) == 1 and "other" in said[0] and "Permission denied" in said[0]
    assert find_resume(runs, None, "", said.append)[1].step == 3
    (runs / "one").chmod(0)
    with pytest.raises(UnreadableError):
        newest_run(runs, said.append)


def test_no_more_files_may_be_opened(tmp_path):
    resource = pytest.importorskip("resource")
    save(tmp_path, 1, FILES)
    (tmp_path / "tokenizer.json").write_text("{}")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, before[1]))
    try:
        for attempt in (newest_complete, Checkpoint.find, newest_run, load_tokenizer):
            with pytest.raises(UnreadableError, match="Too many open files"):
                attempt(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
