"""The commands `qat-train`, `qat-report` and `qat-bench`, and how Hydra configures them."""
