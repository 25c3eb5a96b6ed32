"""Schemathesis over our own OpenAPI: no request that fits the schema, or breaks it, makes a 500.

`LLAVA_FUZZ` sets the cases a route (default 12, seconds); the run of 5,000 cases and more is `LLAVA_FUZZ=400`.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from schemathesis import GenerationMode

from llava.serve.worker.local_backend import BackendSettings
from tests.serve.stubs import MODEL, StubEngine, live_controller, live_worker, until

CASES = int(os.environ.get("LLAVA_FUZZ", "12"))


def fuzz(operation: Any) -> int:
    """Try `CASES` valid and as many invalid requests; returns their number."""
    tried = 0

    def check(case: Any) -> None:
        nonlocal tried
        tried += 1
        reply = case.call(timeout=60)
        assert reply.status_code != 500, case.as_curl_command()

    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        checked = given(case=operation.as_strategy(generation_mode=mode))(check)
        quick = settings(
            max_examples=CASES,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        try:
            seed(0)(quick(checked))()
        except Exception as error:
            if "no negative" not in str(error).lower() and type(error).__name__ not in ("Unsatisfiable",):
                raise
    return tried


@pytest.mark.timeout(0 if CASES > 12 else 600)
# With many cases schemathesis itself draws from `random` inside a strategy.
@pytest.mark.filterwarnings("ignore:Do not use the `random` module:hypothesis.errors.HypothesisDeprecationWarning")
def test_no_request_makes_a_500() -> None:
    engine = StubEngine()
    short = BackendSettings(max_new_tokens=16)
    with live_controller() as controller, live_worker(engine, short, controller=controller.url) as worker:
        until(lambda: controller.registry.models() == [MODEL])
        tried, routes = 0, 0
        for part in (controller, worker):
            schema = schemathesis.openapi.from_url(f"{part.url}/openapi.json")
            for found in schema.get_all_operations():
                tried += fuzz(found.ok())
                routes += 1
        until(lambda: worker.in_use == 0)
        print(f"{tried} cases on {routes} routes")
    assert routes >= 15
    assert tried >= routes * min(CASES, 3)
