"""common/cli.py: a wrong flag, and what the machine is to be blamed for, are one line."""

import io
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from common.cli import Parser, explain_error, is_out_of_memory, parse, quoted
from common.errors import UserError, refuse
from common.files import user_path
from tests.helpers import ROOT

ALLOCATOR = (
    "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.11 GiB of "
    "which 1.13 GiB is free. Including non-PyTorch memory, this process has 77.97 GiB memory in "
    "use. Of the allocated memory 76.12 GiB is allocated by PyTorch, and 1.20 GiB is reserved by "
    "PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for "
    "Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
)
FULL = [
    ALLOCATOR,
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported\nat some other",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_INITIALIZED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDA error: CUSPARSE_STATUS_ALLOC_FAILED when calling `cusparseCreate(handle)`",
    "CUDA error: CUSPARSE_STATUS_INSUFFICIENT_RESOURCES when calling `cusparseSpMM(...)`",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "CUDA driver error: out of memory",
    "CUDA_ERROR_OUT_OF_MEMORY",
    'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "/pytorch/c10/cuda/CUDACachingAllocator.cpp":1016',
    "MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 1.2 MB)",
    '[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can\'t allocate memory',
    "std::bad_alloc",
    "could not create a primitive",
]  # fmt: skip


@pytest.mark.parametrize("said", FULL)
def test_a_full_memory_is_one_line_with_advice_for_the_program(said):
    error = RuntimeError(said)
    assert is_out_of_memory(error)
    training, writing, other = (
        explain_error(error, program) for program in ("train.py", "generate.py", "compare.py")
    )
    for line in (training, writing, other):
        assert line.startswith("out of memory (")
        assert "\n" not in line and len(line) < 400
    for word in ("batch_size", "accumulation_steps", "checkpoint_activations", "tools.preflight"):
        assert word in training
        assert word not in writing + other
    assert "--num_samples" in writing and "--max_new_tokens" in writing


def test_how_much_was_wanted_is_said_and_not_what_an_allocator_advises():
    line = explain_error(RuntimeError(ALLOCATOR), "train.py")
    assert "Tried to allocate 20.00 GiB" in line
    assert "1.13 GiB is free)" in line
    for word in ("expandable_segments", "Including", "Process"):
        assert word not in line


def test_what_else_the_machine_fails_in():
    said = (
        "CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors"
    )
    line = explain_error(RuntimeError(said), "train.py")
    assert line.startswith(said.splitlines()[0] + "; ") and "install" in line
    busy = "CUDA error: all CUDA-capable devices are busy or unavailable\nSearch for"
    assert "another process" in explain_error(RuntimeError(busy))
    for bug in ("CUDA error: device-side assert triggered", "CUBLAS_STATUS_EXECUTION_FAILED"):
        assert explain_error(RuntimeError(bug)) == ""
    assert explain_error(ValueError("out of memory")) == ""


# Flags --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """Settings with a table of their own."""

    tied: bool = False


@dataclass(frozen=True)
class Item:
    """One of several tables."""

    weight: float = 1.0

    def __post_init__(self):
        refuse([] if self.weight > 0 else [f"weight = {self.weight} must be above 0"])


@dataclass(frozen=True)
class Flags:
    """Flags of every type."""

    config: str = ""
    resume: str = ""
    steps: int = 3
    rate: float = 0.1
    kind: Literal["auto", "a kind with a long name", "another kind with a long name"] = "auto"
    fast: bool = False
    part: Part = field(default_factory=Part)
    items: tuple[Item, ...] = (Item(),)


WRONG = {
    ("--steps=1e1",): "--steps: must be a whole number, found '1e1'; see --steps INT",
    ("--steps", "1,000"): "--steps: must be a whole number, found '1,000'; see --steps INT",
    ("--rate", "1,5"): "--rate: must be a number, found '1,5'; see --rate FLOAT",
    ("--fast", "False"): "--fast: takes no value, found 'False'; give --fast, or --no-fast for no",
    ("--fast=1",): "--fast: takes no value, found '1'; give --fast, or --no-fast for no",
    ("--part.tied", "no", "--steps", "3"): "--part.tied: takes no value, found 'no'; "
    "give --part.tied, or --part.no-tied for no",
    ("my.toml",): "my.toml: belongs to no flag; give --config my.toml",
    ("--steps", "4", "a b.toml"): "a b.toml: belongs to no flag; give --config 'a b.toml'",
    ("tests",): "tests: belongs to no flag; give --resume tests",
    ("nothing",): "Unrecognized options: nothing; see --help",
    ("9" * 999,): f"Unrecognized options: {'9' * 999}; see --help",  # no file can have that name
    ("--stepps", "3"): "Unrecognized options: --stepps, 3; see --steps INT",
    ("--fsat", "1"): "Unrecognized options: --fsat, 1; see --fast, --no_fast",
    ("--items.1.weight", "1"): "Unrecognized options: --items.1.weight, 1; "
    "see --items.0.weight FLOAT",
    ("--items.0.weight", "0"): "--items.0.weight = 0.0 must be above 0",
    ("--kind", "b"): "--kind b: must be one of 'auto', 'a kind with a long name', "
    "'another kind with a long name'; see --help",
}


@pytest.mark.parametrize("flags", WRONG)
def test_a_wrong_flag_is_told_in_plain_words_on_any_terminal(flags, monkeypatch):
    monkeypatch.chdir(ROOT)
    said = set()
    for columns, encoding in ("5", "ascii"), ("60", "utf-8"), ("200", "latin-1"):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding))
        with pytest.raises(UserError) as error:
            parse(Flags, "", argv=list(flags))
        said.add(str(error.value).removesuffix("; see --help"))
        assert os.environ["COLUMNS"] == columns
    assert said == {WRONG[flags].removesuffix("; see --help")}


def test_help_ends_on_a_terminal_of_one_column(monkeypatch):
    """Without a floor under the width, tyro never ends, and writes all the while."""
    code = "from common import cli; from tests.common.test_cli import Flags; cli.parse(Flags, '')"
    for columns in ("1", "4", "0", "many"):
        command = [sys.executable, "-c", code, "--help"]
        environment = {**os.environ, "COLUMNS": columns}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=60)
        assert done.returncode == 0 and b"--part.tied" in done.stdout


def test_small_programs_take_a_home_folder_and_say_wrong_numbers_plainly(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    parser = Parser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps", type=int)
    made = parser.add_subparsers().add_parser("sub")
    made.add_argument("run", type=Path)
    assert parser.parse_args(["--json=~/x.json"]).json == Path("/home/me/x.json")
    assert parser.parse_args(["sub", "~/x"]).run == Path("/home/me/x")
    with pytest.raises(UserError, match=r"^--steps: must be a whole number, found '1e1'$"):
        parser.parse_args(["--steps", "1e1"])


@pytest.mark.skipif(os.name == "nt", reason="its shell has other rules")
def test_a_path_in_a_command_is_that_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert quoted("runs/my-run") == "runs/my-run"
    for path in ("sp ace/x", "it's", '"$(x)"', "a\nb", "-x/y", "~", "~/x"):
        (word,) = shlex.split(quoted(Path(path)))
        assert not word.startswith("-") and user_path(word) == Path(path)
