"""The one training loop against a plain one, and all that can befall an update."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from toy_training import differing, snapshot, toy_model, toy_trainer, validations

from tenko.compression import QuantizeConfig, QuantNoise
from tenko.compression.scalar import Linear, decode
from tenko.nmt import checkpoint, precision
from tenko.nmt.corpus import Corpus
from tenko.nmt.fairseq_bridge import ModelWithLoss
from tenko.nmt.schedule import learning_rate
from tenko.nmt.trainer import Trainer
from tenko.nmt.trainer_state import final_weights
from tenko.nmt.validate import Validation


def updates(trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer.update()


def plain_loop(trainer: Trainer, model: nn.Module, count: int, *, fused: bool) -> dict[str, Tensor]:
    """What a textbook does with the trainer's batches and settings; weights and moments by name."""
    config = trainer.config
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=1.0,
        betas=config.adam_betas,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
        fused=fused,
        foreach=False,
    )
    with_loss = ModelWithLoss(model, config.label_smoothing).train()
    for number in range(count):
        work = trainer.stream.update(number + 1)
        optimizer.param_groups[0]["lr"] = learning_rate(config, number)
        for sample in work.samples:
            (with_loss(sample)[0] / work.target_tokens).backward()
        if config.clip_norm:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def test_a_training_replaces_source_words_as_its_settings_say(small_corpus: Corpus, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{}, {"switchout": 0.3}, {"switchout": 0.3}]
    trainers = [toy_trainer(small_corpus, tmp_path / str(i), **given) for i, given in enumerate(settings)]
    for trainer in trainers:
        updates(trainer, 1)
    without, first, again = (snapshot(trainer) for trainer in trainers)
    assert differing(first, without)
    assert not differing(first, again)


def test_a_training_may_have_a_dropout_of_its_own(small_corpus: Corpus, tmp_path: Path) -> None:
    fields = {"dropout": 0.3, "attention_dropout": 0.2, "activation_dropout": 0.1}
    plain = toy_trainer(small_corpus, tmp_path, model=toy_model(small_corpus))
    kept, without = (
        Trainer(
            toy_model(small_corpus, **fields),
            plain.stream,
            replace(plain.config, dropout=dropout),
            seed=1,
            checkpoints=tmp_path,
        )
        for dropout in (None, 0.0)
    )
    for trainer in (kept, without, plain):
        updates(trainer, 2)
    assert differing(snapshot(without), snapshot(plain)) == []
    assert differing(snapshot(kept), snapshot(plain)) != []


@pytest.mark.parametrize("settings", [{}, {"update_freq": 2, "weight_decay": 0.1}, {"clip_norm": 0.5}])
def test_updates_are_those_of_a_plain_loop_with_torchs_adamw(
    small_corpus: Corpus, tmp_path: Path, settings: dict[str, Any]
) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, **settings)
    updates(trainer, 4)
    found = snapshot(trainer)
    wanted = plain_loop(trainer, toy_model(small_corpus), 4, fused=True)
    assert differing(found, wanted) == []
    unfused = plain_loop(trainer, toy_model(small_corpus), 4, fused=False)
    for name, tensor in unfused.items():
        if "k_proj.bias" in name:  # softmax does not see it: its gradient is rounding, which Adam makes large
            continue
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    fresh = dict(toy_model(small_corpus).named_parameters())
    moved = max(float((found[name] - fresh[name]).detach().abs().max()) for name in fresh)
    assert moved > 1e-3


