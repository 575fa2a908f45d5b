# SPDX-License-Identifier: Apache-2.0
"""Conduct dumps of one target: freeze, state out, collect, copy, thaw, encode, commit.

A `Dumper` belongs to one target and to the thread that made it (ptrace is bound to a thread).  It keeps the
tracker, whose current epoch began at `epoch_image_id`.  Only a dump whose parent is exactly that image may trust
the tracker; any other compares content.

Whatever fails, the target runs on, the tracker reports again what it had reported, and no half image stays.

Errors: everything of checkpointd/errors.py but the restore ones.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from checkpointd import features, tracepoint
from checkpointd.dump import collecting
from checkpointd.dump.deleted_files import read_deleted_files
from checkpointd.dump.division import (
    CopyLacksPagesError,
    check_complete,
    joined,
    most_read_stopped,
    object_requests,
    runs_of_range,
    split_by_code,
    split_for_fork,
    with_guards,
)
from checkpointd.dump.limits import NO_BOUND, Limits, Report
from checkpointd.dump.options import DumpOptions
from checkpointd.dump.pages import PageWorker
from checkpointd.dump.priority import AheadOfOthers
from checkpointd.dump.targets import (
    KnownAlone,
    forks_cost_pool_pages,
    identity_of,
    is_watched,
    parent_warnings,
)
from checkpointd.dump.work import Work
from checkpointd.errors import (
    Busy,
    CheckpointError,
    ImageDamaged,
    ImageNotFound,
    TargetExeced,
    TargetGone,
    Unsupported,
)
from checkpointd.image.info import MAX_CMDLINE
from checkpointd.linux import pagemap_scan as ps
from checkpointd.memory import (
    NO_RUNS,
    PAGE_SIZE,
    PRIVATE_OBJECT,
    Vma,
    merge_runs,
    nr_pages_in,
    subtract_runs,
)
from checkpointd.procfs import maps, process
from checkpointd.state import codec
from checkpointd.state.process import ImageState
from checkpointd.stats import DumpStats
from checkpointd.target.attachable import check_attachable, gone, lives
from checkpointd.target.files import capture_files, prepare_files
from checkpointd.target.fork import ForkedCopy, reap_strays
from checkpointd.target.freeze import Frozen, freeze
from checkpointd.target.inject import Injection
from checkpointd.target.memory import (
    CapturedSpace,
    capture_address_space,
    held_by,
    huge_runs,
    prepare_address_space,
)
from checkpointd.target.process import SleepMemory, capture_process, prepare_process
from checkpointd.target.remote import Remote
from checkpointd.target.threads import note_sleeps
from checkpointd.tracking.base import Collection, Space, Tracker, TrackingLostError
from checkpointd.tracking.content import ContentTracker
from checkpointd.tracking.make import make_tracker, needs_switch_off, switch_is_on, switch_off
from checkpointd.tracking.select import Choice
from checkpointd.tracking.uffd_wp import UffdWpTracker

_SMALL_OBJECTS_BYTES = 4 << 20
_SPARE_PAGES = 1024  # dirtied between the count before the freeze and the freeze

__all__ = ["DumpOptions", "Dumper", "dumper"]


class Dumper:
    """See the module's text."""

    def __init__(
        self, pid: int, *, worker: PageWorker | None = None, sleeps: SleepMemory | None = None
    ) -> None:
        self.pid = pid
        self.identity = identity_of(pid)
        self.epoch_image_id = ""
        self.last_image_id = ""
        self.choice = Choice("", "")
        self.cancelled: Callable[[], bool] = lambda: False
        self._worker = worker or PageWorker()
        self._tracker: Tracker | None = None
        self._features = features.probe()
        self.sleeps = sleeps or SleepMemory()
        self._forks = True  # until it was refused once
        self._may_fork = True  # as the mappings of the last freeze say
        self._precise = False

    def track(self, backend: str = "auto", *, precise: bool = False) -> Choice:
        """Arm dirty tracking without a dump: the first dump is full all the same.

        What is tracked so already goes on as it is: armed anew, it would have forgotten which image it began at.

        Args:
            precise: by soft-dirty bits made exact, patched or emulated; holds for later dumps with "auto" too.

        Raises:
            KernelLacks: neither can be had.
        """
        if self._tracker is not None and backend in ("auto", self._tracker.name) and precise == self._precise:
            return self.choice
        with freeze(self.pid) as frozen:
            note_sleeps(frozen, self.sleeps)
            with frozen.inject() as remote:
                self._precise = precise
                self._make_tracker(backend, remote)
        return self.choice

    def arm_restored(self, remote: Remote, image_id: str, backend: str = "auto") -> Choice:
        """Arm a process just restored from `image_id`, before its first instruction.

        Its memory is the image's, so the epoch begins at that image: the next dump may be incremental.
        """
        vmas = tuple(maps.read_smaps(self.pid))
        self._make_tracker(backend, remote)
        assert self._tracker is not None
        pagemap = ps.open_pagemap(self.pid)
        try:
            self._tracker.collect(Space(self.pid, pagemap, vmas))
        finally:
            os.close(pagemap)
        self._tracker.commit()
        self.epoch_image_id = self.last_image_id = image_id
        return self.choice

    def untrack(self) -> None:
        """Give the target back; nothing of ours stays in it."""
        if self._tracker is not None and needs_switch_off(self._tracker):
            # best effort: left on it does no harm to a process which nobody clears
            with contextlib.suppress(CheckpointError, OSError), freeze(self.pid) as frozen:
                note_sleeps(frozen, self.sleeps)
                with frozen.inject() as remote:
                    switch_off(remote)
        self._drop_tracker()

    def _drop_tracker(self) -> None:
        if self._tracker is not None:
            self._tracker.disarm()
            self._tracker = None
        self.epoch_image_id = ""
        self.choice = Choice("", "")

    def close(self) -> None:
        self.untrack()
        self._worker.close()

    def dump(self, options: DumpOptions, report: Report = lambda *_: None) -> DumpStats:
        """Make one generation."""
        try:
            return self._dump(options, report)
        except CopyLacksPagesError:
            return self._dump(replace(options, read_mode="stopped"), report)

    def _dump(self, options: DumpOptions, report: Report) -> DumpStats:
        parent, why_full = self._parent_of(options)
        stats = DumpStats(pid=self.pid, parent_id=parent, incremental=bool(parent))
        work = Work(stats, Limits(self.pid, options, self._is_cancelled))
        if why_full:
            work.stats.warnings.append(why_full)
        stats.delta_reason = options.why_no_deltas(parent)
        self._begin(options, work)
        try:
            check_attachable(self.pid)
            work.maps_draft = maps.prepare_vmas(self.pid)
            work.process_draft = prepare_process(self.pid, work.maps_draft.vmas)
            work.files_draft = prepare_files(self.pid, options.files)
            work.huge = huge_runs(self.pid, work.maps_draft.vmas)
            work.space_draft = prepare_address_space(self.pid, work.maps_draft.vmas, work.huge, work.policies)
            work.ahead = AheadOfOthers(threading.get_native_id(), self._worker.pid)
            report("freezing", 0, 0)
            tracepoint.hit("dump.freeze")
            with (
                work.ahead,
                freeze(self.pid, timeout_s=work.limits.freeze_timeout_s()) as frozen,
            ):
                work.stats.freezing_time = frozen.freezing_time_us
                try:
                    self._frozen(frozen, options, parent, work, report)
                except Exception:
                    self._end_collection()
                    raise
                if options.kill:
                    work.ahead.end()  # nobody waits for it any more
                    self._finish(options, parent, work, report)
                    os.kill(self.pid, signal.SIGKILL)
                    frozen.thaw()
                else:
                    thawing = time.monotonic_ns()
                    frozen.thaw()
                    work.stats.frozen_time = (thawing - frozen.frozen_at_ns) // 1000
                    work.mark("thawing", thawing)
            if options.kill:
                work.stats.frozen_time = (time.monotonic_ns() - frozen.frozen_at_ns) // 1000
            else:
                tracepoint.hit("dump.thawed")
                if work.copy is not None:
                    self._read_copy(work.copy, work, report)
                self._finish(options, parent, work, report)
        except BaseException as error:
            try:
                if self._tracker is not None:
                    self._tracker.rollback()
            finally:
                with contextlib.suppress(CheckpointError):
                    self._worker.abort()
            if isinstance(error, ProcessLookupError) and not lives(self.pid, self.pid):
                raise gone(self.pid) from error
            raise
        finally:
            if work.copy is not None:
                work.copy.close()
                self._reap(work.copy)
        work.stats.total_time = (time.monotonic_ns() - work.started_ns) // 1000
        return work.stats

    def _begin(self, options: DumpOptions, work: Work) -> None:
        parent = work.stats.parent_id
        what = f"the parent image {parent[:12]} of process {self.pid}"
        hint = "dump in full (without --incremental), or name a parent that is there with --parent"
        try:
            found = self._worker.begin(
                pid=self.pid,
                store=options.store,
                parent=parent,
                compress=options.compress,
                delta=options.delta,
                expected_pages=self._expected_pages(options, work),
                alone=work.alone,
            )
        except ImageNotFound as error:
            raise ImageNotFound(f"{what} is not in {options.store}", hint=hint, pid=self.pid) from error
        except ImageDamaged as error:
            error.hint = hint
            raise error.of_image(what) from error
        if options.parent and found and not self._is_trusted(work):
            work.stats.warnings += parent_warnings(found, self.identity)

    # -- what happens while the target stands still

    def _frozen(self, frozen: Frozen, options: DumpOptions, parent: str, work: Work, report: Report) -> None:
        self._check_same_process()
        at = time.monotonic_ns()
        vmas = maps.settled_vmas(self.pid, work.maps_draft)
        if not vmas:
            raise TargetGone(f"process {self.pid} has no address space (it is exiting)", pid=self.pid)
        frozen.vmas = vmas
        captured = capture_address_space(self.pid, vmas, NO_RUNS, work.huge, work.policies, work.space_draft)
        at = work.mark("maps", at)
        self._may_fork = not (is_watched(vmas) or forks_cost_pool_pages(vmas))
        work.kernel_workers = frozen.has_kernel_workers
        collection: Collection | None = None
        finish: Callable[[], Collection] | None = None
        tracker = self._tracker
        if isinstance(tracker, UffdWpTracker | ContentTracker) and options.backend in ("auto", tracker.name):
            # nothing has to be called in the target for that, so copying goes on beside all that follows
            try:
                tracepoint.hit("dump.collect")
                if isinstance(tracker, UffdWpTracker) and self._may_walk(captured, options, work):
                    finish = tracker.finish
                    most = min(self._most_read_stopped(options, work.nr_resident), work.limits.most_pages())
                    if not collecting.begin_walks(tracker, self._worker, vmas, work, most):
                        collection = finish()
                    work.limits.check_budget(frozen, 0)
                else:
                    collection = collecting.collect(tracker, vmas, work)
                if collection is not None:
                    tracepoint.hit("dump.collected")
                    self._plan(work, captured, collection, vmas)
                    self._check_budget(frozen, options, work)
                    if not (options.kill or self._wants_fork(options, work)):
                        now, work.copies = split_by_code(work.copies, vmas)
                        self._worker.start_copy(now)
            except TrackingLostError as error:
                self._lose_tracker(error, work)
                finish = None
            at = work.mark("collecting", at)
        with frozen.inject() as remote:
            at = work.mark("injecting", at)
            if work.process_draft and work.process_draft.strays:
                reap_strays(remote)
            state = capture_process(frozen, remote, self.sleeps, work.process_draft)
            at = work.mark("state", at)
            files = capture_files(frozen, captured.object_ids, options=options.files, draft=work.files_draft)
            work.stats.warnings += [*state.warnings, *files.warnings]
            at = work.mark("files", at)
            if collection is None:
                collection = self._collect_injected(options, remote, vmas, work, finish)
                tracepoint.hit("dump.collected")
                self._plan(work, captured, collection, vmas)
                self._check_budget(frozen, options, work)
                at = work.mark("collecting", at)
            if self._wants_fork(options, work):
                # what is being read must not become shared meanwhile
                self._worker.finish_copy(work.limits.while_frozen(frozen, report))
                self._fork(frozen, remote, work)
        at = work.mark("leaving", at)
        space = with_guards(captured.space, collection.guards)
        image_state = ImageState(process=state, address_space=space, files=files.state)
        work.stats.nr_vmas, work.stats.nr_threads = len(space.vmas), len(frozen.threads)
        self._check_budget(frozen, options, work)
        report("copying", 0, 0)
        heard = work.limits.while_frozen(frozen, report)
        self._worker.finish_copy(heard)
        stopped = work.copies
        if work.copy is not None:
            stopped, work.copies = split_for_fork(work.copies, work.copy.pid, vmas)
        if options.kill:
            # it will not run again: no need to hold all of it at once
            self._worker.read_and_encode(stopped, heard, still=True)
        elif any(len(request.runs) for request in stopped):
            self._worker.copy(stopped, heard)
        read_deleted_files(self._worker, self.pid, files, heard)
        work.mark("copying", at)
        tracepoint.hit("dump.copied")
        # threads cannot have moved, but a SIGKILL from outside empties the address space under us
        if process.read_stat(self.pid).state in "ZX":
            raise TargetGone(f"process {self.pid} was killed while it was being dumped", pid=self.pid)
        work.state = image_state

    def _end_collection(self) -> None:
        """The dump has failed: what was begun is finished while it can be, so that the next one knows what changed."""
        tracker = self._tracker
        with contextlib.suppress(Exception):
            if isinstance(tracker, UffdWpTracker) and tracker.has_begun:
                tracker.finish()

    def _fork(self, frozen: Frozen, remote: Injection, work: Work) -> None:
        try:
            work.copy = frozen.child_fork(remote)
        except (Unsupported, Busy):
            self._forks = False
        else:
            work.stats.read_mode = "fork"

    def _collect_injected(
        self,
        options: DumpOptions,
        remote: Remote,
        vmas: tuple[Vma, ...],
        work: Work,
        finish: Callable[[], Collection] | None,
    ) -> Collection:
        """Collect where calls can be made in the target: to make a tracker, or to ask whether it may be trusted.

        Args:
            finish: ends a collection that has begun.
        """
        if finish is not None:
            try:
                return finish()
            except TrackingLostError as error:
                self._lose_tracker(error, work)
        tracepoint.hit("dump.collect")
        asked = options.backend
        if self._tracker is None or (asked not in ("auto", self._tracker.name)):
            self._make_tracker(asked, remote)
        assert self._tracker is not None
        try:
            if not switch_is_on(self._tracker, remote):
                raise TrackingLostError("precise tracking was switched off in the process")
            return collecting.collect(self._tracker, vmas, work)
        except TrackingLostError as error:
            work.stats.warnings.append(_lost_words(error))
            self._make_tracker(asked, remote)
            return collecting.collect(self._tracker, vmas, work)

    def _may_walk(self, captured: CapturedSpace, options: DumpOptions, work: Work) -> bool:
        """May the page worker look for what was written, and read it, beside the injection?

        Not beside shared objects of any size: these could then be read only after all else.
        """
        if options.kill or not self._is_trusted(work):
            return False
        return sum(source.object.size_bytes for source in captured.sources) <= _SMALL_OBJECTS_BYTES

    def _lose_tracker(self, error: TrackingLostError, work: Work) -> None:
        """In the middle of a collection: pages that are being read already need not be read again."""
        work.stats.warnings.append(_lost_words(error))
        if self._worker.is_walking:
            collecting.take_walk(self._worker, work)
        self._drop_tracker()

    def _plan(self, work: Work, captured: CapturedSpace, found: Collection, vmas: tuple[Vma, ...]) -> None:
        stats = work.stats
        trusted = self._is_trusted(work)
        stats.backend, stats.backend_reason = self.choice.backend, self.choice.reason
        if stats.parent_id and not trusted and self.choice.backend != "content":
            stats.backend = "content"
            stats.backend_reason = "tracking did not begin at the parent image: content was compared"
        if trusted and found.unread is not None and not captured.read_whole:
            # the target need not wait for the rest of what was found
            work.found, dirty = found, found.unread
        else:
            clean, dirty = found.clean, found.dirty
            if not trusted and len(clean):
                dirty, clean = merge_runs(joined(clean, dirty)), NO_RUNS
            for vma in captured.read_whole:
                whole = runs_of_range(vma.start, vma.end)
                clean, dirty = subtract_runs(clean, whole), merge_runs(joined(dirty, whole))
            work.clean = clean
            stats.pages_scanned = nr_pages_in(clean) + nr_pages_in(dirty)
            dirty = subtract_runs(dirty, work.early)
        work.copies = work.private_requests(dirty, vmas)
        for source, runs in zip(captured.sources, held_by(self.pid, captured.sources, vmas), strict=True):
            stats.pages_scanned += nr_pages_in(runs)
            work.copies += object_requests(self.pid, source, runs)
        stats.pages_dirty = nr_pages_in(work.early) + sum(nr_pages_in(r.runs) for r in work.copies)
        stats.read_mode = "stopped"

    def _is_trusted(self, work: Work) -> bool:
        """Does the tracker's epoch begin at the parent?"""
        return bool(work.stats.parent_id) and self.epoch_image_id == work.stats.parent_id

    def _wants_fork(self, options: DumpOptions, work: Work) -> bool:
        private = sum(nr_pages_in(r.runs) for r in work.copies if r.obj == PRIVATE_OBJECT)
        nr_clean = work.nr_resident if work.found else nr_pages_in(work.clean)
        return self._fork_pays(options, private, private + nr_clean)

    def _fork_pays(self, options: DumpOptions, nr_dirty: int, nr_present: int) -> bool:
        return nr_dirty > self._most_read_stopped(options, nr_present)

    def _most_read_stopped(self, options: DumpOptions, nr_present: int) -> int:
        """How many dirty pages may be read from the target itself before a forked copy is wanted."""
        if options.kill or options.read_mode == "stopped" or not self._may_fork:
            return NO_BOUND
        if options.read_mode == "fork":
            return -1
        return most_read_stopped(nr_present) if self._forks else NO_BOUND

    def _check_budget(self, frozen: Frozen, options: DumpOptions, work: Work) -> None:
        forked = work.stats.read_mode == "fork" or self._wants_fork(options, work)
        nr_pages = 0 if forked else sum(nr_pages_in(request.runs) for request in work.copies)
        work.limits.check_budget(frozen, nr_pages + nr_pages_in(work.early))

    # -- after the thaw

    def _read_copy(self, copy: ForkedCopy, work: Work, report: Report) -> None:
        report("reading the copy", 0, 0)
        at = time.monotonic_ns()
        try:
            for request in work.copies:
                check_complete(request)
            self._worker.read_and_encode(work.copies, work.limits.after_thaw("reading the copy", report))
        except (CheckpointError, OSError):
            copy.check_alive()
            raise
        work.mark("reading the copy", at)
        # its memory goes while the image is committed; `close` waits for it
        os.kill(copy.pid, signal.SIGKILL)

    def _finish(self, options: DumpOptions, parent: str, work: Work, report: Report) -> None:
        report("encoding", 0, 0)
        at = time.monotonic_ns()
        work.settle()
        if parent and len(work.clean):
            self._worker.inherit(work.clean)
        self._worker.encode(work.limits.after_thaw("encoding", report))
        at = work.mark("encoding", at)
        nr_bytes = work.stats.pages_dirty * PAGE_SIZE
        report("encoding", nr_bytes, nr_bytes)
        work.limits.check_cancelled()
        report("committing", 0, 0)
        tracepoint.hit("dump.commit")
        stats = work.stats
        found = self._worker.commit(
            {
                "pid": self.pid,
                "comm": process.comm(self.pid),
                "cmdline": " ".join(process.cmdline(self.pid))[:MAX_CMDLINE],
                "tag": options.tag,
                "backend": stats.backend,
                "incremental": stats.incremental,
                "host": platform.node(),
                "boot_id": self.identity.boot_id,
                "start_time": self.identity.start_time,
                "stats": stats.to_dict(),
            },
            json.dumps(codec.encode(work.state), separators=(",", ":")).encode(),
        )
        work.mark("committing", at)
        stats.image_id = found["id"]
        stats.pages_zero, stats.pages_same = found["pages_zero"], found["pages_same"]
        stats.pages_written, stats.pages_skipped_parent = found["pages_written"], found["nr_inherited"]
        stats.pages_delta = found["pages_delta"]
        stats.bytes_raw, stats.bytes_stored = found["bytes_raw"], found["bytes_stored"]
        tracepoint.hit("dump.committed")
        # an interruption between the two must not let the new epoch pass for the old one
        self.epoch_image_id = ""
        if self._tracker is not None:
            self._tracker.commit()
        self.epoch_image_id = self.last_image_id = stats.image_id

    def _reap(self, copy: ForkedCopy) -> None:
        """The forked copy is the target's zombie until the target waits for it."""
        with (
            contextlib.suppress(CheckpointError, OSError),
            AheadOfOthers(threading.get_native_id()),
            freeze(self.pid) as frozen,
        ):
            note_sleeps(frozen, self.sleeps)
            frozen.reap_copy(copy)

    # -- small things

    def _is_cancelled(self) -> bool:
        return self.cancelled()  # which may be set while a dump is under way

    def _make_tracker(self, backend: str, remote: Remote) -> None:
        if self._tracker is not None and needs_switch_off(self._tracker):
            switch_off(remote)
        self._drop_tracker()
        precise = self._precise and backend == "auto"
        self._tracker, self.choice = make_tracker(backend, self.pid, remote, self._features, precise=precise)

    def _parent_of(self, options: DumpOptions) -> tuple[str, str]:
        if not options.incremental:
            return "", ""
        parent = options.parent or self.last_image_id
        if not parent:
            # a service that was started anew: the images of this very process are still in the store
            known = self.identity
            parent = self._worker.latest_of(options.store, known.pid, known.start_time, known.boot_id)
        if not parent:
            return "", "no parent image of this process: this is the first generation, dumped in full"
        return parent, ""

    def _expected_pages(self, options: DumpOptions, work: Work) -> int:
        """How many pages will be read while the target stands still, about."""
        if options.kill:
            return 0
        written = None
        try:
            nr_pooled = process.nr_pool_pages(self.pid)
            nr_dirty = nr_present = process.nr_resident_pages(self.pid) + nr_pooled
            work.nr_resident = nr_present
            if options.incremental and self.last_image_id and isinstance(self._tracker, UffdWpTracker):
                written = self._tracker.written_now(self.pid)
                nr_dirty = min(nr_present, _SPARE_PAGES + nr_pages_in(written))
            if not nr_pooled and self._fork_pays(options, nr_dirty, nr_present):
                return 0
            if written is not None:
                assert isinstance(self._tracker, UffdWpTracker)
                work.alone = KnownAlone.look(self.pid, written, subtract_runs(self._tracker.held, written))
        except (FileNotFoundError, ProcessLookupError) as error:
            raise TargetGone(f"process {self.pid} is gone", pid=self.pid) from error
        return nr_dirty

    def _check_same_process(self) -> None:
        if process.read_stat(self.pid).starttime != self.identity.start_time:
            raise TargetExeced(f"pid {self.pid} is another process now", pid=self.pid)


def _lost_words(error: TrackingLostError) -> str:
    return f"dirty tracking was lost ({error}): content is compared this time"


@contextlib.contextmanager
def dumper(pid: int) -> Iterator[Dumper]:
    """A `Dumper` that lets its target go at the end."""
    made = Dumper(pid)
    try:
        yield made
    finally:
        made.close()
