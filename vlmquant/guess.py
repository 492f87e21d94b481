"""A row for a model that has none in the table: where its parts are, by its config and its modules' names, or, where
its class is not known, by the names of its tensors alone."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from torch import nn

from vlmquant.errors import InputError, shown
from vlmquant.families import WAY_OUT, Family
from vlmquant.headers import EMBEDDINGS, HEADS, tops
from vlmquant.shards import some

VISION = re.compile(r"vision|visual|image|vit$|sam_model|radio")
"""In the last part of the names of vision towers."""
PROJECTOR = re.compile(
    r"projector|projection|proj$|merger|connector|aligner|adapter|resampler|abstractor|perceiver|q_?former|downsample"
    r"|embed_vision|query_tokens|newline|visual_embeddings_table|view_seperator|bridge"
)
"""In the last part of the names of what leads from the vision encoder to the language model."""
OTHER = re.compile(r"audio|speech|sound|talker|token2wav|code2wav|vq|generation|mtp|action|protein|video_head")
"""In the names of what is neither."""
TOWERS = re.compile(VISION.pattern + r"|vpm|tower|siglip|clip|dino|img_processor")
"""The same in the names that checkpoints have of their own."""
FURTHER_EMBEDDINGS = ("embeddings", "embed")
"""Names of input embeddings that other tables have as well."""
BESIDE_LAYERS = re.compile(
    r"projector|mm_|multi_?modal|vision|visual|image|connector|merger|resampler|aligner|abstractor"
)
"""In the names of projectors that lie in the language model."""
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
        towers = _towers(modules, embedding, VISION)
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
    width = getattr(text_config, "hidden_size", None)
    for tower in towers:
        own = getattr(getattr(modules[tower], "config", None), "hidden_size", None)
        projector += _ways_out(tower, modules, width, own)
    return Family(tuple(towers), tuple(projector), language, embedding, head, tuple(other), runs=runs, source="guess")


def guess_by_names(model: nn.Module, model_dir: Path, *, layers: int | None = None) -> Family:
    """Where the parts of a model are that `headers.model_of` made up, named as its tensors.

    layers: of the language model, where the config says so; further ones, which predict several tokens ahead, are kept.
    InputError says what was looked for in vain, and what is there.
    """
    modules = dict(model.named_modules())
    embedding = _embedding_by_name(modules, EMBEDDINGS) or _embedding_by_name(modules, FURTHER_EMBEDDINGS)
    if embedding is None:
        wanted = "input embedding (" + ", ".join(EMBEDDINGS) + ")"
        raise InputError(f"{model_dir}: {_unfound(wanted, model)}")
    language = _around_layers(embedding, modules) if "." in embedding else _longest_list(model)
    if language is None or not _has_list(modules[language]):
        raise InputError(f"{model_dir}: {_unfound(f'layers of a language model beside {shown(embedding)}', model)}")
    towers = _towers(modules, embedding, TOWERS)
    if not towers:
        raise InputError(f"{model_dir}: {_unfound('vision encoder (vision, visual, image, vit, ...)', model)}")
    table = _tables(modules[embedding])[0]
    width = table.shape[1]
    head = _head_by_name(modules, embedding, table.shape)
    projector, other = [], []
    for name in _loose_parts(model, (*towers, language, embedding, head)):
        leaf, module = name.rpartition(".")[2], modules.get(name)
        leads = (
            module is not None and not _has_list(module) and any(one.out_features == width for one in _linears(module))
        )
        if not OTHER.search(name) and (PROJECTOR.search(leaf) or TOWERS.search(leaf) or leads):
            projector.append(name)
        else:
            other.append(name)
    around = modules[language]
    lists = [one for _, one in around.named_children() if isinstance(one, nn.ModuleList) and _linears(one)]
    for leaf, _ in (*around.named_children(), *around.named_parameters(recurse=False)):
        name = f"{language}.{leaf}"
        module = modules.get(name)
        if name in (*towers, embedding, head) or isinstance(module, nn.ModuleList):
            continue
        if OTHER.search(leaf) or (lists and module is not None and _has_list(module)):
            other.append(name)  # not what the layers are
        elif BESIDE_LAYERS.search(leaf):
            projector.append(name)
    for tower in towers:
        sizes = Counter(one.in_features for one in _linears(modules[tower]))
        projector += _ways_out(tower, modules, width, sizes.most_common(1)[0][0] if sizes else None)
    for name, one in modules[language].named_children():
        if isinstance(one, nn.ModuleList) and layers is not None:
            numbers = (number for number, _ in one.named_children())
            other += [f"{language}.{name}.{number}" for number in numbers if int(number) >= layers]
    return Family(tuple(towers), tuple(projector), language, embedding, head or HEADS[0], tuple(other), source="names")


def _tables(module: nn.Module) -> list[nn.Parameter]:
    """The matrices that a module holds itself."""
    return [one for one in module.parameters(recurse=False) if one.dim() == 2]


def _longest_list(model: nn.Module) -> str | None:
    """The longest list of layers at the top, where all names of a language model are without that of a module."""
    lists = [
        (len(module), name)
        for name, module in model.named_children()
        if isinstance(module, nn.ModuleList) and not TOWERS.search(name) and not OTHER.search(name)
    ]
    return max(lists)[1] if lists else None


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [one for one in module.modules() if isinstance(one, nn.Linear)]


def _embedding_by_name(modules: dict[str, nn.Module], names: tuple[str, ...]) -> str | None:
    """The outermost module of such a name that holds a matrix, outside all layers and all that is no language model."""
    found = []
    for name, module in modules.items():
        parts = name.split(".")
        tables = _tables(module)
        elsewhere = any(VISION.search(part) or PROJECTOR.search(part) for part in parts[:-1]) or OTHER.search(name)
        strange = elsewhere or any(part.isdecimal() for part in parts)
        if parts[-1] in names and tables and not strange:
            found.append((len(parts), -tables[0].shape[0], name))
    return min(found)[-1] if found else None


def _head_by_name(modules: dict[str, nn.Module], embedding: str, shape: tuple[int, ...]) -> str:
    """A head by its name, or a linear of the embedding's shape outside all layers; empty where there is none."""
    found = []
    for name, module in modules.items():
        parts = name.split(".")
        strange = name == embedding or OTHER.search(name) or any(part.isdecimal() for part in parts)
        if isinstance(module, nn.Linear) and not strange:
            if parts[-1] in HEADS:
                found.append((0, len(parts), name))
            elif (module.out_features, module.in_features) == shape:
                found.append((1, len(parts), name))
    return min(found)[-1] if found else ""


