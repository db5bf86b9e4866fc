"""Small trainings, healthy or with one thing broken, and what the rules say about them.

`python -m benchmarks.faults` trains all of them and prints the table; `--short` a few.
"""
