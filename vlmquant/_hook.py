"""Lets `import vlmquant` reach transformers' loader without importing it: what has to be done waits for transformers.

Set VLMQUANT_DISABLE_HF_PATCH=1 to leave transformers as it is; `vlmquant.load` works either way.
"""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # the command must reach its signal handlers at once, and `typing` alone takes 10 ms
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

DISABLE = "VLMQUANT_DISABLE_HF_PATCH"
"""Set to 1, transformers is left as it is; `vlmquant.load` keeps weights packed all the same."""
WATCHED = "transformers.quantizers.auto"
"""The module that holds transformers' table of quantizers."""
METHOD = "compressed-tensors"


class _Watcher:
    """Waits for WATCHED to be imported, finds it as everybody else would, and runs `_defer` after it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        import importlib.util

        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_defer(module: ModuleType) -> None:
                execute(module)
                _defer(module)

            spec.loader.exec_module = execute_and_defer  # type: ignore[method-assign]
        return spec


def _defer(module: ModuleType) -> None:
    """Put into the table an entry that installs vlmquant's when a compressed-tensors checkpoint is first loaded.

    Not at once: transformers is in the middle of its own import here, and vlmquant's loader needs it whole.
    """
    table: dict[str, Any] = module.AUTO_QUANTIZER_MAPPING

    def install_then_choose(config: Any, **arguments: Any) -> Any:
        from vlmquant.loading import install

        install()
        return table[METHOD](config, **arguments)

    table[METHOD] = install_then_choose


def disabled() -> bool:
    return os.environ.get(DISABLE, "") not in ("", "0")


def register() -> None:
    """Make transformers' `from_pretrained` keep vlmquant's checkpoints packed, now or once transformers is imported."""
    if disabled() or any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        return
    if WATCHED in sys.modules:
        _defer(sys.modules[WATCHED])
    else:
        sys.meta_path.insert(0, _Watcher())
