"""The weight of a micro-batch, copied from the device while the forward pass runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clip_callbacks.accumulation.weights import Weight, checked
from clip_callbacks.trainer.device_event import DeviceEvent


class AsyncWeight:
    """A weight whose copy from the device is waited for when it is read, after the forward pass has been launched.

    Args:
        source: Function from a batch to its weight.
        batch: The batch that ``training_step`` gets.
        batch_idx: Number of the batch in its epoch.
    """

    def __init__(self, source: Weight, batch: Any, batch_idx: int) -> None:
        self._source, self._batch_idx = source, batch_idx
        self._event: DeviceEvent | None = None
        self._error: Exception | None = None
        try:
            # Called before the forward pass, so that the copy below is queued ahead of its work and does not wait for it.
            self._value: Any = source(batch)
        except Exception as error:  # raised by `read`, at a point where the other ranks learn of it
            self._value, self._error = None, error
        if isinstance(self._value, Tensor) and not self._value.is_cpu:
            device, self._value = self._value.device, self._value.to("cpu", non_blocking=True)
            self._event = DeviceEvent(device)

    def read(self) -> float:
        """Return the weight, after waiting for its copy.

        Raises:
            ValueError: If it is not a finite number of at least 0; it names the callable and the batch.
            Exception: If the source has raised it.
        """
        if self._error:
            raise self._error
        if self._event:
            self._event.wait()
        return checked(self._value, self._source, self._batch_idx)
