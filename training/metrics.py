"""Writes what a run measures: `metrics.jsonl`, the record, and TensorBoard, which shows it.

Which scalars there are is decided in `recorder.py` and `evaluation/validation.py`.

A resumed run cuts both back to the step it starts from, so that no point stands twice. If the disk
is full, training goes on: what cannot be written waits in memory until it can.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.tensorboard import summary

from common.files import AppendFile, replace_synced, set_aside
from common.jsonl import parse_record
from data.tokenizers.base import clean_text
from training.config import Config, flatten, to_toml
from training.tensorboard_files import EventFile, find_difference, histograms_of, rebuild

Log = Callable[[str], object]

BINS = 64  # of a histogram
SLOW_MEGABYTES = 16  # of TensorBoard's files: more takes so long to read that a line says so
CHARTS = {  # custom scalars: curves that belong on one chart
    "loss": {"train and validation": ["Multiline", ["loss/train", "loss/val"]]},
    "time": {"share of a step": ["Multiline", ["time/.*"]]},
}


class Metrics:
    """Writes scalars, texts, images and histograms of a run's folder.

    log: gets a line about TensorBoard files that a resume finds damaged, and has rebuilt.
    """

    def __init__(self, run: Path, config: Config, resumed_at: int | None, redo_val: bool, log: Log):
        kept = cut_back(run / "metrics.jsonl", resumed_at, redo_val, log)
        folder = run / "tensorboard"
        if resumed_at:
            rebuild_if_different(folder, kept, resumed_at, log)
        self.jsonl = AppendFile(run / "metrics.jsonl")
        self.events = EventFile(folder, purge_step=resumed_at)
        self.failure = ""  # why nothing can be written at present
        if not resumed_at:  # also where a resume at step 0 hides what stood there
            self.events.add(summary.custom_scalars(CHARTS))
            toml = clean_text(to_toml(config))
            self.events.add(summary.text("configuration", f"```toml\n{toml}\n```"))
            # in the run's own folder: SummaryWriter.add_hparams would make a run of its own
            settings, session, _ = summary.hparams(hyperparameters(config), {"loss/val": math.nan})
            self.events.add(settings)
            self.events.add(session)
        for record in kept:  # what purge_step hides of the step itself
            if record["step"] == resumed_at:
                self.add_to_events(record)
        if resumed_at and config.train.histogram_interval:
            for event in histograms_of(folder, resumed_at):
                self.events.add_event(event)
        self.try_flush()

    def scalars(self, step: int, values: dict[str, float]):
        """One line of metrics.jsonl, and the same values in TensorBoard."""
        # JSON has no infinity, which is what a skipped fp16 step's gradient may have
        record = {"step": step, **{k: v for k, v in values.items() if math.isfinite(v)}}
        self.jsonl.write(f"{json.dumps(record)}\n".encode())
        self.add_to_events(record)
        self.try_flush()

    def add_to_events(self, record: dict):
        for tag, value in record.items():
            if tag != "step":
                self.events.add_scalar(tag, value, record["step"])

    def histograms(self, step: int, model: torch.nn.Module):
        """Weights and gradients, parameter by parameter; not while they would only fill memory."""
        if self.failure:
            return
        for name, parameter in model.named_parameters():
            kinds = {"weights": parameter.detach(), "gradients": parameter.grad}
            for kind, values in kinds.items():
                if values is not None:
                    values = values.float().cpu().numpy()
                    self.events.add(summary.histogram(f"{kind}/{name}", values, bins=BINS), step)

    def try_flush(self):
        """Writes what can be written; `failure` says why not, and all of it waits."""
        try:
            self.jsonl.flush()
            self.events.flush()
            self.failure = ""
        except OSError as error:
            self.failure = f"{error.filename}: {error.strerror}"

    def flush(self, run: Path):
        """Everything so far is on disk when a checkpoint that builds on it is published.

        run: the run's folder, where both files are written again if somebody has removed them.
        """
        self.jsonl.keep_at(run / self.jsonl.path.name)
        self.events.keep_at(run / "tensorboard" / self.events.path.name)
        self.jsonl.flush(sync=True)
        self.events.flush()

    def close(self):
        try:
            self.jsonl.close()
        finally:
            self.events.close()


def hyperparameters(config: Config) -> dict:
    """The settings that TensorBoard's HParams table compares between runs."""
    flat = {
        key: ", ".join(value) if isinstance(value, tuple) else value
        for key, value in flatten(config).items()
    }
    return {
        key: clean_text(value) if isinstance(value, str) else value
        for key, value in flat.items()
        if value is not None and not key.startswith(("sample.", "data.cache"))
    }


def rebuild_if_different(folder: Path, records: list[dict], step: int, log: Log):
    """Rebuilds TensorBoard's files where they do not show the records of steps below `step`.

    They are read whole, about 4 MB a second.
    """
    size = sum(path.stat().st_size for path in folder.glob("*")) / 1e6
    if size > SLOW_MEGABYTES:
        log(f"{folder}: comparing {size:.0f} MB with metrics.jsonl, which may take a while")
    try:
        wrong = find_difference(folder, records, before=step)
    except OSError as error:  # a file that cannot be read now, and may be sound
        log(f"{folder}: not compared with metrics.jsonl ({error}), training continues")
        return
    if not wrong:
        return
    try:
        rebuild(folder, records)
        log(f"{folder}: {wrong}; rebuilt from metrics.jsonl, the old files renamed")
    except OSError as error:  # it is only what is shown
        log(f"{folder}: {wrong}; not rebuilt ({error}), training continues")


def cut_back(file: Path, step: int | None, redo_val: bool, log: Log = print) -> list[dict]:
    """Removes the records after `step`, and its validation if that is done again. Returns the rest.

    A last line that a killed process left half written goes too. If others cannot be read, the
    file as it was is set aside, and `log` gets a line.
    """
    if step is None or not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    lost = sum(parse_record(line) is None for line in lines[:-1])
    kept = [
        record
        for record in map(parse_record, lines)
        if record is not None
        and (
            record["step"] < step
            or (record["step"] == step and not (redo_val and any("/val" in k for k in record)))
        )
    ]
    if lost:
        log(f"{file}: {lost} lines cannot be read; the old file is renamed to {set_aside(file)}")
    replace_synced(file, "".join(json.dumps(r) + "\n" for r in kept).encode())
    return kept
