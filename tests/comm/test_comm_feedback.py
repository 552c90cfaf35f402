"""Error feedback: nothing is lost, only late; residuals follow their parameters through other buckets and a save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

from tenko.comm import QuantizedAllReduce, Quantizer, WireMeter
from tenko.comm.feedback import ErrorFeedback
from tenko.comm.lanes import Bucket, Context, Lane, QuantizedLane
from tenko.comm.layout import single
from tenko.comm.link import run
from tenko.comm.rows import RowsLane


def test_sent_and_residual_add_up_to_the_gradients() -> None:
    """The sum of what was sent differs from the sum of the gradients by the last residual alone."""
    quantizer, numel = Quantizer(bits=3), 5000
    generator = torch.Generator().manual_seed(1)
    part, residual = single(numel, quantizer.span), torch.zeros(numel)
    sent, wanted = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    for step in range(50):
        gradient = torch.randn(numel, generator=generator)
        residual.add_(gradient)
        payload = quantizer.encode(residual, (step,))
        sent += quantizer.decode(payload, numel).double()
        wanted += gradient.double()
        quantizer.decode_shard(payload, part, residual, factor=-1.0, add=True)
    torch.testing.assert_close(sent + residual.double(), wanted, rtol=0, atol=1e-4)
    assert residual.square().mean() < 1, "it stays below one gradient"


def test_residuals_follow_parameters_into_other_buckets() -> None:
    feedback = ErrorFeedback()
    cpu = torch.device("cpu")
    feedback.flat((3, 1), (2, 3), cpu).copy_(torch.arange(5.0))
    feedback.flat((2,), (4,), cpu).fill_(9)
    again = feedback.flat((1, 2), (3, 4), cpu)
    assert again.tolist() == [2, 3, 4, 9, 9, 9, 9]
    assert feedback.flat((3,), (2,), cpu).tolist() == [0, 1]
    again.fill_(7)
    other = ErrorFeedback()
    other.load_state_dict(feedback.state_dict())
    assert other.flat((1, 3), (3, 2), cpu).tolist() == [7, 7, 7, 0, 1]
    feedback.clear()
    assert feedback.flat((1, 2), (3, 4), cpu).count_nonzero() == 0


def test_what_was_loaded_is_forgotten_too_and_stays_in_the_state() -> None:
    feedback, state = ErrorFeedback(), {"0": torch.ones(3), "1": torch.ones(2)}
    feedback.load_state_dict(state)
    feedback.flat((1,), (2,), torch.device("cpu"))
    feedback.clear()
    assert feedback.flat((0, 1), (3, 2), torch.device("cpu")).count_nonzero() == 0
    assert all(bool((saved == 1).all()) for saved in state.values())


def test_a_bucket_that_is_used_again_keeps_its_residuals() -> None:
    feedback = ErrorFeedback()
    cpu = torch.device("cpu")
    first = feedback.flat((0, 1), (8, 8), cpu)
    assert feedback.flat((0, 1), (8, 8), cpu) is first


class Alone:
    """A link with nobody at the other end."""

    rank, world_size = 0, 1

    def start(self, tag: int, outgoing: object, incoming: object) -> Alone:
        assert not outgoing
        assert not incoming
        return self

    received: ClassVar[dict[int, torch.Tensor]] = {}

    def wait(self) -> None: ...
    def check(self) -> None: ...
    def then(self, call: Callable[[], None]) -> None: ...
    def close(self) -> None: ...


def test_the_exchange_feeds_back_what_it_left_out() -> None:
    """Over many updates the means add up to the gradients, but for the last residual and the fine rounding down."""
    numel, steps = 4096, 60
    feedback = ErrorFeedback()
    lane = QuantizedLane(Quantizer(bits=3), Quantizer(bits=8))
    lane.bind(Context(Alone(), torch.device("cpu"), [torch.Size([numel])], 1, WireMeter(), feedback))
    (portion,) = lane.portions(Bucket((0,), (numel,)), [0])
    total, wanted = torch.zeros(numel), torch.zeros(numel)
    gradient = torch.randn(numel, generator=torch.Generator().manual_seed(3))
    for step in range(steps):
        buffer = gradient.clone()
        run(lane.exchange(buffer, portion, step, 8))
        total += buffer
        wanted += gradient
    residual = feedback.flat((0,), (numel,), torch.device("cpu"))
    error = (total + residual - wanted).square().mean().sqrt()
    assert error < 0.05 * steps**0.5, "only the rounding of the way down is lost"
    assert 0 < residual.square().mean() < 1


def test_a_gradient_that_is_not_finite_clears_all_residuals() -> None:
    feedback = ErrorFeedback()
    cpu = torch.device("cpu")
    flats = [feedback.flat((i,), (8,), cpu).fill_(1) for i in range(2)]
    feedback.clear_unless(torch.tensor(True))
    assert [flat.tolist() for flat in flats] == [[1] * 8] * 2
    feedback.clear_unless(torch.tensor(False))
    assert [flat.count_nonzero() for flat in flats] == [0, 0]


def test_residuals_are_in_the_routes_state() -> None:
    route = QuantizedAllReduce()
    assert route._feedback is not None
    route._feedback.flat((0,), (8,), torch.device("cpu")).fill_(2)
    other = QuantizedAllReduce()
    other.load_state_dict(route.state_dict())
    assert other._feedback is not None
    assert other._feedback.flat((0,), (8,), torch.device("cpu")).tolist() == [2] * 8


def test_a_matrix_without_elements_has_no_rows_to_send() -> None:
    lane = RowsLane(Quantizer(bits=3), Quantizer(bits=3))
    shapes = [torch.Size([0, 4]), torch.Size([3, 4])]
    lane.bind(Context(Alone(), torch.device("cpu"), shapes, 1, WireMeter(), None))
    (portion,) = lane.portions(Bucket((0, 1), (0, 12)), [0, 1])
    assert (portion.tensors, portion.numel) == ([1], 12)


def test_buckets_that_come_back_hold_what_others_have_left_since() -> None:
    feedback, cpu = ErrorFeedback(), torch.device("cpu")
    feedback.flat((0, 1), (1, 1), cpu).fill_(1)
    feedback.flat((1, 0), (1, 1), cpu).fill_(2)  # DDP has rebuilt its buckets, and a resumed run has the first ones
    assert feedback.flat((0, 1), (1, 1), cpu).tolist() == [2, 2]


def test_a_state_is_of_its_moment_and_replaces_residuals_in_use() -> None:
    feedback, cpu = ErrorFeedback(), torch.device("cpu")
    feedback.flat((0,), (2,), cpu).fill_(1)
    saved = feedback.state_dict()
    feedback.flat((0,), (2,), cpu).fill_(5)
    assert saved["0"].tolist() == [1, 1]
    feedback.load_state_dict(saved)
    assert feedback.flat((0,), (2,), cpu).tolist() == [1, 1]


SHAPE = torch.Size([50, 64])


def exchanged(kind: type[Lane], feedback: ErrorFeedback | None, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    lane: Any = kind(Quantizer(bits=3, clip=0), Quantizer(bits=8, clip=0))  # type: ignore[call-arg]
    lane.bind(Context(Alone(), torch.device("cpu"), [SHAPE], 1, WireMeter(), feedback))
    (portion,) = lane.portions(Bucket((0,), (SHAPE.numel(),)), [0])
    found = [gradient.clone() for gradient in gradients]
    for step, buffer in enumerate(found):
        run(lane.exchange(buffer.view(-1), portion, step, 8))
    return found


def test_what_was_left_out_of_a_row_waits_until_the_row_is_touched_again() -> None:
    gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    gradients = [gradient * ((torch.arange(50) + step) % 2)[:, None] for step in range(60)]
    feedback = ErrorFeedback()
    found = exchanged(RowsLane, feedback, gradients)
    assert all(torch.equal(mean.any(dim=1), wanted.any(dim=1)) for mean, wanted in zip(found, gradients, strict=True))
    residual = feedback.flat((0,), (SHAPE.numel(),), torch.device("cpu")).view(SHAPE)
    error = (sum(found) + residual - sum(gradients)).square().mean().sqrt()
    assert error < 0.05 * 60**0.5, "only the rounding of the way down is lost"
    assert 0 < residual.square().mean() < 2


@pytest.mark.parametrize("kind", [QuantizedLane, RowsLane])
def test_each_update_rounds_anew(kind: type[Lane]) -> None:
    gradient = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    found = exchanged(kind, None, [gradient] * 50)
    once, mean = ((each - gradient).norm() for each in (found[0], sum(found) / 50))
    assert mean < 0.3 * once, "without feedback or a clip the errors of the same gradient average out"
