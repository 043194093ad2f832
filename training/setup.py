"""The parts of a run put together: device, data, model, optimizers, and where it stands."""

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import chain

import torch
from torch.utils.checkpoint import checkpoint

from common.device import PRECISIONS, Precision, check_precision, choose_device, processor
from common.errors import UserError
from common.memory import keep_freed_memory, limit_kernel_caches
from common.processes import Processes
from common.signals import defer_interrupts
from data.batches import ORDER, Batches, Examples
from data.config import SourceConfig, as_paths
from data.dataset import Dataset
from data.mixture import MixedExamples, Mixture, make_batches, open_examples, prepare
from data.rng import derive_seed
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer, named_tokenizer
from model.cpu_layers import use_cpu_layers
from model.cuda_attention import prefers_cudnn, use_cuda_attention
from model.loss import LossModule
from model.transformer_full import TransformerDecoder
from training.config import Config, TrainConfig
from training.optimizer import create_optimizers, load_state_tensors
from training.precision import Work, choose_precision, note_faster
from training.resume import RunSpec
from training.sharding import Shards
from training.state import (
    Progress,
    TrainState,
    restore_order,
    restore_progress,
    restore_scaler,
)

Log = Callable[[str], object]
print_line = partial(print, flush=True)


def build(spec: RunSpec, log: Log, processes: Processes | None = None) -> TrainState:
    """Makes or restores every part of the run that `spec` describes.

    processes: those that train it together, which are connected here; None: this one alone.
    """
    config, processes = spec.config, processes or Processes()
    if spec.resume and not spec.resume.files_of("optimizer.safetensors"):  # an imported model
        raise UserError(
            f"--resume {spec.resume.path}: has weights, but no state of an optimizer; use "
            "--init_from, which starts a new run with them"
        )
    device = choose_device(config.device, processes.local_index if processes.count > 1 else None)
    check_same_device(config.device, device, processes)
    processes.connect(device, timedelta(seconds=config.train.collective_timeout))
    threads = processes.decide(lambda: config.train.threads or torch.get_num_threads())
    if processes.count > 1:  # whatever a host has chosen
        config = replace(config, train=replace(config.train, threads=threads))
    configure_torch(config.train, device)  # cuBLAS reads its settings when it first computes
    check_precision(config.precision, device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    each = f" in each of {processes.count} processes" if processes.count > 1 else ""
    log(f"device: {name}, {torch.get_num_threads()} CPU threads{each}")

    first = processes.local_index == 0
    tell = print_line if first and not processes.is_first else log  # of this host
    dataset = processes.first_on_host(
        lambda: prepare(config.data, tell, tokenizer=given_tokenizer(spec))
    )
    check_data(spec, dataset)
    check_same_data(dataset, processes)
    config = resolve(config, device, dataset, processes)
    batches, val = open_batches(dataset, config, log, restore_order(spec))
    work = Work.of(batches.examples, config.train.micro_batch_size)

    def choose() -> tuple[str, str]:  # by the first, while the others wait and do not disturb it
        precision, why = choose_precision(config.precision, config.model, work, device)
        return precision.name, why

    precision_name, why = processes.decide(choose)
    precision = PRECISIONS[precision_name]
    config = replace(config, precision=precision.name)
    log(f"precision: {precision.name} ({why})")
    versions = spec.resume.state.get("versions") if spec.resume else None
    before = versions.get("processor") if isinstance(versions, dict) else None
    # earlier checkpoints do not name theirs
    if before and before != processor() and processes.is_first:
        note_faster(precision, config.model, work, device, log)

    sharded = config.train.shard and processes.count > 1
    if sharded:
        check_shard(config, log)
    elif config.train.shard:
        log("note: train.shard: one process has nobody to share with")
    elif config.train.checkpoint_shards:
        log("note: train.checkpoint_shards: takes train.shard; checkpoints are written whole")
    model = make_model(spec, config, precision, device, dataset, log, sharded)
    loss_module = LossModule(model)
    shards = Shards(loss_module, device, precision, processes) if sharded else None
    with defer_interrupts():  # the first optimizer makes PyTorch load its compiler
        optimizers = create_optimizers(model, config.optimizer, precision)
    scaler = torch.amp.GradScaler(device.type, enabled=precision.name == "fp16")
    progress = Progress()
    if spec.resume:
        for part in spec.resume.parts("optimizer.safetensors"):  # a file at a time
            load_state_tensors(model, optimizers, part)
        progress = restore_progress(spec)
        restore_scaler(scaler, spec.resume)
    # earlier versions added micro-batches one after the other, and do not say so
    in_pairs = not spec.resume or spec.resume.state.get("micro_batches_in_pairs") is True
    if not in_pairs and processes.count > 1:
        in_pairs = True
        if config.train.accumulation_steps > 3:  # up to three, both orders are one
            log("note: from here on, micro-batches are added in another order than before")
    shape = config.model
    log(
        f"model: {model.num_parameters():,} parameters: {shape.n_layers} layers, "
        f"d_model {shape.d_model}, {shape.n_heads} heads, d_ff {shape.d_ff}, "
        f"max_len {shape.max_len}, vocabulary {shape.vocab_size:,}"
    )
    return TrainState(
        config,
        device,
        precision,
        dataset,
        batches,
        val,
        loss_module,
        optimizers,
        scaler,
        progress,
        processes=processes,
        shards=shards,
        in_pairs=in_pairs,
    )


def make_model(
    spec: RunSpec,
    config: Config,
    precision: Precision,
    device: torch.device,
    dataset: Dataset,
    log: Log,
    sharded: bool,
) -> TransformerDecoder:
    """The decoder with the weights that the run begins with, made to train on `device`.

    sharded: it is cut to parts afterwards, and lies in host memory until then.
    """
    home = torch.device("cpu") if sharded else device  # whole, it may be too large for the device
    source = spec.resume or spec.weights
    if source:
        weights = source.tensors("model.safetensors")
        model = TransformerDecoder.from_weights(config.model, weights, precision.weights, home)
    else:
        torch.manual_seed(derive_seed("init", config.seed))
        model = TransformerDecoder.from_config(config.model, precision.weights).to(home)
    if device.type == "cuda":
        cudnn = prefers_cudnn(device, fixed_shapes=dataset.train.starts is None)
        use_cuda_attention(model, cudnn, merged=not sharded)
        if cudnn and precision.name in ("bf16", "fp16"):
            log("attention: cuDNN's, the faster one on this GPU")
    elif device.type == "cpu":
        use_cpu_layers(model)
    if config.train.checkpoint_activations:
        recompute_layers(model)
    return model


def check_shard(config: Config, log: Log):
    """What cannot be had where each process holds a part of the weights. Raises UserError."""
    if config.precision == "fp16":
        raise UserError(
            "train.shard: does not scale the loss, which precision = fp16 needs; use --precision "
            "bf16 or fp32"
        )
    if config.train.histogram_interval:
        log("note: train.histogram_interval: none with train.shard, which has no whole gradient")


def open_batches(
    dataset: Dataset, config: Config, log: Log, order: int = ORDER
) -> tuple[Batches, Examples | None]:
    """The training batches and the validation examples, None without any. Raises UserError.

    order: that of stream windows, as data/batches.py numbers them.
    """
    examples, val = (
        open_examples(dataset, side, config.seq_len, order, config.data, log)
        for side in ("train", "val")
    )
    assert examples is not None  # nothing is prepared without a training split
    for split, whole in (("train", examples), ("validation", val)):
        for source, side in by_source(dataset, whole):
            log(f"data: {source.name} ({source.kind}), {split}: {side.split.describe()}")
            unk_id = dataset.tokenizer.unk_id
            # a tokenizer that was made of this text knows all of it
            given = dataset.tokenizer_given and unk_id is not None
            if unknown := side.split.count(unk_id) if given else 0:
                log(
                    f"note: {unknown:,} of the {len(side.split.ids):,} {split} tokens are <unk>, "
                    "for characters that the vocabulary lacks; a loss and bits per byte over them "
                    "say little of the text"
                )
            if side.dropped:
                log(
                    f"data: {side.dropped:,} {split} examples longer than {config.seq_len} tokens "
                    "are skipped"
                )
            if split == "validation" and not side.are_windows and not side.count:
                raise UserError(
                    f"data.seq_len = {config.seq_len}: every validation example of {source.name} "
                    "is longer; raise it and model.max_len"
                )
    return make_batches(examples, config.train.batch_size, config.seed), val


def by_source(dataset: Dataset, examples: Examples | None) -> list[tuple[Dataset, Examples]]:
    """The examples of a side with the data set that they are of: of a mixture, of each source."""
    if isinstance(dataset, Mixture) and isinstance(examples, MixedExamples):
        parts = examples.parts
        return [(source, parts[source.name]) for source in dataset.sources if source.name in parts]
    return [(dataset, examples)] if examples else []


def configure_torch(config: TrainConfig, device: torch.device):
    """Threads and algorithms. One thread and two give different bits, so they are recorded."""
    if device.type == "cpu":
        keep_freed_memory()
        limit_kernel_caches()
    if device.type == "cuda":  # float32 is float32, as on a CPU: TF32 has 10 bits of 23
        torch.set_float32_matmul_precision("highest")
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
        torch.use_deterministic_algorithms(True)
        # which would cost time: nothing reads it
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyrefly: ignore[missing-attribute]
        from torch._inductor import config as compiler  # here, because it takes long to import

        compiler.deterministic = True  # or it chooses kernels by timing them


def recompute_layers(model: TransformerDecoder):
    """Keeps only each layer's input for the backward pass, which computes the layer again.

    Less memory and more time for the same numbers, those of dropout included. Chen et al. (2016).
    """
    # where nothing is drawn, nobody looks at the random state, which a CUDA graph has none of
    draws = bool(model.config.dropout or model.config.attention_dropout)
    for layer in model.layers:
        layer.forward = partial(
            checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=draws
        )


def given_tokenizer(spec: RunSpec) -> Tokenizer | None:
    """The tokenizer that a run does not make itself: its checkpoint's, or the user's own."""
    if spec.resume:
        given = spec.resume.state.get("tokenizer_given")
        return load_tokenizer(spec.resume.path) if given else None
    if spec.weights:
        return load_tokenizer(spec.weights.path)
    return named_tokenizer(spec.config.data)


def check_same_device(name: str, device: torch.device, processes: Processes):
    """Raises UserError in a process whose device is of another kind than that of the first."""
    if (kind := processes.decide(lambda: device.type)) != device.type:
        raise UserError(
            f"--device {name}: {device.type} here, but {kind} for rank 0; make all hosts alike, or "
            "use --device cpu"
        )


def check_same_data(dataset: Dataset, processes: Processes):
    """Raises UserError in a process that has other data than the first."""
    own = [dataset.fingerprint, dataset.tokenizer.fingerprint]
    if processes.decide(lambda: own) != own:
        raise UserError(
            f"data.path: the data or its tokenizer differs from that of rank 0 ({dataset.name}); "
            "give all hosts the same files, or a data.cache_dir that they share"
        )


def resolve(config: Config, device: torch.device, dataset: Dataset, processes: Processes) -> Config:
    """The configuration with all settled that was left to be found, but for the precision."""
    vocab_size = dataset.tokenizer.vocab_size
    if config.model.vocab_size not in (0, vocab_size):
        raise UserError(
            f"model.vocab_size = {config.model.vocab_size}, but the tokenizer of {dataset.name} "
            f"has {vocab_size} tokens; set it to 0"
        )
    return replace(
        config,
        device=str(device) if processes.count == 1 else device.type,  # each has an index of its own
        model=replace(config.model, vocab_size=vocab_size),
        data=replace(
            config.data,
            kind=dataset.kind,
            start_token=dataset.start_token,
            sources=resolve_sources(config, dataset),
            slots=dataset.slots,
        ),
        train=replace(config.train, threads=torch.get_num_threads()),
    )


def resolve_sources(config: Config, dataset: Dataset) -> tuple[SourceConfig, ...]:
    """The sources of a mixture with the kinds that were found."""
    if not isinstance(dataset, Mixture):
        return ()
    each = zip(config.data.sources, dataset.sources, strict=True)
    return tuple(replace(given, kind=source.kind) for given, source in each)


NOT_DATA = ("data.cache_dir", "data.tokenizer_path")  # settings that do not change what is read


def check_data(spec: RunSpec, dataset: Dataset):
    """Refuses to resume on other data than the run was trained on."""
    if not spec.resume:
        return
    now = {"data": dataset.fingerprint, "tokenizer": dataset.tokenizer.fingerprint}
    if any(spec.resume.state.get(key) != now[key] for key in now):
        data = spec.config.data
        changed = [
            f"{c.key} {c.before!r} -> {c.after!r}"
            for c in spec.changes
            if c.key.startswith("data.") and c.key not in NOT_DATA
        ]
        if changed:
            why = "; ".join(changed)
        elif now["data"] == spec.resume.state.get("data"):
            why = "the tokenizer in data.cache_dir is not the checkpoint's"
        elif data.path or data.sources:
            given = [(*as_paths(part.path), part.val_path) for part in (data, *data.sources)]
            files = " or ".join(filter(None, chain.from_iterable(given)))
            why = f"the content of {files} has changed"
        else:
            why = f"what {data.source} is made of has changed: this Python's library, or its file"
        raise UserError(
            f"--resume {spec.resume.path}: the data differs from what the run was trained on "
            f"({why}); use --init_from to train on other data"
        )
