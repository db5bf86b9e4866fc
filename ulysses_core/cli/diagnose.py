"""`ulysses diagnose`: says what happened in a run and why, in plain words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import typer
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ulysses_core.cli.tables import as_text
from ulysses_monitor.common.formatting import tick
from ulysses_monitor.common.sparkline import sparkline
from ulysses_monitor.diagnosis.brief import summarize_diagnosis
from ulysses_monitor.diagnosis.causality import Chain
from ulysses_monitor.diagnosis.checks import group_reasons
from ulysses_monitor.diagnosis.curves import find_metric
from ulysses_monitor.diagnosis.diagnose import Diagnosis, diagnose
from ulysses_monitor.diagnosis.findings import Finding
from ulysses_monitor.reading import open_run

__all__ = ["diagnose_run"]

_STYLES = {"critical": "bold red", "warning": "yellow", "fine": "green"}
_SPARK = 24


def diagnose_run(place: str, *, as_json: bool, html: Path | None, plot: Path | None) -> None:
    """Prints a diagnosis of a run.

    Args:
        place: the path or URL of the run.
        as_json: print a JSON object of at most 8,000 characters instead.
        html: also write a page to this file.
        plot: also write a picture to this file.

    Raises:
        InputError: there is no run, its description cannot be read, or a file cannot be written.
    """
    run = open_run(place)
    run.logs_damage = False  # the diagnosis tells it
    if plot is not None:
        from ulysses_monitor.reading import charts

        charts.check_picture("diagnose", plot)
    found = diagnose(run)
    if html is not None or plot is not None:
        from ulysses_monitor.diagnosis.pictures import write_diagnosis_page, write_picture

        if html is not None:
            write_diagnosis_page(found, html)
        if plot is not None:
            write_picture(found, plot)
    if as_json:
        typer.echo(json.dumps(summarize_diagnosis(found), allow_nan=False))
        return
    Console(highlight=False).print(Group(*_describe(found)))


def _describe(found: Diagnosis) -> Iterator[RenderableType]:
    planned = f" of {found.planned:,}" if found.planned else ""
    about = f"; {found.about}" if found.about else ""
    yield as_text(f"{found.run}: {found.status}, step {found.last:,}{planned}{about}", "bold")
    yield as_text(found.headline, _STYLES.get(found.verdict, ""))
    yield from (as_text(f"Note: {note}", "dim") for note in found.notes)
    for place, chain in enumerate(found.chains):
        yield Text("")
        yield from _describe_chain(found, chain, is_first=place == 0)
    if found.moments:
        yield _title("What happened, in order")
        yield _indent(_list_moments(found))
    yield _title("What was checked")
    yield from map(_indent, _describe_checks(found))


def _describe_chain(found: Diagnosis, chain: Chain, *, is_first: bool) -> Iterator[RenderableType]:
    root = chain.root
    is_serious = root.severity != "info" or chain.followers
    yield Text("Probable cause" if is_first and is_serious else "Also found", "bold")
    yield _indent(_describe_finding(found, root))
    for number, cause in enumerate(root.causes, 1):
        yield _indent(as_text(f"{'likely because' if number == 1 else ''!s:<15} {number}. {cause}"))
    if root.hint:
        yield _indent(as_text(f"{'what to try':<15} {root.hint}"))
    if root.page:
        yield _indent(as_text(f"{'more':<15} {root.page}", "dim"))
    if chain.followers:
        yield Text("What probably followed from it", "bold")
        for each in chain.followers:
            yield _indent(_describe_finding(found, each, chain.because[each.rule]))


def _describe_finding(found: Diagnosis, finding: Finding, because: str = "") -> RenderableType:
    notes = [finding.severity, finding.when]
    notes += (
        [f"{finding.count:,} alerts, the last at {finding.last:,}"] if finding.count > 1 else []
    )
    notes += [f"follows from {because}"] if because else []
    notes += ["found by a replay"] if finding.is_replayed else []
    head = as_text(finding.rule, _STYLES.get(finding.severity, "bold"))
    lines = [head.append(f"  {', '.join(notes)}", "dim"), as_text(finding.message)]
    return Group(*lines, *_draw_course(found, finding))


def _draw_course(found: Diagnosis, finding: Finding) -> Iterator[Text]:
    """Draws the metric around the step at which the finding began."""
    curve = found.curves.get(find_metric(finding, frozenset(found.curves)))
    if curve is None:
        return
    part = curve.around(finding.since)
    spark = sparkline(part.values, _SPARK)
    values = (curve.first, curve.before(finding.since), curve.last)
    course = "first {}, before {}, last {}".format(*map(tick, values))
    steps = f"steps {part.steps[0]:,} to {part.steps[-1]:,}"
    yield as_text("  ".join(filter(None, (curve.metric, spark, course, steps))), "dim")


def _list_moments(found: Diagnosis) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for moment in found.moments:
        style = _STYLES.get(moment.severity, "")
        table.add_row(f"{moment.step:,}", moment.kind, as_text(moment.text, style))
    return table


def _describe_checks(found: Diagnosis) -> Iterator[Text]:
    checks = found.checks
    yield Text(
        f"{_count(checks.fired)} fired, {len(checks.quiet)} found nothing, "
        f"{len(checks.unchecked)} could not be checked"
    )
    if checks.quiet:
        yield as_text(f"found nothing: {', '.join(checks.quiet)}", "dim")
    for reason, rules in group_reasons(checks.unchecked).items():
        yield as_text(f"not checked ({reason}): {', '.join(rules)}", "dim")


def _count(rules: Sequence[str]) -> str:
    return f"{len(rules)} rule{'s' * (len(rules) != 1)}"


def _title(text: str) -> Text:
    return Text(f"\n{text}", "bold")


def _indent(content: RenderableType) -> Padding:
    return Padding(content, (0, 0, 0, 2), expand=False)
