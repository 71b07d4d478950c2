"""The private names of Hydra and OmegaConf, each behind a named function.

A new version may change any of them; `tests/test_internals.py` then names the broken one.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig


def unresolved(config: DictConfig, key: str) -> Any:
    """Returns the value of `key` as written, with its interpolations."""
    node: Any = config._get_node(key)
    return node._value()
