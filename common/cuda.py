"""What is asked of a CUDA machine: why it cannot be used, what it is, what its maker promises.

No torch at import.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import warnings
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

INSTALL = "https://pytorch.org/get-started/locally"

# dense FLOP/s in bf16 and in fp16 of NVIDIA's data sheets, by torch.cuda.get_device_name; patterns
# are of whole names: a MIG slice ("... MIG 1g.10gb") has only a part, and a GH200 is no H200
DATASHEET = {
    r"NVIDIA H100 80GB HBM3|NVIDIA H200": 989e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H100 NVL|NVIDIA H200 NVL": 835e12,
    r"(NVIDIA )?A100-(SXM4|PCIE)-(40|80)GB|NVIDIA A100 80GB PCIe": 312e12,
}


class Problem(NamedTuple):
    """Why a CUDA device cannot be used, and what to do; `why` is "" where it can.

    is_absent: there is none, as on most machines, so that nobody who has not asked wants to know.
    """

    why: str = ""
    fix: str = ""
    is_absent: bool = False


def find_problem(index: int) -> Problem:
    """What keeps the device cuda:`index` from being used. Asks the driver, the first time."""
    import torch

    available, said = probe()
    if not available:
        built, runtime = torch.backends.cuda.is_built(), torch.version.cuda or ""
        return absence(built, runtime, os.environ.get("CUDA_VISIBLE_DEVICES"), said)
    with warnings.catch_warnings():  # torch's own words for a card that is too old, of many lines
        warnings.simplefilter("ignore")
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        if index >= len(names):
            return beyond(names)
        capability = torch.cuda.get_device_capability(index)
    architectures = [] if torch.version.hip else torch.cuda.get_arch_list()
    return too_old(names[index], capability, architectures)


@cache
def probe() -> tuple[bool, str]:
    """Whether there is a CUDA device, and what torch warned of while it looked, which is once."""
    import torch

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    said = [str(warning.message) for warning in told]
    return available, " ".join(text for text in said if text.startswith("CUDA"))  # no deprecations


def absence(built: bool, runtime: str, visible: str | None, said: str) -> Problem:
    """Why torch finds no CUDA device at all.

    built: whether torch has CUDA. runtime: the CUDA that it has. visible: CUDA_VISIBLE_DEVICES.
    said: the warnings of torch.cuda.is_available(), "" without any.
    """
    if not built:
        fix = f"install one with CUDA ({INSTALL}), or use --device cpu"
        return Problem("this PyTorch was built without CUDA", fix, True)
    if old := re.search(r"driver on your system is too old \(found version (\d+)\)", said):
        driver = f"{int(old[1]) // 1000}.{int(old[1]) % 1000 // 10}"
        why = (
            f"the NVIDIA driver is too old: for CUDA {driver}, and this PyTorch has CUDA {runtime}"
        )
        fix = f"update the driver, install a PyTorch with CUDA {driver} ({INSTALL})"
        return Problem(why, f"{fix}, or use --device cpu")
    if visible is not None:  # also of a number that no card has
        why = f"CUDA_VISIBLE_DEVICES = '{visible}' leaves none"
        return Problem(why, "unset it, or use --device cpu", True)
    if said:
        first = re.split(r"(?<=[.!]) |\n| \(Triggered", said)[0].rstrip(".")
        return Problem(first, "see that nvidia-smi shows the card, or use --device cpu")
    why = "none was found: no card, or no NVIDIA driver"
    return Problem(why, "see that nvidia-smi shows the card, or use --device cpu", True)


def beyond(names: list[str]) -> Problem:
    """An index that no card of the machine has. names: those of its cards."""
    cards = ", ".join(f"cuda:{i} {name}" for i, name in enumerate(names))
    last = f"cuda:{len(names) - 1}"
    return Problem(f"this machine has {len(names)}: {cards}", f"use --device {last}")


def too_old(name: str, capability: tuple[int, int], architectures: list[str]) -> Problem:
    """Whether torch has no code for a card. architectures: of torch.cuda.get_arch_list().

    Code for sm_XY runs on X.Z with Z >= Y, with an "a" behind it only on X.Y; compute_XY is
    compiled by the driver for anything from X.Y on (NVIDIA's CUDA C++ Programming Guide, "Binary
    Compatibility" and "PTX Compatibility").
    """
    known = re.findall(r"(sm|compute)_(\d+)(\d)([af]?)", " ".join(architectures))
    for kind, major, minor, suffix in known:
        its = (int(major), int(minor))
        if suffix == "a" and its == capability:
            return Problem()
        if suffix != "a" and its <= capability and (kind == "compute" or its[0] == capability[0]):
            return Problem()
    if not known:
        return Problem()
    own, have = ".".join(map(str, capability)), ", ".join(f"{m}.{n}" for _, m, n, _ in known)
    why = f"this PyTorch has no code for {name}, of compute capability {own} (it has {have})"
    return Problem(why, f"install a PyTorch that has it ({INSTALL}), or use --device cpu")


def datasheet_flops(name: str, precision: str) -> float:
    """FLOP/s that the data sheet of a card has for dense products; 0: not known here."""
    if precision not in ("bf16", "fp16"):
        return 0.0
    return next((f for pattern, f in DATASHEET.items() if re.fullmatch(pattern, name)), 0.0)


def versions(device: torch.device) -> dict[str, str]:
    """The card and the software below torch, for the record; {} for another device."""
    if device.type != "cuda":
        return {}
    import torch

    found = {
        "device": torch.cuda.get_device_name(device),
        "driver": driver_version(),
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or ""),
    }
    return {key: value for key, value in found.items() if value}


@cache
def driver_version() -> str:
    """NVIDIA's driver, such as 580.65.06, as NVML has it; "" where there is no NVML."""
    text = ctypes.create_string_buffer(96)  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE is 80
    with contextlib.suppress(OSError, AttributeError):
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() == 0:
            nvml.nvmlSystemGetDriverVersion(text, len(text))
            nvml.nvmlShutdown()
    return text.value.decode("ascii", "replace")
