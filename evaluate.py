"""Scores a trained model: perplexity, and for prompts with known answers how right its own are.

python evaluate.py                                     the newest run, on its validation split
python evaluate.py --checkpoint runs/nl2bash --beams 5 --num_samples 5
python evaluate.py --checkpoint runs/my-run --split my_pairs.jsonl --examples 20
python evaluate.py --help

What is found stands in evaluation.json in the run's folder, and in TensorBoard. Answers are never
run. Beside the model's stand those of two look-ups, which a model has to be better than.
"""

import signal

if __name__ == "__main__":  # before what takes time: until cli.run() listens, Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from checkpoint.reader import Checkpoint, named_or_newest
from common import cli
from common.errors import UserError, at_least, refuse
from common.files import replace_synced
from data.prompt_format import end_id, prompt_ids
from data.rng import permutation
from data.slots import Slots
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import TOKENIZER_FILES, load_tokenizer
from evaluation.answers import answer
from evaluation.commands import has_bash
from evaluation.look_ups import chooser, look_ups, nearest
from evaluation.memorization import Index, shares
from evaluation.report import publish, refuse_unwritable
from evaluation.scores import kind_of, measure, side_by_side, table
from evaluation.similarity import has_sacrebleu
from evaluation.split import Split, read_split
from generation.sampling import MAX_BEAMS, Sampling
from model import engines
from model.config import read_model_config

DESCRIPTION = "Scores a trained model: perplexity, and how right its answers are."
LOOK_UPS_AT_MOST = 50_000  # training pairs that look-ups search unasked
MAX_SAMPLES = 1000  # answers to a prompt: more is a slip of the finger
FREE_TEXTS = 20  # that are written to see how much of them is memorized
log = partial(print, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Answering(Sampling):
    """How answers are generated."""

    temperature: float = 0.8
    max_new_tokens: int = 128


@dataclass(frozen=True)
class Arguments:
    """The command line."""

    checkpoint: str = ""
    """Folder of a run (its best checkpoint, else the newest) or checkpoint; empty: newest run."""
    split: str = "val"
    """val: what the run was not trained on; test: that of data with a test split; or a file,
    folder or pattern of the same kind, as data.path has it."""
    limit: int = 0
    """So many examples, drawn evenly, always the same ones; 0: all."""
    answers: Literal["auto", "bash", "python", "text"] = "auto"
    """What the answers of pairs are, and so how they are scored; auto: by the data."""
    beams: int = 1
    """Texts kept in a beam search for each answer; 1: greedy."""
    num_samples: int = 1
    """Answers to each prompt, of which the best counts in top-N: of the beams, or sampled."""
    rerank: bool = False
    """Order the answers of a beam search by minimum Bayes risk: the most like all others first."""
    neighbours: int = 0
    """With --rerank: the answers of so many nearest training prompts join the model's own, with
    half of the weight; the scores are then not those of the model alone."""
    sampling: Annotated[Answering, tyro.conf.OmitArgPrefixes] = field(default_factory=Answering)
    seed: int = 1337
    """Of what is sampled."""
    look_ups: Literal["auto", "yes", "no"] = "auto"
    """Score a look-up's answers, too: the nearest neighbour's and the most frequent one; auto: if
    there are at most 50,000 training pairs."""
    examples: int = 0
    """So many examples side by side, as Markdown in evaluation.md."""
    memorization: bool = False
    """How much of the answers, or of texts written freely, stands word for word in the training
    data: the longest runs of tokens."""
    bleu: bool = True
    """With BLEU, which takes pip install -e '.[eval]'."""
    batch_size: int = 32
    """Examples in a forward pass, for the perplexity."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps."""
    precision: Literal["auto", "fp32", "bf16", "fp64"] = "fp32"
    """Of weights and computing; auto: the faster of fp32 and bf16, measured."""
    cache_dir: str = ""
    """Folder for prepared data; empty: that of the run."""
    runs_dir: str = "runs"
    """Folder of the runs, among which the newest is looked for."""

    def __post_init__(self):
        wrong = at_least(self, 0, "limit", "examples", "neighbours")
        if self.rerank and self.beams == 1:
            wrong.append("--rerank: takes a beam search; give --beams 5, say")
        if self.neighbours and not (self.rerank and self.look_ups != "no"):
            wrong.append("--neighbours: takes --rerank, and look-ups; give --rerank --look_ups yes")
        wrong += at_least(self, 1, "batch_size")
        if not 1 <= self.beams <= MAX_BEAMS:
            wrong.append(f"beams = {self.beams} must be 1 (greedy) to {MAX_BEAMS}")
        if not 1 <= self.num_samples <= MAX_SAMPLES:
            wrong.append(f"num_samples = {self.num_samples} must be 1 to {MAX_SAMPLES}")
        elif self.num_samples > self.beams > 1:
            wrong.append(
                f"num_samples = {self.num_samples} must be at most beams = {self.beams}, of which "
                "they are"
            )
        refuse(wrong)


def main() -> int:
    """Reads the command line, scores, prints and writes. Returns the exit status."""
    arguments = cli.parse(Arguments, DESCRIPTION)
    checkpoint = find(arguments)
    refuse_unwritable(checkpoint.run)
    weights = engines.read_weights("torch", checkpoint)  # first, because the settings may not fit
    shape = read_model_config(checkpoint)
    tokenizer = load_tokenizer(checkpoint.path)
    # before the data, which may take long: the device may not be there
    precision, why = engines.choose_precision("torch", shape, arguments.device, arguments.precision)
    log(f"precision: {precision} ({why})")
    model = engines.load_model("torch", shape, weights, arguments.device, precision)
    data = read_split(
        checkpoint,
        tokenizer,
        shape,
        arguments.split,
        cache_dir=arguments.cache_dir,
        limit=arguments.limit,
        known={"no": 0, "yes": None, "auto": LOOK_UPS_AT_MOST}[arguments.look_ups],
        memorization=arguments.memorization,
    )
    if data.kind != "pairs":
        refuse_for_texts(arguments, data)
    found = {"step": checkpoint.step, "checkpoint": checkpoint.path.name, "data": data.name}
    found |= losses(arguments, data, model, precision)
    print(
        f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.3f}, "
        f"{found['bits_per_byte']:.4f} bits per byte"
    )
    if data.kind == "pairs":
        found |= score(arguments, checkpoint, data, tokenizer, model)
    elif data.index is not None:
        found |= memorized(data.index, {"free": write_freely(arguments, data, tokenizer, model)})
    split = arguments.split
    if 0 < arguments.limit < data.size:  # which does not replace what was found on all of it
        split += f", {arguments.limit} examples"
    log(f"written: {publish(checkpoint.run, split, found)}")
    return 0


