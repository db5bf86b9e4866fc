"""TensorBoard event files, with what TensorBoard can bear; TensorBoard is loaded when used."""

from ulysses_monitor.sinks.tensorboard.sink import TensorBoardSink

__all__ = ["TensorBoardSink"]
