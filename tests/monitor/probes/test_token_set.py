"""Which tokens are in a set of ids."""

from __future__ import annotations

import torch

from ulysses_monitor.probes.token_set import TokenSet


def test_tokens_are_found_and_ignored_labels_and_larger_ids_are_not() -> None:
    tokens = torch.tensor([[0, 3, 4], [-100, 5, 99_999]])
    for kind in (torch.int32, torch.int64):
        found = TokenSet([3, 0, 4, 3]).has(tokens.to(kind))
        assert found.tolist() == [[True, True, True], [False, False, False]]


def test_an_empty_set_is_false_and_has_nothing() -> None:
    assert not TokenSet()
    assert TokenSet([0])
    assert not TokenSet([-1])
    assert not TokenSet().has(torch.tensor([-100, 0, 1])).any()
