"""Conversation log of the web server: JSON Lines by day, with limited retention."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import threading
import time
from datetime import date, timedelta
from pathlib import Path
from typing import Final

from llava.serve.web.chat import Chat, JsonObject, Turn
from llava.serve.web.images import as_jpeg

logger = logging.getLogger(__name__)
_DAY: Final = re.compile(r"(\d{4}-\d{2}-\d{2})(-conv\.json)?")


class ConversationLog:
    """Log of lines in `directory/YYYY-MM-DD-conv.json` and images in `directory/serve_images/YYYY-MM-DD/MD5.jpg`.

    Votes are always recorded; answers, with the visitor's address and images, only if `chats` is set. Records are
    deleted after `keep_days`.
    """

    def __init__(self, directory: Path, *, chats: bool = False, keep_days: int = 30) -> None:
        self.directory = directory
        self.chats = chats
        self.keep_days = keep_days
        self._lock = threading.Lock()
        self._today = ""

    def chat(self, chat: Chat, turn: Turn, finish: float, address: str) -> None:
        """Record a finished answer, if `chats` is set."""
        if self.chats:
            times = {"start": round(turn.started, 4), "finish": round(finish, 4)}
            images = [self._save(as_jpeg(image)) for image in turn.images]
            self._write({"type": "chat", **_facts(chat, turn), **times, "images": images, "ip": address}, finish)

    def vote(self, kind: str, chat: Chat, address: str, *, turn: Turn | None = None, **more: object) -> str:
        """Record a vote on an answer, by default the last one; returns a message for the visitor."""
        line = {"type": kind, **_facts(chat, turn or chat.turns[-1]), **more}
        written = self._write({**line, "ip": address} if self.chats else line, time.time())
        return "Thank you for your vote." if written else "⚠️ The vote could not be recorded."

    def _write(self, line: JsonObject, when: float) -> bool:
        try:
            with self._lock:
                today = date.today().isoformat()
                self._start(today)
                with (self.directory / f"{today}-conv.json").open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"tstamp": round(when, 4), **line}, ensure_ascii=False) + "\n")
        except OSError as error:  # a full disk must not end a conversation
            logger.error("Cannot write the conversation log: %s", error)
            return False
        return True

    def _save(self, data: bytes) -> str:
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        path = self.directory / "serve_images" / date.today().isoformat() / f"{digest}.jpg"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_bytes(data)
        except OSError as error:
            logger.error("Cannot write an image of the conversation log: %s", error)
        return digest

    def _start(self, today: str) -> None:
        """Create the directory and delete old records; runs once per day."""
        if today == self._today:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        self._today = today
        oldest = (date.today() - timedelta(days=self.keep_days)).isoformat()
        for path in [*self.directory.glob("*-conv.json"), *(self.directory / "serve_images").glob("*")]:
            match = _DAY.fullmatch(path.name)
            if match and match[1] < oldest:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _facts(chat: Chat, turn: Turn) -> JsonObject:
    """Keys of every line: model, conversation, turn and sampling settings."""
    return {
        "model": turn.model,
        "state": chat.conversation()[0].dict(),
        "turn_id": turn.turn_id,
        "temperature": turn.sampling.temperature,
        "top_p": turn.sampling.top_p,
        "max_new_tokens": turn.sampling.max_new_tokens,
        "finish_reason": turn.finish_reason,
    }