def gradient_of_first_update(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What reaches the optimizer."""
    gradients: dict[str, Tensor] = {}

    def step() -> None:
        gradients.update({n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None})

    monkeypatch.setattr(trainer.optimizer, "step", step)
    trainer.update()
    assert gradients.keys() == trainer.parameters.keys()
    return gradients


class Merged:
    """A stream whose updates hold the sentences of another's as one batch."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.rank, self.world, self.batches_per_epoch = stream, 0, 1, stream.batches_per_epoch

    def update(self, number: int) -> Any:
        from tenko.nmt.batches import MicroBatches
        from tenko.nmt.fairseq_bridge import collate

        work = self.stream.update(number)
        indices = [int(i) for sample in work.samples for i in sample["id"]]
        tokens = self.stream.shards.tokens
        sample = collate([(i, tokens("en", i), tokens("cs", i)) for i in indices])
        return MicroBatches([sample], sample["ntokens"])


def test_two_accumulated_batches_weigh_as_one_of_all_their_sentences(
    small_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accumulated = toy_trainer(small_corpus, tmp_path, update_freq=2)
    sizes = [sample["ntokens"] for sample in accumulated.stream.update(1).samples]
    assert sizes[0] != sizes[1], "or a mean of means would do as well"
    merged = toy_trainer(small_corpus, tmp_path, update_freq=2)
    merged.stream = Merged(merged.stream)  # type: ignore[assignment]
    one = gradient_of_first_update(accumulated, monkeypatch)
    other = gradient_of_first_update(merged, monkeypatch)
    for name, gradient in one.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_gradients_are_clipped_to_the_global_norm(
    small_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float
) -> None:
    free = gradient_of_first_update(toy_trainer(small_corpus, tmp_path), monkeypatch)
    clipped = gradient_of_first_update(toy_trainer(small_corpus, tmp_path, clip_norm=clip), monkeypatch)
    norm = float(torch.stack([g.norm() for g in free.values()]).norm())
    assert 0.1 < norm < 50
    factor = min(1.0, clip / norm)
    for name, gradient in free.items():
        torch.testing.assert_close(clipped[name], gradient * factor, rtol=1e-4, atol=1e-9)


def spoil(trainer: Trainer, value: float) -> Callable[[], None]:
    """One weight's gradient holds `value` until the returned function is called."""
    name = next(iter(trainer.parameters))
    return trainer.parameters[name].register_hook(lambda g: torch.full_like(g, value)).remove


@pytest.mark.parametrize("name", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_an_update_with_a_non_finite_gradient_changes_nothing(
    small_corpus: Corpus, tmp_path: Path, name: str, value: float, clip_norm: float
) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, precision=name, clip_norm=clip_norm)
    updates(trainer, 2)
    before = snapshot(trainer)
    heal = spoil(trainer, value)
    trainer.update()
    assert differing(snapshot(trainer), before) == []
    assert trainer.updates == 3, "it counts as an update, as on all other ranks"
    heal()
    trainer.update()
    after = snapshot(trainer)
    assert len(differing(after, before)) == len(after), "and the next one is as good as any"
    assert trainer._figures(0.0)["overflows"] == 1


@pytest.mark.parametrize(("log_interval", "stopped_at"), [(1, 10), (4, 4), (50, 30)])
def test_divergence_is_an_error_of_one_line(
    small_corpus: Corpus, tmp_path: Path, log_interval: int, stopped_at: int
) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, max_update=30, log_interval=log_interval)
    spoil(trainer, math.nan)
    with pytest.raises(ValueError, match=r"\Atrain\.lr: training diverged.*lower train\.lr.*\Z"):
        trainer.run(validate=validations())
    assert trainer.updates == stopped_at
    assert checkpoint.list_updates(tmp_path) == []


def test_a_few_overflows_are_reported_and_do_not_stop_the_run(small_corpus: Corpus, tmp_path: Path) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, max_update=6, log_interval=3)
    lines: list[dict[str, Any]] = []
    healers = []

    def on_update(update: int) -> None:
        if update == 1:
            healers.append(spoil(trainer, math.nan))
        elif healers:
            healers.pop()()

    trainer.run(validate=validations(1.0), on_metrics=lines.append, on_update=on_update)
    train = [line for line in lines if line["kind"] == "train"]
    assert [line.get("overflows") for line in train] == [1, None]
    assert all(math.isfinite(line["loss"]) for line in train)


def test_fp16_on_a_cpu_scales_the_loss(small_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, precision="fp16", init_scale=1024.0, scale_window=3)
    seen: list[float] = []
    name, parameter = next(iter(trainer.parameters.items()))
    parameter.register_hook(lambda g: seen.append(float(g.norm())))
    scaled = gradient_of_first_update(trainer, monkeypatch)
    plain = gradient_of_first_update(toy_trainer(small_corpus, tmp_path), monkeypatch)
    assert seen[0] == pytest.approx(1024 * float(plain[name].norm()), rel=0.05), "backward runs on the scaled loss"
    # The fused optimizer undoes the scale by itself where it can; else it has been undone already.
    undone = getattr(trainer.optimizer, "grad_scale", None)
    assert undone is None
    assert float(scaled[name].norm()) == pytest.approx(float(plain[name].norm()), rel=0.05)


