"""Builds training data from the docstrings of the installed Python, without a network.

    python -m examples.stdlib_data --out data/stdlib

The standard library's sources are parsed and never imported. Each documented module, class,
function and method gives one question/answer pair and one pre-training text, about 6,000 of each. A
share is held out, and a byte-level BPE tokenizer is trained on the rest. The folder can be used as
`dataset_dir`: its `dataset_info.json` names `stdlib_qa`, `stdlib_qa_heldout`, `stdlib_text` and
`stdlib_text_heldout`.

The answers are text from Python's own sources, under the PSF licence of that installation.
"""
