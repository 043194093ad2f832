"""What a person with a CUDA card sees: devices by name, rates, memory, a card that is full."""

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoint.reader import Checkpoint, list_steps
from common.cuda import versions
from common.device import (
    PRECISIONS,
    choose_device,
    datasheet_flops,
    forget_peak,
    matmul_flops,
    memory_scalars,
)
from common.errors import UserError
from model.config import ModelConfig
from tests.helpers import ROOT, TEXT, metrics, refused, run, write_config
from training.precision import Work, choose_precision


def module(*arguments, timeout=300) -> subprocess.CompletedProcess:
    """`python -m` a module of the project."""
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], cwd=ROOT, timeout=timeout,
        env={**os.environ, "PYTHONPATH": "", "COLUMNS": "100"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture
def home(tmp_path):
    """A folder with the tiny configuration, for the card."""
    file = write_config(tmp_path)
    file.write_text(file.read_text().replace('"cpu"', '"cuda"'))
    return tmp_path


# Devices ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [torch.cuda.device_count(), 128, 256, 65536])
def test_a_card_that_is_not_there(index):
    count = torch.cuda.device_count()
    with pytest.raises(UserError) as error:
        choose_device(f"cuda:{index}")
    line = str(error.value)
    assert line.startswith(f"--device cuda:{index}: not on this machine (this machine has {count}")
    assert f"cuda:0 {torch.cuda.get_device_name(0)}" in line
    assert f"use --device cuda:{count - 1}" in line


def test_a_card_that_is_named_becomes_the_current_one():
    last = torch.cuda.device_count() - 1
    before = torch.cuda.current_device()
    try:
        assert choose_device(f"cuda:{last}") == torch.device("cuda", last)
        assert torch.cuda.current_device() == last
        assert torch.empty(1, device="cuda").device.index == last
    finally:
        torch.cuda.set_device(before)


@pytest.mark.parametrize("visible", ["", "99"])
def test_a_card_that_is_hidden(home, visible, monkeypatch):
    monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", visible)
    line = refused(run("train.py", "--config", "tiny.toml", cwd=home))
    assert f"CUDA_VISIBLE_DEVICES = '{visible}' leaves none" in line


def test_auto_is_bf16_on_a_card_that_has_it():
    device = choose_device("auto")
    assert device.type == "cuda"
    shape = ModelConfig(97, 64, 4, 2, 256, 64, 0.0)
    precision, why = choose_precision("auto", shape, Work(8, 64, 1.0), device)
    if torch.cuda.get_device_capability(device)[0] >= 8:
        assert precision.name == "bf16"
    else:
        assert precision.name in ("fp16", "fp32") and "measured" in why


def test_what_is_below_torch_has_its_versions():
    found = versions(torch.device("cuda"))
    assert found["device"] == torch.cuda.get_device_name()
    assert found["cuda"] == torch.version.cuda
    assert int(found["cudnn"]) == torch.backends.cudnn.version()
    assert re.fullmatch(r"\d+\.\d+[\d.]*", found.get("driver", "0.0"))  # where NVML is there


# Rates and memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32"])
def test_the_rate_of_products_is_plausible(name):
    device, precision = torch.device("cuda"), PRECISIONS[name]
    matmul_flops(device, precision, 256)  # cuBLAS takes its workspace, and keeps it
    before = torch.cuda.memory_allocated(device)
    rates = [matmul_flops(device, precision) for _ in range(2)]
    assert torch.cuda.memory_allocated(device) == before
    assert 1e11 < rates[0] < 1e16
    assert 0.8 < rates[0] / rates[1] < 1.25
    if sheet := datasheet_flops(device, precision):
        assert 0.4 < max(rates) / sheet < 1.05
    assert max(rates) > 0.95 * matmul_flops(device, precision, 2048)  # large ones are no slower


def test_peaks_of_memory():
    device = torch.device("cuda")
    forget_peak(device)
    held = torch.cuda.memory_allocated(device) / 1e6
    torch.empty(100_000_000, dtype=torch.uint8, device=device)
    values = memory_scalars(device)
    assert values["memory/megabytes"] == values["memory/allocated_megabytes"]
    assert 100 <= values["memory/allocated_megabytes"] - held < 105
    assert values["memory/reserved_megabytes"] >= values["memory/allocated_megabytes"]
    forget_peak(device)
    assert memory_scalars(device)["memory/allocated_megabytes"] < held + 5


# The programs -------------------------------------------------------------------------------------


def test_a_run_logs_its_card_and_records_its_kernels(home):
    flags = ["--config", "tiny.toml", "--name", "one", "--max_steps", 6, "--precision", "auto"]
    result = run("train.py", *flags, "--train.profile_steps", "3:4", cwd=home, timeout=300)
    assert result.returncode == 0, result.stderr
    folder, card = home / "runs" / "one", torch.cuda.get_device_name()
    assert f"device: {card}" in result.stdout
    last = metrics(folder)[-1] if "loss/train" in metrics(folder)[-1] else metrics(folder)[-2]
    for tag in ("memory/megabytes", "memory/allocated_megabytes", "memory/reserved_megabytes"):
        assert 0 < last[tag] < torch.cuda.mem_get_info()[1] / 1e6
    assert 0 < last["speed/mfu"] < 1
    known = datasheet_flops(torch.device("cuda"), PRECISIONS["bf16"]) > 0
    assert ("speed/mfu_datasheet" in last) == known
    stored = Checkpoint(list_steps(folder)[-1])
    assert stored.state["versions"]["device"] == card
    assert stored.config["precision"] != "auto"  # so that a resume measures nothing
    with gzip.open(folder / "profile" / "steps_3_4.pt.trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = {event.get("name") for event in events}
    assert {"ProfilerStep#3", "ProfilerStep#4", "forward", "backward", "optimizer"} <= names
    assert any(event.get("cat") == "kernel" for event in events)


def test_verify_resume_is_deterministic_and_equal(home):
    result = module("tools.verify_resume", "--steps", 6, "--config", home / "tiny.toml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "on CUDA both runs get --train.deterministic" in result.stdout
    assert "the same bit for bit" in result.stdout


@pytest.fixture
def absurd(home) -> list:
    """Flags of a step whose activations take hundreds of gigabytes, its weights next to none."""
    text = home / "long.txt"
    text.write_text(TEXT.read_text() * (4_000_000 // TEXT.stat().st_size))
    flags = ["--config", home / "tiny.toml", "--data.path", text, "--model.d_ff", 8192]
    flags += ["--train.batch_size", 100_000, "--train.accumulation_steps", 1]
    return [*flags, "--train.eval_examples", 64, "--runs_dir", home / "runs"]


def test_a_full_card_is_one_line(home, absurd):
    line = refused(run("train.py", *absurd, cwd=home, timeout=300))
    assert line.startswith("train.py: out of memory (CUDA out of memory. Tried to allocate")
    assert line.endswith("python -m tools.preflight finds the micro-batch that fits")
    assert len(line) < 400 and "expandable_segments" not in line


def test_preflight_finds_the_micro_batch_that_fits(home, absurd):
    result = module("tools.preflight", *absurd, "--price", 2.5)
    assert result.returncode == 1, result.stdout + result.stderr
    found = re.search(
        r"train\.accumulation_steps = (\d+) fits \(micro-batch of (\d+)\)", result.stdout
    )
    assert found, result.stdout
    assert int(found[1]) > 1 and "does not fit" in result.stdout
    shown = dict(re.findall(r"^  (\w[\w ]{1,19}?) +([\d,.]+) MB", result.stdout, re.M))
    for name in ("weights", "activations", "of an evaluation", "peak memory", "reserved"):
        assert float(shown[name].replace(",", "")) > 0, name
    assert "its cost" in result.stdout
    assert not Path(home / "runs").exists() or not list((home / "runs").iterdir())
