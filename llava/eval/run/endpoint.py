"""Talking to a server with OpenAI's API: one call that retries what will pass and gives up on what will not."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import requests

from llava.errors import ConfigError, RequestError

logger = logging.getLogger(__name__)

PASSING: Final = (408, 409, 429)  # client errors that a later try may not meet; those from 500 on as well


def address(url: str) -> str:
    """An API's address without a slash at the end; `ConfigError` when it is none."""
    if not url.startswith(("http://", "https://")):
        raise ConfigError(
            f"The address {url!r} has no http:// or https:// in front; write it as in http://HOST:PORT/v1."
        )
    return url.rstrip("/")


def headers() -> dict[str, str]:
    """The key of `OPENAI_API_KEY`, if there is one."""
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def chat(
    url: str,
    body: Mapping[str, Any],
    *,
    tries: int = 6,
    timeout: float = 120.0,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """The text a model answers to `body`, posted to `url/chat/completions`; `RequestError` when there is none.

    Tries `tries` times, waiting 1, 2, 4 … seconds; a refusal that will not pass is final (defect M16).
    """
    reason = ""
    for attempt in range(tries):
        if attempt:
            logger.warning("%s failed (%s); trying again.", url, reason)
            sleep(min(2.0 ** (attempt - 1), 60.0))
        try:
            whole = {**body, "stream": False}  # some servers stream unless told not to
            reply = requests.post(f"{url}/chat/completions", json=whole, headers=headers(), timeout=timeout)
            if reply.ok:
                return _text(reply)
            reason = f"HTTP {reply.status_code}: {reply.text[:200]}"
            if reply.status_code < 500 and reply.status_code not in PASSING:
                break
        except (requests.RequestException, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
    raise RequestError(f"The model {body['model']} at {url} gave no reply ({reason}).")


def _text(reply: requests.Response) -> str:
    """What the model said; some servers send it as a stream of events although none was asked for."""
    if not reply.headers.get("Content-Type", "").startswith("text/event-stream"):
        return str(reply.json()["choices"][0]["message"]["content"] or "")
    lines = (line.removeprefix("data:").strip() for line in reply.content.decode("utf-8").split("\n"))
    events = [json.loads(line) for line in lines if line and line != "[DONE]" and line[0] == "{"]
    if not events or any("error" in event for event in events):
        raise ValueError(f"a stream without an answer: {reply.content[-200:]!r}")
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])


def only_model(url: str, timeout: float = 30.0) -> str:
    """The name of the model that a server lists, if it lists one; `RequestError` asking for a name otherwise."""
    try:
        reply = requests.get(f"{url}/models", headers=headers(), timeout=timeout)
        reply.raise_for_status()
        names = [str(model["id"]) for model in reply.json()["data"]]
    except (requests.RequestException, ValueError, LookupError, TypeError) as error:
        raise RequestError(f"The server at {url} does not list its models ({error}); correct --api-base.") from error
    if len(names) != 1:
        raise RequestError(f"The server at {url} has the models {', '.join(names) or '(none)'}; name one: --api-model.")
    return names[0]
