"""Before the first epoch: would the network convert, would it run as int8, and how much of it is int8?"""

from qat_lightning.analysis.preflight.network_report import Finding, NetworkReport
from qat_lightning.analysis.preflight.preflight import preflight

__all__ = ["Finding", "NetworkReport", "preflight"]
