"""What TensorBoard shows of a model besides curves: samples, attention maps, positions."""

import math
from dataclasses import replace
from typing import cast

import numpy as np
import torch

from data.batches import Examples, evaluation_batches
from data.dataset import Dataset
from data.mixture import MixedExamples
from data.prompt_format import end_id, prompt_ids
from data.slots import Slots
from generation.batched import generate
from generation.sampling import Sampling
from model.transformer_full import DecoderLayer, TransformerDecoder

PAIR_SAMPLES, LINE_SAMPLES = 3, 10  # written at each evaluation


class Sampler:
    """Text written by the model as it is now: after held-out prompts, or freely."""

    def __init__(self, dataset: Dataset, rules: Sampling, seed: int):
        self.dataset, self.rules, self.seed = dataset, rules, seed
        if dataset.kind == "pairs":
            self.rules = replace(rules, greedy=True)  # what it thinks, rather than what it might
            held_out = dataset.held_out[:PAIR_SAMPLES]
            self.shown = [(pair["prompt"], pair["completion"]) for pair in held_out]
        else:
            self.shown = [("", "")] * (LINE_SAMPLES if dataset.kind == "lines" else 1)
        tokenizer = dataset.tokenizer
        self.slots = [Slots(prompt, dataset.slots) for prompt, _ in self.shown]
        self.prompts = [
            prompt_ids(dataset.kind, tokenizer, slots.prompt, dataset.start_token)
            for slots in self.slots
        ]

    def __call__(self, model: TransformerDecoder) -> list[str]:
        """One text for each of `shown`. Leaves the model in the mode it was in."""
        kind, tokenizer = self.dataset.kind, self.dataset.tokenizer
        end = end_id(kind, tokenizer)
        rows = generate(model, self.prompts, self.rules, seed=self.seed, end_id=end)
        return [
            slots.show(tokenizer.decode(row)) for slots, row in zip(self.slots, rows, strict=True)
        ]

    def lines(self, texts: list[str]) -> list[str]:
        """For people: the text, for pairs with its prompt and the true completion."""
        if self.dataset.kind != "pairs":
            return texts
        return [
            f"{prompt}\n  wrote: {text}\n  true:  {true}"
            for (prompt, true), text in zip(self.shown, texts, strict=True)
        ]


def as_markdown(texts: list[str]) -> str:
    """Texts as TensorBoard shows them unchanged."""
    return "\n\n".join("\n".join(f"    {line}" for line in t.splitlines()) for t in texts)


def attention_image(model: TransformerDecoder, examples: Examples) -> np.ndarray:
    """Attention maps of a validation example: a row a layer, a column a head. (h, w, 3) bytes."""
    ids = torch.from_numpy(example_ids(examples)).to(model.embed.weight.device)
    model.eval()
    maps = attention_maps(model, ids)
    model.train()
    return tile(maps, scale=max(1, 128 // ids.shape[1]))


def positions_image(model: TransformerDecoder) -> np.ndarray:
    """The table of positions: a row a position, a column a dimension. (h, w, 3) bytes."""
    table = model.pos_encoding.detach().float().cpu().numpy()
    span = float(np.abs(table).max()) or 1.0
    return color_map(0.5 + table / (2 * span)).repeat(2, 0).repeat(2, 1)


def example_ids(examples: Examples, longest: int = 32) -> np.ndarray:
    """The ids (1, T) of one validation example, for its attention maps."""
    if isinstance(examples, MixedExamples):
        examples = next(iter(examples.parts.values()))
    batch = next(evaluation_batches(examples, 1))
    if not examples.are_windows:  # the shortest come first; one from the middle says more
        middle = np.argsort(examples.lengths, kind="stable")[examples.count // 2 :][:1]
        batch = examples.batch(middle)
    if batch.documents is not None:  # the first alone: the maps do not end at borders
        longest = min(longest, int(batch.documents[1]))
    return batch.ids[:1, :longest]


@torch.no_grad()
def attention_maps(model: TransformerDecoder, ids: torch.Tensor) -> np.ndarray:
    """Attention weights of one sequence (1, T): (L, H, T, T), written out from the definition."""
    weights, hooks = [], []

    def record(attention, inputs):
        x = inputs[0]
        B, T, _ = x.shape
        Q, K = (
            W(x).view(B, T, attention.n_heads, -1).transpose(1, 2)
            for W in (attention.W_q, attention.W_k)
        )  # (B, H, T, D)
        scores = (Q @ K.transpose(2, 3)).float() / math.sqrt(Q.shape[-1])  # (B, H, T, T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
        weights.append(scores.masked_fill(future, -math.inf).softmax(-1)[0].cpu())

    for layer in model.layers:
        hooks.append(cast(DecoderLayer, layer).self_attn.register_forward_pre_hook(record))
    try:
        model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(weights).numpy()


def tile(maps: np.ndarray, scale: int) -> np.ndarray:
    """(rows, columns, T, T) maps in [0, 1] as one picture (height, width, 3), dark to bright."""
    maps = maps.repeat(scale, 2).repeat(scale, 3)
    maps = np.pad(maps, [(0, 0), (0, 0), (2, 2), (2, 2)], constant_values=0.5)
    return color_map(np.concatenate(np.concatenate(maps, 1), 1))


def color_map(values: np.ndarray) -> np.ndarray:
    """(h, w) in [0, 1] to (h, w, 3) bytes: black, blue, orange, white."""
    stops = np.array([[0, 0, 4], [40, 60, 140], [235, 130, 60], [255, 252, 235]], float)
    at = np.linspace(0, 1, len(stops))
    values = np.clip(np.nan_to_num(values), 0, 1)  # of a model that has diverged
    channels = [np.interp(values, at, stops[:, c]) for c in range(3)]
    return np.stack(channels, -1).astype(np.uint8)
