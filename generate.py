"""Generates text with a trained model.

python generate.py                                     the newest run: freely, or after prompts that
                                                       training never saw
python generate.py --checkpoint runs/my-run --prompt "Return the absolute path of a file."
python generate.py --interactive --temperature 0.8 --top_k 50
python generate.py --engine python --explain           without torch or NumPy; why each token
python generate.py --help

Text goes to stdout, with control characters made visible; which checkpoint wrote it, to stderr.
With --json each text is one JSON object on a line of its own, exact, with how it ended.
"""

import signal

if __name__ == "__main__":  # before what takes time: until cli.run() listens, Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import io
import json
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, cast

import tyro

from checkpoint.reader import Checkpoint, named_or_newest, read_best
from common import cli
from common.errors import UserError
from common.files import (
    has_old_lines,
    refuse_binary,
    refuse_no_file,
    user_path,
)
from data.prompt_format import end_id, prompt_ids, unread
from data.slots import Slots
from data.tokenizers.base import Tokenizer, clean_text
from data.tokenizers.load import TOKENIZER_FILES, load_tokenizer
from generation.explain import Explained, in_colour
from generation.sampling import MAX_BEAMS, MAX_NEW_TOKENS, Sampling
from generation.streaming import StreamedText
from model import engines
from model.config import ModelConfig, read_model_config

if TYPE_CHECKING:
    from evaluation.memorization import Memory

