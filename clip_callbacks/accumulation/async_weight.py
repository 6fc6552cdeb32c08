"""The weight of a micro-batch, asked for when the batch comes, known when its backward pass begins."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clip_callbacks.accumulation.weights import Weight, checked
from clip_callbacks.trainer.device_event import DeviceEvent


class AsyncWeight:
    """A weight that may be on its way from a device: the forward pass is under way before anybody waits for it.

    Args:
        source: From the batch to its weight.
        batch: As ``training_step`` gets it.
        batch_idx: Its number.
    """

    def __init__(self, source: Weight, batch: Any, batch_idx: int) -> None:
        self._source, self._batch_idx = source, batch_idx
        self._event: DeviceEvent | None = None
        self._error: Exception | None = None
        try:
            self._value: Any = source(batch)
        except Exception as error:  # raised where other ranks can be told of it
            self._value, self._error = None, error
        if isinstance(self._value, Tensor) and not self._value.is_cpu:
            device, self._value = self._value.device, self._value.to("cpu", non_blocking=True)
            self._event = DeviceEvent(device)

    def read(self) -> float:
        """The weight.

        Raises:
            ValueError: If it is not a finite number of at least 0; it names the callable and the batch.
            Exception: What the source raised.
        """
        if self._error:
            raise self._error
        if self._event:
            self._event.wait()
        return checked(self._value, self._source, self._batch_idx)
