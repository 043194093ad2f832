"""The steps of benchmarks/gpu.py, in the order of what they are worth."""

import importlib.util
import json
import re
import shutil
import sys
import sysconfig
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu.runner import Bench, Command, Step, Stop
from benchmarks.harness import ROOT


def module(name: str, *arguments) -> Command:
    return [sys.executable, "-m", name, *map(str, arguments)]


def side(*arguments) -> Command:
    """A process of benchmarks/gpu/sides.py."""
    return module("benchmarks.gpu.sides", *arguments)


def check(bench: Bench, name: str, flags: Sequence[str]) -> Command:
    """A check of benchmarks/gpu/checks.py."""
    runs = bench.scratch / "runs" / name
    return module("benchmarks.gpu.checks", name, runs, bench.device, *flags)


def build(bench: Bench, flags: list[str]) -> Command:
    """A side that trains what these flags of train.py describe."""
    runs = bench.scratch / "runs"
    return side("config", *flags, "--device", bench.device, "--runs_dir", runs)


# Flags of train.py --------------------------------------------------------------------------------

SMALL = [
    "--model.d_model", "32", "--model.n_heads", "2", "--model.n_layers", "1", "--model.d_ff", "64",
]  # fmt: skip
COMPILE = ["--compile"]
PATIENCE = 4  # with --tiny, where two busy cores compile and train: times the limits of a GPU


def flags(bench: Bench, config: str, *more: str) -> list[str]:
    """Of a shipped configuration; prepared data is shared by all processes."""
    cache = str(bench.scratch / "prepared")
    return ["--config", f"configs/{config}.toml", "--data.cache_dir", cache, *more]


def pairs(bench: Bench, *more: str) -> list[str]:
    """Flags of configs/default.toml."""
    if bench.tiny:
        more = (*SMALL, "--data.path", str(bench.scratch / "pairs.jsonl"), "--data.tokenizer",
                "char", "--train.batch_size", "8", *more)  # fmt: skip
    return flags(bench, "default", *more)


def stream(bench: Bench, *more: str) -> list[str]:
    """Flags of a small model of one long text."""
    more = ("--data.path", str(bench.scratch / "text.txt"), *more)
    return flags(bench, "tinyshakespeare", *(SMALL if bench.tiny else []), *more)


def large(bench: Bench) -> list[str]:
    """Flags of configs/gpt2_124m.toml over the ends of two epochs of a small text."""
    text = ["--data.path", str(bench.scratch / "text.txt"), "--train.log_interval", "1"]
    text += ["--max_steps", "8", "--train.eval_interval", "0", "--train.eval_examples", "64"]
    text += ["--optimizer.warmup_steps", "2"]
    if bench.tiny:
        text += [*SMALL, "--model.max_len", "64", "--data.vocab_size", "400"]
        text += ["--train.batch_size", "192", "--train.accumulation_steps", "4"]
        return flags(bench, "gpt2_124m", *text)
    return flags(bench, "gpt2_124m", *COMPILE, "--data.vocab_size", "8192", *text)


def shakespeare_flags(bench: Bench) -> list[str]:
    more = ["--data.path", bench.shakespeare]
    if bench.tiny:
        more += [*SMALL, "--max_steps", "20", "--train.eval_interval", "10", "--no-compile"]
        more += ["--train.batch_size", "8", "--train.log_interval", "5"]
    return flags(bench, "shakespeare_gpu", *more)


# Steps --------------------------------------------------------------------------------------------