# Reading ------------------------------------------------------------------------------------------


def find(arguments: Arguments) -> Checkpoint:
    """The checkpoint that is meant, of which a line tells."""
    path = named_or_newest(arguments.checkpoint, arguments.runs_dir, log)
    checkpoint = Checkpoint.find(path, log)
    for name in TOKENIZER_FILES:
        if name in checkpoint.manifest["files"]:
            checkpoint.read(name)  # which verifies it
    log(f"{checkpoint.path}: step {checkpoint.step:,}")
    return checkpoint


def refuse_for_texts(arguments: Arguments, data: Split):
    """Raises UserError for what is asked of answers, where data has none."""
    asked = {
        "answers": arguments.answers != "auto",
        "beams": arguments.beams > 1,
        "num_samples": arguments.num_samples > 1 and not arguments.memorization,
        "rerank": arguments.rerank,
        "neighbours": arguments.neighbours,
        "look_ups": arguments.look_ups == "yes",
        "examples": arguments.examples,
    }
    if names := ", ".join(f"--{name}" for name, is_asked in asked.items() if is_asked):
        raise UserError(
            f"{names}: of the answers to prompts, and {data.name} is of kind {data.kind}; leave "
            f"{'it' if ',' not in names else 'them'} out"
        )


# Scoring ------------------------------------------------------------------------------------------


def losses(arguments: Arguments, data: Split, model, precision: str) -> dict:
    """Loss in nats a token, perplexity, and bits a byte."""
    from common.device import PRECISIONS
    from common.signals import StopRequest
    from evaluation.validation import evaluate
    from model.loss import LossModule

    values = evaluate(
        LossModule(model),
        data.examples,
        arguments.batch_size,
        arguments.limit,
        PRECISIONS[precision],
        StopRequest(),
    )
    return {name.removesuffix("/val"): value for name, value in values.items()}


