"""training/muon.py: the batched update beside torch.optim.Muon's own, matrix by matrix."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from common.device import PRECISIONS
from training.config import OptimizerConfig
from training.muon import Muon, orthogonalise
from training.optimizer import create_optimizers

OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
SHAPES = [(16, 16), (48, 16), (16, 48), (16, 16), (7, 5), (48, 16), (1, 9), (5, 7)]


def matrices(dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def batched(parameters, **options):
    return Muon(parameters, **OPTIONS | options)


def set_gradients(parameters, seed, missing=()):
    torch.manual_seed(seed)
    for i, p in enumerate(parameters):
        p.grad = torch.randn_like(p)
        if i in missing:
            p.grad = None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("tensor_lr", [True, False])
def test_it_is_torch_optim_muon(dtype, nesterov, tensor_lr):
    plain, ours = matrices(dtype), matrices(dtype)
    sides = [
        torch.optim.Muon(plain, **OPTIONS, nesterov=nesterov),
        batched(ours, nesterov=nesterov),
    ]
    if tensor_lr:
        sides[1].param_groups[0]["lr"] = torch.tensor(0.02, dtype=torch.float64)
    for number in range(5):
        for parameters, optimizer in zip((plain, ours), sides, strict=True):
            set_gradients(parameters, number, missing=(2,) if number == 0 else ())
            optimizer.step()
    for a, b in zip(plain, ours, strict=True):
        # both orthogonalise in bfloat16, whose products a batch may round in another order
        assert (a - b).norm() < 2e-3 * a.norm(), a.shape
        old, new = (o.state[p]["momentum_buffer"] for o, p in zip(sides, (a, b), strict=True))
        torch.testing.assert_close(old, new, rtol=1e-5, atol=1e-6)


def test_found_inf_leaves_weights_and_momentum_bit_for_bit():
    parameters = matrices()
    muon = batched(parameters)
    set_gradients(parameters, 0)
    muon.found_inf = torch.tensor(0.0)
    muon.step()
    momenta = [muon.state[p]["momentum_buffer"] for p in parameters]
    before = [x.detach().clone() for x in (*parameters, *momenta)]
    for bad in (torch.nan, torch.inf):
        set_gradients(parameters, 1)
        parameters[3].grad[0, 0] = bad
        muon.found_inf = torch.tensor(1.0)
        muon.step()
        after = [*parameters, *(muon.state[p]["momentum_buffer"] for p in parameters)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    set_gradients(parameters, 1)
    muon.found_inf = torch.tensor(0.0)
    muon.step()
    assert not any(torch.equal(a, p) for a, p in zip(before, parameters, strict=False))


def test_singular_values_come_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(
        orthogonalise(torch.randn(3, 32, 64), (3.4445, -4.7750, 2.0315), 5, 1e-7).float()
    )
    assert 0.5 < values.min() and values.max() < 1.5


class Launches(TorchDispatchMode):
    """Counts the operations that compute; each is at least one kernel on a GPU."""

    count = 0
    views = ("permute", "expand", "view", "transpose", "_unsafe_view", "unbind", "detach", "t.")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not str(func).startswith((*(f"aten.{v}" for v in self.views), "profiler."))
        return func(*args, **kwargs or {})


def test_launches_grow_with_the_shapes_and_not_with_the_layers():
    """The matrices of 12 layers as in GPT-2's smallest model, narrower: 1,656 one by one."""
    shapes = [(8, 8)] * 4 + [(32, 8), (8, 32)]
    counts = {}
    for kind in (Muon, torch.optim.Muon):
        parameters = [torch.nn.Parameter(torch.randn(s)) for _ in range(12) for s in shapes]
        muon = kind(parameters, **OPTIONS)
        for number in range(2):  # the first makes the momentum
            set_gradients(parameters, number)
            with Launches() as launches:
                muon.step()
        counts[kind] = launches.count
    assert counts == {Muon: 56, torch.optim.Muon: 1656}, counts


def test_what_it_does_not_do_is_said():
    parameters = matrices()
    set_gradients(parameters, 0)
    with pytest.raises(ValueError, match="closure"):
        batched(parameters).step(lambda: 1.0)
    with pytest.raises(ValueError, match="only match_rms_adamw"):
        batched(parameters, adjust_lr_fn="original").step()


@pytest.mark.parametrize("nesterov", [True, False])
def test_in_float32_it_is_the_same_up_to_bfloat16s_rounding(nesterov):
    """PyTorch's own is in bfloat16: theirs differs from ours as much as from one in float64."""
    sides, found = (torch.bfloat16, torch.float32, torch.float64), []
    for products in sides:
        parameters = matrices()
        muon = Muon(parameters, products, **OPTIONS, nesterov=nesterov)
        for number in range(5):
            set_gradients(parameters, number)
            muon.step()
        found.append(parameters)
    for low, single, double in zip(*found, strict=True):
        assert (single - double).norm() < 1e-5 * double.norm(), low.shape
        assert 1e-5 * double.norm() < (low - double).norm() < 5e-3 * double.norm(), low.shape


@pytest.mark.parametrize(
    ("name", "products"),
    [
        ("fp32", torch.float32),
        ("fp64", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.bfloat16),
    ],
)
def test_the_runs_precision_decides(name, products):
    model = torch.nn.ModuleDict({"layers": torch.nn.Linear(4, 4)})
    muon, _ = create_optimizers(model, OptimizerConfig(name="muon"), PRECISIONS[name])
    assert isinstance(muon, Muon) and muon.products == products
