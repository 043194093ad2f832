"""Tokenizers as others train them, of each kind, by their own libraries: small, and real."""

import base64
import io

import sentencepiece

from tests.helpers import TEXT

CORPUS = TEXT.read_text(encoding="utf-8")


def hugging_face(model: str, special: list[str], **parts) -> bytes:
    """A tokenizer.json trained on CORPUS."""
    import tokenizers
    from tokenizers import models, trainers

    unknown = {"unk_token": next((s for s in special if "unk" in s.lower()), None)}
    made = tokenizers.Tokenizer(getattr(models, model)(**({} if model == "Unigram" else unknown)))
    for name, part in parts.items():
        setattr(made, name, part)
    more = {"vocab_size": 500, "special_tokens": special, "show_progress": False}
    more |= unknown if model == "Unigram" else {}
    if model == "BPE":
        more["initial_alphabet"] = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = getattr(trainers, f"{'Bpe' if model == 'BPE' else model}Trainer")
    made.train_from_iterator([CORPUS], trainer(**more))
    return made.to_str().encode()


def sentencepiece_model(**more) -> bytes:
    """A model as SentencePiece trains it by default: NFKC, a space before each text."""
    model = io.BytesIO()
    settings = {"vocab_size": 220, "hard_vocab_limit": False, "minloglevel": 2} | more
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS.split("\n")), model_writer=model, **settings
    )
    return model.getvalue()


def tiktoken_file() -> bytes:
    """All bytes, and a few merges of them."""
    merges = [b"th", b"the", b" the", b"in", b"ing", b"\n\n", b"  ", b"\xf0\x9f", b"\xf0\x9f\x98"]
    ranks = enumerate([bytes([i]) for i in range(256)] + merges)
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in ranks)


def all_kinds() -> dict[str, bytes]:
    """The file of each kind. Raises ImportError without tokenizers."""
    from tokenizers import decoders, normalizers, pre_tokenizers, processors

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bert = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return {
        "byte_bpe": hugging_face(
            "BPE", ["<|endoftext|>"], pre_tokenizer=byte_level, decoder=decoders.ByteLevel()
        ),
        "wordpiece": hugging_face(
            "WordPiece", ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
            normalizer=normalizers.BertNormalizer(), decoder=decoders.WordPiece(),
            pre_tokenizer=pre_tokenizers.BertPreTokenizer(), post_processor=bert,
        ),
        "unigram": hugging_face(
            "Unigram", ["<unk>", "<s>", "</s>", "<pad>"], normalizer=normalizers.NFKC(),
            pre_tokenizer=pre_tokenizers.Metaspace(), decoder=decoders.Metaspace(),
        ),
        "words": hugging_face(
            "WordLevel", ["[UNK]", "[SEP]"], pre_tokenizer=pre_tokenizers.WhitespaceSplit()
        ),
        "sentencepiece": sentencepiece_model(user_defined_symbols=["<|endoftext|>"]),
        "tiktoken": tiktoken_file(),
    }  # fmt: skip
