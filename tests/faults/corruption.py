"""Damage on the disk, to checkpoints and to prepared data: all of it is noticed."""

import atexit
import contextlib
import functools
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np

from checkpoint.reader import Checkpoint, CheckpointError, list_steps, read_best
from checkpoint.writer import newest_complete
from common.errors import UserError
from data.config import DataConfig
from data.dataset import prepare
from data.prepared import encoding, token_files
from tests.faults.campaign import TINY, Tally, campaign, home, one_line, same_run
from tests.helpers import TEXT, run, write_config
from training.config import load


@functools.cache
def trained() -> Path:
    """A home with a finished run, "straight", of steps 0, 20 and 40; made once, only read."""
    folder = Path(tempfile.mkdtemp(prefix="faults-trained-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return home(folder)


def copy_run(folder: Path, name: str) -> Path:
    """A copy of that run in `folder`/runs, to be damaged."""
    target = folder / "runs" / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(trained() / "runs" / "straight", target)
    return target


def flipped(content: bytes, dice) -> bytes:
    """`content` with one bit of it the other way."""
    changed = bytearray(content)
    changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed)


@contextlib.contextmanager
def restored(folder: Path):
    """The block, and after it `folder` as it was."""
    saved = folder.with_name(f"saved-{folder.name}")
    shutil.copytree(folder, saved)
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        saved.rename(folder)


# Checkpoints --------------------------------------------------------------------------------------


@campaign("flips", "8", "a bit flipped in a checkpoint or in best.json", "flips", 1000, 40)
def flips(tally: Tally, count: int, folder: Path, dice):
    """Every file gets its share. One flip in fifty is given to real programs, too."""
    run_folder = copy_run(folder, "flipped")
    best, known = run_folder / "checkpoints" / "best.json", read_best(run_folder)
    newest = list_steps(run_folder)[-1]
    files = sorted(newest.iterdir())
    for number in range(count):
        real = number % 50 == 0
        file = dice.choice(files if real else [*files, best])
        content = file.read_bytes()
        file.write_bytes(flipped(content, dice))
        tally.tried += 1
        if file == best:
            tally.counts["in best.json"] += 1
            if read_best(run_folder) not in (None, known):
                tally.undetected.append(f"best.json: {file.read_bytes()!r} is believed")
        else:
            examine(tally, newest, [file.name], f"a bit of {file.name}")
            if real:
                give_to_programs(tally, run_folder, file.name)
        file.write_bytes(content)


@campaign("truncations", "9", "a file of a checkpoint cut, missing or another's", "files", 300, 40)
def truncations(tally: Tally, count: int, folder: Path, dice):
    """What accidents make of files. One in fifty is given to real programs, too."""
    newest = list_steps(copy_run(folder, "cut"))[-1]
    while tally.tried < count:
        kind, real = dice.choice(DAMAGES), tally.tried % 50 == 0
        with restored(newest):
            if not (names := damage(newest, kind, dice)):
                continue
            tally.tried += 1
            tally.counts[kind] += 1
            examine(tally, newest, names, f"{' and '.join(names)} {kind}")
            if real:
                give_to_programs(tally, newest.parent.parent, *names)


DAMAGES = ("cut", "missing", "zeros", "longer", "of another step", "swapped")


def damage(step: Path, kind: str, dice) -> list[str]:
    """Damages a file of a checkpoint, or two; their names. [] where that changes nothing."""
    file, other = dice.sample(sorted(step.iterdir()), 2)
    content = file.read_bytes()
    if kind == "missing":
        file.unlink()
        return [file.name]
    if kind == "swapped":
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return [file.name, other.name]
    changed = {
        "cut": lambda: content[: dice.randrange(len(content))],
        "zeros": lambda: bytes(len(content)),
        "longer": lambda: content + dice.randbytes(dice.randrange(1, 100)),
        "of another step": lambda: (list_steps(step.parent.parent)[-2] / file.name).read_bytes(),
    }[kind]()
    file.write_bytes(changed)
    if changed == content:
        return []
    # a manifest of another step is whole, and it is the files that do not fit it
    whole = kind == "of another step" and file.name == "MANIFEST.json"
    return sorted(path.name for path in step.iterdir()) if whole else [file.name]


def examine(tally: Tally, newest: Path, names: list[str], what: str):
    """What reading says of a damaged checkpoint: it is refused, and skipped, by name."""

    def named(text: str) -> bool:
        return any(f"{newest.name}/{name}" in text for name in names)

    try:
        Checkpoint(newest).verify()
        tally.undetected.append(f"{what}: not noticed")
    except CheckpointError as error:
        if not named(str(error)):
            tally.undetected.append(f"{what}: not named in {error}")
    except Exception as error:
        tally.undetected.append(f"{what}: {error!r}")
        return
    run_folder, said = newest.parent.parent, []
    found = newest_complete(run_folder, said.append)
    if found.path != list_steps(run_folder)[-2]:
        tally.lost.append(f"{what}: {found.path} is resumed from")
    if len(said) != 1 or not named(said[0]):
        tally.undetected.append(f"{what}: skipped with {said}")


def give_to_programs(tally: Tally, damaged: Path, *names: str):
    """By path the newest step is refused; by name the run goes on from the step before."""
    folder = damaged.parent.parent
    tally.counts["in real programs"] += 1
    broken = folder / "runs" / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(damaged, broken)
    step = list_steps(broken)[-1]
    commands = [("train.py", "--resume", step)]
    if "optimizer.safetensors" not in names:  # which writing text does not read
        commands.append(("generate.py", "--checkpoint", step))
    for command in commands:
        result = run(*command, cwd=folder)
        wrong = one_line(result)
        if wrong or not any(name in result.stderr for name in names):
            tally.undetected.append(f"{names}: {command[0]}: {wrong or result.stderr}")
    result = run("train.py", "--resume", "--name", "broken", cwd=folder)
    passed = [line for line in result.stdout.splitlines() if line.startswith("skipped: ")]
    if len(passed) != 1 or not any(name in passed[0] for name in names):
        tally.undetected.append(f"{names}: --resume skipped {passed}: {result.stderr}")
    if result.returncode:
        tally.lost.append(f"{names}: --resume ended with {result.returncode}: {result.stderr}")
    elif different := same_run(trained() / "runs" / "straight", broken):
        tally.lost.append(f"{names}: after --resume: {different}")


# Prepared data ------------------------------------------------------------------------------------


@campaign("token_files", "10", "prepared data cut, flipped, swapped", "files", 1000, 150)
def damaged_files(tally: Tally, count: int, folder: Path, dice):
    """Each is refused, or what is opened is what was prepared. A few are given to train.py."""
    places = prepared(folder)
    for number in range(count):
        real = number % 250 == 0
        config, place, whole = places[0] if real else dice.choice(places)
        with restored(place):
            what = f"{place.name}: {spoil(place, [p for _, p, _ in places], dice, real)}"
            tally.tried += 1
            try:
                same = facts(prepare(config, lambda line: None)) == whole
                tally.counts["harmless" if same else "not noticed"] += 1
                if not same:
                    tally.undetected.append(f"{what}: not noticed")
            except UserError as error:
                if "\n" in str(error) or f"remove {place}" not in explained(str(error), place):
                    tally.undetected.append(f"{what}: not named, or no fix, in {error}")
                elif real:
                    result = run("train.py", *TINY, "--name", f"r{number}", cwd=folder)
                    tally.counts["in train.py"] += 1
                    if wrong := one_line(result) or ("" if place.name in result.stderr else "?"):
                        tally.undetected.append(f"{what}: train.py: {wrong}")
            except Exception as error:
                tally.undetected.append(f"{what}: {error!r}")


def explained(message: str, place: Path) -> str:
    """A refusal with "it" spelled out."""
    return message.replace("remove it", f"remove {place}") if str(place) in message else message


def prepared(folder: Path) -> list[tuple]:
    """Data of every kind, as (settings, folder, facts); the first is that of tiny.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = folder / "pairs.jsonl"
    pairs.write_text(
        "".join(f'{{"prompt": "{i} plus {i}", "completion": "{2 * i}"}}\n' for i in range(300))
    )
    texts = folder / "texts.jsonl"
    texts.write_text("".join(f'{{"text": "{i} is a text, {i * i} another"}}\n' for i in range(99)))
    configs = [
        load(write_config(folder)).data,
        DataConfig(path=str(TEXT), kind="lines", tokenizer="char_bos"),
        DataConfig(path=str(pairs), tokenizer="char"),
        DataConfig(path=str(TEXT), kind="lines", tokenizer="bpe", vocab_size=320),
        DataConfig(path=str(texts), tokenizer="char"),
    ]
    found = []
    for number, config in enumerate(configs):
        if number:
            cache = folder / f"cache{number}"
            config = DataConfig(**{**vars(config), "cache_dir": str(cache)})
        # each but the first in several shards
        size, blocks = (1 << 28, 1 << 18) if not number else (400, 100)
        with (
            mock.patch.object(token_files, "SHARD_TOKENS", size),
            mock.patch.object(encoding, "CHARACTERS", blocks),
        ):
            whole = facts(prepare(config, lambda line: None))
        (manifest,) = Path(config.cache_dir).glob("*/manifest.json")
        found.append((config, manifest.parent, whole))
    return found


def facts(dataset) -> tuple:
    """All that training takes from a data set."""
    splits = [
        (split.bytes, *(None if a is None else a[:].tobytes() for a in arrays(split)))
        for split in (dataset.train, dataset.val)
    ]
    head = (dataset.name, dataset.kind, dataset.fingerprint, dataset.tokenizer.files())
    return (*head, dataset.held_out, *splits)


def arrays(split) -> tuple:
    return split.ids, split.starts, split.prompts, split.borders


def spoil(place: Path, others: list[Path], dice, real: bool) -> str:
    """Damages a file of a prepared data set; what was done."""
    names = [path.name for path in sorted(place.iterdir()) if path.stat().st_size]
    name = dice.choice([n for n in names if n.endswith(".ids")] if real else names)
    file, content = place / name, (place / name).read_bytes()
    split, suffix = name.partition("-")[0], name.rpartition(".")[2]
    changes = {
        "odd length": content[:-1],
        "half length": content[: len(content) // 2],
        "longer": content + dice.randbytes(dice.randrange(1, 9)),
        "empty": b"",
        "zeros": bytes(len(content)),
        "a bit flipped": flipped(content, dice),
    }
    for other in others:
        if other != place and (other / name).exists():
            changes["of other data"] = (other / name).read_bytes()
    if split in ("train", "val"):
        mate = {"train": "val", "val": "train"}[split]
        changes["of the other split"] = (place / f"{mate}-00000.{suffix}").read_bytes()
        changes["out of order"] = out_of_order(content, {"ids": 2, "prompts": 4}.get(suffix, 8))
    if suffix == "ids":
        beyond = np.frombuffer(content, "<u2").copy()
        beyond[dice.randrange(len(beyond))] = dice.randrange(1000, 1 << 16)
        changes["ids beyond the vocabulary"] = beyond.tobytes()
    kind = dice.choice([*changes, "missing"])
    file.unlink() if kind == "missing" else file.write_bytes(changes[kind])
    return f"{name}, {kind}"


def out_of_order(content: bytes, width: int) -> bytes:
    """The same numbers, the last one first."""
    return content[-width:] + content[:-width]
