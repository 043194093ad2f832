"""model/cuda_attention.py beside the decoder's own attention, on whatever device there is."""

import pytest
import torch

from generation.batched import generate
from generation.sampling import Sampling
from model.config import ModelConfig
from model.cuda_attention import prefers_cudnn, use_cuda_attention
from model.loss import LossModule
from model.transformer_full import TransformerDecoder
from training.setup import recompute_layers


def pair(dtype, cudnn=True, **options):
    """The same decoder twice, once with this attention."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        config = ModelConfig(23, 24, 3, 2, 40, 16, **{"dropout": 0.0, **options})
        models.append(TransformerDecoder.from_config(config, dtype))
    use_cuda_attention(models[1], cudnn)
    return models


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"norm_first": True, "final_norm": True}])
@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_are_the_same(options, recompute):
    plain, ours = pair(torch.float64, **options)
    assert plain.state_dict().keys() == ours.state_dict().keys()
    if recompute:
        recompute_layers(ours)
    ids, targets = torch.randint(0, 23, (3, 13)), torch.randint(0, 23, (39,))
    losses = [LossModule(model)(ids, targets) for model in (plain, ours)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=0, atol=1e-12)
    for (name, a), b in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-12, msg=name)


def test_dropout_draws_the_same_numbers():
    plain, ours = pair(torch.float64, dropout=0.3, attention_dropout=0.3)
    ids, targets = torch.randint(0, 23, (3, 13)), torch.randint(0, 23, (39,))
    losses = []
    for model in (plain, ours):
        torch.manual_seed(1)
        losses.append(LossModule(model)(ids, targets).item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


def test_generating_is_the_same_with_a_cache_and_rows_of_different_lengths():
    plain, ours = pair(torch.float64)
    prompts = [[3, 4, 5], [6], [7, 8, 9, 10, 11]]
    texts = [generate(m, prompts, Sampling(max_new_tokens=20), seed=3) for m in (plain, ours)]
    assert texts[0] == texts[1]


def test_a_layer_is_one_product_and_one_attention_less_two():
    """Seven operations of a forward pass are matrix products without it, five with it."""
    counts = []
    for model in pair(torch.float32, bias=False):
        with torch.profiler.profile() as profile, torch.no_grad():
            model.hidden(torch.randint(0, 23, (2, 8)))
        counts.append(sum(e.count for e in profile.key_averages() if e.key == "aten::linear"))
    assert counts == [2 * 6, 2 * 4]


def test_one_graph_with_it():
    model = pair(torch.float32)[1]
    torch._dynamo.reset()
    found = torch._dynamo.explain(LossModule(model).model.hidden)(torch.randint(0, 23, (2, 8)))
    assert (found.graph_count, found.graph_break_count) == (1, 0)


def test_cudnn_is_for_hopper_and_one_shape():
    assert not prefers_cudnn(torch.device("cpu"), fixed_shapes=True)
