"""One corpus, prepared by several machines into a folder that they share, each a part of it.

tokenizer-FINGERPRINT/     made by the first, for all
1-of-4/ 2-of-4/ ...        prepared folders, of a part each
manifest.json tokenizer.*  all parts as one: the folder is a prepared data set then

A part is a run of neighbouring files, or where files are few or unequal, of texts. So the ids and
their order are those that one machine would have made, whatever the number of parts.
"""

import re
import shutil
import time
from bisect import bisect_left
from collections import Counter
from itertools import accumulate
from pathlib import Path

from filelock import FileLock

from common.errors import UserError
from common.files import (
    checksummed_json,
    is_address,
    read_checksummed_json,
    replace_synced,
    user_path,
)
from data.config import DEFAULT_CACHE_DIR, DataConfig, as_paths
from data.prepared.building import (
    Log,
    build,
    building,
    check_round_trip,
    fingerprint_of,
    make_tokenizer,
    refuse_other,
    writing,
)
from data.prepared.manifest import check_manifest, explained
from data.prepared.remote_shards import RemoteFolder
from data.prepared.splitting import count_characters, hash_fraction, hold_out
from data.sources.readers import Place, Reader
from data.sources.source import Source, open_source
from data.tokenizers.base import Tokenizer
from data.tokenizers.byte import ByteTokenizer
from data.tokenizers.load import TOKENIZER_FILES, load_tokenizer

SAME = ("format", "name", "kind", "fingerprint", "dtype", "vocab_size", "files")  # in all parts
TOKENIZER = "|".join(map(re.escape, TOKENIZER_FILES))
# what may stand in a folder that was prepared into before
OWN = re.compile(
    rf"tokenizer-\w+|\d+-of-\d+(\.lock)?|manifest\.lock|"
    rf"(\d+-of-\d+/)?(manifest\.json|(train|val)-\d+\.\w+|{TOKENIZER}|\w+\.tmp)"
)
INTERVAL = 1.0  # seconds between two looks for the tokenizer


def prepare_part(
    config: DataConfig,
    to: Path,
    part: int,
    parts: int,
    log: Log = print,
    tokenizer: Tokenizer | None = None,
    jobs: int = 0,
    there: RemoteFolder | None = None,
) -> bool:
    """Prepares part `part` (from 1) of `parts` in the folder `to`, and merges all when they are
    there; whether they are.

    there: the folder in an object store whose mirror `to` is, to which all is moved.
    """
    cache = user_path(config.cache_dir or DEFAULT_CACHE_DIR)
    refuse_other_files(to, config)
    source = open_source(config, log, cache)
    if source.kind == "stream" and parts > 1:
        raise UserError(
            f"--part {part}/{parts}: one long text is not prepared in parts; leave --part out, or "
            'set data.kind = "documents" for many texts'
        )
    fingerprint = fingerprint_of(source, config, tokenizer)
    with writing(to, "--to"):
        to.mkdir(parents=True, exist_ok=True)
    folder = to / f"{part}-of-{parts}"
    refuse_other(folder, fingerprint, "--to")
    check_round_trip(tokenizer, source, log)
    tokenizer = tokenizer or shared_tokenizer(
        config, source, to, fingerprint, part, parts, log, there
    )
    readers = [reader for reader in (source.train, source.val) if reader]
    cuts = [borders(reader, parts) for reader in readers] if parts > 1 else []
    share = [(cut[part - 1], cut[part]) for cut in cuts] or None
    if there:
        there.refuse_half(folder)
    with building(folder, fingerprint, log, "--to") as unfinished:
        if unfinished:
            build(source, config, fingerprint, unfinished, log, tokenizer, jobs, share)
    if there:
        there.move_part(folder)
    return merge(to, parts, log, there)


def refuse_other_files(to: Path, config: DataConfig):
    """Refuses to prepare into a folder of something else, which could be lost, or read as text."""
    for path in as_paths(config.path):
        if is_address(path) or "\0" in path:  # which is refused when it is read
            continue
        if to.resolve().is_relative_to(user_path(path).resolve()):
            raise UserError(f"--to {to}: is in data.path, {path}; give a folder elsewhere")
    inside = [f"{file.parent.name}/{file.name}" for file in to.glob("[0-9]*-of-*/*")]
    for name in sorted([file.name for file in to.glob("[!.]*")] + inside):
        if not OWN.fullmatch(name):
            raise UserError(f"--to {to}: has other files in it ({name}); give an empty folder")


