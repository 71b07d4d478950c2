"""The preflight: checks whether a network trains, converts and runs as int8, and how much becomes int8."""

from qat_lightning.analysis.preflight.network_report import Finding, NetworkReport
from qat_lightning.analysis.preflight.preflight import preflight

__all__ = ["Finding", "NetworkReport", "preflight"]