def test_fp16_overflow_halves_the_scale_and_skips_the_update(small_corpus: Corpus, tmp_path: Path) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, precision="fp16", init_scale=64.0, scale_window=3)
    updates(trainer, 2)
    assert trainer.scaler.is_enabled()
    assert trainer.scaler.get_scale() == 64
    before = snapshot(trainer)
    heal = spoil(trainer, math.inf)
    trainer.update()
    heal()
    assert trainer.scaler.get_scale() == 32
    assert differing(snapshot(trainer), before) == []
    updates(trainer, 2)
    assert trainer.scaler.get_scale() == 32
    trainer.update()
    assert trainer.scaler.get_scale() == 64, "three updates without overflow double it"
    figures = trainer._figures(0.0)
    assert (figures["scale"], figures["overflows"]) == (64, 1)


def test_fp16_finds_its_scale_from_one_that_overflows_by_itself(small_corpus: Corpus, tmp_path: Path) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, precision="fp16", init_scale=2.0**40, scale_window=1000)
    first = {name: parameter.detach().clone() for name, parameter in trainer.parameters.items()}
    trainer.update()
    assert trainer.scaler.get_scale() == 2.0**39
    assert all(torch.equal(parameter, first[name]) for name, parameter in trainer.parameters.items())
    updates(trainer, 40)
    settled = trainer.scaler.get_scale()
    assert 1 <= settled < 2.0**30
    updates(trainer, 2)
    assert trainer.scaler.get_scale() == settled
    assert all(not torch.equal(p, first[n]) and bool(torch.isfinite(p).all()) for n, p in trainer.parameters.items())


def test_a_loss_scale_that_falls_and_falls_is_an_error_of_one_line(small_corpus: Corpus, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_update": 40, "log_interval": 5, "init_scale": 1.0, "min_loss_scale": 0.1}
    trainer = toy_trainer(small_corpus, tmp_path, precision="fp16", **settings)
    spoil(trainer, math.nan)
    with pytest.raises(ValueError, match=r"\Atrain\.min_loss_scale: the loss scale fell to 0\.03125 at update 5.*\Z"):
        trainer.run(validate=validations())


@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_low_precision_learns_what_fp32_learns(small_corpus: Corpus, tmp_path: Path, name: str) -> None:
    losses = {}
    for which in ("fp32", name):
        trainer = toy_trainer(small_corpus, tmp_path / which, precision=which, max_tokens=600, lr=2e-2)
        updates(trainer, 25)
        trainer._figures(0.0)
        updates(trainer, 5)
        losses[which] = trainer._figures(0.0)["loss"]
        assert trainer.parameters["encoder.embed_tokens.weight"].dtype == torch.float32
    assert losses["fp32"] < 5.2, "from ln 300 = 5.7"
    assert losses[name] == pytest.approx(losses["fp32"], abs=0.05)


def test_figures_are_sums_over_the_interval(small_corpus: Corpus, tmp_path: Path) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, max_update=4, log_interval=2, update_freq=2, lr=1e-9)
    lines: list[dict[str, Any]] = []
    trainer.run(validate=validations(1.0), on_metrics=lines.append)
    assert [(line["kind"], line["update"]) for line in lines] == [("train", 2), ("train", 4), ("valid", 4)]
    with_loss = ModelWithLoss(toy_model(small_corpus), 0.1)
    works = [trainer.stream.update(number) for number in (3, 4)]
    sums = [with_loss(sample) for work in works for sample in work.samples]
    tokens = sum(work.target_tokens for work in works)
    nll = sum(nll.item() for _, nll in sums) / tokens
    assert lines[1]["loss"] == pytest.approx(sum(loss.item() for loss, _ in sums) / tokens, rel=1e-4)
    assert lines[1]["nll"] == pytest.approx(nll, rel=1e-4)
    assert lines[1]["ppl"] == pytest.approx(math.exp(nll), rel=1e-3)
    assert lines[1]["lr"] == learning_rate(trainer.config, 3)
    assert lines[1]["tokens_per_second"] > 0
    assert lines[1]["epoch"] == pytest.approx(8 / trainer.stream.batches_per_epoch, abs=1e-3)


