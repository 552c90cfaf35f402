"""Readers of parallel text: every packing reads the same, everything broken is named by file and line."""

import gzip
import lzma
import time
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from tenko.nmt import text_io
from tenko.nmt.text_io import read_lines, read_pairs, sha256, source_files

LINES = [f"Sentence number {i}, žluťoučký kůň ‚…‘." for i in range(20_000)]
TEXT = "".join(f"{line}\n" for line in LINES).encode()
PACK = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("ending", PACK)
def test_compressed_reads_as_plain(tmp_path: Path, ending: str) -> None:
    assert list(read_lines(write(tmp_path / f"a{ending}", PACK[ending](TEXT)))) == LINES
    assert list(read_lines(write(tmp_path / "a.txt", TEXT))) == LINES


@pytest.mark.parametrize("ending", PACK)
def test_files_of_several_frames_read_whole(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a{ending}", PACK[ending](TEXT) + PACK[ending](b"") + PACK[ending](TEXT))
    assert list(read_lines(path)) == LINES * 2


@pytest.mark.parametrize("ending", PACK)
def test_a_truncated_file_is_damaged(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a{ending}", PACK[ending](TEXT)[:-9])
    with pytest.raises(ValueError, match=rf"a{ending}: damaged {ending} file, cannot be read after line \d+") as error:
        list(read_lines(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", PACK)
def test_plain_text_with_the_wrong_ending_is_damaged(tmp_path: Path, ending: str) -> None:
    with pytest.raises(ValueError, match="damaged"):
        list(read_lines(write(tmp_path / f"a{ending}", b"Hello.\n")))


@pytest.mark.parametrize("ending", PACK)
def test_a_small_file_of_much_text_is_not_unpacked_as_a_whole(tmp_path: Path, ending: str) -> None:
    line = b"The file could not be opened. " * 400 + b"\n"
    path = write(tmp_path / f"a{ending}", PACK[ending](line * (1 << 13)))
    assert path.stat().st_size < len(line) << 5, "otherwise it proves nothing"
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_lines(path)) == 1 << 13
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(line) << 11, "a quarter of the text"


def test_the_time_of_a_long_line_grows_with_its_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_io, "BLOCK", 1 << 6)  # as 1 MiB to a line of 16 GiB
    path = write(tmp_path / "a.txt", b"a" * (1 << 20) + b"\nb\n" + b"c" * 1000)
    started = time.process_time()
    assert [len(line) for line in read_lines(path)] == [1 << 20, 1, 1000]
    assert time.process_time() - started < 0.5, "each block joined to all before it: 16 GB copied"


def test_unknown_ending_is_plain_text(tmp_path: Path) -> None:
    assert list(read_lines(write(tmp_path / "a.bz2", "Ahoj.\n"))) == ["Ahoj."]


def test_line_ends_and_empty_files(tmp_path: Path) -> None:
    assert list(read_lines(write(tmp_path / "a", "x\r\n\r\ny\u2028z"))) == ["x", "", "y\u2028z"]
    assert list(read_lines(write(tmp_path / "b", ""))) == []
    assert list(read_lines(write(tmp_path / "c.zst", b""))) == []


def test_invalid_utf8_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "latin2.tsv", b"ok\tok\n" * 7 + "kůň\tkůň\n".encode("iso-8859-2"))
    with pytest.raises(ValueError, match=r"latin2\.tsv: line 8: invalid UTF-8 \(byte 0xf9 at column 2\)"):
        list(read_lines(path))


def test_tsv_takes_the_first_two_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "one\tjedna\tmore\tand more\n\ntwo\tdvě\n")
    assert list(read_pairs(source_files(str(path), "data.train"))) == [("one", "jedna"), ("", ""), ("two", "dvě")]


def test_tsv_line_of_one_column_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "one\tjedna\ntwo\n")
    with pytest.raises(ValueError, match=r"a\.tsv: line 2: needs two tab-separated columns"):
        list(read_pairs({"tsv": path}))


@pytest.mark.parametrize(("en", "cs"), [(5, 7), (7, 5), (0, 3)])
def test_unequal_line_counts_name_both_files_and_counts(tmp_path: Path, en: int, cs: int) -> None:
    files = {"en": write(tmp_path / "a.en", "x\n" * en), "cs": write(tmp_path / "a.cs.gz", gzip.compress(b"y\n" * cs))}
    with pytest.raises(ValueError, match=rf"a\.en has {en} lines and .*a\.cs\.gz has {cs}:"):
        list(read_pairs(files))


def test_aligned_files_pair_line_by_line(tmp_path: Path) -> None:
    files = {"en": write(tmp_path / "a.en", "one\n\ttwo\n"), "cs": write(tmp_path / "a.cs", "jedna\ndvě")}
    assert list(read_pairs(files)) == [("one", "jedna"), ("\ttwo", "dvě")]


def test_missing_file_and_folder_name_the_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.valid: no such file: .*nothing\.tsv; give"):
        source_files(str(tmp_path / "nothing.tsv"), "data.valid")
    with pytest.raises(ValueError, match=r"data\.train: .* is a folder"):
        source_files({"en": str(tmp_path), "cs": str(tmp_path)}, "data.train")


def test_sha256_of_raw_bytes(tmp_path: Path) -> None:
    assert sha256(write(tmp_path / "a", "abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
