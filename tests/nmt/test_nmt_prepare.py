"""Preparing a corpus from real files: splits that do not leak, reuse by content, and nothing half-written."""

import errno
import json
import lzma
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from tenko.nmt import prepare as prepare_module
from tenko.nmt.clean import normalise, sentence_key
from tenko.nmt.config import DataConfig
from tenko.nmt.corpus import Corpus, DamagedCorpus
from tenko.nmt.prepare import prepare
from tenko.nmt.subwords import Subwords
from tenko.nmt.text_io import EMBEDDED, read_pairs

PAIRS = [pair for pair, _ in zip(read_pairs({"tsv": EMBEDDED}), range(2000), strict=False)]
DIRTY = [
    ("", "Nic."),
    ("Same text.", "same text."),
    ("17", "18"),
    ("Open the file.", "Откройте файл."),
    ("No", "Nikdy se to nestalo ani jednou."),
    PAIRS[5],
    ("  " + PAIRS[6][0] + " ", PAIRS[6][1].replace(" ", "\u00a0")),
    (PAIRS[7][0].upper() + " 42", "Docela jiný překlad téže věty, jak se stává."),
]


def quiet(line: str) -> None:
    assert "\n" not in line


def write(path: Path, pairs: list[tuple[str, str]]) -> str:
    path.write_text("".join(f"{en}\t{cs}\textra\n" for en, cs in pairs), encoding="utf-8")
    return str(path)


def config(folder: Path, train: str, **settings: object) -> DataConfig:
    defaults = {"vocab_size": 500, "valid_size": 50, "test_size": 80, "cache": str(folder / "cache")}
    return DataConfig(train=train, **(defaults | settings))  # type: ignore[arg-type]


@pytest.fixture
def corpus_file(tmp_path: Path) -> str:
    return write(tmp_path / "corpus.tsv", PAIRS + DIRTY)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return prepare(DataConfig(cache=str(tmp_path_factory.mktemp("cache"))), report=quiet)


def texts(corpus: Corpus, split: str) -> list[tuple[str, str]]:
    """Decoded from the shards, so that it says what a model would see."""
    subwords, shards = Subwords(corpus.spm_path), corpus.split(split)
    en, cs = ([subwords.decode(shards.tokens(lang, i)) for i in range(len(shards))] for lang in ("en", "cs"))
    return list(zip(en, cs, strict=True))


def assert_nothing_leaks(corpus: Corpus) -> None:
    train = texts(corpus, "train")
    for side in (0, 1):
        held_out = [sentence_key(text) for split in ("valid", "test") for text in corpus.text(split)[side]]
        assert not set(held_out) & {sentence_key(pair[side]) for pair in train}
    valid, test = ({sentence_key(text) for text in corpus.text(split)[0]} for split in ("valid", "test"))
    assert not valid & test
    assert len(test) == len(corpus.text("test")[0])


def files_of(corpus: Corpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.path.iterdir() if path.name != "manifest.json"}


def left_over(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if not path.name.endswith(".lock")]


def test_embedded_corpus_is_split_without_leaks(embedded: Corpus) -> None:
    sizes = {split: len(embedded.split(split)) for split in ("train", "valid", "test")}
    assert (sizes["valid"], sizes["test"]) == (500, 1000)
    assert sum(sizes.values()) + sum(embedded.manifest["dropped"]["train"].values()) == embedded.manifest["read"]
    assert sizes["train"] > 33_000
    assert_nothing_leaks(embedded)


def test_shards_hold_the_text(embedded: Corpus) -> None:
    original = {(normalise(en), normalise(cs)) for en, cs in read_pairs({"tsv": EMBEDDED})}
    unknown = [pair for pair in texts(embedded, "train") if "⁇" not in "".join(pair) and pair not in original]
    assert unknown == []
    for split in ("valid", "test"):
        en, cs = embedded.text(split)
        assert set(zip(en, cs, strict=True)) <= original
        seen = [
            pair for pair in zip(texts(embedded, split), zip(en, cs, strict=True), strict=True) if pair[0] != pair[1]
        ]
        assert all("⁇" in "".join(decoded) for decoded, _ in seen)  # a character that train does not have
        assert len(seen) <= len(en) // 200
    assert embedded.vocab_size == 4000 == len(embedded.dict_path.read_text(encoding="utf-8").splitlines()) + 4


