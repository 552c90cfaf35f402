"""Engines: which one translates, and the cache of models converted for CTranslate2, which mends itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from packed_files import flipped
from sentence_model import LINES

from tenko.compression import read_artefact, write_artefact
from tenko.nmt import engines
from tenko.nmt.ctranslate2_engine import CARD, CTranslate2Translator
from tenko.nmt.ctranslate2_model import export_ctranslate2
from tenko.nmt.subwords import Subwords
from tenko.nmt.vocabulary_map import FILE, VocabularyMap


def cached(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("ct2-*"))


def test_an_artefact_is_converted_once_and_anew_when_it_changes(
    own_artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = engines.load(own_artefact, threads=1)
    assert isinstance(first, CTranslate2Translator)
    wanted = first.translate(LINES)
    names = cached(own_artefact)
    assert len(names) == 1
    assert names[0].startswith("ct2-int8-")
    with monkeypatch.context() as patched:
        patched.setattr("tenko.nmt.ctranslate2_model.export_ctranslate2", None)  # not called again
        assert engines.load(own_artefact, threads=1).translate(LINES) == wanted
    state, metadata = read_artefact(own_artefact)
    state["encoder.embed_tokens.weight"].mul_(-1)
    write_artefact(own_artefact, state, metadata={key: metadata[key] for key in ("direction", "model")})
    assert engines.load(own_artefact, threads=1).translate(LINES) != wanted
    assert len(cached(own_artefact)) == 1
    assert cached(own_artefact) != names, "the stale one is gone"


@pytest.mark.parametrize("name", ["model.bin", "spm.model", CARD, "shared_vocabulary.json"])
@pytest.mark.parametrize("what", ["gone", "empty", "cut", "flipped"])
def test_a_damaged_conversion_is_made_anew(own_artefact: Path, name: str, what: str) -> None:
    wanted = engines.load(own_artefact, threads=1).translate(LINES)
    file = own_artefact / cached(own_artefact)[0] / name
    content = file.read_bytes()
    damaged = {"empty": b"", "cut": content[:-9], "flipped": flipped(file)}
    file.unlink() if what == "gone" else file.write_bytes(damaged[what])
    assert engines.load(own_artefact, threads=1).translate(LINES) == wanted
    assert file.read_bytes() == content


def test_what_killed_conversions_left_is_swept(own_artefact: Path) -> None:
    code = (
        "import os, shutil, sys; from pathlib import Path; from tenko.nmt import engines\n"
        "shutil.copyfile = lambda *_: os.kill(os.getpid(), 9)\n"
        "engines.load(Path(sys.argv[1]), threads=1)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(own_artefact)], capture_output=True, check=False)
    assert done.returncode == -9, done.stderr
    assert len(list(own_artefact.glob(".ct2-*.tmp"))) == 1
    node, alive = os.uname().nodename.partition(".")[0], os.getpid()
    kept = [f".ct2-int8-0.{node}-{alive}.tmp", ".ct2-int8-0.elsewhere-999999999.tmp"]
    swept = [".ct2-int8-0.elsewhere-1.tmp", ".ct2-int8-0.999999999.tmp", f".ct2-int8-0.{node}-999999999.tmp"]
    for name in kept + swept:
        (own_artefact / name).mkdir()
    os.utime(own_artefact / swept[0], (0, 0))
    engines.load(own_artefact, threads=1)
    assert sorted(path.name for path in own_artefact.glob(".ct2-*")) == sorted(kept)


def test_a_folder_that_cannot_be_written_leaves_it_to_the_users_cache(
    own_artefact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writable = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != own_artefact and writable(path, mode))
    assert engines.load(own_artefact, threads=1).translate(["Jane has a tree."]) != [""]
    assert cached(own_artefact) == []
    assert len(cached(tmp_path / "cache")) == 1
    monkeypatch.setenv(engines.CACHE, "/proc/none")
    assert engines.user_cache().is_dir()


def test_an_artefacts_map_is_used(own_artefact: Path) -> None:
    size = len(Subwords(own_artefact / "spm.model"))
    VocabularyMap(np.full((size, 1), -1, np.int32), np.array([4, 5], np.int32)).save(own_artefact / FILE)
    engine = engines.load(own_artefact, threads=1)
    assert isinstance(engine, CTranslate2Translator)
    assert engine.vocabulary_map
    pieces = engine.subwords.pieces()
    allowed = set(engine.subwords.decode([4, 5])) | {*" ⁇"}
    assert {c for line in engine.translate(LINES) for c in line} <= allowed, pieces[:6]


def test_engines_are_chosen_by_model_and_device(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = export_ctranslate2(plain, tmp_path / "ct2")
    assert engines.choose(plain) == engines.choose(exported, device="cuda") == "ctranslate2"
    assert engines.choose(plain, device="cuda") == engines.choose(plain, "fairseq") == "fairseq"
    with pytest.raises(ValueError, match="fairseq needs an artefact; valid: ctranslate2"):
        engines.choose(exported, "fairseq")
    with pytest.raises(ValueError, match="unknown engine 'marian'; valid: ctranslate2, fairseq"):
        engines.choose(plain, "marian")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert engines.choose(plain) == "fairseq"
    with pytest.raises(ValueError, match="not installed"):
        engines.choose(plain, "ctranslate2")


def test_a_converted_model_translates_without_torch(own_artefact: Path) -> None:
    wanted = engines.load(own_artefact, threads=1).translate(["Jane has a tree."])
    code = (
        "import sys; from pathlib import Path; from tenko.nmt import engines\n"
        "print(engines.load(Path(sys.argv[1]), threads=1).translate(['Jane has a tree.'])[0])\n"
        "assert not {'torch', 'fairseq'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(own_artefact)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, wanted[0]), done.stderr
