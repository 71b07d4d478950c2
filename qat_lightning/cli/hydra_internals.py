"""The private names of Hydra, OmegaConf and argparse, each behind a named function.

A new version may change any of them; `tests/test_internals.py` then names the broken one.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from omegaconf import DictConfig


def unresolved(config: DictConfig, key: str) -> Any:
    """Returns the value of `key` as written, with its interpolations."""
    node: Any = config._get_node(key)
    return node._value()


def accept_lazy_help() -> None:
    """Lets Hydra 1.3 start on Python 3.14, where argparse checks the help of each option as it is added.

    The help of Hydra's `--shell-completion` is no string: it is written when it is printed.
    """
    if not hasattr(argparse.ArgumentParser, "_check_help"):
        return
    hydra_main: Any = sys.modules["hydra.main"]  # the name in the package is that of the function
    get_args_parser = hydra_main.get_args_parser

    def without_check() -> argparse.ArgumentParser:
        parser: Any = argparse.ArgumentParser
        check = parser._check_help
        parser._check_help = lambda self, action: None
        try:
            return get_args_parser()
        finally:
            parser._check_help = check

    hydra_main.get_args_parser = without_check
