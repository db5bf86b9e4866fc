"""Turns datasets in LLaMA-Factory's format into tokenised rows, and rows into batches."""

from ulysses_core.data.collate import CausalCollator
from ulysses_core.data.config import DataConfig
from ulysses_core.data.load import load_datasets
from ulysses_core.data.sources import RowPlan, check_sources
from ulysses_core.data.stats import DataStats
from ulysses_core.data.store import DatasetPair

__all__ = [
    "CausalCollator",
    "DataConfig",
    "DataStats",
    "DatasetPair",
    "RowPlan",
    "check_sources",
    "load_datasets",
]
