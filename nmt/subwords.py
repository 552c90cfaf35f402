"""Subwords: a joint sentencepiece BPE model whose ids are fairseq's, and the fairseq dictionary that says the same.

The special symbols stand where fairseq has them (<s> 0, <pad> 1, </s> 2, <unk> 3), so a piece has one id everywhere
and `dict.txt` is the list of pieces from 4 on. Text is taken as it is after `normalise` (no NFKC): "…" and "½" survive.
"""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from .clean import LONGEST_PIECE, normalise

BOS, PAD, EOS, UNK = 0, 1, 2, 3
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
MAX_SOURCE_TOKENS = 1000
"""Longer sentences are cut before they are translated: sinusoidal positions end at 1,024."""

# A character coverage below 1 keeps stray scripts out of the vocabulary. These stay however rare they are, and so do
# the most frequent characters of any kind, up to an eighth of the vocabulary.
_ALPHABET = frozenset("abcdefghijklmnopqrstuvwxyzáčďéěíňóřšťúůýžABCDEFGHIJKLMNOPQRSTUVWXYZÁČĎÉĚÍŇÓŘŠŤÚŮÝŽ0123456789")

TRAINING: dict[str, Any] = {
    "model_type": "bpe",
    "bos_id": BOS,
    "pad_id": PAD,
    "eos_id": EOS,
    "unk_id": UNK,
    "character_coverage": 0.9999,
    "max_sentencepiece_length": LONGEST_PIECE,
    "normalization_rule_name": "identity",
    "byte_fallback": False,
    "hard_vocab_limit": True,
    "num_threads": 1,
}
"""Options of sentencepiece's trainer; part of a corpus's content hash."""
_RESERVED = "\u2585"
"""▅, sentencepiece's own sign of an unknown character: it skips sentences that hold one, and takes none as required."""
_LONG, _LONGEST = 4192, 1 << 30
"""Bytes of the longest sentence that sentencepiece takes by itself, and of the longest that it can be told to take."""


class Subwords:
    """A trained model: text to ids of the fairseq dictionary and back.

    Raises: ValueError when the file is no sentencepiece model with fairseq's special symbols.
    """

    def __init__(self, spm_path: Path | str) -> None:
        self.path = Path(spm_path)
        if not self.path.is_file():
            raise ValueError(f"{self.path}: no such file; expected a sentencepiece model")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError):
            raise ValueError(f"{self.path}: not a sentencepiece model") from None
        if [self._model.id_to_piece(i) for i in range(min(4, len(self._model)))] != list(SPECIALS):
            raise ValueError(f"{self.path}: its first pieces must be {' '.join(SPECIALS)}")

    def __len__(self) -> int:
        """Entries of the vocabulary, the four special symbols included."""
        return len(self._model)

    def encode(self, text: str) -> list[int]:
        """Ids of a sentence, without end of sentence."""
        return self._model.encode(normalise(text))

    def encode_batch(self, normalised: list[str], threads: int = 1) -> list[list[int]]:
        """Ids of sentences that are normalised already, without end of sentence."""
        return self._model.encode(normalised, num_threads=threads)

    def encode_pieces(self, text: str) -> list[str]:
        """The subwords themselves, as fairseq's and CTranslate2's text interfaces take them."""
        return self._model.encode(normalise(text), out_type=str)

    def decode(self, ids: Iterable[int]) -> str:
        """Detokenized text; special symbols are left out, except that an unknown subword shows as ⁇."""
        skip = (BOS, PAD, EOS)
        return self._model.decode([int(i) for i in ids if int(i) not in skip]).strip()

    def pieces(self) -> list[str]:
        """Every entry of the vocabulary by id."""
        return [self._model.id_to_piece(i) for i in range(len(self._model))]

    def write_dictionary(self, path: Path) -> None:
        """Write the fairseq dictionary with the same ids: a line `piece count` for each but the four specials."""
        lines = (f"{piece} 1\n" for piece in self.pieces()[len(SPECIALS) :])
        path.write_text("".join(lines), encoding="utf-8")

    def hold_dictionary(self, path: Path) -> None:
        """Hold a fairseq dictionary to these pieces, as `write_dictionary` writes them; it is read without fairseq.

        Raises:
            ValueError: it is missing, malformed, or lists others, so that an id would mean two things; names the file.
        """
        symbols, pieces, name = list(SPECIALS), self.pieces(), self.path.name
        try:
            with path.open(encoding="utf-8") as file:
                for line in file:
                    symbol, count = line.rstrip().rsplit(" ", 1)
                    int(count)
                    symbols.append(symbol)
        except FileNotFoundError:
            raise ValueError(f"{path}: missing") from None
        except UnicodeDecodeError:
            raise ValueError(f"{path}: not a readable fairseq dictionary (no UTF-8)") from None
        except ValueError:
            at = len(symbols) - len(SPECIALS) + 1
            raise ValueError(f"{path}: not a readable fairseq dictionary (line {at} is no `subword count`)") from None
        if len(symbols) != len(pieces):
            raise ValueError(f"{path}: its {len(symbols)} entries are not the {len(pieces)} of {name}")
        for index, (symbol, piece) in enumerate(zip(symbols, pieces, strict=True)):
            if symbol != piece:
                raise ValueError(f"{path}: its entries are not those of {name}: {index} is {symbol!r}, not {piece!r}")


def train_subwords(sentences: Callable[[], Iterator[str]], path: Path, *, vocab_size: int) -> Subwords:
    """Train a BPE model of exactly `vocab_size` entries, special symbols included, and write it to `path`.

    Deterministic: the same sentences in the same order give the same bytes. `▅` counts as a space: no subword has it.

    Args: sentences: starts an iteration over normalised sentences; called twice, so that none needs to be kept.

    Raises: ValueError naming data.vocab_size when the text is too small for so many subwords, or has more characters;
    naming data.train when there is no text.
    """

    def usable() -> Iterator[str]:
        return (sentence.replace(_RESERVED, " ") for sentence in sentences())

    counts: Counter[str] = Counter()
    longest = 0
    for sentence in usable():
        counts.update(sentence)
        longest = max(longest, len(sentence.encode()))
    required = {character for character, _ in counts.most_common(vocab_size // 8)} | (_ALPHABET & counts.keys())
    # Only where it matters: the model's file records it, and those of other corpora are to stay what they are.
    length: dict[str, Any] = {"max_sentence_length": _LONGEST} if longest > _LONG else {}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=usable(),
            model_writer=model,
            vocab_size=vocab_size,
            required_chars="".join(sorted(required - {" ", "▁"})),
            **TRAINING,
            **length,
            minloglevel=2,
        )
    except RuntimeError as error:
        what = _explained(str(error), vocab_size)
        if what is None:
            raise
        raise ValueError(what) from None
    path.write_bytes(model.getvalue())
    return Subwords(path)


def _explained(message: str, vocab_size: int) -> str | None:
    """What sentencepiece's error says about the settings; None for an error of its own."""
    if found := re.search(r"too high.*?<= (\d+)", message):
        return f"data.vocab_size: {vocab_size} is too many for this corpus; the largest possible is {found[1]}"
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        fewest = int(found[1]) + 1
        return f"data.vocab_size: {vocab_size} is too few for the characters of this corpus; at least {fewest}"
    if re.search(r"!sentences_\.empty\(\)|\(all_chars_count\) > \(0\)", message):
        return "data.train: has no text to train subwords on"
    return None
