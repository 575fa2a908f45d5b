# SPDX-License-Identifier: Apache-2.0
"""The calls of CheckpointService.  Thin: each validates, then asks a room (targets, operations, stores).

Raises CheckpointError throughout; service/interceptors.py makes statuses of them.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc

from checkpointd.agent.protocol import CheckArgs, DumpArgs, MeasureArgs, RestoreArgs, TrackArgs
from checkpointd.api.v1 import checkpoint_pb2 as pb
from checkpointd.api.v1 import checkpoint_pb2_grpc
from checkpointd.errors import CheckpointError, FrozenTooLong, ImageDamaged, ImageNotFound, UsageError
from checkpointd.service import convert
from checkpointd.service.agents import Agent, remaining_s
from checkpointd.service.images import (
    Stores,
    damage_found,
    export_chunks,
    import_chunks,
    manifest_json,
    verify_image,
)
from checkpointd.service.operations import Operation, OperationTable
from checkpointd.service.targets import Target, TargetTable
from checkpointd.version import VERSION

BACKENDS = ("auto", "uffd-wp", "precise-soft-dirty", "barrier-soft-dirty", "soft-dirty", "content")
READ_MODES = ("auto", "stopped", "fork")
TCP = ("refuse", "close")
EXTERNAL = ("keep", "null", "refuse")

TAG = re.compile(r"[\w.:+@/-]{1,128}")
"""It is typed as tag:NAME and shown in tables; images taken in from elsewhere may have others."""

MEASURE_INTERVAL_US = (10_000, 3_600_000_000)
MEASURE_EPOCHS = 10_000

NO_DEADLINE_S = 365 * 86400
"""gRPC tells a call without a deadline that it has centuries left."""


class Servicer(checkpoint_pb2_grpc.CheckpointServiceServicer):
    """State of the service: its targets, its operations, its stores."""

    def __init__(self, targets: TargetTable, operations: OperationTable, stores: Stores) -> None:
        self.targets = targets
        self.operations = operations
        self.stores = stores
        self._started_at = time.time()

    # -- the service itself ------------------------------------------------------------------------------------

    def GetVersion(
        self, request: pb.GetVersionRequest, context: grpc.ServicerContext
    ) -> pb.GetVersionResponse:
        return pb.GetVersionResponse(
            version=VERSION,
            pid=os.getpid(),
            store=str(self.stores.default),
            started_at=convert.timestamp(self._started_at),
        )

    def GetStatus(self, request: pb.GetStatusRequest, context: grpc.ServicerContext) -> pb.GetStatusResponse:
        targets = [
            pb.TrackedTarget(
                pid=target.pid,
                name=target.name,
                backend=target.backend,
                last_image_id=target.last_image_id,
                operation_id=target.user,
                agent_pid=target.agent.pid if target.agent else 0,
            )
            for target in self.targets.targets()
        ]
        return pb.GetStatusResponse(
            targets=targets, operations=[convert.operation(found) for found in self.operations.all()]
        )

    # -- targets -----------------------------------------------------------------------------------------------

    def Check(self, request: pb.CheckRequest, context: grpc.ServicerContext) -> pb.CheckResponse:
        deadline = _deadline(context)
        args = CheckArgs(request.pid or None).to_dict()
        if not request.pid:
            with self.targets.unbound("the check") as agent:
                return convert.check_response(_ask(agent, "check", args, deadline))
        with self.targets.lease(request.pid, "a check") as (_, agent):
            return convert.check_response(_ask(agent, "check", args, deadline))

    def Track(self, request: pb.TrackRequest, context: grpc.ServicerContext) -> pb.TrackResponse:
        deadline = _deadline(context)
        backend = _one_of("backend", request.backend, BACKENDS)
        with self.targets.lease(request.pid, "a track") as (target, agent):
            args = TrackArgs(request.pid, backend, request.precise)
            result = _ask(agent, "track", args.to_dict(), deadline)
            target.keep = True
            target.backend = str(result.get("backend", ""))
        return pb.TrackResponse(
            pid=request.pid, backend=target.backend, backend_reason=str(result.get("backend_reason", ""))
        )

    def Untrack(self, request: pb.UntrackRequest, context: grpc.ServicerContext) -> pb.UntrackResponse:
        deadline = _deadline(context)
        if request.pid > 0 and not self.targets.is_tracked(request.pid):
            raise UsageError(
                f"pid {request.pid} is not tracked by this service",
                hint="`checkpoint status` lists what is",
                pid=request.pid,
            )
        with self.targets.lease(request.pid, "an untrack") as (target, agent):
            target.keep = False
            _ask(agent, "untrack", {"pid": request.pid}, deadline)
        return pb.UntrackResponse(pid=request.pid)

    # -- long operations ---------------------------------------------------------------------------------------

    def Dump(self, request: pb.DumpRequest, context: grpc.ServicerContext) -> Iterator[pb.DumpEvent]:
        deadline = _deadline(context)
        backend = _one_of("backend", request.backend, BACKENDS)
        read_mode = _one_of("read mode", request.read_mode, READ_MODES)
        tcp = _one_of("tcp", request.tcp, TCP)
        external = _one_of("external", request.external, EXTERNAL)
        if request.max_frozen_us < 0:
            raise UsageError(
                "the longest frozen time cannot be negative", hint="give e.g. --max-frozen 200ms"
            )
        if request.delta and not request.incremental:
            raise UsageError(
                "delta pages are differences from a parent, and a full dump has none",
                hint="give --delta together with --incremental",
            )
        if request.tag and not TAG.fullmatch(request.tag):
            raise UsageError(
                f"{request.tag[:200]!r} cannot be a tag",
                hint="use up to 128 letters, digits and . _ : + @ / -, e.g. --tag before-upgrade",
            )
        path = self.stores.path(request.store, may_choose=_is_local(context))

        def work(operation: Operation) -> None:
            store = self.stores.open(path, create=True)
            parent = store.resolve(request.parent) if request.parent else ""
            with self.targets.lease(request.pid, operation.id) as (target, agent):
                args = DumpArgs(
                    pid=request.pid,
                    store=str(path),
                    incremental=request.incremental,
                    backend=backend,
                    kill=request.kill,
                    max_frozen_us=request.max_frozen_us,
                    compress=request.compress,
                    tag=request.tag,
                    parent=parent,
                    read_mode=read_mode,
                    delta=request.delta,
                    tcp=tcp,
                    external=[external],
                    deadline_s=remaining_s(operation.deadline),
                )
                stats = self._run(operation, agent, "dump", args.to_dict())
                _remember(target, stats, killed=request.kill)
            self._finish(operation, stats)

        operation = Operation("dump", pid=request.pid, deadline=deadline)
        self.operations.start(operation, work)
        for event in _follow(operation, context, cancel_on_disconnect=request.cancel_on_disconnect):
            yield convert.dump_event(event)

    def Restore(self, request: pb.RestoreRequest, context: grpc.ServicerContext) -> Iterator[pb.RestoreEvent]:
        deadline = _deadline(context)
        track_backend = _one_of("backend", request.track_backend, (*BACKENDS, "none"))
        tcp = _one_of("tcp", request.tcp, TCP)
        external = _one_of("external", request.external, EXTERNAL)
        tty = _one_of("tty", request.tty, ("keep", "null"))
        changed = _one_of("changed", request.changed, ("refuse", "allow"))
        path = self.stores.path(request.store, may_choose=_is_local(context))
        image_id = self.stores.open(path).resolve(request.image)

        def work(operation: Operation) -> None:
            with self.targets.unbound(f"the restore of {image_id[:12]}") as agent:
                args = RestoreArgs(
                    store=str(path),
                    image=image_id,
                    new_pid=request.new_pid,
                    tcp=tcp,
                    external=[external],
                    tty=tty,
                    changed=changed,
                    track_backend=track_backend,
                    deadline_s=remaining_s(operation.deadline),
                )
                stats = self._run(operation, agent, "restore", args.to_dict())
                if stats.get("tracking"):
                    with contextlib.suppress(
                        CheckpointError
                    ):  # it may have exited at once: restored all the same
                        self.targets.bind(
                            agent, int(stats["pid"]), backend=str(stats["tracking"]), image_id=image_id
                        )
            self._finish(operation, stats)

        operation = Operation("restore", image_id=image_id, deadline=deadline)
        self.operations.start(operation, work)
        for event in _follow(operation, context, cancel_on_disconnect=request.cancel_on_disconnect):
            yield convert.restore_event(event)

    def Verify(self, request: pb.VerifyRequest, context: grpc.ServicerContext) -> Iterator[pb.VerifyEvent]:
        deadline = _deadline(context)
        store = self.stores.open(self.stores.path(request.store, may_choose=_is_local(context)))
        image_ids = [store.resolve(request.image)] if request.image else [info.id for info in store.images()]

        def work(operation: Operation) -> None:
            nr_bytes = 0
            whole: list[str] = []
            failures: dict[str, ImageDamaged] = {}

            def progress(done: int, total: int) -> None:
                operation.check_cancelled()
                operation.publish({"type": "progress", "done": done, "total": total, "unit": "bytes"})

            for image_id in image_ids:
                operation.check_cancelled()
                operation.publish({"type": "phase", "phase": f"verifying {image_id[:12]}"})
                try:
                    nr_bytes += verify_image(store, image_id, progress)
                    whole.append(image_id)
                except ImageDamaged as error:
                    if request.image:
                        error.hint = (
                            "`checkpoint verify` without a name tells which images are whole: use one of them"
                        )
                        raise
                    failures[image_id] = error  # the others are looked at all the same
                except ImageNotFound:
                    if request.image:
                        raise  # else it was removed since they were listed
            if failures:
                raise damage_found(failures, whole)
            value = {"image_ids": whole, "bytes_checked": nr_bytes}
            operation.publish({"type": "summary", "value": value})

        operation = Operation("verify", image_id=image_ids[0] if request.image else "", deadline=deadline)
        self.operations.start(operation, work)
        for event in _follow(operation, context, cancel_on_disconnect=True):
            yield convert.verify_event(event)

    def Measure(self, request: pb.MeasureRequest, context: grpc.ServicerContext) -> Iterator[pb.MeasureEvent]:
        deadline = _deadline(context)
        args = MeasureArgs(
            pid=request.pid,
            interval_us=request.interval_us or 1_000_000,
            epochs=request.epochs or 20,
            backends=list(request.backends),
            run=request.run - 1,
            baseline_us=request.baseline_us,
            max_frozen_us=request.max_frozen_us,
        )
        least, most = MEASURE_INTERVAL_US
        if (
            not least <= args.interval_us <= most
            or not 0 <= args.baseline_us <= most
            or args.max_frozen_us < 0
        ):
            raise UsageError("an interval is from 10 ms to one hour long", hint="give e.g. --interval 1s")
        if not 0 < args.epochs <= MEASURE_EPOCHS:
            raise UsageError(f"a measurement has 1 to {MEASURE_EPOCHS} epochs", hint="give e.g. --epochs 20")

        def work(operation: Operation) -> None:
            with self.targets.lease(request.pid, operation.id) as (_, agent):
                end = self._run(operation, agent, "measure", args.to_dict())
            operation.publish({"type": "summary", "value": {"pid": request.pid, **end}})

        operation = Operation("measure", pid=request.pid, deadline=deadline)
        self.operations.start(operation, work)
        for event in _follow(operation, context, cancel_on_disconnect=request.cancel_on_disconnect):
            yield convert.measure_event(event)

    def WatchOperation(
        self, request: pb.WatchOperationRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.WatchOperationEvent]:
        operation = self.operations.find(request.operation_id)
        for event in _follow(operation, context, cancel_on_disconnect=False):
            yield convert.watch_event(operation.kind, event)

    def CancelOperation(
        self, request: pb.CancelOperationRequest, context: grpc.ServicerContext
    ) -> pb.CancelOperationResponse:
        operation = self.operations.find(request.operation_id)
        operation.cancel()
        operation.wait(_left(_deadline(context)))
        return pb.CancelOperationResponse(state=convert.operation_state(operation))

    # -- images ------------------------------------------------------------------------------------------------

    def List(self, request: pb.ListRequest, context: grpc.ServicerContext) -> pb.ListResponse:
        path = self.stores.path(request.store, may_choose=_is_local(context))
        infos = self.stores.open(path).images()
        return pb.ListResponse(images=[convert.image(info) for info in infos], store=str(path))

    def Get(self, request: pb.GetRequest, context: grpc.ServicerContext) -> pb.GetResponse:
        store = self.stores.open(self.stores.path(request.store, may_choose=_is_local(context)))
        image_id = store.resolve(request.image)
        return pb.GetResponse(
            image=convert.image(store.info(image_id)), manifest_json=manifest_json(store, image_id)
        )

    def Delete(self, request: pb.DeleteRequest, context: grpc.ServicerContext) -> pb.DeleteResponse:
        store = self.stores.open(self.stores.path(request.store, may_choose=_is_local(context)))
        if not request.images:
            raise UsageError("no image was named", hint="`checkpoint ls` lists them")
        image_ids = list(dict.fromkeys(store.resolve(ref) for ref in request.images))
        for image_id in image_ids:
            store.remove(image_id)
        return pb.DeleteResponse(image_ids=image_ids)

    def Export(self, request: pb.ExportRequest, context: grpc.ServicerContext) -> Iterator[pb.ExportResponse]:
        store = self.stores.open(self.stores.path(request.store, may_choose=_is_local(context)))
        image_id = store.resolve(request.image)
        yield pb.ExportResponse(image_id=image_id)
        for chunk in export_chunks(store, image_id):
            yield pb.ExportResponse(data=chunk)

    def Import(
        self, request_iterator: Iterator[pb.ImportRequest], context: grpc.ServicerContext
    ) -> pb.ImportResponse:
        first = next(request_iterator, None)
        if first is None or first.WhichOneof("part") != "header":
            raise UsageError("an import begins with its header", hint="send ImportRequest.header first")
        path = self.stores.path(first.header.store, may_choose=_is_local(context))
        store = self.stores.open(path, create=True)
        info = import_chunks(store, (message.data for message in request_iterator))
        return pb.ImportResponse(image=convert.image(info))

    # -- inside ------------------------------------------------------------------------------------------------

    @staticmethod
    def _run(operation: Operation, agent: Agent, op: str, args: dict[str, Any]) -> dict[str, Any]:
        """One request of an agent as (a part of) an operation."""
        left_s = remaining_s(operation.deadline)
        if left_s is not None and left_s <= 0:
            raise FrozenTooLong(
                f"the deadline passed before the {op} began; nothing was touched",
                hint="allow it more time with --timeout",
            )

        def on_event(message: dict[str, Any]) -> None:
            if message["event"] == "phase":
                operation.publish({"type": "phase", "phase": str(message["phase"])})
            elif message["event"] == "record":
                operation.publish({"type": "record", "json": str(message["json"])})
            elif message["event"] == "progress":
                operation.publish(
                    {
                        "type": "progress",
                        "done": int(message["done"]),
                        "total": int(message["total"]),
                        "unit": str(message["unit"]),
                    }
                )

        operation.check_cancelled()
        request = agent.start(op, args, on_event)
        try:
            operation.on_cancel(lambda: agent.cancel(request))
        except CheckpointError:  # cancelled in between
            agent.cancel(request)
        try:
            return request.result()
        except CheckpointError:
            if operation.cancel_error is not None and agent.ended:
                raise operation.cancel_error from None  # it was killed because it did not answer
            raise
        finally:
            operation.on_cancel(None)

    @staticmethod
    def _finish(operation: Operation, stats: dict[str, Any]) -> None:
        operation.publish({"type": "stats", "value": stats})
        operation.publish({"type": "summary", "value": stats})


def _remember(target: Target, stats: dict[str, Any], *, killed: bool) -> None:
    target.keep = not killed
    target.backend = str(stats.get("backend", ""))
    target.last_image_id = str(stats.get("image_id", ""))


def _ask(agent: Agent, op: str, args: dict[str, Any], deadline: float | None) -> dict[str, Any]:
    """A short request, cancelled at the call's deadline."""
    request = agent.start(op, args)
    left_s = remaining_s(deadline)
    if not request.wait(left_s):
        agent.cancel(request)
        raise FrozenTooLong(
            f"the {op} of {agent.label} did not end before its deadline and was cancelled",
            hint="allow it more time with --timeout",
        )
    return request.result()


