"""Data modules, networks by name, and an image classifier for `qat-train`."""
