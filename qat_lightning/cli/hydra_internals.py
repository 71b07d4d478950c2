"""Every name of Hydra and OmegaConf that is private, each behind a function of our own.

A new version may change any of them: `tests/test_internals.py` tells which one.
"""

from __future__ import annotations

from typing import Any


def unresolved(config: Any, key: str) -> Any:
    """The value of `key` as it is written, with its interpolations."""
    return config._get_node(key)._value()
