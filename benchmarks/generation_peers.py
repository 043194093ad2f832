"""Generating on a CPU against llama.cpp and CTranslate2: the same size, machine and rules.

    python -m benchmarks.generation_peers [--rounds 5]

The task of `benchmarks.generation`. A GPT-2 of transformers with random weights is converted to
each peer's format in a temporary folder: by CTranslate2's own converter, and with the names that
llama.cpp's script gives the tensors. Every side has as many threads as PyTorch takes; llama.cpp is
called through its C functions, as its own programs do. A peer that is not installed is left out.
"""

import ctypes
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import generation
from benchmarks.generation import BATCHES, NEW, PROMPT, TOP_K, Task, Write, timed
from benchmarks.harness import Result, in_turns, median, parser, spread
from common import cli

OURS = {
    "ours fp32": ["ours", "fp32"],
    "ours bf16": ["ours", "bf16"],
    "ours fp32, --compile": ["compiled", "fp32"],
    "ours bf16, --compile": ["compiled", "bf16"],
}
PEERS = {  # by the module that is needed
    "transformers": {
        "transformers fp32": ["transformers", "fp32"],
        "transformers bf16": ["transformers", "bf16"],
    },
    "llama_cpp": {
        "llama.cpp f32": ["llama_cpp", "F32"],
        "llama.cpp f16": ["llama_cpp", "F16"],
        "llama.cpp bf16": ["llama_cpp", "BF16"],
    },
    "ctranslate2": {
        "CTranslate2 float32": ["ctranslate2", "float32"],
        "CTranslate2 int8": ["ctranslate2", "int8"],
    },
}
BARS = {"transformers": 2.5, "llama.cpp": 1.0, "CTranslate2": 1.2}  # times the peer
PRECISIONS = {  # what is beside what: sides of 32 bits, and of 16 or 8
    "fp32": ("transformers fp32", "llama.cpp f32", "CTranslate2 float32"),
    "bf16": ("transformers bf16", "llama.cpp f16", "llama.cpp bf16", "CTranslate2 int8"),
}


def llama_cpp(dtype: str, task: Task, folder: Path) -> Write:
    """A function that writes with llama.cpp, all rows in one batch."""
    import llama_cpp as llama

    write_gguf(gpt2(task), dtype, folder / "model.gguf")
    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, ctypes.c_void_p())
    model = llama.llama_model_load_from_file(
        str(folder / "model.gguf").encode(), llama.llama_model_default_params()
    )
    rows = max(task.batches)
    settings = llama.llama_context_default_params()
    settings.n_ctx = rows * task.shape.max_len
    settings.n_seq_max = rows
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    context: Any = llama.llama_init_from_model(model, settings)
    sampler: Any = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    llama.llama_sampler_chain_add(sampler, llama.llama_sampler_init_top_k(task.top_k))
    llama.llama_sampler_chain_add(sampler, llama.llama_sampler_init_dist(0))
    batch = llama.llama_batch_init(rows * PROMPT, 0, 1)

    def write(prompts: torch.Tensor) -> list[list[int]]:
        llama.llama_memory_clear(llama.llama_get_memory(context), True)
        texts: list[list[int]] = [[] for _ in prompts]
        tokens, place = prompts.tolist(), 0
        while len(texts[0]) < task.new:
            batch.n_tokens = 0
            for row, ids in enumerate(tokens):
                for i, token in enumerate(ids):
                    n = batch.n_tokens
                    batch.token[n], batch.pos[n] = token, place + i
                    batch.n_seq_id[n], batch.seq_id[n][0] = 1, row
                    batch.logits[n] = i == len(ids) - 1
                    batch.n_tokens += 1
            if llama.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            place += len(tokens[0])
            ends = [len(tokens[0]) * (row + 1) - 1 for row in range(len(tokens))]
            tokens = [[llama.llama_sampler_sample(sampler, context, end)] for end in ends]
            for text, new in zip(texts, tokens, strict=True):
                text += new
        return texts

    return write