def _unfound(what: str, model: nn.Module) -> str:
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return f"found no {what} among the names of {len(names)} tensors, which lie below {some(tops(names))}; {WAY_OUT}"


def _towers(modules: dict[str, nn.Module], embedding: str, words: re.Pattern[str]) -> list[str]:
    """The outermost modules that are named as vision towers and have layers."""
    return _outermost(
        [
            name
            for name, module in modules.items()
            if words.search(name.rpartition(".")[2])
            and not PROJECTOR.search(name.rpartition(".")[2])
            and not OTHER.search(name)
            and not embedding.startswith(f"{name}.")
            and _has_list(module)
        ]
    )


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


def _ways_out(tower: str, modules: dict[str, nn.Module], width: int | None, own: int | None) -> list[str]:
    """Parts of a vision tower, outside its longest list of layers, that lead to the language model.

    width, own: of the language model's hidden states, and of the tower's.
    """
    root = modules[tower]
    lists = [
        (len(one), name)
        for name, one in root.named_modules()
        if isinstance(one, nn.ModuleList) and not PROJECTOR.search(name)
    ]
    blocks = max(lists)[1] if lists else ""
    found = []
    for name, child in root.named_children():
        if name == blocks or blocks.startswith(f"{name}.") or not any(True for _ in child.parameters()):
            continue
        widths = {one.weight.shape[0] for one in child.modules() if isinstance(one, nn.Linear | nn.Conv2d)}
        if PROJECTOR.search(name) or (width in widths and width != own and "embed" not in name):
            found.append(f"{tower}.{name}")
    return found