def missing(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def requirements(*extras: str) -> list[str]:
    """The packages that pyproject.toml names, which are imported by the same names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return [re.split("[<>=]", line)[0] for line in lines]


def first(bench: Bench):
    """Whether anything works at all."""
    if absent := missing(requirements()):
        raise Stop(
            f"missing packages: {' '.join(absent)}; benchmarks/gpu.md says how to bring them"
        )
    absent = missing([*requirements("bench"), "pytest", "hypothesis"])
    bench.part("packages", "ok", found={"missing": absent})
    if bench.device == "cuda" and shutil.which("nvidia-smi"):
        bench.together({"nvidia-smi": [["nvidia-smi"]]}, 10)
    bench.alone("first", side("first", bench.device))
    part = bench.step["parts"]["first"]
    bench.results["machine"] = part["found"].get("machine", {})
    if part["status"] != "ok":
        raise Stop(f"a tiny training step: {part['why']}: {' / '.join(part['last_lines'][-2:])}")


def checks(bench: Bench):
    """What has to be right; and data and compiled code that later steps find ready."""
    write_texts(bench.scratch, 60_000 if bench.tiny else 4_000_000)
    small = ["--train.eval_examples", "32", "--model.dropout", "0.2"]
    resume = [*pairs(bench, *small), "--device", bench.device, "--precision", "bf16"]
    resume += ["--train.deterministic"] if bench.device == "cuda" else []
    verify = module("tools.verify_resume", "--steps", 6 if bench.tiny else 12, *resume)
    forty = pairs(bench, "--max_steps", "40", "--model.dropout", "0", *small[:2])
    prepared = side("prepare", *pairs(bench))
    queues = {
        "resume": [prepared, verify],
        "losses": [prepared, check(bench, "losses", forty)],
        "ctrl-c": [prepared, check(bench, "stop", pairs(bench, "--max_steps", "100000"))],
        "text prepared": [side("prepare", *large(bench))],
    }
    model, sizes = ("tiny", (2,)) if bench.tiny else ("gpt2_124m", (16, 64))
    queues["compiled: ours"] = [
        side("train", "ours-compiled", model, n, bench.device) for n in sizes
    ]  # fmt: skip
    if bench.device == "cuda":
        add_cuda(bench, queues, prepared, verify)
    else:
        for name in ("tests/cuda", "resume, compiled", "out of memory"):
            bench.skip(name, "not on cpu")
    bench.together(queues)


def add_cuda(bench: Bench, queues: dict[str, list[Command]], prepared: Command, verify: Command):
    """The checks that a CPU cannot make, and the rest of what is compiled for later steps."""
    if missing(["pytest"]):
        bench.skip("tests/cuda", "pytest is not installed")
    else:
        tests = module("pytest", "-q", "-p", "no:cacheprovider", "tests/cuda")
        queues["tests/cuda"] = [tests]
    queues["resume, compiled"] = [prepared, [*verify, *COMPILE]]
    # one tensor of half a terabyte: it fails at once, and takes nothing from the others before
    wide = ["--model.d_model", "64", "--model.n_heads", "1", "--model.n_layers", "1"]
    wide += ["--model.d_ff", str(2**18), "--train.batch_size", str(2**14)]
    queues["out of memory"] = [check(bench, "full", stream(bench, *wide))]
    if bench.nanogpt:
        queues["compiled: nanoGPT"] = [
            side("train", "nanogpt", "gpt2_124m", n, bench.device, bench.nanogpt) for n in (16, 64)
        ]
    queues["compiled: train.py"] = [side("prepare", *large(bench)), build(bench, large(bench))]
    queues["compiled: small"] = [prepared, build(bench, pairs(bench, *COMPILE))]
    if bench.shakespeare:
        queues["compiled: shakespeare"] = [build(bench, shakespeare_flags(bench))]


def ceilings(bench: Bench):
    """What the machine can do at most."""
    name, rows = ("tiny", 2) if bench.tiny else ("gpt2_124m", 16)
    bench.alone("ceilings", side("ceilings", bench.device, name, rows))


def throughput(rows: int, sides: tuple[str, ...], last: tuple[str, ...] = ()):
    """Training beside nanoGPT, so many sequences a step."""

    def run(bench: Bench):
        name = "tiny" if bench.tiny else "gpt2_124m"
        chosen = {}
        for who in sides:
            if who == "nanogpt" and not bench.nanogpt:
                bench.skip(who, "no --nanogpt")
            else:
                chosen[who] = side("train", who, name, rows, bench.device, bench.nanogpt)
        rounds, seconds = (2, 0.2) if bench.tiny else (3, 3.0)
        bench.in_turns(chosen, rounds, seconds, last)

    return run


def generation(bench: Bench):
    """Beside `generate` of transformers: a process a side, the most telling first."""
    both = ("ours", "transformers")
    sides = [(50, who) for who in both] + [(0, who) for who in both]
    for top_k, who in [*sides, (50, "transformers-static")]:  # which compiles: if there is time
        name = f"{who}, {f'top_k {top_k}' if top_k else 'all tokens'}"
        if who != "ours" and missing(["transformers"]):
            bench.skip(name, "transformers is not installed")
        elif bench.tiny and (top_k == 0 or who not in both):
            bench.skip(name, "not with --tiny")
        else:
            bench.alone(name, generation_command(bench, who, top_k), 35)


def generation_command(bench: Bench, who: str, top_k: int) -> Command:
    """The worker of benchmarks/generation.py."""
    batches, new = ((1, 2), 9) if bench.tiny else ((1, 16, 64), 128)
    command = module("benchmarks.generation", "--side", who, "bf16")
    command += ["--model", "tiny" if bench.tiny else "gpt2_124m", "--device", bench.device]
    command += ["--batches", *map(str, batches), "--new", str(new), "--top_k", str(top_k)]
    return command


def whole_run(bench: Bench):
    """train.py as a user runs it."""
    bench.alone("train.py", check(bench, "train", large(bench)))


def small_models(bench: Bench):
    """What compiling and CUDA graphs give where a GPU waits for the CPU."""
    sides = {
        f"{name}, {way}": build(bench, pairs(bench, "--optimizer.name", name, *more))
        for name in ("muon", "adamw")
        for way, more in (("eager", []), ("compiled", COMPILE))
    }
    sides["stream, eager"] = build(bench, stream(bench))
    if bench.device == "cuda":
        sides["stream, graphs"] = build(bench, stream(bench, "--train.cuda_graphs"))
    else:
        bench.skip("stream, graphs", "not on cpu")
    if bench.tiny:  # each would compile for a minute
        for name in ("muon, compiled", "adamw, compiled"):
            del sides[name]
            bench.skip(name, "not with --tiny")
    bench.in_turns(sides, 1, 0.2 if bench.tiny else 1.5, tuple(sides))


def shakespeare(bench: Bench):
    """Time to nanoGPT's published loss."""
    if not bench.shakespeare:
        return bench.skip("shakespeare", "no --shakespeare")
    bench.alone("shakespeare", check(bench, "shakespeare", shakespeare_flags(bench)))


def plan(tiny: bool) -> list[Step]:
    """The steps in the order of what they are worth."""
    few, many = (2, 4) if tiny else (16, 64)
    beside = ("ours-compiled", "nanogpt")
    steps = [
        Step("first", 0, 60, first),  # 20 s, unless PyTorch comes from a slow disk
        Step("checks", 20, 100, checks),
        Step("ceilings", 120, 15, ceilings),
        Step("throughput", 135, 80, throughput(few, (*beside, "ours-eager"), ("ours-compiled",))),
        Step("throughput, larger", 215, 60,
             throughput(many, ("ours-eager", "nanogpt") if tiny else beside)),
        Step("generation", 275, 65, generation),
        Step("whole run", 340, 90, whole_run),
        Step("small models", 430, 40, small_models),
        Step("shakespeare", 470, 60, shakespeare),
    ]  # fmt: skip
    patience = PATIENCE if tiny else 1
    return [replace(s, at=patience * s.at, seconds=patience * s.seconds) for s in steps]


def write_texts(folder: Path, size: int):
    """text.txt, so many bytes of the sources of Python's library, and pairs.jsonl from it."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    files += sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*/*.py"))
    text = ""
    for file in files:
        if len(text) >= size:
            break
        text += file.read_text(encoding="utf-8", errors="ignore").encode("ascii", "ignore").decode()
    (folder / "text.txt").write_text(text[:size], encoding="utf-8")
    names = sorted(set(re.findall(r"[a-z]{3,}", text[:size])))[:2000]
    lines = [json.dumps({"prompt": n, "completion": n.upper()}) for n in names]
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
