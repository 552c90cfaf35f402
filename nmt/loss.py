"""Label-smoothed cross entropy in three passes over the logits, where the textbook chain of operations takes nine.

The gradient of the summed loss is `softmax - eps_i - (1 - eps - eps_i) * onehot` (the factors of the softmax add up
to 1), so the backward pass turns the kept log-probabilities into it in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _SmoothedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_nv: Tensor, target_n: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        log_probs_nv = torch.log_softmax(logits_nv, dim=-1, dtype=torch.float32)
        nll = -log_probs_nv.gather(1, target_n[:, None]).sum()
        eps_i = epsilon / (logits_nv.size(1) - 1)
        loss = (1.0 - epsilon - eps_i) * nll - eps_i * log_probs_nv.sum()
        ctx.save_for_backward(log_probs_nv, target_n)
        ctx.epsilon, ctx.dtype = epsilon, logits_nv.dtype
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        log_probs_nv, target_n = ctx.saved_tensors
        eps_i = ctx.epsilon / (log_probs_nv.size(1) - 1)
        grad_nv = log_probs_nv.exp_()  # in place: the graph is used once (training never retains it)
        grad_nv.sub_(eps_i)
        rows = torch.arange(target_n.numel(), device=target_n.device)
        grad_nv[rows, target_n] -= 1.0 - ctx.epsilon - eps_i
        return grad_nv.mul_(grads[0]).to(ctx.dtype), None, None


def label_smoothed_cross_entropy(logits_nv: Tensor, target_n: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Loss and negative log-likelihood, summed, in nats; softmax and sums in fp32 whatever the logits are.

    Args:
        logits_nv: [tokens, vocabulary], fp32, bf16 or fp16.
        target_n: [tokens], int64, no padding.
        epsilon: label smoothing; `epsilon / (V - 1)` goes to each other word, as in fairseq.

    Source: Szegedy et al. 2016, section 7; fairseq's criterion `label_smoothed_cross_entropy`.
    """
    return _SmoothedCrossEntropy.apply(logits_nv, target_n, epsilon)


def distillation(student_nv: Tensor, teacher_nv: Tensor, temperature: float) -> Tensor:
    """temperature^2 * KL(teacher || student) of the softened distributions, summed over tokens, in nats, fp32.

    Args:
        student_nv, teacher_nv: logits [tokens, vocabulary]; no gradient flows to the teacher's.

    Source: Hinton et al. 2015, section 2; word-level knowledge distillation of Kim & Rush 2016.
    """
    student = torch.log_softmax(student_nv.float() / temperature, dim=-1)
    teacher = torch.log_softmax(teacher_nv.detach().float() / temperature, dim=-1)
    return torch.nn.functional.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2