DESCRIPTION = "Generates text with a trained model, with or without prompts."
MAX_PROMPTS = 1 << 26  # bytes of a file of prompts
FREE_LINES, FREE_PAIRS = 10, 3  # how many are written without a prompt


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    checkpoint: str = ""
    """Folder of a run (its best checkpoint, else the newest) or checkpoint; empty: newest run."""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Text to continue; "" is allowed; one that starts with a dash: --prompt=-x."""
    prompt_file: str = ""
    """A UTF-8 file with a prompt on each line."""
    interactive: bool = False
    """Ask for prompts until Ctrl-D (Windows: Ctrl-Z, Enter) or Ctrl-C."""
    num_samples: int = 0
    """Texts per prompt; 0: one (without a prompt, ten if the run was trained on lines)."""
    beams: int = 1
    """Texts kept in a beam search, of which num_samples are written, the most probable first; 1:
    none, tokens are sampled."""
    rerank: bool = False
    """With --beams: order the texts by minimum Bayes risk, those most like all others first."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End a text before this string."""
    sampling: Annotated[Sampling, tyro.conf.OmitArgPrefixes] = field(default_factory=Sampling)
    seed: int = 1337
    """The same seed, prompt and settings give the same text."""
    engine: engines.Engine = "torch"
    """PyTorch, NumPy or plain Python; all generate the same text (sampled: with fp64)."""
    device: str = "auto"
    """For torch: auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "fp32"
    """Of weights and computing; auto: the faster of fp32 and bf16, measured; fp64: the same text in
    any batch. python: always fp64."""
    compile: bool = False
    """On a CPU, not in fp64: decode in one call that this machine's C++ compiler makes, once, in a
    second or two; faster, the more so the smaller the model."""
    explain: bool = False
    """Print a table of all tokens: probability, rank, entropy in bits, what top_k, top_p remove."""
    memorization: bool = False
    """Say of each text how much of it stands word for word in the data that the run was trained
    on: the longest run of tokens, where, how often. The data has to be there."""
    json: bool = False
    """One JSON object per text: prompt, sample, text, tokens, stop (end, stop, length), seed."""
    runs_dir: str = "runs"
    """Folder of the runs, among which the newest is looked for."""

    def __post_init__(self):
        wrong = []
        if not 0 <= self.num_samples <= MAX_NEW_TOKENS:
            wrong.append(
                f"num_samples = {self.num_samples} must be 0 (default number) to {MAX_NEW_TOKENS}"
            )
        if "" in self.stop:
            wrong.append(
                "--stop: an empty string would end every text at once; give one character or more"
            )
        if not 1 <= self.beams <= MAX_BEAMS:
            wrong.append(f"beams = {self.beams} must be 1 (none) to {MAX_BEAMS}")
        elif self.num_samples > self.beams > 1:
            wrong.append(
                f"num_samples = {self.num_samples} must be at most beams = {self.beams}, the texts "
                "that a beam search has found"
            )
        if self.rerank and self.beams == 1:
            wrong.append("--rerank: takes a beam search; give --beams 5, say")
        if self.beams > 1 and (self.explain or self.engine != "torch"):
            wrong.append("--beams: takes --engine torch, and no --explain; leave one of them out")
        if self.interactive and (self.prompt or self.prompt_file):
            wrong.append("--interactive asks for prompts; leave --prompt and --prompt_file out")
        if wrong:
            raise UserError("; ".join(wrong))


@dataclass(frozen=True)
class Source:
    """What generating needs of a checkpoint, all of it read and verified."""

    checkpoint: Checkpoint
    kind: str  # "stream", "lines" or "pairs"
    tokenizer: Tokenizer
    model_config: ModelConfig
    weights: dict
    held_out: list[dict]  # pairs that training never saw
    start_token: bool  # whether documents begin with <start>
    slots: bool  # whether it reads placeholders for a prompt's arguments


@dataclass(frozen=True)
class Job:
    """One text to write."""

    prompt: str
    slots: Slots
    ids: list[int]
    sample: int
    true: str = ""  # what the data has after this prompt, where that is known


def main() -> int:
    """Reads the command line and the checkpoint, and writes. Returns the exit status."""
    arguments = cli.parse(Arguments, DESCRIPTION)
    engines.check_options(
        arguments.engine, arguments.device, arguments.precision, arguments.compile
    )
    prompts = [*arguments.prompt, *read_prompts(arguments.prompt_file)]
    source = open_source(arguments)
    if arguments.interactive:
        return converse(arguments, source)
    jobs = plan(source, prompts, arguments.num_samples)
    memory = open_memory(arguments, source)
    write(arguments, source, load_model(arguments, source), jobs, memory)
    return 0


# Reading ------------------------------------------------------------------------------------------


def read_prompts(path: str) -> list[str]:
    """The lines of --prompt_file, an empty one being an empty prompt; [] without a file."""
    if not path:
        return []
    where = f"--prompt_file {path}"
    refuse_no_file(path, where, once=True)
    try:
        with open(user_path(path), "rb") as file:
            content = file.read(MAX_PROMPTS + 1)  # /dev/zero has no end
    except OSError as error:
        raise UserError(
            f"{where}: {error.strerror}; give a text file with a prompt on each line"
        ) from None
    if len(content) > MAX_PROMPTS:
        raise UserError(f"{where}: more than {MAX_PROMPTS} bytes; split it")
    refuse_binary(content, where)
    if has_old_lines(content):
        raise UserError(f"{where}: its lines end in \\r alone; save it with \\n or \\r\\n")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if lines == [""]:
        raise UserError(f"{where}: is empty; write a prompt on each line")
    return lines


def open_source(arguments: Arguments) -> Source:
    """Finds and reads the checkpoint, and says which one it is. No torch; no NumPy for python."""
    log = partial(print, file=sys.stderr, flush=True)
    path = named_or_newest(arguments.checkpoint, arguments.runs_dir, log)
    checkpoint = Checkpoint.find(path, log)
    try:
        source = read_source(checkpoint, arguments.engine)
    except UserError:
        if checkpoint.path == user_path(path) or checkpoint.path.exists():
            raise
        return open_source(arguments)  # training removed this step: it has published a newer one
    best = read_best(checkpoint.run)
    known = best if best is not None and best["step"] == checkpoint.step else None
    loss = f", validation loss {known['val_loss']:.4f}" if known else ""
    print(f"{checkpoint.path}: step {checkpoint.step:,}{loss}", file=sys.stderr, flush=True)
    return source


def read_source(checkpoint: Checkpoint, engine: engines.Engine) -> Source:
    """Reads all that is needed at once. Raises UserError."""
    for name in TOKENIZER_FILES:
        if name in checkpoint.manifest["files"]:
            checkpoint.read(name)  # which verifies it
    weights = engines.read_weights(engine, checkpoint)  # first, because the settings may not fit
    return Source(
        checkpoint,
        checkpoint.config["data"].get("kind", "stream"),
        load_tokenizer(checkpoint.path),
        read_model_config(checkpoint),
        weights,
        checkpoint.state.get("held_out", []),
        checkpoint.config["data"].get("start_token", True),
        checkpoint.config["data"].get("slots", False) is True,
    )


def open_memory(arguments: Arguments, source: Source) -> "Memory | None":
    """What looks for texts in the training data; None if nobody asks."""
    if not arguments.memorization:
        return None
    from evaluation.memorization import Memory

    return Memory.of(source.checkpoint, source.tokenizer, partial(print, file=sys.stderr))


def load_model(arguments: Arguments, source: Source):
    """The decoder, on its device. From here on there is torch, if it is the engine."""
    engine, device, shape = arguments.engine, arguments.device, source.model_config
    precision, why = engines.choose_precision(
        engine, shape, device, arguments.precision, arguments.compile
    )
    if arguments.precision == "auto":
        print(f"precision: {precision} ({why})", file=sys.stderr, flush=True)
    return engines.load_model(engine, shape, source.weights, device, precision)


# What to write ------------------------------------------------------------------------------------


def plan(source: Source, prompts: list[str], num_samples: int) -> list[Job]:
    """The texts to write: after each prompt; without any, after held-out ones or freely."""
    if prompts:
        pairs = [(prompt, "") for prompt in prompts]
    elif source.kind == "pairs":
        pairs = [(pair["prompt"], pair["completion"]) for pair in source.held_out[:FREE_PAIRS]]
        if not pairs:
            raise UserError("this checkpoint has no held-out prompts; give a --prompt")
    else:
        pairs = [("", "")]
        num_samples = num_samples or (FREE_LINES if source.kind == "lines" else 1)
    jobs = []
    for prompt, true in pairs:
        prompt = clean_text(prompt)
        slots = Slots(prompt, source.slots)
        ids = prompt_ids(source.kind, source.tokenizer, slots.prompt, source.start_token)
        jobs += [Job(prompt, slots, ids, sample, true) for sample in range(num_samples or 1)]
    return jobs


# Writing ------------------------------------------------------------------------------------------


def write(
    arguments: Arguments, source: Source, model, jobs: list[Job], memory: "Memory | None" = None
):
    """Generates and prints; a single text appears token by token."""
    prompts = [job.ids for job in jobs if job.sample == jobs[0].sample]
    if note := unread(prompts, source.tokenizer, source.model_config.max_len):
        print(note, file=sys.stderr, flush=True)
    beams = arguments.beams
    order = partial(ordered, source, jobs, arguments) if beams > 1 else None
    generate = engines.generator(arguments.engine, arguments.compile, beams, order)
    rules, alone = arguments.sampling, len(jobs) == 1 and not arguments.json
    stops = tuple(map(clean_text, arguments.stop))
    longest = max((len(job.ids) for job in jobs), default=0) + rules.max_new_tokens
    size = engines.rows_at_once(arguments.engine, model, longest)
    if beams > 1:  # all texts of a prompt come of one search
        size = max(1, size // beams) * (arguments.num_samples or 1)
    for first in range(0, len(jobs), size):
        batch = jobs[first : first + size]
        texts = [StreamedText(source.tokenizer, stops, job.ids, job.slots) for job in batch]
        explained = [Explained(source.tokenizer, rules, source.slots) for _ in batch]

        def on_token(row: int, token: int, texts=texts) -> bool:
            stopped = texts[row].add(token)
            if alone:
                show(texts[row].new_text())
            return stopped

        def on_logits(row: int, logits: list[float], token: int, explained=explained):
            explained[row].add(logits, token)

        if alone and source.kind != "pairs":
            show(batch[0].prompt)
        rows = generate(
            model,
            [job.ids for job in batch],
            rules,
            seed=arguments.seed,
            samples=[job.sample for job in batch],
            end_id=end_id(source.kind, source.tokenizer),
            on_token=on_token,
            on_logits=on_logits if arguments.explain else None,
        )
        for i, (job, text, ids) in enumerate(zip(batch, texts, rows, strict=True)):
            text.flush()
            if arguments.json:
                answer = as_json(job, text, len(ids), arguments)
                if arguments.explain:
                    answer["tokens_explained"] = explained[i].as_json()
                if memory is not None:
                    answer["memorization"] = memory.look_up(ids)
                # non-ASCII characters escaped, so that it survives any terminal or pipe
                print(json.dumps(answer), flush=True)
            elif alone:
                show(text.new_text(complete=True) + "\n")
            else:
                show(layout(source.kind, jobs, first + i, text.text))
            if arguments.explain and not arguments.json:
                print(explained[i].table(in_colour(sys.stdout)), flush=True)
            if memory is not None and not arguments.json:
                print(memory.describe(ids, in_colour(sys.stdout)), flush=True)


def ordered(
    source: Source,
    jobs: list[Job],
    arguments: Arguments,
    prompt: tuple[int, ...],
    found: list[tuple[list[int], float]],
) -> list[list[int]]:
    """What a beam search has found for a prompt, the best first.

    By its scores, with texts last that have a placeholder which the prompt lacks; or by minimum
    Bayes risk, as evaluate.py has it, each text once, and then those that had not ended.
    """
    tokenizer = source.tokenizer
    slots = next(job.slots for job in jobs if tuple(job.ids) == prompt)
    if not arguments.rerank:
        return sorted((ids for ids, _ in found), key=lambda ids: slots.lacks(tokenizer.decode(ids)))
    from checkpoint.run_data import data_config  # what few need
    from evaluation.look_ups import utility
    from evaluation.scores import kind_of
    from evaluation.split import data_name
    from generation.beams import with_log_probabilities
    from generation.rerank import choose, shares

    answers = [pair["completion"] for pair in source.held_out]
    kind = kind_of(answers, data_name(data_config(source.checkpoint, lambda line: None)))
    of = {tokenizer.decode(ids): ids for ids, _ in reversed(found)}
    found = with_log_probabilities(found, arguments.sampling.max_new_tokens)
    texts = [tokenizer.decode(ids) for ids, _ in found]
    weights = shares(texts, [total for _, total in found], slots)
    chosen = choose(texts, weights, len(texts), utility(kind))
    chosen += [text for text in reversed(of) if text not in chosen]
    if len(chosen) < arguments.num_samples:
        print(
            f"note: only {len(chosen)} of the texts that were found differ; give more --beams",
            file=sys.stderr,
        )
    return [of[text] for text in chosen]


def as_json(job: Job, text: StreamedText, tokens: int, arguments: Arguments) -> dict:
    """What is said of one text with --json."""
    ending = "length" if tokens == arguments.sampling.max_new_tokens else "end"
    answer = {"prompt": job.prompt, "sample": job.sample, "text": text.text, "tokens": tokens}
    answer |= {"stop": "stop" if text.stopped else ending, "seed": arguments.seed}
    return answer | ({"true": job.true} if job.true else {})


def layout(kind: str, jobs: list[Job], index: int, text: str) -> str:
    """One of several texts: a line, a passage, or a prompt and what was written for it."""
    job = jobs[index]
    if kind in ("stream", "documents"):
        return ("---\n" if index else "") + f"{job.prompt}{text}\n"
    if kind == "lines":
        return f"{job.prompt}{text}\n"
    if len({job.prompt for job in jobs}) == 1:
        return f"{text}\n"
    true = f"  true:  {job.true}\n" if job.true else ""
    return ("\n" if index else "") + f"{job.prompt}\n  wrote: {text}\n{true}"


def show(text: str):
    """Prints at once; control characters, which could command a terminal, as \\x1b and the like."""
    print(cli.visible(text), end="", flush=True)


def converse(arguments: Arguments, source: Source) -> int:
    """Prompts from stdin, one a line, until it ends. Asked again, a prompt is answered anew."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, line editing and history, where the system has them
    memory, model = open_memory(arguments, source), load_model(arguments, source)
    cast(io.TextIOWrapper, sys.stdin).reconfigure(errors="replace")
    asked = Counter()
    try:
        while True:
            prompt = input("> " if sys.stdin.isatty() else "")
            try:
                jobs = plan(source, [prompt], arguments.num_samples)
            except UserError as error:  # characters that the model cannot know
                print(error, file=sys.stderr)
                continue
            jobs = [replace(job, sample=asked[prompt] + job.sample) for job in jobs]
            write(arguments, source, model, jobs, memory)
            asked[prompt] += len(jobs)
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("generate.py", main))
