"""DeepSpeed in the place of DDP and AdamW, in whole runs of two workers and in a torchrun job of this very file."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1]))  # when torchrun starts this file
from tenko_run import WHOLE, all_gone, finish, run_arguments, start, tenko, wait_for_checkpoint
from toy_training import TIMINGS, differing, toy_model

from tenko.nmt.corpus import Corpus

pytestmark = [
    pytest.mark.torchrun,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs `pip install tenko[deepspeed]`"),
]
ZERO = {"train.engine": "deepspeed", "comm.route": "fp32"}
SETTINGS = {
    "train.max_update": "20",
    "train.update_freq": "2",
    "train.clip_norm": "0.2",  # below every norm of this run: it clips
    "train.max_tokens": "300",
    "train.log_interval": "1",
    "train.save_interval": "20",
    "train.valid_interval": "20",
    "train.valid_sentences": "4",
}


def lines(directory: Path) -> list[dict[str, Any]]:
    text = (directory / "1-train" / "metrics.jsonl").read_text()
    return [line for line in map(json.loads, text.splitlines()) if line["kind"] == "train"]


def weights(directory: Path, update: int) -> dict[str, torch.Tensor]:
    return load_file(directory / "1-train" / "checkpoints" / f"update-{update:08d}" / "model.safetensors")


@pytest.fixture(scope="module")
def ddp(small_tsv: Path, small_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs with DDP, by precision."""
    runs = {precision: tmp_path_factory.mktemp("ddp") / precision for precision in ("fp32", "bf16")}
    for precision, directory in runs.items():
        settings = {**SETTINGS, "train.precision": precision, "comm.route": "fp32"}
        done = tenko(*run_arguments(directory, small_tsv, **settings))
        assert done.code == 0, done.errors
    return runs


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 1), ("fp32", 2), ("bf16", 1)])
def test_zero_gives_the_curve_of_ddp(
    ddp: dict[str, Path], small_tsv: Path, tmp_path: Path, precision: str, stage: int
) -> None:
    settings = {**SETTINGS, **ZERO, "train.precision": precision, "train.zero_stage": str(stage)}
    done = tenko(*run_arguments(tmp_path / "run", small_tsv, **settings))
    assert done.code == 0, done.errors
    ours, theirs = lines(tmp_path / "run"), lines(ddp[precision])
    assert [line["update"] for line in ours] == list(range(1, 21))
    assert theirs[-1]["loss"] < theirs[0]["loss"] - 0.3, "20 updates teach something"
    assert min(line["grad_norm"] for line in theirs) > float(SETTINGS["train.clip_norm"])
    near = 1e-4 if precision == "fp32" else 5e-3  # bf16 rounds 2^-9 off: a bit more here is a bit more there
    for our, their in zip(ours, theirs, strict=True):
        assert our["lr"] == their["lr"]
        assert our["loss"] == pytest.approx(their["loss"], rel=near)
        assert our["grad_norm"] == pytest.approx(their["grad_norm"], rel=100 * near)
    # each worker keeps the moments of half of the parameters
    total = sum(tensor.numel() for tensor in weights(tmp_path / "run", 20).values())
    folder = tmp_path / "run" / "1-train" / "checkpoints" / "update-00000020"
    for rank in (0, 1):
        state = torch.load(folder / f"rank-{rank}.pt", weights_only=True)["engine"]["optimizer"]["state"]
        assert sum(moments["exp_avg"].numel() for moments in state.values()) == pytest.approx(total / 2, abs=16)


