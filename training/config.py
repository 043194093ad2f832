"""All settings of a run: TOML and command line to one checked dataclass. No torch.

Each folder owns its part (`ModelConfig`, `DataConfig`, ...); here they are put together, read from
a file, checked, and compared on resuming.
"""

import difflib
import json
import math
import os
import re
import tomllib
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import TypeAdapter, ValidationError

from common.errors import UserError, at_least, refuse
from data.config import DataConfig, SourceConfig
from generation.sampling import Sampling
from model.config import ModelConfig

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_BYTES = 1 << 20  # of a configuration file
MAX_PROFILED = 100  # steps in a trace


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and the learning-rate schedule."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: torch.optim.Muon for the layers' matrices, AdamW for everything else."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 1e-2
    """Peak learning rate of Muon, on AdamW's scale (its update has the same size)."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly from 0."""
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Learning rate after the warm-up."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of a linear or cosine schedule, as a fraction of the peak."""
    schedule_steps: int = 0
    """The step at which the schedule ends; 0: max_steps."""
    weight_decay: float = 0.1
    """Weight decay (decoupled) of the matrices; biases, norms and embeddings have none."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the mean squared gradient."""
    eps: float = 1e-8
    """Added to AdamW's denominator."""
    momentum: float = 0.95
    """Muon's momentum."""
    grad_clip: float = 1.0
    """Gradient clipping: largest norm of the whole gradient; 0: no clipping."""

    def __post_init__(self):
        refuse(
            at_least(self, 0, "lr", "muon_lr", "warmup_steps", "schedule_steps", "grad_clip")
            + at_least(self, 0, "weight_decay", "min_lr_ratio")
            + [
                f"{name} = {getattr(self, name)} must be at least 0 and below 1"
                for name in ("beta1", "beta2", "momentum")
                if not 0 <= getattr(self, name) < 1
            ]
            + ([] if 0 < self.eps < 1 else [f"eps = {self.eps} must be between 0 and 1"])
        )


@dataclass(frozen=True)
class TrainConfig:
    """The training loop: batch sizes, and intervals in optimizer steps."""

    batch_size: int = 32
    """Examples per optimizer step, over all its micro-batches."""
    accumulation_steps: int = 1
    """Micro-batches per optimizer step (gradient accumulation), over all processes."""
    checkpoint_activations: bool = False
    """Activation checkpointing: less memory, more time, the same numbers."""
    eval_interval: int = 250
    """Steps between evaluations, each with a checkpoint before it; 0: only at the end."""
    eval_examples: int = 0
    """Validation examples per evaluation, always the same ones; 0: all."""
    save_interval: int = 0
    """Steps between additional checkpoints; 0: only at evaluations and at the end."""
    keep: int = 3
    """Newest checkpoints to keep, besides the best one."""
    log_interval: int = 10
    """Steps between log entries."""
    histogram_interval: int = 0
    """Steps between histograms of weights and gradients; 0: none."""
    threads: int = 0
    """CPU threads of each process; 0: as many as PyTorch chooses."""
    deterministic: bool = False
    """On CUDA: use only deterministic algorithms."""
    cuda_graphs: bool = False
    """On CUDA, for one long text: replay steps as CUDA graphs; faster where the model is small."""
    shard: bool = False
    """Each process holds a part of the weights and of the optimizer's state (FSDP2)."""
    checkpoint_shards: bool = False
    """With train.shard: each process writes files of its own into a checkpoint."""
    collective_timeout: int = 600
    """Seconds that a process waits for the others before the run ends; longer than a save takes."""
    profile_steps: str = ""
    """Steps A:B, both included, to record with torch.profiler in the run's folder; empty: none."""

    def __post_init__(self):
        refuse(
            at_least(self, 1, "batch_size", "accumulation_steps", "keep", "log_interval")
            + at_least(self, 1, "collective_timeout")
            + at_least(self, 0, "eval_interval", "eval_examples", "save_interval")
            + at_least(self, 0, "histogram_interval", "threads")
            + ([f"threads = {self.threads} must be at most 1024"] if self.threads > 1024 else [])
            + self.wrong_profile()
        )

    def wrong_profile(self) -> list[str]:
        """What is wrong with profile_steps. A trace is kept in memory until it ends."""
        if not self.profile_steps:
            return []
        given = f"profile_steps = {self.profile_steps[:40]!r}"
        if not re.fullmatch(r"[0-9]{1,15}:[0-9]{1,15}", self.profile_steps):
            return [f"{given} must be A:B, the first and the last step, such as 20:22"]
        first, last = self.profiled
        if not 1 <= first <= last < first + MAX_PROFILED:
            return [f"{given} must be A:B with 1 <= A <= B, at most {MAX_PROFILED} steps"]
        return []

    @property
    def profiled(self) -> tuple[int, int]:
        """The first and the last step of profile_steps, counted from 1; (0, 0): none."""
        first, _, last = self.profile_steps.partition(":")
        return (int(first), int(last)) if last else (0, 0)

    def share_of(self, processes: int) -> int:
        """How many of a step's micro-batches each process takes: a power of two.

        Then each adds up a whole branch of the tree of training/gradient_sum.py. Raises UserError,
        which names the nearest numbers of micro-batches that can be shared so.
        """
        micro_batches = self.accumulation_steps
        if processes == 1:
            return micro_batches
        share, rest = divmod(micro_batches, processes)
        if share and rest == 0 and share & (share - 1) == 0:
            return share
        below = processes << max(0, share.bit_length() - 1)
        near = [below] if below > micro_batches else [below, 2 * below]
        raise UserError(
            f"train.accumulation_steps = {micro_batches}: {processes} processes share the "
            "micro-batches of a step, and each must have 1, 2, 4 or another power of two; set it "
            f"to {' or '.join(map(str, near))}"
        )

    @property
    def micro_batch_size(self) -> int:
        """Examples in a forward pass: of a micro-batch, and of an evaluation's batches."""
        return math.ceil(self.batch_size / self.accumulation_steps)


