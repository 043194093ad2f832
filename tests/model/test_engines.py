"""generate.py with each of the three engines: the same text, with no more imported than needed."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save as to_safetensors

import generate
from checkpoint import writer
from checkpoint.reader import Checkpoint, list_steps
from common import cli
from data.tokenizers.char import CharTokenizer
from data.tokenizers.train_sentencepiece import train_sentencepiece
from generation.explain import Explained, in_colour
from generation.sampling import Sampling, explain
from model.config import ModelConfig
from model.engines import WEIGHTS, load_model
from model.transformer_full import TransformerDecoder
from model.transformer_lite import TransformerDecoderLite
from model.transformer_micro import TransformerDecoderMicro
from tests.helpers import ROOT, refused, run, write_config

ENGINES = ("torch", "numpy", "python")
SAMPLED = ("--temperature", "1.3", "--top_k", "12", "--top_p", "0.95", "--precision", "fp64")
PROMPTS = {
    "characters": ("--prompt", "the ", "--prompt", "", "--prompt", "A longer prompt, " * 3),
    "pairs": (
        "--prompt",
        "turn the left wheel",
        "--prompt",
        "",
        "--prompt",
        "caf\u00e9 \U0001f600",
    ),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with two short runs: a stream of characters, and pairs with SentencePiece."""
    folder = tmp_path_factory.mktemp("home")
    sides, things = ("left", "right"), ("wheel", "wing", "door", "lamp", "arm", "hand", "eye")
    pairs = [
        {"prompt": f"{verb} the {side} {thing}", "completion": f"{side[0]}-{thing} {verb}"}
        for verb in ("turn", "lift", "open", "move", "hold", "drop")
        for side in sides
        for thing in things
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    longer = ("--max_steps", 250, "--train.eval_interval", 250)  # or greedy text is all spaces
    pieces = ("--data.tokenizer", "bpe", "--data.vocab_size", 300, "--data.path", "pairs.jsonl")
    write_config(folder)
    for name, flags in ("characters", longer), ("pairs", (*longer, *pieces)):
        done = run("train.py", "--config", "tiny.toml", "--name", name, *flags, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def write(home, monkeypatch, capsys):
    """generate.py in this process: its stdout, or with --json the objects."""

    def call(name: str, engine: str, *flags: str):
        argv = ["generate.py", "--checkpoint", str(home / "runs" / name), "--engine", engine]
        monkeypatch.setattr(sys, "argv", [*argv, "--device", "cpu", *flags])
        status = cli.run("generate.py", generate.main)
        out, err = capsys.readouterr()
        assert status == 0, err
        return [json.loads(line) for line in out.splitlines()] if "--json" in flags else out

    return call


def in_a_process(code: str, *flags: str, stdin: str = "", **environment):
    """generate.py in a process of its own, and then `code`."""
    code = f"import sys, generate; from common import cli\ncli.run('g', generate.main)\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code, *flags],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env=os.environ | environment,
        encoding="utf-8",
        timeout=60,
    )


# The same text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_text_is_the_same_with_each_engine(write, name):
    flags = (*PROMPTS[name], "--greedy", "--max_new_tokens", "40", "--json")
    expected = write(name, "torch", *flags)
    assert len({row["text"] for row in expected}) > 1
    for engine in ENGINES[1:]:
        assert write(name, engine, *flags) == expected


@pytest.mark.parametrize("name", PROMPTS)
def test_sampled_text_and_its_explanation_are_the_same_in_float64(write, name):
    flags = (*PROMPTS[name], *SAMPLED, "--num_samples", "3", "--max_new_tokens", "40", "--json")
    expected = write(name, "torch", *flags, "--explain")
    assert len({row["text"] for row in expected}) > 6
    for engine in ENGINES[1:]:
        rows = write(name, engine, *flags, "--explain")
        for row, other in zip(rows, expected, strict=True):
            tokens, others = row.pop("tokens_explained"), other["tokens_explained"]
            assert row == {key: other[key] for key in row}
            for token, right in zip(tokens, others, strict=True):
                # what distinguishes them is rounding; texts are equal, so names and ids are too
                assert token == {
                    key: pytest.approx(value, abs=1e-9) if isinstance(value, float) else value
                    for key, value in right.items()
                }
            ended = row["stop"] == "end"
            assert len(tokens) == row["tokens"] + ended
            assert ("<end>" in [token["token"] for token in tokens[-1:]]) == ended


def test_plain_output_stops_and_free_texts_are_the_same(write):
    for name, flags in (
        ("characters", ("--prompt", "the ", "--stop", "e", "--max_new_tokens", "60")),
        ("characters", ("--max_new_tokens", "20")),
        ("pairs", ("--max_new_tokens", "20")),
        ("pairs", (*PROMPTS["pairs"], "--num_samples", "2", "--max_new_tokens", "8")),
    ):
        expected = write(name, "torch", *SAMPLED, *flags)
        for engine in ENGINES[1:]:
            assert write(name, engine, *SAMPLED, *flags) == expected


def test_numpy_has_float32_and_python_has_only_float64(write):
    flags = ("--prompt", "the ", "--json", "--explain", "--max_new_tokens", "3")
    (single,), (double,) = (
        write("characters", "numpy", *flags, "--precision", p) for p in ("fp32", "fp64")
    )
    assert single != double and single["text"] == double["text"]
    assert write("characters", "python", *flags) == write(
        "characters", "python", *flags, "--precision", "fp64"
    )


def test_interactive(home):
    flags = ("--checkpoint", str(home / "runs/pairs"), "--engine", "python", "--interactive")
    flags += ("--max_new_tokens", "8", "--explain")
    done = in_a_process("", *flags, stdin="turn the left wheel\n\nturn the left wheel\n")
    first, empty, again, rest = done.stdout.split("\n\n")
    assert rest == "" and first != again
    for answer in (first, empty, again):
        assert answer.splitlines()[1].split() == ["probability", "rank", "bits", "token"]


# What is imported ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_imports_what_it_needs(home, name, engine):
    done = in_a_process(
        "print([m for m in ('torch', 'numpy') if m in sys.modules])",
        *("--checkpoint", str(home / "runs" / name), "--engine", engine, "--max_new_tokens", "2"),
        *("--explain", "--device", "cpu", "--top_k", "5"),
    )
    expected = ["torch", "numpy"][ENGINES.index(engine) :]
    assert done.stdout.splitlines()[-1] == str(expected), done.stderr


# Loading ----------------------------------------------------------------------------------------

SHAPES = {
    "sinusoidal, untied": {},
    "learned, tied": {"positions": "learned", "tie_embeddings": True, "norm_first": True},
    "rms, no biases": {"norm": "rms", "bias": False, "embedding_norm": True, "final_norm": True},
}


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES)
def test_a_loaded_decoder_is_the_saved_one_and_nothing_is_drawn_for_it(options, precision):
    """All that is no weight is there too; memory that nothing was put into would be NaN."""
    dtype = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}[precision]
    config = ModelConfig(40, 16, 4, 2, 32, 12, **options)
    arrays = TransformerDecoder.from_config(config, torch.float64)
    arrays = {name: p.detach().numpy() for name, p in arrays.named_parameters()}
    expected = TransformerDecoder.from_config(config, dtype).eval()
    expected.load_weights(arrays)

    state = torch.get_rng_state()
    torch.use_deterministic_algorithms(True)  # which also fills what is allocated with NaN
    try:
        model = load_model("torch", config, arrays, "cpu", precision)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    others = {**dict(expected.named_parameters()), **dict(expected.named_buffers())}
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == dtype and tensor.requires_grad == others[name].requires_grad
        assert torch.equal(tensor, others[name]), name
    assert model.state_dict().keys() == expected.state_dict().keys()  # the table is not saved
    assert (model.output.weight is model.embed.weight) == config.tie_embeddings
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids), expected(ids))
    model(ids).float().sum().backward()  # it can be trained


