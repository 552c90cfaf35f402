"""A run cut anywhere and resumed equals the uncut run, bit for bit: fp32 on a CPU; dropout, switchout, accumulation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import Cut, differing, snapshot, toy_model, toy_trainer, train, validations

from tenko.compression import QuantNoise, QuantNoiseConfig
from tenko.compression.config import PqNoiseConfig
from tenko.compression.pq_noise import PqNoise
from tenko.nmt import checkpoint, saver, trainer_state
from tenko.nmt.corpus import Corpus
from tenko.nmt.trainer_state import final_weights, load_weights
from tenko.nmt.validate import Validation, Validator

# Checkpoints fall between lines of metrics, and validations between checkpoints: nothing coincides to help.
SETTINGS: dict[str, Any] = {
    "max_update": 8,
    "save_interval": 3,
    "log_interval": 2,
    "valid_interval": 4,
    "update_freq": 2,
    "dropout": 0.1,
    "switchout": 0.1,
}
Run = tuple[dict[str, torch.Tensor], list[dict[str, Any]], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def uncut(small_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("uncut")
    trainer = toy_trainer(small_corpus, folder, **SETTINGS)
    lines = train(trainer, small_corpus)
    assert [(line["kind"], line["update"]) for line in lines] == [
        ("train", 2),
        ("train", 4),
        ("valid", 4),
        ("train", 6),
        ("train", 8),
        ("valid", 8),
    ]
    return snapshot(trainer), lines, checkpoint.load(folder / "best")[0]


def finish(corpus: Corpus, folder: Path, **changes: Any) -> tuple[Any, int, list[dict[str, Any]]]:
    """A new process's part: fresh weights, resume, train to the end."""
    torch.manual_seed(12345)  # what a resumed run must not depend on
    trainer = toy_trainer(corpus, folder, **{**SETTINGS, **changes})
    resumed = trainer.resume()
    start = trainer.updates
    assert resumed == (start > 0)
    lines = train(trainer, corpus)
    return trainer, start, lines


@pytest.mark.parametrize(("cut", "start"), [(2, 0), (3, 0), (4, 3), (5, 3), (6, 3), (7, 6), (8, 6)])
def test_cut_and_resumed_equals_uncut(small_corpus: Corpus, tmp_path: Path, uncut: Run, cut: int, start: int) -> None:
    first = toy_trainer(small_corpus, tmp_path, **SETTINGS)
    before = train(first, small_corpus, cut=cut)
    assert first.updates == cut
    trainer, found_start, after = finish(small_corpus, tmp_path)
    assert found_start == start
    weights, lines, best = uncut
    assert differing(snapshot(trainer), weights) == []
    assert [line for line in before if line["update"] <= start] + after == lines
    assert differing(checkpoint.load(tmp_path / "best")[0], best) == []


