"""Before the first epoch: would the network convert, would it run as int8, and how much of it is int8?"""

from qat_lightning.inspection.preflight import preflight
from qat_lightning.inspection.report import Finding, NetworkReport

__all__ = ["Finding", "NetworkReport", "preflight"]
