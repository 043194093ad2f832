"""common/cli.py: what the machine is to be blamed for is one line, with advice for the program."""

import pytest

from common.cli import explain_error, is_out_of_memory

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
