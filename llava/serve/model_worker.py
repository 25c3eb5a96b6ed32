"""Serve one checkpoint to many clients, whose requests share batches.

python -m llava.serve.model_worker --controller http://localhost:10000 --port 40000 \
    --worker http://localhost:40000 --model-path CHECKPOINT [--load-4bit] [--device cpu]

With --lora NAME=DIR, LoRA adapters of the checkpoint are served beside it in the same batches, each as a model.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llava.constants import WORKER_HEART_BEAT_INTERVAL
from llava.errors import ConfigError
from llava.mm_utils import get_model_name_from_path
from llava.serve.common.arguments import WorkerArgs, positive, require_server
from llava.utils import flag, guarded

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelWorkerArgs(WorkerArgs):
    """Settings of a model worker, besides those of its engine."""

    conv_mode: str | None = flag(None, "conversation template (default: the one the checkpoint was trained with)")
    multi_modal: bool = flag(False, "obsolete, ignored: the checkpoint determines the modalities")
    queue_seconds: float = flag(120, "timeout until the first token (default %(default)s)", type=positive)


def build_parser() -> argparse.ArgumentParser:
    from llava.engine.arguments import EngineArgs, token_limit

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ModelWorkerArgs.add_cli_args(parser)
    EngineArgs.add_cli_args(parser)
    EngineArgs.add_lora_arg(parser)
    parser.add_argument(
        "--max-num-batched-tokens",
        type=token_limit,
        default="auto",
        metavar="TOKENS",
        help="most tokens of a step in which requests decode, one for each of these; longer prompts are prefilled "
        "in chunks (default: auto, as many as take 0.6 times as long as decoding, or more if few requests run)",
    )
    return parser


@guarded
def main(argv: Sequence[str] | None = None) -> int:
    require_server()
    parsed = build_parser().parse_args(argv)
    args = ModelWorkerArgs.from_cli_args(parsed)
    from llava.engine.arguments import EngineArgs
    from llava.serve.common.protocol import MAX_ADAPTERS
    from llava.serve.common.server import open_socket
    from llava.serve.worker.app import Worker, run_worker
    from llava.serve.worker.local_backend import BackendSettings, LocalBackend, model_loader

    settings = BackendSettings(
        limit=args.limit_model_concurrency,
        queue_limit=args.queue_size,
        max_new_tokens=args.max_new_tokens_limit,
        max_images=args.max_images,
        queue_seconds=args.queue_seconds,
    )
    engine_args = EngineArgs.from_cli_args(parsed, max_batch_size=settings.limit)
    name = args.model_name or get_model_name_from_path(engine_args.model_path)
    if name in engine_args.lora or len(engine_args.lora) > MAX_ADAPTERS:
        raise ConfigError(
            f"At most {MAX_ADAPTERS} adapters can be given with --lora, and none may be named like the base ({name}); "
            f"got {', '.join(engine_args.lora)}."
        )
    sock, token = open_socket(args)
    if args.multi_modal:
        logger.warning("--multi-modal is ignored: the checkpoint determines the modalities.")
    backend = LocalBackend(model_loader(engine_args, name, args.conv_mode, settings), settings)
    worker = Worker(backend, name, stream_interval=args.stream_interval)
    worker.on_failure = lambda: signal.raise_signal(signal.SIGTERM)
    status = run_worker(worker, sock, token, args)
    if backend.state == "loading":  # exiting the interpreter would wait for the loading thread or crash it
        logging.shutdown()
        os._exit(status)
    return status


class ModelWorker:
    """A loaded model with the published methods of a worker; starts no server and no thread.

    The constructor loads the checkpoint and registers with the controller, unless `no_register` is set. Threads may
    call `generate_stream` concurrently; their requests share the engine's batch.
    """

    def __init__(
        self,
        controller_addr: str,
        worker_addr: str,
        worker_id: str,
        no_register: bool,
        model_path: str,
        model_base: str | None,
        model_name: str | None,
        load_8bit: bool,
        load_4bit: bool,
        device: str | None,
    ) -> None:
        require_server()
        from llava.engine.arguments import EngineArgs
        from llava.serve.worker.local_backend import BackendSettings, model_loader

        self.controller_addr, self.worker_addr, self.worker_id = controller_addr, worker_addr, worker_id
        self.model_name = model_name or get_model_name_from_path(model_path)
        self.settings = BackendSettings()
        engine_args = EngineArgs(
            model_path,
            model_base,
            device,
            load_8bit=load_8bit,
            load_4bit=load_4bit,
            max_batch_size=self.settings.limit,
            max_num_batched_tokens="auto",
        )
        self.loaded = model_loader(engine_args, self.model_name, None, self.settings)(lambda fraction: None)
        self._requests = 0
        if not no_register:
            self.register_to_controller()

    def register_to_controller(self) -> None:
        """Register this worker with its status; raises `ConfigError` when the controller cannot be reached."""
        self._post("/register_worker", check_heart_beat=True, worker_status=self.get_status())

    def send_heart_beat(self) -> None:
        """Send the queue length; registers again when the controller does not know this worker."""
        try:
            if not self._post("/receive_heart_beat", queue_length=self.get_queue_length()).get("exist"):
                self.register_to_controller()
        except ConfigError as error:
            logger.error("%s", error)

    def _post(self, path: str, **body: object) -> Any:
        from llava.serve.common.client import Client

        with Client(timeout=5) as client:
            return client.post(self.controller_addr, path, {"worker_name": self.worker_addr, **body})

    def get_queue_length(self) -> int:
        """Number of requests in progress."""
        return self._requests

    def get_status(self) -> dict[str, Any]:
        return {"model_names": [self.model_name], "speed": 1, "queue_length": self.get_queue_length()}

    def generate_stream(self, params: Mapping[str, object]) -> Iterator[bytes]:
        """Frames of the answer, each with its NUL; `params` is a body of `/worker_generate_stream`.

        Raises `ServeError` or `RequestError` for an invalid request.
        """
        from llava.serve.common.protocol import GenerateBody, encode_frame
        from llava.serve.worker.local_backend import make_request, usage_of
        from llava.serve.worker.scheduler import completion_error

        body = GenerateBody.model_validate(params)
        self._requests += 1
        try:
            handle = self.loaded.engine.submit(make_request(body, self.loaded, self.settings))
            text = body.prompt
            for delta in handle:
                text += delta
                yield encode_frame({"text": text, "error_code": 0})
            completion = handle.result()
            if completion.finish_reason == "error":
                raise completion_error(completion)
            usage = usage_of(completion, len(body.images) * (self.loaded.info.image_tokens or 0))
            reason = completion.finish_reason
            yield encode_frame({"text": text, "error_code": 0, "finish_reason": reason, "usage": usage})
        finally:
            self._requests -= 1

    def generate_stream_gate(self, params: Mapping[str, object]) -> Iterator[bytes]:
        """Like `generate_stream`, but every failure becomes an error frame."""
        from llava.errors import RequestError
        from llava.serve.common.protocol import ErrorType, ServeError, encode_frame
        from llava.serve.worker.local_backend import request_refusal

        try:
            yield from self.generate_stream(params)
        except ServeError as error:
            yield encode_frame(error.frame())
        except RequestError as error:
            yield encode_frame(request_refusal(error).frame())
        except ValueError as error:
            yield encode_frame(ServeError(ErrorType.BAD_REQUEST, f"Invalid request: {error}").frame())
        except Exception:  # any failure of the model ends the stream with an error frame
            logger.exception("A request failed")
            yield encode_frame(
                ServeError(ErrorType.INTERNAL, "The worker failed on this request; see its log.").frame()
            )


def heart_beat_worker(controller: ModelWorker) -> None:
    """Send a heartbeat of a model worker every `WORKER_HEART_BEAT_INTERVAL` seconds; never returns."""
    while True:
        time.sleep(WORKER_HEART_BEAT_INTERVAL)
        controller.send_heart_beat()


if __name__ == "__main__":
    sys.exit(main())
