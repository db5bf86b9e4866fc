from tests import conftest


def test_the_files_that_start_first_exist() -> None:
    folder = conftest._TESTS
    assert [name for name in conftest._LONGEST_FILES if not (folder / name).is_file()] == []
