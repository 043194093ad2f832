"""Input that means ill, or nothing: prompts, settings and configurations."""

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import generate
from common import cli
from common.errors import UserError
from tests.faults.campaign import TINY, Tally, campaign, finished, one_line
from tests.faults.corruption import copy_run, flipped
from tests.helpers import ROOT, command, run, write_config
from training.config import load

ENGINES = ("torch", "numpy", "python")
SECONDS = 60  # more is a hang
MEMORY = 16 << 30  # bytes of address space for a program that is given absurd numbers


def attempt(arguments: list[str], cwd: Path, **more) -> subprocess.CompletedProcess:
    """A command to its end, or until it hangs; bytes that are not UTF-8 stay visible."""
    options = {"stdin": subprocess.DEVNULL} | ({"preexec_fn": bounded} if os.name != "nt" else {})
    options["env"] = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    options |= {"timeout": SECONDS, "encoding": "utf-8", "errors": "backslashreplace"} | more
    if "input" in options:
        del options["stdin"]
    try:
        return subprocess.run(arguments, cwd=cwd, capture_output=True, **options)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(arguments, f"of a hang of {SECONDS} s", "", "")


def bounded():
    """Limits this process's memory, so that what grows without end fails and harms nobody."""
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def judge(result: subprocess.CompletedProcess, refused: bool | None = None) -> str:
    """What is wrong with how a program ended; "" for a result, or one line and status 2."""
    said = result.stdout + result.stderr
    if found := cli.CONTROL.search(said):
        return f"a control character, {found[0]!r}, is shown"
    if result.returncode == 0 and not refused and "Traceback" not in said:
        return ""
    known = re.compile(r"skipped: |\S+step_\d+: step ")  # which are no complaints
    lines = [line for line in result.stderr.splitlines() if not known.match(line)]
    return one_line(
        subprocess.CompletedProcess(result.args, result.returncode, "", "\n".join(lines))
    )


# Configurations -----------------------------------------------------------------------------------

VALUES = [  # of a key
    '"x"', "-1", "0", "1e400", "nan", "-inf", "true", "[]", "{}", "{ a = 1 }", "[[1]]",
    "1979-05-27", "07:32:00", "9" * 30, "9" * 5000, "0x" + "f" * 20, "0x" + "f" * 5000, '""',
    '"""a\nb"""', '"\\u0000"', '"\\u001b[31m"', "1e308", "5e-324", "[" * 100 + "]" * 100,
    "[" * 5000, "'", "0.1",
]  # fmt: skip


@campaign("configs", "18", "a bad configuration file given to train.py", "files", 300, 14)
def configs(tally: Tally, count: int, folder: Path, dice):
    """Shipped files, damaged. A torch that leaves a mark is found before the real one."""
    trap = folder / "trap" / "torch"
    trap.mkdir(parents=True)
    (trap / "__init__.py").write_text(f"open({str(folder / 'imported')!r}, 'w')\nraise ImportError")
    environment = {**os.environ, "PYTHONPATH": str(trap.parent), "COLUMNS": "100"}
    shipped = [file.read_text(encoding="utf-8") for file in sorted(ROOT.glob("configs/*.toml"))]
    while tally.tried < count:
        path, what = bad_config(folder / "bad.toml", dice.choice(shipped), dice)
        began = time.monotonic()
        result = attempt(command("train.py", "--config", path), folder, env=environment)
        took = round((time.monotonic() - began) * 1000)
        tally.tried += 1
        tally.counts["ms at most"] = max(tally.counts["ms at most"], took)
        wrong = judge(result, refused=True) or (
            "torch is imported" * (folder / "imported").exists()
        )
        if count >= 300 and took > 1000:  # fewer tries are made beside other work
            wrong = wrong or f"{took} ms"
        if wrong:
            tally.undetected.append(f"{what}: {wrong[:300]}")


