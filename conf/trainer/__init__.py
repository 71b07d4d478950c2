"""The Lightning Trainer: devices, processes, precision and logging."""
