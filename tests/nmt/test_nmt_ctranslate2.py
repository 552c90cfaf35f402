"""CTranslate2: the same hypotheses as fairseq's search in fp32, and nearly so in int8; refusals."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctranslate2
import numpy as np
import pytest
import safetensors.torch
import torch
from packed_files import Document, Parts, flipped, rewrite
from sentence_model import LINES, PAIRS, write_sentence_model
from toy_training import toy_config, toy_model

from tenko.compression import read_artefact, write_artefact
from tenko.nmt import engines
from tenko.nmt.config import DecodeConfig
from tenko.nmt.corpus import Corpus
from tenko.nmt.ctranslate2_engine import CARD, CTranslate2Translator
from tenko.nmt.ctranslate2_model import export_ctranslate2
from tenko.nmt.evaluate import corpus_bleu
from tenko.nmt.export import export_fairseq
from tenko.nmt.subwords import Subwords, train_subwords
from tenko.nmt.translate import Translator
from tenko.nmt.vocabulary_map import FILE, VMAP, VocabularyMap, vocabulary_map

MODELS: dict[str, dict[str, Any]] = {
    "post-norm, tied": {},
    "pre-norm, untied, gelu, 2 + 1 layers": {
        "normalize_before": True,
        "share_all_embeddings": False,
        "encoder_layers": 2,
        "extra": {"activation_fn": "gelu"},
    },
    "learned positions, norms of embeddings": {
        "extra": {"encoder_learned_pos": True, "decoder_learned_pos": True, "layernorm_embedding": True},
    },
    "embeddings not scaled, heads by the architecture": {
        "arch": "transformer_iwslt_de_en",
        "attention_heads": None,
        "extra": {"no_scale_embedding": True},
    },
}


@pytest.fixture(scope="module", params=MODELS)
def artefact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact")
    write_sentence_model(folder, int8=False, updates=70, **MODELS[request.param])
    return folder


@pytest.mark.parametrize(("beam", "penalty"), [(1, 1.0), (4, 1.0), (4, 0.5), (5, 1.8)])
def test_fp32_gives_fairseqs_hypotheses(artefact: Path, tmp_path: Path, beam: int, penalty: float) -> None:
    fairseq = Translator.load(artefact)
    ours = CTranslate2Translator(export_ctranslate2(artefact, tmp_path / "ct2", quantization="fp32"), threads=1)
    decode = DecodeConfig(beam=beam, length_penalty=penalty)
    wanted = fairseq.translate(LINES, decode=decode)
    assert len(set(wanted)) > 25
    assert ours.translate(LINES, decode=decode) == wanted
    assert (ours.direction, ours.tokens_produced) == (fairseq.direction, fairseq.tokens_produced)


def test_the_length_penalty_changes_hypotheses(plain: Path, tmp_path: Path) -> None:
    ours = CTranslate2Translator(export_ctranslate2(plain, tmp_path / "ct2", quantization="fp32"), threads=1)
    short, long = (ours.translate(LINES, decode=DecodeConfig(length_penalty=p)) for p in (-2.0, 4.0))
    assert sum(map(len, short)) < sum(map(len, long))


def test_the_model_is_the_one_of_ctranslate2s_own_converter(artefact: Path, tmp_path: Path) -> None:
    export_fairseq(artefact, tmp_path / "fairseq")
    theirs = ctranslate2.converters.FairseqConverter(str(tmp_path / "fairseq" / "model.pt"), str(tmp_path / "fairseq"))
    for name, quantization in (("int8", "int8"), ("int16", "int16"), ("fp32", "float32")):
        ours = export_ctranslate2(artefact, tmp_path / f"ours-{name}", quantization=name)
        theirs.convert(str(tmp_path / f"theirs-{name}"), quantization=quantization)
        for file in ("model.bin", "config.json", "shared_vocabulary.json"):
            assert (ours / file).read_bytes() == (tmp_path / f"theirs-{name}" / file).read_bytes(), file


@pytest.mark.parametrize("quantization", ["int8", "int16"])
def test_fewer_bits_translate_nearly_as_well(plain: Path, tmp_path: Path, quantization: str) -> None:
    ours = CTranslate2Translator(export_ctranslate2(plain, tmp_path / "ct2", quantization=quantization), threads=1)
    sources, references = zip(*PAIRS, strict=True)
    fairseq = corpus_bleu(Translator.load(plain).translate(sources), references).score
    assert fairseq > 60
    assert corpus_bleu(ours.translate(sources), references).score > fairseq - 3


def test_int8_artefacts_keep_their_codes(plain: Path, tmp_path: Path) -> None:
    """CTranslate2 quantizes the decoded weights anew, and finds the codes that the artefact has."""
    written = (export_ctranslate2(plain, tmp_path / "ct2") / "model.bin").read_bytes()
    parts = safetensors.torch.load((plain / "model.safetensors").read_bytes())
    for name in ("encoder.embed_tokens.weight", "decoder.layers.0.fc1.weight", "decoder.layers.0.fc2.weight"):
        codes = parts[f"{name}.codes"]
        assert codes.dtype == torch.int8
        assert codes.numpy().tobytes() in written


def test_a_translation_without_end_is_cut_where_fairseq_cuts_it(small_corpus: Corpus, tmp_path: Path) -> None:
    folder = tmp_path / "untrained"
    folder.mkdir()
    shutil.copyfile(small_corpus.spm_path, folder / "spm.model")
    shutil.copyfile(small_corpus.dict_path, folder / "dict.txt")
    model = toy_model(small_corpus)
    torch.nn.init.normal_(model.encoder.embed_tokens.weight, std=0.5, generator=torch.Generator().manual_seed(1))
    metadata = {"direction": "en-cs", "model": dataclasses.asdict(toy_config())}
    write_artefact(folder, model.state_dict(), metadata=metadata)
    ours = CTranslate2Translator(export_ctranslate2(folder, tmp_path / "ct2", quantization="fp32"), threads=1)
    fairseq = Translator.load(folder)
    source = small_corpus.text("test")[0][0]
    limit = 2 * (len(ours.subwords.encode(source)) + 1) + 20
    greedy = DecodeConfig(beam=1)
    assert ours.translate([source], decode=greedy) == fairseq.translate([source], decode=greedy)
    assert ours.tokens_produced == fairseq.tokens_produced == limit + 1
    long = "abc " * 3000
    assert len(ours.translate(["", long], decode=greedy)) == 2
    assert ours.cut == [1]


def test_order_progress_and_batches_do_not_matter(plain: Path, tmp_path: Path) -> None:
    folder = export_ctranslate2(plain, tmp_path / "ct2", quantization="fp32")
    wanted = CTranslate2Translator(folder, threads=1).translate(LINES)
    ours = CTranslate2Translator(folder, threads=2)
    told: list[tuple[int, int]] = []
    decode = DecodeConfig(max_tokens=25)
    assert ours.translate(LINES[::-1], decode=decode, progress=lambda *step: told.append(step)) == wanted[::-1]
    assert told[-1] == (len(LINES), len(LINES))
    assert len(told) > 10
    assert [done for done, _ in told] == sorted({done for done, _ in told})
    assert ours.translate(["", " "]) == ["", ""]
    assert ours.translate([]) == []


def test_the_map_holds_each_words_translations(small_corpus: Corpus) -> None:
    shards = small_corpus.split("train")
    found = vocabulary_map(shards, "en-cs", small_corpus.vocab_size, candidates=8, frequent=16)
    assert found.candidates.shape == (small_corpus.vocab_size, 8)
    pieces = Subwords(small_corpus.spm_path).pieces()
    for source in range(4, small_corpus.vocab_size):
        kept = found.candidates[source][found.candidates[source] >= 0]
        assert kept[0] == source, "a name is copied"
        assert len(set(kept.tolist())) == len(kept)
    assert (found.candidates[:3] == -1).all()
    frequency = np.bincount(np.concatenate([shards.tokens("cs", i)[:-1] for i in range(len(shards))]))
    assert set(found.always.tolist()) == set(np.argsort(-frequency, kind="stable")[:16].tolist())
    back = vocabulary_map(shards, "cs-en", small_corpus.vocab_size, candidates=8, frequent=16)
    assert (pieces.index("."), pieces.index(".")) == (found.candidates[pieces.index(".")][0], back.always[0])


def test_model_1_tells_words_apart_that_always_stand_together(tmp_path: Path) -> None:
    """ "the" is in every sentence; EM still gives "house" to "dům", since "the" explains the rest."""
    from tenko.nmt.shards import PairShards, ShardWriter

    the, house, tree, dum, strom, ten = 4, 5, 6, 7, 8, 9
    pairs = [([the, house], [ten, dum]), ([the, tree], [ten, strom])] * 5
    totals = {}
    for lang, side in (("en", 0), ("cs", 1)):
        with ShardWriter(tmp_path, "train", lang, np.dtype("<u2")) as writer:
            writer.append([pair[side] for pair in pairs])
            totals[lang] = writer.tokens
    shards = PairShards(tmp_path, "train", len(pairs), totals, np.dtype("<u2"))
    found = vocabulary_map(shards, "en-cs", 10, candidates=2, frequent=1, rounds=8)
    assert found.candidates[[the, house, tree]].tolist() == [[the, ten], [house, dum], [tree, strom]]
    assert found.always.tolist() == [ten]


def test_a_map_narrows_what_can_be_said(plain: Path, tmp_path: Path) -> None:
    subwords = Subwords(plain / "spm.model")
    size = len(subwords)
    everything = VocabularyMap(np.full((size, 1), -1, np.int32), np.arange(4, size, dtype=np.int32))
    sources, references = zip(*PAIRS[:40], strict=True)
    said = sorted({token for line in references for token in subwords.encode(line)})
    assert len(said) < 0.7 * size
    some = VocabularyMap(np.full((size, 1), -1, np.int32), np.array(said[:-3], np.int32))
    free, wide, narrow = (
        CTranslate2Translator(export_ctranslate2(plain, tmp_path / name, quantization="fp32", vocabulary_map=mapped))
        for name, mapped in (("free", None), ("wide", everything), ("narrow", some))
    )
    wanted = free.translate(sources)
    assert wide.translate(sources) == wanted
    for line in narrow.translate(sources):
        assert set(subwords.encode(line)) <= {*said[:-3], 3}
    assert any(set(subwords.encode(line)) & set(said[-3:]) for line in wanted)
    assert (tmp_path / "narrow" / VMAP).is_file()


def test_a_map_survives_its_file_and_refuses_others(tmp_path: Path) -> None:
    mapped = VocabularyMap(np.array([[1, -1], [0, 1]], np.int32), np.array([1], np.int32))
    mapped.save(tmp_path / FILE)
    loaded = VocabularyMap.load(tmp_path / FILE, 2)
    assert loaded.candidates.tolist() == mapped.candidates.tolist()
    assert loaded.always.tolist() == mapped.always.tolist()
    for vocabulary in (1, 3):
        with pytest.raises(ValueError, match=f"{FILE}: .*"):
            VocabularyMap.load(tmp_path / FILE, vocabulary)
    for content in (b"nonsense", b""):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(ValueError, match=f"{FILE}: damaged"):
            VocabularyMap.load(tmp_path / FILE, 2)


def test_a_map_damaged_anywhere_is_said_to_be_or_is_one_still(tmp_path: Path) -> None:
    chance = np.random.default_rng(1)
    mapped = VocabularyMap(chance.integers(-1, 50, (50, 6), np.int32), np.arange(20, dtype=np.int32))
    mapped.save(tmp_path / FILE)
    whole = (tmp_path / FILE).read_bytes()
    errors: list[str] = []
    for place, byte in enumerate(whole):
        before, after = whole[:place], whole[place + 1 :]
        for content in (before, *(before + bytes([byte ^ mask]) + after for mask in (0x01, 0x08, 0x10, 0xFF))):
            (tmp_path / FILE).write_bytes(content)
            try:
                VocabularyMap.load(tmp_path / FILE, 50)
            except ValueError as error:
                errors.append(str(error))
    assert len(errors) > 4 * len(whole)
    assert [error for error in errors if not error.startswith(f"{tmp_path / FILE}: ") or "\n" in error] == []


def test_padding_is_never_said(plain: Path, tmp_path: Path) -> None:
    """A model whose <pad> is the likeliest of all; fairseq's search never takes it."""
    folder = Path(shutil.copytree(plain, tmp_path / "artefact"))
    state, metadata = read_artefact(plain)
    state["decoder.layers.0.final_layer_norm.bias"].fill_(1.0)
    state["encoder.embed_tokens.weight"][1] = 10.0
    write_artefact(folder, state, metadata={key: metadata[key] for key in ("direction", "model")})
    fairseq = Translator.load(folder)
    ours = CTranslate2Translator(export_ctranslate2(folder, tmp_path / "ct2", quantization="fp32"), threads=1)
    greedy = DecodeConfig(beam=1)
    assert ours.translate(LINES, decode=greedy) == fairseq.translate(LINES, decode=greedy)
    # fairseq takes the rest's probabilities as they are, next to nothing each; CTranslate2 normalises them.
    assert len(set(ours.translate(LINES))) > 20


