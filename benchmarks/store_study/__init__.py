"""What `benchmarks.store` compares and measures."""
