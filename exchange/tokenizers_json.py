"""A run's tokenizer as Hugging Face's tokenizer.json: the same ids, and the same text back.

    to_tokenizers(tokenizer, kind).encode("Hello").ids

Needs the package `tokenizers`, which `transformers` brings along.
"""

import json
from typing import TYPE_CHECKING

from common.errors import UserError
from data.prompt_format import prompt_ids
from data.tokenizer import ESCAPE, SPACE, SPECIALS, CharTokenizer, SentencePieceTokenizer, Tokenizer

if TYPE_CHECKING:
    import tokenizers
    from sentencepiece import SentencePieceProcessor

# pieces that stand for a byte or nothing: in a text they are the characters that they look like
LOOKALIKE = "<(?=(0x[0-9A-F]{2}|" + "|".join(name[1:-1] for name in SPECIALS) + ")>)"
PROBES = ("", " ", "a  b\n\n\tc \r\n", "caf\u00e9 \u4e2d\u6587 \U0001f600", f"{SPACE}{ESCAPE}b \0")
PROBES += ("<start>a<end><pad><unk>", "<0x41><0x0A>", "def f(x):\n        return x  # 100")


def to_tokenizers(tokenizer: Tokenizer, kind: str) -> "tokenizers.Tokenizer":
    """The same tokenizer in Hugging Face's form, which frames a prompt as data of `kind` has it.

    Raises UserError for a tokenizer that has no such form, or where `tokenizers` is missing.
    """
    try:
        from tokenizers import AddedToken
    except ModuleNotFoundError:
        raise UserError(
            "--format: needs the package tokenizers; install it with pip install tokenizers"
        ) from None
    if isinstance(tokenizer, CharTokenizer):
        made = of_characters(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        made = of_sentencepiece(tokenizer)
    else:
        raise UserError(
            f"tokenizer.json: a tokenizer of kind {tokenizer.kind!r} has no such form; use a run "
            "with another tokenizer"
        )
    names = dict.fromkeys(special_tokens(tokenizer).values())
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    made.post_processor = framing(tokenizer, kind)
    made.encode_special_tokens = True  # a text that says <end> does not end; not kept in the file
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


def merges_of(ranked: list[str], known: set[str]) -> list[tuple[str, str]]:
    """All pairs of pieces that make a piece, for the pieces in the order of their scores.

    SentencePiece merges whichever neighbours make the best piece, so each way to cut one counts.
    """
    cuts = ((piece[:n], piece[n:]) for piece in ranked for n in range(1, len(piece)))
    return [(left, right) for left, right in cuts if left in known and right in known]


def framing(tokenizer: Tokenizer, kind: str) -> "tokenizers.processors.PostProcessor":
    """What puts the token that starts where `data.prompt_format.prompt_ids` has it."""
    from tokenizers import processors

    start = tokenizer.token(tokenizer.start_id)
    around = prompt_ids(kind, tokenizer, "") if kind != "stream" else []
    before = kind != "pairs" and tokenizer.start_id in around
    single = [*([start] if before else []), "$A", *([start] if kind == "pairs" else [])]
    return processors.TemplateProcessing(
        single=single, special_tokens=[(start, tokenizer.start_id)] if len(single) > 1 else []
    )


def check(tokenizer: Tokenizer, made: "tokenizers.Tokenizer"):
    """Raises UserError where the two do not write the same text for the same ids."""
    for probe in PROBES:
        try:
            ids = tokenizer.encode(probe)
        except UserError:  # characters that it refuses
            continue
        found = made.encode(probe, add_special_tokens=False).ids
        if made.decode(found) != tokenizer.decode(ids):
            raise UserError(
                f"tokenizer.json: writes {made.decode(found)!r} where the run's tokenizer writes "
                f"{tokenizer.decode(ids)!r}; use a run with another tokenizer"
            )


def tokenizer_files(tokenizer: Tokenizer, kind: str, max_len: int) -> dict[str, bytes]:
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
    made = to_tokenizers(tokenizer, kind)
    return {
        "tokenizer.json": made.to_str(pretty=True).encode(),
        "tokenizer_config.json": f"{json.dumps(settings, indent=2)}\n".encode(),
    }
