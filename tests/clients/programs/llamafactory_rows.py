"""Tokenises rows with LLaMA-Factory's own pipeline, and writes them as JSON.

Arguments: a JSON file with a tokenizer's folder, settings common to all cases and the settings of
each case; and the file to write.
"""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
from llamafactory.data.mm_plugin import get_mm_plugin
from llamafactory.data.template import TEMPLATES
from llamafactory.hparams import get_train_args
from transformers import AutoTokenizer


def read_rows(tokenizer_folder: str, settings: dict[str, Any]) -> list[dict[str, Any]]:
    model_args, data_args, training_args, finetuning_args, _ = get_train_args(settings)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    name = data_args.template
    original = deepcopy(TEMPLATES[name])
    template = get_template_and_fix_tokenizer(tokenizer, data_args)  # which changes the template
    template.mm_plugin = get_mm_plugin("base")  # others want the model's image processor
    TEMPLATES[name] = original
    stage = "rm" if finetuning_args.stage == "dpo" else finetuning_args.stage
    found = get_dataset(
        template, model_args, data_args, training_args, stage, tokenizer=tokenizer, processor=None
    )
    kept = ("input_ids", "labels", "chosen", "rejected", "kto")
    return [
        {key: value for key, value in row.items() if key.startswith(kept)}
        for row in found["train_dataset"]
    ]


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    rows = {
        name: read_rows(cases["tokenizer"], cases["common"] | settings)
        for name, settings in cases["cases"].items()
    }
    Path(sys.argv[2]).write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
