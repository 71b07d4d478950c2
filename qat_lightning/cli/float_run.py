"""The process that `float_first` starts: trains the configuration in a given file."""

from __future__ import annotations

import logging
import sys

from omegaconf import DictConfig, OmegaConf

from qat_lightning.cli import resolvers
from qat_lightning.cli.console import WithoutLightningNews, ignore_advice, print_results
from qat_lightning.cli.train import train


def main() -> None:
    """Trains the configuration in the file that the command line names, and prints the results."""
    resolvers.register()
    ignore_advice()
    handler = logging.StreamHandler(sys.stdout)
    handler.addFilter(WithoutLightningNews())
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    cfg = OmegaConf.load(sys.argv[1])
    assert isinstance(cfg, DictConfig)
    metrics = train(cfg)
    if metrics:
        print_results(metrics)


if __name__ == "__main__":
    main()
