"""The keys that the ranks of one start share in a store which outlives them.

torchrun's store stays while its workers are started anew, and tells them nothing that all of them know of their start:
TORCHELASTIC_RESTART_COUNT is counted on each node for itself, and a start because a node joined or left is not counted
at all. So ranks introduce themselves: rank 0 draws a name for the start, and names in its list those that it has heard
under that name. What a dead rank 0 left in the store lists others, and is asked again.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed import Store

SESSION = "tenko/session"
_POLL_SECONDS = 0.05
"""`check`, not `wait`: a wait that times out logs a warning in C++ each time."""


def share(store: Store, *, rank: int, size: int, seconds: float) -> Store:
    """Wait until all ranks of this start are there; called by each.

    Args:
        store: of the launcher; may hold what earlier starts left.
        rank, size: of this process, and how many there are.
        seconds: to wait for the others.

    Returns:
        The store under a prefix that only the ranks of this start know.

    Raises:
        TimeoutError: not all of them came.
    """
    from torch.distributed import PrefixStore

    deadline = time.monotonic() + seconds
    mine = secrets.token_hex(8)
    shared: Store
    if rank == 0:
        shared = PrefixStore(f"tenko/{mine}", store)
        store.set(SESSION, mine)
        missing = list(range(1, size))
        while missing := [other for other in missing if not shared.check([f"here/{other}"])]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"waited {seconds:g} s for rank {', '.join(map(str, missing[:8]))}")
            time.sleep(_POLL_SECONDS)
        shared.set("all", json.dumps([mine, *(shared.get(f"here/{other}").decode() for other in range(1, size))]))
        return shared
    while time.monotonic() < deadline:
        if store.check([SESSION]):
            shared = PrefixStore(f"tenko/{store.get(SESSION).decode()}", store)
            shared.set(f"here/{rank}", mine)
            if shared.check(["all"]):
                known = json.loads(shared.get("all"))
                if len(known) == size and known[rank] == mine:
                    return shared
        time.sleep(_POLL_SECONDS)
    raise TimeoutError(f"waited {seconds:g} s for rank 0")
