"""The data to train on: LightningDataModules."""