def test_counts_by_reason(corpus_file: str, tmp_path: Path) -> None:
    corpus = prepare(config(tmp_path, corpus_file), report=quiet)
    dropped = corpus.manifest["dropped"]["train"]
    reasons = {key: dropped[key] for key in dropped if key != "in valid or test"}
    assert reasons == {"empty": 1, "untranslated": 1, "no words": 1, "wrong script": 1, "ratio": 1, "duplicates": 2}
    assert corpus.manifest["read"] == len(PAIRS + DIRTY)
    assert sum(len(corpus.split(s)) for s in ("train", "valid", "test")) + sum(dropped.values()) == len(PAIRS + DIRTY)
    assert_nothing_leaks(corpus)


def test_sentences_of_one_key_go_to_one_split(tmp_path: Path) -> None:
    variants = [(f"{en.upper()} {i}!", f"{cs} {i}") for i, (en, cs) in enumerate(PAIRS)]
    corpus = prepare(config(tmp_path, write(tmp_path / "c.tsv", PAIRS + variants)), report=quiet)
    assert (len(corpus.split("valid")), len(corpus.split("test"))) == (50, 80)
    assert corpus.manifest["dropped"]["train"]["in valid or test"] >= 130
    assert_nothing_leaks(corpus)


def test_held_out_set_does_not_depend_on_order(tmp_path: Path) -> None:
    shuffled = random.Random(1).sample(PAIRS, len(PAIRS))
    corpora = [
        prepare(config(tmp_path, write(tmp_path / name, pairs)), report=quiet)
        for name, pairs in (("a.tsv", PAIRS), ("b.tsv", shuffled))
    ]
    assert sorted(corpora[0].text("test")[0]) == sorted(corpora[1].text("test")[0])


def test_given_valid_and_test_are_kept_whole_and_out_of_train(tmp_path: Path) -> None:
    test = [*PAIRS[:40], ("Same", "Same"), ("17", "18"), ("", ""), (PAIRS[0][0], PAIRS[0][1]), ("x " * 300, "y")]
    files = {lang: str(tmp_path / f"valid.{lang}") for lang in ("en", "cs")}
    for side, lang in enumerate(("en", "cs")):
        Path(files[lang]).write_text("".join(f"{pair[side]}\n" for pair in PAIRS[40:60]), encoding="utf-8")
    settings = {"test": write(tmp_path / "test.tsv", test), "valid": files}
    corpus = prepare(config(tmp_path, write(tmp_path / "c.tsv", PAIRS), **settings), report=quiet)
    expected = [(normalise(en), normalise(cs)) for en, cs in test if en]
    assert list(zip(*corpus.text("test"), strict=True)) == expected
    assert len(corpus.split("test")) == len(expected)
    assert list(zip(*corpus.text("valid"), strict=True)) == PAIRS[40:60]
    assert corpus.manifest["dropped"]["test"] == {"empty": 1}
    assert corpus.manifest["dropped"]["train"]["in valid or test"] >= 60
    train = texts(corpus, "train")
    for side in (0, 1):
        assert not {sentence_key(p[side]) for p in train} & {sentence_key(p[side]) for p in PAIRS[:60]}


def test_too_many_subwords_drop_a_pair_from_train(tmp_path: Path) -> None:
    whole = prepare(config(tmp_path, write(tmp_path / "c.tsv", PAIRS)), report=quiet)
    corpus = prepare(config(tmp_path, str(tmp_path / "c.tsv"), max_tokens_per_sentence=40), report=quiet)
    sizes = [corpus.split("train").sizes(lang) for lang in ("en", "cs")]
    assert max(size.max() for size in sizes) == 41  # with the end of sentence
    dropped = corpus.manifest["dropped"]["train"]["length"]
    assert dropped == len(whole.split("train")) - len(corpus.split("train")) > 0


