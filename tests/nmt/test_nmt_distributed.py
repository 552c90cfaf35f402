"""The collectives of translation in a single process; with several ranks they run in tests/integration."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tenko.nmt import distributed


def test_a_single_process_needs_no_group() -> None:
    assert not dist.is_initialized()
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    distributed.barrier()
    assert distributed.sum_over_ranks([1.5, 2.0]) == [1.5, 2.0]
    assert distributed.gather_json({"č": [1, None]}) == [{"č": [1, None]}]
    distributed.assert_ranks_agree([torch.zeros(3)], "weights")


def test_checksum_sees_every_bit_and_the_order() -> None:
    tensors = [torch.arange(6.0).reshape(2, 3), torch.ones(2)]
    before = distributed.checksum(tensors)
    assert distributed.checksum([t.clone() for t in tensors]) == before
    assert distributed.checksum([t.t().contiguous().t() for t in tensors[:1]] + tensors[1:]) == before
    assert distributed.checksum(tensors[::-1]) != before
    assert distributed.checksum([torch.tensor(2.0)]) != distributed.checksum([torch.tensor(3.0)]), "a lone number"
    tensors[1].view(torch.int32)[0] += 1  # one ulp
    assert distributed.checksum(tensors) != before
    zeros = torch.zeros(2)
    assert distributed.checksum([zeros]) != distributed.checksum([-zeros]), "equal, but not the same bits"


def test_ranks_that_differ_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "gather_json", lambda value, device: [value, "f" * 64])
    with pytest.raises(RuntimeError, match=r"\Aweights differ between ranks \(rank 0: \w{12}, rank 1: f{12}\)"):
        distributed.assert_ranks_agree([torch.zeros(3)], "weights")
