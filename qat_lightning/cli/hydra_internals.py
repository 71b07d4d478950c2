"""The private names of Hydra and OmegaConf, each behind a named function.

A new version may change any of them: `tests/test_internals.py` tells which one.
"""

from __future__ import annotations

from typing import Any


def unresolved(config: Any, key: str) -> Any:
    """Returns the value of `key` as written, with its interpolations."""
    return config._get_node(key)._value()
