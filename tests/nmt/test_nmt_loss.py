"""The fast loss is fairseq's criterion: sums, gradients of every weight, in every type of logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from toy_training import toy_model

from tenko.nmt.corpus import Corpus
from tenko.nmt.fairseq_bridge import PAD, ModelWithLoss, collate
from tenko.nmt.loss import label_smoothed_cross_entropy


def batch(corpus: Corpus, sentences: int = 9) -> dict[str, Any]:
    train = corpus.split("train")
    return collate([(i, train.tokens("en", i), train.tokens("cs", i)) for i in range(sentences)])


def criterion(corpus: Corpus, epsilon: float) -> Any:
    dictionary = SimpleNamespace(pad=lambda: PAD)
    task = SimpleNamespace(target_dictionary=dictionary)
    return LabelSmoothedCrossEntropyCriterion(task, sentence_avg=False, label_smoothing=epsilon)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("tied", [True, False])
def test_sums_and_gradients_are_those_of_fairseqs_criterion(small_corpus: Corpus, epsilon: float, tied: bool) -> None:
    model = toy_model(small_corpus, share_all_embeddings=tied).train()
    sample = batch(small_corpus)
    assert sample["target"].eq(PAD).any(), "a batch with padding is what this is about"

    theirs, size, log = criterion(small_corpus, epsilon)(model, sample)
    theirs.backward()
    wanted = gradients(model)

    loss, nll = ModelWithLoss(model, epsilon)(sample)
    loss.backward()
    found = gradients(model)

    assert size == len(sample["kept"])
    torch.testing.assert_close(loss, theirs)
    torch.testing.assert_close(nll, log["nll_loss"])
    if epsilon:
        assert loss.item() != pytest.approx(nll.item(), rel=1e-5)
    assert found.keys() == wanted.keys() == dict(model.named_parameters()).keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def plain(logits_nv: torch.Tensor, target_n: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula as the paper has it, for autograd."""
    log_probs = torch.log_softmax(logits_nv.float(), -1)
    words = logits_nv.size(1)
    wanted = torch.full_like(log_probs, epsilon / (words - 1)).scatter_(1, target_n[:, None], 1 - epsilon)
    return -(wanted * log_probs).sum(), -log_probs.gather(1, target_n[:, None]).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.9])
def test_gradient_is_autograds_of_the_plain_formula(dtype: torch.dtype, epsilon: float) -> None:
    generator = torch.Generator().manual_seed(3)
    values = (3 * torch.randn(17, 41, generator=generator)).to(dtype)
    target = torch.randint(41, (17,), generator=generator)
    scale = 0.25  # the loss is scaled before backward: by tokens, by the loss scaler

    reference = values.clone().requires_grad_()
    wanted_loss, wanted_nll = plain(reference, target, epsilon)
    (wanted_loss * scale).backward()
    ours = values.clone().requires_grad_()
    loss, nll = label_smoothed_cross_entropy(ours, target, epsilon)
    (loss * scale).backward()

    assert loss.dtype == nll.dtype == torch.float32
    torch.testing.assert_close(loss, wanted_loss)
    torch.testing.assert_close(nll, wanted_nll)
    assert ours.grad is not None
    assert reference.grad is not None
    assert ours.grad.dtype == dtype
    # sums differ by rounding: one ulp of the type
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}[dtype]
    torch.testing.assert_close(ours.grad, reference.grad, rtol=torch.finfo(dtype).eps, atol=tolerance)


def test_a_certain_and_a_hopeless_word_stay_finite() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]], requires_grad=True)
    loss, nll = label_smoothed_cross_entropy(logits, torch.tensor([0, 0]), 0.1)
    loss.backward()
    assert nll.item() == pytest.approx(2e4)
    assert torch.isfinite(loss)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[0.1, -0.05, -0.05], [-0.9, -0.05, 0.95]]))
