"""A run's tokenizer as Hugging Face's tokenizer.json: the same ids, and the same text back.

    to_tokenizers(tokenizer, kind).encode("Hello").ids

Needs the package `tokenizers`, which `transformers` brings along.
"""

import json
from typing import TYPE_CHECKING

from common.errors import UserError
from data.prompt_format import prompt_ids
from data.tokenizers.base import SPECIALS, Tokenizer
from data.tokenizers.byte import ByteTokenizer
from data.tokenizers.char import CharTokenizer
from data.tokenizers.foreign import SETTINGS, failing_as, missing, silent_panics
from data.tokenizers.huggingface import HuggingFaceTokenizer
from data.tokenizers.sentencepiece import ESCAPE, SPACE, SentencePieceTokenizer
from data.tokenizers.tiktoken import TiktokenTokenizer, ranks_of

if TYPE_CHECKING:
    import tokenizers
    from sentencepiece import SentencePieceProcessor

# pieces that stand for a byte or nothing: in a text they are the characters that they look like
LOOKALIKE = "<(?=(0x[0-9A-F]{2}|" + "|".join(name[1:-1] for name in SPECIALS) + ")>)"
END = "<|endoftext|>"  # of GPT-2, which its older files have in the vocabulary alone
PROBES = ("", " ", "a  b\n\n\tc \r\n", "caf\u00e9 \u4e2d\u6587 \U0001f600", f"{SPACE}{ESCAPE}b \0")
PROBES += ("<start>a<end><pad><unk>", "<0x41><0x0A>", "def f(x):\n        return x  # 10000 It's")


def to_tokenizers(
    tokenizer: Tokenizer, kind: str, start_token: bool = True
) -> "tokenizers.Tokenizer":
    """The same tokenizer in Hugging Face's form, which frames a prompt as data of `kind` has it.

    start_token: of the data; documents without it begin after the end of another.

    Raises UserError for a tokenizer that has no such form, or where `tokenizers` is missing.
    """
    try:
        import tokenizers
        from tokenizers import AddedToken
    except ModuleNotFoundError:
        raise missing("tokenizer.json", "tokenizers") from None
    if isinstance(tokenizer, CharTokenizer):
        made = of_characters(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        made = of_sentencepiece(tokenizer)
    elif isinstance(tokenizer, ByteTokenizer):
        names = {tokenizer.token(i): i for i in tokenizer.special_ids}
        made = of_bytes({bytes([i]): i for i in range(256)}, names)
    elif isinstance(tokenizer, TiktokenTokenizer):
        files = tokenizer.files()
        settings = json.loads(files[SETTINGS])
        ranks = ranks_of(files[tokenizer.file], tokenizer.file)
        made = of_bytes(ranks, settings["added"], settings["pattern"])
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        made = tokenizers.Tokenizer.from_str(tokenizer.files()[tokenizer.file].decode())
        made.no_truncation()
        made.no_padding()
    else:
        raise UserError(
            "tokenizer.json: cannot be made of a SentencePiece model that was not trained here; "
            "use a run with the tokenizer.json of the same tokenizer"
        )
    names = dict.fromkeys(special_tokens(tokenizer).values())
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    made.post_processor = framing(tokenizer, kind, start_token)
    made.encode_special_tokens = True  # a text that says <end> does not end; not kept in the file
    if not isinstance(tokenizer, HuggingFaceTokenizer):  # which it is already
        check(tokenizer, made)
    return made


def special_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """Which token begins a text, ends it, fills, and stands for unknown ones, as transformers
    calls these roles."""
    ids = {"bos_token": tokenizer.start_id, "eos_token": tokenizer.end_id}
    ids |= {"pad_token": tokenizer.pad_id}
    if tokenizer.unk_id is not None:
        ids["unk_token"] = tokenizer.unk_id
    return {role: tokenizer.token(i) for role, i in ids.items()}


def of_characters(tokenizer: CharTokenizer) -> "tokenizers.Tokenizer":
    """A token a character. One without a token for unknown characters refuses them, as ours."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocab = {tokenizer.token(i): i for i in range(tokenizer.vocab_size)}
    unknown = {} if tokenizer.unk_id is None else {"unk_token": tokenizer.token(tokenizer.unk_id)}
    made = Tokenizer(models.WordLevel(vocab, **unknown))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return made


def of_sentencepiece(tokenizer: SentencePieceTokenizer) -> "tokenizers.Tokenizer":
    """BPE by merges, in the order of the pieces' scores, or unigram by the scores themselves."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    trained = processor(tokenizer)
    pieces = [trained.id_to_piece(i) for i in range(len(trained))]
    scores = [trained.get_score(i) for i in range(len(trained))]
    if is_bpe(trained):
        vocab = {piece: i for i, piece in enumerate(pieces)}
        learned = [i for i in vocab.values() if i >= len(SPECIALS) and not trained.is_byte(i)]
        ranked = [pieces[i] for i in sorted(learned, key=lambda i: (-scores[i], i))]
        merges = merges_of(ranked, set(ranked))
        made = Tokenizer(models.BPE(vocab, merges, unk_token=SPECIALS[1], byte_fallback=True))
    else:
        scored = list(zip(pieces, scores, strict=True))
        made = Tokenizer(models.Unigram(scored, unk_id=tokenizer.unk_id, byte_fallback=True))
        # SentencePiece does not look for these in a text; Unigram does, so they are cut up
        made.pre_tokenizer = pre_tokenizers.Split(Regex(LOOKALIKE), "isolated")
    made.normalizer = normalizers.Sequence(  # as data.tokenizer.escape(), and then the spaces
        [
            normalizers.Replace(ESCAPE, f"{ESCAPE}e"),
            normalizers.Replace(SPACE, f"{ESCAPE}b"),
            normalizers.Replace(" ", SPACE),
        ]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(SPACE, " "),
            decoders.Replace(f"{ESCAPE}b", SPACE),
            decoders.Replace(f"{ESCAPE}e", ESCAPE),
        ]
    )
    return made


