# SPDX-License-Identifier: Apache-2.0
"""What happens around every call of our service: counting, logging, and errors to statuses.

One class each.  Calls of health and reflection pass untouched.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc

from checkpointd.errors import CheckpointError
from checkpointd.service.status import abort

log = logging.getLogger(__name__)

# grpcio has no types of its own: its stubs make this class generic, the class itself is not
if TYPE_CHECKING:
    _ServerInterceptor = grpc.ServerInterceptor[Any, Any]
else:
    _ServerInterceptor = grpc.ServerInterceptor

_PREFIX = "/checkpointd."

Behaviour = Callable[[Any, grpc.ServicerContext], Any]


class _Around(_ServerInterceptor):
    """Wraps the behaviour of a call; `wrap` gets a behaviour that returns a message or an iterator of them."""

    def wrap(self, method: str, behaviour: Behaviour, streams: bool) -> Behaviour:
        raise NotImplementedError

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or not method.startswith(_PREFIX):
            return handler
        if handler.request_streaming:
            make: Any = (
                grpc.stream_stream_rpc_method_handler
                if handler.response_streaming
                else grpc.stream_unary_rpc_method_handler
            )
        elif handler.response_streaming:
            make = grpc.unary_stream_rpc_method_handler
        else:
            make = grpc.unary_unary_rpc_method_handler
        behaviour = (
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        )
        return make(
            self.wrap(method.rsplit("/", 1)[1], behaviour, handler.response_streaming),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


class ErrorInterceptor(_Around):
    """Turns our errors into statuses, and surprises into one that says where to look."""

    def wrap(self, method: str, behaviour: Behaviour, streams: bool) -> Behaviour:
        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                yield from behaviour(request, context)
            except CheckpointError as error:
                abort(context, error)
            except Exception as error:
                if not context.is_active():
                    return  # the client is gone; what its request iterator raised is of no interest
                abort(context, _unexpected(method, error))

        def unary(request: Any, context: grpc.ServicerContext) -> Any:
            try:
                return behaviour(request, context)
            except CheckpointError as error:
                abort(context, error)
            except Exception as error:
                if not context.is_active():
                    raise
                abort(context, _unexpected(method, error))

        return stream if streams else unary


class ActivityInterceptor(_Around):
    """Counts calls under way, so that the service knows when it is idle, and logs each call's end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nr_active = 0
        self._last_end = time.monotonic()

    def idle_s(self) -> float:
        """Seconds since the last call ended; 0 while one is under way."""
        with self._lock:
            return 0.0 if self._nr_active else time.monotonic() - self._last_end

    def wrap(self, method: str, behaviour: Behaviour, streams: bool) -> Behaviour:
        def begin() -> float:
            with self._lock:
                self._nr_active += 1
            return time.monotonic()

        def end(begun: float) -> None:
            with self._lock:
                self._nr_active -= 1
                self._last_end = time.monotonic()
            log.debug("%s took %.1f ms", method, (time.monotonic() - begun) * 1e3)

        def stream(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            begun = begin()
            try:
                yield from behaviour(request, context)
            finally:
                end(begun)

        def unary(request: Any, context: grpc.ServicerContext) -> Any:
            begun = begin()
            try:
                return behaviour(request, context)
            finally:
                end(begun)

        return stream if streams else unary


def _unexpected(method: str, error: Exception) -> CheckpointError:
    log.exception("%s failed unexpectedly", method)
    return CheckpointError(
        f"{method} failed inside the service: {type(error).__name__}: {error}",
        hint="the service's log has the traceback; please report it",
    )
