"""model/transformer_micro.py against the PyTorch decoder, in float64."""

import json
import math
import statistics
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save as to_safetensors

from checkpoint.writer import save
from common.errors import UserError
from model.config import ModelConfig
from model.transformer_full import TransformerDecoder
from model.transformer_micro import TransformerDecoderMicro, create_positional_encoding
from tests.helpers import ROOT
from torchmicro.optim import Adam
from torchmicro.vector import Vector, mean
from training.config import load

SHAPE = {"vocab_size": 11, "d_model": 8, "n_heads": 2, "n_layers": 2, "d_ff": 12, "max_len": 7}
MICROGPT = load(ROOT / "configs" / "microgpt.toml").model

# every value of every option, and the shipped combinations
OPTIONS = [
    {},
    {"norm_first": True, "final_norm": True},
    {"norm_first": True, "positions": "learned", "activation": "gelu", "embedding_norm": True},
    {"positions": "learned", "tie_embeddings": True, "scale_embedding": False},
    {"norm": "rms", "final_norm": True, "embedding_norm": True, "bias": False},
    {"norm": "rms", "norm_first": True, "tie_embeddings": True, "norm_eps": 0.1},
    {"norm": "none", "activation": "gelu", "bias": False, "n_heads": 1},
    {"norm_eps": 1e-3, "n_heads": 8, "n_layers": 1, "d_ff": 1, "bias": False},
    {"d_model": 2, "n_heads": 1, "max_len": 6, "vocab_size": 2},
    {"d_model": 1, "n_heads": 1, "positions": "learned", "norm": "none", "vocab_size": 1},
    {**vars(MICROGPT), "vocab_size": 11, "max_len": 8, "d_ff": 16},
]
IDS = [3, 1, 4, 1, 5, 9]


def pair(unfused=False, **options):
    """A PyTorch decoder in float64 with random weights everywhere, and ours with the same."""
    torch.manual_seed(0)
    config = ModelConfig(**{**SHAPE, "dropout": 0.0, **options})
    full = TransformerDecoder.from_config(config, torch.float64)
    for parameter in full.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    micro = TransformerDecoderMicro.from_config(config, unfused=unfused)
    micro.load_weights({name: p.detach().numpy() for name, p in full.named_parameters()})
    return full, micro


def ids_for(model, length=6):
    return [i % model.config.vocab_size for i in IDS][:length]


def close(ours, theirs):
    """Equal to 1e-9 of the largest, or, as the gradient of W_k's bias, 0 but for rounding."""
    ours = torch.tensor(ours, dtype=torch.float64)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max().clamp(min=1e-5)


@pytest.mark.parametrize("unfused", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(map(str, options)))
def test_logits_and_every_gradient_are_those_of_pytorch(options, unfused):
    full, micro = pair(unfused, **options)
    ids = ids_for(micro)
    targets = ids[1:] + ids[:1]
    logits = full(torch.tensor([ids]))[0]
    F.cross_entropy(logits, torch.tensor(targets)).backward()
    ours = micro(ids)
    close([row.data for row in ours], logits)
    mean([row.cross_entropy(t) for row, t in zip(ours, targets, strict=True)]).backward()
    gradients = micro.gradients()
    assert gradients.keys() == dict(full.named_parameters()).keys()
    for name, parameter in full.named_parameters():
        close(gradients[name], parameter.grad)
    assert micro.num_parameters() == full.num_parameters()


@pytest.mark.parametrize("unfused", [False, True])
def test_masks_and_positions(unfused):
    full, micro = pair(unfused)
    mask = [[s in (t, 0) or (s + t) % 3 == 0 for s in range(6)] for t in range(6)]
    theirs = full(torch.tensor([IDS]), torch.tensor(mask))[0]
    close([row.data for row in micro(IDS, mask)], theirs)
    close([row.data for row in micro(IDS, mask, target_indices=[4, 0])], theirs[[4, 0]])
    causal = [[s <= t for s in range(6)] for t in range(6)]
    assert [a.data for a in micro(IDS, causal)] == [b.data for b in micro(IDS)]


@pytest.mark.parametrize("options", OPTIONS[:4], ids=lambda options: " ".join(map(str, options)))
@pytest.mark.parametrize("chunks", [[1] * 6, [6], [2, 1, 3]])
def test_cached_decoding_is_the_full_pass(options, chunks):
    for unfused in (False, True):
        _, micro = pair(unfused, **options)
        with micro.tape.paused():
            expected = [row.data for row in micro(IDS)]
        cache, read = micro.new_cache(), 0
        for _ in range(2):
            for n in chunks:
                logits = micro.next_logits(cache, IDS[read : read + n])
                read += n
                assert cache.length == read
                assert logits == pytest.approx(expected[read - 1], rel=1e-12)
            cache.clear()
            read = 0
        assert len(micro.tape) == 0


