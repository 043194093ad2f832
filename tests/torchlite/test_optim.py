"""torchlite/optim.py against torch.optim, number for number."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from torchlite import nn, optim
from torchlite.tensor import Tensor, default_dtype

BLOCK = 16  # instead of tens of thousands, so that the edges of blocks come often

SHAPES = {
    "one": [(3, 4)],
    "many small ones": [(7,), (2, 3), (1,), (5, 3), (), (4,)] * 5,
    "larger than a block": [(BLOCK + 7,)],
    "two blocks and small ones": [(5,), (2 * BLOCK + 1,), (3,), (2, 2)],
    "just a block": [(BLOCK - 2,), (2,), (3,)],
    "an empty one": [(3,), (0, 2), (2,)],
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    assert optim.BLOCK > 1000
    monkeypatch.setattr(optim, "BLOCK", BLOCK)


def pairs(shapes, dtype="float64", seed=0) -> tuple[list, list]:
    """The same parameters in TorchLite and in PyTorch."""
    dice = np.random.default_rng(seed)
    arrays = [dice.normal(size=shape) for shape in shapes]
    with default_dtype(dtype):
        mine = [nn.Parameter(a) for a in arrays]
    its = [torch.nn.Parameter(torch.tensor(a, dtype=getattr(torch, dtype))) for a in arrays]
    return mine, its


def set_gradients(mine, its, dice, share=1.0):
    """New random gradients, of very different sizes, for a share of the parameters."""
    for a, b in zip(mine, its, strict=True):
        gradient = dice.normal(size=a.shape) * 10.0 ** dice.integers(-4, 4)
        a.grad = b.grad = None
        if dice.random() < share:
            a.grad = np.asarray(gradient, a.dtype)
            b.grad = torch.tensor(a.grad)


def same(mine, its, tolerance):
    for a, b in zip(mine, its, strict=True):
        assert a.shape == tuple(b.shape)
        np.testing.assert_allclose(a.data, b.detach().numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("share", [1.0, 0.6], ids=["all", "some stand still"])
def test_adamw_is_pytorchs(name, weight_decay, share):
    """50 steps; the learning rate changes at each, and once there is no gradient at all."""
    mine, its = pairs(SHAPES[name])
    settings = {"betas": (0.8, 0.98), "eps": 1e-6, "weight_decay": weight_decay}
    ours = optim.AdamW(mine, lr=0.01, **settings)
    theirs = torch.optim.AdamW(its, lr=0.01, **settings)
    dice = np.random.default_rng(1)
    for step in range(50):
        set_gradients(mine, its, dice, 0.0 if step == 20 else share)
        ours.lr = theirs.param_groups[0]["lr"] = 0.01 * (1.0 + math.sin(step))
        ours.step()
        theirs.step()
    same(mine, its, 1e-12)


def test_the_defaults_are_pytorchs():
    mine, its = pairs([(4, 4)])
    ours, theirs = optim.AdamW(mine), torch.optim.AdamW(its)
    for step in range(3):
        set_gradients(mine, its, np.random.default_rng(step))
        ours.step()
        theirs.step()
    same(mine, its, 1e-13)


def test_float32_stays_and_is_close():
    mine, its = pairs(SHAPES["many small ones"], "float32")
    ours, theirs = optim.AdamW(mine, lr=0.01), torch.optim.AdamW(its, lr=0.01)
    dice = np.random.default_rng(2)
    for _ in range(20):
        set_gradients(mine, its, dice, 0.8)
        ours.step()
        theirs.step()
    assert all(p.dtype == np.float32 for p in mine)
    assert ours.exp_avg.dtype == ours.exp_avg_sq.dtype == np.float32
    same(mine, its, 1e-5)


def test_neighbours_are_grouped_without_crossing_a_block():
    mine, _ = pairs([(4,), (3, 3), (BLOCK,), (BLOCK + 1,), (5,), (11,), (1,)])
    optimizer = optim.AdamW(mine)
    runs = [[p.data.size for p in parameters] for _, parameters, _ in optimizer.runs]
    assert runs == [[4, 9], [BLOCK], [BLOCK + 1], [5, 11], [1]]
    assert [start for start, _, _ in optimizer.runs] == [0, 13, 29, 46, 62]


def test_weights_are_moved_and_parameters_stay_the_same_objects():
    """Each is a view of one array, so what is loaded into it, or tied to it, is what is trained."""
    a, b = (nn.Linear(3, 3) for _ in range(2))
    b.weight = a.weight
    before = a.weight.data.copy()
    optimizer = optim.AdamW([*a.parameters(), b.bias], lr=0.1, weight_decay=0.0)
    np.testing.assert_array_equal(a.weight.data, before)
    a.load_state_dict({"weight": np.zeros((3, 3)), "bias": np.zeros(3)})
    (b(Tensor(np.ones((1, 3)))).sum() + a(Tensor(np.ones((1, 3)))).sum()).backward()
    optimizer.step()
    np.testing.assert_allclose(b.weight.data, -0.1, rtol=1e-6)  # Adam's first step is lr
    optimizer.zero_grad()
    assert all(p.grad is None for p in optimizer.parameters)


def test_a_step_leaves_gradients_alone():
    mine, its = pairs([(3,), (BLOCK + 3,)])
    optimizer = optim.AdamW(mine)
    set_gradients(mine, its, np.random.default_rng(0))
    optimizer.step()
    for a, b in zip(mine, its, strict=True):
        np.testing.assert_array_equal(a.grad, b.grad.numpy())


def test_a_gradient_may_lie_in_memory_in_any_order():
    mine, its = pairs([(3, 4)])
    ours, theirs = optim.AdamW(mine, lr=0.1), torch.optim.AdamW(its, lr=0.1)
    gradient = np.random.default_rng(0).normal(size=(3, 4))
    mine[0].grad, its[0].grad = np.asfortranarray(gradient), torch.tensor(gradient)
    ours.step()
    theirs.step()
    same(mine, its, 1e-13)


def test_there_is_something_to_optimize():
    with pytest.raises(ValueError, match="at least one"):
        optim.AdamW([])


@pytest.mark.parametrize("limit", [1e-3, 0.99, 1.0, 1.01, 1.5, 1e6])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_clipping_is_pytorchs(limit, share):
    """At limits below and above the norm, which they are given in."""
    mine, its = pairs([(3, 4), (), (5,), (0,), (200, 30)])
    set_gradients(mine, its, np.random.default_rng(3), share)
    max_norm = limit * math.sqrt(sum((p.grad**2).sum() for p in mine if p.grad is not None))
    norm = optim.clip_grad_norm_(iter(mine), max_norm)
    expected = torch.nn.utils.clip_grad_norm_(its, max_norm)
    assert isinstance(norm, float)
    assert norm == pytest.approx(expected.item(), rel=1e-13)
    for a, b in zip(mine, its, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=1e-13)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value")
def test_clipping_what_is_not_finite_is_pytorchs(bad):
    mine, its = pairs([(3,), (2,)])
    for p, q in zip(mine, its, strict=True):
        p.grad, q.grad = np.ones(p.shape), torch.ones_like(q)
    mine[0].grad[1] = its[0].grad[1] = bad
    norm = optim.clip_grad_norm_(mine, 1.0)
    expected = torch.nn.utils.clip_grad_norm_(its, 1.0)
    np.testing.assert_equal(norm, expected.item())
    for p, q in zip(mine, its, strict=True):
        np.testing.assert_array_equal(p.grad, q.grad.numpy())


def test_a_number_of_a_parameter_is_clipped_and_moved():
    """backward() may leave a NumPy number there, which nothing can be written into."""
    p = nn.Parameter(2.0)
    (p * p).backward()
    assert optim.clip_grad_norm_([p], 1.0) == 4.0
    assert float(p.grad) == pytest.approx(1.0, rel=1e-5)
    assert p.grad.dtype == np.float32
    optim.AdamW([p], lr=0.5, weight_decay=0.0).step()
    assert p.item() == pytest.approx(1.5)


def trained_by_hand(make):
    """Whether three steps of `make(model, optimizer)`'s result move its weights as they should."""
    model = nn.Linear(3, 2)
    model, optimizer = make(model, optim.AdamW(model.parameters(), lr=0.1))
    before = model.weight.data.copy()
    for _ in range(3):
        for p in model.parameters():
            p.grad = np.ones_like(p.data)
        optimizer.step()
    return np.abs(model.weight.data - before + 0.3).max() < 0.01  # Adam's steps are of size lr


def given_new_arrays(model, optimizer):
    for p in model.parameters():
        p.data = p.data + 1.0
    return model, optimizer


@pytest.mark.parametrize(
    "make",
    [
        lambda *both: both,
        lambda *both: copy.deepcopy(both),
        lambda *both: pickle.loads(pickle.dumps(both)),  # noqa: S301, our own
        given_new_arrays,
        lambda model, first: (model, [first, optim.AdamW(model.parameters())][0]),
    ],
    ids=["as made", "deepcopy", "pickle", "new arrays", "a second optimizer"],
)
def test_weights_that_were_moved_since_are_trained(make):
    assert trained_by_hand(make)


def test_what_adamw_refuses():
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="twice"):
        optim.AdamW([*model.parameters(), model.weight])
    with default_dtype("float64"):
        other = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="dtypes"):
        optim.AdamW([*model.parameters(), *other.parameters()])
