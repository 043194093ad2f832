"""model/cpu_layers.py beside the decoder's own layers."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.device import PRECISIONS
from generation.batched import generate
from generation.sampling import Sampling
from model import bf16_attention
from model import cpu_layers as module
from model.config import ModelConfig
from model.cpu_layers import ShortAttention, dropout_mask, use_cpu_layers
from model.loss import LossModule
from model.transformer_full import TransformerDecoder
from tests.helpers import write_config
from training.config import load
from training.resume import RunSpec
from training.setup import build, recompute_layers

CPU = torch.device("cpu")
OPTIONS = [
    {},
    {"bias": False, "activation": "gelu"},
    {"norm_first": True, "final_norm": True, "activation": "gelu"},
    {"norm": "rms", "norm_first": True, "final_norm": True, "bias": False},
]


@pytest.fixture(autouse=True)
def with_bf16(monkeypatch):
    """As on a CPU that has bf16 instructions; without them it is the same, slowly."""
    monkeypatch.setattr(bf16_attention, "HAS_FAST_PRODUCTS", True)


def pair(precision="fp32", **options):
    """The same decoder twice, once with these layers."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = ModelConfig(23, 24, 3, 2, 40, 160, **{"dropout": 0.0, "init_std": 0.2, **options})
        models.append(TransformerDecoder.from_config(config, PRECISIONS[precision].weights))
    use_cpu_layers(models[1])
    return models


def passes(model, precision="fp32", length=13):
    """The loss of a few rows and its gradients by name, all in float64."""
    generator = torch.Generator().manual_seed(0)
    ids, targets = torch.randint(0, 23, (2, 3, length), generator=generator)
    torch.manual_seed(1)
    with PRECISIONS[precision].autocast(CPU):
        loss = LossModule(model)(ids, targets.flatten()) / targets.numel()
    loss.backward()
    return {"loss": loss.detach().double()} | {
        n: p.grad.double() for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("precision", "close"), [("fp64", 1e-13), ("fp32", 1e-5)])
def test_loss_and_gradients_are_the_same(options, precision, close):
    plain, ours = pair(precision, **options)
    assert plain.state_dict().keys() == ours.state_dict().keys()
    expected, found = passes(plain, precision), passes(ours, precision)
    for name, value in expected.items():
        assert (found[name] - value).norm() <= close * (value.norm() + 1), name


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("length", [13, 150])  # 150: longer than what is written out here
def test_in_bf16_they_are_as_close_to_float64(options, length):
    exact = passes(pair("fp64", **options)[0], "fp64", length)
    plain, ours = (passes(model, "bf16", length) for model in pair(**options))

    def distance(found):
        return math.sqrt(sum((found[name] - exact[name]).square().sum() for name in exact))

    assert 0 < distance(ours) <= 1.25 * distance(plain)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputing_changes_no_bit(precision):
    options = {"activation": "gelu", "dropout": 0.3}
    kept, recomputed = (pair(precision, **options)[1] for _ in range(2))
    recompute_layers(recomputed)
    expected, found = passes(kept, precision), passes(recomputed, precision)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


# When the decoder's own form is taken -------------------------------------------------------------


