"""Turns datasets in LLaMA-Factory's format into tokenised rows, and rows into batches."""

from ulysses_core.data.collate import CausalCollator
from ulysses_core.data.config import DataConfig
from ulysses_core.data.load import DatasetPair, RowPlan, check_sources, load_datasets
from ulysses_core.data.tokenize import DataStats

__all__ = [
    "CausalCollator",
    "DataConfig",
    "DataStats",
    "DatasetPair",
    "RowPlan",
    "check_sources",
    "load_datasets",
]
