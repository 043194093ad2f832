"""generate.py as a user meets it: what it writes for each kind of data, and what it refuses."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.numpy import save as to_safetensors

import generate
from checkpoint import writer
from common import cli
from common.errors import UserError
from data.slots import ESCAPE, PLACEHOLDERS, RESERVED, Slots
from data.tokenizers.char import CharTokenizer
from data.tokenizers.train_sentencepiece import train_sentencepiece
from generation import batched, compiled_decoder
from generation.sampling import Sampling
from generation.streaming import StreamedText
from model.config import ModelConfig
from model.transformer_full import TransformerDecoder

ROOT = Path(__file__).parent.parent
PAIRS = [{"prompt": f"ask {i}", "completion": f"answer {i}"} for i in range(5)]
TOKENIZERS = {
    "pairs": CharTokenizer("abcdefghijklmnopqrstuvwxyz 0123456789é\x1b"),
    "slots": CharTokenizer(f"acopty. /{PLACEHOLDERS}{ESCAPE}\ue1a1\ue1a2"),
    "lines": CharTokenizer("abcdefghijklmnopqrstuvwxyz", "char_bos"),
    "stream": CharTokenizer("abcdefghijklmnopqrstuvwxyz \n"),
}


def save_run(run: Path, kind: str, step: int = 10, tokenizer=None, max_len: int = 32) -> Path:
    """A run with one checkpoint of a tiny untrained model; the path of that step."""
    tokenizer = tokenizer or TOKENIZERS[kind]
    torch.manual_seed(0)
    shape = {"d_model": 8, "n_heads": 2, "n_layers": 1, "d_ff": 8, "max_len": max_len}
    shape["vocab_size"] = tokenizer.vocab_size
    model = TransformerDecoder.from_config(ModelConfig(**shape, init_std=0.3))
    weights = {name: p.detach().numpy() for name, p in model.named_parameters()}
    data = {"kind": "pairs", "slots": True} if kind == "slots" else {"kind": kind}
    config = {"model": shape, "data": data}
    state = {"step": step, "held_out": PAIRS if data["kind"] == "pairs" else []}
    files = {
        "model.safetensors": to_safetensors(weights),
        "config.json": json.dumps(config).encode(),
        "state.json": json.dumps(state).encode(),
        **tokenizer.files(),
    }
    return writer.save(run, step, files)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for kind in ("pairs", "slots", "lines", "stream"):
        save_run(folder / kind, kind)
    writer.set_best(folder / "pairs", 10, 1.25)
    return folder


@pytest.fixture
def write(runs, monkeypatch, capsys):
    """generate.py in this process: its stdout, or with --json the objects; status 0, no chatter."""

    def call(kind: str, *flags: str):
        argv = ["generate.py", "--checkpoint", str(runs / kind), "--device", "cpu", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        assert cli.run("generate.py", generate.main) == 0
        out, err = capsys.readouterr()
        first, *notes = err.splitlines()
        assert first.startswith(f"{runs / kind}")
        assert len(notes) <= 1 and all(note.startswith("note: ") for note in notes)
        call.note = "".join(notes)
        return [json.loads(line) for line in out.splitlines()] if "--json" in flags else out

    return call


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory):
    """An environment in which importing torch is an error."""
    folder = tmp_path_factory.mktemp("path")
    (folder / "torch.py").write_text("raise RuntimeError('torch was imported')")
    return os.environ | {"PYTHONPATH": str(folder)}


def run_script(*flags: str, stdin: str = "", env=None):
    """generate.py in a process of its own."""
    return subprocess.run(
        [sys.executable, "generate.py", *flags],
        input=stdin,
        capture_output=True,
        cwd=ROOT,
        env=env,
        encoding="utf-8",
        timeout=60,
    )


# What is written ----------------------------------------------------------------------------------


def test_without_a_prompt_pairs_show_held_out_ones_beside_the_truth(runs):
    done = run_script("--runs_dir", str(runs), "--checkpoint", str(runs / "pairs"), "--seed", "3")
    blocks = done.stdout.split("\n\n")
    assert done.returncode == 0 and len(blocks) == 3
    for block, pair in zip(blocks, PAIRS, strict=False):
        prompt, wrote, true = block.splitlines()
        assert prompt == pair["prompt"] and true == f"  true:  {pair['completion']}"
        assert wrote.startswith("  wrote: ")
    where = runs / "pairs" / "checkpoints" / "step_00000010"
    assert done.stderr == f"{where}: step 10, validation loss 1.2500\n"


def test_a_free_sample_is_ten_lines_or_one_passage(write):
    lines = write("lines")
    assert lines.count("\n") == 10 and len(set(lines.split("\n"))) > 8
    assert [row["sample"] for row in write("lines", "--json")] == list(range(10))
    (stream,) = write("stream", "--json")
    assert stream["prompt"] == "" and stream["tokens"] == 64 and stream["stop"] == "length"
    assert write("stream") == write("stream", "--prompt", "") == stream["text"] + "\n"


@pytest.mark.parametrize("kind", ["pairs", "lines", "stream"])
def test_a_prompt_stands_where_the_kind_of_data_has_it(kind, write, runs):
    model = TransformerDecoder.from_checkpoint(runs / kind)
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode("ab")
    start = tokenizer.start_id
    context = {"pairs": [*ids, start], "lines": [start, *ids], "stream": ids}[kind]
    end_id = None if kind == "stream" else tokenizer.end_id
    rules = Sampling(top_k=5, max_new_tokens=20)
    (new,) = batched.generate(model, [context], rules, seed=7, end_id=end_id)
    flags = ("--prompt", "ab", "--top_k", "5", "--max_new_tokens", "20", "--seed", "7")
    text = tokenizer.decode(new)
    assert write(kind, *flags) == ("" if kind == "pairs" else "ab") + escaped(text) + "\n"
    (answer,) = write(kind, *flags, "--json")
    ending = "length" if len(new) == 20 else "end"
    expected = {"prompt": "ab", "sample": 0, "text": text, "tokens": len(new)}
    assert answer == expected | {"stop": ending, "seed": 7}


def escaped(text: str) -> str:
    return text.replace("\x1b", "\\x1b")


@pytest.mark.parametrize("engine", ["torch", "numpy", "python"])
def test_a_prompts_arguments_are_put_back(engine, write, runs):
    """Random weights write placeholders and escapes, also such as no text has."""
    prompt = f"copy a.to c.ty {ESCAPE}t/ y{PLACEHOLDERS[3]}"
    slots, tokenizer = Slots(prompt), TOKENIZERS["slots"]
    ids = [*tokenizer.encode(slots.prompt), tokenizer.start_id]
    rules = Sampling(max_new_tokens=24)
    model = TransformerDecoder.from_checkpoint(runs / "slots")
    new = batched.generate(model, [ids] * 4, rules, seed=7, end_id=tokenizer.end_id)
    raw = [tokenizer.decode(row) for row in new]
    true = [slots.show(text) for text in raw]
    assert any("a.to" in text for text in true) and any(slots.lacks(text) for text in raw)
    flags = ("--engine", engine, "--prompt", prompt, "--max_new_tokens", "24", "--seed", "7")
    flags += ("--precision", "fp64") if engine != "python" else ()
    answers = write("slots", *flags, "--num_samples", "4", "--json")
    assert [answer["text"] for answer in answers] == true
    assert answers[0]["prompt"] == prompt
    assert write("slots", *flags) == escaped(true[0]) + "\n"  # token by token
    assert not RESERVED.search(write("slots", *flags, "--explain").split("token\n")[1])


def test_prompts_and_samples_are_independent_of_each_other(write, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffab\r\n\ncafé \U0001f600\n".encode())
    flags = ("--num_samples", "20", "--json", "--precision", "fp64", "--prompt", "x")
    rows = write("pairs", "--prompt_file", str(file), *flags)
    assert [row["prompt"] for row in rows[::20]] == ["x", "ab", "", "café \U0001f600"]
    assert len({row["text"] for row in rows[:20]}) > 15
    assert rows[:20] == write("pairs", *flags)
    assert rows[33] == write("pairs", "--prompt", "ab", *flags[:-2])[13]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_compiled_it_writes_the_same_greedy_text(write, monkeypatch):
    asked = []
    load = compiled_decoder.load
    monkeypatch.setattr(compiled_decoder, "load", lambda: asked.append(load()) or asked[-1])
    for kind in TOKENIZERS:
        flags = ("--greedy", "--json", "--num_samples", "3")
        assert write(kind, *flags, "--compile") == write(kind, *flags)
    assert len(asked) == len(TOKENIZERS)


def test_it_ends_before_a_stop_string(write):
    (free,) = write("stream", "--json")
    text = free["text"]
    stop = text[20:23]
    assert text.find(stop) == 20
    (stopped,) = write("stream", "--json", "--stop", stop, "--stop", "never seen")
    assert (stopped["text"], stopped["stop"]) == (text[:20], "stop")
    assert 23 <= stopped["tokens"] < 64  # those of the stop string too, and special ones
    assert write("stream", "--stop", stop) == text[:20] + "\n"


def test_control_characters_do_not_reach_a_terminal(write):
    rows = write("pairs", "--num_samples", "20", "--prompt", "a", "--json")
    assert "\x1b" in "".join(row["text"] for row in rows)
    shown = write("pairs", "--num_samples", "20", "--prompt", "a")
    assert shown == "".join(escaped(row["text"]) + "\n" for row in rows)
    assert write("stream", "--prompt", "\x9b2J\r\ta", "--greedy").startswith("\\x9b2J\\x0d\ta")


def test_a_prompt_longer_than_the_model_and_bytes_that_are_no_text(write):
    long = "a" * 10_000
    assert write("stream", "--prompt", long).startswith(long)
    assert "1 of 1 prompts longer than the model's window of 32 tokens" in write.note
    write("pairs", "--prompt", "a" * 32, "--prompt", "\U0001f600 \U0001f600", "--num_samples", "3")
    assert "1 of 2 prompts longer" in write.note  # <start> takes a place, too
    assert "2 of the prompts' 37 tokens are <unk>" in write.note
    write("stream", "--prompt", "a" * 32)
    assert write.note == ""
    (answer,) = write("pairs", "--json", "--prompt", "a\udce9")
    assert answer["prompt"] == "a\ufffd"


def test_greedy_is_temperature_0_and_top_k_1_and_top_k_may_exceed_the_vocabulary(write):
    greedy = write("lines", "--prompt", "ab", "--greedy")
    assert write("lines", "--prompt", "ab", "--temperature", "0") == greedy
    assert write("lines", "--prompt", "ab", "--top_k", "1") == greedy
    free = write("lines", "--prompt", "ab")
    assert write("lines", "--prompt", "ab", "--top_k", "1000000") == free != greedy


def test_interactive_answers_each_line_and_leaves_at_the_end(runs):
    flags = ("--checkpoint", str(runs / "lines"), "--interactive", "--max_new_tokens", "8")
    done = run_script(*flags, stdin="ab\nAB\n\nab\n")
    first, empty, again = done.stdout.splitlines()
    assert done.returncode == 0 and first.startswith("ab") and again.startswith("ab")
    assert first != again and empty != ""
    assert "'AB': the model has not seen these characters" in done.stderr
    alone = run_script(*flags, stdin="ab\n").stdout.splitlines()
    assert alone == [first]


def test_streaming_shows_whole_characters_and_nothing_of_a_stop_string():
    tokenizer = train_sentencepiece(["the cat sat on the mat\n"] * 20, "bpe", 280, lambda _: None)
    text = "the \U0001f600 is \u2581 and \ue000, the end. STOP here"
    for stops, expected in ((), text), (("STOP", "STOL"), text[:-9]), (("\U0001f600",), "the "):
        row = StreamedText(tokenizer, stops)
        pieces = []
        for token in tokenizer.encode(text):
            stopped = row.add(token)
            pieces.append(row.new_text())
            if stopped:
                break
        row.flush()
        pieces.append(row.new_text(complete=True))
        assert "".join(pieces) == row.text == expected
        assert row.stopped == bool(stops)
        assert not any("\ufffd" in piece or "ST" in piece for piece in pieces[:-1] if stops)
        assert len([piece for piece in pieces if piece]) > len(expected) / 6  # as it comes
    row = StreamedText(tokenizer, ())
    row.add(tokenizer.encode("\U0001f600")[0])
    row.flush()
    assert row.new_text() == "\ufffd"  # the rest of the character never came


# Which checkpoint ---------------------------------------------------------------------------------


def test_the_newest_run_and_a_step_that_training_removes_meanwhile(tmp_path, monkeypatch, capsys):
    save_run(tmp_path / "run", "lines", 1)
    removed = save_run(tmp_path / "run", "lines", 2)
    arguments = generate.Arguments(runs_dir=str(tmp_path))
    read = generate.read_source

    def removing(found, engine):
        if removed.exists():
            save_run(tmp_path / "run", "lines", 3)
            removed.rename(tmp_path / "gone")
        return read(found, engine)

    monkeypatch.setattr(generate, "read_source", removing)
    assert generate.open_source(arguments).checkpoint.step == 3
    assert capsys.readouterr().err.endswith("step_00000003: step 3\n")
    (tmp_path / "gone").rename(removed)
    with pytest.raises(UserError):
        generate.open_source(generate.Arguments(checkpoint=str(removed)))


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--promt", "x"], "--prompt"),
        (["--temperature", "nan"], "temperature = nan must be 0 (greedy) or more"),
        (["--top_p", "0"], "top_p = 0.0 must be above 0"),
        (["--top_k", "many"], "--top_k"),
        (["--stop", ""], "stop: an empty string"),
        (["--interactive", "--prompt", "x"], "leave --prompt and --prompt_file out"),
    ],
)
def test_a_wrong_command_line(flags, message, without_torch):
    done = run_script(*flags, env=without_torch)
    assert done.returncode == 2 and done.stdout == ""
    assert message in " ".join(done.stderr.replace("│", "").split())
    assert "Traceback" not in done.stderr


def test_what_cannot_be_read(runs, tmp_path, without_torch):
    empty, binary, damaged = tmp_path / "empty", tmp_path / "binary", tmp_path / "damaged"
    empty.write_bytes(b"")
    binary.write_bytes(b"ab\xff\n")
    (tmp_path / "old").write_bytes(b"a\rb\r")
    (tmp_path / "zip").write_bytes(gzip.compress(b"a"))
    step = save_run(damaged, "lines")
    weights = bytearray((step / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (step / "model.safetensors").write_bytes(weights)
    no_prompts = save_run(tmp_path / "no_prompts", "pairs")
    rewrite_state(no_prompts, {"step": 10, "held_out": []})
    lines = ["--checkpoint", str(runs / "lines")]
    for flags, message in (
        (["--runs_dir", str(tmp_path / "none")], "no run with a checkpoint there"),
        (["--checkpoint", str(tmp_path / "none")], "no such checkpoint or run"),
        (["--checkpoint", "https://a.b/c"], "--checkpoint https://a.b/c: a URL is not a file"),
        (["--checkpoint", str(step)], "damaged (its sha256 is not the one in MANIFEST.json)"),
        (["--checkpoint", str(no_prompts)], "give a --prompt"),
        ([*lines, "--prompt", "ab!?"], "the model has not seen these characters"),
        ([*lines, "--prompt_file", str(empty)], "is empty"),
        ([*lines, "--prompt_file", str(binary)], "not UTF-8 (byte 2)"),
        ([*lines, "--prompt_file", str(tmp_path)], "--prompt_file"),
        ([*lines, "--prompt_file", str(tmp_path / "old")], "its lines end in \\r alone"),
        ([*lines, "--prompt_file", str(tmp_path / "zip")], "is a gzip file"),
        ([*lines, "--prompt_file", "https://a.b/c"], "--prompt_file https://a.b/c: a URL is not"),
    ):
        done = run_script(*flags, env=without_torch)
        assert (done.returncode, done.stdout) == (2, "")
        last = done.stderr.splitlines()[-1]
        assert last.startswith("generate.py: ") and message in last
        assert done.stderr.count("\n") <= 2 and "Traceback" not in done.stderr


def rewrite_state(step: Path, state: dict):
    files = {
        file.name: file.read_bytes() for file in step.iterdir() if file.name != "MANIFEST.json"
    }
    writer.set_aside(step)
    writer.save(step.parent.parent, 10, {**files, "state.json": json.dumps(state).encode()})


def test_a_device_that_is_not_there(runs, monkeypatch, capsys):
    argv = ["generate.py", "--checkpoint", str(runs / "lines"), "--device", "cuda:99"]
    monkeypatch.setattr(sys, "argv", argv)
    assert cli.run("generate.py", generate.main) == 2
    assert "--device cuda:99: not on this machine" in capsys.readouterr().err


def test_the_flags_have_the_defaults_of_the_rules():
    assert generate.Arguments().sampling == Sampling()