def test_a_run_cut_twice_and_inside_a_checkpoint_equals_uncut(
    small_corpus: Corpus, tmp_path: Path, uncut: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(toy_trainer(small_corpus, tmp_path, **SETTINGS), small_corpus, cut=5)

    def killed(folder: Path, target: Path) -> None:
        raise Cut

    again = toy_trainer(small_corpus, tmp_path, **SETTINGS)
    assert again.resume()
    with monkeypatch.context() as patch:
        patch.setattr(saver, "seal", killed)
        with pytest.raises(Cut):
            # It dies while it writes the best of update 4: all is there but for the sums.
            again.run(validate=validations(50.0, 50.0))
    assert list(tmp_path.glob("best.*.partial"))
    trainer, start, _ = finish(small_corpus, tmp_path)
    assert start == 3
    assert differing(snapshot(trainer), uncut[0]) == []
    assert not list(tmp_path.glob("*.partial"))


def test_a_finished_run_has_nothing_left_to_do(small_corpus: Corpus, tmp_path: Path, uncut: Run) -> None:
    train(toy_trainer(small_corpus, tmp_path, **SETTINGS), small_corpus)
    trainer, start, lines = finish(small_corpus, tmp_path)
    assert (start, lines) == (8, [])
    assert differing(snapshot(trainer), uncut[0]) == []


def test_fp16_resumes_with_its_loss_scale_and_window(small_corpus: Corpus, tmp_path: Path) -> None:
    # From this scale the first updates overflow, then it grows within the run: both must be carried over.
    changes: dict[str, Any] = {"precision": "fp16", "init_scale": 2.0**19, "scale_window": 2}
    whole = toy_trainer(small_corpus, tmp_path / "whole", **{**SETTINGS, **changes})
    lines = train(whole, small_corpus)
    assert len({line["scale"] for line in lines if line["kind"] == "train"}) > 1
    first = train(toy_trainer(small_corpus, tmp_path / "cut", **{**SETTINGS, **changes}), small_corpus, cut=5)
    trainer, start, rest = finish(small_corpus, tmp_path / "cut", **changes)
    assert start == 3
    assert [line for line in first if line["update"] <= 3] + rest == lines
    assert differing(snapshot(trainer), snapshot(whole)) == []


def damage(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 0x10
    file.write_bytes(content)


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_it_goes_on_to_the_same_end(
    small_corpus: Corpus, tmp_path: Path, uncut: Run, caplog: pytest.LogCaptureFixture
) -> None:
    train(toy_trainer(small_corpus, tmp_path, **SETTINGS), small_corpus, cut=7)
    damage(checkpoint.path_of(tmp_path, 6) / "state.pt")
    healed, start, _ = finish(small_corpus, tmp_path)
    assert start == 3
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line == (
        f"{tmp_path}/update-00000006/state.pt: damaged (its checksum differs); set aside, goes on from update 3"
    )
    assert differing(snapshot(healed), uncut[0]) == []
    assert checkpoint.list_updates(tmp_path) == [3, 6, 8]
    assert differing(*(checkpoint.load(checkpoint.path_of(tmp_path, 8))[0], dict(healed.parameters))) == []


def test_when_no_checkpoint_is_whole_the_run_ends_in_one_line(small_corpus: Corpus, tmp_path: Path) -> None:
    train(toy_trainer(small_corpus, tmp_path, **SETTINGS), small_corpus, cut=7)
    damage(checkpoint.path_of(tmp_path, 6) / "state.pt")
    (checkpoint.path_of(tmp_path, 3) / "rank-0.pt").unlink()
    trainer = toy_trainer(small_corpus, tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match=r"\A\S+update-00000006/state\.pt: damaged .*no checkpoint is whole.*\Z"):
        trainer.resume()
    assert checkpoint.list_updates(tmp_path) == [3, 6], "nothing is touched"


def test_a_run_stopped_on_notice_ends_with_the_average_of_one_that_was_not(
    small_corpus: Corpus, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "save_interval": 2, "keep_last": 2, "average_last": 2, "max_update": 9}
    whole = toy_trainer(small_corpus, tmp_path / "whole", **settings)
    train(whole, small_corpus)
    stops = [5, 6, 7]
    for stop in stops:
        trainer = toy_trainer(small_corpus, tmp_path / "stopped", **settings)
        assert trainer.resume() == (stop > 5)
        validate = Validator(trainer.model, small_corpus, "en-cs", trainer.config)
        trainer.run(validate=validate, should_stop=lambda update, stop=stop: update >= stop)
        assert (trainer.stopped, trainer.updates) == (True, stop)
    assert checkpoint.list_updates(tmp_path / "stopped") == [4, 6, 7], "the stop at 5 is gone, that at 7 is the newest"
    last, start, _ = finish(small_corpus, tmp_path / "stopped", **settings)
    assert start == 7
    ours = final_weights(tmp_path / "stopped", last.config, last.updates, best=last.best.update)
    theirs = final_weights(tmp_path / "whole", whole.config, whole.updates, best=whole.best.update)
    assert ours[1] == theirs[1] == "average of the checkpoints of updates 8, 9"
    assert differing(ours[0], theirs[0]) == []
    for folder in ("stopped", "whole"):
        assert checkpoint.list_updates(tmp_path / folder) == [8, 9]
    best = [checkpoint.load(tmp_path / folder / "best") for folder in ("stopped", "whole")]
    assert best[0][1] == best[1][1]
    assert differing(best[0][0], best[1][0]) == []


def test_the_average_leaves_out_what_was_saved_on_notice_even_if_it_is_still_there(
    small_corpus: Corpus, tmp_path: Path
) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, save_interval=2, keep_last=3, average_last=2, max_update=4)
    for _ in range(4):
        trainer.update()
        trainer.save()
    shutil.copytree(checkpoint.path_of(tmp_path, 2), tmp_path / "update-00000003", dirs_exist_ok=True)
    weights, which = final_weights(tmp_path, trainer.config, 4, best=0)
    assert which == "average of the checkpoints of updates 2, 4"
    mean = checkpoint.average([checkpoint.path_of(tmp_path, update) for update in (2, 4)])
    assert differing(weights, mean) == []


def test_where_no_validation_had_a_figure_the_newest_weights_are_taken_not_the_initial_ones(
    small_corpus: Corpus, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"save_interval": 2, "keep_updates": (0,), "average_last": 1, "max_update": 4}
    trainer = toy_trainer(small_corpus, tmp_path, **settings)
    trainer.run(validate=lambda *_: Validation(float("nan"), float("nan"), "bleu"))
    assert checkpoint.path_of(tmp_path, 0).is_dir()
    assert trainer.best.update == 0
    assert final_weights(tmp_path, trainer.config, 4, best=trainer.best.update)[1] == "weights of update 4"


def codebooks() -> PqNoise:
    blocks = {"ffn": 4, "embedding": 4, "attention": 4}
    return PqNoise(
        QuantNoiseConfig(scheme="pq", p=1, pq=PqNoiseConfig(blocks=blocks, centroids=8, refit_interval=1)), seed=1
    )


def moments() -> QuantNoise:
    return QuantNoise(QuantNoiseConfig(scheme="lat", p=1), seed=1)


@pytest.mark.parametrize("make", [codebooks, moments])
def test_the_best_weights_are_read_by_the_codebooks_or_moments_of_their_own_update(
    small_corpus: Corpus, tmp_path: Path, make: Callable[[], PqNoise | QuantNoise]
) -> None:
    technique = make()
    model = toy_model(small_corpus)
    technique.attach(model)
    trainer = toy_trainer(
        small_corpus, tmp_path, model=model, techniques=[technique], max_update=6, valid_interval=2, lr=2e-2
    )
    bleus, read = validations(1.0, 9.0, 2.0), []

    def validate() -> Validation:
        read.append(model.decoder.layers[0].fc1.weight.detach().clone())
        return bleus()

    trainer.run(validate=validate)
    weights, which = final_weights(tmp_path, trainer.config, trainer.updates, [technique], best=trainer.best.update)
    assert which == "best validation BLEU 9.00 at update 4"
    load_weights(trainer.parameters, weights, tmp_path)
    technique.bake(model)
    assert torch.equal(model.decoder.layers[0].fc1.weight, read[1])
    assert not torch.equal(read[1], read[2])


def test_where_the_best_weights_are_lost_their_update_or_the_newest_stands_in(
    small_corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, save_interval=2, max_update=6, valid_interval=2, keep_updates=(5,))
    trainer.run(validate=validations(1.0, 9.0, 2.0))

    def final() -> tuple[dict[str, torch.Tensor], str]:
        return final_weights(tmp_path, trainer.config, 6, best=trainer.best.update)

    wanted, which = final()
    wanted = {name: tensor.clone() for name, tensor in wanted.items()}  # they were mapped from the file
    assert which == "best validation BLEU 9.00 at update 4"
    (tmp_path / "best" / "model.safetensors").write_bytes(b"")
    weights, which = final()
    assert which == "weights of the best update 4"
    assert differing(weights, wanted) == []
    said = f"{tmp_path / 'best' / 'model.safetensors'}: damaged (its checksum differs); takes the {which}"
    assert caplog.messages == [said]
    shutil.rmtree(tmp_path / "best")
    assert final()[1] == which
    shutil.rmtree(checkpoint.path_of(tmp_path, 4))
    assert final()[1] == "weights of update 6"
    for update in (2, 6):
        (checkpoint.path_of(tmp_path, update) / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"best: no such checkpoint; no checkpoint is whole; delete "):
        final()


@pytest.mark.parametrize(("keep_last", "stand_in"), [(1, "weights of update 6"), (3, "weights of the best update 2")])
def test_the_best_weights_of_a_path_that_was_left_are_not_those_of_the_training(
    small_corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture, keep_last: int, stand_in: str
) -> None:
    settings = {"max_update": 6, "valid_interval": 1, "save_interval": 2, "keep_last": keep_last}

    def cut(update: int) -> None:
        if update == 4:
            raise Cut

    first = toy_trainer(small_corpus, tmp_path, **settings)
    with pytest.raises(Cut):
        first.run(validate=validations(1.0, 5.0, 9.0), on_update=cut)
    assert checkpoint.load(tmp_path / "best")[1]["update"] == 3
    # It goes on from update 2, and update 3 comes out a little different, as with other workers.
    again = toy_trainer(small_corpus, tmp_path, **settings)
    assert again.resume()
    again.run(validate=validations(4.0, 4.0, 4.0, 4.0))
    assert (again.updates, again.best.update) == (6, 2)
    weights, which = final_weights(tmp_path, again.config, again.updates, best=again.best.update)
    assert which == stand_in
    said = f"{tmp_path / 'best'}: is of update 3, the best of this training is update 2; takes the {stand_in}"
    assert caplog.messages == [said]
    assert differing(weights, checkpoint.load(checkpoint.path_of(tmp_path, int(stand_in[-1])))[0]) == []


def test_the_average_leaves_out_what_is_kept_for_a_rewind(small_corpus: Corpus, tmp_path: Path) -> None:
    settings = {"save_interval": 2, "keep_last": 2, "average_last": 2, "keep_updates": (0, 3), "max_update": 4}
    trainer = toy_trainer(small_corpus, tmp_path, **settings)
    trainer.run(validate=validations(1.0))
    assert checkpoint.list_updates(tmp_path) == [0, 2, 3, 4]
    assert final_weights(tmp_path, trainer.config, 4, best=4)[1] == "average of the checkpoints of updates 2, 4"
    short = toy_trainer(small_corpus, tmp_path / "short", **{**settings, "save_interval": 4})
    short.run(validate=validations(1.0))
    assert final_weights(tmp_path / "short", short.config, 4, best=4)[1] == "average of the checkpoints of updates 4"


def test_a_checkpoint_of_another_model_is_refused(small_corpus: Corpus, tmp_path: Path) -> None:
    toy_trainer(small_corpus, tmp_path).save()
    for fields, message in (
        ({"ffn_dim": 64}, r"expected \[64"),
        ({"encoder_layers": 2}, r"encoder\.layers\.1\.\S+ is missing"),
    ):
        trainer = toy_trainer(small_corpus, tmp_path, model=toy_model(small_corpus, **fields))
        with pytest.raises(ValueError, match=rf"update-00000000: holds another model .*{message}"):
            trainer.resume()


def test_nothing_to_resume_from_is_not_an_error(small_corpus: Corpus, tmp_path: Path) -> None:
    assert not toy_trainer(small_corpus, tmp_path / "nowhere").resume()


@pytest.mark.parametrize("world", [1, 2])
def test_deepspeeds_shares_of_adams_state_are_never_lost_in_silence(
    small_corpus: Corpus, tmp_path: Path, world: int
) -> None:
    trainer = toy_trainer(small_corpus, tmp_path)
    trainer.update()
    trainer.save()
    folder = checkpoint.path_of(tmp_path, 1)
    weights, state, own = checkpoint.load(folder)
    state |= {"optimizer": None, "world": world, "micro_batches": 2}  # as ZeRO leaves it
    checkpoint.save(folder, model_state=weights, state=state, rank_state=own)
    again = toy_trainer(small_corpus, tmp_path)
    with pytest.raises(
        ValueError, match=rf"\A{folder}: .*in shares of {world} workers; go on with {world} workers.*\Z"
    ):
        trainer_state.restore(again, folder, check=False)


def test_a_checkpoint_of_before_micro_batches_were_counted_goes_on(
    small_corpus: Corpus, tmp_path: Path, uncut: Run
) -> None:
    train(toy_trainer(small_corpus, tmp_path, **SETTINGS), small_corpus, cut=4)
    folder = checkpoint.path_of(tmp_path, 3)
    weights, state, own = checkpoint.load(folder)
    del state["micro_batches"]
    checkpoint.save(folder, model_state=weights, state=state, rank_state=own)
    trainer, start, _ = finish(small_corpus, tmp_path)
    assert (start, trainer.stream.micro_batches) == (3, 2)
    assert differing(snapshot(trainer), uncut[0]) == []


def test_time_and_the_best_loss_go_on_where_they_were(small_corpus: Corpus, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_update": 6, "save_interval": 2, "valid_interval": 2, "log_interval": 3}
    first = toy_trainer(small_corpus, tmp_path, **settings)
    figures = iter([(3.0, 0.0), (2.0, 0.0)])
    first.run(validate=lambda: Validation(*next(figures), signature="none"), should_stop=lambda update: update == 4)
    assert first.seconds > 0
    again = toy_trainer(small_corpus, tmp_path, **settings)
    assert again.resume()
    assert again.seconds == pytest.approx(first.seconds)
    assert again.sums.seconds_before == first.sums.seconds_before < first.seconds, "of the line of update 3"
    assert again.sums.tokens == first.sums.tokens > 0
    again.run(validate=lambda: Validation(2.5, 0.0, "none"))
    assert again.seconds > first.seconds
    assert (again.best.update, again.best.nll) == (4, 2.0), "a tie of BLEU is broken by the loss of before"


def test_a_training_that_patience_ends_keeps_as_many_as_any(small_corpus: Corpus, tmp_path: Path) -> None:
    settings = {"max_update": 50, "save_interval": 2, "keep_last": 2, "valid_interval": 3, "patience": 2}
    trainer = toy_trainer(small_corpus, tmp_path, **settings)
    trainer.run(validate=validations(3.0, 2.0, 1.0))
    assert trainer.updates == 9
    assert checkpoint.list_updates(tmp_path) == [8, 9]
