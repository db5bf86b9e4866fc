"""Kinds of rules: how a condition is found, whatever it is about; `rules.book` says about what."""