def test_generated_text_is_that_of_pytorch():
    full, micro = pair(norm_first=True)
    for seed in range(3):  # 12 new tokens: the window of 7 moves
        settings = {"end_id": None, "max_len": 12, "temperature": 0.8, "top_k": 5, "seed": seed}
        assert micro.generate([3, 1], **settings) == full.generate([3, 1], **settings)
    assert micro.generate([3], temperature=0, start_id=None, end_id=None) == full.generate(
        [3], temperature=0, start_id=None, end_id=None
    )


@pytest.mark.parametrize("unfused", [False, True])
def test_ten_steps_of_microgpt_are_those_of_pytorch(unfused):
    full, micro = pair(unfused, **{**vars(MICROGPT), "vocab_size": 27, "d_ff": 16})
    theirs = torch.optim.Adam(full.parameters(), 0.01, (0.85, 0.99))
    ours = Adam(micro.parameters(), 0.85, 0.99)
    for step in range(10):
        ids = [26, *((7 * step + k * k) % 26 for k in range(3 + step % 3)), 26]
        theirs.zero_grad()
        loss = F.cross_entropy(full(torch.tensor([ids[:-1]]))[0], torch.tensor(ids[1:]))
        loss.backward()
        theirs.step()
        ours.zero_grad()
        logits = micro(ids[:-1])
        own = mean([row.cross_entropy(t) for row, t in zip(logits, ids[1:], strict=True)])
        own.backward()
        ours.step(0.01)
        assert own.data[0] == pytest.approx(loss.item(), rel=1e-11)
    for name, parameter in full.named_parameters():
        close(micro.state_dict()[name], parameter)


def test_sizes_of_the_tape_for_microgpt():
    config = ModelConfig(**{**vars(MICROGPT), "vocab_size": 27})
    nodes = []
    for unfused in (False, True):
        micro = TransformerDecoderMicro.from_config(config, unfused)
        assert micro.num_parameters() == 4192
        micro([26, 0, 1, 2, 3, 4, 5])
        nodes.append(len(micro.tape))
    assert nodes[0] < 300
    assert 50_000 < nodes[1] < 70_000


@pytest.mark.parametrize("options", [{"dropout": 0.4}, {"attention_dropout": 0.4}])
def test_dropout_while_training_only(options):
    results = []
    for unfused in (False, True):
        full, micro = pair(unfused, **options)
        training = [row.data for row in micro(IDS)]
        assert training != [row.data for row in micro(IDS)]
        micro.random.seed(3)
        mean([row.cross_entropy(0) for row in micro(IDS)]).backward()
        results.append(micro.gradients())
        assert micro.eval() is micro
        close([row.data for row in micro(IDS)], full.eval()(torch.tensor([IDS]))[0])
        micro.train()
        assert training != [row.data for row in micro(IDS)]
    for name, gradient in results[0].items():  # with the same dice, both forms
        close(gradient, torch.tensor(results[1][name], dtype=torch.float64))


def test_dropout_stands_where_pytorch_has_it():
    micro = TransformerDecoderMicro(**SHAPE, dropout=0.1, attention_dropout=0.1)
    micro(IDS)
    widths = [len(out) for back, out, _ in micro.tape.records if back is Vector.dropout_backward]
    T, L, H = 6, 2, 2
    assert widths[:T] == [8] * T  # on the embedding, before anything of the first layer
    assert widths.count(8) == T * (1 + 2 * L)  # and on both branches of each layer
    assert len(widths) - widths.count(8) == T * L * H  # and on the weights, from 1 to 6 of them


def test_attention_dropout_keeps_the_mean():
    config = ModelConfig(**{**SHAPE, "n_layers": 1, "dropout": 0.0, "attention_dropout": 0.3})
    attention = TransformerDecoderMicro.from_config(config, seed=1).layers[0].self_attn
    vector = attention.W_q.weight[0].__class__
    x = [vector([1.0] * 8, attention.W_q.weight[0].tape) for _ in range(4)]
    draws = [attention(x)[3].data[0] for _ in range(1500)]
    attention.eval()
    error = statistics.stdev(draws) / math.sqrt(len(draws))
    assert error > 0
    assert abs(statistics.fmean(draws) - attention(x)[3].data[0]) < 4 * error


def test_weights_go_out_as_they_came_in():
    _, micro = pair(positions="learned", tie_embeddings=True)
    weights = json.loads(json.dumps(micro.state_dict()))  # nested lists of floats
    assert "embed.weight" in weights and "pos_encoding" in weights
    assert not any(name.startswith("output") for name in weights)
    again = TransformerDecoderMicro.from_config(micro.config, seed=9)
    assert again.state_dict() != weights
    again.load_weights(weights)
    assert again.state_dict() == weights
    assert again.output.weight is again.embed.weight
    weights["embed.weight"][0][0] = 99.0
    assert again.embed.weight[0].data[0] != 99.0