def _follow(
    operation: Operation, context: grpc.ServicerContext, *, cancel_on_disconnect: bool
) -> Iterator[dict[str, Any]]:
    def gone() -> None:
        if cancel_on_disconnect:
            # elsewhere: it waits for the agent, and this is a thread of gRPC's that serves every call
            threading.Thread(target=operation.cancel, daemon=True).start()
        operation.wake()

    if not context.add_callback(gone):  # also called at the regular end, when there is nothing left to cancel
        gone()
    return operation.follow(lambda: not context.is_active())


def _deadline(context: grpc.ServicerContext) -> float | None:
    """The call's deadline on time.monotonic(), or None.

    Raises:
        FrozenTooLong: it has passed: nothing is begun.
    """
    left_s = context.time_remaining()
    if left_s is None or left_s > NO_DEADLINE_S:
        return None
    if left_s <= 0:
        raise FrozenTooLong(
            "the deadline passed before the call began; nothing was touched",
            hint="allow it more time with --timeout",
        )
    return time.monotonic() + left_s


def _left(deadline: float | None) -> float | None:
    left_s = remaining_s(deadline)
    return None if left_s is None else max(0.0, left_s)


def _is_local(context: grpc.ServicerContext) -> bool:
    return bool(context.peer().startswith("unix:"))


def _one_of(what: str, given: str, allowed: tuple[str, ...]) -> str:
    """`given`, or the first allowed value when it is empty."""
    value = given or allowed[0]
    if value not in allowed:
        raise UsageError(
            f"unknown {what} {given!r}", hint="use one of " + ", ".join(word for word in allowed if word)
        )
    return value
