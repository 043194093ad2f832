"""Fuzzing what a user gives: configurations, data, prompts, command lines, tokenizers."""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
from hypothesis import strategies as st

import generate
from checkpoint.reader import Checkpoint
from checkpoint.safetensors_python import write_arrays
from checkpoint.shards import index_json
from common import cli
from common.errors import UserError
from data.batches import Examples
from data.config import DataConfig, Kind
from data.dataset import open_dataset
from data.prepared.building import build
from data.prompt_format import prompt_ids
from data.sources.source import open_source
from data.tokenizers.base import clean_text
from data.tokenizers.char import CharTokenizer
from data.tokenizers.load import load_tokenizer
from data.tokenizers.round_trip import warning
from data.tokenizers.train_sentencepiece import train_sentencepiece
from exchange.__main__ import import_gpt2
from exchange.huggingface import gpt2_shapes, read_shape
from exchange.tokenizers_json import to_tokenizers
from tests.data.tokenizers.foreign_files import all_kinds, tiktoken_file
from tests.faults.fuzz_inputs import (
    MB,
    ODD,
    Target,
    edited,
    like,
    mangled,
    named,
    pieces,
    quiet,
    resealed,
    target,
)
from tests.helpers import ROOT, TEXT
from training import config


@target("configurations")
def configurations(folder: Path) -> Target:
    shipped = [path.read_bytes() for path in sorted((ROOT / "configs").glob("*.toml"))]
    lines = [config.to_toml(config.Config()).encode(), *shipped]
    known = [key for key in config.flatten(config.Config()) if "." in key]
    value = st.sampled_from([*ODD, '"""', "1979-05-27", "0x_1", "'a'"]) | st.integers().map(str)
    settings = st.lists(st.tuples(st.sampled_from(known), value), max_size=4).map(
        lambda pairs: "".join(f"{key} = {text}\n" for key, text in pairs).encode()
    )

    def feed(name: str, content: bytes):
        (folder / name).write_bytes(content)
        read = config.load(folder / name)
        again = config.to_toml(read).encode()
        (folder / name).write_bytes(again)
        assert config.load(folder / name) == read, "reads back as other settings"

    inputs = settings | st.sampled_from(lines).flatmap(mangled) | st.binary(max_size=200)
    return Target(named(inputs, "fuzzed.toml"), feed)


@target("data files")
def data_files(folder: Path) -> Target:
    line = edited({"prompt": "a b\t\u00e9", "completion": "c\\\n"}) | pieces
    jsonl = st.lists(line, max_size=6).map(lambda lines: b"\n".join([*lines, b""]))
    text = mangled(TEXT.read_bytes()[:2000]) | st.binary(max_size=100)
    many = st.sampled_from([1] * 40 + [1000])  # now and then megabytes
    (folder / "dev.nl").write_bytes(b"a\nb\n")
    (folder / "dev.cm").write_bytes(b"c\nd\n")
    (folder / "train.cm").write_bytes(b"c\nd\n")
    (folder / "train.nl").write_bytes(b"a\nb\n")

    def feed(name: str, content: bytes):
        (folder / name).write_bytes(content)
        path = folder if name.endswith(".nl") else folder / name
        kind = Path(name).stem if name.endswith(".txt") else "auto"
        source = open_source(DataConfig(path=str(path), kind=kind), quiet, folder)
        for reader in filter(None, (source.train, source.val)):
            for _ in reader():
                pass

    names = ("stream.txt", "lines.txt", "train.nl", "data.jsonl")
    inputs = named(text, *names) | named(jsonl, "data.jsonl", "data.jsonl", "train.nl")
    big = st.tuples(inputs, many).map(lambda drawn: (drawn[0][0], drawn[0][1] * drawn[1]))
    return Target(big, feed)


