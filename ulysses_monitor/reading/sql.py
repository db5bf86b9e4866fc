"""SQL over tables in memory, by DuckDB, which can neither read nor write anything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from ulysses_monitor.common.errors import InputError

__all__ = ["run_query"]

_LOCKED_DOWN = (
    "SET python_enable_replacements = false",  # else a query reads the caller's variables
    "SET enable_external_access = false",
    "SET lock_configuration = true",
)
_QUERIES = {"SELECT", "EXPLAIN", "MULTI"}  # PIVOT is several


def run_query(query: str, tables: Mapping[str, Any]) -> pd.DataFrame:
    """The answer to one query.

    Args:
        query: what DuckDB understands.
        tables: Arrow tables by the name that the query has for them.

    Raises:
        InputError: DuckDB is not installed, or the query is wrong, or reaches for files.
    """
    try:
        import duckdb
    except ImportError:
        raise InputError("sql: needs DuckDB; pip install 'ulysses-toolkit[duckdb]'") from None
    with duckdb.connect(":memory:") as connection:
        for name, table in tables.items():
            connection.register(name, table)
        for setting in _LOCKED_DOWN:
            connection.execute(setting)
        try:
            kinds = {statement.type.name for statement in connection.extract_statements(query)}
            if not kinds or kinds - _QUERIES:
                raise InputError(f"sql: got {', '.join(sorted(kinds)) or 'nothing'}; give a SELECT")
            return connection.execute(query).df()
        except duckdb.Error as error:
            raise InputError(f"sql: {' '.join(str(error).split())}") from None
