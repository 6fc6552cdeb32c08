"""An event in a device's work, for asynchronous copies to the host.

Trap: an asynchronous copy returns before the data is there, and reading it at once gives old bytes without an error.
"""

from __future__ import annotations

import torch


class DeviceEvent:
    """An event recorded now on a device's current stream; copies enqueued before it are complete once it has occurred.

    Args:
        device: The device. Nothing is recorded for a CPU, whose work is always complete.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type != "cpu":
            module = torch.get_device_module(device)
            self._event = module.Event()
            self._event.record(module.current_stream(device))

    def wait(self) -> None:
        """Block the host until the event has occurred. If the device was given further work since, it usually has."""
        if self._event:
            self._event.synchronize()
