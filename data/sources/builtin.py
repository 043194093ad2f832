"""Built-in sources: two made from this Python's standard library, the others downloaded once.

Either way they end up as files in the cache, which readers.py reads like anyone's own.
`python -m data.sources fetch NAME` makes them beforehand.
"""

import ast
import hashlib
import http.client
import json
import os
import re
import sysconfig
import textwrap
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from common.errors import UserError
from common.files import hash_file
from data.config import Kind
from data.tokenizers.base import SURROGATE

VERSION = "1"  # of the extraction: raise it when the same standard library comes to give other text
MAX_PROMPT = 160  # characters of a docstring's first paragraph that make a prompt
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
SKIPPED |= {"_vendor", "_bundled", "__pycache__"}

NAMED: dict[str, tuple[Kind, str]] = {  # name: (kind, what it is)
    "stdlib": ("pairs", "docstring -> signature, from this Python's standard library"),
    "stdlib_words": ("lines", "the words in the sources of this Python's standard library"),
    "names": ("lines", "32,033 first names"),
    "tinyshakespeare": ("stream", "1.1 million characters of Shakespeare's plays"),
    "nl2bash": ("pairs", "12,607 descriptions of a task -> its Bash command"),
    "nl2bash_paper": ("pairs", "9,305 of them in the split of the paper: train, dev, test"),
}


class Download(NamedTuple):
    """A file that never changes: its address names a commit, and its content is pinned."""

    url: str
    file: str
    sha256: str
    max_bytes: int


RAW = "https://raw.githubusercontent.com"
SHAKESPEARE = f"{RAW}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data"
NL2BASH = f"{RAW}/TellinaTool/nl2bash/466c5fe873ab08c7cc0112ea1521cc6ad9c20992/data/bash"
DOWNLOADS = {
    "names": (
        Download(
            f"{RAW}/karpathy/makemore/988aa59/names.txt",
            "names.txt",
            "0a30b5557f192f32ab962680889aac5f6fda0f4cecf40a6d0b5694f58ea8cc4d",
            1_000_000,
        ),
    ),
    "tinyshakespeare": (
        Download(
            f"{SHAKESPEARE}/tinyshakespeare/input.txt",
            "tinyshakespeare.txt",
            "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            4_000_000,
        ),
    ),
    "nl2bash": (
        Download(
            f"{NL2BASH}/all.nl",
            "nl2bash.nl",
            "1db0c529c350b463919624550b8f5882a97c42ad5051c7d49fbc496bc4e8b770",
            4_000_000,
        ),
        Download(
            f"{NL2BASH}/all.cm",
            "nl2bash.cm",
            "3a72eaced7fa14a0938354cefc42b2dcafb2d47297102f1279086e18c3abe57e",
            4_000_000,
        ),
    ),
}


def named_files(name: str, cache: Path, log: Callable[[str], object]) -> tuple[Path, ...]:
    """The files of a source by name, made or downloaded where they are not in `cache` yet.

    One, or for pairs line by line two; or four, of which the last two are validation data.
    """
    try:
        if name == "nl2bash_paper":
            return _split_of_the_paper(cache, log)
        if name in DOWNLOADS:
            return fetch(name, cache, log)
        return (_standard_library(name, cache, log),)
    except OSError as error:
        raise UserError(
            f"{cache}: cannot store {name} ({error}); set data.cache_dir to a writable folder"
        ) from None


# The standard library -----------------------------------------------------------------------------


