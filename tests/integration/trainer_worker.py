"""One rank of the trainer's tests: `torchrun trainer_worker.py RANKS CORPUS FOLDER NAME...`; fails if one is broken."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[1]))
from processes import leave
from toy_training import differing, snapshot, toy_trainer, train, validations

from tenko.comm import AllReduce, CommConfig, QuantizedAllReduce, Route, SplitRule, make_route, register
from tenko.nmt import distributed
from tenko.nmt.corpus import Corpus
from tenko.nmt.trainer import Trainer

# Checkpoints fall between lines of metrics; buckets are many, so that DDP rebuilds them after the first update.
RESUME: dict[str, Any] = {
    "max_update": 8,
    "save_interval": 3,
    "log_interval": 2,
    "valid_interval": 4,
    "update_freq": 2,
    "dropout": 0.1,
    "switchout": 0.1,
}


def wrap(route: Route) -> Callable[[nn.Module], tuple[nn.Module, Route]]:
    def wrapped(module: nn.Module) -> tuple[nn.Module, Route]:
        model = DistributedDataParallel(
            module, bucket_cap_mb=0.01, gradient_as_bucket_view=True, forward_sync_buffers=False
        )
        return model, register(model, route)

    return wrapped


def trainer_of(corpus: Corpus, folder: Path, route: Route, **settings: Any) -> Trainer:
    return toy_trainer(corpus, folder, rank=dist.get_rank(), world=dist.get_world_size(), wrap=wrap(route), **settings)


def write(folder: Path, name: str, trainer: Trainer, lines: list[dict[str, Any]]) -> None:
    """What the test compares; the ranks must hold the same bits."""
    tensors = snapshot(trainer)
    distributed.assert_ranks_agree((tensors[key] for key in sorted(tensors)), "weights and moments")
    assert trainer.route is not None
    meters = distributed.gather_json(trainer.route.meter.state_dict())
    if dist.get_rank() == 0:
        torch.save(tensors, folder / f"{name}.pt")
        (folder / f"{name}.json").write_text(json.dumps({"lines": lines, "meters": meters}))


def uncut(corpus: Corpus, folder: Path) -> None:
    trainer = trainer_of(corpus, folder / "uncut", QuantizedAllReduce(bits=3, seed=1), **RESUME)
    write(folder, "uncut", trainer, train(trainer, corpus))
    assert trainer.route is not None
    trainer.route.close()


def cut(corpus: Corpus, folder: Path) -> None:
    trainer = trainer_of(corpus, folder / "cut", QuantizedAllReduce(bits=3, seed=1), **RESUME)
    lines = train(trainer, corpus, cut=5)
    assert trainer.updates == 5
    if dist.get_rank() == 0:
        (folder / "before.json").write_text(json.dumps([line for line in lines if line["update"] <= 3]))
    assert trainer.route is not None
    trainer.route.close()


def resume(corpus: Corpus, folder: Path) -> None:
    trainer = trainer_of(corpus, folder / "cut", QuantizedAllReduce(bits=3, seed=1), **RESUME)
    assert trainer.resume()
    assert trainer.updates == 3
    write(folder, "resumed", trainer, train(trainer, corpus))


RULES = (
    SplitRule(route="rows", match=("*embed_tokens*",)),
    SplitRule(route="server", min_dims=2, exclude=("*embed_tokens*",)),
    SplitRule(route="fp16", max_dims=1),
)
OTHERS = {
    "server": CommConfig(route="server"),
    "delta": CommConfig(route="server", weights="delta"),
    "split": CommConfig(route="split", split=RULES),
    "shared": CommConfig(shared_scale=True),
    "one-bit": CommConfig(bits=1),
}


def others_cut(corpus: Corpus, folder: Path) -> None:
    """Leaves checkpoints of cut runs by the other routes, and the weights of uncut ones."""
    for name, config in OTHERS.items():
        for kind, cut in (("uncut", None), ("cut", 5)):
            trainer = trainer_of(corpus, folder / f"{name}-{kind}", make_route(config, 1), **RESUME)
            train(trainer, corpus, cut=cut)
            distributed.assert_ranks_agree(trainer.parameters.values(), name)
            assert trainer.route is not None
            torch.save(
                {"weights": dict(trainer.parameters), "route": trainer.route.state_dict()},
                folder / f"{name}-{kind}-{dist.get_rank()}.pt",
            )
            trainer.route.close()


def others_resume(corpus: Corpus, folder: Path) -> None:
    """They go on from update 3 to the same bits, the owners' weights and moments included."""
    for name, config in OTHERS.items():
        trainer = trainer_of(corpus, folder / f"{name}-cut", make_route(config, 1), **RESUME)
        assert trainer.resume()
        assert trainer.updates == 3
        train(trainer, corpus)
        uncut = torch.load(folder / f"{name}-uncut-{dist.get_rank()}.pt", weights_only=True)
        assert differing(dict(trainer.parameters), uncut["weights"]) == [], name
        assert trainer.route is not None
        state = trainer.route.state_dict()
        for key, value in (uncut["route"]["server"] or {}).items() if "server" in state else ():
            assert torch.equal(value, state["server"][key]), (name, key)
        assert state["meter"] == uncut["route"]["meter"], "bytes of before the cut are counted once"
        trainer.route.close()