def borders(reader: Reader, parts: int) -> list[Place]:
    """Where the parts of what a reader reads begin, and the end of the last."""
    total, end = reader.before[-1], Place(file=len(reader.parts))
    if 2 * parts * max(reader.sizes) <= total:  # whole files come out about even
        cuts = [bisect_left(reader.before, total * i / parts) for i in range(parts)]
        return [*(Place(file=cut) for cut in cuts), end]
    place, counts = Place(), Counter()
    for _ in reader(place):
        counts[place.file] += 1
    before = [0, *accumulate(counts[number] for number in range(len(reader.parts)))]
    found = []
    for i in range(parts):
        at = before[-1] * i // parts
        file = next(n for n, count in enumerate(before[1:]) if at < count or count == before[-1])
        found.append(Place(file=file, item=at - before[file]))
    return [*found, end]


def shared_tokenizer(
    config: DataConfig,
    source: Source,
    to: Path,
    fingerprint: str,
    part: int,
    parts: int,
    log: Log,
    there: RemoteFolder | None = None,
) -> Tokenizer:
    """The tokenizer of all parts: the first makes it, and the others wait for it.

    Raises UserError where the first is there, and of another corpus or other settings.
    """
    if config.tokenizer == "byte":
        return ByteTokenizer()
    place = to / f"tokenizer-{fingerprint}"

    def is_here() -> bool:
        return place.exists() or bool(there and there.fetch_folder(place.name))

    if part > 1 and not is_here():
        log(f"waiting for {place}: part 1 makes it")
        while not is_here():
            first = to / f"1-of-{parts}"
            if there:
                there.fetch(f"{first.name}/manifest.json")
            refuse_other(first, fingerprint, "--to", ", and makes no tokenizer for these")
            time.sleep(INTERVAL)
    if not is_here():
        tokenizer = make_tokenizer(config, source, count_characters(source, config), log)
        unfinished = to / f".{place.name}"
        with writing(to, "--to"):
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            tokenizer.save(unfinished)
            unfinished.rename(place)
    if there and part == 1:
        there.send_folder(place)
    return load_tokenizer(place)


def merge(to: Path, parts: int, log: Log = print, there: RemoteFolder | None = None) -> bool:
    """Makes all parts one data set, by a manifest; False if some are not there yet."""
    folders = [to / f"{part}-of-{parts}" for part in range(1, parts + 1)]
    if there:
        for folder in folders:
            if not there.fetch(f"{folder.name}/manifest.json"):
                (folder / "manifest.json").unlink(missing_ok=True)
    missing = [folder.name for folder in folders if not (folder / "manifest.json").exists()]
    if missing:
        log(f"{there or to}: to be merged when {', '.join(missing)} is there")
        return False
    manifests = []
    for folder in folders:
        with explained(folder):
            manifest = read_checksummed_json(folder / "manifest.json")
            check_manifest(manifest, is_part=True)
            manifests.append(manifest)
        if differing := [key for key in SAME if manifest[key] != manifests[0][key]]:
            raise UserError(
                f"{folder}: not of the same corpus as part 1 ({differing[0]}); give all parts the "
                "same files and settings, and remove what differs"
            )
    whole, held_out = manifests[0], {}
    for manifest in manifests:
        for pair in map(lambda p: (p["prompt"], p["completion"]), manifest["held_out"]):
            held_out.setdefault(hash_fraction(pair), pair)
    splits: dict[str, list[dict]] = {
        name: [
            {**shard, "name": f"{folder.name}/{shard['name']}"}
            for folder, manifest in zip(folders, manifests, strict=True)
            for shard in manifest["splits"][name]
        ]
        for name in whole["splits"]
    }
    for name, shards in splits.items():
        if sum(shard["tokens"] for shard in shards) < 2:
            raise UserError(
                f"{to}: no text for the {name} split with this data.val_fraction; give more text, "
                "or set data.val_fraction = 0 for no validation"
            )
    content = checksummed_json({**whole, "held_out": hold_out(held_out), "splits": splits})
    if there:
        for name in whole["files"]:
            there.fetch(f"{folders[0].name}/{name}")
    with writing(to, "--to"), FileLock(to / "manifest.lock"):
        for name in whole["files"]:
            replace_synced(to / name, (folders[0] / name).read_bytes())
        replace_synced(to / "manifest.json", content)
    if there:
        for name in (*whole["files"], "manifest.json"):
            there.send(to / name)
    tokens = {name: sum(shard["tokens"] for shard in shards) for name, shards in splits.items()}
    log(f"{there or to}: {', '.join(f'{name} {n:,} tokens' for name, n in tokens.items())}")
    return True


def count_parts(to: Path, there: RemoteFolder | None = None) -> int:
    """Of how many parts the folder is. Raises UserError if it holds none, or of several numbers."""
    if there:
        for name in there.names("*-of-*/manifest.json"):
            there.fetch(name)
    found = {
        path.name.partition("-of-")[2] for path in to.glob("[1-9]*-of-[1-9]*") if path.is_dir()
    }
    if len(found) != 1 or not (number := found.pop()).isdecimal():
        raise UserError(
            f"--merge {to}: must have folders 1-of-N to N-of-N, as --part makes them; give the "
            "folder of --to"
        )
    return int(number)