@dataclass(frozen=True)
class Config:
    """Everything that shapes a run; a TOML file holds it, and so does each checkpoint."""

    seed: int = 1337
    """Seed of everything random: initial weights, data order, dropout."""
    max_steps: int = 1000
    """Optimizer steps to train."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = "auto"
    """Precision of matrix products; the weights stay in float32 (fp64: float64)."""
    compile: bool = False
    """Use torch.compile; if the machine has no compiler, training continues without it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: Sampling = field(default_factory=Sampling)

    def __post_init__(self):
        wrong = at_least(self, 0, "seed") + at_least(self, 1, "max_steps")
        if self.seed >= 2**63:
            wrong.append(f"seed = {str(self.seed)[:30]} must be below 2^63")
        if self.data.seq_len > self.model.max_len:
            wrong.append(
                f"data.seq_len = {self.data.seq_len} is more than model.max_len = "
                f"{self.model.max_len}; lower it, or raise model.max_len"
            )
        refuse(wrong)

    @property
    def seq_len(self) -> int:
        """Tokens in a training window."""
        return self.data.seq_len or self.model.max_len

    @property
    def horizon(self) -> int:
        """The step at which the learning rate's schedule ends."""
        return self.optimizer.schedule_steps or self.max_steps


# pydantic takes its settings from this attribute, also of standard-library dataclasses
for _part in (
    ModelConfig,
    SourceConfig,
    DataConfig,
    OptimizerConfig,
    TrainConfig,
    Sampling,
    Config,
):
    _part.__pydantic_config__ = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
_CHECKER = TypeAdapter(Config)


def check(values: dict, origin: str) -> Config:
    """A Config from nested tables. Raises UserError naming `origin`, the keys and the fixes."""
    try:
        # from JSON, because strict checking takes a table for a dataclass only there
        return _CHECKER.validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        # one line for a setting of two types, which both refuse the value
        lines = list(dict.fromkeys(describe(item, values) for item in error.errors()))
    except (ValueError, RecursionError) as error:  # an integer or a table without end
        lines = [str(error)]
    raise UserError(f"{origin}: {'; '.join(lines)}")


def describe(error: "ErrorDetails", values: dict) -> str:
    """One of pydantic's errors in words: key, what is wrong, and the nearest key there is."""
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if error["type"] == "unexpected_keyword_argument":
        known = list(dict.fromkeys([*flatten(Config()), *(f.name for f in fields(Config))]))
        if path[:2] == ["data", "sources"]:
            known += [".".join([*path[:-1], f.name]) for f in fields(SourceConfig)]
        siblings = [name for name in known if name.split(".")[:-1] == path[:-1]]
        # a right key in the wrong table is nearer than a like one in this table
        near = [name for name in known if name.split(".")[-1] == path[-1] != ""]
        near = near or difflib.get_close_matches(key, siblings, 1) or siblings
        near = near or difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]}?" if len(near) == 1 else f"use one of {', '.join(near)}"
        return f"unknown key {key}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if "path" in path[1:]:  # of the data or of a source
        path, found = path[: path.index("path") + 1], values
        for part in path:
            found = found[int(part) if isinstance(found, list | tuple) else part]
        return f"{'.'.join(path)} = {found!r}: must be a path or a list of paths"
    if error["type"] == "missing":
        return f"{key} is missing; give one"
    if error["type"] in ("dataclass_type", "dataclass_exact_type"):
        return f"{key} must be a table: [{key}]"
    if error["type"] == "value_error":  # our own checks name the field and its value
        return re.sub(r"(^|; )(\w+ = )", rf"\1{key}.\2", message) if key else message
    return f"{key} = {error['input']!r}: {message[0].lower()}{message[1:]}"


