"""Subwords: ids are fairseq's, the vocabulary has the size asked for, text survives the round trip."""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from tenko.nmt.subwords import SPECIALS, UNK, Subwords, train_subwords
from tenko.nmt.text_io import EMBEDDED, read_pairs

PAIRS = [pair for pair, _ in zip(read_pairs({"tsv": EMBEDDED}), range(3000), strict=False)]
SENTENCES = [sentence for pair in PAIRS for sentence in pair]


def over(sentences: list[str]) -> Callable[[], Iterator[str]]:
    return lambda: iter(sentences)


@pytest.fixture(scope="module")
def subwords(tmp_path_factory: pytest.TempPathFactory) -> Subwords:
    return train_subwords(over(SENTENCES), tmp_path_factory.mktemp("spm") / "spm.model", vocab_size=1000)


def test_vocabulary_has_exactly_the_size_asked_for(subwords: Subwords) -> None:
    assert len(subwords) == len(set(subwords.pieces())) == 1000
    assert subwords.pieces()[:4] == list(SPECIALS)


def test_text_survives_the_round_trip(subwords: Subwords) -> None:
    for sentence in SENTENCES[:500]:
        ids = subwords.encode(sentence)
        assert 3 not in ids
        assert subwords.decode([0, *ids, 2, 1]) == sentence
        assert subwords.encode_pieces(sentence) == [subwords.pieces()[i] for i in ids]
    assert subwords.encode("") == []
    assert subwords.decode([]) == subwords.decode([0, 1, 2]) == ""


def test_frequent_characters_all_have_a_piece_and_stray_scripts_do_not(tmp_path: Path) -> None:
    hieroglyphs = [chr(0x13000 + i) for i in range(50)]
    sentences = [*SENTENCES, " ".join(hieroglyphs)]
    pieces = train_subwords(over(sentences), tmp_path / "spm.model", vocab_size=1000).pieces()
    assert set("„“–…%éťňďóŤ(") <= set(pieces)
    assert len(set(hieroglyphs) & set(pieces)) < 30


def test_batches_equal_single_sentences(subwords: Subwords) -> None:
    assert subwords.encode_batch(SENTENCES[:200], threads=2) == [subwords.encode(s) for s in SENTENCES[:200]]


def test_encode_normalises(subwords: Subwords) -> None:
    assert subwords.encode(" Otevr\u030ce\u00a0 soubor ") == subwords.encode("Otevře soubor")


def test_unknown_characters_are_unk(subwords: Subwords) -> None:
    assert 3 in subwords.encode("木")


def test_fairseq_reads_the_same_ids(subwords: Subwords, tmp_path: Path) -> None:
    from fairseq.data import Dictionary

    subwords.write_dictionary(tmp_path / "dict.txt")
    dictionary = Dictionary.load(str(tmp_path / "dict.txt"))
    assert len(dictionary) == len(subwords)
    assert (dictionary.bos(), dictionary.pad(), dictionary.eos(), dictionary.unk()) == (0, 1, 2, 3)
    assert dictionary.symbols == subwords.pieces()
    for sentence in SENTENCES[:50]:
        assert [dictionary.index(piece) for piece in subwords.encode_pieces(sentence)] == subwords.encode(sentence)


def test_special_symbols_in_the_text_are_not_learned(tmp_path: Path) -> None:
    chance = random.Random(0)
    words = ["<pad>", "<s>", "</s>", "<unk>", *("".join(chance.choices("abcdefgh", k=5)) for _ in range(100))]
    sentences = [" ".join(chance.choices(words, weights=[50] * 4 + [1] * 100, k=10)) for _ in range(500)]
    subwords = train_subwords(over(sentences), tmp_path / "spm.model", vocab_size=100)
    assert [piece for piece in subwords.pieces() if piece in SPECIALS] == list(SPECIALS)
    assert not {0, 1, 2} & set(subwords.encode("a <pad> b </s> c <s>"))


def test_training_is_deterministic(subwords: Subwords, tmp_path: Path) -> None:
    again = train_subwords(over(SENTENCES), tmp_path / "spm.model", vocab_size=1000)
    assert again.path.read_bytes() == subwords.path.read_bytes()


def test_too_large_a_vocabulary_names_the_largest(tmp_path: Path) -> None:
    few = over(SENTENCES[:40])
    with pytest.raises(ValueError, match=r"^data\.vocab_size: 5000 is too many .* largest possible is \d+$") as error:
        train_subwords(few, tmp_path / "spm.model", vocab_size=5000)
    largest = int(re.findall(r"\d+", str(error.value))[-1])
    assert len(train_subwords(few, tmp_path / "spm.model", vocab_size=largest)) == largest


def test_too_small_a_vocabulary_names_the_smallest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data\.vocab_size: 70 is too few .* at least \d+$") as error:
        train_subwords(over(SENTENCES), tmp_path / "spm.model", vocab_size=70)
    smallest = int(re.findall(r"\d+", str(error.value))[-1])
    assert len(train_subwords(over(SENTENCES), tmp_path / "spm.model", vocab_size=smallest)) == smallest


@pytest.mark.parametrize("every", [1, 3])
def test_a_character_that_sentencepiece_reserves_counts_as_a_space(
    subwords: Subwords, tmp_path: Path, every: int
) -> None:
    marked = [sentence + " ▅" * (i % every == 0) for i, sentence in enumerate(SENTENCES)]
    again = train_subwords(over([*marked, "▅", "▅ ▅"]), tmp_path / "spm.model", vocab_size=1000)
    assert again.pieces() == subwords.pieces()
    assert UNK in again.encode("▅")


def test_lines_beyond_sentencepieces_limit_are_learned_from_and_change_no_other_model(
    subwords: Subwords, tmp_path: Path
) -> None:
    word = "kvrzl"
    long = [f"{word} " * 1000, " ".join(SENTENCES[:200])]
    assert min(len(line.encode()) for line in long) > 4192
    pieces = train_subwords(over(long), tmp_path / "long.model", vocab_size=300).pieces()
    assert f"▁{word}" in pieces

    def limit(path: Path) -> int:
        return sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes()).trainer_spec.max_sentence_length

    assert limit(tmp_path / "long.model") > 4192
    assert limit(subwords.path) == 4192, "the file records it"


@pytest.mark.parametrize("sentences", [[], ["▅", "▅ ▅"]])
def test_no_text_is_said_to_be_none(tmp_path: Path, sentences: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^data\.train: has no text to train subwords on$"):
        train_subwords(over(sentences), tmp_path / "spm.model", vocab_size=300)


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "spm.model").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"spm\.model: not a sentencepiece model"):
        Subwords(tmp_path / "spm.model")
    with pytest.raises(ValueError, match="no such file"):
        Subwords(tmp_path / "missing.model")