def two_batches(corpus: Corpus, folder: Path) -> None:
    """Two ranks with a batch each; the test does the same alone with two accumulated batches."""
    trainer = trainer_of(corpus, folder / "none", AllReduce(), max_update=4, log_interval=2, valid_interval=4)
    write(folder, "two", trainer, train(trainer, corpus))


def accumulate(corpus: Corpus, folder: Path) -> None:
    """Bytes cross once an update, not once a micro-batch."""
    trainer = trainer_of(corpus, folder / "none", AllReduce(), update_freq=3)
    assert trainer.route is not None
    trainer.update()
    elements = sum(p.numel() for p in trainer.parameters.values())
    assert trainer.route.meter.updates == 1
    assert trainer.route.meter.bytes_sent == pytest.approx(4 * elements, rel=0.01)  # 2 (n-1)/n * 4 bytes, n = 2


def overflow(corpus: Corpus, folder: Path) -> None:
    """A NaN on one rank skips the update on both, in fp32 and in fp16, where the scale halves on both."""
    server = CommConfig(route="server", weight_bits=32)
    for precision, config in (("fp32", CommConfig()), ("fp16", CommConfig()), ("fp32", server), ("fp16", server)):
        route = make_route(config, 1)
        trainer = trainer_of(corpus, folder / "none", route, precision=precision, init_scale=64.0)
        trainer.update()
        before = snapshot(trainer)
        handle = trainer.parameters["decoder.layers.0.fc2.weight"].register_hook(
            lambda g: g * math.nan if dist.get_rank() == 1 else g
        )
        trainer.update()
        handle.remove()
        assert differing(snapshot(trainer), before) == []
        assert trainer._figures(0.0)["overflows"] == 1
        assert trainer.scaler.get_scale() == (32.0 if precision == "fp16" else 1.0)
        trainer.update()
        after = snapshot(trainer)
        # key biases get no gradient to speak of; with a gradient of zero they may stay
        assert len(differing(after, before)) > 0.9 * len(after)
        distributed.assert_ranks_agree((after[key] for key in sorted(after)), "weights")
        route.close()


def collectives(corpus: Corpus, folder: Path) -> None:
    rank = dist.get_rank()
    assert (distributed.rank(), distributed.world_size()) == (rank, 2)
    assert distributed.sum_over_ranks([1.0, rank]) == [2.0, 1.0]
    mine = {"rank": rank, "text": "žluťoučký kůň\n" * (1 + 50 * rank)}
    both = distributed.gather_json(mine)
    assert both[rank] == mine
    assert [value["rank"] for value in both] == [0, 1]
    assert len(both[1]["text"]) == 51 * len(both[0]["text"])
    same = torch.arange(3.0)
    distributed.assert_ranks_agree([same], "weights")
    with pytest.raises(RuntimeError, match=r"weights differ between ranks \(rank 0: .*, rank 1: "):
        distributed.assert_ranks_agree([same + rank * 1e-7], "weights")


# Begun by three ranks, gone on with by two and one; begun by one, gone on with by two. Three micro-batches an update.
SHARED: dict[str, Any] = {**RESUME, "precision": "fp32", "log_interval": 4, "update_freq": 1}
SERVER = CommConfig(
    route="split",
    bits=8,
    weight_bits=32,
    split=(SplitRule(route="server", min_dims=2), SplitRule(route="fp32", max_dims=1)),
)
ANEW = {"fp32": CommConfig(route="fp32"), "server": SERVER, "three-bit": CommConfig()}


def sentences(trainer: Trainer) -> dict[int, list[list[int]]]:
    """Filled as the trainer reads: this rank's sentences of each update."""
    read: dict[int, list[list[int]]] = {}
    update = trainer.stream.update

    def noted(number: int) -> Any:
        work = update(number)
        read[number] = [sample["id"].tolist() for sample in work.samples]
        return work

    trainer.stream.update = noted  # type: ignore[method-assign]
    return read


def end_of_shared(folder: Path, name: str, trainer: Trainer, read: dict[int, list[list[int]]]) -> None:
    distributed.assert_ranks_agree(trainer.parameters.values(), name)
    everybody = distributed.gather_json(read)
    assert {len(batches) for batches in read.values()} == {len(range(dist.get_rank(), 3, dist.get_world_size()))}
    if dist.get_rank() == 0:
        torch.save(dict(trainer.parameters), folder / f"{name}.pt")
        (folder / f"{name}.json").write_text(json.dumps(everybody))
    assert trainer.route is not None
    trainer.route.close()


