"""Squared gradients: those of autograd, of each batch alone, the model left as it was, tied weights once."""

from __future__ import annotations

import torch
from toy_training import toy_model

from tenko.nmt.batches import UpdateStream
from tenko.nmt.corpus import Corpus
from tenko.nmt.fairseq_bridge import ModelWithLoss
from tenko.nmt.sensitivity import TOKENS, squared_gradients


def test_they_are_the_mean_square_of_each_batchs_gradient(small_corpus: Corpus) -> None:
    model = toy_model(small_corpus, dropout=0.3).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: list[int] = []
    found = squared_gradients(model, small_corpus, "en-cs", seed=4, batches=3, on_batch=seen.append)
    assert seen == [1, 2, 3]
    assert model.training
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    stream = UpdateStream(
        small_corpus.split("train"), "en-cs", seed=4, max_tokens=TOKENS, update_freq=1, rank=0, world=1
    )
    plain = toy_model(small_corpus, dropout=0.0)
    names, parameters = zip(*plain.named_parameters(), strict=True)
    squares = []
    for update in (1, 2, 3):
        (sample,) = stream.update(update).samples
        loss, _ = ModelWithLoss(plain, 0.0)(sample)
        gradients = torch.autograd.grad(loss / sample["ntokens"], parameters)
        squares.append([gradient.square() for gradient in gradients])
    assert set(found) == set(names)
    for i, name in enumerate(names):
        torch.testing.assert_close(found[name], torch.stack([each[i] for each in squares]).mean(0), rtol=1e-5, atol=0)
        assert float(found[name].sum()) > 0


def test_a_frozen_parameter_has_none(small_corpus: Corpus) -> None:
    model = toy_model(small_corpus)
    model.encoder.layers[0].fc1.requires_grad_(False)
    found = squared_gradients(model, small_corpus, "cs-en", seed=1, batches=1)
    assert not [name for name in found if "encoder.layers.0.fc1" in name]
    assert "decoder.layers.0.fc1.weight" in found
