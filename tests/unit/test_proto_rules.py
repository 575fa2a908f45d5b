# SPDX-License-Identifier: Apache-2.0
"""The wire contract: the generated code matches it, and it keeps its own rules of style."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from checkpointd.version import VERSION

ROOT = Path(__file__).parents[2]

pytest.importorskip("grpc_tools", reason="grpcio-tools is not installed")


@pytest.fixture(scope="module")
def proto():
    with tempfile.NamedTemporaryFile() as out:
        subprocess.check_call(
            [
                sys.executable,
                "-m",
                "grpc_tools.protoc",
                "-Iproto",
                "--include_source_info",
                f"--descriptor_set_out={out.name}",
                "checkpointd/api/v1/checkpoint.proto",
            ],
            cwd=ROOT,
        )
        return descriptor_pb2.FileDescriptorSet.FromString(Path(out.name).read_bytes()).file[0]


def test_the_generated_code_is_fresh():
    done = subprocess.run([sys.executable, "tools/proto_drift.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_drift_is_noticed(tmp_path):
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import proto_drift
    finally:
        sys.path.pop(0)
    folder = tmp_path / "checkpointd/api/v1"
    folder.mkdir(parents=True)
    text = (ROOT / "proto/checkpointd/api/v1/checkpoint.proto").read_text()
    (folder / "checkpoint.proto").write_text(text)
    assert proto_drift.stale(tmp_path) == []
    (folder / "checkpoint.proto").write_text(text.replace("bool kill = 5;", "bool kill = 55;"))
    assert proto_drift.stale(tmp_path) == ["checkpointd/api/v1/checkpoint.proto"]


def test_the_package_names_its_path_and_version(proto):
    assert proto.package == "checkpointd.api.v1"
    assert proto.name == "checkpointd/api/v1/checkpoint.proto"


def test_every_call_has_messages_of_its_own(proto):
    (service,) = proto.service
    assert service.name == "CheckpointService"
    used = [kind for method in service.method for kind in (method.input_type, method.output_type)]
    assert len(used) == len(set(used))
    for method in service.method:
        assert method.input_type.endswith(f".{method.name}Request")
        assert method.output_type.endswith((f".{method.name}Response", f".{method.name}Event"))


def test_every_enum_begins_with_unspecified(proto):
    for enum in proto.enum_type:
        assert enum.value[0].name.endswith("_UNSPECIFIED")
        prefix = enum.value[0].name.removesuffix("UNSPECIFIED")
        assert all(value.name.startswith(prefix) for value in enum.value)


def test_every_call_is_described(proto):
    described = {
        tuple(place.path) for place in proto.source_code_info.location if place.leading_comments.strip()
    }
    missing = [
        method.name for at, method in enumerate(proto.service[0].method) if (6, 0, 2, at) not in described
    ]
    assert not missing


def test_the_version_is_that_of_the_project():
    assert f'\nversion = "{VERSION}"\n' in (ROOT / "pyproject.toml").read_text()
