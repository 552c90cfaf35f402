"""A node that never becomes part of a run which has begun: its end is not the run's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

from tenko.launch import rendezvous
from tenko.launch.errors import BAD_INPUT, NotBegun
from tenko.launch.nodes import Nodes
from tenko.launch.rendezvous import Meeting, Rendezvous
from tenko.launch.spawn import _explained
from tenko.launch.watchdog import Crew


def test_a_node_that_nobody_takes_in_gives_up_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "LAST_CALL_SECONDS", 1)
    with Meeting(Nodes(least=1, most=2)) as host:
        first = Rendezvous(host)
        assert first.next_rendezvous().world_size == 1
        assert not first.goes_on_without_us()
        with Meeting(Nodes(least=1, most=2, port=host.port, bind=None, join_seconds=1)) as meeting:
            late = Rendezvous(meeting)
            with pytest.raises(RendezvousTimeoutError) as waited:  # no agent of the first node looks who has come
                late.next_rendezvous()
            said = _explained(waited.value, cast(Any, SimpleNamespace(rendezvous=late)), meeting, Crew())
            assert isinstance(said, NotBegun)
            words = f"the run at 127.0.0.1:{host.port} has begun, and this node could not join within 1 s"
            assert (str(said), said.code) == (f"--rendezvous: {words}", BAD_INPUT)
            late.leave()
        assert host.verdict() is None
        assert not first.is_closed()
        first.leave()
        assert first.is_closed()