OPENED: dict[str, Callable[[Path, Path], object]] = {
    "fairseq": lambda folder, out: Translator.load(folder),
    "export fairseq": export_fairseq,
    "export ctranslate2": export_ctranslate2,
    "first use": lambda folder, out: engines.load(folder, engine="ctranslate2", threads=1),
}


def refused_by_all(folder: Path, message: str) -> None:
    """Whoever opens the artefact refuses it in one line, and leaves nothing behind."""
    before = sorted(folder.parent.rglob("*"))
    for name, opened in OPENED.items():
        with pytest.raises(ValueError, match=rf"\A{folder}/{message}.*\Z"):
            opened(folder, folder.parent / "out")
        assert [*sorted(folder.parent.rglob("*"))] in (before, sorted([*before, folder.parent / "cache"])), name


SUBWORDS: dict[str, tuple[str, str]] = {
    "spm.model of another order": ("spm.model", "its entries are not those of spm.model: [0-9]+ is "),
    "spm.model of another size": ("spm.model", "its 110 entries are not the 100 of spm.model"),
    "cut": ("dict.txt", "its 107 entries are not the 110 of spm.model"),
    "garbage": ("dict.txt", "not a readable fairseq dictionary .line 1 is no `subword count`"),
    "no UTF-8": ("dict.txt", "not a readable fairseq dictionary .no UTF-8"),
    "in another order": ("dict.txt", "its entries are not those of spm.model: 4 is "),
}


