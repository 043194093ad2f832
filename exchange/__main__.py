"""Takes models to other programs, and brings GPT-2 here.

python -m exchange export RUN DIR                   for transformers: weights, tokenizer, page
python -m exchange export RUN DIR --format gguf     for llama.cpp
python -m exchange export RUN DIR --format onnx     for onnxruntime; any model
python -m exchange import DIR RUN                   a GPT-2 of transformers as a run
"""

import signal

if __name__ == "__main__":  # before what takes time: until cli.run() listens, Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint import writer
from checkpoint.reader import Checkpoint
from checkpoint.safetensors_python import in_file_order, pieces
from common import cli
from common.errors import UnreadableError, UserError
from common.files import refuse_url, user_path, write_hashed, write_synced
from data.config import DataConfig
from data.prompt_format import end_id
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import TOKENIZER_FILES, load_tokenizer
from exchange import huggingface, tokenizers_json
from exchange.folder import new_folder, refuse_taken
from exchange.model_card import model_card
from model.config import ModelConfig, read_model_config
from training.config import Config

DESCRIPTION = "Takes models to other programs, and brings GPT-2 here."


@dataclass(frozen=True)
class Source:
    """What an export needs of a checkpoint, all of it read and verified."""

    checkpoint: Checkpoint
    kind: str  # of its data: "stream", "lines", "documents" or "pairs"
    start_token: bool  # whether a document begins with a token of its own
    tokenizer: Tokenizer
    config: ModelConfig
    weights: dict[str, np.ndarray]


