"""torchlite/functional.py against torch.nn.functional: values and gradients."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.torchlite.test_gradients import close, compare, gradients, numbers
from torchlite import functional as F
from torchlite.tensor import Tensor, no_grad


@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 4), (4,), (2, 0, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, bias):
    arrays = numbers(shape, (5, shape[-1]), (5,))[: 3 if bias else 2]
    compare(F.linear, TF.linear, *arrays)


def test_linear_gives_a_gradient_to_what_asks_for_one():
    x, W, b = numbers((2, 3), (4, 3), (4,))
    for part in range(3):
        inputs = [Tensor(a, requires_grad=i == part) for i, a in enumerate((x, W, b))]
        F.linear(*inputs).sum().backward()
        assert [t.grad is not None for t in inputs] == [i == part for i in range(3)]


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (0,), (0, 4), (63,), (64,), (20, 30)])
def test_embedding(shape):
    """Few and many ids, which add_rows adds up in different ways, most of them many times."""
    ids = np.random.default_rng(0).integers(0, 7, shape)
    ids[...] = np.where(ids == 3, 4, ids)  # one row that nobody asks for
    (weight,) = numbers((7, 3))
    compare(lambda w: F.embedding(ids, w), lambda w: TF.embedding(torch.tensor(ids), w), weight)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.integers(1, 90), st.integers(0, 999))
def test_rows_are_added_in_either_way(n, V, seed):
    dice = np.random.default_rng(seed)
    ids, rows = dice.integers(0, V, n), dice.normal(size=(n, 3))
    expected = np.zeros((V, 3))
    np.add.at(expected, ids, rows)
    close(F.add_rows(ids, rows, (V, 3)), expected, 1e-12)


@pytest.mark.parametrize("ids", [[-1], [7], [0, 3, -2] * 50])
def test_an_id_outside_the_table_is_refused(ids):
    with pytest.raises(IndexError):
        F.embedding(ids, Tensor(np.ones((7, 3))))


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), ()], ids=str)
def test_activations(shape):
    compare(F.relu, TF.relu, *numbers(shape))
    compare(F.gelu, lambda x: TF.gelu(x, approximate="tanh"), *numbers(shape))


def test_relu_has_gradient_0_at_0():
    y, (gradient,), _ = gradients(F.relu, [np.array([-1.0, -0.0, 0.0, 1.0])], np.ones(4))
    assert y.tolist() == [0.0, 0.0, 0.0, 1.0]
    assert gradient.tolist() == [0.0, 0.0, 0.0, 1.0]


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -2])
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 1), (2, 1, 3)], ids=str)
def test_softmax_on_any_axis(shape, axis):
    (x,) = numbers(shape)
    compare(lambda x: F.softmax(x, axis), lambda x: TF.softmax(x, axis), x)
    compare(lambda x: F.log_softmax(x, axis), lambda x: TF.log_softmax(x, axis), x)
    if axis == -1:
        compare(F.softmax, lambda x: TF.softmax(x, -1), x)
        compare(F.log_softmax, lambda x: TF.log_softmax(x, -1), x)


def test_softmax_of_no_rows_and_of_huge_numbers():
    for mine, its in ((F.softmax, TF.softmax), (F.log_softmax, TF.log_softmax)):
        compare(mine, lambda x, f=its: f(x, -1), *numbers((0, 3)))
        for x in ([[1e4, 0.0, -1e4]], [[-np.inf, 1.0, 2.0]]):
            x = np.array(x)
            y, (gradient,), weights = gradients(mine, [x])
            its_x = torch.tensor(x, requires_grad=True)
            its_y = its(its_x, -1)
            its_y.backward(torch.tensor(weights))
            close(y, its_y)
            close(gradient, its_x.grad)


def targets_of(kind: str, N: int, V: int) -> np.ndarray:
    """Targets (N,) of which none, some or all are ignored (-100)."""
    dice = np.random.default_rng(N)
    targets = dice.integers(0, V, N)
    if kind != "none":
        targets[dice.random(N) < (2.0 if kind == "all" else 0.4)] = -100
    return targets


LOSSES = pytest.mark.parametrize(
    ("kind", "N"), [("none", 7), ("some", 7), ("all", 7), ("none", 0), ("none", 1), ("some", 40)]
)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum"])
CHUNKS = pytest.mark.parametrize("chunk", [1, 11, 1 << 20])  # one row, two, all at once


@LOSSES
@REDUCTIONS
@CHUNKS
@pytest.mark.filterwarnings("error")
def test_cross_entropy(kind, N, reduction, chunk, monkeypatch):
    monkeypatch.setattr(F, "CHUNK", chunk)
    targets = targets_of(kind, N, 5)
    compare_or_nothing(
        lambda x: F.cross_entropy(x, targets, reduction=reduction),
        lambda x: TF.cross_entropy(x, torch.tensor(targets), reduction=reduction),
        *numbers((N, 5)),
    )


@LOSSES
@REDUCTIONS
@CHUNKS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("error")
def test_linear_cross_entropy(kind, N, reduction, chunk, bias, monkeypatch):
    monkeypatch.setattr(F, "LOGITS", chunk)
    targets = targets_of(kind, N, 5)
    its_targets = torch.tensor(targets)

    def ours(x, W, b=None):
        return F.linear_cross_entropy(x, W, b, targets, reduction=reduction)

    def theirs(x, W, b=None):
        return TF.cross_entropy(TF.linear(x, W, b), its_targets, reduction=reduction)

    compare_or_nothing(ours, theirs, *numbers((N, 3), (5, 3), (5,))[: 3 if bias else 2])


def compare_or_nothing(ours, theirs, *arrays):
    """compare; but a mean over no targets is NaN, which has no differences, and moves nothing."""
    inputs = [Tensor(a, requires_grad=True) for a in arrays]
    loss = ours(*inputs)
    if not math.isnan(loss.item()):
        return compare(ours, theirs, *arrays)
    assert theirs(*map(torch.tensor, arrays)).isnan()
    loss.backward()
    its = [torch.tensor(a, requires_grad=True) for a in arrays]
    theirs(*its).backward()
    for x, y in zip(inputs, its, strict=True):
        close(x.grad, y.grad)
        assert not x.grad.any()


@pytest.mark.parametrize("ignored", [-1, 0, 3])
def test_another_ignored_index(ignored):
    targets = np.array([0, 3, 1, 3, 0])
    targets[1] = ignored
    x, W, b = numbers((5, 3), (5, 3), (5,))
    its = torch.tensor(targets)
    compare(
        lambda x: F.cross_entropy(x, targets, ignored),
        lambda x: TF.cross_entropy(x, its, ignore_index=ignored),
        *numbers((5, 5)),
    )
    compare(
        lambda x, W, b: F.linear_cross_entropy(x, W, b, targets, ignored),
        lambda x, W, b: TF.cross_entropy(TF.linear(x, W, b), its, ignore_index=ignored),
        x, W, b,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "error"),
    [([0, -1, 2], IndexError), ([0, 5, 2], IndexError), ([0, 1], ValueError), (0, ValueError)],
)
def test_targets_that_do_not_fit_are_refused(targets, error):
    with pytest.raises(error):
        F.cross_entropy(Tensor(np.ones((3, 5))), targets)
    with pytest.raises(error):
        F.linear_cross_entropy(Tensor(np.ones((3, 2))), Tensor(np.ones((5, 2))), None, targets)
    with pytest.raises(KeyError):
        F.cross_entropy(Tensor(np.ones((3, 5))), [0, 1, 2], reduction="none")


@pytest.mark.filterwarnings("error")
def test_losses_of_huge_logits():
    """A target of probability 0 costs what its logit lacks, and none overflows."""
    x, identity = np.array([[1e4, 0.0, -1e4], [3e4, 3e4, 3e4]]), np.eye(3)
    targets, its = [2, 0], torch.tensor([2, 0])
    mine, its_x = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    loss, theirs = F.cross_entropy(mine, targets), TF.cross_entropy(its_x, its)
    close(loss.data, theirs)
    close(F.linear_cross_entropy(Tensor(x), Tensor(identity), None, targets).data, theirs)
    loss.backward()
    theirs.backward()
    close(mine.grad, its_x.grad)


def test_losses_leave_the_logits_alone_and_know_no_grad():
    x, W, logits = (Tensor(a, requires_grad=True) for a in numbers((4, 3), (5, 3), (4, 5)))
    before = logits.data.copy()
    with no_grad():
        quiet = F.linear_cross_entropy(x, W, None, [0, 1, 2, 3]).item()
    loss = F.linear_cross_entropy(x, W, None, [0, 1, 2, 3])
    assert loss.item() == quiet
    F.cross_entropy(logits, [0, 1, 2, 3]).backward()
    np.testing.assert_array_equal(logits.data, before)


def test_a_loss_can_be_part_of_more():
    targets = [0, -100, 2, 3]
    its = torch.tensor(targets)
    compare(
        lambda x, W: F.linear_cross_entropy(x, W, None, targets) * 3 + x.sum(),
        lambda x, W: TF.cross_entropy(TF.linear(x, W), its) * 3 + x.sum(),
        *numbers((4, 3), (5, 3)),
    )


@pytest.mark.parametrize("shape", [(2, 3, 4), (4,), (0, 4), (3, 1), (2, 0, 5)], ids=str)
def test_norms(shape):
    C = shape[-1]
    x, weight, bias = numbers(shape, (C,), (C,))
    compare(
        lambda x, w, b: F.layer_norm(x, w, b, 1e-3),
        lambda x, w, b: TF.layer_norm(x, (C,), w, b, 1e-3),
        x, weight, bias,
    )  # fmt: skip
    compare(
        lambda x, w: F.rms_norm(x, w, 1e-3),
        lambda x, w: TF.rms_norm(x, (C,), w, 1e-3),
        x, weight,
    )  # fmt: skip
    compare(lambda x: F.rms_norm(x, eps=1e-3), lambda x: TF.rms_norm(x, (C,), eps=1e-3), x)
    compare(F.layer_norm, lambda x, w, b: TF.layer_norm(x, (C,), w, b), x, weight, bias)
    compare(F.rms_norm, lambda x, w: TF.rms_norm(x, (C,), w, 1e-5), x, weight)


ATTENTION = {  # shapes of Q, K and V
    "plain": ((2, 2, 3, 4), (2, 2, 3, 4), (2, 2, 3, 4)),
    "values of another width": ((2, 3, 4), (2, 3, 4), (2, 3, 5)),
    "fewer queries": ((2, 3, 4), (2, 5, 4), (2, 5, 4)),
    "more queries": ((2, 5, 4), (2, 3, 4), (2, 3, 4)),
    "one query": ((1, 1, 2), (1, 4, 2), (1, 4, 2)),
    "no batch": ((3, 4), (5, 4), (5, 4)),
    "empty batch": ((0, 2, 3, 4), (0, 2, 3, 4), (0, 2, 3, 4)),
    "no queries": ((2, 0, 4), (2, 3, 4), (2, 3, 4)),
    "no keys": ((2, 3, 4), (2, 0, 4), (2, 0, 4)),
    "shared keys": ((2, 3, 3, 4), (1, 1, 5, 4), (1, 1, 5, 4)),
    "shared queries": ((1, 3, 4), (2, 5, 4), (2, 5, 4)),
    "values of more rank": ((3, 4), (5, 4), (2, 5, 3)),
}


@pytest.mark.parametrize("name", ATTENTION)
@pytest.mark.parametrize("kind", ["all", "causal", "boolean", "additive", "both"])
def test_attention(name, kind):
    arrays = numbers(*ATTENTION[name])
    T, S = arrays[0].shape[-2], arrays[1].shape[-2]
    dice = np.random.default_rng(0)
    causal = np.tri(T, S, dtype=bool)  # the first query sees the first key
    seen = dice.random((T, S)) < 0.7
    mask = {"boolean": seen, "both": seen, "additive": dice.normal(size=(T, S))}.get(kind)
    is_causal = kind in ("causal", "both")
    allowed = {"causal": causal, "both": causal & seen}.get(kind, mask)
    its_mask = None if allowed is None else torch.tensor(allowed)
    compare(
        lambda Q, K, V: F.scaled_dot_product_attention(Q, K, V, mask, is_causal=is_causal),
        lambda Q, K, V: TF.scaled_dot_product_attention(Q, K, V, its_mask),
        *arrays,
    )


@pytest.mark.parametrize("shape", [(4, 4), (2, 1, 4, 4), (2, 3, 1, 4), (3, 4, 1)], ids=str)
def test_attention_masks_broadcast(shape):
    arrays = numbers((2, 3, 4, 2), (2, 3, 4, 2), (2, 3, 4, 2))
    for mask in (np.random.default_rng(1).random(shape) < 0.6, *numbers(shape)):
        compare(
            lambda Q, K, V, m=mask: F.scaled_dot_product_attention(Q, K, V, m),
            lambda Q, K, V, m=mask: TF.scaled_dot_product_attention(Q, K, V, torch.tensor(m)),
            *arrays,
        )


@pytest.mark.filterwarnings("error")
def test_a_query_that_may_see_nothing_gets_0():
    mask = np.array([[True, False], [False, False]])
    y, grads, _ = gradients(
        lambda Q, K, V: F.scaled_dot_product_attention(Q, K, V, mask),
        numbers((2, 3), (2, 3), (2, 3)),
    )
    assert not y[1].any() and y[0].all()
    assert not grads[0][1].any() and all(np.isfinite(g).all() for g in grads)


def test_queries_keys_and_values_may_be_one_tensor():
    compare(
        lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
        lambda x: TF.scaled_dot_product_attention(x, x, x, is_causal=True),
        *numbers((2, 5, 3)),
    )


def test_attention_drops_weights_and_passes_gradients_through_the_same():
    """With the same dice each time: against differences, and kept weights are stretched."""
    Q, K = numbers((1, 40, 4), (1, 50, 4))
    V = np.eye(50)[None]  # so that the result is the weights themselves

    def dropped(*inputs):
        dice = np.random.default_rng(3)
        return F.scaled_dot_product_attention(*inputs, dropout_p=0.25, rng=dice)

    whole = F.scaled_dot_product_attention(*map(Tensor, (Q, K, V))).data
    y, grads, _ = gradients(dropped, [Q, K, V])
    kept = y != 0.0
    close(y[kept], whole[kept] / 0.75)
    assert 0.7 < kept.mean() < 0.8
    its = [torch.tensor(a, requires_grad=True) for a in (Q, K, V)]
    weights = torch.softmax(its[0] @ its[1].mT / 2.0, -1) * torch.tensor(kept) / 0.75
    again, _, g = gradients(dropped, [Q, K, V])
    np.testing.assert_array_equal(again, y)
    (weights @ its[2]).backward(torch.tensor(g))
    for mine, x in zip(grads, its, strict=True):
        close(mine, x.grad)


def test_causal_masks_are_shared_and_cannot_be_written():
    mask = F.causal_mask(2, 4, np.dtype(np.float32))
    assert mask.tolist() == [[0, 0, 0, -math.inf], [0, 0, 0, 0]]
    assert mask is F.causal_mask(2, 4, np.dtype(np.float32))
    with pytest.raises(ValueError, match="read-only"):
        mask[0, 0] = 1.0
    assert F.causal_mask(2, 4, np.dtype(np.float64)).dtype == np.float64