@pytest.mark.parametrize("case", SUBWORDS)
def test_subwords_that_are_not_the_dictionarys_are_refused(own_artefact: Path, case: str) -> None:
    """An id would mean one subword to the model and another to the text: a translation into garbage."""
    name, message = SUBWORDS[case]
    lines = (own_artefact / "dict.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    if name == "spm.model":
        sentences = [side for pair in PAIRS[::-3] for side in pair]
        train_subwords(lambda: iter(sentences), own_artefact / name, vocab_size=110 if "order" in case else 100)
    else:
        content = {"cut": lines[:-3], "garbage": ["nonsense\n"], "in another order": lines[::-1], "no UTF-8": []}[case]
        (own_artefact / name).write_bytes("".join(content).encode() or b"\xff\xfe 1\n")
    refused_by_all(own_artefact, f"dict.txt: {message}")


@pytest.mark.parametrize("case", ["dense", "scale"])
def test_weights_that_are_no_numbers_are_refused(own_artefact: Path, case: str) -> None:
    """fairseq's search finds nothing with them, CTranslate2's says something."""
    name = "decoder.layers.0.fc1.bias" if case == "dense" else "decoder.layers.0.fc1.weight"

    def change(parts: Parts, document: Document) -> None:
        if case == "dense":
            parts[name][0] = torch.nan
        else:
            parts[f"{name}.scale"][3] = 3e38  # finite; its codes times it are not

    rewrite(own_artefact / "model.safetensors", change, sealed=True)
    refused_by_all(own_artefact, f"model.safetensors: tensor {name} holds inf or NaN")


DESCRIBED: dict[str, tuple[dict[str, Any], str]] = {
    "negative heads": ({"extra": {"encoder_attention_heads": -2}}, "encoder_attention_heads: must be a whole number"),
    "heads of a float": (
        {"extra": {"encoder_attention_heads": 1.0}},
        "encoder_attention_heads: must be a whole number",
    ),
    "dropout": ({"extra": {"dropout": "x"}}, r"dropout: must be a number in \[0, 1\], is 'x'"),
    "no dropout": ({"extra": {"attention_dropout": None}}, r"attention_dropout: must be a number in"),
    "positions": ({"extra": {"max_source_positions": 20_000_000}}, "max_source_positions: must be .* 2 to 100000"),
    "control characters": ({"embed_dim": "\x1b[31m"}, r"embed_dim: must be .*\\x1b"),
}


@pytest.mark.parametrize("case", DESCRIBED)
def test_metadata_that_describe_no_model_are_refused(own_artefact: Path, case: str) -> None:
    model, message = DESCRIBED[case]
    described(own_artefact, {**read_artefact(own_artefact)[1]["model"], **model})
    refused_by_all(own_artefact, f"model.safetensors: its metadata describe no model .*{message}")


def described(folder: Path, model: dict[str, Any]) -> None:
    """Give an artefact's metadata other settings."""
    rewrite(folder / "model.safetensors", lambda _, document: document.update(model=model), sealed=True)


def test_settings_of_another_model_are_refused(own_artefact: Path) -> None:
    model = read_artefact(own_artefact)[1]["model"]
    for other, message in (
        ({}, "6 layers in the encoder; .*1"),
        ({**model, "ffn_dim": 128}, "tensor encoder.layers.0.fc1.weight has shape"),
        ({**model, "embed_dim": 64}, "tensor .* has shape"),
    ):
        described(own_artefact, other)
        refused_by_all(own_artefact, f"model.safetensors: .*{message}")


def test_a_bias_that_is_missing_is_missed(own_artefact: Path) -> None:
    state, metadata = read_artefact(own_artefact)
    del state["decoder.layers.0.encoder_attn.k_proj.bias"]
    write_artefact(own_artefact, state, metadata={key: metadata[key] for key in ("direction", "model")})
    refused_by_all(own_artefact, "model.safetensors: misses tensor decoder.layers.0.encoder_attn.k_proj.bias")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "activation": ({"extra": {"activation_fn": "tanh"}}, "CTranslate2 has no activation tanh"),
    "no positions": ({"extra": {"no_token_positional_embeddings": True}}, "has no model without positions"),
    "both at once": ({"extra": {"cross_self_attention": True}}, "has no attention to source and target at once"),
    "heads": ({"extra": {"decoder_attention_heads": 4}}, "wants 2 attention heads in the decoder"),
    "bottleneck": ({"extra": {"decoder_output_dim": 16}, "share_all_embeddings": False}, "no place for tensor|shape"),
    "mixed norms": ({"extra": {"encoder_normalize_before": True}}, "misses tensor decoder.layer_norm.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_ctranslate2_has_no_place_for_is_refused(tmp_path: Path, case: str) -> None:
    fields, message = REFUSED[case]
    folder = tmp_path / "artefact"
    folder.mkdir()
    write_sentence_model(folder, int8=False, updates=0, **fields)
    with pytest.raises(ValueError, match=rf"\A{folder}/model.safetensors: .*({message}).*\Z"):
        export_ctranslate2(folder, tmp_path / "ct2")
    assert os.listdir(tmp_path) == ["artefact"]


def test_a_damaged_model_is_refused_in_one_line(plain: Path, tmp_path: Path) -> None:
    good = export_ctranslate2(plain, tmp_path / "good")
    for name, content, message in (
        (CARD, b"{", "damaged"),
        (CARD, b'{"format": 1, "direction": "en-cs"}', "has no 'quantization'"),
        (CARD, (good / CARD).read_bytes().replace(b'"format": 1', b'"format": 9'), "newer"),
        (CARD, None, f"{CARD} is missing"),
        (CARD, b"[" * 3000, f"{CARD}: damaged"),
        (
            CARD,
            b'{"format": 1, "direction": "en-cs", "quantization": "int8", "vocabulary_map": false, "files": 1}',
            "sum",
        ),
        ("model.bin", b"short", "model.bin: damaged"),
        ("model.bin", b"", "model.bin: damaged"),
        ("model.bin", flipped(good / "model.bin"), "model.bin: damaged"),
        ("model.bin", None, "model.bin: missing"),
        ("spm.model", None, "spm.model: missing"),
        ("shared_vocabulary.json", b"[]", "shared_vocabulary.json: damaged"),
        (VMAP, b"", f"{VMAP}: is no part of the model"),
    ):
        folder = Path(shutil.copytree(good, tmp_path / "bad"))
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"\A{folder}.*{message}.*\Z"):
            CTranslate2Translator(folder)
        shutil.rmtree(folder)


OLDER: dict[str, tuple[str, bytes | None, str]] = {
    "weights cut": ("model.bin", b"short", "CTranslate2 cannot load it"),
    "map empty": (VMAP, b"", f"{VMAP}: damaged"),
    "map missing": (VMAP, None, f"{VMAP}: missing"),
    "map of others": (VMAP, b"\tzzz\n", f"{VMAP}: damaged"),
    "no vocabulary": (
        "shared_vocabulary.json",
        b"[]",
        "shared_vocabulary.json: its entries are not those of spm.model",
    ),
    "no JSON": ("shared_vocabulary.json", b"[" * 3000, "shared_vocabulary.json: damaged"),
}


def test_what_an_earlier_version_exported_is_read_and_looked_at(plain: Path, tmp_path: Path) -> None:
    """Its card has no sums; CTranslate2 would crash with some of these files, and ignore that others are missing."""
    size = len(Subwords(plain / "spm.model"))
    everything = VocabularyMap(np.full((size, 1), -1, np.int32), np.arange(4, size, dtype=np.int32))
    good = export_ctranslate2(plain, tmp_path / "good", vocabulary_map=everything)
    wanted = CTranslate2Translator(good, threads=1).translate(LINES)
    card = json.loads((good / CARD).read_text())
    del card["files"]
    (good / CARD).write_text(json.dumps(card))
    assert CTranslate2Translator(good, threads=1).translate(LINES) == wanted
    for name, content, message in OLDER.values():
        folder = Path(shutil.copytree(good, tmp_path / "bad"))
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"\A{folder}.*{message}.*\Z"):
            CTranslate2Translator(folder)
        shutil.rmtree(folder)


def test_nothing_is_left_of_an_export_that_failed(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left") as caught:
        export_ctranslate2(plain, tmp_path / "ct2")
    assert caught.value.filename == str(tmp_path / "ct2"), "the line names it"
    assert [name for name in os.listdir(tmp_path) if "ct2" in name] == []


def test_the_card_says_what_it_is(plain: Path, tmp_path: Path) -> None:
    card = json.loads((export_ctranslate2(plain, tmp_path / "ct2") / CARD).read_text())
    files = card.pop("files")
    assert card == {"format": 1, "direction": "en-cs", "quantization": "int8", "vocabulary_map": False}
    assert {CARD, *files} == set(os.listdir(tmp_path / "ct2")) >= {"spm.model", "dict.txt", "model.bin"}
    weights = (tmp_path / "ct2" / "model.bin").read_bytes()
    assert files["model.bin"] == {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
    with pytest.raises(ValueError, match="unknown 'int4'; valid are int8, int16, fp32"):
        export_ctranslate2(plain, tmp_path / "other", quantization="int4")
