"""A real training that is killed, started anew, stopped on notice and gone on with equals an uncut one bit for bit.

3-bit gradients, accumulation and dropout are on."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tenko_run import WHOLE, all_gone, finish, result, run_arguments, start, tenko, wait_for_checkpoint, workers
from toy_training import differing

from tenko.nmt.corpus import Corpus

pytestmark = pytest.mark.torchrun
SAVED = re.compile(r"tenko: stopped on notice, saved at update (\d+); the same command goes on from there")


def weights(directory: Path) -> dict[str, object]:
    return load_file(directory / "1-train" / "artefact" / "model.safetensors")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_and_stopped_on_notice_equals_an_uncut_one(
    tmp_path: Path, small_tsv: Path, small_corpus: Corpus, ranks: int
) -> None:
    settings = {**WHOLE, "train.max_update": "80", "train.valid_interval": "80", "workers": str(ranks)}
    uncut = tmp_path / "uncut"
    assert tenko(*run_arguments(uncut, small_tsv, **settings)).code == 0
    directory = tmp_path / "cut"
    arguments = run_arguments(directory, small_tsv, **settings)

    process = start(*arguments, *(["--max-restarts", "1"] if ranks > 1 else []))
    update = wait_for_checkpoint(process, directory)
    if ranks > 1:
        before = workers(directory)
        os.kill(before[0], signal.SIGKILL)
        while len(workers(directory)) < ranks or set(before) & set(workers(directory)):
            assert process.poll() is None, finish(process)
        update = wait_for_checkpoint(process, directory, after=update)
    process.send_signal(signal.SIGUSR1)
    done = finish(process)
    assert done.code == 75, done
    assert len(done.errors) == 1
    said = SAVED.fullmatch(done.errors[0])
    assert said, done.errors
    assert int(said[1]) >= update
    assert (directory / "1-train" / "checkpoints" / f"update-{int(said[1]):08d}").is_dir()
    assert all_gone(directory)
    if ranks > 1:
        assert "starts anew (1 of 1)" in done.out

    done = tenko(*arguments)
    assert (done.code, done.errors) == (0, [])
    assert f"goes on from update {said[1]}" in done.out
    assert differing(weights(directory), weights(uncut)) == []
    assert result(directory, "2-quantize")["bleu"] == result(uncut, "2-quantize")["bleu"]
    shutil.rmtree(tmp_path)