def test_from_checkpoint_draws_nothing(home):
    state = torch.get_rng_state()
    model = TransformerDecoder.from_checkpoint(home / "runs" / "characters")
    assert torch.equal(torch.get_rng_state(), state) and not model.training
    assert all(p.isfinite().all() for p in model.parameters())


DECODERS = (TransformerDecoder, TransformerDecoderLite, TransformerDecoderMicro)


@pytest.mark.parametrize("decoder", DECODERS)
def test_generate_takes_ids_of_any_kind_and_nothing_else(home, decoder):
    model = decoder.from_checkpoint(home / "runs" / "characters")
    expected = model.generate([7, 8], max_len=4)
    for same in ((7, 8), np.array([7, 8]), torch.tensor([7, 8])):
        assert model.generate(same, max_len=4) == expected
    for wrong in ([[1, 2], [3]], "12", 3, None, [1.5], np.array([[7, 8]])):
        with pytest.raises(ValueError, match=r"^tokens = .* must be a list of ids"):
            model.generate(wrong, max_len=4)


# Explanations -------------------------------------------------------------------------------------


def test_a_table_beside_the_text(write):
    flags = ("--prompt", "the ", "--max_new_tokens", "5", "--seed", "4")
    text, *lines, empty, end = write("characters", "numpy", *flags, "--explain").split("\n")
    assert text + "\n" == write("characters", "numpy", *flags) and empty == end == ""
    assert lines[0].split() == ["probability", "rank", "bits", "token"]
    (row,) = write("characters", "numpy", *flags, "--explain", "--json")
    assert len(lines[1:]) == len(row["tokens_explained"]) == 5
    for line, token in zip(lines[1:], row["tokens_explained"], strict=True):
        probability, rank, bits, name = line.split(None, 3)
        assert (probability, int(rank)) == (f"{token['probability']:.2%}", token["rank"])
        assert bits == f"{token['entropy']:.2f}"
        assert name in (repr(token["token"]), "<end>", "<pad>")
    heading = write("characters", "numpy", *flags, *SAMPLED, "--explain").split("\n")[1]
    assert heading.endswith("rank   bits  top_k removes  top_p removes  token")
    several = write("characters", "numpy", *flags, "--num_samples", "2", "--explain")
    assert several.count("probability") == 2 and several.count("\n---\nthe ") == 1


