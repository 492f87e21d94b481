"""A row for a model that has none in the table: where its parts are, by its config and its modules' names."""

import re
from pathlib import Path
from typing import Any

from torch import nn

from vlmquant.errors import InputError
from vlmquant.families import WAY_OUT, Family

VISION = re.compile(r"vision|visual|image|vit$|sam_model|radio")
"""In the last part of the names of vision towers."""
PROJECTOR = re.compile(
    r"projector|projection|proj$|merger|connector|aligner|adapter|resampler|abstractor|perceiver|q_?former|downsample"
    r"|embed_vision|query_tokens|newline|visual_embeddings_table|view_seperator|bridge"
)
"""In the last part of the names of what leads from the vision encoder to the language model."""
OTHER = re.compile(r"audio|speech|sound|talker|token2wav|code2wav|vq|generation|mtp|action|protein|video_head")
"""In the names of what is neither."""
WRAPPED = ("thinker",)
"""Submodels that do the work of a model that has no embedding of its own."""


def guess_family(config: Any, model: nn.Module, model_dir: Path) -> Family:
    """Where the parts of a model are. InputError where vision encoder, language model or embedding cannot be found."""
    from transformers import PreTrainedModel

    modules = dict(model.named_modules())
    runs, whole = "", model
    for name in WRAPPED:
        if hasattr(model, name) and not _embedding(model, modules):
            runs, whole = name, getattr(model, name)
            config = whole.config
    embedding = _embedding(whole, modules)
    if not embedding:
        raise InputError(f"{model_dir}: {_cannot(config, 'input embedding', model)}")
    head = _name_of(_or_none(whole, "get_output_embeddings"), modules)
    submodels = [name for name, module in modules.items() if name and isinstance(module, PreTrainedModel)]
    vision_config, text_config = _sub(config, "vision"), _sub(config, "text")

    def roots(part: Any) -> list[str]:
        """The outermost submodels that have this config."""
        return _outermost([name for name in submodels if part is not None and modules[name].config is part])

    towers = [name for name in roots(vision_config) if not embedding.startswith(f"{name}.")]
    language = next((name for name in roots(text_config) if embedding.startswith(f"{name}.")), "")
    if not language:
        around = [name for name in submodels if embedding.startswith(f"{name}.") and modules[name].config is not config]
        language = around[0] if around else _around_layers(embedding, modules)
    if not towers:
        towers = _outermost(
            [
                name
                for name, module in modules.items()
                if VISION.search(name.rpartition(".")[2])
                and not PROJECTOR.search(name.rpartition(".")[2])
                and not OTHER.search(name)
                and not embedding.startswith(f"{name}.")
                and _has_list(module)
            ]
        )
    if not language or not any(isinstance(module, nn.ModuleList) for module in modules[language].modules()):
        raise InputError(f"{model_dir}: {_cannot(config, 'language model', model)}")
    if not towers:
        raise InputError(f"{model_dir}: {_cannot(config, 'vision encoder', model)}")
    projector, other = [], []
    for name in _loose_parts(model, (*towers, language, embedding, head)):
        leaf = name.rpartition(".")[2]
        if OTHER.search(name):
            other.append(name)
        elif PROJECTOR.search(leaf):
            projector.append(name)
        elif VISION.search(leaf):
            (towers if name in modules and _has_list(modules[name]) else projector).append(name)
        else:
            other.append(name)
    for tower in towers:
        projector += _ways_out(tower, modules, text_config)
    return Family(tuple(towers), tuple(projector), language, embedding, head, tuple(other), runs=runs, source="guess")


def _around_layers(embedding: str, modules: dict[str, nn.Module]) -> str:
    """The innermost module around the embedding that holds layers as well."""
    parts = embedding.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]
    return next((name for name in names if _has_list(modules[name])), parts[0])


def _cannot(config: Any, what: str, model: nn.Module) -> str:
    parts = ", ".join(name for name, _ in model.named_children()) or "nothing"
    base = getattr(model, "base_model_prefix", "")
    if base and hasattr(model, base):
        parts = ", ".join(f"{base}.{name}" for name, _ in getattr(model, base).named_children())
    return f"model type {config.model_type}: found no {what} among its parts: {parts}; {WAY_OUT}"


def _sub(config: Any, what: str) -> Any:
    """The config of the vision encoder or of the language model."""
    named = getattr(config, f"{what}_config", None)
    if named is None and what == "text":
        text = config.get_text_config()
        named = text if text is not config else None
    return named if hasattr(named, "model_type") else None


def _or_none(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        found: nn.Module | None = getattr(model, getter)()
    except (NotImplementedError, AttributeError):
        return None
    return found


def _embedding(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    return _name_of(_or_none(model, "get_input_embeddings"), modules)


def _name_of(module: nn.Module | None, modules: dict[str, nn.Module]) -> str:
    return next((name for name, one in modules.items() if one is module), "") if module is not None else ""


def _outermost(names: list[str]) -> list[str]:
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _has_list(module: nn.Module) -> bool:
    return any(isinstance(one, nn.ModuleList) for one in module.modules())


def _loose_parts(model: nn.Module, placed: tuple[str, ...]) -> list[str]:
    """The outermost modules and parameters that hold nothing placed and lie in nothing placed."""
    parts = []

    def visit(module: nn.Module, name: str) -> None:
        for leaf, _ in module.named_parameters(recurse=False):
            parts.append(f"{name}.{leaf}" if name else leaf)
        for leaf, child in module.named_children():
            full = f"{name}.{leaf}" if name else leaf
            if full in placed or not any(True for _ in child.parameters()):
                continue
            if any(one.startswith(f"{full}.") for one in placed if one):
                visit(child, full)
            else:
                parts.append(full)

    visit(model, "")
    return parts


def _ways_out(tower: str, modules: dict[str, nn.Module], text_config: Any) -> list[str]:
    """Parts of a vision tower, outside its longest list of layers, that lead to the language model."""
    root = modules[tower]
    lists = [
        (len(one), name)
        for name, one in root.named_modules()
        if isinstance(one, nn.ModuleList) and not PROJECTOR.search(name)
    ]
    blocks = max(lists)[1] if lists else ""
    width = getattr(text_config, "hidden_size", None)
    own = getattr(getattr(root, "config", None), "hidden_size", None)
    found = []
    for name, child in root.named_children():
        if name == blocks or blocks.startswith(f"{name}.") or not any(True for _ in child.parameters()):
            continue
        widths = {one.weight.shape[0] for one in child.modules() if isinstance(one, nn.Linear | nn.Conv2d)}
        if PROJECTOR.search(name) or (width in widths and width != own and "embed" not in name):
            found.append(f"{tower}.{name}")
    return found
