"""The stages of training, a module for each; see `ulysses_core.trainers.stage`."""
