"""model/transformer_full.py against torch.nn, and what must hold for any decoder."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import UserError
from model.config import ModelConfig
from model.transformer_full import DecoderLayer, TransformerDecoder, create_positional_encoding
from tests.helpers import ROOT, as_gpt2
from training.config import load

SHAPES = {path.stem: load(path).model for path in sorted((ROOT / "configs").glob("*.toml"))}
VOCABULARY = {"microgpt": 27, "mini": 30, "lite": 9500, "full": 9500, "default": 2048}


def decoder(**options) -> TransformerDecoder:
    """A small decoder in float64, without dropout."""
    shape = {"vocab_size": 50, "d_model": 32, "n_heads": 4, "n_layers": 2, "d_ff": 48}
    config = ModelConfig(**{**shape, "max_len": 24, "dropout": 0.0, **options})
    return TransformerDecoder.from_config(config, torch.float64)


def reference_layer(layer: DecoderLayer, config: ModelConfig) -> nn.TransformerEncoderLayer:
    """torch's own layer with the weights of ours."""
    theirs = nn.TransformerEncoderLayer(
        config.d_model,
        config.n_heads,
        config.d_ff,
        dropout=0.0,
        activation=F.relu if config.activation == "relu" else nn.GELU("tanh"),
        layer_norm_eps=config.norm_eps,
        batch_first=True,
        norm_first=config.norm_first,
        dtype=torch.float64,
    )
    ours = layer.self_attn
    with torch.no_grad():
        theirs.self_attn.in_proj_weight.copy_(
            torch.cat([ours.W_q.weight, ours.W_k.weight, ours.W_v.weight])
        )
        theirs.self_attn.in_proj_bias.copy_(
            torch.cat([ours.W_q.bias, ours.W_k.bias, ours.W_v.bias])
        )
        for mine, its in (
            (ours.W_o, theirs.self_attn.out_proj),
            (layer.feed_forward.linear1, theirs.linear1),
            (layer.feed_forward.linear2, theirs.linear2),
            (layer.norm1, theirs.norm1),
            (layer.norm2, theirs.norm2),
        ):
            its.load_state_dict(mine.state_dict())
    return theirs


@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_layer_is_torchs_encoder_layer_with_a_causal_mask(norm_first, activation):
    torch.manual_seed(0)
    config = ModelConfig(1, 32, 4, 1, 48, dropout=0.0, norm_first=norm_first, activation=activation)
    layer = DecoderLayer(config).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    theirs = reference_layer(layer, config)
    x = torch.randn(3, 11, 32, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    mask = nn.Transformer.generate_square_subsequent_mask(11, dtype=torch.float64)
    y, y2 = layer(x), theirs(x2, src_mask=mask, is_causal=True)
    torch.testing.assert_close(y, y2, rtol=0, atol=1e-10)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (y2 * weight).sum().backward()
    torch.testing.assert_close(x.grad, x2.grad, rtol=0, atol=1e-10)
    mine = layer.self_attn
    grads = torch.cat([mine.W_q.weight.grad, mine.W_k.weight.grad, mine.W_v.weight.grad])
    torch.testing.assert_close(grads, theirs.self_attn.in_proj_weight.grad, rtol=0, atol=1e-10)
    for a, b in (
        (mine.W_o.weight, theirs.self_attn.out_proj.weight),
        (layer.feed_forward.linear1.weight, theirs.linear1.weight),
        (layer.feed_forward.linear2.bias, theirs.linear2.bias),
        (layer.norm1.weight, theirs.norm1.weight),
        (layer.norm2.bias, theirs.norm2.bias),
    ):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10)


def test_a_pre_norm_decoder_with_learned_positions_is_gpt2():
    torch.manual_seed(0)
    ours = decoder(
        positions="learned", norm_first=True, final_norm=True, activation="gelu",
        scale_embedding=False, tie_embeddings=True, init_std=0.3,
    )  # fmt: skip
    theirs = as_gpt2(ours)
    ids = torch.randint(0, 50, (2, 24))
    torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SHAPES)
def test_changing_a_token_never_changes_logits_before_it(name):
    torch.manual_seed(0)
    config = SHAPES[name]
    model = TransformerDecoder.from_config(
        ModelConfig(**{**vars(config), "vocab_size": 40, "d_model": 48}), torch.float64
    ).eval()
    T = min(12, config.max_len)
    ids = torch.randint(0, 40, (1, T))
    with torch.no_grad():
        before = model(ids)
        for t in range(T):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 1) % 40
            after = model(changed)
            torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
            assert not torch.allclose(after[:, t:], before[:, t:])


