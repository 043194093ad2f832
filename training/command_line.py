"""The command line of train.py, all of it checked before torch is imported.

The settings are, from weakest to strongest: the dataclasses' defaults, the TOML file (on resuming:
what the checkpoint carries), the flags.
"""

import os
import re
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from checkpoint.reader import Checkpoint, list_steps, newest_run
from checkpoint.run_data import locate_data
from common import cli
from common.errors import UserError
from common.files import refuse_url, user_path
from common.processes import Processes
from data.config import DataConfig
from data.sources.kinds import is_plain
from data.sources.spool import keep_standard_input
from model.config import read_model_config
from training.config import FREE_CHANGES, Config, load, to_toml
from training.resume import (
    RunSpec,
    find_resume,
    from_json,
    is_finished,
    keep_resolved,
    load_weights_of,
    plan_resume,
    stored_config,
    to_json,
)
from training.run_folder import check_run_name, name_run

DESCRIPTION = "Trains a transformer decoder. Flags override the configuration file, in any order."
AUTO = "auto"  # --resume's
PATH = "--data.path"  # which may be given several times
# what is not given empty to mean something: these here, and those of tools/prepare.py
PATHS = re.compile(r"--(data\.(sources\.\d+\.)?path|init_from|resume|verify|merge)")
DEFAULT = Path(__file__).parent.parent / "configs" / "default.toml"


@dataclass(frozen=True)
class Arguments:
    """Flags override the configuration file, in any order."""

    settings: Annotated[Config, tyro.conf.arg(name="")]
    config: str = ""
    """TOML file with the settings; empty: configs/default.toml."""
    name: str = ""
    """Name of the run, a folder in runs_dir; empty: the configuration's name and the time."""
    runs_dir: str = "runs"
    """Folder of the runs."""
    resume: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[PATH]")] = None
    """Continue the newest run (or that of --name), or the run or checkpoint at PATH; "auto": the
    newest run (or that of --name) if there is one that has saved, else a new run."""
    init_from: str = ""
    """Start a new run from the weights of a run or checkpoint, on the same or other data."""
    extend: bool = False
    """With --resume: allow --max_steps to move the end of the learning-rate schedule."""
    print_config: bool = False
    """Print the resolved settings as TOML and exit."""


def read_for_all(processes: Processes, log, argv: list[str] | None = None) -> RunSpec | None:
    """What train.py is to do, as the first process reads it, in all of them."""
    own: list[RunSpec | None] = []

    def read() -> dict | None:
        try:
            own.append(read_command_line(log, argv))
        except SystemExit:  # --help, of which the others are to hear that nothing is to be done
            own.append(None)
        if own[0] is not None:
            own[0].config.train.share_of(processes.count)  # refuses what cannot be shared out
        return to_json(own[0])

    told = processes.decide(read)
    return own[0] if own else from_json(told)


def read_command_line(log, argv: list[str] | None = None) -> RunSpec | None:
    """What train.py is to do; None when there is nothing to do. `log` gets lines for people."""
    scan = cli.Parser(add_help=False, allow_abbrev=False)
    scan.add_argument("--config", default="")
    scan.add_argument("--name", default="")
    scan.add_argument("--runs_dir", default="runs")
    scan.add_argument("--init_from", default="")
    scan.add_argument("--resume", nargs="*")
    argv = together([underscored(flag) for flag in (sys.argv[1:] if argv is None else argv)])
    early = scan.parse_known_args(argv)[0]  # what the other flags' defaults depend on
    for flag in ("config", "init_from"):
        refuse_url(getattr(early, flag), f"--{flag} {getattr(early, flag)}")
    if early.resume is not None and len(early.resume) > 1:
        raise UserError(f"--resume: {len(early.resume)} paths; give one")
    path = early.resume[0] if early.resume else None
    if early.resume is not None and early.init_from and path != AUTO:
        raise UserError("--resume continues a run, --init_from starts one; give only one of them")
    if early.resume is None and "--extend" in argv:
        raise UserError("--extend: only for a run that is resumed; add --resume, or leave it out")
    refuse_url(path or "", f"--resume {path}")
    runs_dir, found, weights = user_path(early.runs_dir), None, None
    if path == AUTO and has_saved(runs_dir, early.name):
        found = find_resume(runs_dir, None, early.name, log)
    elif early.resume is not None and path != AUTO:
        found = find_resume(runs_dir, path, early.name, log)
    stored = stored_config(found[1]) if found else None
    settings = stored if stored and not early.config else load(user_path(early.config or DEFAULT))
    if early.init_from and not found:
        weights = load_weights_of(early.init_from)
        shape = read_model_config(weights)
        kept = {k: getattr(settings.model, k) for k in ("dropout", "attention_dropout")}
        settings = replace(settings, model=replace(shape, **kept))
    arguments = cli.parse(Arguments, DESCRIPTION, Arguments(settings), argv)
    given = arguments.settings
    given = replace(given, data=keep_standard_input(given.data, log))
    arguments = replace(arguments, settings=kind_of_own(given, settings, argv))
    if arguments.print_config:
        print(to_toml(arguments.settings))
        return None
    check_runs_dir(user_path(arguments.runs_dir))
    spec = make_spec(arguments, found, weights, log)
    if spec is not None:
        log(describe(arguments, spec))
    return spec


