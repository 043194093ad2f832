"""common/device.py: the device by name, the precision by measurement, the size of a product."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from common import cuda, device
from common.device import (
    PRECISIONS,
    check_precision,
    choose_device,
    datasheet_flops,
    matmul_flops,
    memory_scalars,
    product_size,
)
from common.errors import UserError

CPU = torch.device("cpu")


def refusal(name: str) -> str:
    with pytest.raises(UserError) as error:
        choose_device(name)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["cuda:128", "cuda:255", "cuda:256", "cuda:65536", "cuda:999999"])
def test_an_index_is_not_read_as_a_signed_byte(name):
    """torch.device("cuda:256") is cuda:0, and cuda:128 has the index -128."""
    assert refusal(name).startswith(f"--device {name}: not on this machine")


@pytest.mark.parametrize(
    "name", ["cuda:", "cuda:-1", "cuda:01", "cuda:x", "cuda:1:2", "CUDA", " cpu", "meta", "xla", "",
             "cuda:99999999999", "cuda:\u0661"],
)  # fmt: skip
def test_what_is_no_device(name):
    assert refusal(name) == (f"--device {name}: no such device; use auto, cpu, cuda, cuda:1 or mps")


def test_a_machine_has_one_cpu():
    assert choose_device("cpu") == CPU
    assert choose_device("cpu:0").type == "cpu"
    assert refusal("cpu:1") == "--device cpu:1: not on this machine; use --device cpu"


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="this torch has CUDA")
def test_a_torch_without_cuda_says_so():
    for name in ("cuda", "cuda:0", "cuda:3"):
        line = refusal(name)
        assert f"--device {name}: not on this machine (this PyTorch was built without CUDA)" in line
        assert "or use --device cpu" in line


@pytest.fixture
def two_cards(monkeypatch):
    """Answers of a machine with two cards, in place of torch's; what became current is returned."""
    current = []
    names = ["NVIDIA H200", "Tesla V100-SXM2-16GB"]
    answers = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_name": names.__getitem__,
        "get_device_capability": [(9, 0), (7, 0)].__getitem__,
        "get_arch_list": lambda: ["sm_75", "sm_90"],
        "set_device": current.append,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    cuda.probe.cache_clear()
    yield current
    cuda.probe.cache_clear()


def test_a_card_that_is_named_becomes_the_current_one(two_cards):
    assert choose_device("cuda:0") == torch.device("cuda:0")
    assert two_cards == [0]
    assert choose_device("cuda") == choose_device("auto") == torch.device("cuda")
    assert two_cards == [0]


def test_a_card_that_is_not_there_or_too_old_is_named(two_cards):
    has = "this machine has 2: cuda:0 NVIDIA H200, cuda:1 Tesla V100-SXM2-16GB"
    for index in (2, 128, 256):
        assert refusal(f"cuda:{index}") == (
            f"--device cuda:{index}: not on this machine ({has}); use --device cuda:1"
        )
    line = refusal("cuda:1")
    assert "no code for Tesla V100-SXM2-16GB, of compute capability 7.0 (it has 7.5, 9.0)" in line
    assert not two_cards


def test_auto_goes_on_without_a_card_that_cannot_be_used_and_says_so(
    two_cards, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_100"])
    assert choose_device("auto").type != "cuda"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--device auto: no cuda: this PyTorch has no code for NVIDIA H200")


def test_auto_has_nothing_to_say_of_a_machine_without_a_card(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cuda.probe.cache_clear()
    assert choose_device("auto").type != "cuda"
    cuda.probe.cache_clear()
    assert capsys.readouterr().err == ""


def test_a_product_fits_beside_what_is_there():
    assert [product_size(free, 2) for free in (140 * 10**9, 10**9, 2 * 10**8, 10**6)] == [
        8192, 4096, 2048, 1024,
    ]  # fmt: skip
    assert product_size(140 * 10**9, 8) == 8192
    for free in (10**8, 10**9, 10**10):
        for itemsize in (2, 4, 8):
            assert 3 * itemsize * product_size(free, itemsize) ** 2 <= free / 3


def test_a_cpu_has_a_rate_and_no_data_sheet():
    assert matmul_flops(CPU, PRECISIONS["fp32"], 64) > 0
    assert datasheet_flops(CPU, PRECISIONS["bf16"]) == 0
    assert memory_scalars(CPU).keys() == {"memory/megabytes"}


class Products(TorchFunctionMode):
    """Notes the sizes of the matrix products that are computed."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.sizes.append(args[0].shape[0])
        return function(*args, **(kwargs or {}))


def test_a_rate_is_measured_on_products_that_are_short(monkeypatch):
    largest = {}
    for limit in (0.0, 1e9):  # seconds that a product may take
        monkeypatch.setattr(device, "PRODUCT_SECONDS", limit)
        before = torch.get_rng_state()
        with Products() as products:
            assert matmul_flops(CPU, PRECISIONS["fp32"]) > 0
        largest[limit] = max(products.sizes)
        assert torch.equal(before, torch.get_rng_state())  # how many were timed is chance
    assert largest == {0.0: 128, 1e9: 1024}


def test_mps_has_no_float64():
    with pytest.raises(UserError, match="--precision fp64: mps has no float64"):
        check_precision("fp64", torch.device("mps"))
    check_precision("fp64", CPU)