def write_gguf(model: Any, dtype: str, file: Path):
    """A GPT-2 of transformers in llama.cpp's format, its matrices in that type."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config.n_layer)
    for name, tensor in model.state_dict().items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue
        array = tensor.float()
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            array = array.T  # transformers has them as (inputs, outputs)
        array = array.contiguous().numpy()
        kind = gguf.GGMLQuantizationType[dtype if array.ndim == 2 and "wpe" not in name else "F32"]
        mapped = names.get_name(name.removeprefix("transformer."), (".weight", ".bias"))
        assert mapped is not None  # all of GPT-2's have one
        writer.add_tensor(mapped, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ctranslate2(dtype: str, task: Task, folder: Path) -> Write:
    """A function that writes with CTranslate2."""
    import ctranslate2
    from ctranslate2.converters.transformers import GPT2Loader

    loader = GPT2Loader()
    spec = loader.get_model_spec(gpt2(task))
    names = [str(token) for token in range(task.shape.vocab_size)]
    loader.set_vocabulary(spec, names)
    spec.config.bos_token = spec.config.eos_token = spec.config.unk_token = names[0]
    spec.validate()
    spec.optimize(quantization=dtype)
    spec.save(str(folder))
    generator = ctranslate2.Generator(
        str(folder), compute_type=dtype, intra_threads=torch.get_num_threads()
    )

    def write(prompts: torch.Tensor) -> list[list[int]]:
        found = generator.generate_batch(
            [[names[token] for token in row] for row in prompts.tolist()],
            min_length=task.new, max_length=task.new, sampling_topk=task.top_k,
            include_prompt_in_result=False,
        )  # fmt: skip
        return [result.sequences_ids[0] for result in found]

    return write


def gpt2(task: Task):
    """The model of transformers that is converted."""
    return generation.transformers("fp32", task)[0]


def measure(kind: str, dtype: str, task: Task) -> dict[str, float]:
    """Tokens per second at each batch."""
    with tempfile.TemporaryDirectory() as folder:
        if kind in ("ours", "compiled"):
            _, write = generation.ours(dtype, task, compiled=kind == "compiled")
        elif kind == "transformers":
            _, write = generation.transformers(dtype, task)
        else:
            make = {"llama_cpp": llama_cpp, "ctranslate2": ctranslate2}[kind]
            write = make(dtype, task, Path(folder))
        return timed(f"{kind} {dtype}", write, task)


def main():
    made = parser(__doc__)
    arguments = made.parse_args()
    if arguments.side:
        kind, dtype = arguments.side
        print(json.dumps(measure(kind, dtype, Task())))
        return
    missing = [name for name in PEERS if importlib.util.find_spec(name) is None]
    if importlib.util.find_spec("gguf") is None and "llama_cpp" not in missing:
        missing.append("llama_cpp")
    for name in missing:
        print(f"{name}: not installed, left out; pip install -e '.[bench]'", file=sys.stderr)
    sides = dict(OURS)
    for name, peer in PEERS.items():
        sides |= {} if name in missing else peer
    result = Result("generation_peers", "Generating on a CPU against llama.cpp and CTranslate2")
    report(result, in_turns("generation_peers", sides, arguments.rounds), missing)
    result.finish(arguments.json)


def report(result: Result, found: dict[str, list[dict]], missing: list[str]):
    """The table of all sides, and the bars: batch 1 against llama.cpp, 16 against CTranslate2."""
    rows = []
    for batch in map(str, BATCHES):
        for side, runs in found.items():
            rows.append([side, batch, median(runs, batch), spread(runs, batch)])
    left_out = "".join(f" Left out, not installed: {name}." for name in missing)
    result.table(
        "Tokens per second",
        ["side", "batch", "tokens/s", "least to most"],
        rows,
        f"{PROMPT} + {NEW} tokens, top_k {TOP_K}, {torch.get_num_threads()} threads a side."
        + left_out,
    )
    for precision, others in PRECISIONS.items():
        for peer, bar in BARS.items():
            beside = [side for side in others if side.startswith(peer) and side in found]
            for batch in BATCHES:
                if not beside or batch != {"llama.cpp": 1, "CTranslate2": 16}.get(peer, batch):
                    continue
                best = max(beside, key=lambda side: median(found[side], str(batch)))
                ours = median(found[f"ours {precision}, --compile"], str(batch))
                text = f"{precision}, --compile, batch {batch}, against {best}"
                result.claim(text, ours / median(found[best], str(batch)), bar)


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.generation_peers", main))
