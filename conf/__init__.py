"""Hydra configs, installed as `qat_lightning.conf`."""
