"""Examples of qat-lightning."""
