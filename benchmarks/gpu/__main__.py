"""Everything there is to measure on a GPU, in one go of less than ten minutes: benchmarks/gpu.md.

bash benchmarks/gpu.sh --nanogpt PATH --shakespeare FILE        all of it
bash benchmarks/gpu.sh --device cpu --tiny                      tried out, without a GPU
python -m benchmarks.gpu --report FOLDER/results.json           what it found, for the document
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.gpu.plan import PATIENCE, plan
from benchmarks.gpu.report import report
from benchmarks.gpu.runner import SECONDS, Bench, run_plan
from common import cli
from common.errors import UserError
from common.files import user_path

FOLDER = Path(__file__).parent.parent / "gpu_results"


def existing(flag: str, path: str, file: str = "") -> str:
    """The absolute path of what a flag names, a file or a folder with `file`; "" for ""."""
    if path and not (user_path(path) / file).is_file():
        raise UserError(f"{flag} {path}: there is no {file or 'such file'}; give another path")
    return str(user_path(path).resolve()) if path else ""


def main() -> int:
    options = cli.Parser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    options.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options.add_argument("--tiny", action="store_true", help="small sizes, to try the script out")
    options.add_argument("--nanogpt", default="", help="a checkout of nanoGPT to compare with")
    options.add_argument("--shakespeare", default="", help="tinyshakespeare as a text file")
    options.add_argument("--seconds", type=float, help=f"that all may take: {SECONDS}")
    options.add_argument(
        "--out", type=Path, default=FOLDER, help="folder for what is found (benchmarks/gpu_results)"
    )
    options.add_argument("--report", type=Path, help="a results.json to make a benchmark of")
    arguments = options.parse_args()
    if arguments.report:
        report(arguments.report)
        return 0
    nanogpt = existing("--nanogpt", arguments.nanogpt, "model.py")
    shakespeare = existing("--shakespeare", arguments.shakespeare)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "log.txt").unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-") as scratch:
        bench = Bench(
            arguments.out, Path(scratch), arguments.device, arguments.tiny, nanogpt, shakespeare,
            arguments.seconds or SECONDS * (PATIENCE if arguments.tiny else 1),
        )  # fmt: skip
        return run_plan(bench, plan(arguments.tiny))


if __name__ == "__main__":
    sys.exit(cli.run("benchmarks.gpu", main))
