"""What a run tells: `metrics.jsonl`, which is the record, and TensorBoard, which shows it.

A resumed run cuts both back to the step it starts from, so that no point stands twice. If the disk
is full, training goes on: what cannot be written waits in memory until it can.
"""

import json
import math
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.tensorboard import summary

from data.tokenizer import clean_text
from training.checkpoint import replace_synced, set_aside
from training.config import Config, flatten, to_toml
from training.curves import Board, Log, difference, histograms_of, rebuild
from training.device import synchronize
from training.run import parsed

BINS = 64  # of a histogram
LARGE = 16  # MB of TensorBoard's files that are read in some seconds
CHARTS = {  # custom scalars: curves that belong on one chart
    "loss": {"train and validation": ["Multiline", ["loss/train", "loss/val"]]},
    "time": {"share of a step": ["Multiline", ["time/.*"]]},
}


class Metrics:
    """Writes scalars, texts, images and histograms of a run's folder.

    report: gets a line about TensorBoard files that a resume finds damaged, and has rebuilt.
    """

    def __init__(self, run: Path, config: Config, resumed_at, redo_val: bool, report):
        kept = cut_back(run / "metrics.jsonl", resumed_at, redo_val, report)
        folder = run / "tensorboard"
        if resumed_at:
            make_whole(folder, kept, resumed_at, report)
        self.jsonl = Log(run / "metrics.jsonl")
        self.board = Board(folder, purge_step=resumed_at)
        self.failure = ""  # why nothing can be written at present
        if not resumed_at:  # also where a resume at step 0 hides what stood there
            self.board.add(summary.custom_scalars(CHARTS))
            toml = clean_text(to_toml(config))
            self.board.add(summary.text("configuration", f"```toml\n{toml}\n```"))
            # in the run's own folder: SummaryWriter.add_hparams would make a run of its own
            settings, session, _ = summary.hparams(hyperparameters(config), {"loss/val": math.nan})
            self.board.add(settings)
            self.board.add(session)
        for record in kept:  # what purge_step hides of the step itself
            if record["step"] == resumed_at:
                self.show(record)
        if resumed_at and config.train.histogram_interval:
            for event in histograms_of(folder, resumed_at):
                self.board.add_event(event)
        self.try_flush()

    def scalars(self, step: int, values: dict[str, float]):
        """One line of metrics.jsonl, and the same values in TensorBoard."""
        # JSON has no infinity, which is what a skipped fp16 step's gradient may have
        record = {"step": step, **{k: v for k, v in values.items() if math.isfinite(v)}}
        self.jsonl.write(f"{json.dumps(record)}\n".encode())
        self.show(record)
        self.try_flush()

    def show(self, record: dict):
        for tag, value in record.items():
            if tag != "step":
                self.board.add_scalar(tag, value, record["step"])

    def histograms(self, step: int, model: torch.nn.Module):
        """Weights and gradients, parameter by parameter; not while they would only fill memory."""
        if self.failure:
            return
        for name, parameter in model.named_parameters():
            kinds = {"weights": parameter.detach(), "gradients": parameter.grad}
            for kind, values in kinds.items():
                if values is not None:
                    values = values.float().cpu().numpy()
                    self.board.add(summary.histogram(f"{kind}/{name}", values, bins=BINS), step)

    def try_flush(self):
        """Writes what can be written; `failure` says why not, and all of it waits."""
        try:
            self.jsonl.flush()
            self.board.flush()
            self.failure = ""
        except OSError as error:
            self.failure = f"{error.filename}: {error.strerror}"

    def flush(self):
        """Everything so far is on disk when a checkpoint that builds on it is published."""
        self.jsonl.flush(sync=True)
        self.board.flush()

    def close(self):
        try:
            self.jsonl.close()
        finally:
            self.board.close()


def hyperparameters(config: Config) -> dict:
    """The settings that TensorBoard's HParams table compares between runs."""
    flat = flatten(config)
    return {
        key: clean_text(value) if isinstance(value, str) else value
        for key, value in flat.items()
        if not key.startswith(("sample.", "data.cache"))
    }


def make_whole(folder: Path, records: list[dict], step: int, report):
    """Rebuilds TensorBoard's files where they do not show the records of steps below `step`.

    They are read whole, about 4 MB a second.
    """
    size = sum(path.stat().st_size for path in folder.glob("*")) / 1e6
    if size > LARGE:
        report(f"{folder}: comparing {size:.0f} MB with metrics.jsonl")
    wrong = difference(folder, records, before=step)
    if not wrong:
        return
    try:
        rebuild(folder, records)
        report(f"{folder}: {wrong}; rebuilt from metrics.jsonl, the old files set aside")
    except OSError as error:  # it is only what is shown
        report(f"{folder}: {wrong}, and could not be rebuilt: {error}")


def cut_back(file: Path, step: int | None, redo_val: bool, report=print) -> list[dict]:
    """Removes the records after `step`, and its validation if that is done again. Returns the rest.

    A last line that a killed process left half written goes too. If others cannot be read, the
    file as it was is set aside, and `report` gets a line.
    """
    if step is None or not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    lost = sum(parsed(line) is None for line in lines[:-1])
    kept = [
        record
        for record in map(parsed, lines)
        if record is not None
        and (
            record["step"] < step
            or (record["step"] == step and not (redo_val and any("/val" in k for k in record)))
        )
    ]
    if lost:
        report(f"{file}: {lost} lines cannot be read; as it was it is {set_aside(file)}")
    replace_synced(file, "".join(json.dumps(r) + "\n" for r in kept).encode())
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
    values = np.clip(np.nan_to_num(values), 0, 1)  # of a model that has diverged
    channels = [np.interp(values, at, stops[:, c]) for c in range(3)]
    return np.stack(channels, -1).astype(np.uint8)
