"""torchlite/nn.py against torch.nn: names, their order, layers and initial weights."""

import math

import numpy as np
import pytest
import torch

from tests.torchlite.test_gradients import close, numbers
from torchlite import functional as F
from torchlite import nn
from torchlite.tensor import Tensor, default_dtype, no_grad


def both(build, dtype="float64") -> tuple:
    """The same module in TorchLite and in PyTorch, with the same random weights."""
    with default_dtype(dtype):
        ours = build(nn)
    theirs = build(torch.nn).to(getattr(torch, dtype))
    with torch.no_grad():
        for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.data[...] = numbers(mine.shape, seed=mine.data.size)[0]
            its.copy_(torch.tensor(mine.data))
    return ours, theirs


def nested(kind):
    """A module of lists, lists in modules, a parameter after modules, and one with two names."""

    class Inner(kind.Module):
        def __init__(self, bias):
            super().__init__()
            self.linear = kind.Linear(2, 2, bias=bias)
            self.scale = kind.Parameter(torch.ones(2) if kind is torch.nn else np.ones(2))
            self.nothing = None

    class Outer(kind.Module):
        def __init__(self):
            super().__init__()
            lists = kind.ModuleList if kind is torch.nn else list
            self.first = kind.Embedding(3, 2)
            self.inner = lists([Inner(True), Inner(False)])
            self.identity = kind.Identity()
            self.last = kind.Linear(2, 3, bias=False)
            self.lone = kind.Parameter(torch.ones(1) if kind is torch.nn else np.ones(1))
            self.last.weight = self.first.weight
            self.norm = kind.LayerNorm(2)
            self.sizes = [1, 2]  # a list of something else

    return Outer()


@pytest.mark.parametrize("remove_duplicate", [True, False])
def test_names_and_their_order_are_pytorchs(remove_duplicate):
    ours = [n for n, _ in nested(nn).named_parameters(remove_duplicate=remove_duplicate)]
    theirs = nested(torch.nn).named_parameters(remove_duplicate=remove_duplicate)
    assert ours == [n for n, _ in theirs]
    assert ("last.weight" in ours) != remove_duplicate


def test_parameters_are_the_ones_that_are_named():
    model = nested(nn)
    assert model.parameters() == [p for _, p in model.named_parameters()]
    assert model.last.weight is model.first.weight
    assert all(p.requires_grad and p.dtype == np.float32 for p in model.parameters())


def test_modules_are_this_one_and_all_inside():
    kinds = [type(m).__name__ for m in nested(nn).modules()]
    theirs = [type(m).__name__ for m in nested(torch.nn).modules()]
    assert kinds == [kind for kind in theirs if kind != "ModuleList"]


def test_a_buffer_is_no_parameter():
    model = nn.Identity()
    model.table = nn.buffer([1, 2])
    assert model.parameters() == [] and model.state_dict() == {}
    assert model.table.dtype == np.float32 and not model.table.requires_grad


def test_state_dict_has_pytorchs_names_and_goes_both_ways():
    ours, theirs = both(nested)
    state = ours.state_dict()
    its = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    assert list(state) == list(its)
    for name, array in its.items():
        close(state[name], array)
    fresh = nested(nn)
    fresh.load_state_dict(its)
    for name, parameter in fresh.named_parameters():
        np.testing.assert_array_equal(parameter.data, its[name].astype(np.float32))
        assert parameter.dtype == np.float32
    theirs.load_state_dict({name: torch.tensor(a) for name, a in fresh.state_dict().items()})


