"""A trained model under EleutherAI's lm-evaluation-harness, with its tasks or one's own.

    python -m evaluation.lm_eval runs/my-run hellaswag lambada_openai
    python -m evaluation.lm_eval runs/my-run my_task --include_path my_tasks

It takes pip install -e '.[lm-eval]'. What a task says is text, which is laid out as the run's data
is: for pairs, what a task calls the context is the prompt, and the space that tasks put in front of
a continuation is left out.
"""

import signal

if __name__ == "__main__":  # before what takes time: until cli.run() listens, Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from checkpoint.reader import Checkpoint
from common import cli
from common.errors import UserError
from data.prompt_format import end_id, prompt_ids
from data.tokenizers.base import Tokenizer, clean_text
from data.tokenizers.load import load_tokenizer
from generation.batched import generate
from generation.sampling import Sampling
from generation.streaming import StreamedText
from model import engines
from model.config import read_model_config

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows

    MISSING = ""
except ModuleNotFoundError as error:  # which --help does without
    LM, MISSING = object, error.name

ROWS = 32  # texts in a forward pass
MAX_NEW_TOKENS = 256  # of what is generated, where a task does not say


class Decoder(LM):
    """What the harness asks of a model, in the three forms that its tasks have.

    model: a `TransformerDecoder`. kind: the kind of its data.
    """

    def __init__(self, model, tokenizer: Tokenizer, kind: str, start_token: bool = True):
        if MISSING:
            raise UserError(
                f"pyproject.toml: its extra lm-eval is not installed ({MISSING} is missing); "
                "install it with pip install -e '.[lm-eval]'"
            )
        super().__init__()
        self.model, self.tokenizer = model.eval(), tokenizer
        self.kind, self.start_token = kind, start_token

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, device: str = "auto") -> "Decoder":
        """The decoder of a checkpoint, in float32. Raises UserError."""
        weights = engines.read_weights("torch", checkpoint)
        shape = read_model_config(checkpoint)
        model = engines.load_model("torch", shape, weights, device, "fp32")
        data = checkpoint.config["data"]
        kind, start_token = data.get("kind", "stream"), data.get("start_token", True)
        return cls(model, load_tokenizer(checkpoint.path), kind, start_token)

    def loglikelihood(self, requests: "list[Instance]") -> list[tuple[float, bool]]:
        """For each (context, continuation): its log probability, and whether greedy would say it.

        Of a context that is too long for the model's window the end is read.
        """
        pairs = [self.encode(*request.args) for request in requests]
        return self.score(pairs)

    def loglikelihood_rolling(self, requests: "list[Instance]") -> list[float]:
        """The log probability of each text, window by window, each token seen once."""
        totals = []
        for request in requests:
            (text,) = request.args
            start = prompt_ids("documents", self.tokenizer, "", self.start_token)[0]
            windows = get_rolling_token_windows(
                self.tokenizer.encode(clean_text(text)), start, self.model.max_len, 1
            )
            pairs = [(read[: len(read) - len(said) + 1], said) for read, said in windows]
            totals.append(sum(value for value, _ in self.score(pairs)))
        return totals

    def generate_until(self, requests: "list[Instance]") -> list[str]:
        """For each (context, settings): what comes after it, up to the first of `until`."""
        answers = []
        for request in requests:
            context, settings = request.args
            until = settings.get("until") or ()
            stops = (until,) if isinstance(until, str) else tuple(until)
            temperature = settings.get("temperature") or 0.0
            greedy = not settings.get("do_sample") or temperature == 0
            rules = Sampling(
                temperature=temperature or 1.0,
                max_new_tokens=settings.get("max_gen_toks", MAX_NEW_TOKENS),
                greedy=greedy,
            )
            prompt = prompt_ids(self.kind, self.tokenizer, clean_text(context), self.start_token)
            text = StreamedText(self.tokenizer, tuple(filter(None, stops)), prompt)
            generate(
                self.model,
                [prompt],
                rules,
                end_id=end_id(self.kind, self.tokenizer),
                on_token=lambda _, token, text=text: text.add(token),
            )
            text.flush()
            answers.append(text.text)
        return answers

    def encode(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """What is read first, and what is scored, as ids; a stream's are cut from one text."""
        if self.kind != "pairs" and context:
            read, whole = (
                prompt_ids(self.kind, self.tokenizer, clean_text(text), self.start_token)
                for text in (context, context + continuation)
            )
            return read, whole[len(read) :]
        said = continuation.removeprefix(" ") if self.kind == "pairs" else continuation
        read = prompt_ids(self.kind, self.tokenizer, clean_text(context), self.start_token)
        return read, self.tokenizer.encode(clean_text(said))

    @torch.inference_mode()
    def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log probabilities, in nats, of the second of each pair after the first."""
        device, room = self.model.embed.weight.device, self.model.max_len
        found: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(pairs)), key=lambda i: sum(map(len, pairs[i])))
        for first in range(0, len(order), ROWS):
            chosen = order[first : first + ROWS]
            texts = [[*pairs[i][0], *pairs[i][1]] for i in chosen]
            read = [text[:-1][-room:] for text in texts]
            T = max(map(len, read))
            ids = [text + [0] * (T - len(text)) for text in read]  # no token sees what is right
            logits = self.model(torch.tensor(ids, device=device)).double().log_softmax(-1).cpu()
            for row, i in enumerate(chosen):
                said = torch.tensor(pairs[i][1][-room:], dtype=torch.int64)
                places = logits[row, len(read[row]) - len(said) : len(read[row])]  # (N, V)
                values = places.gather(1, said[:, None])
                greedy = bool((places.argmax(1) == said).all())
                found[i] = float(values.sum()), greedy
        return [found[i] for i in range(len(pairs))]


def main() -> int:
    """`python -m evaluation.lm_eval`."""
    parser = cli.Parser(prog="python -m evaluation.lm_eval", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="a run, or one of its checkpoints")
    parser.add_argument("tasks", nargs="+", help="tasks by name, as lm-eval ls tasks shows them")
    parser.add_argument("--include_path", type=Path, help="a folder with tasks of your own")
    parser.add_argument("--limit", type=int, help="so many examples of each task")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps")
    options = parser.parse_args()
    model = Decoder.from_checkpoint(Checkpoint.find(options.checkpoint), options.device)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    folder = None if options.include_path is None else str(options.include_path)
    manager = TaskManager(include_path=folder)
    if unknown := [name for name in options.tasks if name not in manager.all_tasks]:
        raise UserError(f"{unknown[0]}: no such task; see lm-eval ls tasks, or use --include_path")
    found = simple_evaluate(model, tasks=options.tasks, task_manager=manager, limit=options.limit)
    print(make_table(found))
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("python -m evaluation.lm_eval", main))
