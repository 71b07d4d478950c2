"""Simulated int8 rounding: the arithmetic, the module that rounds, its ranges and its phases."""