def test_a_second_run_reuses_by_content(corpus_file: str, tmp_path: Path) -> None:
    lines: list[str] = []
    first = prepare(config(tmp_path, corpus_file), report=quiet)
    made = (first.path / "manifest.json").stat().st_mtime_ns
    copy = tmp_path / "elsewhere.tsv"
    copy.write_bytes(Path(corpus_file).read_bytes())
    second = prepare(config(tmp_path, str(copy)), report=lines.append)
    assert second.path == first.path
    assert (second.path / "manifest.json").stat().st_mtime_ns == made
    assert len(lines) == 1
    assert "up to date" in lines[0]


@pytest.mark.parametrize(
    "change", ["content", "vocab_size", "valid_size", "test_size", "max_ratio", "length", "given test"]
)
def test_other_inputs_make_another_corpus(corpus_file: str, tmp_path: Path, change: str) -> None:
    first = prepare(config(tmp_path, corpus_file), report=quiet)
    settings: dict[str, object] = {
        "content": {},
        "vocab_size": {"vocab_size": 501},
        "valid_size": {"valid_size": 51},
        "test_size": {"test_size": 81},
        "length": {"max_tokens_per_sentence": 255},
        "max_ratio": {"max_ratio": 2.9},
        "given test": {"test": write(tmp_path / "test.tsv", PAIRS[:3])},
    }[change]
    if change == "content":
        write(Path(corpus_file), PAIRS)
    assert prepare(config(tmp_path, corpus_file, **settings), report=quiet).path != first.path


def test_a_rebuild_is_byte_identical_and_plain_equals_compressed(corpus_file: str, tmp_path: Path) -> None:
    first = prepare(config(tmp_path, corpus_file), report=quiet)
    again = prepare(config(tmp_path, corpus_file, cache=str(tmp_path / "other")), report=quiet)
    assert again.path.name == first.path.name
    assert files_of(again) == files_of(first)
    packed = tmp_path / "corpus.tsv.xz"
    packed.write_bytes(lzma.compress(Path(corpus_file).read_bytes()))
    assert files_of(prepare(config(tmp_path, str(packed)), report=quiet)) == files_of(first)


@pytest.mark.parametrize("damage", ["missing", "truncated", "no manifest"])
def test_a_damaged_corpus_is_noticed_and_made_again(corpus_file: str, tmp_path: Path, damage: str) -> None:
    first = prepare(config(tmp_path, corpus_file), report=quiet)
    before = files_of(first)
    victim = first.path / ("manifest.json" if damage == "no manifest" else "train.cs.bin")
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-2])
    else:
        victim.unlink()
    with pytest.raises(DamagedCorpus):
        Corpus.open(first.path)
    lines: list[str] = []
    assert files_of(prepare(config(tmp_path, corpus_file), report=lines.append)) == before
    assert "warning" in lines[0]
    assert victim.name in lines[0]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"files":null,"format":1}',
        b'{"files":["a"],"format":1}',
        b'{"files":{"spm.model":null},"format":1}',
        b'{"files":{},"format":1}',
        b'{"files":{},"format":1,"splits":{"train":{"pairs":"many"}}}',
        b"[" * 5000,
    ],
)
def test_a_corpus_whose_manifest_is_another_thing_is_made_again(
    corpus_file: str, tmp_path: Path, content: bytes
) -> None:
    first = prepare(config(tmp_path, corpus_file), report=quiet)
    before = files_of(first)
    (first.path / "manifest.json").write_bytes(content)
    with pytest.raises(DamagedCorpus, match=rf"\A{first.path}: not a prepared corpus, no readable manifest\.json\Z"):
        Corpus.open(first.path)
    lines: list[str] = []
    assert files_of(prepare(config(tmp_path, corpus_file), report=lines.append)) == before
    assert "warning" in lines[0]


