"""Fuzzing what a run holds: weights, manifests, states, settings, and models made of them."""

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save

import generate
from checkpoint.reader import FORMAT, MANIFEST, Checkpoint, CheckpointError, read_best
from checkpoint.shards import INDEX, index_json, shard_names
from common.errors import UserError
from common.files import checksummed_json
from common.jsonl import read_records
from data.config import DataConfig
from data.tokenizers.char import CharTokenizer
from model import engines
from model.config import ModelConfig, read_model_config
from model.transformer_lite import TransformerDecoderLite
from tests.faults.fuzz_inputs import MB, Target, edited, like, mangled, named, resealed, target
from training import config
from training.resume import stored_config

# A valid checkpoint to change ---------------------------------------------------------------------

SHAPE = ModelConfig(vocab_size=8, d_model=8, n_heads=2, n_layers=1, d_ff=16, max_len=16)
LEARNED = replace(SHAPE, positions="learned", norm="rms", bias=False)


def checkpoint_files(shape: ModelConfig = SHAPE) -> dict[str, bytes]:
    """The files of a checkpoint, as small as one may be."""
    weights = dict(TransformerDecoderLite.from_config(shape).named_parameters())
    state = {"step": 3, "tokens": 9, "best": 1.5, "validates": True}
    state["held_out"] = [{"prompt": "a", "completion": "b"}]
    settings = asdict(replace(config.Config(), model=shape, data=DataConfig(kind="pairs")))
    return {
        "model.safetensors": save({name: weight.data for name, weight in weights.items()}),
        "config.json": json.dumps(settings).encode(),
        "state.json": json.dumps(state).encode(),
        **CharTokenizer("abcd").files(),
    }


def publish(folder: Path, files: dict[str, bytes]) -> Checkpoint:
    """A checkpoint with a valid manifest; not synced, which would be most of the time."""
    entries = {}
    for name, content in files.items():
        (folder / name).write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        entries[name] = {"bytes": len(content), "sha256": sha256}
    (folder / MANIFEST).write_bytes(checksummed_json({"format": FORMAT, "files": entries}))
    return Checkpoint(folder)


