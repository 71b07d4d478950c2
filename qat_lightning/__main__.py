"""`python -m qat_lightning` is `qat-train`."""

from qat_lightning.train import main

if __name__ == "__main__":
    main()