def main() -> int:
    parser = cli.Parser(
        prog="python -m exchange", description="Models for other programs, and from them."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    out = commands.add_parser("export", help="RUN DIR [--format huggingface, gguf or onnx]")
    out.add_argument(
        "run", metavar="RUN", help="folder of a run (its best checkpoint) or of a step"
    )
    out.add_argument("folder", metavar="DIR", help="folder to make")
    out.add_argument("--format", choices=FORMATS, default="huggingface", help="for which program")
    into = commands.add_parser("import", help="DIR RUN: a GPT-2 in Hugging Face's form as a run")
    into.add_argument("folder", metavar="DIR", help="folder with config.json and model.safetensors")
    into.add_argument("run", metavar="RUN", help="folder of the run to make")
    options = parser.parse_args()
    for name in ("run", "folder"):
        refuse_url(getattr(options, name), f"{options.command} {getattr(options, name)}")
    run, folder = user_path(options.run), user_path(options.folder)
    if options.command == "export":
        refuse_taken(folder)  # before what takes time
        export(read_source(run), folder, options.format)
    else:
        refuse_taken(run)
        import_gpt2(folder, run)
    return 0


# Out ----------------------------------------------------------------------------------------------


def read_source(path: Path) -> Source:
    """Reads all that is needed of a run's best checkpoint. Raises UserError."""
    checkpoint = Checkpoint.find(path)
    for name in TOKENIZER_FILES:
        if name in checkpoint.manifest["files"]:
            checkpoint.read(name)  # which verifies it
    data = checkpoint.config["data"]
    return Source(
        checkpoint,
        data.get("kind", "stream"),
        data.get("start_token", True),
        load_tokenizer(checkpoint.path),
        read_model_config(checkpoint),
        checkpoint.tensors("model.safetensors"),
    )


def export(source: Source, target: Path, form: str):
    """Makes the folder `target`, whole or not at all. Raises UserError, OSError."""
    with new_folder(target) as folder:
        FORMATS[form](source, folder)
    if source.checkpoint.config["data"].get("slots"):
        print("note: data.slots: it reads and writes placeholders, which only generate.py fills")
    print(f"{source.checkpoint.path}: step {source.checkpoint.step:,} -> {cli.quoted(target)}:")
    for file in sorted(target.iterdir()):
        print(f"  {file.name:24} {file.stat().st_size:>13,} bytes")


def tokenizer_files(source: Source) -> dict[str, bytes]:
    """The tokenizer in Hugging Face's form. Raises UserError."""
    max_len = source.config.max_len
    return tokenizers_json.tokenizer_files(
        source.tokenizer, source.kind, max_len, source.start_token
    )


def card(source: Source, library: str, example: str) -> bytes:
    """Its README.md."""
    return model_card(source.checkpoint, source.config, source.kind, library, example)


def to_huggingface(source: Source, folder: Path):
    """A model of transformers with its tokenizer."""
    config, tokenizer = source.config, source.tokenizer
    kind = huggingface.architecture(config, str(source.checkpoint.path))
    ids = {
        "bos_token_id": tokenizer.start_id,
        "eos_token_id": end_id(source.kind, tokenizer),
        "pad_token_id": tokenizer.pad_id,
    }
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_length": config.max_len}
    files = tokenizer_files(source)
    files["config.json"] = json_file(huggingface.settings(config, kind) | ids)
    files["generation_config.json"] = json_file(ids | sampling)
    files["README.md"] = card(source, "transformers", TRANSFORMERS)
    for name, content in files.items():
        write_synced(folder / name, content)
    arrays = huggingface.exported(config, source.weights, kind)
    kinds = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    ordered = (arrays[name] for name in in_file_order(kinds))
    write_hashed(folder / huggingface.WEIGHTS, pieces(kinds, ordered, {"format": "pt"}))


def to_gguf(source: Source, folder: Path):
    """A file of llama.cpp."""
    from exchange.gguf import write_gguf

    where, name = str(source.checkpoint.path), source.checkpoint.run.name
    model = source.config, source.weights, source.tokenizer, source.kind
    if note := write_gguf(*model, name, where, folder / "model.gguf", source.start_token):
        print(f"note: {note}")
    write_synced(folder / "README.md", card(source, "llama-cpp-python", LLAMA_CPP))


def to_onnx(source: Source, folder: Path):
    """A graph for onnxruntime and its like, with the tokenizer beside it where there is one."""
    from exchange.onnx import write_onnx

    write_onnx(source.config, source.weights, folder)
    try:
        files = tokenizer_files(source)
    except UserError as error:  # the graph is of use without it
        print(f"note: {error}")
        files = source.tokenizer.files()
    files["README.md"] = card(source, "onnx", ONNXRUNTIME)
    for name, content in files.items():
        write_synced(folder / name, content)


FORMATS: Mapping[str, Callable[[Source, Path], None]] = {
    "huggingface": to_huggingface,
    "gguf": to_gguf,
    "onnx": to_onnx,
}
TRANSFORMERS = """
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("DIR")
model = AutoModelForCausalLM.from_pretrained("DIR")
ids = model.generate(**tokenizer("PROMPT", return_tensors="pt"))
print(tokenizer.decode(ids[0], skip_special_tokens=True))
"""
LLAMA_CPP = """
from llama_cpp import Llama

model = Llama("DIR/model.gguf")
print(model("PROMPT")["choices"][0]["text"])
"""
ONNXRUNTIME = """
import numpy, onnxruntime

session = onnxruntime.InferenceSession("DIR/model.onnx")
(logits,) = session.run(["logits"], {"ids": numpy.array([[5, 6, 7]])})  # (1, 3, vocabulary)
"""


def json_file(content: dict[str, Any]) -> bytes:
    """The bytes of a JSON file for people to read, too."""
    return f"{json.dumps(content, indent=2)}\n".encode()


# In -----------------------------------------------------------------------------------------------


PADDING = 1024  # tokens beyond the tokenizer's by which vocabularies are made a round number


def read_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a GPT-2, also as its older files have it. Raises UserError."""
    older = folder / "vocab.json", folder / "merges.txt"
    if (folder / "tokenizer.json").exists() or not all(file.is_file() for file in older):
        try:
            return load_tokenizer(folder)
        except UserError as error:
            if "data.end_token" not in str(error):  # a setting of training
                raise
            raise UserError(
                f"{folder / 'tokenizer.json'}: no token in it is known to end a text; set "
                "eos_token in tokenizer_config.json to the one that does"
            ) from None
    try:
        vocab, merges = (file.read_bytes() for file in older)
    except OSError as error:
        raise UnreadableError(error, older[0]) from None
    return tokenizers_json.of_gpt2_files(vocab, merges, str(older[0]))


def import_gpt2(source: Path, run: Path):
    """Makes the run of a GPT-2, with one checkpoint, whole or not at all. Raises UserError."""
    shape = huggingface.read_shape(source)
    tokenizer = read_tokenizer(source)
    unused = shape.vocab_size - tokenizer.vocab_size
    if not 0 <= unused < PADDING:
        raise UserError(
            f"{source / 'tokenizer.json'}: has {tokenizer.vocab_size:,} tokens, but vocab_size of "
            f"config.json is {shape.vocab_size:,}; use the tokenizer of this model"
        )
    tensors = huggingface.read_tensors(source, shape)
    shape = replace(shape, vocab_size=tokenizer.vocab_size)
    weights = huggingface.Imported(shape, tensors)
    settings = replace(Config(), model=shape, data=DataConfig(kind="documents"))
    state = {"step": 0, "tokens": 0, "held_out": [], "validates": False}
    state |= {"tokenizer": tokenizer.fingerprint, "tokenizer_given": True}
    state["imported_from"] = source.resolve().name
    files = {
        huggingface.WEIGHTS: pieces(weights.kinds(), weights.arrays()),
        "config.json": json_file(asdict(settings)),
        "state.json": json_file(state),
        **tokenizer.files(),
    }
    with new_folder(run) as folder:
        writer.save(folder, 0, files)
    print(f"{source} -> {cli.quoted(run)}: {shape.num_parameters():,} parameters")
    if unused:
        print(
            f"note: the last {unused:,} of its {unused + shape.vocab_size:,} tokens are left out, "
            "which its tokenizer has no text for"
        )
    print(f"python generate.py --checkpoint {cli.quoted(run)} --prompt '...'")
    print(f"python train.py --init_from {cli.quoted(run)} --data.path my_text.txt")


if __name__ == "__main__":
    sys.exit(cli.run("python -m exchange", main))
