"""Writes what is derived from the rules: their pages, the profiles. Run it after changing a rule.

`python -m tests.support.rule_pages`; tests/monitor/rules/test_pages.py checks that all is current.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ulysses_monitor.rules import BOOK
from ulysses_monitor.rules.builtin import BuiltinRule, Entry

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "rules"
PROFILES = ROOT / "ulysses_monitor" / "rules" / "profiles"

STRICT: Mapping[str, Mapping[str, Any]] = {
    "loss_spike": {"times": 1.08, "sigmas": 6.0, "margin": 1.05},
    "gradient_spike": {"times": 2.5, "sigmas": 5.0, "margin": 1.25},
    "divergence": {"above": 1.03, "given_back": 0.3, "sigmas": 3.0},
    "plateau": {"severity": "warning", "window": 120},
    "exploding_gradient": {"rise": 20.0, "patience": 3},
    "vanishing_gradient": {"below": 1e-3},
    "vanishing_layer": {"below": 1e-3},
    "exploding_layer": {"above": 30.0},
    "layer_shift": {"times": 3.5},
    "no_gradient": {"steps": 10},
    "update_ratio_large": {"above": 0.1},
    "update_ratio_small": {"below": 1e-5},
    "lora_imbalance": {"low": 0.05, "high": 20.0},
    "lora_outgrows_base": {"above": 0.5},
    "always_clipping": {"below": 0.2},
    "overfitting": {"rise": 1.02, "patience": 1},
    "throughput_drop": {"below": 0.7},
    "early_gradient": {"times": 2.0, "limit": 25.0},
    "early_update": {"times": 1.5, "limit": 15.0},
    "entropy_collapse": {"fall": 0.3},
    "rate_off_schedule": {"by": 0.05},
    "loss_after_resume": {"times": 1.15},
    "reference_drift": {"severity": "warning"},
    "reward_bimodal": {"above": 0.555},
    "kl_runaway": {"times": 3.0, "least": 0.3},
    "truncated_answers": {"above": 0.3},
    "zero_advantage": {"above": 0.7},
    "clip_fraction_high": {"above": 0.25},
    "sampler_mismatch": {"above": 0.05},
    "chosen_falls": {"below": -2.0},
    "special_tokens": {"above": 0.1},
    "duplicate_rows": {"above": 0.15},
    "truncated_rows": {"above": 0.25},
}
"""What ``strict`` has beside ``default``."""


def _settings(rule: BuiltinRule) -> dict[str, Any]:
    """Returns the settings of a rule that say when it fires, as YAML has them."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        if field.name in ("name", "topic", "on_alert") or value is None or not field.init:
            continue
        found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def profile(overrides: Mapping[str, Mapping[str, Any]], about: str) -> str:
    """Returns the YAML of a profile."""
    rules = [{n: _settings(e.make(**overrides.get(n, {})))} for n, e in BOOK.items()]
    lines = [f"# {about}", "# Written by tests/support/rule_pages.py."]
    body = yaml.safe_dump({"rules": rules}, sort_keys=False, width=96, default_flow_style=None)
    return "\n".join(lines) + "\n" + body


def page(entry: Entry) -> str:
    """Returns the page of a rule."""
    rule = entry.make()
    needs = " or ".join if rule.alternatives else ", ".join
    causes = "\n".join(f"{i}. {_sentence(cause)}" for i, cause in enumerate(entry.causes, 1))
    settings = ", ".join(f"{key}: {_shown(value)}" for key, value in _settings(rule).items())
    return f"""# {entry.name}

{entry.sees}

| | |
|---|---|
| fires if | {entry.formula} |
| source | {entry.source} |
| severity | {rule.severity} |
| needs | {needs(f"`{need}`" for need in rule.needs)} |

## Likely causes

{causes}

## What to try

{entry.advice}

## Settings

```yaml
monitor:
  rules:
    - {entry.name}: {{{settings}}}
```

These are the defaults; name only what you change. [All rules](README.md)
"""


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _shown(value: Any) -> str:
    shown = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return shown.removesuffix("\n...\n").removesuffix("\n")


def index() -> str:
    """Returns the table of all rules."""
    rows = []
    for family in dict.fromkeys(entry.family for entry in BOOK.values()):
        rows += [
            f"\n## {family[0].upper() + family[1:]}\n",
            "| rule | severity | finds |",
            "|---|---|---|",
        ]
        for entry in BOOK.values():
            if entry.family == family:
                severity = entry.make().severity
                rows.append(f"| [{entry.name}]({entry.name}.md) | {severity} | {entry.sees} |")
    return INTRODUCTION + "\n".join(rows) + "\n"


INTRODUCTION = f"""# Rules

{len(BOOK)} rules look at every recorded step and raise alerts. An alert says what, where, since
when, the numbers, likely causes, what to try, and names its page here.

| profile | is |
|---|---|
| `default` | all rules, with thresholds that healthy runs do not reach |
| `strict` | the same rules, with lower thresholds: for a run that you watch |
| `off` | none |

The profiles are YAML files, [dashboards/alerts](../../dashboards/alerts): copy one, change it, and
give its path as `rules`. A rule of your own is [a line or a function](../writing_a_rule.md).

Every rule has these settings:

| setting | meaning |
|---|---|
| `severity` | `info`, `warning` or `critical` |
| `warmup` | steps that must have been seen before the first alert |
| `patience` | steps in a row at which the condition must hold, of those with the metric |
| `cooldown` | steps from one alert about a metric to the next |
| `clear` | steps in a row without the condition that end an alert |
| `on_alert` | what the training does: `save`, `stop`, `policy.NAME=active`, [`rerun`](../rows.md) |
| `topic` | the page whose causes and advice an alert gives |

An alert about the loss or the gradients names [the rows of its step](../rows.md), on all ranks.
A rule that needs a metric which the run does not have is not checked. `run.json` says so under
`rules_not_checked`, and why.

How often they are right, with three seeds and two sizes of each training:

| trainings | named | within one step | healthy runs with an alert |
|---|---|---|---|
| [25 bugs of public trackers][bugs], put in again | 138 of 150 | 132 of 150 | 0 of 48 |
| [10 faults of two processes][bugs] | 48 of 60 | 42 of 60 | 0 of 36 |

[Faults of one process](../../benchmarks/results/faults_cpu.md) have a table of their own.

[bugs]: ../../benchmarks/results/reported_bugs_cpu.md
"""


def texts() -> dict[Path, str]:
    """Returns what each file should hold."""
    default = profile({}, "Every rule, with thresholds that healthy runs do not reach.")
    strict = profile(STRICT, "Every rule, with lower thresholds: for a run that you watch.")
    pages = {PAGES / f"{name}.md": page(entry) for name, entry in BOOK.items()}
    profiles = {PROFILES / "default.yaml": default, PROFILES / "strict.yaml": strict}
    return {**pages, PAGES / "README.md": index(), **profiles}


def main() -> None:
    PAGES.mkdir(exist_ok=True)
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")
    for path in set(PAGES.glob("*.md")) - set(texts()):
        path.unlink()


if __name__ == "__main__":
    main()
