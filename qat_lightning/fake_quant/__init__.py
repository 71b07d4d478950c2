"""Simulated int8 rounding: its arithmetic, the module that does it, its ranges and its phases."""
