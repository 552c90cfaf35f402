"""The models that ship: found by their direction, named when they are not there, small, and able to translate."""

from __future__ import annotations

from pathlib import Path

import pytest

from tenko.nmt import engines, pretrained


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(pretrained, "MODELS", tmp_path / "models")
    return tmp_path / "models"


def test_a_model_is_a_folder_with_a_card(empty: Path) -> None:
    assert pretrained.pretrained() == []
    with pytest.raises(ValueError, match=r"\Aen-cs: no model of that name ships with tenko; valid: none"):
        pretrained.path("en-cs")
    (empty / "en-de").mkdir(parents=True)
    (empty / "cs-en").mkdir()
    (empty / "cs-en" / "model.json").write_text('{"bleu": 20.5}')
    assert pretrained.pretrained() == ["cs-en"]
    assert pretrained.path("cs-en") == empty / "cs-en"
    assert pretrained.card("cs-en") == {"bleu": 20.5}
    for name in ("en-cs", "en-de", "../models/cs-en", ""):
        with pytest.raises(ValueError, match=rf"\A{name}: no model of that name ships with tenko; valid: cs-en\Z"):
            pretrained.path(name)


@pytest.mark.parametrize("direction", pretrained.pretrained())
def test_what_ships_translates_and_is_small(direction: str, tmp_path: Path) -> None:
    folder = pretrained.path(direction)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 5_000_000
    card = pretrained.card(direction)
    assert card["direction"] == direction
    assert card["bleu"] > 15
    assert {"recipe", "commit", "updates", "bleu_signature", "licence"} <= card.keys()
    engine = engines.load(folder, threads=1, cache=tmp_path)
    assert engine.direction == direction
    source, wanted = ("The file could not be opened.", "soubor"), ("Soubor nelze otevřít.", "file")
    text, word = source if direction == "en-cs" else wanted
    assert word in engine.translate([text])[0].lower()
    assert [path.name[:8] for path in tmp_path.iterdir()] == ["ct2-int8"]
