# SPDX-License-Identifier: Apache-2.0
"""The service over its socket, with fake agents: calls, events, watching, cancelling, deadlines."""

from __future__ import annotations

import io
import os
import threading

import grpc
import numpy as np
import pytest
from google.protobuf import descriptor_pool, message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from checkpointd import errors
from checkpointd.api.v1 import checkpoint_pb2 as pb
from checkpointd.api.v1 import checkpoint_pb2_grpc
from checkpointd.image.store import Store
from checkpointd.memory import PAGE_SIZE
from checkpointd.version import VERSION
from tests.service_harness import House, is_gone, sleeping_target, wait_until


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    found = House(tmp_path_factory.mktemp("house"))
    found.serve()
    yield found
    found.close()


@pytest.fixture
def client(house):
    with house.client() as found:
        yield found


@pytest.fixture
def target():
    with sleeping_target() as pid:
        yield pid


def kinds(events):
    return [event["message_type"] for event in events]


def test_the_service_says_who_it_is(house, client):
    found = client.version()
    assert (found["version"], found["pid"], found["store"]) == (VERSION, house.service.pid, str(house.store))


def test_a_dump_tells_its_id_first_and_its_summary_last(client, target):
    events = list(client.dump(target))
    assert kinds(events) == ["started", "phase", "phase", "progress", "stats", "summary"]
    assert [event["phase"] for event in events if event["message_type"] == "phase"] == ["freezing", "copying"]
    summary = events[-1]
    assert summary["pid"] == target
    assert summary["pages_written"] == summary["pages_scanned"] == 5
    assert (summary["parent_id"], summary["backend"]) == ("", "uffd-wp")


def test_one_agent_serves_all_dumps_of_a_target(house, client, target):
    first = list(client.dump(target))[-1]
    agent = house.agent_pid()
    second = list(client.dump(target, incremental=True))[-1]
    assert house.agent_pid() == agent
    assert second["parent_id"] == first["image_id"]
    (tracked,) = [found for found in client.status()["targets"] if found["pid"] == target]
    assert (tracked["agent_pid"], tracked["last_image_id"]) == (agent, second["image_id"])


def test_untrack_ends_the_agent(house, client, target):
    client.track(target)
    agent = house.agent_pid()
    client.untrack(target)
    assert is_gone(agent)
    with pytest.raises(errors.UsageError, match="not tracked"):
        client.untrack(target)


def test_the_agent_ends_with_kill(house, client, target):
    list(client.dump(target, kill=True))
    assert is_gone(house.agent_pid())


def test_track_names_the_backend_and_is_kept(client, target):
    assert client.track(target, backend="content")["backend"] == "content"
    assert target in [found["pid"] for found in client.status()["targets"]]


def test_check_leaves_no_agent_behind(house, client, target):
    assert client.check()["ok"]
    found = client.check(target)
    assert not found["ok"]
    assert [item["category"] for item in found["items"]] == ["required", "target"]
    assert is_gone(house.agent_pid())
    assert target not in [tracked["pid"] for tracked in client.status()["targets"]]


def test_check_of_a_tracked_target_keeps_its_agent(client, target):
    client.track(target)
    client.check(target)
    assert target in [tracked["pid"] for tracked in client.status()["targets"]]


def test_the_agent_of_a_restore_becomes_that_of_the_process(tmp_path, target):
    house = House(tmp_path)
    house.serve(FAKE_AGENT_RESTORED=str(target))
    try:
        with house.client() as client:
            list(client.dump(target))
            client.untrack(target)
            summary = list(client.restore("latest"))[-1]
            assert summary["pid"] == target
            (tracked,) = client.status()["targets"]
            assert (tracked["pid"], tracked["agent_pid"]) == (target, house.agent_pid())
            assert tracked["last_image_id"] == summary["image_id"]
            assert list(client.dump(target, incremental=True, parent="latest"))[-1]["parent_id"]
            client.untrack(target)
            list(client.restore("latest", track_backend="none"))
            assert client.status()["targets"] == []
            assert is_gone(house.agent_pid())
    finally:
        house.close()


def test_a_second_dump_of_the_same_target_is_refused_and_the_first_goes_on(house, client, target):
    first = client.dump(target, tag="wait")
    operation = next(first)["operation_id"]
    with pytest.raises(errors.Busy, match=operation):
        list(client.dump(target))
    assert client.cancel(operation)["state"] == "failed"
    with pytest.raises(errors.Cancelled):
        list(first)


