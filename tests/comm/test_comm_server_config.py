"""What workers and dedicated servers tell each other is checked, and both make the same of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tenko.comm import server_state
from tenko.comm.server_config import Plan, ServerConfig, Tensors, difference, from_json, to_json

TENSORS = Tensors(("a", "b", "c", "d"), (5000, 7, 300, 2049), (50, 0, 3, 0))


def test_settings_survive_the_way() -> None:
    config = ServerConfig(bits=4, betas=(0.9, 0.98), clip_norm=1, staleness=3)
    assert from_json(to_json(config, TENSORS)) == (config, TENSORS)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bits", 9, "bits: must be one of"),
        ("bits", 3.0, "bits: must be int, is 3.0"),
        ("bits", True, "bits: must be int, is True"),
        ("weight_bits", 12, "weight_bits: must be one of 2, 3"),
        ("clip", -1, "clip: must be finite"),
        ("clip", "3", "clip: must be float, is '3'"),
        ("clip_norm", float("inf"), "clip_norm: must be finite"),
        ("block", 12, "block: must be a multiple of 8"),
        ("weight_block", 0, "weight_block: must be"),
        ("betas", [0.9], "betas: must be two"),
        ("betas", ["a", "b"], "betas: must be numbers"),
        ("betas", [0.9, 1.0], "betas: must be two"),
        ("staleness", -1, "staleness: must be"),
        ("timeout", 0.0, "timeout: must be"),
        ("colour", 1, "colour: no such setting"),
        ("eps", None, "eps: must be float"),
    ],
)
def test_wrong_settings_are_named(key: str, value: Any, message: str) -> None:
    told = json.loads(to_json(ServerConfig(), TENSORS))
    told["config"][key] = value
    with pytest.raises(ValueError, match=message):
        from_json(json.dumps(told))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version: must be 1, is 2"),
        ({"config": None}, "settings: must hold"),
        ({"tensors": {"names": ["a"], "numels": [1], "rows": []}}, "tensors: .* one length"),
        ({"tensors": {"names": ["a"], "numels": [-1], "rows": [0]}}, "tensors: .* whole numbers"),
        ({"tensors": {"names": "a"}}, "tensors: must hold lists"),
    ],
)
def test_wrong_messages_are_refused(change: dict[str, Any], message: str) -> None:
    told = {**json.loads(to_json(ServerConfig(), TENSORS)), **change}
    with pytest.raises(ValueError, match=message):
        from_json(json.dumps(told))
    with pytest.raises(ValueError, match="settings: must be JSON"):
        from_json("{")
    with pytest.raises(ValueError, match="version: must be 1, is None"):
        from_json("[1]")


def test_missing_setting_and_sign_without_feedback_are_named() -> None:
    told = json.loads(to_json(ServerConfig(), TENSORS))
    del told["config"]["seed"]
    with pytest.raises(ValueError, match="seed: missing"):
        from_json(json.dumps(told))
    with pytest.raises(ValueError, match="bits: 1 is a sign"):
        ServerConfig(bits=1, error_feedback=False)


def test_difference_names_the_first_parameter() -> None:
    other = Tensors(("a", "b", "x", "d"), TENSORS.numels, TENSORS.rows)
    assert difference(TENSORS, TENSORS) == ""
    assert difference(TENSORS, other) == "c [300] and x [300]"
    assert difference(TENSORS, Tensors(("a",), (5000,), (50,))) == "4 parameters and 1"


@pytest.mark.parametrize("servers", [1, 2, 3, 7])
@pytest.mark.parametrize("present", [[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]])
def test_both_sides_read_a_push_alike(servers: int, present: list[int]) -> None:
    plan = Plan(ServerConfig(bits=4, clip=0.0), TENSORS, servers)
    has = np.array(present, dtype=bool)
    flat = torch.randn(TENSORS.numel, generator=torch.Generator().manual_seed(0))
    result = torch.full_like(flat, torch.nan)
    for server in range(servers):
        part = plan.part(server, has)
        codes = torch.empty(part.size(4), dtype=torch.uint8)
        plan.quantizer.encode_shard(flat, part, np.zeros((len(part.table), 2), dtype=np.uint32), codes)
        assert plan.push_size(server, has) == 1 + codes.numel()
        own = torch.full((plan.shards[server].numel,), torch.nan)
        plan.quantizer.decode_shard(codes, plan.part(server, has, compact=True), own)
        for (start, numel, *_), (at, *_) in zip(
            plan.shards[server].table, plan.shards[server].compact().table, strict=True
        ):
            result[start : start + numel] = own[at : at + numel]
        assert set(part.tensors.tolist()) <= set(np.flatnonzero(has).tolist())
    for start, numel, some in zip(TENSORS.starts, TENSORS.numels, has, strict=True):
        piece = result[start : start + numel]
        assert bool(torch.isfinite(piece).all()) if some else bool(piece.isnan().all())
        if some:
            assert float((piece - flat[start : start + numel]).abs().max()) < 0.7


def test_state_counts_only_when_complete(tmp_path: Path) -> None:
    for update in (4, 8, 12):
        here = server_state.folder_of(tmp_path, update)
        server_state.write(here / "server-0.safetensors", {"x": torch.arange(3)}, {"format": "t"})
        assert server_state.updates(tmp_path)[-1:] != [update]
        server_state.complete(tmp_path, update, workers=3, servers=1)
    server_state.write(server_state.folder_of(tmp_path, 16) / "server-0.safetensors", {}, {})
    assert server_state.updates(tmp_path) == [8, 12]
    tensors, facts = server_state.read(server_state.folder_of(tmp_path, 12) / "server-0.safetensors")
    assert tensors["x"].tolist() == [0, 1, 2]
    assert facts == {"format": "t"}
    server_state.check(tmp_path, 12, workers=3, servers=1)
    with pytest.raises(ValueError, match="saved by 3 workers and 1 servers, but these are 2 and 1"):
        server_state.check(tmp_path, 12, workers=2, servers=1)


def test_damaged_state_is_named(tmp_path: Path) -> None:
    path = tmp_path / "server-0.safetensors"
    with pytest.raises(ValueError, match=r"server-0\.safetensors: missing or damaged"):
        server_state.read(path)
    server_state.write(path, {"x": torch.arange(1000)}, {})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"server-0\.safetensors: missing or damaged"):
        server_state.read(path)
    with pytest.raises(OSError, match=r"cannot write the state|Not a directory|exists"):
        server_state.write(path / "under" / "x.safetensors", {"x": torch.arange(3)}, {})
