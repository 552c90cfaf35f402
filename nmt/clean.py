"""What a sentence pair is worth: normal form, the key that says "the same sentence", and the reasons to drop a pair.

The key ignores case, punctuation, digits and spacing, so that "Page 1." and "page 2" fall into the same split.
"""

from __future__ import annotations

import re
import unicodedata
from hashlib import blake2b

REASONS = (
    "empty",
    "untranslated",
    "no words",
    "wrong script",
    "ratio",
    "length",
    "duplicates",
    "in valid or test",
)
"""Every reason a pair is dropped for, in the order they are looked for."""

LONGEST_PIECE = 16
"""Characters of the longest subword: a side of more than this times the token limit is too long for certain."""

# Controls, soft hyphen, zero-width and direction marks: invisible, and some of them end a line of a dictionary file.
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]")
_NOT_LETTERS = re.compile(r"[\W\d_]+")
_NOT_LATIN = re.compile("[^A-Za-zªºÀ-ÖØ-öø-ɏʰ-˿Ḁ-ỿﬀ-ﬆ]+")


def normalise(text: str) -> str:
    """Unicode NFC, no invisible characters, every run of white space one space, none at the ends."""
    text = _INVISIBLE.sub("", text)
    if not text.isascii():  # only now: what is composed may have stood apart by something invisible
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.split())


def sentence_key(text: str) -> str:
    """The letters of a normalised text, casefolded, with one space for everything between them; may be empty."""
    return _NOT_LETTERS.sub(" ", text.casefold()).strip()


def hash64(text: str) -> int:
    """The first 64 bits of BLAKE2b: equal for equal texts on every machine.

    Where two texts do collide (about one chance in 1000 for 200 million), a pair is dropped needlessly, no more.
    """
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def _mostly_latin(letters: int, text: str) -> bool:
    return text.isascii() or 2 * len(_NOT_LATIN.sub("", text)) >= letters


def reason_to_drop(en: str, cs: str, *, max_ratio: float, max_tokens: int) -> str | None:
    """Why a normalised pair is no training material, one of `REASONS`, or None to keep it.

    Args: max_ratio: allowed factor between the lengths in characters; max_tokens: allowed subwords a side (only what
    cannot fit whatever the subwords are is found here).
    """
    if not en or not cs:
        return "empty"
    if en == cs or en.casefold() == cs.casefold():
        return "untranslated"
    letters_en, letters_cs = len(_NOT_LETTERS.sub("", en)), len(_NOT_LETTERS.sub("", cs))
    if not letters_en or not letters_cs:
        return "no words"
    if not _mostly_latin(letters_en, en) or not _mostly_latin(letters_cs, cs):
        return "wrong script"
    short, long = sorted((len(en), len(cs)))
    if long > max_ratio * short:
        return "ratio"
    if long > LONGEST_PIECE * max_tokens:
        return "length"
    return None
