"""common/cuda.py: why a card cannot be used, in one line with the fix, and what it promises."""

import pytest

from common import cuda
from common.cuda import absence, beyond, datasheet_flops, driver_version, too_old

# as torch.cuda.is_available() warns (c10/cuda/CUDAFunctions.cpp)
OLD_DRIVER = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11080). "
    "Please update your GPU driver by downloading and installing a new version from the URL: "
    "http://www.nvidia.com/Download/index.aspx Alternatively, go to: https://pytorch.org to "
    "install a PyTorch version that has been compiled with your version of the CUDA driver. "
    "(Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:119.)"
)
UNKNOWN = (
    "CUDA initialization: CUDA unknown error - this may be due to an incorrectly set up "
    "environment, e.g. changing env variable CUDA_VISIBLE_DEVICES after program start. Setting the "
    "available devices to be zero. (Triggered internally at x.cpp:1.)"
)
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.mark.parametrize(
    ("arguments", "why", "fix", "is_absent"),
    [
        ((False, "", None, ""), "built without CUDA", "install one with CUDA", True),
        ((True, "13.0", None, ""), "none was found", "nvidia-smi", True),
        ((True, "13.0", "", ""), "CUDA_VISIBLE_DEVICES = '' leaves none", "unset it", True),
        ((True, "13.0", "7", ""), "CUDA_VISIBLE_DEVICES = '7' leaves none", "unset it", True),
        ((True, "13.0", "0", OLD_DRIVER), "CUDA 11.8, and this PyTorch has CUDA 13.0",
         "update the driver, install a PyTorch with CUDA 11.8", False),
        ((True, "13.0", None, UNKNOWN), "CUDA initialization: CUDA unknown error", "", False),
    ],
)  # fmt: skip
def test_why_there_is_no_card(arguments, why, fix, is_absent):
    problem = absence(*arguments)
    assert why in problem.why
    assert fix in problem.fix
    assert problem.fix.endswith("or use --device cpu")
    assert problem.is_absent == is_absent
    assert "\n" not in problem.why + problem.fix
    assert len(problem.why) < 200 and "Triggered" not in problem.why


def test_a_card_too_many():
    problem = beyond(["NVIDIA H200"])
    assert problem.why == "this machine has 1: cuda:0 NVIDIA H200"
    assert problem.fix == "use --device cuda:0"
    two = beyond(["NVIDIA H200", "NVIDIA L4"])
    assert two.why == "this machine has 2: cuda:0 NVIDIA H200, cuda:1 NVIDIA L4"


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((9, 0), CU130, True),
        ((8, 9), CU130, True),  # the code of 8.6
        ((7, 0), CU130, False),
        ((12, 1), CU130, True),
        ((13, 0), CU130, True),  # compiled by the driver
        ((13, 0), CU130[:-1], False),
        ((10, 3), ["sm_90a", "sm_100a"], False),
        ((10, 0), ["sm_90a", "sm_100a"], True),
        ((10, 3), ["sm_100f"], True),
        ((6, 1), [], True),  # not known
    ],
)
def test_a_card_too_old_for_this_torch(capability, architectures, runs):
    problem = too_old("NVIDIA Thing", capability, architectures)
    assert (problem.why == "") == runs
    if not runs:
        assert f"NVIDIA Thing, of compute capability {capability[0]}.{capability[1]}" in problem.why
        assert problem.fix.startswith("install a PyTorch")
        assert not problem.is_absent


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", 0),
        ("NVIDIA H200 MIG 1g.18gb", 0),
        ("NVIDIA H20", 0),
        ("NVIDIA GH200 480GB", 0),
        ("Tesla T4", 0),
    ],
)
def test_the_data_sheet(name, flops):
    assert datasheet_flops(name, "bf16") == datasheet_flops(name, "fp16") == flops
    assert datasheet_flops(name, "fp32") == datasheet_flops(name, "fp64") == 0


def test_a_machine_without_nvml_has_no_driver(monkeypatch):
    driver_version.cache_clear()
    monkeypatch.setattr(cuda.sys, "platform", "win32")  # whose library no other system has
    assert driver_version() == ""
    driver_version.cache_clear()
