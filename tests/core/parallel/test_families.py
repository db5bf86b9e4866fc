"""The allow-list of model families: what it refuses, and that it is what a grid shows.

`make test-full` runs the grid and writes docs/families.md. Run as a program,
`python -m tests.support.family_grid` also rewrites the list of what is right.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.family_cases import refuse_rows
from tests.support.family_grid import (
    compare,
    list_families,
    read_page,
    try_family,
    verdict,
    write_page,
)
from tests.support.spawn import spawn
from ulysses_core.parallel.families.__main__ import main
from ulysses_core.parallel.families.allowed import check_family, read_refusals, read_right
from ulysses_core.parallel.families.proof import Errors
from ulysses_core.parallel.families.small import small_config
from ulysses_monitor.common.errors import InputError

RIGHT = [
    ("llama", "rope_type", "longrope", "right"),
    ("llama", "rope_type", "dynamic", "right"),
    ("llama", None, None, "packed"),
    ("qwen2", "use_sliding_window", True, "right"),
    ("gemma2", None, None, "left"),
    ("gpt_oss", None, None, "right"),  # attention sinks
    ("deepseek_v3", None, None, "right"),  # values narrower than keys
    ("qwen3_moe", None, None, "score"),
    ("mistral", None, None, "score"),
]
WRONG = [
    ("qwen2_moe", "use_sliding_window", True, "right"),
    ("bloom", None, None, "right"),
    ("llama4_text", None, None, "right"),
    ("mamba", None, None, "right"),
    ("opt", None, None, "left"),
]
NAMED = """
    llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3_text phi phi3 gpt2
    gpt_neox opt bloom falcon starcoder2 olmo olmo2 cohere cohere2 granite stablelm deepseek_v2
    deepseek_v3 glm glm4 gpt_oss smollm3 ernie4_5 mamba rwkv recurrent_gemma jamba bamba lfm2
    llama4_text minimax nemotron qwen3_next
""".split()  # noqa: SIM905 - a list of words


@pytest.fixture(scope="module")
def verdicts() -> list[Errors | str]:
    whole, split = compare([*RIGHT, *WRONG])
    return [verdict(one, two) for one, two in zip(whole, split, strict=True)]


@pytest.mark.parametrize("case", RIGHT, ids=str)
def test_a_model_on_the_list_equals_one_process(verdicts: list[Any], case: Any) -> None:
    errors = verdicts[RIGHT.index(case)]
    assert isinstance(errors, Errors), errors
    assert errors.is_right, errors


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_the_grid_sees_that_a_refused_model_trains_wrongly(verdicts: list[Any], case: Any) -> None:
    errors = verdicts[len(RIGHT) + WRONG.index(case)]
    assert isinstance(errors, Errors), errors
    assert errors.gradient > 1e-2
    assert errors.weight > 1e-4


def make_config(name: str, **settings: Any) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[name](**settings)


def test_a_family_that_trains_wrongly_is_refused_by_name_and_reason() -> None:
    with pytest.raises(InputError, match=r"model_type is 'bloom', which is not supported: .+; set"):
        check_family(make_config("bloom"))


def test_an_option_that_trains_wrongly_is_refused_by_name() -> None:
    check_family(make_config("qwen2_moe"))
    with pytest.raises(InputError, match=r"has .*use_sliding_window=True, which qwen2_moe was not"):
        check_family(make_config("qwen2_moe", use_sliding_window=True, max_window_layers=2))


def test_the_configs_of_well_known_models_are_allowed() -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5}
    llama3 |= {"rope_type": "llama3", "original_max_position_embeddings": 8192}
    check_family(make_config("llama", rope_parameters=llama3, num_key_value_heads=8))
    check_family(make_config("mistral", sliding_window=None, head_dim=128))
    check_family(make_config("qwen2", use_sliding_window=False, tie_word_embeddings=True))
    check_family(make_config("gemma2"))
    check_family(make_config("gpt_oss"))


def test_an_untried_family_is_told_what_to_do() -> None:
    class Unknown:
        model_type = "lama"

    with pytest.raises(InputError, match=r"'lama' \(did you mean 'llama'\?\), which was not tried"):
        check_family(Unknown())
    with pytest.raises(InputError, match=r"python -m ulysses_core.parallel.families MODEL"):
        check_family(Unknown())


def test_rows_that_a_family_does_not_take_are_refused() -> None:
    assert "opt" in read_right()
    for message in spawn(refuse_rows, 2, timeout=60):
        assert "the rows are padded on the left, which opt was not shown" in message


def test_the_page_and_the_list_agree() -> None:
    right, wrong = read_page()
    assert right == read_right()
    refusals = read_refusals()
    assert not right.keys() & refusals.keys()
    assert {name: refusals.get(name, "not tried") for name in wrong} == wrong
    assert set(NAMED) <= right.keys() | refusals.keys()


def test_a_default_config_has_no_options() -> None:
    from ulysses_core.parallel.families.allowed import find_options

    config = make_config("llama")
    assert find_options(config) == set()
    assert find_options(small_config(type(config), ("attention_bias", True))) == {
        "attention_bias=True"
    }


def test_a_model_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(InputError, match="model nothing: cannot read its config; expected"):
        main("nothing")


@pytest.mark.full
@pytest.mark.timeout(600)
def test_the_command_tells_right_from_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main("qwen2") == 0
    assert "trains rightly on rows: right, left, packed" in capsys.readouterr().out
    assert main("bloom") == 1
    assert "rows right: WRONG" in capsys.readouterr().out


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_the_list_is_what_the_grid_shows() -> None:
    found = [try_family(name) for name in list_families()]
    write_page(found)
    assert {each.name: each.family for each in found if each.is_right} == read_right()


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_reward_models_of_the_families_on_the_list_equal_one_process() -> None:
    from transformers.modeling_layers import GenericForSequenceClassification
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as CLASSES,
    )

    generic = [
        name
        for name in read_right()
        if CONFIG_MAPPING[name] in CLASSES
        and issubclass(CLASSES[CONFIG_MAPPING[name]], GenericForSequenceClassification)
    ]
    assert len(generic) > 20
    for name in generic:
        whole, split = compare([(name, None, None, "score")])
        errors = verdict(whole[0], split[0])
        assert isinstance(errors, Errors), f"{name}: {errors}"
        assert errors.is_right, f"{name}: {errors}"
