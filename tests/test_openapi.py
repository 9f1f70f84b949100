"""The server does what its OpenAPI document says, as schemathesis sees it; more examples at night."""

from __future__ import annotations

import importlib.util

import openapi
import pytest
from serveclient import AUTH, Client
from servers import TOKEN
from test_serve import ROUTES

from bbprompt.testing import ToyOracle

needed = pytest.mark.skipif(not importlib.util.find_spec("schemathesis"), reason="needs schemathesis (extra dev)")


def test_the_document_names_every_route_and_the_token() -> None:
    client = Client(ToyOracle(), token=TOKEN)
    assert client.one("GET", "/v1/openapi.json").status_code == 401
    document = client.one("GET", "/v1/openapi.json", headers=AUTH).json()
    assert document["security"] == [{"token": []}]
    assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
    named = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert len(named) == openapi.ROUTES == len({path for _, path in ROUTES} - {"/v1/openapi.json"})
    for methods in document["paths"].values():
        for route in methods.values():
            assert {"401", "413", "431", "503"} <= route["responses"].keys()


@pytest.mark.slow
@needed
def test_the_server_keeps_to_its_document() -> None:
    found = openapi.campaign(8, 1)
    assert found["requests"] > 40
    assert found["accepted"] > 5


@pytest.mark.slow
@needed
def test_a_server_that_asks_for_no_token_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"(?i)auth"):
        openapi.campaign(1, 1, "--phases", "coverage", "--include-path", "/v1/info", token=None)