def test_lines_say_where_the_time_went(small_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, max_update=6, log_interval=3, precision="fp16")
    lines: list[dict[str, Any]] = []
    read = trainer.stream.update

    def slow(number: int) -> Any:
        if number > 3:
            time.sleep(0.2)  # as ten of these updates
        return read(number)

    monkeypatch.setattr(trainer.stream, "update", slow)
    trainer.run(validate=validations(1.0), on_metrics=lines.append)
    quick, held_up = [line for line in lines if line["kind"] == "train"]
    for line in (quick, held_up):
        shares = [line[f"share_{part}"] for part in ("compute", "exchange", "data")]
        assert sum(shares) == pytest.approx(1)
        assert min(shares) >= 0
        assert line["share_exchange"] == 0, "there is nobody to wait for"
        assert {"tokens_per_second", "grad_norm", "scale"} <= line.keys()
    assert quick["share_data"] < 0.5 < held_up["share_data"] < 1


def test_best_by_bleu_is_kept_and_patience_stops(small_corpus: Corpus, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"valid_interval": 2, "save_interval": 100, "patience": 2, "max_update": 50}
    trainer = toy_trainer(small_corpus, tmp_path, **settings)
    seen: dict[int, Tensor] = {}
    name = "encoder.embed_tokens.weight"
    lines: list[dict[str, Any]] = []
    trainer.run(
        validate=validations(1.0, 3.0, 2.0, 3.0),
        on_metrics=lines.append,
        on_update=lambda update: seen.__setitem__(update, trainer.parameters[name].detach().clone()),
    )
    assert trainer.stopped_early
    assert trainer.updates == 8
    assert [line["best_bleu"] for line in lines if line["kind"] == "valid"] == [1.0, 3.0, 3.0, 3.0]
    tensors, state, _ = checkpoint.load(tmp_path / "best")
    assert state == {"update": 4, "bleu": 3.0, "nll": 1.0}
    assert torch.equal(tensors[name], seen[4])
    assert not torch.equal(tensors[name], seen[8])
    assert checkpoint.list_updates(tmp_path) == [8], "the end is saved"
    again = toy_trainer(small_corpus, tmp_path, **settings)
    assert again.resume()
    again.run(validate=validations())
    assert again.updates == 8, "a resumed run stays stopped"


def test_best_by_perplexity_whatever_bleu_says(small_corpus: Corpus, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"valid_interval": 2, "save_interval": 100, "patience": 2, "max_update": 50}
    trainer = toy_trainer(small_corpus, tmp_path, best_by="perplexity", **settings)
    found = iter([(3.0, 9.0), (2.0, 1.0), (2.5, 5.0), (2.0, 7.0)])
    trainer.run(validate=lambda: Validation(*next(found), signature="none"), on_metrics=lambda line: None)
    assert trainer.updates == 8, "two validations without a better perplexity"
    weights, which = final_weights(tmp_path, trainer.config, trainer.updates, best=trainer.best.update)
    assert which == "best validation perplexity 7.39, BLEU 1.00 at update 4"
    best, _, _ = checkpoint.load(tmp_path / "best")
    assert all(torch.equal(tensor, best[name]) for name, tensor in weights.items())


def test_the_last_checkpoints_are_kept_and_their_mean_is_of_the_files(small_corpus: Corpus, tmp_path: Path) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, save_interval=2, keep_last=3, max_update=9, valid_interval=100)
    trainer.run(validate=validations(1.0))
    assert checkpoint.list_updates(tmp_path) == [6, 8, 9]
    folders = [checkpoint.path_of(tmp_path, update) for update in (6, 8, 9)]
    files = [load_file(folder / "model.safetensors") for folder in folders]
    mean = checkpoint.average(folders)
    assert mean.keys() == trainer.parameters.keys()
    for name, tensor in mean.items():
        exact = torch.stack([file[name].double() for file in files]).mean(0)
        torch.testing.assert_close(tensor, exact.float(), rtol=1e-6, atol=1e-9)


class Recorder:
    """A technique that notes what it is told and what it could have seen."""

    name = "recorder"

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.weights: list[Tensor] = []
        self.parameter: nn.Parameter | None = None

    def attach(self, model: nn.Module) -> None:
        self.parameter = next(model.parameters())

    def note(self, moment: str, update: int) -> None:
        assert self.parameter is not None
        self.calls.append((moment, update))
        self.weights.append(self.parameter.detach().clone())

    def before_update(self, update: int) -> None:
        self.note("before", update)

    def after_update(self, update: int) -> None:
        self.note("after", update)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {}