def test_cut_and_resumed_equals_uncut(small_tsv: Path, tmp_path: Path) -> None:
    settings = {**WHOLE, **ZERO, "train.zero_stage": "2", "train.max_update": "60"}
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    assert tenko(*run_arguments(uncut, small_tsv, **settings)).code == 0
    process = start(*run_arguments(cut, small_tsv, **settings))
    begun = wait_for_checkpoint(process, cut)
    process.send_signal(signal.SIGINT)
    assert finish(process).code == 130
    assert all_gone(cut)
    assert begun < 60
    done = tenko(*run_arguments(cut, small_tsv, **settings))
    assert done.code == 0, done.errors
    assert "goes on from update" in done.out + "\n".join(done.errors)
    assert differing(weights(cut, 60), weights(uncut, 60)) == []
    figures = [
        [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines(d)] for d in (cut, uncut)
    ]
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"comm.route": "all_reduce"}, r"comm\.route: must be fp32 with engine: deepspeed, .*, is all_reduce"),
        ({"train.precision": "fp16"}, r"train\.precision: must be fp32, bf16 or auto with engine: deepspeed, is fp16"),
        ({"train.zero_stage": "3"}, r"train\.zero_stage: must be one of 1, 2, is 3"),
    ],
)
def test_what_does_not_go_with_deepspeed_is_refused_in_a_line(
    small_tsv: Path, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    done = tenko(*run_arguments(tmp_path / "run", small_tsv, **{**ZERO, **settings}))
    assert done.code == 2
    assert len(done.errors) == 1
    assert re.search(message, done.errors[0]), done.errors
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_gradient_that_is_not_finite_on_one_rank_skips_the_update_on_both(
    small_corpus: Corpus, tmp_path: Path, stage: int
) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    done = subprocess.run(
        [*command, str(small_corpus.path), str(tmp_path), str(stage)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert "holds: overflow" in done.stdout


def overflow(corpus: Corpus, folder: Path, stage: int) -> None:
    """One rank: an update, one with a NaN on rank 1, one more; and a state of another rank's share is refused."""
    from accelerate import Accelerator

    from tenko.nmt import distributed
    from tenko.nmt.batches import UpdateStream
    from tenko.nmt.config import TrainConfig
    from tenko.nmt.deepspeed_engine import ZeroEngine, plugin
    from tenko.nmt.trainer import Trainer

    precision = "bf16" if stage == 2 else "fp32"
    config = TrainConfig(precision=precision, lr=5e-3, warmup_updates=4, engine="deepspeed", zero_stage=stage)
    accelerator = Accelerator(deepspeed_plugin=plugin(config.zero_stage, config.clip_norm), mixed_precision="no")
    rank = distributed.rank()
    assert distributed.world_size() == 2
    stream = UpdateStream(corpus.split("train"), "en-cs", seed=1, max_tokens=300, update_freq=2, rank=rank, world=2)
    engine = partial(ZeroEngine, accelerator)
    trainer = Trainer(toy_model(corpus), stream, config, seed=1, checkpoints=folder, engine=engine)

    def everything() -> dict[str, torch.Tensor]:
        tensors = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
        moments = trainer.engine.state_dict()["optimizer"]["state"][0]
        return {**tensors, **{key: value.clone() for key, value in moments.items()}}

    trainer.update()
    before = everything()
    poisoned = trainer.parameters["decoder.layers.0.fc2.weight"]
    handle = poisoned.register_hook(lambda gradient: gradient * math.nan if rank == 1 else gradient)
    trainer.update()
    handle.remove()
    assert differing(everything(), before) == []
    assert trainer._figures(0.0)["overflows"] == 1
    trainer.update()
    after = everything()
    assert len(differing(after, before)) > 0.9 * len(after)
    assert trainer._figures(0.0).get("overflows") is None
    distributed.assert_ranks_agree(trainer.parameters.values(), "weights")

    # The engine's own autocast: on a GPU DeepSpeed ends the one that the trainer began.
    seen: list[torch.dtype] = []
    handle = trainer.model.decoder.layers[0].fc1.register_forward_hook(lambda *call: seen.append(call[2].dtype))
    trainer.wrapped(stream.update(1).samples[0])
    handle.remove()
    assert seen == [torch.bfloat16 if stage == 2 else torch.float32]

    state = trainer.engine.state_dict()
    with pytest.raises(ValueError, match=r"train\.engine: .* is not there"):
        trainer.engine.load_state_dict(None)
    with pytest.raises(ValueError, match=r"train\.engine: .* for a share of 7 elements, its share is \d+;"):
        trainer.engine.load_state_dict({**state, "share": [7]})
    trainer.engine.load_state_dict(state)
    distributed.barrier()
    if rank == 0:
        print("holds: overflow", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    overflow(Corpus.open(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