def bad_config(file: Path, text: str, dice) -> tuple[Path, str]:
    """A path for --config that is not one, and what it is."""
    if dice.random() < 0.05:
        names = (
            "none.toml",
            "tiny\n.toml",
            "\x1b[2Jx.toml",
            "trap",
            "x" * 300,
            "bad.toml/x",
            "é.toml",
        )
        path = file.parent / dice.choice(names)
        return path, repr(path.name)
    while True:
        what, content = mutated(text, dice)
        file.write_bytes(content)
        try:
            load(file)
        except UserError:
            return file, what
        except Exception as error:
            return file, f"{what} ({type(error).__name__})"


def mutated(text: str, dice) -> tuple[str, bytes]:
    """What was done to a configuration, and the file's new content."""
    lines = text.splitlines(keepends=True)
    at = dice.choice([i for i, line in enumerate(lines) if re.match(r"\w+ *=", line)])
    key, value = lines[at].split("=", 1)[0].strip(), dice.choice(VALUES)
    content, place = text.encode(), dice.randrange(len(text.encode()))
    letter = dice.randrange(len(key))
    raw = dice.choice(
        [b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\x1b", b"\r", b"\x80" * 9]
    )
    names = (
        '"a\\nb"',
        '"\\u001b[31m"',
        '""',
        "__class__",
        "model.model",
        ".".join("a" * 3000),
        "é",
    )
    name = dice.choice(names)
    tables = [i for i, line in enumerate(lines) if line.startswith("[")]
    table = dice.choice(tables)

    def with_line(i: int, line: str) -> bytes:
        return "".join([*lines[:i], line, *lines[i + 1 :]]).encode()

    return dice.choice([
        (f"{key} = {value[:20]}", with_line(at, f"{key} = {value}\n")),
        (f"{key} = {value[:20]}", with_line(at, f"{key} = {value}\n")),
        ("a typing mistake", with_line(at, key[:letter] + lines[at][letter + 1 :])),
        (f"the key {name[:20]}", with_line(at, f"{name} = {value}\n")),
        ("a key twice", with_line(at, lines[at] * 2)),
        ("a table's head missing", with_line(table, "")),
        ("an unknown table", with_line(table, f"[{name}]\n")),
        ("a table of tables", with_line(table, f"[{lines[table].strip()}]\n")),
        (f"{raw!r} in it", content[:place] + raw + content[place:]),
        ("a bit flipped", flipped(content, dice)),
        ("cut off", content[:place]),
        ("UTF-16", text.encode("utf-16")),
        ("no TOML", dice.choice([b"{}", b"\x80\x04N.", b"import os", dice.randbytes(500)])),
    ])  # fmt: skip


# Prompts ------------------------------------------------------------------------------------------

PROMPTS = [
    "", " ", "\n", "\r\n\t", "\x1b[2J\x1b]0;x\x07", "\x9b31m\x7f\x08", "\u202e\u05d0\u0628",
    "e\u0301" * 50, "\U0001f469\u200d\U0001f467\ufe0f", "\u2581\ue000\ue000b", "\ufffd\ufffe\uffff",
    "\U0010ffff", "\udcff\udc80", "\ud800", "x" * 10_000, "%s%n{0}$(reboot)`ls`",
    "<start><end><pad>", "-x", "日本語",
]  # fmt: skip
SETTINGS = {
    "temperature": ["0", "-1", "nan", "inf", "-inf", "1e308", "5e-324", "abc"],
    "top_k": ["0", "1", "-1", "1000000000", "1" + "0" * 30, "1.5"],
    "top_p": ["0", "-1", "1.5", "nan", "1", "1e-300", "inf"],
    "max_new_tokens": ["0", "-1", "1", "200", "1e3", "\x1b[31m"],
    "num_samples": ["-1", "0", "2", "nan"],
    "seed": ["-1", "0", "1" + "0" * 40, "x"],
    "stop": ["", "\x1b", "e", "\udcff"],
    "precision": ["fp64", "bf16", "fp16"],
    "device": ["cpu", "cuda:99", "", "x\ny"],
}
ABSURD = [("--num_samples", "1" + "0" * 12), ("--max_new_tokens", "1" + "0" * 12)]


@campaign("prompts", "17", "hostile prompts and settings given to generate.py", "calls", 300, 60)
def prompts(tally: Tally, count: int, folder: Path, dice):
    """Most in this process, by the same functions; some in processes, in each engine."""
    runs = [copy_run(folder, "stream")]
    if count >= 200:  # other tokenizers: one that refuses characters, one of pieces
        write_config(folder)
        for kind in ("char_bos", "bpe"):
            more = ["--data.kind", "lines", "--data.tokenizer", kind, "--data.vocab_size", "320"]
            more += ["--model.max_len", "256"]  # as long as the lines are
            finished(run("train.py", *TINY, "--name", kind, "--max_steps", 1, *more, cwd=folder))
            runs.append(folder / "runs" / kind)
    for number in range(count):
        real = number % 20 == 0
        engine = ENGINES[number // 20 % 3] if real else dice.choice(ENGINES)
        arguments = [
            "--engine",
            engine,
            "--checkpoint",
            str(dice.choice(runs)),
            "--max_new_tokens",
            "9",
        ]
        arguments += hostile_arguments(folder, dice, real)
        result = attempt(command("generate.py", *arguments), folder) if real else called(arguments)
        tally.tried += 1
        tally.counts["in real programs"] += real
        tally.counts["answered"] += result.returncode == 0
        if wrong := judge(result):
            tally.undetected.append(f"generate.py {arguments[4:]!r:.200}: {wrong}")
    others = [("--interactive",), *ABSURD]
    for arguments in others:
        program = command("generate.py", "--checkpoint", runs[0], *arguments)
        result = attempt(program, folder, input="\udcff\x1b\0\n\n", errors="surrogateescape")
        tally.tried += 1
        if wrong := judge(result):
            tally.undetected.append(f"generate.py {' '.join(arguments)}: {wrong}")


def hostile_arguments(folder: Path, dice, real: bool) -> list[str]:
    """A prompt on the command line or in a file, and a setting or two."""
    chosen = [dice.choice(["--greedy", "--json", "--explain", "--greedy"])]
    for key in dice.sample(sorted(SETTINGS), dice.randrange(3)):
        chosen.append(f"--{key}={dice.choice(SETTINGS[key])}")
    prompt = dice.choice([*PROMPTS, "".join(chr(dice.randrange(1, 0xD800)) for _ in range(50))])
    if dice.random() < 0.6:
        return [*chosen, f"--prompt={prompt}"]
    file = folder / "prompts.txt"
    file.write_bytes(dice.choice([
        prompt.encode("utf-8", "surrogateescape" if "\udcff" in prompt else "replace"),
        b"", b"\n", b"\0", b"\xff\xfe", b"\xef\xbb\xbfa", prompt.encode("utf-16", "replace"), b"\r",
        b"a" * 1_000_000, "é".encode() * 500_000, dice.randbytes(1000), b"\n" * 20,
    ]))  # fmt: skip
    missing = dice.choice([str(folder), "no\nfile", "x" * 5000, "/dev/null", "\x1b[2J"])
    return [*chosen, "--prompt_file", str(file) if dice.random() < 0.8 else missing]


def called(arguments: list[str]) -> subprocess.CompletedProcess:
    """generate.py's own functions, called in this process."""
    before, sys.argv = sys.argv, ["generate.py", *arguments]
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="") for _ in range(2))
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = cli.run("generate.py", generate.main)
    except SystemExit as end:
        status = end.code or 0
    except Exception as error:
        status = f"Traceback {error!r}"
    finally:
        sys.argv = before
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8", "backslashreplace"))
    return subprocess.CompletedProcess(arguments, status, *texts)