def test_techniques_are_told_before_and_after_each_update(small_corpus: Corpus, tmp_path: Path) -> None:
    recorder, model = Recorder(), toy_model(small_corpus)
    recorder.attach(model)
    updates(toy_trainer(small_corpus, tmp_path, model=model, techniques=[recorder], update_freq=3), 2)
    assert recorder.calls == [("before", 0), ("after", 0), ("before", 1), ("after", 1)]
    initial, first, before_second, second = recorder.weights
    assert torch.equal(first, before_second)
    assert not torch.equal(initial, first)
    assert not torch.equal(first, second)


def dropouts(corpus: Corpus, folder: Path, *, rank: int, world: int, after: int) -> dict[tuple[int, int], float]:
    """The generator's first number in each micro-batch of a rank, by update and first sentence; six an update."""
    drawn: dict[tuple[int, int], float] = {}
    trainer = toy_trainer(corpus, folder, rank=rank, world=world)
    trainer.stream.micro_batches = 6
    trainer.updates = after

    def draw(module: nn.Module, arguments: tuple[dict[str, Any]]) -> None:
        drawn[trainer.updates + 1, int(arguments[0]["id"][0])] = float(torch.rand(()))

    trainer.wrapped.register_forward_pre_hook(draw)
    updates(trainer, 3)
    return drawn


@pytest.mark.parametrize("world", [2, 3, 4])
def test_dropout_is_of_the_micro_batch_whichever_rank_computes_it(
    small_corpus: Corpus, tmp_path: Path, world: int
) -> None:
    alone = dropouts(small_corpus, tmp_path, rank=0, world=1, after=0)
    assert len(alone) == len(set(alone.values())) == 18, "new for each"
    ranks = [dropouts(small_corpus, tmp_path, rank=rank, world=world, after=0) for rank in range(world)]
    assert {batch: number for rank in ranks for batch, number in rank.items()} == alone
    later = dropouts(small_corpus, tmp_path, rank=0, world=1, after=2)
    assert {update for update, _ in later} == {3, 4, 5}
    assert all(alone[batch] == later[batch] for batch in later if batch[0] == 3), "not of what came before"


def test_training_through_int8_bakes_to_the_model_that_was_trained(small_corpus: Corpus, tmp_path: Path) -> None:
    model = toy_model(small_corpus)
    technique = QuantNoise(QuantizeConfig())
    technique.attach(model)
    trainer = toy_trainer(small_corpus, tmp_path, model=model, techniques=[technique], max_update=5)
    stored = "encoder.layers.0.fc1.parametrizations.weight.original"
    before = trainer.parameters[stored].detach().clone()
    trainer.run(validate=validations(1.0))
    trained = trainer.parameters[stored].detach().clone()
    assert not torch.equal(trained, before), "gradients go straight through to the stored weight"
    assert torch.equal(model.encoder.layers[0].fc1.weight, decode(Linear().quantize(trained)))
    assert not torch.equal(model.encoder.layers[0].fc1.weight, trained)

    sample = trainer.stream.update(1).samples[0]
    model.eval()
    with torch.no_grad(), precision.autocast("fp32", trainer.device):
        attached = ModelWithLoss(model, 0.0)(sample)[1]
        technique.bake(model)
        baked = ModelWithLoss(model, 0.0)(sample)[1]
    assert attached.item() == baked.item()
    assert "encoder.layers.0.fc1.weight" in dict(model.named_parameters())

    resumed = toy_model(small_corpus)
    other = QuantNoise(QuantizeConfig())
    other.attach(resumed)
    again = toy_trainer(small_corpus, tmp_path, model=resumed, techniques=[other], max_update=5)
    assert again.resume()
    assert torch.equal(again.parameters[stored], trained)


