"""The fast loss is fairseq's criterion: sums, gradients of every weight, in every type of logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from toy_training import toy_model

from tenko.nmt.config import DistillConfig
from tenko.nmt.corpus import Corpus
from tenko.nmt.fairseq_bridge import EOS, PAD, ModelWithLoss, collate, switch_out
from tenko.nmt.loss import distillation, label_smoothed_cross_entropy


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


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_divergence_from_the_teacher(temperature: float) -> None:
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(7, 11, generator=generator, requires_grad=True)
    teacher = torch.randn(7, 11, generator=generator, requires_grad=True)
    loss = distillation(student, teacher, temperature)
    p = (teacher.detach() / temperature).softmax(-1)
    q = (student.detach() / temperature).softmax(-1)
    torch.testing.assert_close(loss.detach(), (p * (p / q).log()).sum() * temperature**2)
    loss.backward()
    torch.testing.assert_close(student.grad, (q - p) * temperature)
    assert teacher.grad is None
    assert distillation(teacher, teacher, temperature).item() == pytest.approx(0, abs=1e-5)


def test_a_teacher_takes_its_share_of_the_loss_and_is_no_part_of_the_module(small_corpus: Corpus) -> None:
    student, teacher = toy_model(small_corpus, seed=1), toy_model(small_corpus, seed=2, dropout=0.5)
    sample = batch(small_corpus)
    alone, nll = ModelWithLoss(student, 0.1)(sample)
    found = {}
    for weight in (0.0, 0.25, 1.0):
        module = ModelWithLoss(student, 0.1, teacher=teacher, distill=DistillConfig(weight=weight, temperature=2.0))
        assert len(list(module.parameters())) == len(list(student.parameters()))
        module.train()
        assert not teacher.training, "a teacher has no dropout"
        loss, same = module(sample)
        assert same.item() == nll.item()
        found[weight] = loss.item()
    assert found[0.0] == alone.item()
    assert found[0.25] == pytest.approx(0.75 * found[0.0] + 0.25 * found[1.0], rel=1e-5)
    own = ModelWithLoss(student, 0.1, teacher=toy_model(small_corpus, seed=1), distill=DistillConfig(weight=1.0))
    assert own(sample)[0].item() == pytest.approx(0, abs=1e-2), "a teacher that is the student teaches nothing"


def test_switchout_replaces_a_fraction_of_the_words_by_words_as_frequent_ones_as_often() -> None:
    torch.manual_seed(1)
    tokens = torch.full((400, 103), PAD)
    tokens[:, 2:-1] = torch.tensor([7, 7, 7, 9]).repeat(25)
    tokens[:, 2 + 50] = 0  # <s>
    tokens[:, -1] = EOS
    before = tokens.clone()
    found = switch_out(tokens, 0.2)
    assert torch.equal(tokens, before)
    special = tokens <= EOS
    assert torch.equal(found[special], tokens[special])
    assert set(found[~special].tolist()) == {7, 9}
    changed = {word: (found[tokens == word] != word).float().mean().item() for word in (7, 9)}
    assert changed[7] == pytest.approx(0.2 / 4, rel=0.1), "a word may be replaced by itself"
    assert changed[9] == pytest.approx(0.2 * 3 / 4, rel=0.1)
    assert torch.equal(switch_out(tokens, 0.0), tokens)


def test_switchout_is_for_training_and_asks_student_and_teacher_the_same(small_corpus: Corpus) -> None:
    student, teacher = (toy_model(small_corpus, seed=1) for _ in range(2))
    settings: dict[str, Any] = {"teacher": teacher, "distill": DistillConfig(weight=1.0)}
    module = ModelWithLoss(student, 0.1, **settings, switchout=0.5)
    sample = batch(small_corpus)
    source = sample["net_input"]["src_tokens"].clone()
    _, nll = ModelWithLoss(student, 0.1)(sample)
    assert module.eval()(sample)[1].item() == nll.item()
    module.train()
    torch.manual_seed(1)
    taught, first = module(sample)
    _, other = module(sample)
    assert len({nll.item(), first.item(), other.item()}) == 3, "new words in each batch"
    assert taught.item() == pytest.approx(0, abs=1e-2), "a teacher that is the student teaches nothing"
    assert torch.equal(sample["net_input"]["src_tokens"], source)
