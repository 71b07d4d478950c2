"""`python -m qat_lightning` is `qat-train`."""

from qat_lightning.cli.train import main

if __name__ == "__main__":
    main()
