"""Which package is checked: ``pytest tests/clients/checks.py --client darts``, in that package's environment."""

from __future__ import annotations

import os

import pytest

from tests.clients.client import Client, client_of

os.environ["CLIP_CALLBACKS_INJECT"] = "1"  # for packages that raise at a NaN batch before there is a gradient


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--client", help="a module of tests/clients/packages")


@pytest.fixture(scope="session")
def client(request: pytest.FixtureRequest) -> Client:
    return client_of(request.config.getoption("--client"))
