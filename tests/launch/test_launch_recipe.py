"""Recipes: what is accepted, and the one line for everything that is not."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tenko.comm.config import CommConfig
from tenko.launch import recipe
from tenko.launch.stage_kinds import STAGE_CONFIGS, QuantNoiseStage
from tenko.nmt.config import DataConfig, ModelConfig, TrainConfig

SMALL = """\
name: x
data:
  vocab_size: 500
stages:
  - train:
      lr: 5e-4
      max_update: 10
  - quantize: {}
"""


QUANTIZE = "quantize: {scheme: int4, clip: mse}"


def error_of(text: str, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        recipe.loads(text, "r.yaml", list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", recipe.bundled())
def test_bundled_recipes_load_and_round_trip(name: str) -> None:
    loaded = recipe.load(name)
    assert loaded.name == name
    assert recipe.loads(recipe.dump(loaded), "again") == loaded


def test_the_demo_and_tiny_are_bundled() -> None:
    assert {"demo", "debian", "tiny"} <= set(recipe.bundled())


def test_some_recipe_explains_every_key() -> None:
    folder = Path(recipe.__file__).parents[1] / "recipes"
    loaded = [yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml")]
    stages: dict[str, list[set[str]]] = {kind: [] for kind in STAGE_CONFIGS}
    for document in loaded:
        for stage in (item if isinstance(item, dict) else {item: {}} for item in document["stages"]):
            for kind in stage.keys() & stages.keys():
                stages[kind].append(set(stage[kind] or {}))
    sections = {
        recipe.Recipe: [set(document) for document in loaded],
        DataConfig: [set(document.get("data", {})) for document in loaded],
        ModelConfig: [set(document.get("model", {})) for document in loaded],
        CommConfig: [set(document.get("comm", {})) for document in loaded],
        **{config: stages[kind] for kind, config in STAGE_CONFIGS.items()},
    }
    for config, found in sections.items():
        keys = {field.name for field in dataclasses.fields(config)}
        assert keys in found, f"no recipe explains every key of {config.__name__}: {sorted(keys)}"


def test_values_reach_their_fields_with_their_types() -> None:
    loaded = recipe.loads(SMALL, "r.yaml", ["data.train={en: a.gz, cs: b}", "train.adam_betas=[0.8, 0.9]", "name=2024"])
    train = loaded.stages[0].config
    assert isinstance(train, TrainConfig)
    assert train.lr == 5e-4, "YAML 1.1 reads 5e-4 as text"
    assert train.adam_betas == (0.8, 0.9)
    assert loaded.data.train == {"en": "a.gz", "cs": "b"}
    assert loaded.name == "2024"
    assert recipe.loads(recipe.dump(loaded), "again") == loaded


def test_stages_of_one_kind_are_told_apart_by_name() -> None:
    loaded = recipe.loads(SMALL + "    name: packed\n", "r.yaml", ["packed.exclude=['*embed*']"])
    assert [spec.name for spec in loaded.stages] == ["train", "packed"]
    assert recipe.loads(recipe.dump(loaded), "again") == loaded


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("lr: 5e-4", "lrr: 5e-4", "r.yaml:6: train.lrr: unknown key; did you mean lr? valid: max_update, max_tokens"),
        ("lr: 5e-4", "lr: fast", "r.yaml:6: train.lr: must be a number, is fast"),
        ("lr: 5e-4", "lr: .nan", "r.yaml:6: train.lr: must be a number, is .nan"),
        ("lr: 5e-4", "lr: -1", "r.yaml:6: train.lr: must be above 0, is -1.0"),
        ("lr: 5e-4", "precision: fp8", "r.yaml:6: train.precision: must be one of auto, fp32, bf16, fp16, is fp8"),
        ("max_update: 10", "max_update: 1.5", "r.yaml:7: train.max_update: must be a whole number, is 1.5"),
        ("max_update: 10", "max_update: true", "r.yaml:7: train.max_update: must be a whole number, is true"),
        ("max_update: 10", "lr: 1", "r.yaml:7: lr: set twice, first at r.yaml:6"),
        ("lr: 5e-4", "lr: 0010", "r.yaml:6: train.lr: must be a number, in decimals without leading zeros, is 0010"),
        ("max_update: 10", "max_update: 1:30", "r.yaml:7: train.max_update: must be a whole number, in decimals"),
        ("max_update: 10", "max_update: -010", "r.yaml:7: train.max_update: must be a whole number, in decimals"),
        ("vocab_size: 500", f"train: {'[' * 600}", "r.yaml:1: nested too deeply"),
        ("name: x", "name: x\n---\nname: y", "r.yaml:2: not valid YAML: expected a single document in the stream, but"),
        ("max_update: 10", "adam_betas: [1]", "r.yaml:7: train.adam_betas: must be a list of 2, is a list of 1"),
        ("max_update: 10", "decode: {beam: 0}", "r.yaml:7: train.decode.beam: must be at least 1, is 0"),
        ("vocab_size: 500", "train: [a, b]", "r.yaml:3: data.train: must be text or a mapping, is a list of 2"),
        ("vocab_size: 500", "train: {en: a}", "r.yaml:3: data.train: needs the keys en and cs, has ['en']"),
        ("vocab_size: 500", "vocab_size: [", "r.yaml:5: not valid YAML"),
        ("  vocab_size: 500", "  - 3", "r.yaml:3: data: must be a mapping of keys to values, is a list of 1"),
        ("name: x", "name: a b", "r.yaml:1: name: letters, digits, - and _ only, is 'a b'"),
        ("name: x", "workers: 1", "r.yaml:1: name: missing"),
        ("name: x", "name: x\nworkers: 0", "r.yaml:2: workers: must be 1 to 1024, is 0"),
        ("name: x", "name: x\n\x07", "r.yaml:2: not valid YAML"),
        ("- quantize", "- quantise", "r.yaml:8: stages[1]: unknown stage quantise; kinds: train, pretrained, lottery"),
        ("- quantize: {}", "- {}", "r.yaml:8: stages[1]: needs one kind, has none; kinds: train, pretrained"),
        ("- quantize: {}", "- train: {}", "r.yaml:8: stages[1]: a second stage named train"),
        (
            "- quantize: {}",
            "- train: {}\n    name: b",
            "r.yaml:8: train: must follow pretrained or be first, follows train",
        ),
        (
            SMALL[SMALL.index("stages") :],
            "stages: [quantize]\n",
            "r.yaml:4: quantize: must follow pretrained, train, lottery or quant_noise, is first",
        ),
        (SMALL[SMALL.index("stages") :], "stages: []\n", "r.yaml:4: stages: must be a list of at least one stage"),
        (SMALL, "", "r.yaml:1: empty; a recipe needs at least name and stages"),
        (SMALL, "- 1", "r.yaml:1: must be a mapping of keys to values, is a list of 1"),
        ("lr: 5e-4", "lr: .inf", "r.yaml:6: train.lr: must be a number, is .inf"),
        ("lr: 5e-4", "zero_stage: true", "r.yaml:6: train.zero_stage: must be one of 1, 2, is true"),
        ("max_update: 10", f"max_update: {2**63}", "r.yaml:7: train.max_update: must be a whole number of 64 bits"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(old: str, new: str, message: str) -> None:
    assert old in SMALL
    assert error_of(SMALL.replace(old, new, 1)).startswith(message)


def test_all_mistakes_are_counted() -> None:
    text = SMALL.replace("vocab_size: 500", "vocab_size: 1").replace("lr: 5e-4", "lr: 0")
    assert error_of(text) == "r.yaml:3: data.vocab_size: must be 64 to 1000000, is 1 (and 1 more)"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.lr", "override train.lr: must be key=value"),
        ("train.lr=x", "override train.lr=x: train.lr: must be a number, is x"),
        ("train.lrr=1", "override train.lrr=1: train.lrr: unknown key; did you mean lr? valid:"),
        ("trian.lr=1", "override trian.lr=1: trian: unknown key;"),
        ("seed=!!bool foo", "override seed=!!bool foo: foo: is no bool"),
        ("seed=!!timestamp foo", "override seed=!!timestamp foo: foo: is no timestamp"),
        (
            f"train.max_tokens={10**20}",
            f"override train.max_tokens={10**20}: train.max_tokens: must be a whole number of 64 bits",
        ),
        ("seed=-1", "override seed=-1: seed: must be 0 to 2^63 - 1, is -1"),
        ("stages=[]", "override stages=[]: stages are set in the recipe file"),
        ("train=1", "override train=1: names a stage; set one of its keys"),
        ("data.x=[", "override data.x=[: not valid YAML"),
    ],
)
def test_a_mistake_in_an_override_names_it(override: str, message: str) -> None:
    assert error_of(SMALL, override).startswith(message)


def test_a_key_is_set_once_on_a_command_line() -> None:
    recipe.refuse_repeats(["train.lr=1", "lr=1", "seed=2", "nonsense", "nonsense"])
    with pytest.raises(ValueError, match=r"^override train\.lr=2: train\.lr: set twice, first by train\.lr=1$"):
        recipe.refuse_repeats(["train.lr=1", "seed=2", "train.lr=2"])


@pytest.mark.parametrize(
    ("overrides", "guilty"),
    [
        (["seed=2", "model.embed_dim=33", "train.lr=1"], "model.embed_dim=33"),
        (["model.embed_dim=33", "train.lrr=1"], "model.embed_dim=33"),
        (["seed=2", "quantize.scheme=ternary", "model.embed_dim=32"], "quantize.scheme=ternary"),
    ],
)
def test_an_override_that_makes_the_file_senseless_is_named(overrides: list[str], guilty: str) -> None:
    text = SMALL.replace("name: x", "name: x\nmodel:\n  attention_heads: 2").replace("quantize: {}", QUANTIZE)
    assert recipe.loads(text, "r.yaml").name == "x"
    line = error_of(text, *overrides)
    assert re.match(rf"override {re.escape(guilty)}: does not go with r\.yaml:\d+: (model|quantize)\.", line), line


def test_what_is_wrong_in_the_file_is_not_blamed_on_overrides() -> None:
    text = SMALL.replace("lr: 5e-4", "lr: 0")
    assert error_of(text, "seed=2", "train.max_update=3") == "r.yaml:6: train.lr: must be above 0, is 0.0"


def test_unknown_recipe_names_the_bundled_ones() -> None:
    with pytest.raises(ValueError, match=r"^demmo: no such recipe; give a YAML file or one of .*demo"):
        recipe.load("demmo")


def test_invalid_utf8_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"name: x\n# \xff\n")
    with pytest.raises(ValueError, match=r"r\.yaml:2: not valid UTF-8"):
        recipe.load(str(path))


def test_a_bad_recipe_stops_the_command_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(SMALL.replace("lr:", "lrr:"))
    command = [sys.executable, "-m", "tenko.launch.cli", "run", "r.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("tenko: error: r.yaml:6: train.lrr: unknown key; did you mean lr?")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_a_later_training_inherits_what_the_stage_train_says() -> None:
    stages = "[train: {lr: 5e-4, max_update: 10, keep_updates: [2]}, quant_noise: {train: {lr: 1e-5}}]"
    text = f"name: x\nstages: {stages}\n"
    loaded = recipe.loads(text, "r.yaml", ["quant_noise.train.warmup_updates=7", "train.max_tokens=333"])
    config = loaded.stages[1].config
    assert isinstance(config, QuantNoiseStage)
    assert (config.train.lr, config.train.max_update, config.train.warmup_updates) == (1e-5, 10, 7)
    assert config.train.max_tokens == 333
    assert config.train.keep_updates == ()
    assert recipe.loads(recipe.dump(loaded), "again") == loaded


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            "model: {extra: {encoder_learned_pos: true, max_source_positions: 40}}",
            "model.extra: max_source_positions must be at least 1024 where positions are learned",
        ),
        (
            "model: {extra: {decoder_learned_pos: true}}\ndata: {max_tokens_per_sentence: 1024}",
            "data.max_tokens_per_sentence: must be below model.extra.max_target_positions (1024), learned positions",
        ),
    ],
)
def test_sentences_beyond_learned_positions_are_refused(settings: str, message: str) -> None:
    assert message in error_of(f"name: x\n{settings}\nstages: [train]\n")
    ends = settings.replace("1024", "1023").replace("40", "1024")
    assert recipe.loads(f"name: x\n{ends}\nstages: [train]\n", "a.yaml")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[lottery]", "lottery: must follow train or lottery, is first"),
        ("[pretrained, lottery]", "lottery: must follow train or lottery, follows pretrained"),
        ("[train, lottery]", "lottery.rewind_to: update 0 is not among train.keep_updates: none"),
        (
            "[train: {keep_updates: [0, 5], max_update: 9}, lottery: {rewind_to: 4}]",
            "lottery.rewind_to: update 4 is not among train.keep_updates: 0, 5",
        ),
        (
            "[train: {keep_updates: [9], max_update: 9}, lottery: {rewind_to: 9}]",
            "lottery.rewind_to: must be below max_update (9), is 9",
        ),
        (
            "[train: {keep_updates: [0]}, lottery, ipq]",
            "ipq: must follow pretrained, train or quant_noise, follows lottery",
        ),
        (
            "[train, quant_noise, ipq]",
            "ipq: can't follow quant_noise with scheme int8, which leaves quantized weights already",
        ),
        ("[train, quant_noise, quantize]", "quantize: can't follow quant_noise with scheme int8"),
        ("[train, quantize, quantize]", "stages[2]: a second stage named quantize"),
        (
            "[train, export, quantize]",
            "quantize: must follow pretrained, train, lottery or quant_noise, follows export",
        ),
        ("[train, quant_noise: {scheme: pq, p: 2}, ipq]", "quant_noise.p: must be above 0 and at most 1, is 2.0"),
        (
            "[train, quant_noise: {scheme: pq, p: 1}, quantize: {scheme: pq}]",
            "quantize: can't follow quant_noise with scheme pq and p: 1, which leaves codewords already",
        ),
        (
            "[train, quant_noise: {scheme: pq, p: 1, pq: {noise: zero}}]",
            "quant_noise.p: must be below 1 with pq.noise: zero, which would leave nothing else, is 1",
        ),
        (
            "[train, quant_noise: {scheme: pq, p: 1, pq: {bits: 2}}, ipq: {together: true, bits: 2}]",
            "ipq.bits: must be 0 after quant_noise with p: 1, whose codebooks this stage trains",
        ),
        (
            "[train, quant_noise: {scheme: pq, p: 1, pq: {bits: 2}}, ipq: {together: true, centroids: 32}]",
            "ipq.centroids: must be 256 after quant_noise with p: 1 and bits, which has chosen how many there are",
        ),
        (
            "[train, quantize: {scheme: pq, pq: {bits: 2, centroids: 32}}]",
            "quantize.pq.centroids: are chosen with bits above 0; leave them out, or bits",
        ),
        (
            "[train, quantize: {scheme: pq, granularity: tensor}]",
            "quantize.granularity: tensor is for the other schemes, scheme is pq",
        ),
        ("[train: {lr: 0}, lottery]", "train.lr: must be above 0, is 0.0"),
        ("[train: {dropout: 1.0}]", "train.dropout: must be null or in [0, 1), is 1.0"),
        ("[train: {switchout: 1}]", "train.switchout: must be in [0, 1), is 1"),
        ("[train: {lr_schedule: cosine}]", "train.lr_schedule: must be one of inverse_sqrt, linear, is cosine"),
        ("[train: {distill: {weight: 0.5}}]", "train.distill.weight: must be 0 in the first stage"),
        ("[train: {distill: {sequences: true}}]", "train.distill.sequences: must be false in the first stage"),
        ("[train: {distill: {text: more.en}}]", "train.distill.text: must be null in the first stage"),
        (
            "[train, quant_noise: {train: {engine: deepspeed}}]",
            "quant_noise.train.engine: must be ddp in stage quant_noise",
        ),
    ],
)
def test_stages_that_make_no_sense_together_are_refused_with_the_reason(stages: str, message: str) -> None:
    assert message in error_of(f"name: x\nstages: {stages}\n")


SERVED = "comm: {route: split, split: [{route: server, min_dims: 2}, {route: fp32, max_dims: 1}]}"


@pytest.mark.parametrize("comm", ["comm: {route: server}", SERVED])
@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("[train: {keep_updates: [0]}, lottery]", "comm.route: owners of shards keep Adam's moments, which a lottery"),
        (
            "[pretrained, quant_noise: {scheme: lat}]",
            "comm.route: owners of shards keep Adam's moments, which scheme: lat",
        ),
    ],
)
def test_what_needs_all_moments_is_refused_with_a_server_for_some_parameters_too(
    comm: str, stages: str, message: str
) -> None:
    text = f"name: x\n{comm}\nstages: {stages}\n"
    assert message in error_of(text)
    assert recipe.loads(text.replace(comm, "comm: {route: all_reduce}"), "r.yaml")


def test_translations_are_searched_for_as_the_first_training_validates() -> None:
    for stages, beam in (
        ("[pretrained, quant_noise: {train: {decode: {beam: 3}}}, ipq: {train: {decode: {beam: 2}}}]", 3),
        ("[train: {decode: {beam: 2}}, quant_noise: {train: {decode: {beam: 3}}}]", 2),
        ("[pretrained, quantize]", 4),
    ):
        loaded = recipe.loads(
            f"name: x\nstages: {stages}\n".replace("quant_noise: {", "quant_noise: {scheme: pq, p: 0.5, "), "r.yaml"
        )
        assert recipe.decode_config(loaded).beam == beam, stages