@target("weights files")
def weights_files(folder: Path) -> Target:
    kinds = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "I64": "<i8", "U8": "u1", "BOOL": "?"}
    header, data = {"__metadata__": {"a": "b"}}, b""
    for name, kind in kinds.items():
        part = np.arange(6).astype(kind).reshape(2, 3).tobytes()
        offsets = [len(data), len(data) + len(part)]
        header[name] = {"dtype": name, "shape": [2, 3], "data_offsets": offsets}
        data += part

    def whole(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text + data

    names = st.lists(st.sampled_from(list(kinds)), min_size=1, max_size=3, unique=True)
    single = names.map(lambda kept: save({k: np.arange(6).astype(kinds[k]) for k in kept}))
    text = json.dumps(header).encode()
    inputs = edited(header).map(whole) | mangled(text).map(whole) | single.flatmap(mangled)
    return Target(named(inputs | mangled(whole(text)), "model.safetensors"), both(folder))


def both(folder: Path) -> Callable:
    """Safetensors' own reader and ours, which must agree in the verdict and in each number."""

    def feed(name: str, content: bytes):
        checkpoint = publish(folder, {name: content})
        found, refused = [], []
        for read in (checkpoint.tensors, checkpoint.lists):
            try:
                found.append(read(name))
            except CheckpointError as error:
                refused.append(error)
        unlike = any(kind in content for kind in (b"BF16", b"C64"))  # each read by only one
        empty = any("too many empty lists" in str(error) for error in refused)
        if not (unlike or empty):
            assert len(found) != 1, f"only one reader refuses it: {refused[0]}"
        if len(found) == 2:
            arrays, lists = found
            assert arrays.keys() == lists.keys(), "other names"
            for key, array in arrays.items():
                # as text, in which NaN is NaN and -0.0 is not 0.0
                assert repr(array.tolist()) == repr(lists[key]), f"other numbers in {key!r}"
        if refused:
            raise max(refused, key=lambda error: len(str(error)))

    return feed


@target("indexes of shards")
def indexes(folder: Path) -> Target:
    arrays = {name: np.arange(6.0) for name in "abc"}
    dealt = [["a"], ["b", "c"]]
    shards = shard_names("model.safetensors", dealt)
    files = {
        shard: save({name: arrays[name] for name in names})
        for shard, names in zip(shards, dealt, strict=True)
    }
    valid = index_json("model.safetensors", dealt, dict.fromkeys(arrays, 48))

    def feed(name: str, content: bytes):
        checkpoint = publish(folder, files | {name: content})
        found = checkpoint.tensors("model.safetensors")
        assert found.keys() == arrays.keys(), "other names"

    index = "model.safetensors" + INDEX
    return Target(like(valid, index), feed)


@target("manifests")
def manifests(folder: Path) -> Target:
    publish(folder, {"state.json": b'{"step": 3}', "config.json": b"{}"})
    valid = (folder / MANIFEST).read_bytes()
    sealed = edited(json.loads(valid)).map(resealed)

    def feed(name: str, content: bytes):
        (folder / name).write_bytes(content)
        return Checkpoint(folder).verify().step

    return Target(named(sealed | sealed, MANIFEST) | like(valid, MANIFEST), feed)


@target("states and settings")
def states_and_settings(folder: Path) -> Target:
    files, step = checkpoint_files(), folder / "checkpoints" / "step_00000003"
    step.mkdir(parents=True)
    best = checksummed_json({"step": 3, "val_loss": 1.5})
    record = json.dumps({"step": 3, "loss/train": 1.5}).encode()

    def feed(name: str, content: bytes):
        if name == "best.json":
            (folder / "checkpoints" / name).write_bytes(content)
            return read_best(folder)
        if name == "metrics.jsonl":
            (folder / name).write_bytes(content)
            return read_records(folder / name)
        checkpoint = publish(step, files | {name: content})
        stored_config(checkpoint)
        source = generate.read_source(checkpoint, "python")
        assert len(generate.plan(source, ["ab"], 2)) == 2
        return generate.plan(source, [], 0)

    inputs = like(files["config.json"], "config.json") | like(files["state.json"], "state.json")
    sealed = edited(json.loads(best)).map(resealed)
    inputs = inputs | like(record, "metrics.jsonl") | named(sealed, "best.json")
    return Target(inputs | like(best, "best.json"), feed)


@target("models")
def models(folder: Path) -> Target:
    """Settings and weights that need not fit each other, into the engines without PyTorch."""
    valid = checkpoint_files(LEARNED)
    whole = json.loads(valid["config.json"])
    size = st.sampled_from([1, 2, 4, 8, 16, 1000, 2**17, 2**20, 2**31, 2**40, 2**62])
    sizes = st.dictionaries(
        st.sampled_from(["vocab_size", "d_model", "n_heads", "n_layers", "d_ff", "max_len"]),
        size | st.integers(1, 64), max_size=2,
    )  # fmt: skip
    tables = st.fixed_dictionaries({"positions": st.sampled_from(["learned", "sinusoidal"])})
    shapes = st.tuples(sizes, tables).map(
        lambda drawn: json.dumps(whole | {"model": whole["model"] | drawn[0] | drawn[1]}).encode()
    )
    dims = st.lists(st.integers(0, 9), max_size=3)
    weight = st.tuples(dims, st.sampled_from(["<f4", "<f8", "<i8", "?"])).map(
        lambda drawn: np.zeros(drawn[0], drawn[1])
    )
    own = {k: p.data for k, p in TransformerDecoderLite.from_config(LEARNED).named_parameters()}
    changed = st.dictionaries(st.sampled_from([*own, "other"]), weight, max_size=2)
    weights = changed.map(lambda drawn: save(own | drawn))

    def feed(name: str, content: bytes):
        checkpoint = publish(folder, valid | {name: content})
        refused = []
        for engine in ("numpy", "python"):
            try:
                read = engines.read_weights(engine, checkpoint)
                engines.load_model(engine, read_model_config(checkpoint), read, "cpu", "fp32")
            except UserError as error:
                refused.append(error)
        assert len(refused) != 1, f"only one engine refuses it: {refused[0]}"
        if refused:
            raise refused[0]

    inputs = named(shapes, "config.json") | named(weights, "model.safetensors")
    # the longest table of positions that may be asked for
    return Target(inputs, feed, slack=80 * MB)
