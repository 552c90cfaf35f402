"""What tenko asks of fairseq: options checked in words, batches, versions, beam search by position."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import fairseq
import numpy as np
import pytest
import torch
from toy_training import toy_config, toy_model

from tenko.nmt import fairseq_bridge
from tenko.nmt.config import MAX_LENGTH_PENALTY, MAX_POSITIONS, DecodeConfig, ModelConfig
from tenko.nmt.corpus import Corpus
from tenko.nmt.fairseq_bridge import EOS, PAD, Beam, ModelWithLoss, build_model, collate, load_dictionary, model_args


def test_importing_it_takes_no_package_that_translation_does_without() -> None:
    code = (
        "import sys; import tenko.launch.stages; "
        "print([name for name in ('sklearn', 'scipy', 'wandb', 'deepspeed', 'matplotlib') if name in sys.modules]); "
        "import fairseq.logging.progress_bar as bar; assert bar.wandb is None; import matplotlib"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_what_the_recipe_says_reaches_fairseqs_options() -> None:
    args = model_args(toy_config(normalize_before=True, activation_dropout=0.25, extra={"activation_fn": "gelu"}))
    for side in ("encoder", "decoder"):
        assert args[f"{side}_layers"] == 1
        assert args[f"{side}_embed_dim"] == 16
        assert args[f"{side}_ffn_embed_dim"] == 32
        assert args[f"{side}_attention_heads"] == 2
        assert args[f"{side}_normalize_before"] is True
    assert args["activation_dropout"] == 0.25
    assert args["activation_fn"] == "gelu"
    assert args["share_all_embeddings"]


def test_what_the_recipe_leaves_open_is_the_architectures() -> None:
    args = model_args(ModelConfig(arch="transformer_iwslt_de_en"))
    assert (args["encoder_embed_dim"], args["encoder_ffn_embed_dim"], args["decoder_attention_heads"]) == (512, 1024, 4)
    assert model_args(ModelConfig(arch="transformer_vaswani_wmt_en_de_big"))["decoder_ffn_embed_dim"] == 4096


def test_an_unknown_architecture_names_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"\Amodel\.arch: unknown architecture 'transfomer'; valid: .*\btransformer\b"):
        model_args(ModelConfig(arch="transfomer"))
    with pytest.raises(ValueError, match=r"unknown architecture 'fconv'"):  # fairseq's, but no transformer
        model_args(ModelConfig(arch="fconv"))


def test_an_unknown_option_names_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"\Amodel\.extra: unknown option 'activation'.*valid: .*\bactivation_fn\b"):
        model_args(toy_config(extra={"activation": "gelu"}))


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ({"activation_fn": "foo"}, "--activation-fn foo not supported"),
        ({"encoder_layers": "x"}, "'str' object cannot be interpreted as an integer"),
        ({"decoder_attention_heads": 0}, "integer modulo by zero"),
    ],
)
def test_an_option_of_a_wrong_value_is_named(small_corpus: Corpus, extra: dict[str, Any], reason: str) -> None:
    names = ", ".join(extra)
    with pytest.raises(ValueError, match=rf"\Amodel\.extra: with {names} fairseq builds no model \(.*{reason}.*\)\Z"):
        build_model(toy_config(extra=extra), small_corpus.dict_path)


def test_heads_that_do_not_divide_the_architectures_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\Amodel\.attention_heads: must divide the width \(512\), is 7\Z"):
        model_args(ModelConfig(attention_heads=7))  # the width is not in the recipe, so only the bridge can tell


def test_another_version_of_fairseq_is_refused_with_the_one_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairseq, "__version__", "0.10.2")
    with pytest.raises(ValueError, match=r"\Afairseq: version 0\.10\.2 is not known to work; install ve-fairseq 0\."):
        fairseq_bridge._import_fairseq()


def test_an_unreadable_dictionary_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.txt: not a readable fairseq dictionary"):
        load_dictionary(tmp_path / "nowhere.txt")
    (tmp_path / "dict.txt").write_text("word without a count\n")
    with pytest.raises(ValueError, match=r"dict\.txt: not a readable fairseq dictionary"):
        load_dictionary(tmp_path / "dict.txt")


def test_weights_follow_the_seed_alone(small_corpus: Corpus) -> None:
    one, same, other = (toy_model(small_corpus, seed=seed) for seed in (1, 1, 2))
    pairs = list(zip(one.parameters(), same.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(one.encoder.embed_tokens.weight, other.encoder.embed_tokens.weight)
    assert one.decoder.output_projection.weight is one.encoder.embed_tokens.weight, "one joint table"
    assert one.encoder.embed_tokens.weight.shape == (small_corpus.vocab_size, 16)
    untied = build_model(toy_config(share_all_embeddings=False), small_corpus.dict_path)
    assert untied.decoder.output_projection.weight is not untied.encoder.embed_tokens.weight


def test_padding_changes_no_sentences_loss(small_corpus: Corpus) -> None:
    train = small_corpus.split("train")
    with_loss = ModelWithLoss(toy_model(small_corpus), 0.1).eval()
    pairs = [(i, train.tokens("en", i), train.tokens("cs", i)) for i in range(6)]
    together = with_loss(collate(pairs))
    alone = [with_loss(collate([pair])) for pair in pairs]
    for k in range(2):
        torch.testing.assert_close(together[k], torch.stack([one[k] for one in alone]).sum())


def test_hypotheses_come_by_id_whatever_the_order_of_the_batch(small_corpus: Corpus) -> None:
    test = small_corpus.split("test")
    model = toy_model(small_corpus).eval()
    beam = Beam(model, small_corpus.dict_path, DecodeConfig(beam=1))
    numbers = [3, 0, 7, 5, 1]
    found = beam.generate(collate([(i, test.tokens("en", i), None) for i in numbers]))
    assert sorted(i for i, _ in found) == sorted(numbers)
    for index, tokens in found:
        assert EOS not in tokens
        assert PAD not in tokens
        source = test.tokens("en", index)
        ((_, alone),) = beam.generate(collate([(index, source, None)]))
        # fairseq cuts what does not end by the longest source of the batch
        assert tokens[: len(alone)] == alone
        assert len(tokens) == len(alone) or len(alone) == 2 * len(source) + 20
    assert len({tuple(tokens[:5]) for _, tokens in found}) > 1, "the model says the same of everything"


def test_the_scorer_agrees_with_the_decoder(small_corpus: Corpus) -> None:
    test = small_corpus.split("test")
    model = toy_model(small_corpus).eval()
    with_loss = ModelWithLoss(model, 0.0).eval()
    beam = Beam(model, small_corpus.dict_path, DecodeConfig(beam=3, length_penalty=0.6))
    sample = collate([(i, test.tokens("en", i), None) for i in range(8)])
    found = beam.generator.generate([model], sample)
    scores = set()
    for index, hypotheses in zip(sample["id"].tolist(), found, strict=True):
        assert len(hypotheses) == 3
        for hypothesis in hypotheses:
            tokens = hypothesis["tokens"].numpy()
            assert tokens[-1] == EOS
            with torch.no_grad():
                _, nll = with_loss(collate([(index, test.tokens("en", index), tokens)]))
            assert -nll.item() / len(tokens) ** 0.6 == pytest.approx(float(hypothesis["score"]), rel=1e-4)
            scores.add(round(float(hypothesis["score"]), 4))
        assert [h["score"] for h in hypotheses] == sorted((h["score"] for h in hypotheses), reverse=True)
    assert len(scores) > 8


def test_a_length_penalty_goes_as_far_as_fairseq_can_reckon(small_corpus: Corpus) -> None:
    assert np.isfinite(float(MAX_POSITIONS) ** MAX_LENGTH_PENALTY)
    model = toy_model(small_corpus).eval()
    sample = collate([(0, np.array([5, 6, EOS]), None)])
    for penalty in (-MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY):
        decode = DecodeConfig(beam=2, length_penalty=penalty)
        assert [index for index, _ in Beam(model, small_corpus.dict_path, decode).generate(sample)] == [0]
    for penalty in (1100.0, -1100.0, 50.5):
        with pytest.raises(ValueError, match=rf"\Alength_penalty: must be from -50 to 50, is {penalty}\Z"):
            DecodeConfig(length_penalty=penalty)


def test_scores_that_are_no_numbers_are_said_to_be(small_corpus: Corpus) -> None:
    model = toy_model(small_corpus).eval()
    torch.nn.init.constant_(model.decoder.layers[0].final_layer_norm.weight, torch.nan)
    sample = collate([(0, np.array([5, 6, EOS]), None)])
    for beam in (1, 4):
        with pytest.raises(ValueError, match=r"\Abeam search found no translation: .* NaN or infinite\Z"):
            Beam(model, small_corpus.dict_path, DecodeConfig(beam=beam)).generate(sample)


def test_a_very_long_sentence_is_scored_and_translated(small_corpus: Corpus) -> None:
    model = toy_model(small_corpus).eval()
    tokens = np.array([*np.arange(1100) % 200 + 4, EOS])
    _, nll = ModelWithLoss(model, 0.0).eval()(collate([(0, tokens, tokens)]))
    assert 1101 * 3 < nll.item() < 1101 * 12
