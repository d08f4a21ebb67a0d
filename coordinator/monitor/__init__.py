"""The human monitor: ``execute`` runs one line, ``MonitorFrontend`` is the prompt on a device."""

from coordinator.monitor.commands import execute
from coordinator.monitor.frontend import MonitorFrontend

__all__ = ["MonitorFrontend", "execute"]