def _standard_library(name: str, cache: Path, log: Callable[[str], object]) -> Path:
    """The file in `cache` that holds the pairs or words of this Python, made if it is not there.

    Its name holds the hash of all the sources. These include ast.py, so that whatever else Python
    would extract has another name, too.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    digest = hashlib.blake2b(VERSION.encode(), digest_size=8)
    texts = []
    for data in _python_files(root):
        digest.update(data)
        try:
            texts.append(data.decode("utf-8"))
        except UnicodeDecodeError:
            continue  # an old encoding: too few to matter
    suffix, extract = {"stdlib": ("jsonl", _signatures), "stdlib_words": ("txt", _words)}[name]
    path = cache / f"{name}-{digest.hexdigest()}.{suffix}"
    if path.exists():
        return path
    log(f"{name}: extracting from {len(texts)} files of {root}")
    started = time.monotonic()
    lines = extract(texts)
    if not lines:
        raise UserError(
            f"data.source = {name}: no Python files in {root}; give your own text with --data.path"
        )
    _publish(path, lines)
    log(f"{name}: {len(lines):,} {NAMED[name][0]} in {time.monotonic() - started:.1f} s: {path}")
    return path


def _python_files(root: Path) -> Iterator[bytes]:
    """The sources below `root` in the order of their names, without tests and vendored packages."""
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - SKIPPED)
        for name in sorted(names):
            if name.endswith(".py") and os.path.isfile(os.path.join(folder, name)):
                yield Path(folder, name).read_bytes()


def _signatures(texts: list[str]) -> list[str]:
    """A line of JSONL for each function with a docstring, in order, none twice."""
    pairs = {}  # keeps the order of insertion, as a set would not
    for text in texts:
        with warnings.catch_warnings(action="ignore"):  # invalid escapes in old sources
            try:
                tree = ast.parse(text)
            except (SyntaxError, ValueError):  # ValueError: a NUL, in older Pythons
                continue
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        found = [node for node in ast.walk(tree) if isinstance(node, functions)]
        for node in sorted(found, key=lambda node: node.lineno):
            paragraph = (ast.get_docstring(node) or "").split("\n\n")[0]
            prompt = textwrap.shorten(paragraph, MAX_PROMPT, placeholder="")  # at a word's end
            if prompt and not SURROGATE.search(prompt):
                node.body, node.decorator_list = [], []  # what is left is the signature
                pairs[prompt, ast.unparse(node).strip()] = True
    return [json.dumps({"prompt": prompt, "completion": name}) for prompt, name in pairs]


def _words(texts: list[str]) -> list[str]:
    """The distinct runs of letters that are a-z only and 2 to 15 long, sorted."""
    runs = set().union(*(re.findall(r"[^\W\d_]+", text) for text in texts))
    return sorted(run for run in runs if re.fullmatch("[a-z]{2,15}", run))


# The split of a paper -----------------------------------------------------------------------------


def _split_of_the_paper(cache: Path, log: Callable[[str], object]) -> tuple[Path, ...]:
    """nl2bash as Lin et al. (2018) split it: train.nl, train.cm, dev.nl and dev.cm; beside, test.

    For each line of the download, nl2bash_paper.txt has t, d or e for train, dev and test, and .
    for one that their filter leaves out. It is what data/scripts/filter_data.py and split_data.py
    of TellinaTool/nl2bash (commit 99952372, random.seed(100)) make of it: 8,090, 609 and 606 pairs.
    """
    folder = cache / "nl2bash_paper"
    paths = {
        f"{s}.{e}": folder / f"{s}.{e}" for s in ("train", "dev", "test") for e in ("nl", "cm")
    }
    if not all(path.exists() for path in paths.values()):
        sides = "".join(Path(__file__).with_name("nl2bash_paper.txt").read_text("ascii").split())
        for ending, file in zip(("nl", "cm"), fetch("nl2bash", cache, log), strict=True):
            lines = file.read_text("utf-8").removesuffix("\n").split("\n")
            for split, letter in (("train", "t"), ("dev", "d"), ("test", "e")):
                chosen = (line for line, side in zip(lines, sides, strict=True) if side == letter)
                _publish(paths[f"{split}.{ending}"], [line.strip() for line in chosen])
    return tuple(paths.values())[:4]


def _publish(path: Path, lines: list[str]) -> None:
    """Write a file that is there whole or not at all, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


# Downloads ----------------------------------------------------------------------------------------


def fetch(name: str, cache: Path, log: Callable[[str], object] = print) -> tuple[Path, ...]:
    """The files of a source by name in `cache`/downloads; fetched if not there or damaged."""
    paths = []
    for wanted in DOWNLOADS[name]:
        path = cache / "downloads" / wanted.file
        if not path.exists() or hash_file(path) != wanted.sha256:
            log(f"downloading {wanted.url}")
            download(wanted.url, path, wanted.sha256, wanted.max_bytes)
        paths.append(path)
    return tuple(paths)


def download(
    url: str,
    path: Path,
    sha256: str,
    max_bytes: int,
    timeout: float = 30.0,
    allow_local_http: bool = False,
) -> None:
    """Put the file at `url` at `path`, over https only, if it has this hash; else raise UserError.

    An interrupted transfer leaves PATH.part, from which the next one goes on. A file that stands at
    `path` stays until a right one takes its place. `timeout` is how many seconds the server may be
    silent; `allow_local_http` lets the tests serve from 127.0.0.1.
    """
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _transfer(url, part, max_bytes, timeout, allow_local_http)
        found = hash_file(part)
        if found != sha256:
            part.unlink()
            raise OSError(f"its sha256 is {found} instead of {sha256}")
        part.replace(path)
    # ValueError: what urllib finds wrong with a server's addresses and numbers
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = str(error).removeprefix("<urlopen error ").removesuffix(">") or repr(error)
        raise UserError(
            f"{url}: {reason}; try again, download it by hand to {path}, or give --data.path FILE"
        ) from None


def _transfer(url: str, part: Path, max_bytes: int, timeout: float, local: bool) -> None:
    """Append to `part` what it lacks. OSError if that fails, with `part` left to go on from."""
    from tqdm import tqdm

    _require_https(url, local)
    done = part.stat().st_size if part.exists() else 0
    # S310 asks for a check of the scheme: it is made above, and again at each redirect
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})  # noqa: S310, https only
    try:
        response = urllib.request.build_opener(_Redirects(local)).open(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and done:  # nothing lacks: the hash will tell whether it is right
            return
        raise
    with response:
        goes_on = response.headers.get("Content-Range", "").startswith(f"bytes {done}-")
        if response.status != 206 or not goes_on:
            done = 0
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if length.isdecimal() else None
        # disable=None: no bar where stderr is not a terminal
        bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, disable=None)
        with part.open("ab" if done else "wb") as file, bar:
            while max(done, total or 0) <= max_bytes and (block := response.read1(1 << 16)):
                file.write(block)
                bar.update(len(block))
                done += len(block)
    if max(done, total or 0) > max_bytes:
        part.unlink()
        raise OSError(f"it is larger than {max_bytes} bytes")
    if done < (total or 0):
        raise OSError(f"cut off after {done} of {total} bytes")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, to https only."""

    def __init__(self, local: bool):
        self.local = local

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _require_https(newurl, self.local)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _require_https(url: str, local: bool) -> None:
    parts = urlsplit(url)
    if parts.scheme != "https" and not (local and parts.hostname == "127.0.0.1"):
        raise OSError(f"leads to {url}, which is not https")
