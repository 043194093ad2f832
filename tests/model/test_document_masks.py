"""Documents in one row that are read as if each stood alone: every engine and form of attention."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.device import PRECISIONS
from model import bf16_attention, cuda_attention
from model.bf16_attention import BF16Attention
from model.config import ModelConfig
from model.cpu_layers import use_cpu_layers
from model.cuda_attention import use_cuda_attention
from model.loss import LossModule
from model.transformer_full import TransformerDecoder
from model.transformer_lite import TransformerDecoderLite
from model.transformer_micro import TransformerDecoderMicro
from tests.model.test_bf16_attention import heads, passes
from torchlite import functional as LF
from torchmicro.vector import mean
from training.setup import recompute_layers

CPU = torch.device("cpu")
B, T = 2, 13
BORDERS = [0, 1, 6, 13, 17, 26]  # of two rows: three documents, one of a single token, and two
OPTIONS = [
    {},
    {"positions": "learned", "norm_first": True, "final_norm": True, "activation": "gelu"},
    {"norm": "rms", "bias": False, "tie_embeddings": True, "embedding_norm": True},
]


def decoder(dtype=torch.float64, max_len=T, **options):
    torch.manual_seed(0)
    config = ModelConfig(23, 24, 3, 2, 40, max_len, **{"dropout": 0.0, "init_std": 0.2, **options})
    model = TransformerDecoder.from_config(config, dtype)
    if config.positions == "learned":
        torch.nn.init.normal_(model.pos_encoding, std=0.2)
    return model


def some_ids(count=B * T):
    return torch.randint(0, 23, (2, count), generator=torch.Generator().manual_seed(0))


def gradients(model, loss) -> dict:
    loss.backward()
    found = {name: p.grad.double().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found | {"loss": loss.detach().double()}


def each_alone(model, borders=BORDERS) -> dict:
    """Loss and gradients of the documents, a forward pass each."""
    ids, targets = some_ids(borders[-1])
    parts = pairwise(borders)
    losses = [LossModule(model)(ids[a:b][None], targets[a:b]) for a, b in parts]
    return gradients(model, torch.stack(losses).sum())


def together(model, borders=BORDERS, rows=B) -> dict:
    """The same of the documents in rows."""
    ids, targets = some_ids(borders[-1])
    documents = torch.tensor(borders, dtype=torch.int32)
    return gradients(model, LossModule(model)(ids.view(rows, -1), targets, None, documents))


def same(found, expected, close=1e-12):
    for name, value in expected.items():
        assert (found[name] - value).norm() <= close * (value.norm() + 1), name


def plain(model):
    return model


def on_cpu(model):
    use_cpu_layers(model)
    return model


def as_on_cuda(model):
    use_cuda_attention(model, cudnn=False)
    return model


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("form", [plain, on_cpu, as_on_cuda])
@pytest.mark.parametrize("recompute", [False, True])
def test_torch_is_as_each_alone(options, form, recompute):
    expected = each_alone(decoder(**options))
    model = form(decoder(**options))
    if recompute:
        recompute_layers(model)
    same(together(model), expected)
    # and there is something to tell apart
    assert abs(together(model, [0, T, 2 * T])["loss"] - expected["loss"]) > 1e-3


@pytest.mark.parametrize("options", OPTIONS)
def test_numpy_and_plain_python_are_as_each_alone(options):
    full = decoder(**options)
    expected = each_alone(full)
    weights = {name: p.detach().numpy() for name, p in full.named_parameters()}
    ids, targets = (part.numpy() for part in some_ids())

    lite = TransformerDecoderLite.from_config(full.config, "float64")
    lite.load_weights(weights)
    logits = lite(ids.reshape(B, T), documents=np.array(BORDERS))
    loss = LF.cross_entropy(logits.reshape(B * T, -1), targets) * (B * T)
    loss.backward()
    found = {name: torch.from_numpy(p.grad) for name, p in lite.named_parameters()}
    same(found | {"loss": torch.tensor(loss.item(), dtype=torch.float64)}, expected)

    micro = TransformerDecoderMicro.from_config(full.config)
    micro.load_weights(weights)
    losses = []
    for start, borders in ((0, [0, 1, 6, 13]), (T, [0, 4, 13])):
        logits = micro(ids[start : start + T].tolist(), documents=borders)
        losses += [x.cross_entropy(int(y)) for x, y in zip(logits, targets[start:], strict=False)]
    loss = mean(losses) * (B * T)
    loss.backward()
    found = {n: torch.tensor(g, dtype=torch.float64) for n, g in micro.gradients().items()}
    same(found | {"loss": torch.tensor(loss.data[0], dtype=torch.float64)}, expected, 1e-9)


@pytest.mark.parametrize("borders", [BORDERS, [0, 100, 150, 151, 300]])
def test_in_bf16_on_a_cpu_they_are_as_close_as_causal_attention(borders, monkeypatch):
    """Both forms that are written out there, for short sequences and for longer ones."""
    monkeypatch.setattr(bf16_attention, "HAS_FAST_PRODUCTS", True)
    monkeypatch.setattr(bf16_attention, "MAX_SCORES", 2**13)  # some heads at a time
    longest = borders[-1] // 2
    exact = each_alone(decoder(max_len=longest), borders)
    with PRECISIONS["bf16"].autocast(CPU):
        own = together(on_cpu(decoder(torch.float32, longest)), borders)
        alone = each_alone(on_cpu(decoder(torch.float32, longest)), borders)

    def distance(found):
        return sum(float((found[name] - exact[name]).square().sum()) for name in exact) ** 0.5

    assert distance(own) < 1.5 * distance(alone)


@pytest.mark.parametrize("T", [5, 150])
def test_written_out_for_bf16_it_equals_pytorchs_in_float64(T, monkeypatch):
    monkeypatch.setattr(bf16_attention, "MAX_SCORES", 2**12)
    inputs, gradient = heads(2, 3, T, 8, torch.float64)
    begins = torch.tensor([[t // 4 * 4 for t in range(T)], [t // 70 * 70 for t in range(T)]])
    place = torch.arange(T)
    allowed = (begins[:, :, None] <= place) & (place <= place[:, None])
    added = torch.zeros(2, 1, T, T, dtype=torch.float64).masked_fill(~allowed[:, None], -torch.inf)
    theirs = passes(
        lambda Q, K, V: F.scaled_dot_product_attention(Q, K, V, allowed[:, None]), inputs, gradient
    )
    ours = passes(lambda *x: BF16Attention.apply(*x, added), inputs, gradient)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    operator = bf16_attention.operator()
    for a, b in zip(passes(lambda *x: operator(*x, added), inputs, gradient), ours, strict=True):
        assert torch.equal(a, b)


def sequence_by_sequence(q, k, v, borders, _, longest, __, window_size):
    """What FlashAttention computes of sequences one after another, (N, H, D)."""
    assert window_size == (-1, 0) and borders.dtype == torch.int32
    borders = borders.tolist()
    parts = []
    for a, b in pairwise(borders):
        assert 0 < b - a <= longest
        part = (x[a:b].transpose(0, 1) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*part, is_causal=True).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("merged", [True, False])
def test_flash_attention_is_given_what_it_takes(merged, monkeypatch):
    """Its layout and borders, with a stand-in for the kernel, which only a GPU has."""
    from torch.nn.attention import varlen

    monkeypatch.setattr(cuda_attention, "has_kernel", lambda model, device: True)
    monkeypatch.setattr(varlen, "varlen_attn", sequence_by_sequence)
    model = decoder()
    use_cuda_attention(model, cudnn=True, merged=merged)
    recompute_layers(model)
    same(together(model), each_alone(decoder()))


def test_compiled_for_flash_attention_it_is_one_graph(monkeypatch):
    """For any number of documents."""
    monkeypatch.setattr(cuda_attention, "has_kernel", lambda model, device: True)
    model, graphs = as_on_cuda(decoder()), []

    def backend(graph, _):
        graphs.append(str(graph.code))
        return lambda *_: (torch.zeros(B, T, 24),)

    torch._dynamo.reset()
    compiled = torch.compile(model.hidden, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for borders in (BORDERS, [0, 4, 13, 26], [0, 13, 26]):
            documents = torch.tensor(borders, dtype=torch.int32)
            compiled(some_ids()[0].view(B, T), documents=documents)
    assert len(graphs) == 1 and graphs[0].count("torch_attn._varlen_attn(") == 2


def test_only_half_precision_on_cuda_has_the_kernel():
    assert not cuda_attention.has_kernel(decoder(), CPU)


def test_dropout_is_drawn_in_documents_too():
    model = on_cpu(decoder(dropout=0.3, attention_dropout=0.3))
    losses = [together(model)["loss"].item() for _ in range(2)]
    assert losses[0] != losses[1] and all(map(np.isfinite, losses))
