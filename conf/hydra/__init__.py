"""Settings of Hydra itself."""
