"""LLaMA-Factory's keys: each is served, accepted with a meaning, or refused for a reason."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from pydantic import BaseModel

from ulysses_core.config.keys import REFUSED, WITHOUT_EFFECT, AcceptedKeys, refuse_key
from ulysses_core.config.load import SECTIONS
from ulysses_core.config.training_arguments import training_keys
from ulysses_core.trainers.stage import find_stage, list_stages
from ulysses_monitor.common.errors import InputError


def keys_of(sections: Iterable[type[BaseModel]]) -> set[str]:
    return {f.alias or name for s in sections for name, f in s.model_fields.items()}


def test_no_key_is_both_served_and_refused_or_without_effect() -> None:
    in_all = keys_of(s for s in SECTIONS if s is not AcceptedKeys) | set(training_keys())
    in_one = keys_of(find_stage(name).keys for name in list_stages())
    for kind in (REFUSED, WITHOUT_EFFECT):
        assert not (in_all | in_one) & set(kind), "a key that is served needs no other entry"
    assert not in_all & set(AcceptedKeys.model_fields)
    assert not set(REFUSED) & set(AcceptedKeys.model_fields)
    assert not set(WITHOUT_EFFECT) & {*REFUSED, *AcceptedKeys.model_fields}


def test_every_accepted_key_says_what_it_means_in_one_line() -> None:
    for name, field in AcceptedKeys.model_fields.items():
        assert field.description, name
        assert "\n" not in field.description


def test_what_has_no_effect_belongs_to_a_key_that_is_refused() -> None:
    assert set(WITHOUT_EFFECT.values()) <= set(REFUSED)


@pytest.mark.parametrize("key", REFUSED)
def test_a_refused_key_passes_if_it_is_off_and_has_its_reason_if_not(key: str) -> None:
    refuse_key(key, False, "x.yaml")
    refuse_key(key, None, "x.yaml")
    with pytest.raises(InputError) as caught:
        refuse_key(key, True, "x.yaml")
    assert str(caught.value) == f"x.yaml: {key} is True; {REFUSED[key]}"