def test_state_dict_is_a_copy():
    model = nn.Linear(2, 2)
    state = model.state_dict()
    before = {name: a.copy() for name, a in state.items()}
    model.weight.data[...] = 0.0
    np.testing.assert_array_equal(state["weight"], before["weight"])
    model.load_state_dict(state)
    model.bias.data += 1.0
    np.testing.assert_array_equal(state["bias"], before["bias"])


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    model = nested(nn)
    before = model.state_dict()
    for change, message in (
        ({"lone": np.ones(2)}, r"lone is \(2,\), not \(1,\)"),
        ({"other": np.ones(2)}, r"unknown \['other'\]"),
        ({"lone": None}, r"missing \['lone'\]"),
        ({"last.weight": None}, r"missing \['last.weight'\]"),
    ):
        state = {n: a + 1.0 for n, a in {**before, **change}.items() if a is not None}
        with pytest.raises(ValueError, match=message):
            model.load_state_dict(state)
    for name, array in model.state_dict().items():
        np.testing.assert_array_equal(array, before[name])


def test_train_and_eval_reach_everything():
    model = nested(nn)
    assert all(m.training for m in model.modules())
    assert model.eval() is model
    assert not any(m.training for m in model.modules())
    assert model.train() is model
    assert all(m.training for m in model.modules())
    assert nn.Identity().training  # only those: not the class


def test_zero_grad_forgets():
    model = nn.Linear(2, 3)
    model(Tensor(np.ones((4, 2)))).sum().backward()
    assert model.weight.grad is not None
    model.zero_grad()
    assert model.weight.grad is None and model.bias.grad is None


