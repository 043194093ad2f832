"""Files that would be executed, in every slot that a program reads: none is."""

import contextlib
import hashlib
import io
import json
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save as to_safetensors

from checkpoint.reader import list_steps
from common.files import checksummed_json
from tests.faults.campaign import TINY, Tally, campaign
from tests.faults.corruption import copy_run, restored, trained
from tests.faults.hostile import ENGINES, attempt, judge
from tests.helpers import command, write_config


class Payload:
    """What leaves a mark if anybody unpickles it."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def payloads(marker: Path, own: bytes) -> dict[str, bytes]:
    """Contents that would make `marker` if they were executed; `own` is what was in the file."""
    pickled = pickle.dumps(Payload(marker))
    shell = f"$(touch {marker});`touch {marker}`|touch {marker}\n\x1b[2J"
    code = f"__import__('os').system('touch {marker}')"
    objects = {
        "__reduce__": ["os.system", f"touch {marker}"],
        "py/object": code,
        "$ref": f"file:{marker}",
    }
    array, torch_file, archive = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.save(array, np.array([Payload(marker)], object), allow_pickle=True)
    with zipfile.ZipFile(torch_file, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../" * 9 + str(marker), code)
    tensors = {"embed.weight": np.frombuffer(pickled, np.uint8)}
    piece = code.encode()
    found = {
        "a pickle": pickled,
        "a file of torch.save": torch_file.getvalue(),
        "an array of objects": array.getvalue(),
        "a zip": archive.getvalue(),
        "YAML": f"!!python/object/apply:os.system ['touch {marker}']\n".encode(),
        "TOML": f"[model]\n__class__ = {json.dumps(code)}\n".encode(),
        "JSON": json.dumps(objects).encode(),
        "JSON Lines": json.dumps({"prompt": shell, "completion": code, "step": objects}).encode(),
        "Python": f"import os\n{code}\n".encode(),
        "safetensors": to_safetensors(tensors, {"__reduce__": code}),
        "a SentencePiece model": bytes([10, len(piece) + 2, 10, len(piece)]) + piece + pickled,
    }
    with contextlib.suppress(ValueError):
        stored = json.loads(own)
        values = (shell, objects, -1, 1e400, [])
        for i, key in enumerate(stored):
            content = json.dumps({**stored, key: values[i % len(values)]}).encode()
            found[f"its own JSON, {key} {str(values[i % len(values)])[:6]}"] = content
        for value in values:
            content = json.dumps(filled(stored, value)).encode()
            found[f"its own JSON, everything {str(value)[:6]}"] = content
        for name in ("../../../../../victim", str(marker), "a\0b", ".."):
            if isinstance(files := stored.get("files"), dict):
                content = json.dumps(
                    {**stored, "files": {name: next(iter(files.values()))}}
                ).encode()
                found[f"its own JSON, of the file {name!r}"] = content
    return found


def filled(value, leaf):
    """A JSON value with everything that is neither list nor object replaced by `leaf`."""
    if isinstance(value, dict):
        return {key: filled(part, leaf) for key, part in value.items()}
    return [filled(part, leaf) for part in value] if isinstance(value, list) else leaf


NAMES = [
    "../evil2", "{}", "a/b", "..", ".", "$(touch {})", ";touch {}", "a\nb", "..\\evil2", ".hidden",
    "evil\x1b[2J", "é", "a" * 300, "~", "evil/../../x", "`touch {}`",
]  # fmt: skip
FILES = ["input.txt", "input.jsonl", "tokenizer.model", "tokenizer.json", "prompts.txt"]
LINK = "a link out of the folder"


@campaign("malicious", "19", "files that would be executed, in every slot", "files", 1000, 2)
def malicious(tally: Tally, count: int, folder: Path, dice):
    """Each payload in place of each file that a program reads; all of them if `count` allows."""
    home, marker, victim = folder / "home", folder / "executed", folder / "victim"
    home.mkdir()
    victim.write_text("as it was")
    write_config(home)
    shutil.copytree(trained() / "cache", home / "cache")
    shutil.rmtree(list_steps(copy_run(home, "evil"))[-1])  # so that there are steps to go on with
    files = [home / name for name in FILES]
    files += [p for p in home.rglob("*") if p.is_file() and p.suffix != ".lock"]
    files += [
        home / "runs/evil" / name for name in ("checkpoints/best.tmp", "metrics.tmp", ".owner")
    ]
    cases = [(file, kind) for file in files for kind in [*payloads(marker, content_of(file)), LINK]]
    cases += [(name.format(marker), "a name") for name in NAMES]
    dice.shuffle(cases)
    for number, (slot, kind) in enumerate(cases[:count]):
        what = f"{kind} as {slot}".replace(str(home), "")
        with restored(home):
            if kind == "a name":
                programs = [command("train.py", "--resume", "--name", slot)]
                programs += [command("train.py", *TINY, "--max_steps", 1, "--name", slot)]
            else:
                put(slot, kind, marker, victim)
                programs = users(slot, home, ENGINES[number % 3])
            for program in programs:
                result = attempt(program, home)
                tally.counts["programs run"] += 1
                tally.counts["refusals"] += result.returncode == 2
                if result.returncode == 1 and "-m" in program and not result.stderr:
                    continue  # what these say of damage, on stdout
                if wrong := judge(result, refused=kind == "a name"):
                    tally.undetected.append(f"{what}: {' '.join(program[1:])}: {wrong[:300]}")
        tally.tried += 1
        left = sorted(path.name for path in folder.iterdir())
        if left != ["home", "victim"] or victim.read_text() != "as it was":
            tally.undetected.append(f"{what}: EXECUTED, or written outside: {left}")
            victim.write_text("as it was")
            for name in set(left) - {"home", "victim"}:
                (folder / name).unlink()


def content_of(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b"{}"


def put(slot: Path, kind: str, marker: Path, victim: Path):
    """Puts a payload where a program reads, with every hash made to match."""
    own = content_of(slot)
    slot.unlink(missing_ok=True)
    if kind == LINK:
        slot.symlink_to(victim)
    else:
        content = payloads(marker, own)[kind]
        if kind.startswith("its own") and "sha256" in json.loads(own):
            content = checksummed_json(
                {k: v for k, v in json.loads(content).items() if k != "sha256"}
            )
        slot.write_bytes(content)
    for name in ("MANIFEST.json", "manifest.json"):
        manifest = slot.with_name(name)
        if manifest.exists() and manifest != slot:
            stored = json.loads(manifest.read_bytes())
            digest, size = hashlib.sha256(slot.read_bytes()).hexdigest(), slot.stat().st_size
            stored["files"][slot.name] = (
                {"bytes": size, "sha256": digest} if name[0] == "M" else digest
            )
            del stored["sha256"]
            manifest.write_bytes(checksummed_json(stored))


def users(slot: Path, home: Path, engine: str) -> list[list[str]]:
    """The programs that read a file."""
    train = command("train.py", *TINY, "--max_steps", 1, "--name", "new")
    write = command("generate.py", "--checkpoint", "runs/evil", "--engine", engine)
    name = slot.name if slot.parent == home else ""
    if name.startswith("input"):
        return [[*train, "--data.path", str(slot)]]
    if name.startswith("tokenizer"):
        return [[*train, "--data.tokenizer_path", str(slot)]]
    if name == "prompts.txt":
        return [[*write, "--prompt_file", str(slot)]]
    if name or home / "cache" in slot.parents:
        return [train]
    # the run is at step 20
    go_on = command("train.py", "--resume", "--name", "evil", "--max_steps", 21)
    check = [sys.executable, "-m", "checkpoint", "verify", "runs/evil"]
    if "events.out" in slot.name or slot.name == "metrics.jsonl":
        check[2:4] = ["tools.tensorboard_files", "check"]
    return [go_on, write, check]