def test_the_updates_to_rewind_to_are_kept_for_good(small_corpus: Corpus, tmp_path: Path) -> None:
    trainer = toy_trainer(
        small_corpus, tmp_path, max_update=8, save_interval=2, keep_last=2, valid_interval=8, keep_updates=(0, 3)
    )
    initial = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    trainer.run(validate=validations(1.0))
    assert checkpoint.list_updates(tmp_path) == [0, 3, 6, 8]
    kept = checkpoint.load(checkpoint.path_of(tmp_path, 0))[0]
    assert all(torch.equal(kept[name], value) for name, value in initial.items())


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_rewound_run_is_the_run_once_more(small_corpus: Corpus, tmp_path: Path, precision: str) -> None:
    settings = {"max_update": 6, "save_interval": 2, "keep_updates": (3,), "precision": precision, "update_freq": 2}
    first = toy_trainer(small_corpus, tmp_path / "first", dropout=0.1, **settings)
    first.run(validate=validations(1.0))
    again = toy_trainer(
        small_corpus, tmp_path / "again", model=toy_model(small_corpus, seed=9, dropout=0.1), **settings
    )
    again.rewind(checkpoint.path_of(tmp_path / "first", 3))
    assert (again.updates, again.best.bleu) == (3, -1.0)
    again.run(validate=validations(1.0))
    assert all(torch.equal(again.parameters[name], p) for name, p in first.parameters.items())
    bare = toy_trainer(small_corpus, tmp_path / "bare", dropout=0.1, **settings)
    bare.rewind(checkpoint.path_of(tmp_path / "first", 3), moments=False)
    assert not bare.optimizer.state, "the moments start at zero"
    bare.run(validate=validations(1.0))
    assert not torch.equal(next(iter(bare.parameters.values())), next(iter(first.parameters.values())))


class Counting(Recorder):
    """A technique whose state is not in the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.count = torch.zeros(2)

    def before_update(self, update: int) -> None:
        self.count += update

    def after_update(self, update: int) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_what_techniques_remember_comes_back(small_corpus: Corpus, tmp_path: Path) -> None:
    recorder, model = Recorder(), toy_model(small_corpus)
    recorder.attach(model)
    toy_trainer(small_corpus, tmp_path, model=model, techniques=[recorder, Counting()], max_update=4).run(
        validate=validations(1.0)
    )
    resumed = Counting()
    assert toy_trainer(small_corpus, tmp_path, techniques=[recorder, resumed], max_update=4).resume()
    assert torch.equal(resumed.count, torch.full((2,), 0.0 + 1 + 2 + 3))


def test_skipped_updates_now_and_then_are_no_divergence(small_corpus: Corpus, tmp_path: Path) -> None:
    """Twelve of them, each between good ones."""
    trainer = toy_trainer(small_corpus, tmp_path, max_update=24, log_interval=1)
    lines: list[dict[str, Any]] = []
    healers = []

    def on_update(update: int) -> None:
        if healers:
            healers.pop()()
        else:
            healers.append(spoil(trainer, math.nan))

    trainer.run(validate=validations(1.0), on_metrics=lines.append, on_update=on_update)
    assert sum(line.get("overflows", 0) for line in lines) == 12


def test_all_updates_take_time_not_only_those_that_are_told(
    small_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, max_update=4, log_interval=4, keep_updates=(2,))
    read = trainer.stream.update
    monkeypatch.setattr(trainer.stream, "update", lambda number: (time.sleep(0.1), read(number))[1])
    lines: list[dict[str, Any]] = []
    trainer.run(validate=validations(1.0), on_metrics=lines.append)
    assert trainer.seconds > 0.4
    tokens = sum(read(number).target_tokens for number in range(1, 5))
    assert lines[0]["tokens_per_second"] == pytest.approx(tokens / trainer.seconds, rel=0.02)
    again = toy_trainer(small_corpus, tmp_path)
    again.rewind(checkpoint.path_of(tmp_path, 2))
    assert again.seconds == 0, "a rewound training begins to count anew"


def test_patience_waits_for_bleu_whatever_the_loss_does(small_corpus: Corpus, tmp_path: Path) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, valid_interval=1, patience=2, max_update=9)
    losses = iter([9.0, 8.0, 7.0])
    trainer.run(validate=lambda: Validation(next(losses), 5.0, "none"))
    assert (trainer.stopped_early, trainer.updates) == (True, 3)
    assert (trainer.best.update, trainer.best.nll) == (3, 7.0), "a tie is broken by the loss all the same"


def test_a_notice_at_the_last_update_stops_nothing(small_corpus: Corpus, tmp_path: Path) -> None:
    trainer = toy_trainer(small_corpus, tmp_path, max_update=2)
    trainer.run(validate=validations(1.0), should_stop=lambda update: update == 2)
    assert (trainer.stopped, trainer.updates) == (False, 2)
