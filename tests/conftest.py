import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the longer grids")
    parser.addoption("--services", action="store_true", help="also test against real servers")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _skip(config, items, "full", "a longer grid; give --full to run it")
    _skip(config, items, "services", "needs servers on this machine; give --services to run it")


def _skip(config: pytest.Config, items: list[pytest.Item], marker: str, reason: str) -> None:
    if not config.getoption(f"--{marker}"):
        for item in items:
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