def test_dumps_of_two_targets_run_side_by_side(client, target):
    with sleeping_target() as other:
        waiting = client.dump(target, tag="wait")
        operation = next(waiting)["operation_id"]
        assert list(client.dump(other))[-1]["pid"] == other
        client.cancel(operation)


def test_watching_replays_from_the_start_and_follows_to_the_end(client, target):
    events = client.dump(target, tag="wait")
    operation = next(events)["operation_id"]
    assert [next(events)["phase"], next(events)["phase"]] == ["freezing", "copying"]
    watched = client.watch(operation[:9])
    assert kinds([next(watched) for _ in range(3)]) == ["started", "phase", "phase"]
    client.cancel(operation)
    with pytest.raises(errors.Cancelled):
        next(watched)
    with pytest.raises(errors.Cancelled):
        list(client.watch(operation))


def test_an_ended_operation_can_still_be_watched(client, target):
    events = list(client.dump(target))
    watched = list(client.watch(events[0]["operation_id"]))
    assert [{**event, "operation": "dump"} for event in events] == watched
    assert client.cancel(events[0]["operation_id"])["state"] == "done"


def test_a_lost_client_does_not_end_the_dump(house, target):
    with house.client() as lost:
        events = lost.dump(target, tag="wait")
        operation = next(events)["operation_id"]
    with house.client() as client:
        watched = client.watch(operation)
        assert kinds([next(watched), next(watched)]) == ["started", "phase"]
        client.cancel(operation)


def test_a_lost_client_ends_the_dump_where_it_asked_for_that(house, target):
    with house.client() as lost:
        next(lost.dump(target, tag="wait", cancel_on_disconnect=True))
    with house.client() as client:
        operation = client.status()["operations"][-1]["id"]
        with pytest.raises(errors.Cancelled):
            list(client.watch(operation))


def test_a_dump_still_running_at_its_deadline_is_cancelled(house, target):
    with house.client(timeout_s=1.5) as hurried, pytest.raises(errors.FrozenTooLong):
        list(hurried.dump(target, tag="wait"))
    with house.client() as client:
        operation = client.status()["operations"][-1]["id"]
        with pytest.raises(errors.FrozenTooLong, match="deadline"):
            list(client.watch(operation))


def test_a_call_without_time_left_makes_no_image(house, target):
    channel = grpc.insecure_channel(f"unix:{house.socket}")
    stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
    with channel, pytest.raises(grpc.RpcError) as failure:
        list(stub.Dump(pb.DumpRequest(pid=target), timeout=1e-6))
    assert failure.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    with house.client() as client:
        wait_until(
            lambda: target not in [found["pid"] for found in client.status()["targets"]], "the refusal"
        )
        assert target not in [image["pid"] for image in client.list()["images"]]


def test_images_are_listed_shown_verified_and_removed(client, target):
    summary = list(client.dump(target, tag="kept"))[-1]
    image_id = summary["image_id"]
    assert client.list()["images"][-1]["id"] == image_id
    shown = client.get("tag:kept")
    assert (shown["image"]["id"], shown["image"]["pid"]) == (image_id, target)
    assert shown["meta"]["tag"] == "kept"
    verified = list(client.verify(image_id[:10]))[-1]
    assert verified["image_ids"] == [image_id]
    assert verified["bytes_checked"] > 0
    assert client.delete(["latest", image_id])["image_ids"] == [image_id]
    with pytest.raises(errors.ImageNotFound):
        client.get(image_id)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (b"[" * 100_000, "is not JSON"),
        (b"\xff", "is not JSON"),
        (b'{"process": 5}', "int, not dict"),
        (b"{}", "missing"),
    ],
)
def test_an_image_whose_state_is_malformed_is_shown_all_the_same(house, client, state, words):
    with Store.open(house.store, create=True).begin(parent=None, threads=1, compress="none") as builder:
        builder.add_pages(0, np.array([5], dtype=np.uint64), np.ones(PAGE_SIZE, dtype=np.uint8))
        image_id = builder.commit(meta={"pid": 4, "comm": "odd"}, state=state).id
    shown = client.get(image_id)
    assert (shown["meta"]["comm"], shown["state"], words in shown["state_problem"]) == ("odd", None, True)
    done = house.checkpoint("show", image_id)
    assert (done.returncode, "restore  not possible: the image's state is malformed" in done.stdout) == (
        0,
        True,
    )
    client.delete([image_id])


