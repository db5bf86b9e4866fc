"""Runs SQL over in-memory tables with DuckDB, which is locked out of everything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from ulysses_monitor.common.errors import InputError

__all__ = ["run_query"]

_LOCKDOWN = (
    "SET python_enable_replacements = false",  # otherwise a query can read the caller's variables
    "SET enable_external_access = false",
    "SET lock_configuration = true",
)
_READ_ONLY = {"SELECT", "EXPLAIN", "MULTI"}  # DuckDB splits a PIVOT into several: MULTI


def run_query(query: str, tables: Mapping[str, Any]) -> pd.DataFrame:
    """Runs one query and returns its result.

    Args:
        query: SQL, in DuckDB's dialect.
        tables: Arrow tables, by the names that the query uses.

    Raises:
        InputError: DuckDB is not installed, or the query is wrong or does more than read
            `tables`.
    """
    try:
        import duckdb
    except ImportError:
        raise InputError(
            "sql: DuckDB is not installed; run pip install 'ulysses-toolkit[duckdb]'"
        ) from None
    with duckdb.connect(":memory:") as connection:
        for name, table in tables.items():
            connection.register(name, table)
        for setting in _LOCKDOWN:
            connection.execute(setting)
        try:
            kinds = {statement.type.name for statement in connection.extract_statements(query)}
            if not kinds or kinds - _READ_ONLY:
                given = ", ".join(sorted(kinds)) or "empty"
                raise InputError(f"sql: query is {given}; expected a SELECT")
            return connection.execute(query).df()
        except duckdb.Error as error:
            raise InputError(f"sql: {' '.join(str(error).split())}") from None
