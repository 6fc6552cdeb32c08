"""Charts of TensorBoard's dashboard, read as its own plugin reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext

Charts: TypeAlias = dict[str, list[str]]
"""The patterns in each chart, by its title."""


def as_charts(layout: dict[str, Any]) -> dict[str, Charts]:
    return {
        category["title"]: {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
        for category in layout["category"]
    }


def layout_of(folder: str | Path) -> dict[str, Charts]:
    """By category, the charts that TensorBoard's own plugin makes of the runs in a folder."""
    from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin

    events = EventMultiplexer()
    events.AddRunsFromDirectory(str(folder))
    events.Reload()
    plugin = CustomScalarsPlugin(TBContext(logdir=str(folder), data_provider=MultiplexerDataProvider(events, str(folder))))
    layout = plugin.layout_impl(RequestContext(), "")
    return as_charts(json.loads(layout)) if layout else {}
