"""training/tensorboard_files.py: TensorBoard's files against metrics.jsonl."""

import json
import os
import resource
import signal

import pytest
from torch.utils.tensorboard import summary

from common.errors import UserError
from common.files import AppendFile
from tests.helpers import run
from tools.tensorboard_files import main
from training.tensorboard_files import (
    PATTERN,
    EventFile,
    find_difference,
    intact,
    rebuild,
    recorded_points,
    shown_points,
)

RECORDS = [{"step": s, "loss/train": 3.0 / s, "lr": 1e-3} for s in range(1, 9)]
RECORDS.append({"step": 8, "loss/val": 0.5})


@pytest.fixture
def folder(tmp_path):
    """The TensorBoard files of a run that was resumed at step 5, with texts beside the curves."""
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    folder = tmp_path / "tensorboard"
    for first, last, purge in ((1, 6, None), (5, 8, 5)):
        board = EventFile(folder, purge)
        board.add(summary.text("note", f"from {first}"), first)
        for record in RECORDS:
            if first <= record["step"] <= last:
                for tag in record.keys() - {"step"}:
                    board.add_scalar(tag, record[tag], record["step"])
        board.close()
    return folder


def texts(folder):
    """The texts that can be read from the files."""
    return [
        value.tensor.string_val[0].decode()
        for path in sorted(folder.glob(PATTERN))
        for event in intact(path)
        for value in event.summary.value
        if value.tag.startswith("note")
    ]


def test_what_is_shown_is_what_is_recorded(folder):
    assert shown_points(folder).keys() == recorded_points(RECORDS).keys()
    assert find_difference(folder, RECORDS) == ""
    assert "loss/train of step 8 is None" not in find_difference(folder, RECORDS[:3], before=4)
    more = [*RECORDS, {"step": 9, "lr": 1e-3}]
    assert "lr of step 9 is None, but metrics.jsonl has 0.001" in find_difference(folder, more)
    assert find_difference(folder, more, before=9) == ""


@pytest.mark.parametrize("place", range(0, 1000, 97))
def test_a_damaged_file_is_noticed_and_rebuilt(folder, place):
    path = sorted(folder.glob(PATTERN))[place % 2]
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 4
    path.write_bytes(content)
    before = texts(folder)
    if not find_difference(folder, RECORDS):
        return  # in what purge_step hides, or in a text
    aside = rebuild(folder, RECORDS)
    assert find_difference(folder, RECORDS) == ""
    assert texts(folder) == before
    assert bytes(content) in [p.read_bytes() for p in aside]
    assert len(list(folder.glob(PATTERN))) == 1


def test_the_command(folder, monkeypatch, capsys):
    def command(*arguments):
        monkeypatch.setattr("sys.argv", ["curves", *map(str, arguments)])
        return main()

    assert command("check", folder.parent) == 0
    sorted(folder.glob(PATTERN))[0].unlink()
    assert command("check", folder.parent) == 1
    assert "metrics.jsonl has" in capsys.readouterr().out
    assert command("rebuild", folder.parent) == 0
    assert "rebuilt with all 17 points" in capsys.readouterr().out
    assert command("check", folder.parent) == 0
    with pytest.raises(UserError, match=r"metrics\.jsonl: no such file"):
        command("check", folder)


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on the size of files")
def test_records_wait_while_there_is_no_room_and_none_is_cut(tmp_path):
    log = AppendFile(tmp_path / "log")
    log.write(b"one\n")
    log.flush()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, before[1]))
    try:
        for record in (b"two\n", b"three\n"):
            log.write(record)
            with pytest.raises(OSError, match="log"):
                log.flush()
            assert log.path.read_bytes() == b"one\n"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.write(b"four\n")
    log.close()
    assert log.path.read_bytes() == b"one\ntwo\nthree\nfour\n"


def test_a_resume_rebuilds_a_damaged_file(tmp_path):
    from tests.helpers import metrics, write_config

    write_config(tmp_path)
    flags = ["--config", "tiny.toml", "--name", "r"]
    assert run("train.py", *flags, "--max_steps", 20, cwd=tmp_path).returncode == 0
    folder = tmp_path / "runs" / "r" / "tensorboard"
    (path,) = folder.glob(PATTERN)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    more = ["--resume", "--name", "r", "--extend", "--max_steps", 24]
    result = run("train.py", *more, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "rebuilt from metrics.jsonl" in result.stdout
    assert find_difference(folder, metrics(tmp_path / "runs" / "r")) == ""
