"""The example that builds training data from Python's own docstrings."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from examples.stdlib_data import build as build_module
from examples.stdlib_data.__main__ import main
from examples.stdlib_data.build import MIN_PAIRS, Settings, is_built
from examples.stdlib_data.docstrings import clean_docstring, find_documented
from examples.stdlib_data.pairs import build_pairs, split_pairs

VOCAB_SIZE = 1024
TRICKY_TEXTS = [
    "Return a new set , with all values . It 's fine !",
    "  indented\n\n\ttabs and  two blanks \n",
    "naïve Straße 日本語 🙂 \N{COMBINING ACUTE ACCENT}e",
    "",
]


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("build") / "data" / "stdlib"
    assert main(["--out", str(out), "--vocab-size", str(VOCAB_SIZE)]) == 0
    return out


@pytest.fixture(scope="module")
def tokenizer(built: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(built / "tokenizer")


@pytest.fixture
def pairs_of(tmp_path: Path) -> Any:
    """A function from the source of a made-up `json` module to its pairs by name."""

    def build(source: str) -> dict[str, Any]:
        (tmp_path / "json.py").write_text(source, encoding="utf-8")
        return {pair.name: pair for pair in build_pairs(tmp_path)}

    return build


class TestBuild:
    def test_has_enough_pairs_and_holds_out_the_requested_share(self, built: Path) -> None:
        train = read_rows(built / "stdlib_qa_train.jsonl")
        heldout = read_rows(built / "stdlib_qa_heldout.jsonl")
        total = len(train) + len(heldout)
        assert total >= MIN_PAIRS
        assert 0.04 * total < len(heldout) <= 0.05 * total + 1

    def test_rows_have_the_fields_that_dataset_info_names(self, built: Path) -> None:
        info = json.loads((built / "dataset_info.json").read_text(encoding="utf-8"))
        assert set(info) == {"stdlib_qa", "stdlib_qa_heldout", "stdlib_text", "stdlib_text_heldout"}
        assert info["stdlib_text"]["columns"] == {"prompt": "text"}
        for name, entry in info.items():
            rows = read_rows(built / entry["file_name"])
            assert all(set(row) == set(entry["columns"].values()) for row in rows)
            assert ("heldout" in entry["file_name"]) == ("heldout" in name)
            assert ("formatting" in entry) == ("qa" in name)

    def test_heldout_answers_are_in_no_training_file(self, built: Path) -> None:
        texts = (built / "stdlib_text_train.jsonl").read_text(encoding="utf-8")
        answers = (built / "stdlib_qa_train.jsonl").read_text(encoding="utf-8")
        for row in read_rows(built / "stdlib_qa_heldout.jsonl"):
            encoded = json.dumps(row["output"], ensure_ascii=False)[1:-1]
            assert encoded not in texts
            assert encoded not in answers

    def test_pairs_are_the_same_each_time_and_splits_are_disjoint(self, built: Path) -> None:
        pairs = build_pairs()
        assert pairs == build_pairs()
        train, heldout = split_pairs(pairs, 0.05, 0)
        assert [pair.question for pair in train] == [
            row["instruction"] for row in read_rows(built / "stdlib_qa_train.jsonl")
        ]
        assert len(train) + len(heldout) == len(pairs)
        assert not {pair.name for pair in train} & {pair.name for pair in heldout}
        assert not {pair.answer for pair in train} & {pair.answer for pair in heldout}

    def test_leaves_no_staging_folder(self, built: Path) -> None:
        assert list(built.parent.iterdir()) == [built]


class TestRepeatedBuild:
    def test_same_settings_do_nothing(
        self, built: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        before = (built / "build.json").stat().st_mtime_ns
        assert main(["--out", str(built), "--vocab-size", str(VOCAB_SIZE)]) == 0
        assert "already holds this build" in capsys.readouterr().out
        assert (built / "build.json").stat().st_mtime_ns == before

    @pytest.mark.parametrize("change", [{"seed": 1}, {"vocab_size": 512}, {"heldout": 0.1}])
    def test_other_settings_are_another_build(self, built: Path, change: dict[str, Any]) -> None:
        settings = {"vocab_size": VOCAB_SIZE} | change
        assert not is_built(built, Settings(**settings))

    def test_a_folder_without_its_stamp_is_not_built(self, tmp_path: Path) -> None:
        assert not is_built(tmp_path, Settings())


class TestTokenizer:
    @pytest.mark.parametrize("text", TRICKY_TEXTS)
    def test_any_text_comes_back_exactly(self, tokenizer: Any, text: str) -> None:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text

    def test_heldout_texts_come_back_exactly(self, built: Path, tokenizer: Any) -> None:
        texts = [row["text"] for row in read_rows(built / "stdlib_text_heldout.jsonl")]
        assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts

    def test_has_the_requested_size_and_special_tokens(self, tokenizer: Any) -> None:
        assert len(tokenizer) == VOCAB_SIZE
        assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (
            "<|pad|>",
            "<|bos|>",
            "<|eos|>",
        )


class TestErrors:
    def test_too_few_docstrings_exit_with_one_line(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setattr(build_module, "build_pairs", lambda **_: [])
        assert main(["--out", str(tmp_path / "out")]) == 1
        message = capsys.readouterr().err
        assert message.startswith("error: got 0 docstrings")
        assert message.count("\n") == 1
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("option", [["--vocab-size", "10"], ["--heldout", "1.5"]])
    def test_impossible_options_are_refused(self, option: list[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--out", "unused", *option])


class TestPairs:
    def test_signatures_are_those_that_a_caller_sees(self, pairs_of: Any) -> None:
        pairs = pairs_of(
            "class Reader:\n"
            "    def read(self, size=-1, *, strict: bool = True):\n"
            "        '''Read up to size characters of the document.'''\n"
            "    @staticmethod\n"
            "    def parse(text, /):\n"
            "        '''Parse one text into a document.'''\n"
            "    @property\n"
            "    def closed(self):\n"
            "        '''Whether the document has been closed.'''\n"
        )
        assert [pair.heading for pair in pairs.values()] == [
            "json.Reader.read(size=-1, *, strict: bool=True)",
            "json.Reader.parse(text, /)",
            "json.Reader.closed",
        ]
        assert all(f"`{pair.heading}`" in pair.question for pair in pairs.values())

    def test_sources_are_not_executed(self, pairs_of: Any) -> None:
        assert list(pairs_of("'''A module that cannot be imported.'''\nraise SystemExit")) == [
            "json"
        ]

    def test_definitions_under_conditions_are_found(self, pairs_of: Any) -> None:
        text = '"""Return the number of processors."""'
        pairs = pairs_of(
            f"try:\n    import x\nexcept ImportError:\n    def count():\n        {text}\n"
        )
        assert list(pairs) == ["json.count"]

    def test_private_and_local_objects_are_left_out(self, pairs_of: Any) -> None:
        text = '"""Return the number of processors."""'
        assert not pairs_of(f"def _f():\n    {text}\n    def g():\n        {text}\n")

    def test_repeated_answers_are_left_out(self, pairs_of: Any) -> None:
        text = '"""Return the number of processors."""'
        assert list(pairs_of(f"def f():\n    {text}\ndef g():\n    {text}\n")) == ["json.f"]

    def test_asking_twice_about_one_tree_gives_the_same(self) -> None:
        tree = ast.parse(
            "class A:\n    def f(self, x, y):\n        'Return the sum of two numbers.'\n"
        )
        first = list(find_documented("json", tree))
        assert first == list(find_documented("json", tree))


class TestCleanDocstring:
    @pytest.mark.parametrize(
        "docstring",
        [
            "Too short.",
            "long " * 500,
            "A text with a stray \x00 control character.",
            "A text with a lost \N{REPLACEMENT CHARACTER} character in it.",
            ">>> first_value = 1 + 1\n>>> first_value\n2\n>>> print('what')\nwhat\n",
            "Copyright (C) 2001 Some Body. All rights reserved here.",
            "Internal: do not use this from outside.",
        ],
    )
    def test_useless_docstrings_are_empty(self, docstring: str) -> None:
        assert clean_docstring(docstring) == ""

    def test_banners_and_notes_are_cut_from_useful_docstrings(self) -> None:
        docstring = """Encode and decode the documents.

            Written by Some Body.

            Call load to begin.

            XXX this should be faster
        """
        assert clean_docstring(docstring) == (
            "Encode and decode the documents.\n\nCall load to begin."
        )

    def test_examples_stay_beside_prose(self) -> None:
        docstring = "Return the sum of the two given numbers.\n\n>>> add(1, 2)\n3"
        assert clean_docstring(docstring) == docstring