def has_saved(runs_dir: Path, name: str) -> bool:
    """Whether the run called `name`, or any where it is "", has a checkpoint to resume."""
    if not name:
        return newest_run(runs_dir) is not None
    check_run_name(name)
    return bool(list_steps(runs_dir / name))


def kind_of_own(given: Config, settings: Config, argv: list[str]) -> Config:
    """A configuration's data.kind is that of its own data: another path's file may be of another.

    settings: the configuration without the flags.
    """
    data = given.data
    own = data.path == settings.data.path or any(a.startswith("--data.kind") for a in argv)
    if not own and not is_plain(data.path):
        given = replace(given, data=replace(data, kind="auto"))
    if not any(a.startswith("--resume") for a in argv):  # earlier runs have ignored it
        refuse_separator(given.data)
    return given


def refuse_separator(data: DataConfig):
    """Refuses data.separator where a kind is given that is not divided by it."""
    parts = {f"data.sources.{i}.separator": part for i, part in enumerate(data.sources)}
    for key, part in {"data.separator": data, **parts}.items():
        if part.separator and part.kind in ("stream", "lines", "pairs"):
            raise UserError(
                f"{key} = {part.separator!r}: stands between documents, but the kind that is set "
                f'is "{part.kind}"; leave one of them out'
            )


def underscored(flag: str) -> str:
    """`--init-from=x` as `--init_from=x`: both spellings are taken."""
    if not flag.startswith("--"):
        return flag
    name, equals, value = flag.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def together(argv: list[str]) -> list[str]:
    """`argv` with the values of all --data.path after one: of several, tyro takes the last."""
    refuse_empty(argv)
    paths, rest, flags, ours = [], [], 0, False
    for word in argv:
        if word.startswith("--"):
            ours = word.partition("=")[0] == PATH
            flags += ours
            word = word.removeprefix(PATH).removeprefix("=") if ours else word
        if not ours:
            rest.append(word)
        elif word:
            paths.append(word)
    return [*rest, PATH, *paths] if flags > 1 else argv


def refuse_empty(argv: list[str]):
    """Refuses an empty path, as a shell's variable that is not set gives: it would be ignored."""
    flag = ""
    for word in argv:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            is_empty = bool(equals) and not value
        else:
            is_empty = not word
        if is_empty and PATHS.fullmatch(flag):
            key = flag.replace("--data.", "data.")
            raise UserError(f'{key} = "": is empty; give a file or folder, or leave it out')


def check_runs_dir(folder: Path):
    """Refuses a folder of runs that cannot be written, before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--runs_dir {folder}: {error.strerror}; choose another folder") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--runs_dir {folder}: not writable; choose another folder")


def make_spec(arguments: Arguments, found, weights, log) -> RunSpec | None:
    """What to do; None when a resumed run is at its end already."""
    config, runs_dir = arguments.settings, user_path(arguments.runs_dir)
    stem = Path(arguments.config or DEFAULT).stem
    if found is None:
        if weights:
            check_shape(config, weights)
        return RunSpec(name_run(runs_dir, arguments.name, stem), config, weights=weights)
    folder, checkpoint, forks = found
    if arguments.name and not forks and arguments.name != folder.name:
        raise UserError(
            f"--name {arguments.name}: --resume continues {folder} under its name; leave --name "
            "out, or start a new run with --init_from"
        )
    stored = stored_config(checkpoint)
    config = keep_resolved(stored, config)
    config, changes = plan_resume(stored, config, arguments.extend)
    config = replace(config, data=locate_data(config.data, checkpoint, log))
    for change in changes:
        log(f"changed: {change.key}: {change.before} -> {change.after}")
    if checkpoint.step >= config.max_steps and is_finished(folder, checkpoint, config.max_steps):
        log(
            f"{folder}: finished at step {checkpoint.step}; to continue training: "
            f"python train.py --resume {cli.quoted(folder)} --extend "
            f"--max_steps {2 * checkpoint.step}"
        )
        return None
    if forks:
        name = "" if arguments.name == folder.name else arguments.name
        folder = name_run(runs_dir, name, folder.name)
    return RunSpec(folder, config, resume=checkpoint, changes=tuple(changes), is_new=forks)


def check_shape(config: Config, weights: Checkpoint):
    """Refuses --init_from with settings of another model than that of the weights."""
    own, its = asdict(config.model), asdict(read_model_config(weights))
    differing = [
        f"model.{key} = {own[key]!r}, but the checkpoint has {its[key]!r}"
        for key in own
        if own[key] != its[key] and f"model.{key}" not in FREE_CHANGES
    ]
    if differing:
        raise UserError(
            f"--init_from {weights.path}: {'; '.join(differing)}; leave such --model.* flags out"
        )


def describe(arguments: Arguments, spec: RunSpec) -> str:
    """The first line: what is about to happen, and where to find it."""
    if spec.resume and spec.is_new:
        return f"a new run {spec.run} from step {spec.resume.step} of {spec.resume.path}"
    if spec.resume:
        return f"resuming {spec.run} from step {spec.resume.step}"
    origin = f" from the weights of {spec.weights.path}" if spec.weights else ""
    return f"{arguments.config or 'configs/default.toml'} -> {spec.run}{origin}"
