"""Which tokens of somebody else's tokenizer start, end and pad a text, and which is unknown.

By flag, by what the files beside it say, or by the names that are used for them. Standard library
only.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from common.errors import UserError

Roles = Mapping[str, str | None]  # "start", "end", "pad", "unk": a token, None where there is none

FLAGS = {  # role: the setting that names it
    "start": "data.bos_token",
    "end": "data.end_token",
    "pad": "data.pad_token",
    "unk": "data.unk_token",
}
NAMES = {  # role: names of tokens that have it, the likeliest first
    "start": (
        "<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<|bos|>", "<BOS_TOKEN>", "[BOS]",
        "<｜begin▁of▁sentence｜>", "[CLS]", "<start>",
    ),
    "end": (
        "<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "<EOS_TOKEN>", "[EOS]",
        "<｜end▁of▁sentence｜>", "[SEP]", "<end>",
    ),
    "pad": (
        "<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>", "<PAD>",
        "<｜▁pad▁｜>",
    ),
}  # fmt: skip
BESIDE = ("special_tokens_map.json", "tokenizer_config.json")  # of transformers; the last counts
KEYS = {  # what these call the roles, the likeliest last
    "start": ("cls_token", "bos_token"),
    "end": ("sep_token", "eos_token"),
    "pad": ("pad_token",),
}
MAX_BYTES = 1 << 24  # of a file beside
SHOWN = 8  # tokens that an error lists


def choose(
    given: Roles,
    hints: Roles,
    listed: Collection[str],
    id_of: Callable[[str], int | None],
    where: str,
) -> dict[str, str | None]:
    """The token of each role. Raises UserError, which begins with `where`, if none ends a text.

    given: what is to be taken, and must be there; hints: what is taken if it is there; listed: the
    tokenizer's special tokens; id_of: the id of any token, None for what is none.
    """
    shown = ", ".join(sorted(map(repr, listed))[:SHOWN]) or "none"
    roles: dict[str, str | None] = {}
    for role, flag in FLAGS.items():
        hint = hints.get(role)
        if role in given:
            roles[role] = given[role]
            if roles[role] is not None and id_of(roles[role] or "") is None:
                raise UserError(
                    f"{where}: {flag} = {roles[role]!r} is not in its vocabulary; give one that is "
                    f"(special tokens there: {shown})"
                )
        elif hint is not None and id_of(hint) is not None:
            roles[role] = hint
        else:
            roles[role] = next((name for name in NAMES.get(role, ()) if name in listed), None)
    if roles["end"] is None:
        raise UserError(
            f"{where}: no token in it is known to end a text; set data.end_token to one (special "
            f"tokens there: {shown})"
        )
    # where one is missing, the end stands for it, as in char_bos; unknown characters it is not
    roles["start"] = roles["start"] or roles["end"]
    roles["pad"] = roles["pad"] or roles["end"]
    if roles["unk"] in (roles["start"], roles["end"]):
        roles["unk"] = None
    return roles


def hints_beside(path: Path) -> dict[str, str]:
    """What the files of transformers beside a tokenizer call its special tokens. Never raises."""
    hints = {}
    for name in BESIDE:
        file = path.with_name(name)
        try:
            if file.stat().st_size > MAX_BYTES:
                continue
            stored = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        for role, keys in KEYS.items():
            for key in keys:
                token = stored.get(key) if isinstance(stored, dict) else None
                token = token.get("content") if isinstance(token, dict) else token
                if isinstance(token, str):
                    hints[role] = token
    return hints