def load(path: Path) -> Config:
    """The Config of a TOML file; what it leaves out has the dataclasses' defaults."""
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)  # /dev/zero has no end
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file{nearest_file(Path(path))}") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"--config {path}: {reason}; give a TOML file in UTF-8") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"--config {path}: more than {MAX_BYTES} bytes; give a smaller TOML file")
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer without end
        raise UserError(f"{path}: not TOML: {error}; fix the file") from None
    return check(values, str(path))


def nearest_file(path: Path) -> str:
    """A hint at the configuration of the most similar name, beside `path` or among the shipped."""
    shipped = Path(__file__).parent.parent / "configs"
    there = {p.stem: p for folder in (shipped, path.parent) for p in folder.glob("*.toml")}
    near = difflib.get_close_matches(path.stem, there, 1)
    if not near:
        return "; give a TOML file such as configs/default.toml"
    found = there[near[0]]
    return f"; did you mean {os.path.relpath(found) if found.parent == shipped else found}?"


def flatten(config, prefix: str = "") -> dict:
    """{"model.d_model": 256, ...} of a Config or of its asdict()."""
    values = asdict(config) if is_dataclass(config) else config
    flat = {}
    for key, value in values.items():
        if isinstance(value, tuple | list) and value and isinstance(value[0], dict):
            value = {str(number): each for number, each in enumerate(value)}
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def to_toml(config: Config) -> str:
    """The configuration as TOML that reads back to the same."""

    def text(value):
        if isinstance(value, str):
            # TOML's basic strings have JSON's escapes, but for those of characters beyond 16 bits
            quoted = value.replace("\\", "\\\\").replace('"', '\\"')
            quoted = "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)
            return f'"{quoted}"'
        if isinstance(value, tuple):
            return f"[{', '.join(map(text, value))}]"
        return str(value).lower() if isinstance(value, bool) else str(value)

    def table(entries):
        return [
            f"{key} = {text(value)}"
            for key, value in entries.items()
            if not (isinstance(value, dict) or value is None or key == "sources")
        ]

    values = asdict(config)
    lines = table(values)
    for name, entries in values.items():
        if isinstance(entries, dict):
            lines += ["", f"[{name}]", *table(entries)]
    for source in values["data"]["sources"]:
        lines += ["", "[[data.sources]]", *table(source)]
    return "\n".join(lines)


# Resuming ---------------------------------------------------------------------------------------

# All other settings of the data are judged by its hash, once it is prepared: a moved file is none.
REFUSED_CHANGES = {
    "seed": "the order of the data would change",
    "data.seq_len": "the training data would change",
    "train.batch_size": "the order of the data would change",
    **dict.fromkeys(
        (f"data.{role}_token" for role in ("bos", "end", "pad", "unk")),
        "the special tokens are those of the run's tokenizer",
    ),
    "data.tokenizer_pattern": "the tokenizer would change",
    "optimizer.name": "the optimizer's state would not fit",
    "optimizer.schedule_steps": "the end of the learning-rate schedule would move",
}
FREE_CHANGES = {"model.dropout", "model.attention_dropout"}


@dataclass(frozen=True)
class Change:
    """One setting that a resume changes, and why it is refused ("" where it is allowed)."""

    key: str
    before: object
    after: object
    refused: str = ""


def changes(stored: Config, wanted: Config, extend: bool) -> list[Change]:
    """What differs between a run's stored settings and those asked for on resuming it."""
    found = []
    before, after = flatten(stored), flatten(wanted)
    for key in {**before, **after}:
        if before.get(key) == after.get(key):
            continue
        reason = REFUSED_CHANGES.get(key, "")
        if key.startswith("model.") and key not in FREE_CHANGES:
            reason = "the model would change"
        beyond = key == "max_steps" and after[key] > max(stored.horizon, stored.max_steps)
        if beyond and not extend:
            reason = "the end of the learning-rate schedule would move (--extend allows it)"
        if key == "optimizer.schedule_steps" and extend:
            reason = ""
        found.append(Change(key, before.get(key), after.get(key), reason))
    return found


def resumed(stored: Config, wanted: Config, extend: bool) -> Config:
    """`wanted`, with the schedule's horizon where it was unless it is extended.

    Fewer steps than stored stop the run earlier on the same learning-rate curve.
    """
    horizon = wanted.optimizer.schedule_steps
    if extend and wanted.max_steps > stored.horizon >= stored.max_steps:
        horizon = 0
    elif wanted.max_steps != stored.max_steps and horizon == stored.optimizer.schedule_steps:
        horizon = stored.horizon
    return replace(wanted, optimizer=replace(wanted.optimizer, schedule_steps=horizon))
