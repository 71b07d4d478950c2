"""Everything that happens during a Lightning run: checks, phases, checkpoints, conversion and messages."""
