# SPDX-License-Identifier: Apache-2.0
"""Errors survive the way from the service to the client."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2

from checkpointd import errors
from checkpointd.client.wire import error_of
from checkpointd.service.images import export_chunks
from checkpointd.service.status import DOMAIN, MAX_DETAILS, code_of, status_of


def every_class():
    queue, found = [errors.CheckpointError], []
    while queue:
        found.append(queue.pop())
        # only the public tree: a room's own subclass travels as its public base
        queue += [cls for cls in found[-1].__subclasses__() if cls.__module__ == found[-1].__module__]
    return found


class Failure(grpc.RpcError):
    """A failed call, as a client sees it."""

    def __init__(self, code, details="", status=None):
        self._code, self._details, self._status = code, details, status

    def code(self):
        return self._code

    def details(self):
        return self._details

    def trailing_metadata(self):
        return [("grpc-status-details-bin", self._status.SerializeToString())] if self._status else None


@pytest.mark.parametrize("cls", every_class(), ids=lambda cls: cls.__name__)
def test_every_error_comes_back_as_itself(cls):
    sent = cls("pid 5 did something", hint="do this", pid=5, path="/x", blockers=["a", "b"])
    got = error_of(Failure(code_of(sent), sent.message, status_of(sent)), "here")
    assert type(got) is cls
    assert (got.message, got.hint, got.details) == (sent.message, sent.hint, sent.details)


def test_the_status_is_plain_google_rpc():
    status = status_of(errors.TargetGone("pid 5 is gone", hint="look", pid=5))
    assert status.code == grpc.StatusCode.NOT_FOUND.value[0]
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("TARGET_GONE", DOMAIN)
    assert dict(info.metadata) == {"hint": "look", "exit_code": "4", "details": '{"pid": 5}'}


def test_details_too_large_for_the_wire_are_cut_and_say_so():
    blockers = [f"fd {number} cannot be saved" for number in range(10_000)]
    sent = errors.Unsupported("no", blockers=blockers, blob="x" * 100_000, pid=5)
    status = status_of(sent)
    assert status.ByteSize() < MAX_DETAILS + 1000
    got = error_of(Failure(code_of(sent), "no", status), "here")
    kept = got.details["blockers"]
    assert kept == blockers[: len(kept)]
    assert len(kept) + got.details["blockers_left_out"] == len(blockers)
    assert got.details["pid"] == 5
    assert "blob" not in got.details


@pytest.mark.parametrize(
    ("code", "cls"),
    [
        (grpc.StatusCode.UNAVAILABLE, errors.ServiceUnreachable),
        (grpc.StatusCode.DEADLINE_EXCEEDED, errors.FrozenTooLong),
        (grpc.StatusCode.UNIMPLEMENTED, errors.VersionMismatch),
        (grpc.StatusCode.CANCELLED, errors.ServiceUnreachable),
        (grpc.StatusCode.INTERNAL, errors.CheckpointError),
    ],
)
def test_failures_of_grpc_itself_get_a_sentence_too(code, cls):
    got = error_of(Failure(code, "said"), "/run/x.sock")
    assert type(got) is cls
    assert got.message


def test_a_surprise_in_an_export_is_an_error_that_names_the_image():
    class Store:
        def export_image(self, image_id, sink):
            raise ValueError("why")

    with pytest.raises(errors.CheckpointError, match=r"^the export of 0123456789ab failed: why$"):
        list(export_chunks(Store(), "0123456789abcdef"))
