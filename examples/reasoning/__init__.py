"""The road of a reasoning model on a task that a CPU learns: adding numbers digit by digit.

`python -m examples.reasoning.run` runs it; docs/reasoning.md shows what comes out.
"""
