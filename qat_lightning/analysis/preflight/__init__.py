"""The preflight: would a network train, convert and run as int8, and how much of it becomes int8?"""

from qat_lightning.analysis.preflight.network_report import Finding, NetworkReport
from qat_lightning.analysis.preflight.preflight import preflight

__all__ = ["Finding", "NetworkReport", "preflight"]