@target("archives and records")
def archives_and_records(folder: Path) -> Target:
    texts = [{"text": f"text {i}\n\u00e9", "n": i} for i in range(30)]
    jsonl = "".join(f"{json.dumps(text)}\n" for text in texts).encode()
    table = "text,n\r\n" + "".join(f'"a ""b"" {i}\n",{i}\r\n' for i in range(30))
    whole = {"a.json": json.dumps(texts).encode(), "a.csv": table.encode()}
    for suffix, compress in {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}.items():
        whole[f"a.jsonl.{suffix}"] = compress(jsonl)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.jsonl", jsonl)
        archive.writestr("a/c.csv.gz", gzip.compress(table.encode()))
    whole["a.zip"] = file.getvalue()
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in {"a/b.jsonl": jsonl, "c.csv": table.encode(), "d.txt": b"d"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    whole["a.tar"] = file.getvalue()
    whole["a.tgz"] = gzip.compress(file.getvalue())
    with contextlib.suppress(ImportError):  # an extra
        whole |= columnar_files(folder, texts)
    inputs = st.one_of(named(mangled(content), name) for name, content in whole.items())

    def feed(name: str, content: bytes):
        (folder / name).write_bytes(content)
        for skip in (False, True):
            config = DataConfig(path=str(folder / name), skip_bad=skip, errors="replace")
            with contextlib.suppress(UserError):
                for text in open_source(config, quiet, folder).train():
                    text.encode()  # holds no half of a character
        assert {path.name for path in folder.iterdir()} <= whole.keys(), "something was unpacked"

    return Target(inputs, feed)


def columnar_files(folder: Path, rows: list[dict]) -> dict[str, bytes]:
    """Parquet and Arrow's two formats, by name. Raises ImportError."""
    import pyarrow as pa
    from pyarrow import ipc, parquet

    table = pa.Table.from_pylist(rows)
    parquet.write_table(table, folder / "a.parquet", row_group_size=10)
    for name, new in {"a.arrow": ipc.new_stream, "b.arrow": ipc.new_file}.items():
        with new(folder / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=10)
    return {name: (folder / name).read_bytes() for name in ("a.parquet", "a.arrow", "b.arrow")}


@target("prepared data sets")
def prepared_data(folder: Path) -> Target:
    texts = {"stream": "stream.txt", "pairs": "pairs.jsonl"}
    pair = [json.dumps({"prompt": f"p {n}", "completion": f"c {n}"}) for n in range(60)]
    (folder / texts["stream"]).write_bytes(TEXT.read_bytes()[:3000])
    (folder / texts["pairs"]).write_text("\n".join(pair))
    whole, inputs = {}, st.nothing()
    for kind, file in texts.items():
        settings = DataConfig(path=str(folder / file), tokenizer="char")
        (folder / kind).mkdir()
        build(open_source(settings, quiet, folder), settings, kind, folder / kind, quiet)
        for path in sorted((folder / kind).iterdir()):
            name = f"{kind} {path.name}"
            whole[name] = path.read_bytes()
            inputs = inputs | like(whole[name], name)
        sealed = edited(json.loads(whole[f"{kind} manifest.json"])).map(resealed)
        inputs = inputs | named(sealed | sealed, f"{kind} manifest.json")

    def feed(name: str, content: bytes):
        kind, _, file = name.partition(" ")
        place = folder / "changed"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / kind, place)
        (place / file).write_bytes(content)
        if file != "manifest.json":  # the manifest's hash of the file, so that more is read
            before, after = (hashlib.sha256(c).hexdigest() for c in (whole[name], content))
            manifest = whole[f"{kind} manifest.json"].replace(before.encode(), after.encode())
            (place / "manifest.json").write_bytes(resealed(manifest))
        data = open_dataset(place)
        for split in filter(None, (data.train, data.val)):
            examples = Examples(split, 8, data.tokenizer.pad_id)
            examples.batch(np.arange(min(2, examples.count)))
            f"{split.describe()} {split.targets_per_byte():.4f}"
        assert data.kind in get_args(Kind)
        for pair in data.held_out:
            prompt_ids(data.kind, data.tokenizer, pair["prompt"] + pair["completion"])

    return Target(inputs, feed)


@target("prompts")
def prompts(folder: Path) -> Target:
    text = TEXT.read_text(encoding="utf-8")[:20_000]
    tokenizers = [CharTokenizer(text, kind) for kind in ("char", "char_bos")]
    tokenizers += [train_sentencepiece([text], kind, 400, quiet) for kind in ("bpe", "unigram")]
    anything = st.text(max_size=60).map(lambda drawn: drawn.encode("utf-8", "surrogatepass"))
    texts = st.lists(anything | pieces | st.sampled_from([b" ", b"  ", b"def "]), max_size=8)
    inputs = st.tuples(texts.map(b"".join), st.sampled_from([1] * 9 + [50])).map(
        lambda drawn: (drawn[0] * drawn[1])[: 1 << 16]  # each byte may be an id, and so a number
    )

    def feed(name: str, content: bytes):
        (folder / name).write_bytes(content)
        with contextlib.suppress(UserError):  # of bytes that are not UTF-8
            generate.read_prompts(str(folder / name))
        prompt = clean_text(content.decode("utf-8", "surrogateescape"))  # as the command line
        for tokenizer in tokenizers:
            for kind in get_args(Kind):
                try:
                    ids = prompt_ids(kind, tokenizer, prompt)
                except UserError:
                    assert tokenizer.unk_id is None, "refused, and there is an unknown token"
                    continue
                assert ids and 0 <= min(ids) <= max(ids) < tokenizer.vocab_size, "ids"
            if tokenizer.kind == "sentencepiece":
                assert tokenizer.decode(tokenizer.encode(prompt)) == prompt, "another text"

    return Target(named(inputs, "prompts.txt"), feed)


