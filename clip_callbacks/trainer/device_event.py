"""A value on its way from a device to the host, which does not wait for it."""

from __future__ import annotations

import torch


class DeviceEvent:
    """Marks a moment in a device's work; what was sent to the host before it is there once the device has got this far.

    Args:
        device: Where the work is done; a CPU's is done already.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = None
        if device.type != "cpu":
            module = torch.get_device_module(device)
            self._event = module.Event()
            self._event.record(module.current_stream(device))

    def wait(self) -> None:
        """See that the device has got this far; it has, if it was given more to do since."""
        if self._event:
            self._event.synchronize()
