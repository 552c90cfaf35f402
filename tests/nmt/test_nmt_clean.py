"""What a pair is dropped for, and which sentences count as the same."""

import random
import unicodedata

import pytest

from tenko.nmt.clean import REASONS, hash64, normalise, reason_to_drop, sentence_key


@pytest.mark.parametrize(
    ("en", "cs", "reason"),
    [
        ("Open the file.", "Otevřete soubor.", None),
        ("Yes", "Ano", None),
        ("", "Otevřete soubor.", "empty"),
        ("Open the file.", "", "empty"),
        ("Open the file.", "Open the file.", "untranslated"),
        ("LibreOffice Writer", "libreoffice writer", "untranslated"),
        ("12:30", "12.30", "no words"),
        ("Note:", "***", "no words"),
        ("Open the file.", "Откройте файл, пожалуйста.", "wrong script"),
        ("打开文件", "Otevřít", "wrong script"),
        ("The letter α", "Písmeno α", None),
        ("No", "Nikdy se to nestalo", "ratio"),
        ("word " * 500, "slovo " * 500, "length"),
    ],
)
def test_reasons(en: str, cs: str, reason: str | None) -> None:
    assert reason_to_drop(en, cs, max_ratio=3.0, max_tokens=128) == reason
    assert reason is None or reason in REASONS


def test_ratio_is_inclusive_and_works_both_ways() -> None:
    for pair in (("abc", "abcdefgha"), ("abcdefgha", "abc")):
        assert reason_to_drop(*pair, max_ratio=3.0, max_tokens=128) is None
        assert reason_to_drop(*pair, max_ratio=2.9, max_tokens=128) == "ratio"


def test_normal_form_is_nfc_with_single_spaces_and_nothing_invisible() -> None:
    decomposed = unicodedata.normalize("NFD", "Příliš žluťoučký")
    assert normalise(f"\ufeff  {decomposed}\u00a0\t kůň\u200b\u00ad\x00 ") == "Příliš žluťoučký kůň"
    assert normalise("½ … „ano“") == "½ … „ano“"
    assert normalise(" \u200b ") == ""


def test_what_something_invisible_kept_apart_is_composed() -> None:
    assert normalise("cafe\u200b\u0301") == "café"
    assert (
        normalise("e\u00ad\u030c\u200d\u0323")
        == normalise("e\u0323\u030c")
        == unicodedata.normalize("NFC", "e\u0323\u030c")
    )


def test_the_normal_form_of_a_normal_form_is_itself() -> None:
    chance = random.Random(1)
    pieces = "ae ñ\u0301\u030c\u0323\u200b\u00ad\u2060\x00\x85\u2000\u212b\u1100\u1161\u11a8\ufeff"
    for _ in range(5000):
        text = "".join(chance.choices(pieces, k=6))
        once = normalise(text)
        assert normalise(once) == once == unicodedata.normalize("NFC", once), ascii(text)


@pytest.mark.parametrize("separator", ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x1f", "\x85", "\u2028"])
def test_everything_that_could_end_a_line_becomes_a_space(separator: str) -> None:
    assert normalise(f"a{separator}b") == "a b"


def test_key_ignores_case_punctuation_digits_and_spacing() -> None:
    assert sentence_key("Page 12: Žlutý_kůň!") == sentence_key("page – žlutý  KŮŇ 3") == "page žlutý kůň"
    assert sentence_key("Page one") != sentence_key("Page two")
    assert sentence_key("12.5 %") == ""


def test_hash_is_the_same_on_every_machine() -> None:
    assert hash64("") == 0xB4B2797457A0A6E4
    assert hash64("kůň") == 0x61F4985BBC56C10C
