"""What `benchmarks.sequence_parallel` and `benchmarks.long_rows` compare."""