def shared_by_three(corpus: Corpus, folder: Path) -> None:
    for name, config in ANEW.items():
        trainer = trainer_of(corpus, folder / f"{name}-3", make_route(config, 1), **SHARED)
        read = sentences(trainer)
        train(trainer, corpus)
        end_of_shared(folder, f"{name}-3", trainer, read)


def shared_by_two(corpus: Corpus, folder: Path) -> None:
    """Goes on from the three's update 3, and from the one's."""
    for source in ("fp32-3", "server-3", "three-bit-3", "server-1"):
        name, before = source.rsplit("-", 1)
        trainer = trainer_of(corpus, folder / f"{source}-to-2", make_route(ANEW[name], 1), **SHARED)
        read = sentences(trainer)
        assert trainer.resume()
        assert (trainer.updates, trainer.stream.micro_batches) == (3, 3)
        assert trainer.route is not None
        state = trainer.route.state_dict()
        assert state["step"] == (0 if before == "1" else 3)
        assert not state.get("feedback"), "it begins at zero"
        if name == "server":
            owns_what_it_says(trainer, state["server"])
        train(trainer, corpus)
        end_of_shared(folder, f"{source}-to-2", trainer, read)


def owns_what_it_says(trainer: Trainer, shard: dict[str, torch.Tensor]) -> None:
    """With 32 bits a weight, what the owners have is what everybody has; all of it has an owner."""
    at, owned, parameters = 0, 0, list(trainer.model.parameters())
    for place, start, numel in shard["segments"].tolist():
        part = parameters[place].detach().reshape(-1)[start : start + numel]
        assert torch.equal(shard["weights"][at : at + numel], part)
        at, owned = at + numel, owned + numel
    assert at == len(shard["weights"])
    assert set(shard["steps"].tolist()) == {3.0}
    assert float(shard["exp_avg_sq"].mean()) > 0
    everything = sum(p.numel() for p in parameters if p.dim() > 1)
    assert distributed.sum_over_ranks([owned]) == [everything]


def shares(corpus: Corpus, folder: Path) -> None:
    """Rank 1 is slow to read; rank 0 waits for it, whatever the route."""
    for name in ("fp32", "all_reduce", "server"):
        config = CommConfig(route=name)  # type: ignore[arg-type]
        trainer = trainer_of(corpus, folder / "none", make_route(config, 1), max_update=4, log_interval=2)
        read = trainer.stream.update

        def slow(number: int, read: Callable[[int], Any] = read) -> Any:
            if dist.get_rank() == 1:
                time.sleep(0.3)
            return read(number)

        trainer.stream.update = slow  # type: ignore[method-assign]
        line = [line for line in lines_of(trainer) if line["kind"] == "train"][-1]
        parts = [line[f"share_{part}"] for part in ("compute", "exchange", "data")]
        assert sum(parts) == pytest.approx(1)
        assert 0.25 < line["share_exchange"] < 0.6, (name, line)
        assert 0.25 < line["share_data"] < 0.6, (name, line)
        assert line["wire_bytes"] > 0
        assert trainer.route is not None
        trainer.route.close()


def lines_of(trainer: Trainer) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    trainer.run(validate=validations(1.0), on_metrics=lines.append)
    return lines


def norms(corpus: Corpus, folder: Path) -> None:
    """What is clipped by, and told, is the norm of the whole gradient, whoever holds which part of it."""
    found = []
    for config in (ANEW["fp32"], SERVER, CommConfig(route="server", bits=8, weight_bits=32)):
        trainer = trainer_of(corpus, folder / "none", make_route(config, 1), clip_norm=0.05)
        before = snapshot(trainer)
        trainer.update()
        found.append(trainer._figures(0.0)["grad_norm"])
        assert len(differing(snapshot(trainer), before)) > 0
        assert trainer.route is not None
        trainer.route.close()
    assert found[1:] == pytest.approx([found[0]] * 2, rel=0.02)
    assert distributed.gather_json(found) == [found] * 2


def diverged(corpus: Corpus, folder: Path) -> None:
    """Ranks that hold other weights are found out at the next validation, not at the end."""
    trainer = trainer_of(corpus, folder / "none", AllReduce(), max_update=4, valid_interval=2)

    def on_update(update: int) -> None:
        if update == 2 and dist.get_rank() == 1:
            with torch.no_grad():
                next(iter(trainer.parameters.values())).view(-1)[3] += 1e-3

    with pytest.raises(RuntimeError, match=r"weights after update 2 differ between ranks \(rank 0: "):
        trainer.run(validate=validations(1.0), on_update=on_update)


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        uncut,
        cut,
        resume,
        others_cut,
        others_resume,
        two_batches,
        accumulate,
        overflow,
        collectives,
        shares,
        norms,
        diverged,
        shared_by_three,
        shared_by_two,
    )
}


def main() -> None:
    corpus, folder = Corpus.open(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo")
    assert dist.get_world_size() == int(sys.argv[1])
    for scenario in sys.argv[4:]:
        SCENARIOS[scenario](corpus, folder)
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"holds: {scenario}", flush=True)
    dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    main()
