"""No rule lacks a page, and pages, profiles and dashboards say what the rules are."""

from __future__ import annotations

import pytest

from tests.support.rule_pages import PAGES, PROFILES, ROOT, texts
from ulysses_monitor.rules import BOOK, make_rules

ALL = texts()


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_what_is_written_from_the_rules_is_current(path) -> None:  # type: ignore[no-untyped-def]
    assert path.read_text(encoding="utf-8") == ALL[path], "run python -m tests.support.rule_pages"


def test_each_rule_has_a_page_with_causes_and_advice_and_no_page_lacks_a_rule() -> None:
    assert {path.stem for path in PAGES.glob("*.md")} == {*BOOK, "README"}
    for entry in BOOK.values():
        assert len(entry.causes) >= 2
        assert entry.advice
        assert entry.formula


def test_the_index_links_each_page() -> None:
    index = (PAGES / "README.md").read_text(encoding="utf-8")
    assert all(f"({name}.md)" in index for name in BOOK)


@pytest.mark.parametrize("name", ["default", "strict"])
def test_a_profile_in_the_dashboards_is_the_one_of_the_package(name: str) -> None:
    linked = ROOT / "dashboards" / "alerts" / f"{name}.yaml"
    assert linked.read_text(encoding="utf-8") == (PROFILES / f"{name}.yaml").read_text("utf-8")
    assert make_rules(linked) == make_rules(name)


def test_strict_differs_from_default_only_in_thresholds() -> None:
    default, strict = make_rules("default"), make_rules("strict")
    assert [rule.name for rule in default] == [rule.name for rule in strict]
    assert sum(a != b for a, b in zip(default, strict, strict=True)) >= 20
