"""Bad input through the command line: exit 2, one line on stderr that names what is wrong, nothing half-written."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tenko_run import Done, run_arguments, tenko

from tenko.nmt.corpus import Corpus

pytestmark = pytest.mark.torchrun

WORDS = {
    "unknown key": r"train\.max_updates.*max_update\b",
    "bad value": r"comm\.bits: must be 1 to 8, is 9",
    "parameter without a route": r"split: no rule takes model\.\S+weight \(\d+ elements, 2 dimensions\)",
    "bad direction": r"direction: must be one of en-cs, cs-en, is en-de",
    "no recipe": r"nowhere\.yaml",
    "missing test file": r"data\.test: no such file: .*/nowhere\.tsv",
    "unequal line counts": r"short\.cs.*\b(419|420)\b|\b(419|420)\b.*short\.cs",
    "invalid UTF-8": r"latin\.tsv:?.*line 3.*UTF-8|latin\.tsv:3.*UTF-8",
    "empty corpus": r"empty\.tsv: .*empty",
    "unknown architecture": r"model\.arch: unknown architecture 'transfomer'; valid: .*transformer",
    "sentence beyond max_tokens": r"train\.max_tokens: a sentence has \d+ tokens",
    "no run to translate with": r"nothing-here: does not exist",
}


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory, small_tsv: Path, small_corpus: Corpus) -> dict[str, Done]:
    """All of the commands, two at a time: most of their time is importing."""
    home = tmp_path_factory.mktemp("bad")
    pairs = [line.split("\t") for line in small_tsv.read_text(encoding="utf-8").splitlines()]
    (home / "short.en").write_text("".join(f"{en}\n" for en, _ in pairs), encoding="utf-8")
    (home / "short.cs").write_text("".join(f"{cs}\n" for _, cs in pairs[:-1]), encoding="utf-8")
    (home / "latin.tsv").write_bytes(b"one\tjedna\ntwo\tdv\xc4\x9b\nthree\tt\xf8i\nfour\t\xe8ty\xf8i\n")
    (home / "empty.tsv").write_text("")
    sides = f"{{en: {home / 'short.en'}, cs: {home / 'short.cs'}}}"
    one = {"workers": "1"}
    settings = {
        "unknown key": {"train.max_updates": "3"},
        "bad value": {"comm.bits": "9"},
        "parameter without a route": {"comm.route": "split", "comm.split": "[{route: fp32, max_dims: 1}]"},
        "bad direction": {"direction": "en-de"},
        "missing test file": {**one, "data.test": str(home / "nowhere.tsv")},
        "unequal line counts": {**one, "data.train": sides},
        "invalid UTF-8": {"data.train": str(home / "latin.tsv")},  # found by a worker, said by the parent
        "empty corpus": {**one, "data.train": str(home / "empty.tsv")},
        "unknown architecture": {**one, "model.arch": "transfomer"},
        "sentence beyond max_tokens": {**one, "train.max_tokens": "3"},
    }
    commands: dict[str, list[str | Path]] = {
        case: run_arguments(home / case.replace(" ", "-"), small_tsv, **changes) for case, changes in settings.items()
    }
    commands["no recipe"] = ["run", home / "nowhere.yaml"]
    commands["no run to translate with"] = ["translate", "--run", home / "nothing-here"]
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(commands, pool.map(lambda command: tenko(*command), commands.values()), strict=True))
    left = [path for path in home.rglob("*") if path.name in ("result.json", "artefact") or "partial" in path.name]
    assert left == []
    assert not list((small_tsv.parent / "cache").glob(".*.building"))
    return found


@pytest.mark.parametrize("case", WORDS)
def test_bad_input_is_one_line_that_names_it(endings: dict[str, Done], case: str) -> None:
    done = endings[case]
    assert done.code == 2, done
    assert len(done.errors) == 1, done.errors
    assert done.errors[0].startswith("tenko: error: ")
    assert re.search(WORDS[case], done.errors[0]), done.errors[0]
    assert "Traceback" not in done.out