def test_weights_of_another_shape_are_refused():
    _, micro = pair()
    weights = micro.state_dict()
    name = "layers.0.feed_forward.linear1.weight"
    rows = weights[name]
    narrow, ragged = [row[1:] for row in rows], [rows[0][1:], *rows[1:]]
    deep, deeper = [[row] for row in rows], [[[number] for number in row] for row in rows]
    for wrong in (rows[1:], narrow, ragged, deep, deeper, [1.0] * 12, 1.0):
        with pytest.raises(
            UserError, match=r"layers\.0\.feed_forward\.linear1\.weight does not have"
        ):
            micro.load_weights({**weights, name: wrong})
    for bias in ([[0.0]] * 11, [[0.0] * 11], [0.0] * 10):
        with pytest.raises(UserError, match=r"output\.bias does not have"):
            micro.load_weights({**weights, "output.bias": bias})
    with pytest.raises(UserError, match="the model has no extra"):
        micro.load_weights({**weights, "extra": [1.0]})
    del weights["embed.weight"]
    with pytest.raises(UserError, match=r"embed\.weight is missing"):
        micro.load_weights(weights)


def test_a_checkpoint_is_read(tmp_path):
    full, _ = pair(norm_first=True, tie_embeddings=True)
    full = full.float()
    weights = {name: p.detach() for name, p in full.named_parameters()}
    config = json.dumps({"model": vars(full.config), "data": {}}).encode()
    files = {"config.json": config, "state.json": b'{"step": 1}'}
    path = save(tmp_path, 1, {**files, "model.safetensors": to_safetensors(weights)})
    micro = TransformerDecoderMicro.from_checkpoint(path)
    assert not micro.training
    theirs = full.double()(torch.tensor([IDS]))[0]
    assert torch.allclose(torch.tensor([r.data for r in micro(IDS)]).double(), theirs, atol=1e-5)


def test_initialisation_is_where_it_is_said_to_be():
    shape = {**SHAPE, "d_model": 64, "d_ff": 128, "n_layers": 8, "vocab_size": 100}
    micro = TransformerDecoderMicro(**shape, norm_first=True)

    def std(matrix):
        return statistics.pstdev(v for row in matrix for v in row.data)

    assert std(micro.embed.weight) == pytest.approx(0.02, rel=0.05)
    layer = micro.layers[0]
    assert std(layer.self_attn.W_q.weight) == pytest.approx(0.02, rel=0.05)
    assert std(layer.self_attn.W_o.weight) == pytest.approx(0.005, rel=0.05)
    assert std(layer.feed_forward.linear2.weight) == pytest.approx(0.005, rel=0.05)
    post_norm = TransformerDecoderMicro(**shape).layers[0].self_attn.W_o.weight
    assert std(post_norm) == pytest.approx(0.02, rel=0.05)
    assert not any(layer.feed_forward.linear2.bias[0].data)
    assert set(layer.norm1.weight[0].data) == {1.0} and not any(layer.norm1.bias[0].data)
    same, other = (TransformerDecoderMicro(**shape, norm_first=True, seed=s) for s in (0, 1))
    assert same.state_dict() == micro.state_dict() != other.state_dict()
    loss = mean([row.cross_entropy(0) for row in micro(list(range(7)))])
    assert loss.data[0] == pytest.approx(math.log(100), rel=0.05)


def test_the_sinusoidal_table_is_pytorchs():
    full, _ = pair()
    close(create_positional_encoding(7, 8), full.pos_encoding)


def test_what_it_cannot_read_is_refused():
    micro = TransformerDecoderMicro(**SHAPE)
    with pytest.raises(UserError, match=r"8 tokens are more than model.max_len = 7"):
        micro([0] * 8)
    cache = micro.new_cache()
    micro.next_logits(cache, [0] * 5)
    with pytest.raises(UserError, match=r"8 tokens are more than model.max_len = 7"):
        micro.next_logits(cache, [0] * 3)
    for i in (-1, 11):
        with pytest.raises(IndexError, match=f"id {i} is not one of the 11"):
            micro([0, i])
    with pytest.raises(UserError, match="vocab_size = 0 must be at least 1"):
        TransformerDecoderMicro(0)
    with pytest.raises(UserError, match="multiple of n_heads"):
        TransformerDecoderMicro(5, d_model=6, n_heads=4)


def test_neither_numpy_nor_torch_is_loaded():
    code = """
import sys
before = set(sys.modules)
from model.transformer_micro import TransformerDecoderMicro
from torchmicro.optim import Adam
from torchmicro.vector import mean
model = TransformerDecoderMicro(5)
mean([row.cross_entropy(1) for row in model([2, 1, 2])]).backward()
Adam(model.parameters()).step(0.1)
model.generate([2], max_len=3)
print(*{name.split(".")[0] for name in set(sys.modules) - before})
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "model" in loaded
    assert loaded <= set(sys.stdlib_module_names) | {
        "checkpoint",
        "common",
        "data",
        "generation",
        "model",
        "torchmicro",
    }
