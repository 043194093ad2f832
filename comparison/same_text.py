"""Whether the three engines write the same text from one checkpoint, and how often.

    python -m comparison.same_text runs/my-run [--prompts 100]

Greedy in float32 (plain Python: float64); sampled in float64, where the same text is promised; and
sampled in float32, where rounding decides now and then. Prompts are of the validation split: whole
ones of pairs, the first two characters of lines.
"""

import signal

if __name__ == "__main__":  # before what takes time: until cli.run() listens, Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import sys
import time
from dataclasses import fields

from checkpoint.reader import Checkpoint
from checkpoint.run_data import locate_data
from common import cli
from common.errors import UserError
from data.config import DataConfig
from data.mixture import prepare
from data.prompt_format import end_id, prompt_ids
from data.tokenizers.base import Tokenizer
from data.tokenizers.load import load_tokenizer
from generation.sampling import Sampling
from model.config import read_model_config
from model.engines import Engine, generator, load_model, read_weights

ENGINES: tuple[Engine, ...] = ("torch", "numpy", "python")
RULES = {  # name: (rules, precision of torch and numpy)
    "greedy, fp32": (Sampling(greedy=True, max_new_tokens=32), "fp32"),
    "sampled, fp64": (Sampling(0.8, top_k=50, top_p=0.95, max_new_tokens=32), "fp64"),
    "sampled, fp32": (Sampling(0.8, top_k=50, top_p=0.95, max_new_tokens=32), "fp32"),
}


def prompts_of(checkpoint: Checkpoint, tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Different prompts, as ids."""
    known = {field.name for field in fields(DataConfig)}
    settings = {k: v for k, v in checkpoint.config["data"].items() if k in known}
    data = locate_data(DataConfig(**settings), checkpoint, print)
    dataset = prepare(data, lambda line: None, tokenizer)
    split, found = dataset.val or dataset.train, []
    starts, lengths = split.starts, split.prompts
    if starts is None or lengths is None:
        raise UserError(f"{checkpoint.path}: a run of one long text; give a run of lines or pairs")
    for number in range(len(starts) - 1):
        start = int(starts[number])
        document = split.ids[start : int(starts[number + 1])].tolist()
        if dataset.kind == "pairs":  # <start> is the last token of the prompt's part
            ids = document[: int(lengths[number])]
        else:
            text = tokenizer.decode([t for t in document if t != tokenizer.start_id])
            ids = prompt_ids(dataset.kind, tokenizer, text[:2])
        if ids not in found:
            found.append(ids)
        if len(found) == count:
            break
    return found


def main():
    parser = cli.Parser(prog="python -m comparison.same_text", description=__doc__.splitlines()[0])
    parser.add_argument("run", help="a run or a checkpoint's folder, of lines or pairs")
    parser.add_argument("--prompts", type=int, default=100)
    arguments = parser.parse_args()
    if arguments.prompts < 1:
        parser.error(f"--prompts {arguments.prompts} must be at least 1")
    checkpoint = Checkpoint.find(arguments.run)
    tokenizer = load_tokenizer(checkpoint.path)
    prompts = prompts_of(checkpoint, tokenizer, arguments.prompts)
    end = end_id(checkpoint.config["data"]["kind"], tokenizer)
    print(f"{checkpoint.path}, {len(prompts)} prompts, texts equal to those of torch:")
    for name, (rules, precision) in RULES.items():
        texts, notes = {}, []
        for engine in ENGINES:
            weights = read_weights(engine, checkpoint)
            model = load_model(engine, read_model_config(checkpoint), weights, "cpu", precision)
            began = time.perf_counter()
            texts[engine] = generator(engine)(model, prompts, rules, seed=1, end_id=end)
            seconds = time.perf_counter() - began
            same = sum(a == b for a, b in zip(texts[engine], texts["torch"], strict=True))
            notes.append(f"{engine} {same} of {len(prompts)} ({seconds:.1f} s)")
        tokens = sum(map(len, texts["torch"]))
        print(f"  {name}: {', '.join(notes)}; {tokens} tokens")


if __name__ == "__main__":
    sys.exit(cli.run("python -m comparison.same_text", main))
