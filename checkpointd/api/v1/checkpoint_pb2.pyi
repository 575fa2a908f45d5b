from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OperationState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OPERATION_STATE_UNSPECIFIED: _ClassVar[OperationState]
    OPERATION_STATE_RUNNING: _ClassVar[OperationState]
    OPERATION_STATE_DONE: _ClassVar[OperationState]
    OPERATION_STATE_FAILED: _ClassVar[OperationState]

class CheckCategory(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CHECK_CATEGORY_UNSPECIFIED: _ClassVar[CheckCategory]
    CHECK_CATEGORY_REQUIRED: _ClassVar[CheckCategory]
    CHECK_CATEGORY_OPTIONAL: _ClassVar[CheckCategory]
    CHECK_CATEGORY_TARGET: _ClassVar[CheckCategory]
OPERATION_STATE_UNSPECIFIED: OperationState
OPERATION_STATE_RUNNING: OperationState
OPERATION_STATE_DONE: OperationState
OPERATION_STATE_FAILED: OperationState
CHECK_CATEGORY_UNSPECIFIED: CheckCategory
CHECK_CATEGORY_REQUIRED: CheckCategory
CHECK_CATEGORY_OPTIONAL: CheckCategory
CHECK_CATEGORY_TARGET: CheckCategory

class GetVersionRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetVersionResponse(_message.Message):
    __slots__ = ("version", "pid", "store", "started_at")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    version: str
    pid: int
    store: str
    started_at: _timestamp_pb2.Timestamp
    def __init__(self, version: _Optional[str] = ..., pid: _Optional[int] = ..., store: _Optional[str] = ..., started_at: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("targets", "operations")
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    targets: _containers.RepeatedCompositeFieldContainer[TrackedTarget]
    operations: _containers.RepeatedCompositeFieldContainer[OperationInfo]
    def __init__(self, targets: _Optional[_Iterable[_Union[TrackedTarget, _Mapping]]] = ..., operations: _Optional[_Iterable[_Union[OperationInfo, _Mapping]]] = ...) -> None: ...

class TrackedTarget(_message.Message):
    __slots__ = ("pid", "name", "backend", "last_image_id", "operation_id", "agent_pid")
    PID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    LAST_IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    AGENT_PID_FIELD_NUMBER: _ClassVar[int]
    pid: int
    name: str
    backend: str
    last_image_id: str
    operation_id: str
    agent_pid: int
    def __init__(self, pid: _Optional[int] = ..., name: _Optional[str] = ..., backend: _Optional[str] = ..., last_image_id: _Optional[str] = ..., operation_id: _Optional[str] = ..., agent_pid: _Optional[int] = ...) -> None: ...

class OperationInfo(_message.Message):
    __slots__ = ("id", "kind", "pid", "image_id", "state", "started_at")
    ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STARTED_AT_FIELD_NUMBER: _ClassVar[int]
    id: str
    kind: str
    pid: int
    image_id: str
    state: OperationState
    started_at: _timestamp_pb2.Timestamp
    def __init__(self, id: _Optional[str] = ..., kind: _Optional[str] = ..., pid: _Optional[int] = ..., image_id: _Optional[str] = ..., state: _Optional[_Union[OperationState, str]] = ..., started_at: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ...) -> None: ...

class CheckRequest(_message.Message):
    __slots__ = ("pid",)
    PID_FIELD_NUMBER: _ClassVar[int]
    pid: int
    def __init__(self, pid: _Optional[int] = ...) -> None: ...

class CheckItem(_message.Message):
    __slots__ = ("name", "category", "ok", "detail", "hint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CATEGORY_FIELD_NUMBER: _ClassVar[int]
    OK_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    category: CheckCategory
    ok: bool
    detail: str
    hint: str
    def __init__(self, name: _Optional[str] = ..., category: _Optional[_Union[CheckCategory, str]] = ..., ok: bool = ..., detail: _Optional[str] = ..., hint: _Optional[str] = ...) -> None: ...

class CheckResponse(_message.Message):
    __slots__ = ("ok", "items", "backend", "backend_reason")
    OK_FIELD_NUMBER: _ClassVar[int]
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    BACKEND_REASON_FIELD_NUMBER: _ClassVar[int]
    ok: bool
    items: _containers.RepeatedCompositeFieldContainer[CheckItem]
    backend: str
    backend_reason: str
    def __init__(self, ok: bool = ..., items: _Optional[_Iterable[_Union[CheckItem, _Mapping]]] = ..., backend: _Optional[str] = ..., backend_reason: _Optional[str] = ...) -> None: ...

class TrackRequest(_message.Message):
    __slots__ = ("pid", "backend", "precise")
    PID_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    PRECISE_FIELD_NUMBER: _ClassVar[int]
    pid: int
    backend: str
    precise: bool
    def __init__(self, pid: _Optional[int] = ..., backend: _Optional[str] = ..., precise: bool = ...) -> None: ...

class TrackResponse(_message.Message):
    __slots__ = ("pid", "backend", "backend_reason")
    PID_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    BACKEND_REASON_FIELD_NUMBER: _ClassVar[int]
    pid: int
    backend: str
    backend_reason: str
    def __init__(self, pid: _Optional[int] = ..., backend: _Optional[str] = ..., backend_reason: _Optional[str] = ...) -> None: ...

class UntrackRequest(_message.Message):
    __slots__ = ("pid",)
    PID_FIELD_NUMBER: _ClassVar[int]
    pid: int
    def __init__(self, pid: _Optional[int] = ...) -> None: ...

class UntrackResponse(_message.Message):
    __slots__ = ("pid",)
    PID_FIELD_NUMBER: _ClassVar[int]
    pid: int
    def __init__(self, pid: _Optional[int] = ...) -> None: ...

class DumpRequest(_message.Message):
    __slots__ = ("pid", "store", "incremental", "backend", "kill", "max_frozen_us", "compress", "tag", "parent", "read_mode", "tcp", "external", "cancel_on_disconnect", "delta")
    PID_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    INCREMENTAL_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    KILL_FIELD_NUMBER: _ClassVar[int]
    MAX_FROZEN_US_FIELD_NUMBER: _ClassVar[int]
    COMPRESS_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    READ_MODE_FIELD_NUMBER: _ClassVar[int]
    TCP_FIELD_NUMBER: _ClassVar[int]
    EXTERNAL_FIELD_NUMBER: _ClassVar[int]
    CANCEL_ON_DISCONNECT_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    pid: int
    store: str
    incremental: bool
    backend: str
    kill: bool
    max_frozen_us: int
    compress: str
    tag: str
    parent: str
    read_mode: str
    tcp: str
    external: str
    cancel_on_disconnect: bool
    delta: bool
    def __init__(self, pid: _Optional[int] = ..., store: _Optional[str] = ..., incremental: bool = ..., backend: _Optional[str] = ..., kill: bool = ..., max_frozen_us: _Optional[int] = ..., compress: _Optional[str] = ..., tag: _Optional[str] = ..., parent: _Optional[str] = ..., read_mode: _Optional[str] = ..., tcp: _Optional[str] = ..., external: _Optional[str] = ..., cancel_on_disconnect: bool = ..., delta: bool = ...) -> None: ...

class OperationStarted(_message.Message):
    __slots__ = ("operation_id",)
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    def __init__(self, operation_id: _Optional[str] = ...) -> None: ...

class OperationPhase(_message.Message):
    __slots__ = ("phase",)
    PHASE_FIELD_NUMBER: _ClassVar[int]
    phase: str
    def __init__(self, phase: _Optional[str] = ...) -> None: ...

class OperationProgress(_message.Message):
    __slots__ = ("done", "total", "unit")
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    UNIT_FIELD_NUMBER: _ClassVar[int]
    done: int
    total: int
    unit: str
    def __init__(self, done: _Optional[int] = ..., total: _Optional[int] = ..., unit: _Optional[str] = ...) -> None: ...

class DumpStats(_message.Message):
    __slots__ = ("pages_scanned", "pages_dirty", "pages_skipped_parent", "pages_same", "pages_zero", "pages_written", "bytes_raw", "bytes_stored", "freezing_time", "frozen_time", "total_time", "nr_vmas", "nr_threads", "phases", "pages_delta")
    class PhasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    PAGES_SCANNED_FIELD_NUMBER: _ClassVar[int]
    PAGES_DIRTY_FIELD_NUMBER: _ClassVar[int]
    PAGES_SKIPPED_PARENT_FIELD_NUMBER: _ClassVar[int]
    PAGES_SAME_FIELD_NUMBER: _ClassVar[int]
    PAGES_ZERO_FIELD_NUMBER: _ClassVar[int]
    PAGES_WRITTEN_FIELD_NUMBER: _ClassVar[int]
    BYTES_RAW_FIELD_NUMBER: _ClassVar[int]
    BYTES_STORED_FIELD_NUMBER: _ClassVar[int]
    FREEZING_TIME_FIELD_NUMBER: _ClassVar[int]
    FROZEN_TIME_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TIME_FIELD_NUMBER: _ClassVar[int]
    NR_VMAS_FIELD_NUMBER: _ClassVar[int]
    NR_THREADS_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    PAGES_DELTA_FIELD_NUMBER: _ClassVar[int]
    pages_scanned: int
    pages_dirty: int
    pages_skipped_parent: int
    pages_same: int
    pages_zero: int
    pages_written: int
    bytes_raw: int
    bytes_stored: int
    freezing_time: int
    frozen_time: int
    total_time: int
    nr_vmas: int
    nr_threads: int
    phases: _containers.ScalarMap[str, int]
    pages_delta: int
    def __init__(self, pages_scanned: _Optional[int] = ..., pages_dirty: _Optional[int] = ..., pages_skipped_parent: _Optional[int] = ..., pages_same: _Optional[int] = ..., pages_zero: _Optional[int] = ..., pages_written: _Optional[int] = ..., bytes_raw: _Optional[int] = ..., bytes_stored: _Optional[int] = ..., freezing_time: _Optional[int] = ..., frozen_time: _Optional[int] = ..., total_time: _Optional[int] = ..., nr_vmas: _Optional[int] = ..., nr_threads: _Optional[int] = ..., phases: _Optional[_Mapping[str, int]] = ..., pages_delta: _Optional[int] = ...) -> None: ...

class DumpSummary(_message.Message):
    __slots__ = ("image_id", "parent_id", "pid", "backend", "backend_reason", "incremental", "read_mode", "warnings", "stats", "delta_reason")
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    PARENT_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    BACKEND_REASON_FIELD_NUMBER: _ClassVar[int]
    INCREMENTAL_FIELD_NUMBER: _ClassVar[int]
    READ_MODE_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    DELTA_REASON_FIELD_NUMBER: _ClassVar[int]
    image_id: str
    parent_id: str
    pid: int
    backend: str
    backend_reason: str
    incremental: bool
    read_mode: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    stats: DumpStats
    delta_reason: str
    def __init__(self, image_id: _Optional[str] = ..., parent_id: _Optional[str] = ..., pid: _Optional[int] = ..., backend: _Optional[str] = ..., backend_reason: _Optional[str] = ..., incremental: bool = ..., read_mode: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ..., stats: _Optional[_Union[DumpStats, _Mapping]] = ..., delta_reason: _Optional[str] = ...) -> None: ...

class DumpEvent(_message.Message):
    __slots__ = ("started", "phase", "progress", "stats", "summary")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    started: OperationStarted
    phase: OperationPhase
    progress: OperationProgress
    stats: DumpStats
    summary: DumpSummary
    def __init__(self, started: _Optional[_Union[OperationStarted, _Mapping]] = ..., phase: _Optional[_Union[OperationPhase, _Mapping]] = ..., progress: _Optional[_Union[OperationProgress, _Mapping]] = ..., stats: _Optional[_Union[DumpStats, _Mapping]] = ..., summary: _Optional[_Union[DumpSummary, _Mapping]] = ...) -> None: ...

class RestoreRequest(_message.Message):
    __slots__ = ("image", "store", "new_pid", "tcp", "external", "tty", "track_backend", "cancel_on_disconnect", "changed")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    NEW_PID_FIELD_NUMBER: _ClassVar[int]
    TCP_FIELD_NUMBER: _ClassVar[int]
    EXTERNAL_FIELD_NUMBER: _ClassVar[int]
    TTY_FIELD_NUMBER: _ClassVar[int]
    TRACK_BACKEND_FIELD_NUMBER: _ClassVar[int]
    CANCEL_ON_DISCONNECT_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    image: str
    store: str
    new_pid: bool
    tcp: str
    external: str
    tty: str
    track_backend: str
    cancel_on_disconnect: bool
    changed: str
    def __init__(self, image: _Optional[str] = ..., store: _Optional[str] = ..., new_pid: bool = ..., tcp: _Optional[str] = ..., external: _Optional[str] = ..., tty: _Optional[str] = ..., track_backend: _Optional[str] = ..., cancel_on_disconnect: bool = ..., changed: _Optional[str] = ...) -> None: ...

class RestoreStats(_message.Message):
    __slots__ = ("pages_restored", "total_time", "restore_time", "nr_threads", "phases")
    class PhasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    PAGES_RESTORED_FIELD_NUMBER: _ClassVar[int]
    TOTAL_TIME_FIELD_NUMBER: _ClassVar[int]
    RESTORE_TIME_FIELD_NUMBER: _ClassVar[int]
    NR_THREADS_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    pages_restored: int
    total_time: int
    restore_time: int
    nr_threads: int
    phases: _containers.ScalarMap[str, int]
    def __init__(self, pages_restored: _Optional[int] = ..., total_time: _Optional[int] = ..., restore_time: _Optional[int] = ..., nr_threads: _Optional[int] = ..., phases: _Optional[_Mapping[str, int]] = ...) -> None: ...

class RestoreSummary(_message.Message):
    __slots__ = ("image_id", "pid", "tracking", "warnings", "stats")
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    TRACKING_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    image_id: str
    pid: int
    tracking: str
    warnings: _containers.RepeatedScalarFieldContainer[str]
    stats: RestoreStats
    def __init__(self, image_id: _Optional[str] = ..., pid: _Optional[int] = ..., tracking: _Optional[str] = ..., warnings: _Optional[_Iterable[str]] = ..., stats: _Optional[_Union[RestoreStats, _Mapping]] = ...) -> None: ...

class RestoreEvent(_message.Message):
    __slots__ = ("started", "phase", "progress", "stats", "summary")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    started: OperationStarted
    phase: OperationPhase
    progress: OperationProgress
    stats: RestoreStats
    summary: RestoreSummary
    def __init__(self, started: _Optional[_Union[OperationStarted, _Mapping]] = ..., phase: _Optional[_Union[OperationPhase, _Mapping]] = ..., progress: _Optional[_Union[OperationProgress, _Mapping]] = ..., stats: _Optional[_Union[RestoreStats, _Mapping]] = ..., summary: _Optional[_Union[RestoreSummary, _Mapping]] = ...) -> None: ...

class MeasureRequest(_message.Message):
    __slots__ = ("pid", "interval_us", "epochs", "backends", "run", "baseline_us", "cancel_on_disconnect", "max_frozen_us")
    PID_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_US_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    BACKENDS_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    BASELINE_US_FIELD_NUMBER: _ClassVar[int]
    CANCEL_ON_DISCONNECT_FIELD_NUMBER: _ClassVar[int]
    MAX_FROZEN_US_FIELD_NUMBER: _ClassVar[int]
    pid: int
    interval_us: int
    epochs: int
    backends: _containers.RepeatedScalarFieldContainer[str]
    run: int
    baseline_us: int
    cancel_on_disconnect: bool
    max_frozen_us: int
    def __init__(self, pid: _Optional[int] = ..., interval_us: _Optional[int] = ..., epochs: _Optional[int] = ..., backends: _Optional[_Iterable[str]] = ..., run: _Optional[int] = ..., baseline_us: _Optional[int] = ..., cancel_on_disconnect: bool = ..., max_frozen_us: _Optional[int] = ...) -> None: ...

class MeasureRecord(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...

class MeasureSummary(_message.Message):
    __slots__ = ("pid", "epochs", "pages_missed", "reason")
    PID_FIELD_NUMBER: _ClassVar[int]
    EPOCHS_FIELD_NUMBER: _ClassVar[int]
    PAGES_MISSED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    pid: int
    epochs: int
    pages_missed: int
    reason: str
    def __init__(self, pid: _Optional[int] = ..., epochs: _Optional[int] = ..., pages_missed: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class MeasureEvent(_message.Message):
    __slots__ = ("started", "phase", "progress", "record", "summary")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    started: OperationStarted
    phase: OperationPhase
    progress: OperationProgress
    record: MeasureRecord
    summary: MeasureSummary
    def __init__(self, started: _Optional[_Union[OperationStarted, _Mapping]] = ..., phase: _Optional[_Union[OperationPhase, _Mapping]] = ..., progress: _Optional[_Union[OperationProgress, _Mapping]] = ..., record: _Optional[_Union[MeasureRecord, _Mapping]] = ..., summary: _Optional[_Union[MeasureSummary, _Mapping]] = ...) -> None: ...

class WatchOperationRequest(_message.Message):
    __slots__ = ("operation_id",)
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    def __init__(self, operation_id: _Optional[str] = ...) -> None: ...

class WatchOperationEvent(_message.Message):
    __slots__ = ("dump", "restore", "verify", "measure")
    DUMP_FIELD_NUMBER: _ClassVar[int]
    RESTORE_FIELD_NUMBER: _ClassVar[int]
    VERIFY_FIELD_NUMBER: _ClassVar[int]
    MEASURE_FIELD_NUMBER: _ClassVar[int]
    dump: DumpEvent
    restore: RestoreEvent
    verify: VerifyEvent
    measure: MeasureEvent
    def __init__(self, dump: _Optional[_Union[DumpEvent, _Mapping]] = ..., restore: _Optional[_Union[RestoreEvent, _Mapping]] = ..., verify: _Optional[_Union[VerifyEvent, _Mapping]] = ..., measure: _Optional[_Union[MeasureEvent, _Mapping]] = ...) -> None: ...

class CancelOperationRequest(_message.Message):
    __slots__ = ("operation_id",)
    OPERATION_ID_FIELD_NUMBER: _ClassVar[int]
    operation_id: str
    def __init__(self, operation_id: _Optional[str] = ...) -> None: ...

class CancelOperationResponse(_message.Message):
    __slots__ = ("state",)
    STATE_FIELD_NUMBER: _ClassVar[int]
    state: OperationState
    def __init__(self, state: _Optional[_Union[OperationState, str]] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("id", "parent_id", "sequence", "created_at", "tag", "pid", "name", "cmdline", "host", "incremental", "backend", "nr_pages", "bytes_raw", "bytes_stored", "format_version", "damaged", "pages_delta")
    ID_FIELD_NUMBER: _ClassVar[int]
    PARENT_ID_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    TAG_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CMDLINE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    INCREMENTAL_FIELD_NUMBER: _ClassVar[int]
    BACKEND_FIELD_NUMBER: _ClassVar[int]
    NR_PAGES_FIELD_NUMBER: _ClassVar[int]
    BYTES_RAW_FIELD_NUMBER: _ClassVar[int]
    BYTES_STORED_FIELD_NUMBER: _ClassVar[int]
    FORMAT_VERSION_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    PAGES_DELTA_FIELD_NUMBER: _ClassVar[int]
    id: str
    parent_id: str
    sequence: int
    created_at: _timestamp_pb2.Timestamp
    tag: str
    pid: int
    name: str
    cmdline: str
    host: str
    incremental: bool
    backend: str
    nr_pages: int
    bytes_raw: int
    bytes_stored: int
    format_version: int
    damaged: str
    pages_delta: int
    def __init__(self, id: _Optional[str] = ..., parent_id: _Optional[str] = ..., sequence: _Optional[int] = ..., created_at: _Optional[_Union[_timestamp_pb2.Timestamp, _Mapping]] = ..., tag: _Optional[str] = ..., pid: _Optional[int] = ..., name: _Optional[str] = ..., cmdline: _Optional[str] = ..., host: _Optional[str] = ..., incremental: bool = ..., backend: _Optional[str] = ..., nr_pages: _Optional[int] = ..., bytes_raw: _Optional[int] = ..., bytes_stored: _Optional[int] = ..., format_version: _Optional[int] = ..., damaged: _Optional[str] = ..., pages_delta: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("store",)
    STORE_FIELD_NUMBER: _ClassVar[int]
    store: str
    def __init__(self, store: _Optional[str] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("images", "store")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[Image]
    store: str
    def __init__(self, images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., store: _Optional[str] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("image", "store")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    image: str
    store: str
    def __init__(self, image: _Optional[str] = ..., store: _Optional[str] = ...) -> None: ...

class GetResponse(_message.Message):
    __slots__ = ("image", "manifest_json")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    image: Image
    manifest_json: str
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ..., manifest_json: _Optional[str] = ...) -> None: ...

class VerifyRequest(_message.Message):
    __slots__ = ("image", "store")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    image: str
    store: str
    def __init__(self, image: _Optional[str] = ..., store: _Optional[str] = ...) -> None: ...

class VerifySummary(_message.Message):
    __slots__ = ("image_ids", "bytes_checked")
    IMAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    BYTES_CHECKED_FIELD_NUMBER: _ClassVar[int]
    image_ids: _containers.RepeatedScalarFieldContainer[str]
    bytes_checked: int
    def __init__(self, image_ids: _Optional[_Iterable[str]] = ..., bytes_checked: _Optional[int] = ...) -> None: ...

class VerifyEvent(_message.Message):
    __slots__ = ("started", "phase", "progress", "summary")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    started: OperationStarted
    phase: OperationPhase
    progress: OperationProgress
    summary: VerifySummary
    def __init__(self, started: _Optional[_Union[OperationStarted, _Mapping]] = ..., phase: _Optional[_Union[OperationPhase, _Mapping]] = ..., progress: _Optional[_Union[OperationProgress, _Mapping]] = ..., summary: _Optional[_Union[VerifySummary, _Mapping]] = ...) -> None: ...

class DeleteRequest(_message.Message):
    __slots__ = ("images", "store")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedScalarFieldContainer[str]
    store: str
    def __init__(self, images: _Optional[_Iterable[str]] = ..., store: _Optional[str] = ...) -> None: ...

class DeleteResponse(_message.Message):
    __slots__ = ("image_ids",)
    IMAGE_IDS_FIELD_NUMBER: _ClassVar[int]
    image_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, image_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class ExportRequest(_message.Message):
    __slots__ = ("image", "store")
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    image: str
    store: str
    def __init__(self, image: _Optional[str] = ..., store: _Optional[str] = ...) -> None: ...

class ExportResponse(_message.Message):
    __slots__ = ("image_id", "data")
    IMAGE_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    image_id: str
    data: bytes
    def __init__(self, image_id: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...

class ImportHeader(_message.Message):
    __slots__ = ("store",)
    STORE_FIELD_NUMBER: _ClassVar[int]
    store: str
    def __init__(self, store: _Optional[str] = ...) -> None: ...

class ImportRequest(_message.Message):
    __slots__ = ("header", "data")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    header: ImportHeader
    data: bytes
    def __init__(self, header: _Optional[_Union[ImportHeader, _Mapping]] = ..., data: _Optional[bytes] = ...) -> None: ...

class ImportResponse(_message.Message):
    __slots__ = ("image",)
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    image: Image
    def __init__(self, image: _Optional[_Union[Image, _Mapping]] = ...) -> None: ...