def test_tokens_are_shown_so_that_each_is_seen():
    characters = CharTokenizer("a' \n\t\x1b\x9b\u202e\ue000\ufffd")
    named = Explained(characters, Sampling())
    for token in range(characters.vocab_size):
        named.add([0.0] * characters.vocab_size, token)
    shown = [line.split(None, 3)[3] for line in named.table(colour=False).splitlines()[1:]]
    assert shown[:4] == ["<pad>", "<unk>", "<start>", "<end>"]
    assert shown[4:10] == ["'\\t'", "'\\n'", "'\\x1b'", "' '", '"\'"', "'a'"]
    assert shown[10:] == ["'\\x9b'", "'\\u202e'", "\ue000", "\ufffd"]

    pieces = train_sentencepiece(["the cat sat on the mat\n"] * 20, "bpe", 280, lambda _: None)
    named = Explained(pieces, Sampling())
    ids = pieces.encode("the\n\U0001f600\u2581")
    for token in ids:
        named.add([0.0] * pieces.vocab_size, token)
    names = [row["token"] for row in named.as_json()]
    assert [row["id"] for row in named.as_json()] == ids
    assert names[:2] == ["the", "\n"] and names[2:6] == ["<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]


def test_colours_say_how_probable_a_token_was(monkeypatch):
    tokenizer = CharTokenizer("abc")
    named = Explained(tokenizer, Sampling())
    logits = [float(np.log(p)) for p in (1e-9, 1e-9, 1e-9, 1e-9, 0.7, 0.25, 0.05)]
    for token in (4, 5, 6):
        named.add(logits, token)
    lines = named.table(colour=True).splitlines()
    assert [line.split("  ")[-1] for line in lines[1:]] == [
        "\x1b[32m'a'\x1b[0m",
        "\x1b[33m'b'\x1b[0m",
        "\x1b[31m'c'\x1b[0m",
    ]
    assert "\x1b" not in named.table(colour=False)

    monkeypatch.delenv("NO_COLOR", raising=False)
    terminal, file = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    assert in_colour(terminal) and not in_colour(file)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not in_colour(terminal)


def test_the_columns_are_those_of_the_rules_that_take_part():
    tokenizer, logits = CharTokenizer("abc"), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    for rules, headings in (
        (Sampling(), "probability rank bits token"),
        (Sampling(top_k=2), "probability drawn rank bits top_k removes token"),
        (Sampling(top_p=0.5), "probability drawn rank bits top_p removes token"),
        (Sampling(top_k=2, greedy=True), "probability rank bits token"),
    ):
        named = Explained(tokenizer, rules)
        named.add(logits, 6)
        first, second = named.table(colour=False).splitlines()
        assert first.split() == headings.split()
        assert first.index("token") == second.index("'c'")
        why = explain(logits, rules, 6)
        assert second.split()[0] == f"{why.probability:.2%}"
        if "top_k" in headings:
            assert f"    5 {why.top_k_probability:7.2%}" in second


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["numpy", "--device", "cuda"], "--device cuda: the numpy engine computes on the CPU"),
        (["python", "--device", "mps"], "--device mps: the python engine computes on the CPU"),
        (["numpy", "--precision", "bf16"], "--precision bf16: the numpy engine has only fp32 and"),
        (["python", "--precision", "bf16"], "--precision bf16: the python engine has only fp64"),
        (["numpy", "--compile"], "--compile: the numpy engine is not compiled; leave it out"),
    ],
)
def test_what_only_torch_has(home, flags, message):
    where = ("--checkpoint", home / "runs" / "pairs")
    assert message in refused(run("generate.py", "--engine", *flags, *where, cwd=home))


