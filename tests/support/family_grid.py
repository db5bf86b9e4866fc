"""The grid over transformers' families of causal language models, and the page that shows it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.support.family_cases import Named, train_variants
from tests.support.spawn import SpawnError, spawn
from ulysses_core.parallel.families.allowed import LIST, Family, read_refusals
from ulysses_core.parallel.families.proof import Errors, measure
from ulysses_core.parallel.families.small import list_options, name_options, small_config

__all__ = ["PAGE", "Found", "list_families", "read_page", "try_family", "write_list", "write_page"]

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
_TIMEOUT = 150
_LARGE = ("bart", "blt", "roc_bert", "whisper")
"""Families of which `small_config` does not make a small model."""

_INTRO = """\
# Model families under sequence parallelism

Sequence parallelism trains the families in the first table, with the options named there, and
refuses the others with one line. A family is a `model_type` of transformers. In the second table
are the families that are known not to work, and why.

How the tables came about: each family's default config, made small (4 layers, 4 heads, windows of
6 tokens), was trained for two SGD steps on rows of 41 tokens, on two ranks that share the rows and
on one process. All is computed in float64. Right means: the first loss is equal to 1e-9, the first
gradients and the last weights of each parameter to 1e-6, relative. Each option was switched on in
turn; only those that change the loss are listed. Errors are rounded up to a power of ten; 1e-12
stands for anything smaller.

- **options**: settings that may differ from the defaults of the config class. A number that may be
  absent is named without a value. Widths, numbers of layers, heads and experts may always differ.
- **other rows**: `left` for padding on the left, `packed` for documents told apart by
  `position_ids`. Rows padded on the right always work. Where `packed` is missing, transformers lets
  the documents of a row see one another even on one process, or counts positions itself.
- **Reward models** (stage `rm`) use the same layers below another head. They work for the families
  whose sequence classifier is transformers' generic one, which `make test-full` checks for each.
  Others are refused.

## A family or an option that is not here

Try it. The command takes a `config.json`, the folder of a model or a `model_type`, makes the model
small, and trains it on two processes and on one:

```
python -m ulysses_core.parallel.families MODEL
```

If it prints that the model trains rightly, pass `check_family=False` to `uc.sequence_parallel`, or
set `check_family: false` in the config of `ulysses train`, and open an issue so that it gets on the
list. If it does not, train without sequence parallelism.

"""


@dataclass
class Found:
    """What the grid found of a family.

    Attributes:
        name: the `model_type`.
        base: errors of the default config on rows padded on the right, or what went wrong.
        rows: other kinds of rows that are right.
        options: options that are right.
        wrong: options that are not right.
        worst: the worst errors of all that is right.
    """

    name: str
    base: Errors | str
    rows: set[str] = field(default_factory=set)
    options: set[str] = field(default_factory=set)
    wrong: set[str] = field(default_factory=set)
    worst: Errors = field(default_factory=lambda: Errors(0.0, 0.0, 0.0))

    @property
    def is_right(self) -> bool:
        return isinstance(self.base, Errors) and self.base.is_right

    @property
    def family(self) -> Family:
        """The entry of the allow-list."""
        return Family(self.name, frozenset(self.options - self.wrong), frozenset(self.rows))


def list_families() -> list[str]:
    """Returns the families of one modality, as transformers names them."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    parts = ("text_config", "vision_config", "audio_encoder_config", "text_encoder")
    composed = {name for name in NAMES if set(parts) & set(CONFIG_MAPPING[name].sub_configs)}
    return sorted(set(NAMES) - composed - set(_LARGE))


