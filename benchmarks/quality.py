"""How often the answers of two configurations are right, beside those of look-ups.

    python -m benchmarks.quality --rounds 3         default.toml with three seeds
    python -m benchmarks.quality --nl2bash PATH     and nl2bash.toml: a folder, or "" to download it

`train.py` trains each configuration as it stands, timed as a whole process, and `evaluate.py`
answers every held-out prompt, by the model alone, and with the answers of nearest neighbours among
its own. Each measure has to be above those of all look-ups.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness import ROOT, Result, parser
from common import cli
from common.errors import UserError
from evaluation.report import Found, Score, read_report

MINUTES = 10  # for training nl2bash.toml on two cores
SEED = 1337  # of the first round
BEAMS = ["--beams", "8", "--num_samples", "5"]
BASH = ["--answers", "bash", "--beams", "16", "--num_samples", "5"]
DEFAULT = {"beams": BEAMS, "with neighbours": [*BEAMS, "--rerank", "--neighbours", "8"]}
NL2BASH = {
    "beams": BASH,
    "reranked": [*BASH, "--rerank"],
    "with neighbours": [*BASH, "--rerank", "--neighbours", "12"],
}
TOP = ("exact match", "name match")  # what the default run is judged by


def program(script: str, *arguments) -> float:
    """Runs a program of the project as a user does. Returns its seconds."""
    command = [sys.executable, script, *map(str, arguments)]
    print(f"+ {script} {' '.join(map(str, arguments))}", file=sys.stderr, flush=True)
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)  # noqa: S603, ours
    if done.returncode == 2:  # it has said what is wrong
        sys.exit(2)
    if done.returncode:
        raise UserError(f"{script} failed with status {done.returncode}")
    return time.perf_counter() - began


def run(folder: Path, ways: dict[str, list[str]], *flags) -> tuple[float, dict[str, Found]]:
    """Seconds of training, and what is found in each way of answering."""
    seconds = program("train.py", "--runs_dir", folder, "--name", "run", *flags)
    found = {}
    for way, more in ways.items():
        program("evaluate.py", "--checkpoint", folder / "run", *more)
        found[way] = read_report(folder / "run")["val"]
    return seconds, found


def own(found: Found) -> tuple[str, dict[str, Score]]:
    """The model's column: the first."""
    return next(iter(found.scores.items()))


def best_look_up(found: Found, measure: str) -> float:
    """The most that any look-up reaches in a measure."""
    return max(column[measure].value for column in [*found.scores.values()][1:])


def tell(result: Result, name: str, seconds: float, ways: dict[str, Found]):
    """A table of all systems: each way of the model's, then the look-ups."""
    first = next(iter(ways.values()))
    columns = dict(own(found) for found in ways.values()) | dict([*first.scores.items()][1:])
    rows = [
        [system, *(f"{score.value:.1f}" if measure.endswith("BLEU")
                   else f"{score.value:.3f} ({score.low:.3f} to {score.high:.3f})"
                   for measure, score in column.items())]
        for system, column in columns.items()
    ]  # fmt: skip
    measures = [*next(iter(columns.values()))]
    note = (
        f"{first.settings['examples']} held-out pairs; in brackets, 95 % confidence. Training took "
        f"{seconds:.0f} s with start-up and evaluations: step {first.step:,}, validation loss "
        f"{first.loss:.4f}."
    )
    result.table(name, ["", *measures], rows, note)


def main() -> int:
    options = parser(__doc__, rounds=1)
    options.add_argument("--nl2bash", help="a folder of train.nl, train.cm, dev.nl and dev.cm")
    arguments = options.parse_args()
    data = []
    if arguments.nl2bash:  # looked at before minutes of other work, and from where this was started
        path = Path(arguments.nl2bash).resolve()
        if not (path / "train.nl").is_file():
            raise UserError(
                f"--nl2bash {arguments.nl2bash}: no train.nl there; give nl2bash's folder"
            )
        data = ["--data.path", path]
    result = Result("quality", "How often answers are right")
    with tempfile.TemporaryDirectory() as scratch:
        rounds = []
        for seed in range(SEED, SEED + arguments.rounds):
            seconds, ways = run(Path(scratch) / str(seed), DEFAULT, "--seed", seed)
            tell(result, f"default.toml, seed {seed}", seconds, ways)
            rounds.append(ways)
        for way in DEFAULT:
            for measure in TOP:
                mean = statistics.mean(own(ways[way])[1][measure].value for ways in rounds)
                gain = mean - best_look_up(rounds[0][way], measure)
                text = f"default.toml, {way}: mean {measure} above the best look-up's"
                result.claim(text, gain, 0, unit="")
        if arguments.nl2bash is not None:
            flags = ["--config", "configs/nl2bash.toml", *data]
            seconds, ways = run(Path(scratch) / "nl2bash", NL2BASH, *flags)
            tell(result, "nl2bash.toml", seconds, ways)
            result.claim("nl2bash.toml, training", seconds / 60, MINUTES, True, "minutes")
            for way, found in ways.items():
                for measure, score in own(found)[1].items():
                    gain = score.value - best_look_up(found, measure)
                    text = f"nl2bash.toml, {way}: {measure} above the best look-up's"
                    result.claim(text, gain, 0, unit="")
    result.finish(arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(cli.run("python -m benchmarks.quality", main))
