"""Programs that people train with, each with and without the monitor; `make test-clients`.

To add a client, add a file ``test_<client>.py`` with a `Client`, its `Case`s and one test:

    SWIFT = Client("ms-swift", packages=("ms-swift==4.6.0",))
    CASES = [Case(SWIFT, "sft, LoRA", command=("swift", "sft", ...), files={...})]

    @pytest.mark.clients
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_...(case: Case, check: Check) -> None:
        check(case)

`check` installs the client, runs the command without and with the monitor, compares, and adds a row
to docs/clients.md. See `case.Case` for what a case says.
"""
