"""The recipe: what a run does, read from YAML, checked as a whole in milliseconds, before anything runs.

Nothing here imports torch. What a stage does is in `stages.py`; this file only knows which kinds there are, what
settings each takes, and which may follow which.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from tenko.comm.config import CommConfig
from tenko.nmt.config import DataConfig, DecodeConfig, ModelConfig, TrainConfig, require

from .bundled import bundled
from .files import read_text
from .settings import Node, Problems, build, describe, join, parse, unknown_key
from .stage_kinds import NOT_INHERITED, STAGE_CONFIGS, StageConfig, problem, why_not

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One stage of a recipe."""

    kind: str
    """A key of STAGE_CONFIGS."""
    name: str
    """Names its folder, and its settings in overrides; the kind unless the recipe says otherwise."""
    config: StageConfig
    """Its settings."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run, whole: equal recipes give equal runs."""

    name: str
    """Names the run directory, `runs/NAME`, unless --run-dir does."""
    direction: Literal["en-cs", "cs-en"] = "en-cs"
    """Source and target language."""
    seed: int = 1
    """Seeds weights, order of batches, dropout and stochastic rounding."""
    workers: int = 1
    """torchrun processes this machine starts; 1 runs in one process. A run that goes on may have another number: a
    training that has begun keeps its global batch."""
    threads: int = 0
    """CPU threads a worker; 0 divides the machine's cores by the workers. A run that goes on may have another."""
    hang_timeout: float = 600.0
    """Seconds within a training after which a worker that shows no sign of life is ended, its stacks in the logs; 0
    never. A run that goes on may have another."""
    zstd: int | None = None
    """Compress artefacts' files with zstd at this level, 1 to 22; null stores them plain."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus and subwords."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The Transformer."""
    comm: CommConfig = field(default_factory=CommConfig)
    """How gradients travel between workers."""
    stages: tuple[StageSpec, ...] = ()
    """What is done, in order."""

    def __post_init__(self) -> None:
        require(bool(_NAME.fullmatch(self.name)), "name", f"letters, digits, - and _ only, is {self.name!r}")
        require(0 <= self.seed < 2**63, "seed", f"must be 0 to 2^63 - 1, is {self.seed}")
        require(1 <= self.workers <= 1024, "workers", f"must be 1 to 1024, is {self.workers}")
        require(self.hang_timeout >= 0, "hang_timeout", f"must be at least 0, is {self.hang_timeout:g}")
        require(self.threads >= 0, "threads", f"must be at least 0, is {self.threads}")
        require(self.zstd is None or 1 <= self.zstd <= 22, "zstd", f"must be null or 1 to 22, is {self.zstd}")
        for side in ("source", "target"):
            positions, longest = self.model.learned_positions(side), self.data.max_tokens_per_sentence
            fits = positions is None or longest < positions
            what = f"model.extra.max_{side}_positions ({positions}), learned positions"
            require(fits, "data.max_tokens_per_sentence", f"must be below {what}, is {longest}")


_TOP_KEYS = [item.name for item in dataclasses.fields(Recipe)]


def decode_config(recipe: Recipe) -> DecodeConfig:
    """Beam search as the recipe's first training validates with; the default where nothing is trained."""
    configs = [getattr(spec.config, "train", spec.config) for spec in recipe.stages]
    return next((config.decode for config in configs if isinstance(config, TrainConfig)), DecodeConfig())


