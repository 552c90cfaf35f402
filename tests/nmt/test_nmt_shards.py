"""Memory-mapped token files give back what was written, by streaming and by page."""

from pathlib import Path

import numpy as np
import pytest

from tenko.nmt.shards import PairShards, ShardWriter, token_dtype

SENTENCES = [[5, 6, 7], [], [65_535], list(range(4, 400))]


def write(folder: Path, sentences: dict[str, list[list[int]]], dtype: np.dtype) -> dict[str, int]:
    tokens = {}
    for lang, items in sentences.items():
        with ShardWriter(folder, "train", lang, dtype) as writer:
            writer.append(items[:1])
            writer.append([])
            writer.append(items[1:])
        assert writer.sentences == len(items)
        tokens[lang] = writer.tokens
    return tokens


def test_dtype_is_two_bytes_while_the_vocabulary_fits() -> None:
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


@pytest.mark.parametrize("vocab_size", [65_536, 100_000])
def test_round_trip(tmp_path: Path, vocab_size: int) -> None:
    dtype = token_dtype(vocab_size)
    tokens = write(tmp_path, {"en": SENTENCES, "cs": SENTENCES[::-1]}, dtype)
    shards = PairShards(tmp_path, "train", len(SENTENCES), tokens, dtype)
    assert len(shards) == 4
    for index, ids in enumerate(SENTENCES):
        assert shards.tokens("en", index).tolist() == [*ids, 2]
        assert shards.tokens("cs", 3 - index).tolist() == [*ids, 2]
    assert shards.tokens("en", 0).dtype == np.int64
    assert shards.sizes("en").tolist() == [len(ids) + 1 for ids in SENTENCES]
    assert isinstance(shards.sizes("en"), np.memmap)
    assert (tmp_path / "train.en.bin").stat().st_size == tokens["en"] * dtype.itemsize


def test_offsets_go_on_across_writes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train", "en", token_dtype(100)) as writer:
        for start in range(0, 60, 7):
            writer.append([[4 + i] * i for i in range(start, min(60, start + 7))])
    offsets = np.fromfile(tmp_path / "train.en.idx", "<i8")
    assert offsets.tolist() == np.cumsum([0, *(i + 1 for i in range(60))]).tolist()


def test_index_beyond_the_end_is_an_error(tmp_path: Path) -> None:
    tokens = write(tmp_path, {"en": SENTENCES, "cs": SENTENCES}, token_dtype(70_000))
    shards = PairShards(tmp_path, "train", 4, tokens, token_dtype(70_000))
    for index in (-1, 4):
        with pytest.raises(IndexError):
            shards.tokens("en", index)


def test_an_empty_split_opens(tmp_path: Path) -> None:
    for lang in ("en", "cs"):
        ShardWriter(tmp_path, "valid", lang, token_dtype(100)).__exit__(None, None, None)
    shards = PairShards(tmp_path, "valid", 0, {"en": 0, "cs": 0}, token_dtype(100))
    assert len(shards) == 0
    assert len(shards.sizes("cs")) == 0