LAYERS = {
    "linear": (lambda kind: kind.Linear(4, 3), (2, 5, 4)),
    "linear without bias": (lambda kind: kind.Linear(4, 3, bias=False), (4,)),
    "layer norm": (lambda kind: kind.LayerNorm(4), (2, 5, 4)),
    "layer norm, eps": (lambda kind: kind.LayerNorm(4, eps=0.1), (2, 4)),
    "rms norm": (lambda kind: kind.RMSNorm(4, eps=1e-5), (2, 5, 4)),
    "bare rms norm": (lambda kind: kind.RMSNorm(4, eps=0.1, elementwise_affine=False), (2, 4)),
    "relu": (lambda kind: kind.ReLU(), (2, 4)),
    "gelu": (lambda kind: kind.GELU("tanh") if kind is torch.nn else kind.GELU(), (2, 4)),
    "identity": (lambda kind: kind.Identity(), (2, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_pytorchs(name):
    build, shape = LAYERS[name]
    ours, theirs = both(build)
    x = Tensor(numbers(shape)[0], requires_grad=True)
    its_x = torch.tensor(x.data, requires_grad=True)
    y, its = ours(x), theirs(its_x)
    close(y.data, its)
    (y * y).sum().backward()
    (its * its).sum().backward()
    close(x.grad, its_x.grad)
    for (n, mine), (m, p) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert n == m
        close(mine.grad, p.grad)


def test_an_embedding_is_pytorchs():
    ours, theirs = both(lambda kind: kind.Embedding(5, 3))
    ids = np.array([[1, 4, 1], [0, 0, 0]])
    y, its = ours(ids), theirs(torch.tensor(ids))
    close(y.data, its)
    (y * y).sum().backward()
    (its * its).sum().backward()
    close(ours.weight.grad, theirs.weight.grad)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout(p):
    x = Tensor(np.full((200, 500), 2.0, np.float32), requires_grad=True)
    y = F.dropout(x, p, True, np.random.default_rng(0))
    kept = y.data != 0
    assert y.dtype == np.float32
    assert kept.mean() == pytest.approx(1 - p, abs=0.01)
    assert kept.mean(0).min() > 1 - p - 0.15  # no column, no row is favoured
    np.testing.assert_allclose(y.data[kept], 2.0 / (1 - p), rtol=1e-6)
    (y * 3).sum().backward()
    np.testing.assert_allclose(x.grad, y.data * 1.5, rtol=1e-6)
    again = F.dropout(x, p, True, np.random.default_rng(0))
    np.testing.assert_array_equal(again.data, y.data)
    assert (F.dropout(x, p, True, np.random.default_rng(1)).data != y.data).any()


def test_dropout_that_is_off_is_nothing():
    x = Tensor(np.ones(3))
    assert F.dropout(x, 0.5, False, np.random.default_rng(0)) is x
    assert F.dropout(x, 0.0, True, np.random.default_rng(0)) is x


def test_dropout_follows_training_and_the_seed():
    x, layer = Tensor(np.ones((100, 100))), nn.Dropout(0.2)
    nn.manual_seed(5)
    first, second = layer(x).data, layer(x).data
    assert (first == 0).mean() == pytest.approx(0.2, abs=0.02)
    assert (first != second).any()
    nn.manual_seed(5)
    np.testing.assert_array_equal(layer(x).data, first)
    assert layer.eval()(x) is x
    with no_grad():  # it is training, not recording, that counts
        assert (layer.train()(x).data == 0).any()


def test_gradients_pass_a_dropout_layer_where_numbers_do():
    layer = nn.Dropout(0.5)
    x = Tensor(np.full((20, 20), 3.0), requires_grad=True)
    y = layer(x)
    y.sum().backward()
    np.testing.assert_allclose(x.grad * 3.0, y.data)
    assert 0 < (x.grad == 0).mean() < 1


def test_initial_weights_are_of_pytorchs_distributions():
    nn.manual_seed(1)
    linear, theirs = nn.Linear(16, 5000), torch.nn.Linear(16, 5000)
    for mine, its in ((linear.weight.data, theirs.weight), (linear.bias.data, theirs.bias)):
        assert np.abs(mine).max() <= 1 / math.sqrt(16)
        assert mine.std() == pytest.approx(its.std().item(), rel=0.03)
        assert mine.mean() == pytest.approx(0.0, abs=0.01)
    embedding = nn.Embedding(200, 100).weight.data
    assert embedding.std() == pytest.approx(1.0, abs=0.02)
    for layer in (nn.LayerNorm(3), nn.RMSNorm(3)):
        assert layer.weight.data.tolist() == [1.0] * 3
    assert nn.LayerNorm(3).bias.data.tolist() == [0.0] * 3
    assert nn.Linear(2, 2, bias=False).bias is None


def test_the_seed_decides_the_weights_and_the_dtype_does_not():
    def weight(seed, dtype):
        nn.manual_seed(seed)
        with default_dtype(dtype):
            return nn.Linear(3, 4).weight

    assert weight(1, "float64").dtype == np.float64
    assert weight(1, "float32").dtype == np.float32
    close(weight(1, "float64").data, weight(1, "float32").data, 1e-6)
    assert (weight(1, "float64").data != weight(2, "float64").data).all()


def test_a_parameter_is_a_copy_of_the_default_dtype():
    array = np.ones(3)
    parameter = nn.Parameter(array)
    parameter.data += 1.0
    assert array.tolist() == [1.0] * 3
    assert parameter.dtype == np.float32
    assert nn.Parameter(array.astype(np.float32)).data is not array


def test_layers_keep_float32():
    model = nn.Linear(3, 4)
    x = Tensor(np.ones((2, 3), np.float32))
    y = nn.GELU()(nn.RMSNorm(4)(nn.LayerNorm(4)(nn.ReLU()(nn.Dropout(0.3)(model(x))))))
    assert y.dtype == np.float32
    y.sum().backward()
    assert model.weight.grad.dtype == np.float32


def test_a_cache_grows_and_is_forgotten():
    cache = nn.KVCache(2)
    assert cache.length == 0
    K, V = (Tensor(a) for a in numbers((1, 2, 5, 3), (1, 2, 5, 3)))
    for layer in cache.layers:
        for part in (slice(0, 2), slice(2, 3), slice(3, 5)):
            k, v = layer.extend(K[:, :, part], V[:, :, part])
            assert k.shape[2] == layer.length == part.stop
    np.testing.assert_array_equal(k.data, K.data)
    np.testing.assert_array_equal(v.data, V.data)
    assert cache.length == 5
    cache.clear()
    assert cache.length == 0
    k, _ = cache.layers[0].extend(K[:, :, :1], V[:, :, :1])
    assert k.shape == (1, 2, 1, 3)
