"""To this Python the modules that ZIPLORA_NOT_REQUIRED names are not installed."""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

_HIDDEN = frozenset(os.environ.get("ZIPLORA_NOT_REQUIRED", "").split(","))


class _OnlyRequired(PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return None if fullname in _HIDDEN else super().find_spec(fullname, path, target)


sys.meta_path[:] = [_OnlyRequired if finder is PathFinder else finder for finder in sys.meta_path]