def test_nothing_is_removed_when_one_name_is_wrong(client, target):
    image_id = list(client.dump(target))[-1]["image_id"]
    with pytest.raises(errors.ImageNotFound):
        client.delete([image_id, "0123456789ab"])
    assert client.get(image_id)["image"]["id"] == image_id


def test_an_exported_image_comes_back_whole(client, target, tmp_path):
    image_id = list(client.dump(target))[-1]["image_id"]
    first, *parts = client.export(image_id)
    assert first.decode() == image_id
    data = b"".join(parts)
    assert all(len(part) <= 1 << 20 for part in parts)
    imported = client.import_file(io.BytesIO(data), store=str(tmp_path / "elsewhere"))["image"]
    assert imported["nr_pages"] == 5
    assert [image["id"] for image in client.list(store=str(tmp_path / "elsewhere"))["images"]] == [
        imported["id"]
    ]


@pytest.mark.parametrize("cut", [0, 10, 5000, -1])
def test_a_truncated_export_is_refused_and_leaves_nothing(client, target, tmp_path, cut):
    image_id = list(client.dump(target))[-1]["image_id"]
    data = b"".join(list(client.export(image_id))[1:])
    with pytest.raises(errors.ImageDamaged):
        client.import_file(io.BytesIO(data[:cut]), store=str(tmp_path / "s"))
    assert client.list(store=str(tmp_path / "s"))["images"] == []


def test_an_import_without_header_is_refused(house):
    with grpc.insecure_channel(f"unix:{house.socket}") as channel:
        stub = checkpoint_pb2_grpc.CheckpointServiceStub(channel)
        for requests in ([], [pb.ImportRequest(data=b"x")]):
            with pytest.raises(grpc.RpcError) as failure:
                stub.Import(iter(requests))
            assert failure.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_damaged_image_is_found(client, target, tmp_path):
    store = tmp_path / "store"
    image_id = list(client.dump(target, store=str(store), compress="none"))[-1]["image_id"]
    assert list(client.verify(image_id, store=str(store)))[-1]["image_ids"] == [image_id]
    (pack,) = (store / "packs").iterdir()
    data = bytearray(pack.read_bytes())
    data[len(data) // 3] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(data)
    for ref in (image_id, ""):
        with pytest.raises(errors.ImageDamaged):
            list(client.verify(ref, store=str(store)))


def test_all_images_are_looked_at_and_the_damaged_ones_named(house, client, target, tmp_path):
    store = tmp_path / "store"
    ids = []
    for _ in range(4):
        before = set((store / "packs").iterdir()) if ids else set()
        ids.append(list(client.dump(target, store=str(store), compress="none"))[-1]["image_id"])
        (pack,) = set((store / "packs").iterdir()) - before
        if len(ids) in (1, 3):
            data = bytearray(pack.read_bytes())
            data[len(data) // 3] ^= 1
            pack.chmod(0o600)
            pack.write_bytes(data)
    with pytest.raises(errors.ImageDamaged, match="2 of 4 images are damaged") as caught:
        list(client.verify(store=str(store)))
    details = caught.value.details
    assert (details["damaged"], details["whole"]) == ([ids[0], ids[2]], [ids[1], ids[3]])
    assert all(
        image_id[:12] in problem for image_id, problem in zip(ids[::2], details["problems"], strict=True)
    )
    assert ids[3][:12] in caught.value.hint
    for words, whole, damaged in (((), ids[1::2], ids[::2]), (ids, ids[1::2], ids[::2])):
        done = house.checkpoint("verify", *words, "--store", str(store))
        assert done.returncode == 12
        assert len([line for line in done.stdout.splitlines() if "whole" in line]) == len(whole)
        assert all(image_id[:12] in done.stderr for image_id in damaged)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"pid": 0}, errors.UsageError, "not a pid"),
        ({"pid": -5}, errors.UsageError, "not a pid"),
        ({"pid": 2**22 + 5}, errors.TargetGone, "no process"),
        ({"backend": "magic"}, errors.UsageError, "backend"),
        ({"read_mode": "guess"}, errors.UsageError, "read mode"),
        ({"tcp": "keep"}, errors.UsageError, "tcp"),
        ({"max_frozen_us": -1}, errors.UsageError, "negative"),
        ({"external": "all"}, errors.UsageError, "external"),
        ({"delta": True}, errors.UsageError, "from a parent"),
        ({"store": "relative"}, errors.UsageError, "absolute"),
        ({"parent": "../../etc", "incremental": True}, errors.UsageError, "does not name an image"),
        ({"parent": "latest~999", "incremental": True}, errors.ImageNotFound, "latest~999"),
        ({"compress": "lzma"}, errors.CheckpointError, "compression"),
        ({"tag": "exec"}, errors.TargetExeced, "replaced its program"),
    ],
)
def test_bad_dumps_are_refused_with_a_sentence(client, target, options, error, words):
    options = {"pid": target, **options}
    with pytest.raises(error, match=words) as caught:
        list(client.dump(options.pop("pid"), **options))
    assert caught.value.hint
    assert target not in [found["pid"] for found in client.status()["targets"]]