def load(path_or_name: str, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path_or_name: a YAML file, or the name of a bundled recipe (`demo`).
        overrides: `key=value`, the key as in `seed` or `train.lr` (stage name first), the value as in YAML.

    Raises:
        ValueError: one line that names file and line (or the override), the key, and the valid choices.
        OSError: the file cannot be read.
    """
    path = Path(path_or_name)
    if path.is_file():
        text, label = read_text(path), str(path_or_name)
    elif path_or_name in bundled():
        text = resources.files("tenko.recipes").joinpath(f"{path_or_name}.yaml").read_text(encoding="utf-8")
        label = f"{path_or_name}.yaml"
    elif path.is_dir():
        raise ValueError(f"{path_or_name}: a folder; a recipe is a YAML file or one of {', '.join(bundled())}")
    else:
        raise ValueError(f"{path_or_name}: no such recipe; give a YAML file or one of {', '.join(bundled())}")
    return loads(text, label, overrides)


def refuse_repeats(overrides: Sequence[str]) -> None:
    """Raises: ValueError: a key is set twice on one command line, as it would be an error in a file."""
    first: dict[str, str] = {}
    for override in overrides:
        key, equals, _ = override.partition("=")
        if equals and first.setdefault(key, override) is not override:
            raise ValueError(f"override {override}: {key}: set twice, first by {first[key]}")


def loads(text: str, label: str, overrides: tuple[str, ...] | list[str] = ()) -> Recipe:
    """`load` from text; `label` names it in messages."""
    try:
        return _loads(text, label, overrides)
    except ValueError as error:
        if str(error).startswith("override "):
            raise
        # An override may make senseless what stands in the file: without it there is no such complaint.
        others = {one: [other for other in overrides if other != one] for one in overrides}
        first = _complaint(text, label, overrides)
        guilty = [one for one, rest in others.items() if _complaint(text, label, rest) != first]
        if not guilty:
            raise
        raise ValueError(f"override {' or '.join(guilty)}: does not go with {error}") from None


def _complaint(text: str, label: str, overrides: tuple[str, ...] | list[str]) -> str | None:
    """The first mistake of a recipe; None if there is none."""
    try:
        _loads(text, label, overrides)
    except ValueError as error:
        return str(error).partition(" (and ")[0]
    return None


def _loads(text: str, label: str, overrides: tuple[str, ...] | list[str]) -> Recipe:
    root = parse(text, lambda line: f"{label}:{line}")
    if root.value is None:
        raise ValueError(f"{root.place}: empty; a recipe needs at least name and stages (see `tenko run --help`)")
    if not isinstance(root.value, dict):
        raise ValueError(f"{root.place}: must be a mapping of keys to values, is {describe(root)}")
    for override in overrides:
        _override(root, override)
    problems = Problems()
    stage_node = root.value.pop("stages", None)
    stage_place = root.keys.pop("stages", root.place)
    recipe = build(_Head, root, "", problems)
    stages = _stages(stage_node, stage_place, problems)
    problems.check()
    if recipe.comm.route != "fp32" and any(getattr(stage.config, "engine", "ddp") == "deepspeed" for stage in stages):
        message = f"must be fp32 with engine: deepspeed, which exchanges gradients itself, is {recipe.comm.route}"
        problems.add(root.keys.get("comm", root.place), "comm.route", message)
        problems.check()
    served = recipe.comm.route == "server" or any(rule.route == "server" for rule in recipe.comm.split)
    if served and any(getattr(stage.config, "moments", "zero") == "restore" for stage in stages):
        message = "owners of shards keep Adam's moments, which a lottery can't mask; set moments: zero in the lottery"
        problems.add(root.keys.get("comm", root.place), "comm.route", message)
        problems.check()
    if served and any(s.kind == "quant_noise" and getattr(s.config, "scheme", "") == "lat" for s in stages):
        message = "owners of shards keep Adam's moments, which scheme: lat weights errors by; take scheme: ternary"
        problems.add(root.keys.get("comm", root.place), "comm.route", message)
        problems.check()
    head = {key: getattr(recipe, key) for key in _TOP_KEYS if key != "stages"}
    return Recipe(**head, stages=stages)


@dataclass(frozen=True, kw_only=True)
class _Head(Recipe):
    """A recipe with the stages left out, which `build` cannot know the types of; "stages" stays a valid key."""


def _stages(node: Node | None, place: str, problems: Problems) -> tuple[StageSpec, ...]:
    kinds = ", ".join(STAGE_CONFIGS)
    if node is None or not isinstance(node.value, list) or not node.value:
        problems.add(place, "stages", f"must be a list of at least one stage; kinds: {kinds}")
        return ()
    specs: list[StageSpec] = []
    training: Node | None = None
    before = len(problems.found)
    for index, item in enumerate(node.value):
        if isinstance(item.value, str):  # `- quantize`: every default
            item = Node(item.place, {item.value: Node(item.place, None, "")}, keys={item.value: item.place})
        if not isinstance(item.value, dict):
            problems.add(item.place, f"stages[{index}]", f"must be a mapping like `train: {{...}}`; kinds: {kinds}")
            continue
        named = [key for key in item.value if key != "name"]
        unknown = [key for key in named if key not in STAGE_CONFIGS]
        if unknown:
            problems.add(item.keys[unknown[0]], f"stages[{index}]", f"unknown stage {unknown[0]}; kinds: {kinds}")
            continue
        if len(named) != 1:
            found = " and ".join(named) or "none"
            problems.add(item.place, f"stages[{index}]", f"needs one kind, has {found}; kinds: {kinds}")
            continue
        kind = named[0]
        name_node = item.value.get("name")
        name = kind if name_node is None else name_node.text or ""
        name_place = item.keys.get("name", item.keys[kind])
        if not _NAME.fullmatch(name) or name in _TOP_KEYS:
            problems.add(name_place, f"stages[{index}].name", f"letters, digits, - and _, no key's name; is {name!r}")
        if any(spec.name == name for spec in specs):
            problems.add(name_place, f"stages[{index}]", f"a second stage named {name}; give it another `name:`")
        bad_order = why_not(kind, specs)
        if bad_order:
            problems.add(item.keys[kind], kind, bad_order)
        settings = _inherit(STAGE_CONFIGS[kind], item.value[kind], training)
        training = training or (item.value[kind] if kind == "train" else None)
        config = build(STAGE_CONFIGS[kind], settings, name, problems)
        if len(problems.found) == before:  # it looks at the stages so far, which must be whole
            senseless = problem(kind, config, specs)
            if senseless is not None:
                place = settings.keys.get(senseless[0].partition(".")[0], item.keys[kind])
                problems.add(place, join(name, senseless[0]) if senseless[0] else name, senseless[1])
        specs.append(StageSpec(kind=kind, name=name, config=config))
    return tuple(specs)


def _inherit(cls: type, node: Node, training: Node | None) -> Node:
    """The settings of a stage, its `train` filled up with what the stage train says."""
    inherits = any(item.name == "train" for item in dataclasses.fields(cls))
    if not inherits or training is None or not isinstance(training.value, dict):
        return node
    mapping = node.value if isinstance(node.value, dict) else {}
    if node.value is not None and not isinstance(node.value, dict):
        return node
    own = mapping.get("train", Node(node.place, None, ""))
    if own.value is not None and not isinstance(own.value, dict):
        return node
    given = {key: value for key, value in training.value.items() if key not in NOT_INHERITED}
    merged = Node(own.place, {**given, **(own.value or {})}, keys={**training.keys, **own.keys})
    return Node(node.place, {**mapping, "train": merged}, keys={"train": own.place, **node.keys})


def _override(root: Node, override: str) -> None:
    """Set what `key=value` says in the tree, so that it is checked as if it stood in the file."""
    key, equals, text = override.partition("=")
    place = f"override {override}"
    if not equals or not key:
        raise ValueError(f"{place}: must be key=value, for instance train.max_update=100")
    value = parse(text, lambda line: place)
    first, *rest = key.split(".")
    target, label = root, ""
    if rest or first not in _TOP_KEYS:
        found = _named_stage(root, first)
        if found is not None:
            target, label = found, first
            if not rest:
                raise ValueError(f"{place}: names a stage; set one of its keys, for instance {first}.KEY=VALUE")
        elif first not in _TOP_KEYS:
            valid = _TOP_KEYS[:-1] + [f"{name}.KEY" for name in _stage_nodes(root)]
            raise ValueError(f"{place}: {first}: {unknown_key(first, valid)}")
        else:
            rest = [first, *rest]
    else:
        rest = [first]
    if label == "" and rest[0] == "stages":
        raise ValueError(f"{place}: stages are set in the recipe file; override a stage's key by its name")
    for depth, part in enumerate(rest):
        label = join(label, part)
        if not part:
            raise ValueError(f"{place}: a key is empty")
        target.keys[part] = place
        if depth == len(rest) - 1:
            target.value[part] = value
            return
        child = target.value.get(part)
        if child is None or not isinstance(child.value, dict):
            child = target.value[part] = Node(place, {})
        target = child


def _stage_nodes(root: Node) -> dict[str, tuple[Node, str]]:
    """The stages' mappings and kinds by name, as far as the file is well formed; the rest is reported later."""
    stages = root.value.get("stages")
    found: dict[str, tuple[Node, str]] = {}
    for index, item in enumerate(stages.value if stages is not None and isinstance(stages.value, list) else []):
        if isinstance(item.value, str):
            item = Node(item.place, {item.value: Node(item.place, None, "")}, keys={item.value: item.place})
            stages.value[index] = item
        if not isinstance(item.value, dict):
            continue
        for kind in item.value:
            if kind in STAGE_CONFIGS:
                name = item.value["name"].text if "name" in item.value else kind
                found.setdefault(name or kind, (item, kind))
    return found


def _named_stage(root: Node, name: str) -> Node | None:
    entry = _stage_nodes(root).get(name)
    if entry is None:
        return None
    item, kind = entry
    node = item.value[kind]
    if node.value is None:
        node.value = {}
    return node if isinstance(node.value, dict) else None


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain YAML types, every default written out."""
    plain = {item.name: _plain(getattr(recipe, item.name)) for item in dataclasses.fields(Recipe)}
    plain["stages"] = [
        {spec.kind: _plain(spec.config)}
        if spec.name == spec.kind
        else {spec.kind: _plain(spec.config), "name": spec.name}
        for spec in recipe.stages
    ]
    return plain


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `loads` reads it back to an equal Recipe."""
    return dump_plain(to_dict(recipe))


def dump_plain(value: Any) -> str:
    """YAML in the order of the keys, Unicode as it is."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)


def config_to_dict(config: StageConfig) -> dict[str, Any]:
    """A stage's settings as plain YAML types."""
    plain = _plain(config)
    assert isinstance(plain, dict)
    return plain


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
