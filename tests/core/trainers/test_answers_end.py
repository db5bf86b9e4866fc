"""Stages grpo and ppo end an answer where the named template does, as `ulysses generate` does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.forget import forget_last_trainer
from tests.support.parity_cases import ParityCase, build, write_rows
from tests.support.spawn import spawn

STOP = 60  # the last of the vocabulary


def sample(kind: str, folder: str) -> list[list[int]]:
    """The child: the answers that are trained on, of a model that likes to say <|im_end|>."""
    tokenizer = Path(folder, "tokenizer.json")
    tokenizer.write_text(tokenizer.read_text().replace(f'"w{STOP}"', '"<|im_end|>"'))
    changes = {"template": "chatml", "max_steps": 1, "reward_funcs": ["exact_answer"]}
    trainer = build(ParityCase(kind=kind), folder, **changes)
    answers = []
    generate = trainer._generate_single_turn

    def keep(*args: Any, **kwargs: Any) -> Any:
        made = generate(*args, **kwargs)
        answers.extend(made[0])
        return made

    def like(_: Any, __: Any, logits: Any) -> None:
        logits[..., STOP] += 3

    trainer._generate_single_turn = keep
    trainer.model.get_output_embeddings().register_forward_hook(like)
    trainer.train()
    forget_last_trainer()
    return answers


@pytest.mark.parametrize("kind", ["grpo", pytest.param("ppo", marks=pytest.mark.full)])
def test_an_answer_ends_at_the_stop_of_the_template(kind: str, tmp_path: Path) -> None:
    write_rows(tmp_path)
    [answers] = spawn(sample, 1, args=[kind, str(tmp_path)])
    ended = [answer for answer in answers if answer[-1] == STOP]
    assert any(len(answer) < 6 for answer in ended)
    assert all(STOP not in answer[:-1] for answer in answers)