def test_an_engine_that_is_none(home):
    done = run("generate.py", "--engine", "jax", cwd=home)
    assert done.returncode == 2 and all(name in done.stderr for name in ENGINES)


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_cannot_be_used(home, tmp_path, monkeypatch, capsys, engine):
    found = Checkpoint(list_steps(home / "runs" / "characters")[-1])
    files = {name: found.read(name) for name in found.manifest["files"]}
    weights = found.tensors(WEIGHTS)
    first = next(iter(weights))
    for step, (content, message) in enumerate(
        (
            (b"\x08" + bytes(7) + b"{}      x", "not a safetensors file"),
            (
                to_safetensors({n: a for n, a in weights.items() if n != first}),
                "use weights of a model with the same config.json",
            ),
            (
                to_safetensors(weights | {first: weights[first][:-1].copy()}),
                "use weights of a model with the same config.json",
            ),
            (to_safetensors({n: a * np.float32("nan") for n, a in weights.items()}), "not finite"),
        )
    ):
        place = writer.save(tmp_path, step, files | {WEIGHTS: content})
        argv = ["generate.py", "--checkpoint", str(place), "--engine", engine, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", argv)
        assert cli.run("generate.py", generate.main) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith("generate.py: ") and message in last


def test_what_is_not_installed_is_named(tmp_path):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch', name='torch')")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); sys.path.insert(0, {str(ROOT)!r})\n"
    code += "from model.engines import decoder_class\ndecoder_class('torch')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "UserError: --engine torch: torch is not installed" in done.stderr
