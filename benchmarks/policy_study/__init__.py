"""Parts of `benchmarks/policies.py`: tasks, trainings, interventions, effects, the report."""
