"""Model families that sequence parallelism trains rightly, and how that is tried."""
