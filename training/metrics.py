"""What a run tells: `metrics.jsonl`, which is the record, and TensorBoard, which shows it.

A resumed run cuts both back to the step it starts from, so that no point stands twice.
"""

import json
import math
import os
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from data.tokenizer import clean_text
from training.config import Config, flatten, to_toml
from training.device import synchronize
from training.run import read_records

CHARTS = {  # custom scalars: curves that belong on one chart
    "loss": {"train and validation": ["Multiline", ["loss/train", "loss/val"]]},
    "time": {"share of a step": ["Multiline", ["time/.*"]]},
}


class Metrics:
    """Writes scalars, texts, images and histograms of a run's folder."""

    def __init__(self, run: Path, config: Config, resumed_at: int | None, redo_val: bool = False):
        self.file = run / "metrics.jsonl"
        kept = cut_back(self.file, resumed_at, redo_val)
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=resumed_at)
        self.jsonl = open(self.file, "a", encoding="utf-8")  # noqa: SIM115, closed in close()
        if not resumed_at:  # also where a resume at step 0 hides what stood there
            self.board.add_custom_scalars(CHARTS)
            text = clean_text(to_toml(config))
            self.board.add_text("configuration", f"```toml\n{text}\n```")
            # in the run's own folder: SummaryWriter.add_hparams would make a run of its own
            settings, session, _ = hparams(hyperparameters(config), {"loss/val": math.nan})
            self.board.file_writer.add_summary(settings)
            self.board.file_writer.add_summary(session)
        for record in kept:  # what purge_step hides of the step itself
            if record["step"] == resumed_at:
                self.show(record)

    def scalars(self, step: int, values: dict[str, float]):
        """One line of metrics.jsonl, and the same values in TensorBoard."""
        # JSON has no infinity, which is what a skipped fp16 step's gradient may have
        record = {"step": step, **{k: v for k, v in values.items() if math.isfinite(v)}}
        self.jsonl.write(json.dumps(record) + "\n")
        self.jsonl.flush()
        self.show(record)

    def show(self, record: dict):
        for tag, value in record.items():
            if tag != "step":
                self.board.add_scalar(tag, value, record["step"])

    def histograms(self, step: int, model: torch.nn.Module):
        """Weights and gradients, parameter by parameter."""
        for name, parameter in model.named_parameters():
            self.board.add_histogram(f"weights/{name}", parameter.detach().float(), step)
            if parameter.grad is not None:
                self.board.add_histogram(f"gradients/{name}", parameter.grad.float(), step)

    def flush(self):
        """Everything so far is on disk when a checkpoint that builds on it is published."""
        self.board.flush()
        self.jsonl.flush()
        os.fsync(self.jsonl.fileno())

    def close(self):
        self.flush()
        self.board.close()
        self.jsonl.close()


def hyperparameters(config: Config) -> dict:
    """The settings that TensorBoard's HParams table compares between runs."""
    flat = flatten(config)
    return {
        key: clean_text(value) if isinstance(value, str) else value
        for key, value in flat.items()
        if not key.startswith(("sample.", "data.cache"))
    }


def cut_back(file: Path, step: int | None, redo_val: bool) -> list[dict]:
    """Removes the records after `step`, and its validation if that is done again. Returns the rest.

    A last line that a killed process left half written goes too.
    """
    if step is None or not file.exists():
        return []
    kept = [
        record
        for record in read_records(file)
        if record["step"] < step
        or (record["step"] == step and not (redo_val and "loss/val" in record))
    ]
    beside = file.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
    os.replace(beside, file)
    return kept


class Clock:
    """Seconds spent in each part of a step; `on` says whether waiting for the device is worth it.

    A CPU's parts are timed always. On a GPU work runs behind the program's back, so its parts are
    only known where the program waits for it, which costs time: only in the steps that are logged.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on = True
        self.seconds: dict[str, float] = {}
        self.restart()

    def restart(self):
        """Begins a new stretch of training."""
        self.seconds = {}
        self.began = time.perf_counter()
        self.paused = 0.0

    @contextmanager
    def part(self, name: str):
        """Times a part of the step."""
        if not self.on:
            yield
            return
        synchronize(self.device)
        began = time.perf_counter()
        yield
        synchronize(self.device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

    @contextmanager
    def pause(self):
        """Takes evaluating and saving out of the time training takes."""
        began = time.perf_counter()
        yield
        self.paused += time.perf_counter() - began

    def training(self) -> float:
        """Seconds of training since restart()."""
        synchronize(self.device)
        return time.perf_counter() - self.began - self.paused

    def shares(self) -> dict[str, float]:
        """The timed parts as shares of their sum."""
        total = sum(self.seconds.values()) or 1.0
        return {f"time/{name}": value / total for name, value in self.seconds.items()}


# Pictures ---------------------------------------------------------------------------------------


@torch.no_grad()
def attention_maps(model, ids: torch.Tensor) -> np.ndarray:
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
        hooks.append(layer.self_attn.register_forward_pre_hook(record))
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
    return colour(np.concatenate(np.concatenate(maps, 1), 1))


def colour(values: np.ndarray) -> np.ndarray:
    """(h, w) in [0, 1] to (h, w, 3) bytes: black, blue, orange, white."""
    stops = np.array([[0, 0, 4], [40, 60, 140], [235, 130, 60], [255, 252, 235]], float)
    at = np.linspace(0, 1, len(stops))
    channels = [np.interp(np.clip(values, 0, 1), at, stops[:, c]) for c in range(3)]
    return np.stack(channels, -1).astype(np.uint8)
