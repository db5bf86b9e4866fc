"""The table of `make test-clients`, kept in docs/clients.md."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

__all__ = ["TableRow", "format_table", "write_page"]

_INTRO = """\
# Programs that were really run

`make test-clients` installs each of these programs in a virtual environment of its own, trains a
small model with it on the CPU, once as it is and once with the monitor, and compares the two:
everything that the program logs and the weights it saves must be equal bit for bit, the monitor's
`grad/norm/total` must be the program's own gradient norm before clipping to 1e-6, and nothing but
the monitor's lines may be printed in addition. Seconds are those of the whole command, with all
that it imports, without and with the monitor, on a machine that had other work to do. The table is
written by `make test-clients`.

- **GRPO**: with a learning rate of 1e-2, TRL's own norm, computed in float32, was 1.9e-6 away from
  the norm in float64, and the monitor's 3e-8. The case trains with 1e-3, where both agree to 1e-6.
- **axolotl** was not run: it needs Python 3.12, for which the machine had no torch without CUDA.

"""
_HEAD = ("client", "version", "training", "numbers", "weights", "norm error", "seconds", "with")


@dataclass(frozen=True)
class TableRow:
    """One case: who, what, whether equal, the largest error, and the seconds of both runs."""

    client: str
    version: str
    training: str
    numbers: str
    weights: str
    error: str
    seconds: str
    watched: str


def format_table(rows: Iterable[TableRow]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [_HEAD, ("---",) * len(_HEAD), *map(astuple, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_page(page: Path, rows: Iterable[TableRow]) -> None:
    """Puts rows into the page; those of other cases stay."""
    known = {(row.client, row.training): row for row in _read_rows(page)}
    known.update({(row.client, row.training): row for row in rows})
    ordered = [known[key] for key in sorted(known, key=lambda key: key[0].lower())]
    page.write_text(_INTRO + format_table(ordered))


def _read_rows(page: Path) -> list[TableRow]:
    lines = page.read_text().splitlines() if page.exists() else []
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    return [TableRow(*row) for row in cells[2:]]
