"""What several tests share: a tiny configuration, and the command lines as subprocesses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save as to_safetensors

from checkpoint.reader import Checkpoint
from checkpoint.safetensors_python import in_file_order, pieces, read_arrays
from checkpoint.shards import INDEX, deal_out, index_json, shard_names
from checkpoint.writer import Content, save

ROOT = Path(__file__).parent.parent
TEXT = ROOT / "tests" / "text.txt"

# dropout and accumulation on, so that an exact resume has something to get wrong
TINY = """
seed = 7
max_steps = 40
device = "cpu"
precision = "fp32"
[model]
d_model = 32
n_heads = 2
n_layers = 2
d_ff = 64
max_len = 32
dropout = 0.1
norm_first = true
final_norm = true
[data]
path = {path!r}
tokenizer = "char"
cache_dir = {cache!r}
[optimizer]
lr = 3e-3
warmup_steps = 5
[train]
batch_size = 8
accumulation_steps = 2
eval_interval = 20
log_interval = 1
threads = 1
[sample]
max_new_tokens = 8
"""


def write_config(folder: Path, path: Path = TEXT, text: str = TINY) -> Path:
    """The tiny configuration as a file in `folder`, on the data at `path`."""
    file = folder / "tiny.toml"
    cache = str(folder / "cache")
    file.write_text(
        text.replace("{path!r}", json.dumps(str(path))).replace("{cache!r}", json.dumps(cache))
    )
    return file


def command(script: str, *arguments) -> list[str]:
    """The command that runs a script of the project."""
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def torchrun(processes: int, script: str, *arguments, restarts: int = 0) -> list[str]:
    """The command that runs a script of the project in several processes of this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += [f"--nproc_per_node={processes}", f"--max-restarts={restarts}"]
    return [*launcher, *command(script, *arguments)[1:]]


def workers(launcher: int) -> dict[int, int]:
    """The processes that a torchrun has running: process IDs by rank. Linux only."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            lines = (
                status.with_name("environ").read_bytes().split(b"\0") if parent == launcher else ()
            )
        except OSError:  # it has ended meanwhile
            continue
        found |= {int(line[5:]): int(status.parent.name) for line in lines if line[:5] == b"RANK="}
    return found


def run(script: str, *arguments, cwd, timeout=120, **more) -> subprocess.CompletedProcess:
    """Runs a script to its end, in `cwd`, without anything to read on standard input."""
    environment = {**os.environ, "PYTHONPATH": "", "COLUMNS": "100"}
    return subprocess.run(
        command(script, *arguments),
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        **more,
    )


def refused(result: subprocess.CompletedProcess) -> str:
    """The one line on stderr with which bad input was refused."""
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr + result.stdout
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def metrics(run_folder: Path) -> list[dict]:
    """The records of metrics.jsonl."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def losses(run_folder: Path) -> dict[tuple, float]:
    """Every loss of a run by kind and step; fails if one stands twice."""
    found = {}
    for record in metrics(run_folder):
        for name in ("loss/train", "loss/val"):
            if name in record:
                assert (name, record["step"]) not in found, (name, record["step"])
                found[name, record["step"]] = record[name]
    return found


def rewrite(checkpoint: Checkpoint, run_folder: Path, weights=None, state=None) -> Path:
    """A checkpoint's files as one of another run, true to its manifest.

    weights, state: what changes the arrays by name, and state.json, in place.
    """
    files = {name: checkpoint.read(name) for name in checkpoint.manifest["files"]}
    if weights:
        arrays = {n: np.array(w) for n, w in checkpoint.tensors("model.safetensors").items()}
        weights(arrays)
        files["model.safetensors"] = to_safetensors(arrays)
    if state:
        values = checkpoint.json("state.json")
        state(values)
        files["state.json"] = json.dumps(values).encode()
    return save(run_folder, checkpoint.step, files)


def in_shards(files: dict[str, bytes], count: int) -> list[dict[str, Content]]:
    """The files of a checkpoint with its tensors in `count` shards, as so many processes write
    them; the first has all other files."""
    shares = [{name: c for name, c in files.items() if not name.endswith(".safetensors")}]
    shares += [{} for _ in range(count - 1)]
    for name in files.keys() - shares[0].keys():
        arrays = read_arrays(files[name])
        sizes = {tensor: array.nbytes for tensor, array in arrays.items()}
        dealt = deal_out(sizes, count)
        for share, shard, tensors in zip(shares, shard_names(name, dealt), dealt, strict=False):
            kinds = {tensor: (arrays[tensor].dtype, arrays[tensor].shape) for tensor in tensors}
            share[shard] = pieces(kinds, [arrays[tensor] for tensor in in_file_order(kinds)])
        shares[0][name + INDEX] = index_json(name, dealt, sizes)
    return shares


def as_gpt2(decoder):
    """The GPT-2 of transformers with the weights of a pre-norm decoder with learned positions."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = decoder.config
    settings = GPT2Config(
        vocab_size=shape.vocab_size, n_positions=shape.max_len, n_embd=shape.d_model,
        n_layer=shape.n_layers, n_head=shape.n_heads, n_inner=shape.d_ff,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="eager",
    )  # fmt: skip
    theirs = GPT2LMHeadModel(settings).double()
    body = theirs.transformer
    with torch.no_grad():
        body.wte.weight.copy_(decoder.embed.weight)
        body.wpe.weight.copy_(decoder.pos_encoding)
        for layer, block in zip(decoder.layers, body.h, strict=True):
            mine = layer.self_attn
            block.attn.c_attn.weight.copy_(  # a Conv1D: transposed
                torch.cat([mine.W_q.weight, mine.W_k.weight, mine.W_v.weight]).T
            )
            block.attn.c_attn.bias.zero_()
            for a, b in (
                (mine.W_o, block.attn.c_proj),
                (layer.feed_forward.linear1, block.mlp.c_fc),
                (layer.feed_forward.linear2, block.mlp.c_proj),
            ):
                b.weight.copy_(a.weight.T)
                b.bias.copy_(a.bias)
    return theirs.eval()