def processor(tokenizer: SentencePieceTokenizer) -> "SentencePieceProcessor":
    """SentencePiece's own object, which knows the pieces' scores and kinds."""
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_proto=tokenizer.files()["tokenizer.model"])


def is_bpe(trained: "SentencePieceProcessor") -> bool:
    """BPE's scores are ranks, whole numbers; those of unigram are log probabilities."""
    return all(trained.get_score(i).is_integer() for i in range(len(trained)))


def of_bytes(
    ranks: dict[bytes, int], added: dict[str, int], pattern: str = ""
) -> "tokenizers.Tokenizer":
    """Tokens of bytes, which are merged in the order of their ids, in words cut by `pattern`.

    added: special tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    letters = letters_of_bytes()
    names = {"".join(letters[byte] for byte in token): i for token, i in ranks.items()}
    merges = merges_of(sorted(names, key=names.__getitem__), set(names))
    # a word that is a token is that one, however it is merged, as in tiktoken
    made = Tokenizer(models.BPE({**names, **added}, merges, ignore_merges=bool(pattern)))
    cut: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    ]
    if pattern:
        # what is written {1,3}+ there, of which nothing is given back, is repeated here
        words = pattern.replace("}+", "}")
        cut.insert(0, pre_tokenizers.Split(Regex(words), "isolated"))
    made.pre_tokenizer = pre_tokenizers.Sequence(cut)
    made.decoder = decoders.ByteLevel()
    return made


def letters_of_bytes() -> list[str]:
    """The letter that stands for each byte, as in GPT-2: itself where it is printed, else U+0100
    and up."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printed else next(others)) for byte in range(256)]


def merges_of(ranked: list[str], known: set[str]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, for the pieces in the order of their scores.

    SentencePiece merges whichever neighbours make the best piece, so each way to cut one counts.
    """
    cuts = ((piece[:n], piece[n:]) for piece in ranked for n in range(1, len(piece)))
    return [(left, right) for left, right in cuts if left in known and right in known]


def framing(
    tokenizer: Tokenizer, kind: str, start_token: bool
) -> "tokenizers.processors.PostProcessor":
    """What puts tokens around a prompt as `data.prompt_format.prompt_ids` has them."""
    from tokenizers import processors

    around = [] if kind == "stream" else prompt_ids(kind, tokenizer, "", start_token)
    named = [(tokenizer.token(i), i) for i in around]
    tokens = [name for name, _ in named]
    return processors.TemplateProcessing(
        single=["$A", *tokens] if kind == "pairs" else [*tokens, "$A"], special_tokens=named
    )


def check(tokenizer: Tokenizer, made: "tokenizers.Tokenizer"):
    """Raises UserError where the two do not read a text alike, and write it alike."""
    # of ways to cut a text that are as probable, each takes the one that its rounding prefers
    exact = type(made.model).__name__ != "Unigram"
    for probe in PROBES:
        try:
            ids = tokenizer.encode(probe)
        except UserError:  # characters that it refuses
            continue
        found = made.encode(probe, add_special_tokens=False).ids
        same = found == ids or not exact
        if not same or made.decode(found) != tokenizer.decode(ids):
            raise UserError(
                f"tokenizer.json: has the ids {found} for {probe!r}, where the run's tokenizer has "
                f"{ids}; use a run with another tokenizer"
            )


def of_gpt2_files(vocab: bytes, merges: bytes, where: str) -> HuggingFaceTokenizer:
    """The tokenizer of GPT-2's older files: vocab.json and merges.txt.

    Raises UserError, which begins with `where`, for others.
    """
    try:
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    except ModuleNotFoundError:
        raise missing(where, "tokenizers") from None
    with silent_panics(), failing_as(where, "not the vocabulary of a GPT-2", "download it again"):
        lines = [tuple(line.split(" ")) for line in merges.decode().splitlines()]
        pairs = [line for line in lines if len(line) == 2 and line[0] != "#version:"]
        made = Tokenizer(models.BPE(json.loads(vocab), pairs))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        made.add_special_tokens([AddedToken(END, special=True, normalized=False)])
        content = made.to_str().encode()
    return HuggingFaceTokenizer(content, where=where)


def tokenizer_files(
    tokenizer: Tokenizer, kind: str, max_len: int, start_token: bool = True
) -> dict[str, bytes]:
    """tokenizer.json and tokenizer_config.json, which transformers reads. Raises UserError."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_len,
        "clean_up_tokenization_spaces": False,  # text as it was written
        "split_special_tokens": True,  # a text that says <end> does not end
        "padding_side": "left",  # prompts end where the model goes on
        "model_input_names": ["input_ids", "attention_mask"],
        **special_tokens(tokenizer),
    }
    made = to_tokenizers(tokenizer, kind, start_token)
    return {
        "tokenizer.json": made.to_str(pretty=True).encode(),
        "tokenizer_config.json": f"{json.dumps(settings, indent=2)}\n".encode(),
    }
