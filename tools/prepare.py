"""Prepares data without training: text to token files, with a bar, and by several machines.

python -m tools.prepare --data.path 'corpus/*.jsonl.zst'                  # as train.py will want it
python -m tools.prepare --data.path corpus --to FOLDER                    # to train on anywhere
python -m tools.prepare --data.path corpus --to FOLDER --part 2/4         # one of four machines
python -m tools.prepare --verify FOLDER
"""

import signal

if __name__ == "__main__":  # before what takes time: until cli.run() listens, Ctrl-C is silent
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import re
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from common import cli
from common.errors import UserError
from common.files import is_address, user_path
from data.config import DataConfig
from data.dataset import open_dataset, store_of, verify
from data.mixture import prepare
from data.prepared.parts import count_parts, merge, prepare_part
from data.prepared.remote_shards import RemoteFolder
from data.sources.spool import keep_standard_input
from data.tokenizers.load import named_tokenizer
from training.command_line import DEFAULT, kind_of_own, together, underscored
from training.config import load

PROGRAM = "python -m tools.prepare"
DESCRIPTION = """Prepares data without training, with the settings of train.py. Where it is ended,
the same command continues. Exit status 0, or 2 for what is wrong."""

log = partial(print, flush=True)


@dataclass(frozen=True)
class Arguments:
    """What to prepare, and where."""

    data: DataConfig
    config: str = ""
    """TOML file with the settings, of which [data] counts; empty: configs/default.toml."""
    jobs: int = 0
    """Processes that encode; 0: one for each core."""
    to: str = ""
    """Folder or address to prepare into, for train.py's --data.path; empty: data.cache_dir."""
    part: str = ""
    """i/n: prepare part i of n into --to, where others do theirs; the last one merges all."""
    merge: str = ""
    """Only merge the parts in this folder."""
    verify: str = ""
    """Only check every file in this prepared folder by its hash."""


def main() -> int:
    argv = together([underscored(flag) for flag in sys.argv[1:]])
    scan = cli.Parser(add_help=False, allow_abbrev=False)
    scan.add_argument("--config", default="")
    settings = load(user_path(scan.parse_known_args(argv)[0].config or DEFAULT))
    arguments = cli.parse(Arguments, DESCRIPTION, Arguments(settings.data), argv)
    if arguments.jobs < 0:
        raise UserError(f"--jobs {arguments.jobs} must be at least 0")
    if arguments.verify and arguments.merge:
        raise UserError("--verify, --merge: one at a time; leave one of them out")
    if arguments.verify:
        to, there = folders(arguments.verify, arguments.data)
        verify(there or to, log)
    elif arguments.merge:
        to, there = folders(arguments.merge, arguments.data)
        if not merge(to, count_parts(to, there), log, there):
            return 2
    else:
        given = replace(settings, data=arguments.data)
        given = replace(given, data=keep_standard_input(given.data, log))
        try:
            make(kind_of_own(given, settings, argv).data, arguments)
        except KeyboardInterrupt:
            with contextlib.suppress(OSError):  # a terminal that has closed
                print("stopped; the same command continues", file=sys.stderr, flush=True)
            raise
    return 0


def make(config: DataConfig, arguments: Arguments):
    """Prepares, and says where it is."""
    part, parts = read_part(arguments)
    tokenizer, jobs = named_tokenizer(config), arguments.jobs
    if not arguments.to:
        data = prepare(config, log, tokenizer, jobs)
    elif config.sources:
        raise UserError(
            f"--to {arguments.to}: a mixture's sources are prepared each into its own folder; "
            "leave it out, or give one of them as --data.path"
        )
    else:
        to, there = folders(arguments.to, config)
        if not prepare_part(config, to, part, parts, log, tokenizer, jobs, there):
            return
        data = open_dataset(there or to)
        where = cli.quoted(there.address if there else to)
        log(f"to train on it: python train.py --data.path {where}")
    for name, split in (("train", data.train), ("validation", data.val)):
        if split:
            log(f"data: {data.name} ({data.kind}), {name}: {split.describe()}")


def folders(path: str, config: DataConfig) -> tuple[Path, RemoteFolder | None]:
    """The folder at a path; of one in an object store its mirror here, and itself."""
    if not is_address(path):
        return user_path(path), None
    there = RemoteFolder(path, store_of(config, log))
    return there.mirror(), there


def read_part(arguments: Arguments) -> tuple[int, int]:
    """The part to prepare, and of how many. Raises UserError."""
    if not arguments.part:
        return 1, 1
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", arguments.part)
    part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part <= parts:
        raise UserError(f"--part {arguments.part}: must be i/n with i from 1 to n, as 2/4")
    if not arguments.to:
        raise UserError(f"--part {arguments.part}: needs a folder for all parts; add --to FOLDER")
    return part, parts


if __name__ == "__main__":
    sys.exit(cli.run(PROGRAM, main))
