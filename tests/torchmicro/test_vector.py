"""torchmicro/vector.py: every operation against PyTorch, its written-out form and differences."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import stack

from torchmicro.optim import Adam
from torchmicro.scalar import ScalarVector, Value
from torchmicro.vector import Tape, Vector, concat, inputs_of, mean

FORMS = [Vector, ScalarVector]


def attend(v):
    """Two queries over the same rows, which are keys and values: each is used four times."""
    keys = v[2:]
    return concat([q.dots(keys, scale=0.5).softmax().mix(keys) for q in v[:2]])


def attend_torch(t):
    keys = stack(t[2:])
    return torch.cat([(0.5 * keys @ q).softmax(0) @ keys for q in t[:2]])


def dropout_torch(t):
    dice = random.Random(5)
    return stack([number * (dice.random() >= 0.3) / 0.7 for number in t[0]])


# ours, PyTorch's, and the sizes of the inputs, given two sizes n and m
OPERATIONS = {
    "add twice": (lambda v: v[0] + v[0] + v[0], lambda t: 3 * t[0], lambda n, m: [n]),
    "scale": (lambda v: v[0] * 0.7, lambda t: t[0] * 0.7, lambda n, m: [n]),
    "add": (lambda v: v[0] * 1.0 + v[1], lambda t: t[0] + t[1], lambda n, m: [n, n]),
    "scores": (
        lambda v: v[0].dots(v[1:], scale=0.3),
        lambda t: 0.3 * stack(t[1:]) @ t[0],
        lambda n, m: [n] * (1 + m),
    ),
    "linear": (
        lambda v: v[0].dots(v[2:], v[1]),
        lambda t: F.linear(t[0], stack(t[2:]), t[1]),
        lambda n, m: [n, m] + [n] * m,
    ),
    "relu, linear, twice": (
        lambda v: v[0].relu().dots(v[2:], v[1]) + v[0].relu().dots(v[2:]),
        lambda t: F.linear(2 * t[0].relu(), stack(t[2:]), t[1]),
        lambda n, m: [n, m] + [n] * m,
    ),
    "relu, scores": (
        lambda v: v[0].relu().dots(v[1:], scale=0.3),
        lambda t: 0.3 * stack(t[1:]) @ t[0].relu(),
        lambda n, m: [n] * (1 + m),
    ),
    "linear, relu, linear": (
        lambda v: v[0].dots(v[1:-3]).relu().dots(v[-3:]),
        lambda t: F.linear(F.linear(t[0], stack(t[1:-3])).relu(), stack(t[-3:])),
        lambda n, m: [n] * (1 + m) + [m] * 3,
    ),
    "mix": (lambda v: v[0].mix(v[1:]), lambda t: t[0] @ stack(t[1:]), lambda n, m: [m] + [n] * m),
    "attention": (attend, attend_torch, lambda n, m: [n] * (2 + m)),
    "softmax": (lambda v: v[0].softmax(), lambda t: t[0].softmax(0), lambda n, m: [n]),
    "relu": (lambda v: v[0].relu(), lambda t: t[0].relu(), lambda n, m: [n]),
    "gelu": (lambda v: v[0].gelu(), lambda t: F.gelu(t[0], approximate="tanh"), lambda n, m: [n]),
    "rms_norm": (
        lambda v: v[0].rms_norm(1e-5),
        lambda t: F.rms_norm(t[0], t[0].shape, eps=1e-5),
        lambda n, m: [n],
    ),
    "layer_norm": (
        lambda v: v[0].layer_norm(v[1], v[2], 1e-5),
        lambda t: F.layer_norm(t[0], t[0].shape, t[1], t[2], 1e-5),
        lambda n, m: [n, n, n],
    ),
    "parts": (
        lambda v: v[0].part(len(v[0]) // 2, len(v[0])) + v[0].part(len(v[0]) // 2, len(v[0])),
        lambda t: 2 * t[0][len(t[0]) // 2 :],
        lambda n, m: [n],
    ),
    "concat": (lambda v: concat(v) * 0.7, lambda t: torch.cat(t) * 0.7, lambda n, m: [n, m, 1, n]),
    "mean": (mean, lambda t: stack(t).mean(0), lambda n, m: [n] * (m + 1)),
    "cross_entropy": (
        lambda v: v[0].cross_entropy(len(v[0]) // 2),
        lambda t: F.cross_entropy(t[0], torch.tensor(len(t[0]) // 2))[None],
        lambda n, m: [n],
    ),
    "dropout": (lambda v: v[0].dropout(0.3, random.Random(5)), dropout_torch, lambda n, m: [n]),
}


def numbers(n, dice):
    return [dice.gauss(0, 1.5) for _ in range(n)]


def evaluate(form, operation, inputs, gradient=None):
    """The result, and the gradients of the inputs, as lists of floats."""
    tape = Tape()
    vectors = [form(list(data), tape) for data in inputs]
    out = operation(vectors)
    result = list(out.data)
    if gradient is not None:
        out.backward(gradient)
        assert len(tape) == 0
    return result, [v.grad or [0.0] * len(v) for v in vectors]


def cases(name):
    """Inputs and a gradient of the result, for random sizes that include 1."""
    _, theirs, sizes = OPERATIONS[name]
    dice = random.Random(name)
    for n, m in [(1, 1), (1, 4), (2, 1), (3, 3), (16, 5), (dice.randint(4, 30), 9)]:
        inputs = [numbers(size, dice) for size in sizes(n, m)]
        tensors = [torch.tensor(data, dtype=torch.float64, requires_grad=True) for data in inputs]
        out = theirs(tensors)
        yield inputs, numbers(len(out), dice), tensors, out


@pytest.mark.parametrize("name", OPERATIONS)
def test_values_and_gradients_of_both_forms_are_those_of_pytorch(name):
    def equal(ours, theirs):
        assert list(ours) == pytest.approx(list(theirs), rel=1e-12, abs=1e-12)

    for inputs, gradient, tensors, out in cases(name):
        expected = torch.autograd.grad(out, tensors, torch.tensor(gradient, dtype=torch.float64))
        fused, written = (evaluate(form, OPERATIONS[name][0], inputs, gradient) for form in FORMS)
        equal(fused[0], out.tolist())
        equal(fused[0], written[0])
        for a, b, reference in zip(fused[1], written[1], expected, strict=True):
            equal(a, reference.tolist())
            equal(a, b)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_are_finite_differences(name):
    ours, h = OPERATIONS[name][0], 1e-6
    for inputs, gradient, *_ in cases(name):

        def f(changed, gradient=gradient):
            result, _ = evaluate(Vector, ours, changed)
            return sum(g * v for g, v in zip(gradient, result, strict=True))

        _, grads = evaluate(Vector, ours, inputs, gradient)
        for i, data in enumerate(inputs):
            for j in range(len(data)):
                ends = []
                for step in (h, -h):
                    changed = [list(each) for each in inputs]
                    changed[i][j] += step
                    ends.append(f(changed))
                difference = (ends[0] - ends[1]) / (2 * h)
                assert grads[i][j] == pytest.approx(difference, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("operation", ["exp", "log", "tanh", "relu", "power", "plus", "times"])
def test_a_scalar_operation_used_twice(operation):
    def f(x):
        own = {"power": lambda: x**-0.5, "plus": lambda: x + 0.3, "times": lambda: x * x * 0.3}
        return own[operation]() if operation in own else getattr(x, operation)()

    tape = Tape()
    x, theirs = Value(0.7, tape), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    result = f(x) + f(x) * 3.0
    tape.backward([result], [2.0])
    reference = f(theirs) + f(theirs) * 3.0
    (reference * 2.0).backward()
    assert result.data == pytest.approx(reference.item(), rel=1e-14)
    assert x.grad == pytest.approx(theirs.grad.item(), rel=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_relu_at_0_has_gradient_0_and_keeps_nan(form):
    x = form([0.0, -0.0, 1.0, -1.0], Tape())
    x.relu().backward()
    assert x.grad == [0.0, 0.0, 1.0, 0.0]
    assert math.isnan(form([math.nan], Tape()).relu().data[0])


def test_a_gradient_of_zeros_takes_nothing_from_what_others_gave():
    tape = Tape()
    x, row = Vector([1.0, 2.0], tape), Vector([3.0, 4.0], tape)
    (x.dots([row]) * 0.0 + x.dots([row])).backward()
    assert (x.grad, row.grad) == ([3.0, 4.0], [1.0, 2.0])


def test_a_gradient_that_two_vectors_share_is_not_changed_in_place():
    tape = Tape()
    x, row, other = (Vector([1.0, 2.0, 3.0], tape) for _ in range(3))
    product = x.relu().dots([row, row, row])
    (product + (row + other)).backward()  # first `row` and `other` are given one list
    assert (row.grad, other.grad) == ([4.0, 7.0, 10.0], [1.0] * 3)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_add_up_over_two_backward_passes(form):
    tape = Tape()
    x = form([1.0, 2.0], tape)
    for _ in range(2):
        (x * 3.0).backward()
    assert x.grad == [6.0, 6.0]


@pytest.mark.parametrize("form", FORMS)
def test_a_chain_of_100_000_operations(form):
    tape = Tape()
    x = form([1.0], tape)
    y = x
    for _ in range(100_000):
        y = y + x
    assert len(tape) == 100_000
    y.backward()
    assert x.grad == [100_001.0]


@pytest.mark.parametrize("form", FORMS)
def test_a_second_backward_is_refused(form):
    tape = Tape()
    x = form([1.0, 2.0], tape)
    loss = (x * 2.0).cross_entropy(0)
    loss.backward()
    before = list(x.grad)
    with pytest.raises(RuntimeError, match="freed by an earlier backward"):
        loss.backward()
    y = (x * 5.0).cross_entropy(1)  # something new on the tape does not bring it back
    with pytest.raises(RuntimeError, match="freed by an earlier backward"):
        loss.backward()
    assert x.grad == before
    y.backward()
    assert x.grad != before


@pytest.mark.parametrize("form", FORMS)
def test_a_paused_tape_records_nothing(form):
    tape = Tape()
    x = form([1.0, 2.0], tape)
    with tape.paused():
        with tape.paused():
            pass
        loss = x.gelu().cross_entropy(0)
    assert len(tape) == 0
    with pytest.raises(RuntimeError, match="paused"):
        loss.backward()
    x.gelu().cross_entropy(0).backward()  # and goes on afterwards
    assert any(x.grad)


def test_an_interrupted_backward_leaves_nothing_behind():
    tape = Tape()

    def interrupt(*_):
        raise KeyboardInterrupt

    x = Vector([1.0], tape) * 2.0
    with pytest.raises(KeyboardInterrupt):
        (Vector([1.0], tape, interrupt, x) * 3.0).backward()
    assert len(tape) == 0


def test_what_the_result_does_not_depend_on_gets_no_gradient():
    tape = Tape()
    x, other = Vector([1.0], tape), Vector([1.0], tape)
    y = x * 2.0
    _ = y + other
    y.backward()
    assert (x.grad, other.grad) == ([2.0], None)


@pytest.mark.parametrize("form", FORMS)
def test_the_tape_is_in_topological_order_and_reaches_every_leaf(form):
    tape = Tape()
    leaves = [form(numbers(4, random.Random(i)), tape) for i in range(6)]
    x = leaves[0].layer_norm(leaves[1], leaves[2], 1e-5).relu().dots(leaves[3:], None)
    loss = mean([concat([x, x]).softmax().cross_entropy(1), x.cross_entropy(0)])
    made = {id(record[1]): i for i, record in enumerate(tape.records)}
    for i, record in enumerate(tape.records):
        assert all(made.get(id(each), -1) < i for each in inputs_of(record))
    reached, todo = {}, list(getattr(loss, "values", [loss]))
    while todo:
        node = todo.pop()
        if id(node) not in reached:
            reached[id(node)] = node
            if id(node) in made:
                todo += inputs_of(tape.records[made[id(node)]])
    for leaf in leaves:
        assert all(id(each) in reached for each in getattr(leaf, "values", [leaf]))


def test_sizes_that_do_not_fit_are_not_cut_to_fit():
    tape = Tape()
    short, long = Vector([1.0], tape), Vector([1.0, 2.0], tape)
    for wrong in (lambda: short + long, lambda: short.dots([long]), lambda: short.mix([long] * 2)):
        with pytest.raises((ValueError, AssertionError)):
            wrong()
    for form in FORMS:
        with pytest.raises(IndexError, match="-100"):
            form([0.0] * 200, tape).cross_entropy(-100)


def test_extreme_logits_neither_overflow_nor_vanish():
    for form in FORMS:
        x = form([1000.0, -1000.0, 0.0], Tape())
        loss = x.cross_entropy(1)
        assert loss.data == [2000.0]
        loss.backward()
        assert x.grad == [1.0, -1.0, 0.0]
        assert form([1e200, -1e200], Tape()).rms_norm(1e-5).data == [0.0, -0.0]


def test_dropout_keeps_the_mean_and_drops_its_share():
    dropped = Vector([1.0] * 100_000, Tape()).dropout(0.25, random.Random(0)).data
    assert set(dropped) == {0.0, 1 / 0.75}
    assert dropped.count(0.0) / len(dropped) == pytest.approx(0.25, abs=0.005)
    assert sum(dropped) / len(dropped) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("form", FORMS)
def test_adam_is_that_of_pytorch(form, weight_decay):
    dice, tape = random.Random(0), Tape()
    ours = [form(numbers(n, dice), tape) for n in (3, 1, 8)]
    theirs = [torch.tensor(v.data, dtype=torch.float64, requires_grad=True) for v in ours]
    adam = Adam(ours, beta1=0.85, beta2=0.99, eps=1e-8, weight_decay=weight_decay)
    reference = torch.optim.AdamW(theirs, betas=(0.85, 0.99), eps=1e-8, weight_decay=weight_decay)
    for step in range(30):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = numbers(len(a), dice)
            if step % 7 == 3:
                a.grad = None  # counts as 0
            b.grad = torch.tensor(a.grad or [0.0] * len(a), dtype=torch.float64)
        reference.param_groups[0]["lr"] = 0.01 * (1 - step / 30)
        adam.step(0.01 * (1 - step / 30))
        reference.step()
        for a, b in zip(ours, theirs, strict=True):
            assert a.data == pytest.approx(b.tolist(), rel=1e-12, abs=1e-14)
    moments = torch.cat([reference.state[b]["exp_avg_sq"] for b in theirs])
    assert adam.exp_avg_sq == pytest.approx(moments.tolist(), rel=1e-12)
    adam.zero_grad()
    assert not any(any(a.grad or []) for a in ours)


def test_a_written_out_operation_is_one_scalar_operation():
    tape = Tape()
    x, row = ScalarVector([1.0, 2.0, 3.0], tape), ScalarVector([1.0] * 3, tape)
    x.dots([row, row])
    names = [backward.__name__ for backward, *_ in tape.records]
    assert sorted(names) == ["add_backward"] * 4 + ["mul_backward"] * 6
    assert all(type(output) is Value for _, output, _ in tape.records)
