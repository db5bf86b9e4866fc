"""Builds TensorBoard's protobuf messages: values, texts, pictures, histograms, charts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.custom_scalar.layout_pb2 import Category, Chart, Layout
from tensorboard.plugins.custom_scalar.layout_pb2 import MarginChartContent as Margin
from tensorboard.plugins.custom_scalar.layout_pb2 import MultilineChartContent as Lines

__all__ = ["Scalars", "escape_markdown", "event", "histogram", "layout", "picture", "text"]

_MARKUP = re.compile(r"([\\`*_{}\[\]<>()#!|~])")
_BINS = 40


class Scalars:
    """One event with a value for each tag, built once and filled again at each step."""

    def __init__(self, tags: Sequence[str]) -> None:
        self.tags = tags
        self._event = Event(summary=Summary(value=[Summary.Value(tag=tag) for tag in tags]))
        self._slots = list(self._event.summary.value)

    def fill(self, values: npt.NDArray[np.float32], step: int, wall_time: float) -> Event:
        """Returns the event of a step, without the values that are not finite."""
        finite = np.isfinite(values)
        if not finite.all():
            tags = [tag for tag, keep in zip(self.tags, finite.tolist(), strict=True) if keep]
            return Scalars(tags).fill(values[finite], step, wall_time)
        self._event.step, self._event.wall_time = step, wall_time
        for slot, value in zip(self._slots, values.tolist(), strict=True):
            slot.simple_value = value
        return self._event


def event(summary: Summary, step: int, wall_time: float) -> Event:
    """Returns a summary as an event of `step`."""
    return Event(summary=summary, step=step, wall_time=wall_time)


def escape_markdown(words: str) -> str:
    """Returns text from a run as Markdown that shows it unchanged, on one line."""
    return _MARKUP.sub(r"\\\1", "".join(c if c.isprintable() else " " for c in words))


def text(tag: str, markdown: str) -> Summary:
    """Returns an entry for the Text tab."""
    return Summary(value=[_string_tensor(tag, "text", markdown.encode())])


def picture(tag: str, png: bytes, size: tuple[int, int]) -> Summary:
    """Returns an entry for the Images tab; `size` is width and height in pixels."""
    image = Summary.Image(width=size[0], height=size[1], colorspace=3, encoded_image_string=png)
    return Summary(value=[Summary.Value(tag=tag, image=image)])


def histogram(tag: str, values: npt.NDArray[np.float64]) -> Summary:
    """Returns an entry for the Histograms and Distributions tabs.

    Args:
        tag: the tag.
        values: finite values, at least one.
    """
    counts, edges = np.histogram(values, bins=_BINS)
    histo = HistogramProto(
        min=values.min(),
        max=values.max(),
        num=len(values),
        sum=values.sum(),
        sum_squares=np.square(values).sum(),
        # A bucket is given by its upper edge; the first, empty one marks the lowest edge.
        bucket_limit=edges.tolist(),
        bucket=[0.0, *counts.tolist()],
    )
    return Summary(value=[Summary.Value(tag=tag, histo=histo)])


def layout() -> Summary:
    """Returns the Custom Scalars tab that ``layout.yaml`` describes."""
    source = resources.files(__package__).joinpath("layout.yaml").read_text(encoding="utf-8")
    categories = [
        Category(title=title, chart=[_chart(name, drawn) for name, drawn in charts.items()])
        for title, charts in yaml.safe_load(source).items()
    ]
    data = Layout(category=categories).SerializeToString()
    return Summary(value=[_string_tensor("custom_scalars__config__", "custom_scalars", data)])


def _chart(title: str, drawn: Sequence[str] | Mapping[str, str]) -> Any:
    if isinstance(drawn, Mapping):
        return Chart(title=title, margin=Margin(series=[Margin.Series(**drawn)]))
    return Chart(title=title, multiline=Lines(tag=[f"^{tag}$" for tag in drawn]))


def _string_tensor(tag: str, plugin: str, data: bytes) -> Summary.Value:
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=plugin))
    tensor = TensorProto(dtype=DT_STRING, string_val=[data])
    return Summary.Value(tag=tag, metadata=metadata, tensor=tensor)