@target("command lines")
def command_lines(folder: Path) -> Target:
    numbers = [
        "0",
        "-1",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "1e-400",
        "0x1",
        "\u0663",
        "",
        "1_0",
        "9" * 5000,
    ]
    flags = ["--temperature", "--top_k", "--top_p", "--max_new_tokens", "--num_samples", "--seed"]
    flags += ["--prompt", "--stop", "--precision", "--engine", "--top-k", "--greedy", "--what"]
    value = st.sampled_from(numbers) | st.floats().map(str) | st.integers().map(str)
    value = value | st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9
    )
    pair = st.tuples(st.sampled_from(flags), value)
    words = st.lists(pair | pair.map(lambda drawn: ("=".join(drawn),)), max_size=3)
    inputs = words.map(lambda drawn: "\0".join(sum(drawn, ())).encode())

    def feed(name: str, content: bytes):
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                read = cli.parse(generate.Arguments, "", argv=content.decode().split("\0"))
        except SystemExit as ended:
            assert ended.code == 2, f"status {ended.code}"
            assert "Traceback" not in said.getvalue()
        else:
            assert replace(read.sampling) == read.sampling, "sampling numbers that are none"

    return Target(named(inputs, "argv.txt"), feed)


@target("tokenizers")
def tokenizers(folder: Path) -> Target:
    train_sentencepiece([TEXT.read_text()[:3000]], "bpe", 320, quiet).save(folder)
    CharTokenizer("abcd", "char").save(folder)
    text, model = ((folder / f"tokenizer.{kind}").read_bytes() for kind in ("json", "model"))

    def feed(name: str, content: bytes):
        (folder / name).write_bytes(content)
        tokenizer = load_tokenizer(folder / name)
        tokenizer.decode(range(tokenizer.vocab_size))
        with contextlib.suppress(UserError):
            assert all(0 <= i < tokenizer.vocab_size for i in tokenizer.encode("a text \u00e9"))

    inputs = like(text, "tokenizer.json") | named(mangled(model), "tokenizer.model")
    return Target(inputs | named(st.binary(max_size=99), "tokenizer.model"), feed)


@target("foreign tokenizers")
def foreign_tokenizers(folder: Path) -> Target:
    suffixes = {"sentencepiece": "model", "tiktoken": "tiktoken"}
    inputs = named(st.binary(max_size=99), "tokenizer.tiktoken", "tokenizer.json")
    for kind, content in all_kinds().items():
        inputs = inputs | like(content, f"tokenizer.{suffixes.get(kind, 'json')}")
    settings = {
        "special": {"end": "</s>", "pad": None},
        "pattern": r"\w+|\W+",
        "added": {"</s>": 9},
    }
    inputs = inputs | like(json.dumps(settings).encode(), "special_tokens.json")
    text = "A text \u00e9 <|endoftext|> [SEP]</s>\n"

    def feed(name: str, content: bytes):
        (folder / "tokenizer.tiktoken").write_bytes(tiktoken_file())
        (folder / "special_tokens.json").unlink(missing_ok=True)
        (folder / name).write_bytes(content)
        path = folder / (name if name != "special_tokens.json" else "tokenizer.tiktoken")
        tokenizer = load_tokenizer(path, pattern="gpt2" if name.endswith(".tiktoken") else "")
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids), "ids"
        ends = tokenizer.special_ids - {tokenizer.unk_id}
        assert not ends & {*ids}, "a text has a special token"
        tokenizer.decode(range(min(tokenizer.vocab_size, 1000)))
        tokenizer.token(tokenizer.vocab_size - 1)
        warning(tokenizer, [text])

    return Target(inputs, feed)


@target("models of others")
def models_of_others(folder: Path) -> Target:
    """A GPT-2 in shards, one of whose files is changed: a run that can be read, or nothing."""
    settings = {"model_type": "gpt2", "vocab_size": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    settings |= {"n_positions": 16, "n_inner": None, "activation_function": "gelu_new"}
    given, run = folder / "given", folder / "runs" / "run"
    given.mkdir()
    (given / "config.json").write_text(json.dumps(settings))
    shapes = gpt2_shapes(read_shape(given))
    arrays = {name: np.full(shape, 0.1, np.float32) for name, shape in shapes.items()}
    shard, tokens = "model-00001-of-00001.safetensors", CharTokenizer("abcd")
    valid = {
        "config.json": json.dumps(settings).encode(),
        "tokenizer.json": to_tokenizers(tokens, "stream").to_str().encode(),
        "model.safetensors.index.json": index_json(
            "model.safetensors", [list(arrays)], {name: a.nbytes for name, a in arrays.items()}
        ),
        shard: write_arrays(arrays),
    }

    def feed(name: str, content: bytes):
        for other, whole in valid.items():
            (given / other).write_bytes(content if other == name else whole)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                import_gpt2(given, run)
        finally:
            left = sorted(path.name for path in folder.glob("runs/*"))
            assert left in ([], ["run"]), "half a run is left"
            if left:
                source = generate.read_source(Checkpoint.find(run, quiet), "numpy")
                generate.plan(source, ["ab"], 1)
                shutil.rmtree(run)

    inputs = [like(whole, name) for name, whole in valid.items()]
    return Target(st.one_of(*inputs), feed, slack=64 * MB)
