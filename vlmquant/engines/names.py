"""The names that vLLM has for modules, and which group of a config it takes for each, as its own matching does."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmquant.engines.table import VLLM_NAMES, Prefixes
from vlmquant.formats.compressed_tensors import REGEX, regex_matches


def vllm_name(name: str, model_type: str) -> str | None:
    """What vLLM calls a module on disk; None for a model type whose names are not in the table."""
    row = next((row for row in VLLM_NAMES if model_type in row.model_types), None)
    return None if row is None else _renamed(f"{name}.", row)[:-1]


def _renamed(name: str, row: Prefixes) -> str:
    for old, new in row.renamed:
        if name.startswith(old):
            name = name.replace(old, new, 1)
    return name


@dataclass(frozen=True)
class Asked:
    """A module of an engine: its name, the names of the linears that it runs as one, and its class."""

    name: str
    shards: tuple[str, ...]
    kind: str


@dataclass(frozen=True)
class Answer:
    """The group that an engine takes a module for; None: 16 bits. split: it finds the shards to differ, and refuses."""

    group: str | None
    split: bool = False


def vllm_answers(asked: Sequence[Asked], config: Mapping[str, Any], model_type: str) -> list[Answer]:
    """What vLLM finds for each module in a compressed-tensors config (compressed_tensors/utils.py).

    Names that are ignored first, the fused name before its shards; then targets, the fused name first, all of its
    shards next, and the class last. Names in the config are renamed as those of tensors are, regexes are not: so a bare
    lm_head, which the rules for what follows a dot do not touch, stays what it is.
    """
    row = next((row for row in VLLM_NAMES if model_type in row.model_types), None)

    def renamed(targets: Iterable[str]) -> list[str]:
        return [one if row is None or one.startswith(REGEX) else _renamed(one, row) for one in targets]

    ignore = renamed(config.get("ignore") or ())
    groups = {key: renamed(group.get("targets") or ()) for key, group in config.get("config_groups", {}).items()}
    targets = {target: key for key, ones in groups.items() for target in ones}
    names = sorted({name for one in asked for name in (one.name, *one.shards)})
    fitting = regex_matches([*ignore, *targets], names)

    def first(name: str, ones: Iterable[str]) -> str | None:
        return next((one for one in ones if one == name or name in fitting.get(one, ())), None)

    return [_answer(one, ignore, targets, first) for one in asked]


def _answer(one: Asked, ignore: Collection[str], targets: Mapping[str, str], first: Any) -> Answer:
    if first(one.name, ignore) is not None:
        return Answer(None)
    ignored = [first(shard, ignore) is not None for shard in one.shards]
    if any(ignored):
        return Answer(None, split=not all(ignored))
    found = first(one.name, targets)
    if found is None:
        of_shards = [first(shard, targets) for shard in one.shards]
        found = of_shards[0] if of_shards and None not in of_shards else None
        if found is not None and len({targets[target] for target in of_shards}) > 1:
            return Answer(targets[found], split=True)
    if found is None:
        found = next(
            (one_ for one_ in targets if not one_.startswith(REGEX) and one_.lower() in one.kind.lower()), None
        )
    return Answer(None if found is None else targets[found])
