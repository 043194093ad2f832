"""The decoder on a GPU beside the same decoder on the CPU."""

from dataclasses import replace

import pytest
import torch

from common.device import choose_device
from model.config import ModelConfig
from model.transformer_full import TransformerDecoder

SHAPE = ModelConfig(97, 64, 4, 2, 256, 64, 0.0)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("norm_first", [True, False])
def test_logits_are_the_cpus(dtype, bound, norm_first):
    torch.manual_seed(0)
    shape = replace(SHAPE, norm_first=norm_first, final_norm=norm_first)
    model = TransformerDecoder.from_config(shape, dtype).eval()
    ids = torch.randint(0, shape.vocab_size, (3, 41))
    with torch.no_grad():
        expected = model(ids)
        device = choose_device("cuda")
        found = model.to(device)(ids.to(device)).cpu()
    torch.testing.assert_close(found, expected, rtol=0, atol=bound)