def attention_taken(model, **how):
    """Whether the first layer's attention is what is written out here."""
    x = torch.randn(2, how.pop("length", 5), 24)
    y = model.layers[0].self_attn(x, **how)
    seen, nodes = set(), [y.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return any("ShortAttention" in node.name() for node in seen)


def test_which_attention_is_taken(monkeypatch):
    model = pair()[1]
    assert not attention_taken(model)
    with torch.autocast("cpu", torch.float16):
        assert not attention_taken(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_taken(model) and attention_taken(model, length=128)
        assert not attention_taken(model, length=129)
        assert not attention_taken(model, mask=torch.ones(5, 5, dtype=torch.bool))
        drops = pair(attention_dropout=0.5)[1]
        assert not attention_taken(drops) and attention_taken(drops.eval())
        monkeypatch.setattr(bf16_attention, "HAS_FAST_PRODUCTS", False)
        assert not attention_taken(model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_gradients_with_a_mask_and_with_a_cache_no_bit_differs(precision):
    plain, ours = (m.eval() for m in pair(activation="gelu", dropout=0.5, attention_dropout=0.5))
    ids = torch.randint(0, 23, (3, 13))
    mask = torch.ones(13, 13, dtype=torch.bool).tril(-1).logical_or(torch.eye(13, dtype=torch.bool))
    with PRECISIONS[precision].autocast(CPU), torch.no_grad():
        assert torch.equal(plain(ids), ours(ids))
        assert torch.equal(plain(ids, mask), ours(ids, mask))
    prompts = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]
    texts = [generate(m, prompts, Sampling(max_new_tokens=20), seed=3) for m in (plain, ours)]
    assert texts[0] == texts[1]


def test_torch_compile_sees_the_decoders_own_form():
    graphs = []
    for model in pair(activation="gelu", dropout=0.5):
        torch._dynamo.reset()
        with torch.autocast("cpu", torch.bfloat16):
            found = torch._dynamo.explain(model.hidden)(torch.randint(0, 23, (2, 8)))
        assert (found.graph_count, found.graph_break_count) == (1, 0)
        graphs.append([node.target for node in found.graphs[0].graph.nodes if node.op != "output"])
    assert len(graphs[0]) == len(graphs[1])


def test_a_run_on_a_cpu_trains_with_them(tmp_path):
    state = build(RunSpec(tmp_path / "run", load(write_config(tmp_path))), lambda _: None)
    assert state.model.dropout.forward.func is module.dropout


# Attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 5, 64])
@pytest.mark.parametrize("scores", [1, 2**10, 2**22])
def test_attention_equals_pytorchs_however_heads_are_grouped(T, scores, monkeypatch):
    monkeypatch.setattr(module, "MAX_SCORES", scores)
    torch.manual_seed(0)
    QKV, gradient = (torch.randn(2, T, n * 24, dtype=torch.float64) for n in (3, 1))
    QKV.requires_grad_()
    Q, K, V = QKV.view(2, T, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind()
    plain = F.scaled_dot_product_attention(Q, K, V, is_causal=True)
    plain = plain.transpose(1, 2).reshape(2, T, 24)
    ours = ShortAttention.apply(QKV, 3)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    found = [torch.autograd.grad(y, QKV, gradient)[0] for y in (ours, plain)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


def test_gradient_of_attention_by_finite_differences():
    QKV = torch.randn(2, 4, 18, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ShortAttention.apply(x, 3), QKV)


def test_a_token_sees_nothing_after_it():
    QKV = torch.randn(1, 100, 48).bfloat16()
    before = ShortAttention.apply(QKV, 2)
    QKV[:, 90:] = 100.0
    assert torch.equal(ShortAttention.apply(QKV, 2)[:, :90], before[:, :90])


# Dropout ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
def test_dropout_keeps_the_share_asked_for_and_the_mean(p):
    torch.manual_seed(0)
    mask = dropout_mask(torch.Size([1000, 1001]), p, torch.float64)
    kept = mask > 0
    k = round((1 - p) * 2**16)
    assert set(mask.unique().tolist()) == {0.0, 2**16 / k}
    deviation = math.sqrt(p * (1 - p) / mask.numel())
    assert abs(kept.double().mean() - (1 - p)) < 4 * deviation + 2**-17
    assert abs(mask.mean() - 1) < 4 * deviation / (1 - p)
    assert mask.var() == pytest.approx(p / (1 - p), rel=0.1)


def test_dropouts_decisions_are_independent():
    """Of each other, of those that come of the same draw above all, and from call to call."""
    torch.manual_seed(0)
    p, count = 0.3, 2**20
    masks = [dropout_mask(torch.Size([count]), p, torch.float64) for _ in range(2)]
    first, second = ((mask - mask.mean()) / mask.std() for mask in masks)
    limit = 4.5 / math.sqrt(count)
    assert abs((first * second).mean()) < limit
    for distance in (*range(1, 9), 64, 1000):
        assert abs((first[:-distance] * first[distance:]).mean()) < limit, distance
    places = first.view(-1, 4).mean(0)  # each of the four is dropped as often
    assert places.abs().max() < 4.5 / math.sqrt(count / 4)


def test_dropout_follows_the_seed_and_leaves_evaluation_alone():
    model = pair(dropout=0.25)[1]
    x = torch.randn(7, 9, requires_grad=True)
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model.dropout(x))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    (gradient,) = torch.autograd.grad(found[0].sum(), x)
    assert torch.equal(x * gradient, found[0])  # what was dropped has no gradient
    low = model.dropout(x.bfloat16())
    assert low.dtype == torch.float32 and set((low == 0).unique().tolist()) == {False, True}
    assert model.eval().dropout(x) is x
    assert pair()[1].dropout(x) is x


@pytest.mark.parametrize(("p", "kept"), [(1e-9, 2**16), (1 - 1e-9, 1)])
def test_dropout_at_its_limits(p, kept):
    mask = dropout_mask(torch.Size([5]), p, torch.float32)
    assert set(mask.tolist()) <= {0.0, 2**16 / kept}
    assert kept == 1 or mask.tolist() == [1.0] * 5