def score(
    arguments: Arguments, checkpoint: Checkpoint, data: Split, tokenizer: Tokenizer, model
) -> dict:
    """Answers to all prompts, their scores beside those of look-ups, printed and for the file."""
    prompts, true = [list(side) for side in zip(*data.pairs, strict=True)]
    kind = arguments.answers
    if kind == "auto":
        kind = kind_of(true, data.name, data.trained_on)
    count, beams = arguments.num_samples, arguments.beams
    name = f"{beams} beams" if beams > 1 else "greedy"
    if arguments.neighbours and data.known:
        name += f" and {arguments.neighbours} neighbours"
    choose = None
    if arguments.rerank:
        near = [[] for _ in prompts]
        if arguments.neighbours and data.known:
            near = nearest(prompts, data.known, arguments.neighbours, data.slots)
        choose = chooser(near, kind, count)
    # disable=None: no bar where stderr is not a terminal
    with tqdm(total=len(prompts), unit="answer", leave=False, disable=None) as bar:
        answers = {
            f"{name}, reranked" if choose else name: answer(
                model,
                tokenizer,
                prompts,
                arguments.sampling,
                count=count,
                beams=beams,
                seed=arguments.seed,
                slots=data.slots,
                choose=choose,
                advance=bar.update,
            )
        }
    if data.known:
        answers |= look_ups(prompts, data.known, count, data.slots)
    bleu = arguments.bleu and has_sacrebleu()
    if not bleu:
        log("note: without BLEU; it is computed after pip install -e '.[eval]'")
    if kind == "bash" and not has_bash():
        log("note: without bash -n, because there is no bash on PATH")
    columns = {name: measure(kind, several, true, bleu) for name, several in answers.items()}
    print(f"\n{table(columns)}\n\n{len(prompts):,} {kind} answers; in brackets, 95 % confidence")
    if arguments.examples:
        first = [several[0] for several in next(iter(answers.values()))]
        chosen = sorted(permutation(len(prompts), "examples")[: arguments.examples])
        shown = side_by_side(*([side[i] for i in chosen] for side in (prompts, true, first)))
        path = checkpoint.run / "evaluation.md"
        replace_synced(path, shown.encode("utf-8", "replace"))
        print(f"{len(chosen)} of them side by side: {path}")
    settings = {"answers": kind, "beams": beams, "num_samples": count, "examples": len(prompts)}
    settings |= {"rerank": arguments.rerank, "neighbours": arguments.neighbours}
    if beams == 1 < count:
        settings |= {**asdict(arguments.sampling), "seed": arguments.seed}
    scores = {
        name: {n: {"value": s.value, "low": s.low, "high": s.high} for n, s in column.items()}
        for name, column in columns.items()
    }
    found = {"settings": settings, "scores": scores}
    if data.index is not None:
        first = {name: [several[0] for several in rows] for name, rows in answers.items()}
        chosen = {"answers": next(iter(first.values())), "true": true}
        found |= memorized(
            data.index,
            {
                name: [
                    tokenizer.encode(Slots(prompt, data.slots).hide(text))
                    for prompt, text in zip(prompts, texts, strict=True)
                ]
                for name, texts in chosen.items()
            },
        )
    return found


def write_freely(arguments: Arguments, data: Split, tokenizer: Tokenizer, model) -> list[list[int]]:
    """Texts without a prompt, sampled, as ids."""
    from generation.batched import generate

    count = max(arguments.num_samples, FREE_TEXTS)
    prompts = [prompt_ids(data.kind, tokenizer, "", data.start_token)] * count
    end = end_id(data.kind, tokenizer)
    return generate(model, prompts, arguments.sampling, seed=arguments.seed, end_id=end)


def memorized(index: Index, texts: dict[str, list[list[int]]]) -> dict:
    """How much of texts stands in the training data, printed and for the file."""
    found = {name: shares(index, several) for name, several in texts.items()}
    for name, share in found.items():
        print(
            f"word for word in the training data, {name}: the longest run is "
            f"{share['longest_run']:.1%} of a text; all of it, of {share['verbatim']:.1%}"
        )
    return {"memorization": found}


if __name__ == "__main__":
    sys.exit(cli.run("evaluate.py", main))
