"""The wire meter: bytes that this rank handed to collectives for other ranks, beside what fp32 would have cost."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass
class WireMeter:
    """Payload bytes sent by this rank since the start of the run; headers of the transport are not counted."""

    up_bytes: int = 0
    """Sent towards the owners of shards."""
    down_bytes: int = 0
    """Sent by this rank as an owner, to all others."""
    node_bytes: int = 0
    """Sent in full precision to ranks of the same node (`levels: node`); not in `bytes_sent`, as no card carries it."""
    fp32_bytes: float = 0.0
    """What a ring all-reduce in fp32 would have sent for the same gradients: 2 (n-1)/n * 4 bytes an element."""
    updates: int = 0
    """Exchanges of a whole gradient; an update that the loss scaler skipped counts, its bytes were sent."""

    @property
    def bytes_sent(self) -> int:
        """Up and down together, between nodes where there are two levels."""
        return self.up_bytes + self.down_bytes

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than fp32; 1 where nothing was sent."""
        return self.fp32_bytes / self.bytes_sent if self.bytes_sent else 1.0

    def add(self, *, up: int = 0, down: int = 0, node: int = 0) -> None:
        """Counts what was sent."""
        self.up_bytes += up
        self.down_bytes += down
        self.node_bytes += node

    def instead(self, numel: int, world_size: int) -> None:
        """Counts what fp32 would have sent for `numel` elements."""
        self.fp32_bytes += 2 * (world_size - 1) / world_size * 4 * numel

    def state_dict(self) -> dict[str, int | float]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int | float]) -> None:
        """Raises ValueError when a figure is missing."""
        for field in fields(self):
            if field.name not in state:
                raise ValueError(f"meter.{field.name}: missing in the saved state; it has {', '.join(sorted(state))}")
            setattr(self, field.name, state[field.name])
