"""What the commands log, and what they keep libraries from printing."""

from __future__ import annotations

import logging
import os
import sys

__all__ = ["configure_logging", "quiet_libraries"]


def configure_logging(debug: bool) -> None:
    """Logs the project's own lines to standard error; with `debug`, every decision."""
    debug = debug or os.environ.get("ULYSSES_DEBUG") == "1"
    # Which module says it matters to developers only.
    form = "%(levelname)s %(name)s: %(message)s" if debug else "%(levelname)s: %(message)s"
    logging.basicConfig(format=form, stream=sys.stderr)
    level = logging.DEBUG if debug else logging.INFO
    for name in ("ulysses_core", "ulysses_monitor"):
        logging.getLogger(name).setLevel(level)


def quiet_libraries() -> None:
    """Hides warnings and progress bars of libraries, except with --debug."""
    if logging.getLogger("ulysses_core").level == logging.DEBUG:
        return
    import warnings

    import datasets
    import transformers

    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