def try_family(name: str) -> Found:
    """Trains a family with each kind of rows, and with each option."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    rows: list[Named] = [(name, None, None, each) for each in ("right", "left", "packed")]
    whole, split = compare(rows)
    found = Found(name, verdict(whole[0], split[0]))
    if not found.is_right:
        return found
    for case, one, two in zip(rows, whole, split, strict=True):
        add(found, verdict(one, two), {case[3]}, found.rows, set())
    found.rows.discard("right")
    options = [(name, option, value, "right") for option, value in list_options(kind)]
    for case, one, two in zip(options, *compare(options, differs_from=whole[0]), strict=True):
        if two is None:
            continue
        names = name_options(small_config(kind, (case[1], case[2]))) - name_options(
            small_config(kind)
        )
        add(found, verdict(one, two), names, found.options, found.wrong)
    return found


def compare(cases: list[Named], differs_from: Any = None) -> tuple[list[Any], list[Any]]:
    """Trains cases on one process and on two.

    Returns:
        The results of both; None for what cannot be built, or does not differ.
    """
    whole = run(cases, 1)
    chosen = [
        i
        for i, one in enumerate(whole)
        if "error" not in one and (differs_from is None or differ(one, differs_from))
    ]
    results = run([cases[i] for i in chosen], 2)
    split = [None] * len(cases)
    for i, result in zip(chosen, results, strict=True):
        split[i] = result
    return whole, split


def run(cases: list[Named], size: int) -> list[Any]:
    if not cases:
        return []
    try:
        return spawn(train_variants, size, args=[cases, size], timeout=_TIMEOUT)[0]
    except SpawnError as error:
        return [{"error": str(error).strip().rsplit("\n", 1)[-1]}] * len(cases)


def differ(one: Any, other: Any) -> bool:
    return abs(one["losses"][0] - other["losses"][0]) > 1e-9


def verdict(one: Any, two: Any) -> Errors | str:
    """Returns the errors, or what went wrong."""
    for result in (one, two):
        if "error" in result:
            return result["error"]
    return measure(one, two)


def add(
    found: Found, errors: Errors | str, names: set[str], right: set[str], wrong: set[str]
) -> None:
    if isinstance(errors, Errors) and errors.is_right:
        right |= names
        found.worst = Errors(
            *(
                max(a, b)
                for a, b in zip(vars(found.worst).values(), vars(errors).values(), strict=True)
            )
        )
    else:
        wrong |= names


def write_list(found: Iterable[Found]) -> None:
    """Writes the families that are right to the allow-list; what it refuses stays."""
    content = yaml.safe_load(LIST.read_text())
    content["right"] = {
        each.name: {
            "options": sorted(each.family.options),
            "rows": sorted(each.family.rows),
        }
        for each in found
        if each.is_right
    }
    head = (
        "# What the grid of tests/support/family_grid.py shows to be right, and what is refused.\n"
    )
    text = yaml.safe_dump(content, default_flow_style=None, width=1000)
    LIST.write_text(head + text)


# -- the page ---------------------------------------------------------------------------------


def write_page(found: Iterable[Found]) -> None:
    """Writes both tables."""
    ordered = sorted(found, key=lambda each: each.name)
    right = [
        (each.name, _join(each.family.options), _join(each.family.rows), _show(each.worst))
        for each in ordered
        if each.is_right
    ]
    refusals = read_refusals()
    wrong = [
        (each.name, refusals.get(each.name, "not tried"), _show(each.base))
        for each in ordered
        if not each.is_right
    ]
    text = _INTRO + f"## Right: {len(right)} families\n\n"
    text += _table(("family", "options", "other rows", "loss / gradients / weights"), right)
    text += f"\n## Refused: {len(wrong)} families\n\n"
    text += _table(("family", "why", "what the grid found"), wrong)
    PAGE.write_text(text)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _join(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in sorted(names))


def _show(errors: Errors | str) -> str:
    if isinstance(errors, str):
        return "does not run"
    if not errors.is_right:
        return f"weights off by {_round_up(errors.weight)}"
    return " / ".join(_round_up(error) for error in vars(errors).values())


def _round_up(error: float) -> str:
    if not math.isfinite(error):
        return "NaN"
    return f"1e{max(-12, math.ceil(math.log10(max(error, 1e-12))))}"


def read_page() -> tuple[dict[str, Family], dict[str, str]]:
    """Returns the families that the page calls right, and why it refuses the others."""
    right, wrong = {}, {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("| ") or cells[0] in ("family", "---"):
            continue
        if len(cells) == 4:
            names = [frozenset(c.replace("`", "").split(", ")) - {""} for c in cells[1:3]]
            right[cells[0]] = Family(cells[0], *names)
        else:
            wrong[cells[0]] = cells[1]
    return right, wrong


if __name__ == "__main__":
    everything = [try_family(name) for name in list_families()]
    write_list(everything)
    write_page(everything)
