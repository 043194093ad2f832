"""Any SentencePiece model; those that are trained here, exact, are in sentencepiece.py."""

from data.tokenizers.foreign import ForeignTokenizer, failing_as
from data.tokenizers.special_tokens import Roles, choose


class ForeignSentencePieceTokenizer(ForeignTokenizer):
    """Any SentencePiece model: it normalises, prefixes and names as it has been trained to.

    content: of the file; special, hints: as for HuggingFaceTokenizer. Raises UserError that begins
    with `where`.
    """

    kind, name, file = "foreign_sentencepiece", "SentencePiece", "tokenizer.model"

    def __init__(
        self,
        content: bytes,
        special: Roles | None = None,
        hints: Roles | None = None,
        where: str = "tokenizer.model",
    ):
        import sentencepiece

        self._content, self._where = content, where
        made = self._processor = sentencepiece.SentencePieceProcessor()
        with failing_as(where, "not a SentencePiece model", "restore the file from a copy"):
            made.LoadFromSerializedProto(content)
            self.vocab_size = made.get_piece_size()
            made.decode(list(range(self.vocab_size)))  # each piece is text
            controls = {i for i in range(self.vocab_size) if made.is_control(i)}
            own = {"start": made.bos_id(), "end": made.eos_id(), "pad": made.pad_id()}
            own["unk"] = made.unk_id()
            hints = {
                **(hints or {}),
                **{role: made.id_to_piece(i) for role, i in own.items() if i >= 0},
            }
            # those that a text can spell score 0, as bytes do; the first merge of BPE scores -0
            known = [
                made.id_to_piece(i)
                for i in range(self.vocab_size)
                if str(made.get_score(i)) == "0.0" and not made.is_byte(i)
            ]
        roles = choose(special or {}, hints, known, self._id_of, where)
        self._set_special(roles, controls, self._id_of, self._spelled)

    def _id_of(self, token: str) -> int | None:
        i = self._processor.piece_to_id(token)
        return None if i < 0 or self._processor.id_to_piece(i) != token else i

    def _spelled(self, token: str) -> tuple[list[int], list[int]]:
        characters = []
        for character in token:
            known = self._id_of(character)
            if known is None:
                own = (self._id_of(f"<0x{byte:02X}>") for byte in character.encode())
                characters += [self._processor.unk_id() if i is None else i for i in own]
            else:
                characters.append(known)
        return self._processor.encode(token), characters

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self._processor.encode(texts, num_threads=1)

    def _decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def token(self, i: int) -> str:
        """One piece as SentencePiece writes it: U+2581 for a space, <0x0A> for a byte."""
        return self._processor.id_to_piece(i)
