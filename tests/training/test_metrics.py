"""training/metrics.py: the record is cut back on a resume; attention maps are attention."""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.transformer_full import TransformerDecoder
from training.metrics import cut_back
from training.visuals import attention_maps, color_map, tile


def test_cut_back(tmp_path):
    file = tmp_path / "metrics.jsonl"
    records = [{"step": s, "loss/train": 1.0} for s in range(1, 7)]
    records.insert(4, {"step": 4, "loss/val": 2.0})
    text = "".join(json.dumps(r) + "\n" for r in records)
    file.write_text(text + '{"step": 7, "loss/tr')  # killed while it wrote
    kept = cut_back(file, 4, redo_val=False)
    assert kept == records[:5]
    assert [json.loads(line) for line in file.read_text().splitlines()] == kept
    assert cut_back(file, 4, redo_val=True) == records[:4]
    assert cut_back(tmp_path / "none", 4, redo_val=True) == []


def test_attention_maps_are_the_weights_that_attention_uses(monkeypatch):
    torch.manual_seed(0)
    config = ModelConfig(20, 16, 2, 2, 32, 12, 0.0, init_std=0.5)
    model = TransformerDecoder.from_config(config, torch.float64).eval()
    values = []
    attend = F.scaled_dot_product_attention

    def spy(Q, K, V, *rest, **more):
        y = attend(Q, K, V, *rest, **more)
        values.append((V, y))
        return y

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    maps = attention_maps(model, torch.randint(0, 20, (1, 9)))
    assert maps.shape == (2, 2, 9, 9)
    for weights, (V, y) in zip(maps, values, strict=True):
        np.testing.assert_allclose(torch.tensor(weights).double() @ V[0], y[0], atol=1e-6)
    assert np.triu(maps, 1).max() == 0


def test_pictures():
    maps = np.zeros((2, 3, 4, 4))
    assert tile(maps, scale=2).shape == (2 * 12, 3 * 12, 3)
    shades = color_map(np.array([[0.0, 0.5, 1.0, math.inf]])).astype(int).sum(-1)[0]
    assert shades[0] < shades[1] < shades[2] == shades[3]