def test_the_service_and_its_agents_are_no_targets(house, client, target):
    client.track(target)
    for pid in (house.service.pid, house.agent_pid()):
        with pytest.raises(errors.UsageError, match="checkpointd itself"):
            list(client.dump(pid))


def test_all_blockers_are_told_at_once(client, target):
    with pytest.raises(errors.Unsupported) as caught:
        list(client.dump(target, tag="blocked"))
    details = caught.value.details
    assert len(details["blockers"]) + details["blockers_left_out"] == 2000


@pytest.mark.parametrize(
    ("ref", "error"),
    [("../x", errors.UsageError), ("", errors.UsageError), ("deadbeef00", errors.ImageNotFound)],
)
def test_bad_image_names_are_refused(client, target, ref, error):
    list(client.dump(target))
    for call in (lambda: list(client.restore(ref)), lambda: client.get(ref), lambda: client.delete([ref])):
        with pytest.raises(error):
            call()


def test_a_store_that_is_not_there_is_named(client, tmp_path):
    with pytest.raises(errors.StoreMissing, match="nowhere"):
        client.list(store=str(tmp_path / "nowhere"))


def test_a_failed_first_dump_leaves_no_agent(house, client, target):
    with pytest.raises(errors.TargetExeced):
        list(client.dump(target, tag="exec"))
    assert is_gone(house.agent_pid())


def test_a_failed_dump_of_a_tracked_target_keeps_it_tracked(client, target):
    client.track(target)
    with pytest.raises(errors.TargetExeced):
        list(client.dump(target, tag="exec"))
    assert target in [found["pid"] for found in client.status()["targets"]]


def test_health_and_reflection_are_there(house):
    with grpc.insecure_channel(f"unix:{house.socket}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "checkpointd.api.v1.CheckpointService"):
            status = health.Check(health_pb2.HealthCheckRequest(service=name)).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        names = ProtoReflectionDescriptorDatabase(channel).get_services()
        database = ProtoReflectionDescriptorDatabase(channel)
        pool = descriptor_pool.DescriptorPool(database)
        method = pool.FindServiceByName("checkpointd.api.v1.CheckpointService").FindMethodByName("GetVersion")
        # as grpcurl does: knowing nothing of the interface but what the service itself tells
        answer = channel.unary_unary(
            "/checkpointd.api.v1.CheckpointService/GetVersion",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
        )(message_factory.GetMessageClass(method.input_type)())
    assert "checkpointd.api.v1.CheckpointService" in names
    assert (answer.version, answer.pid) == (VERSION, house.service.pid)


def test_many_clients_at_once(house):
    failures = []

    def work():
        try:
            with sleeping_target() as pid, house.client() as client:
                list(client.dump(pid))
                list(client.dump(pid, incremental=True))
                client.untrack(pid)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_agents_inherit_no_descriptors_of_the_service(house, client, target):
    client.track(target)
    links = [
        os.readlink(f"/proc/{house.agent_pid()}/fd/{fd}")
        for fd in os.listdir(f"/proc/{house.agent_pid()}/fd")
    ]
    assert len([link for link in links if link.startswith("socket:")]) == 1


def test_the_agent_of_a_target_that_exits_is_ended(house, client):
    with sleeping_target() as pid:
        client.track(pid)
        agent = house.agent_pid()
        os.kill(agent, 9)  # as good an end as any other: what matters is that the table forgets it
        wait_until(lambda: pid not in [found["pid"] for found in client.status()["targets"]], "the end")
        assert list(client.dump(pid))[-1]["pid"] == pid
        assert house.agent_pid() != agent