@pytest.mark.parametrize("name", SHAPES)
def test_cached_and_uncached_greedy_text_agree(name):
    torch.manual_seed(0)
    shape = {**vars(SHAPES[name]), "vocab_size": 40, "d_model": 48, "init_std": 0.3}
    model = TransformerDecoder.from_config(ModelConfig(**shape), torch.float64).eval()
    ids = torch.randint(0, 40, (1, 5))
    cached = model.generate(ids[0].tolist(), start_id=None, end_id=None, max_len=10, temperature=0)
    with torch.no_grad():
        for _ in range(10):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    assert cached == ids[0, 5:].tolist()


@pytest.mark.parametrize("name", SHAPES)
def test_the_first_loss_is_near_ln_of_the_vocabulary(name):
    torch.manual_seed(1)
    size = VOCABULARY.get(name, 69)
    model = TransformerDecoder.from_config(
        ModelConfig(**{**vars(SHAPES[name]), "vocab_size": size, "dropout": 0.0})
    )
    T = min(64, model.max_len)
    ids, targets = torch.randint(0, size, (2, 8, T))
    with torch.no_grad():
        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten()).item()
    assert abs(loss / math.log(size) - 1) < 0.05


def test_sizes_of_the_shipped_configurations():
    def size(name, vocab_size):
        config = ModelConfig(**{**vars(SHAPES[name]), "vocab_size": vocab_size})
        return TransformerDecoder.from_config(config).num_parameters()

    assert size("microgpt", 27) == 4192
    assert size("mini", 30) == pytest.approx(0.8e6, rel=0.03)
    assert size("lite", 9500) == pytest.approx(3.4e6, rel=0.03)
    assert size("full", 9500) == pytest.approx(9.7e6, rel=0.03)
    assert size("default", 2048) == pytest.approx(1.28e6, rel=0.03)


def test_positions_asked_for_are_the_same_logits():
    model, ids = decoder(), torch.randint(0, 50, (3, 7))
    flat = torch.tensor([0, 5, 20])
    torch.testing.assert_close(model(ids, target_indices=flat), model(ids).flatten(0, 1)[flat])


def test_a_mask_given_takes_the_place_of_the_causal_one():
    model, ids = decoder(), torch.randint(0, 50, (2, 7))
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(model(ids, causal), model(ids))
    assert not torch.allclose(model(ids, torch.ones_like(causal)), model(ids))


def test_sinusoidal_table_against_the_formula():
    table = create_positional_encoding(50, 16)
    for pos in (0, 1, 49):
        for i in range(8):
            angle = pos / 10000 ** (2 * i / 16)
            assert table[pos, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-12)
            assert table[pos, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-12)


def test_initialisation_is_where_it_is_said_to_be():
    torch.manual_seed(0)
    model = decoder(d_model=128, d_ff=512, n_layers=8, norm_first=True, vocab_size=500)
    assert model.embed.weight.std().item() == pytest.approx(0.02, rel=0.05)
    layer = model.layers[0]
    assert layer.self_attn.W_q.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.self_attn.W_o.weight.std().item() == pytest.approx(0.005, rel=0.05)
    assert layer.feed_forward.linear2.bias.abs().max() == 0
    assert (layer.norm1.weight == 1).all()


def test_tied_weights_are_one_matrix_stored_once():
    model = decoder(tie_embeddings=True)
    assert model.output.weight is model.embed.weight
    names = [name for name, _ in model.named_parameters()]
    assert "embed.weight" in names
    assert not any(name.startswith("output") for name in names)


def test_weights_of_another_shape_are_refused():
    weights = {name: p.detach().numpy() for name, p in decoder(d_ff=64).named_parameters()}
    with pytest.raises(UserError, match=r"linear1"):
        decoder().load_weights(weights)


def test_too_long_a_sequence_is_refused():
    with pytest.raises(UserError, match=r"25 tokens are more than model.max_len = 24"):
        decoder()(torch.zeros(1, 25, dtype=torch.long))


def test_flops_counts_every_matrix_once():
    model = decoder()
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 48) + 32 * 50
    assert model.flops_per_token(10) == 6 * matrices + 12 * 2 * 32 * 10
