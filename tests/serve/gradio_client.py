"""A visitor of the web page without a browser: loads it, sends a message, and reads the events of the answer."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

MODEL_BOX = "model_selector_row"


class Visitor:
    """Gradio's protocol as the page's script speaks it: join the queue, then read server-sent events."""

    def __init__(self, http: httpx.Client, model: str) -> None:
        self.http = http
        self.model = model
        self.config = http.get("/config").raise_for_status().json()
        self.session = uuid.uuid4().hex
        self.components = {each["id"]: each for each in self.config["components"]}
        self._join("load", {})  # the session's list of models
        with self.events() as events:
            assert next(event for event in events if event["msg"] == "process_completed")["success"]

    def send(self, text: str) -> None:
        """Submit the message box."""
        self._join("submit", {"message": {"text": text, "files": []}, MODEL_BOX: self.model})

    def _join(self, event: str, values: Mapping[str, object]) -> None:
        """Trigger the handler of an event that reads the chat's model; `values` by `elem_id`, the others by default."""
        for chosen in self.config["dependencies"]:
            inputs = [self.components[number] for number in chosen["inputs"]]
            names = {each["props"].get("elem_id") for each in inputs}
            if event in {name for _, name in chosen["targets"]} and MODEL_BOX in names:
                break
        data = [
            None if each["type"] == "state" else values.get(each["props"].get("elem_id"), each["props"].get("value"))
            for each in inputs
        ]
        body = {"data": data, "fn_index": chosen["id"], "session_hash": self.session, "trigger_id": None}
        self.http.post("/gradio_api/queue/join", json=body).raise_for_status()

    @contextmanager
    def events(self) -> Iterator[Iterator[dict[str, Any]]]:
        """The events of the session as they arrive."""
        address = "/gradio_api/queue/data"
        with self.http.stream("GET", address, params={"session_hash": self.session}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            yield (json.loads(line[5:]) for line in response.iter_lines() if line.startswith("data:"))