@pytest.mark.parametrize("moment", ["train_subwords", "read_pairs", "ShardWriter"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_cut_build_leaves_nothing(
    corpus_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException
) -> None:
    real = getattr(prepare_module, moment)
    calls = 0

    def cut(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if moment == "read_pairs":
            return cut_stream(real(*arguments, **options))
        if moment == "ShardWriter" and calls < 4:
            return real(*arguments, **options)
        raise error

    def cut_stream(pairs: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        for number, pair in enumerate(pairs):
            if number == 1500:
                raise error
            yield pair

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, moment, cut)
        with pytest.raises(type(error)):
            prepare(config(tmp_path, corpus_file), report=quiet)
    assert left_over(tmp_path / "cache") == []
    assert len(prepare(config(tmp_path, corpus_file), report=quiet).split("test")) == 80


def test_a_full_disk_is_an_error_and_leaves_nothing(corpus_file: str, tmp_path: Path) -> None:
    # A limit on the size of a file fails a write like a full disk does, and needs no disk of its own.
    code = f"""
import resource
from tenko.nmt.config import DataConfig
from tenko.nmt.prepare import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
try:
    prepare(DataConfig(train={corpus_file!r}, cache={str(tmp_path / "cache")!r}, vocab_size=500), report=print)
except OSError as error:
    print("failed:", error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "failed: [Errno 27]" in done.stdout
    assert left_over(tmp_path / "cache") == []


def test_a_killed_build_is_swept_by_the_next(corpus_file: str, tmp_path: Path) -> None:
    code = f"""
import time
from tenko.nmt import prepare as module
from tenko.nmt.config import DataConfig
module.train_subwords = lambda *a, **b: (print("half way", flush=True), time.sleep(60))
module.prepare(DataConfig(train={corpus_file!r}, cache={str(tmp_path / "cache")!r}, vocab_size=500, valid_size=50,
    test_size=80), report=lambda line: None)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half way\n"
        process.send_signal(signal.SIGKILL)
    assert [name.endswith(".building") for name in left_over(tmp_path / "cache")] == [True]
    corpus = prepare(config(tmp_path, corpus_file), report=quiet)
    assert left_over(tmp_path / "cache") == [corpus.path.name]


def build_beside(corpus_file: str, folder: Path, lines: Queue, waiting: Event) -> None:
    real = prepare_module.train_subwords

    def once_the_other_waits(*arguments: object, **options: object) -> object:
        assert waiting.wait(60)
        return real(*arguments, **options)  # type: ignore[arg-type]

    def report(line: str) -> None:
        lines.put(line)
        if "waiting" in line:
            waiting.set()

    prepare_module.train_subwords = once_the_other_waits  # type: ignore[assignment]
    prepare(config(folder, corpus_file), report=report)


def test_two_runs_at_once_build_once(corpus_file: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    lines, waiting = context.Queue(), context.Event()
    runs = [context.Process(target=build_beside, args=(corpus_file, tmp_path, lines, waiting)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
        assert run.exitcode == 0
    said = [lines.get(timeout=5) for _ in range(5)]
    assert sum("waiting" in line for line in said) == 1
    assert sum("up to date" in line for line in said) == 1
    assert sum("training" in line and "subwords" in line for line in said) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"corpus\.tsv: empty corpus, no sentence pairs"),
        ("Same.\tSame.\n\t\n", r"corpus\.tsv: no pair is left of 2; dropped: empty 1, untranslated 1"),
        ("One.\tJedna.\nTwo.\tDvě.\n", r"data\.valid_size and data\.test_size: no training pair is left of 2"),
        ("One.\n", r"corpus\.tsv: line 1: needs two tab-separated columns"),
    ],
)
def test_bad_corpora_are_one_line_and_leave_nothing(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "corpus.tsv").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        prepare(config(tmp_path, str(tmp_path / "corpus.tsv")), report=quiet)
    assert "\n" not in str(error.value)
    assert left_over(tmp_path / "cache") == []


def test_a_limit_that_no_pair_fits_is_named_and_an_empty_corpus_is_not_kept(corpus_file: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^data\.max_tokens_per_sentence: no pair is left for train: 1,\d+ were dropped"
    ):
        prepare(config(tmp_path, corpus_file, max_tokens_per_sentence=2), report=quiet)
    assert left_over(tmp_path / "cache") == []
    first = config(tmp_path, corpus_file, test_size=1)
    corpus = prepare(first, report=quiet)
    manifest = corpus.manifest | {"splits": corpus.manifest["splits"] | {"test": {"pairs": 0, "tokens": {}}}}
    (corpus.path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert len(prepare(first, report=quiet).split("test")) == 1, "an empty one of an older version is prepared again"


def test_what_is_read_more_than_once_must_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"^data\.train: .*pipe is a pipe, which is read once; give a file$"):
        prepare(config(tmp_path, str(tmp_path / "pipe")), report=quiet)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"^data\.subwords: /.*/mine\.model: not a sentencepiece model$"):
        prepare(config(tmp_path, "embedded", subwords="~/mine.model"), report=quiet)


def test_an_empty_test_file_names_its_key(corpus_file: str, tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text("\n\n")
    with pytest.raises(ValueError, match=r"test\.tsv: empty corpus, no sentence pairs for data\.test"):
        prepare(config(tmp_path, corpus_file, test=str(tmp_path / "test.tsv")), report=quiet)


def test_a_corpus_too_small_for_the_vocabulary_names_the_key(corpus_file: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.vocab_size: 50000 is too many for this corpus; the largest possible"):
        prepare(config(tmp_path, corpus_file, vocab_size=50_000), report=quiet)
    assert left_over(tmp_path / "cache") == []


def test_subwords_that_are_given_are_used_and_count(corpus_file: str, tmp_path: Path) -> None:
    first = prepare(config(tmp_path, corpus_file), report=quiet)
    given = tmp_path / "given.model"
    shutil.copyfile(first.spm_path, given)
    other = config(tmp_path, corpus_file, vocab_size=64, subwords=str(given))
    taken = prepare(other, report=quiet)
    assert taken.path != first.path
    assert taken.spm_path.read_bytes() == given.read_bytes()
    assert taken.dict_path.read_bytes() == first.dict_path.read_bytes()
    for side in ("en", "cs"):
        assert [*taken.split("test").tokens(side, 0)] == [*first.split("test").tokens(side, 0)]
    given.write_bytes(b"no model")
    with pytest.raises(ValueError, match=r"^data\.subwords: .*given\.model: not a sentencepiece model$"):
        prepare(other, report=quiet)


def test_a_cache_that_can_be_no_folder_is_named_with_its_key(small_tsv: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / "file" / "cache", Path("/proc/nope")):
        with pytest.raises(ValueError, match=rf"^data\.cache: {cache}: can't be made a folder \("):
            prepare(DataConfig(train=str(small_tsv), cache=str(cache)), report=quiet)


def test_subwords_of_a_large_corpus_are_trained_on_a_sample_from_all_over_it(
    corpus_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, samples = prepare_module.train_subwords, []

    def noted(sample: Any, *arguments: Any, **options: Any) -> Any:
        samples.append([*sample()])
        assert [*sample()] == samples[-1], "it is read more than once"
        return real(sample, *arguments, **options)

    monkeypatch.setattr(prepare_module, "train_subwords", noted)
    for cache, most in (("all", 10**9), ("some", 800), ("again", 800)):
        monkeypatch.setattr(prepare_module, "SUBWORD_SAMPLE", most)
        corpus = prepare(config(tmp_path, corpus_file, cache=str(tmp_path / cache), vocab_size=300), report=quiet)
    whole, some, again = samples
    assert len(whole) == 2 * len(corpus.split("train"))
    assert some == again
    places = [whole.index(line) for line in some[::2]]
    assert abs(len(places) - 800) < 150, "5 deviations"
    assert places == sorted(places)
    assert all(
        any(low <= place < low + len(whole) // 10 for place in places)
        for low in range(0, len(whole) * 9 // 10, len(whole) // 10)
    )
    hashes = [prepare_module.hash64(f"{en}\t{cs}") for en, cs in zip(some[::2], some[1::2], strict=True)]
    others = {*zip(whole[::2], whole[1::2], strict=True)} - {*zip(some[::2], some[1::2], strict=True)}
    assert max(hashes) < min(prepare_module.hash64(f"{en}\t{cs}") for en, cs in others), (
        "the smallest: a larger sample holds this one"
    )
