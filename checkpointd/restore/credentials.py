# SPDX-License-Identifier: Apache-2.0
"""The calls that make a thread who it was (credentials(7), capabilities(7)).  Pure: no I/O but scratch.

The kernel's credentials belong to threads: every thread makes them itself.  Order: ids change while the thread
still has all capabilities (SECBIT_NO_SETUID_FIXUP keeps them through), the sets come last.
"""

from __future__ import annotations

import struct

from checkpointd.linux import capability as cap
from checkpointd.linux import prctl
from checkpointd.linux.arch import Nr
from checkpointd.restore.plan import Step
from checkpointd.state.threads import Credentials
from checkpointd.target.remote import Call, Remote


def credential_steps(remote: Remote, wanted: Credentials, ours: Credentials) -> list[Step]:
    """From the credentials a stub inherits from us to `wanted`; nothing when they are equal."""
    steps: list[Step] = []
    if wanted.groups != ours.groups:
        groups = remote.put(struct.pack(f"={len(wanted.groups)}I", *wanted.groups)) if wanted.groups else 0
        steps.append(_step(Nr.SETGROUPS, (len(wanted.groups), groups), "its supplementary groups"))
    ids_change = _ids(wanted) != _ids(ours)
    sets_change = ids_change or _sets(wanted) != _sets(ours)
    if sets_change and cap.has(ours.effective, cap.CAP_SETPCAP):
        steps += _set_id_steps(wanted, prctl.SECBIT_NO_SETUID_FIXUP | prctl.SECBIT_KEEP_CAPS)
        steps += _capability_steps(remote, wanted, ours)
    elif sets_change:
        steps += _set_id_steps(wanted, None) if ids_change else []
        steps.append(_capset(remote, wanted.effective, wanted.permitted, wanted.inheritable))
    return steps


def after_credential_steps(wanted: Credentials, pdeath_signal: int) -> list[Step]:
    """What a change of credentials would undo, or what must not stand in its way."""
    steps = []
    if pdeath_signal:
        steps.append(_step(Nr.PRCTL, (prctl.PR_SET_PDEATHSIG, pdeath_signal), "its parent-death signal"))
    if wanted.no_new_privs:
        steps.append(_step(Nr.PRCTL, (prctl.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs"))
    return steps


def _ids(one: Credentials) -> tuple[int, ...]:
    return (one.ruid, one.euid, one.suid, one.fsuid, one.rgid, one.egid, one.sgid, one.fsgid)


def _sets(one: Credentials) -> tuple[int, ...]:
    return (one.inheritable, one.permitted, one.effective, one.bounding, one.ambient, one.securebits)


def _step(nr: int, args: tuple[int, ...], what: str) -> Step:
    return Step(Call(nr, args), f"giving back {what}")


def _capset(remote: Remote, effective: int, permitted: int, inheritable: int) -> Step:
    header = remote.put(cap.pack_header())
    data = remote.put(cap.pack_data(effective, permitted, inheritable))
    return _step(Nr.CAPSET, (header, data), "its capabilities")


def _set_id_steps(wanted: Credentials, securebits: int | None) -> list[Step]:
    steps = []
    if securebits is not None:
        steps.append(_step(Nr.PRCTL, (prctl.PR_SET_SECUREBITS, securebits), "its securebits"))
    steps.append(_step(Nr.SETRESGID, (wanted.rgid, wanted.egid, wanted.sgid), "its group ids"))
    if wanted.fsgid != wanted.egid:
        steps.append(_step(Nr.SETFSGID, (wanted.fsgid,), "its file system group"))
    steps.append(_step(Nr.SETRESUID, (wanted.ruid, wanted.euid, wanted.suid), "its user ids"))
    if wanted.fsuid != wanted.euid:
        steps.append(_step(Nr.SETFSUID, (wanted.fsuid,), "its file system user"))
    return steps


def _capability_steps(remote: Remote, wanted: Credentials, ours: Credentials) -> list[Step]:
    """With CAP_SETPCAP still effective: inheritable, ambient, bounding, securebits, and last the sets themselves."""
    steps = [_capset(remote, ours.permitted, ours.permitted, wanted.inheritable)]
    steps += [
        _step(
            Nr.PRCTL,
            (prctl.PR_CAP_AMBIENT, prctl.PR_CAP_AMBIENT_RAISE, one, 0, 0),
            f"ambient capability {one}",
        )
        for one in range(cap.CAP_LAST + 1)
        if cap.has(wanted.ambient, one)
    ]
    steps += [
        _step(Nr.PRCTL, (prctl.PR_CAPBSET_DROP, one), f"its bounding set without capability {one}")
        for one in range(cap.CAP_LAST + 1)
        if cap.has(ours.bounding, one) and not cap.has(wanted.bounding, one)
    ]
    steps.append(_step(Nr.PRCTL, (prctl.PR_SET_SECUREBITS, wanted.securebits), "its securebits"))
    steps.append(_capset(remote, wanted.effective, wanted.permitted, wanted.inheritable))
    return steps


def missing_rights(wanted: Credentials, ours: Credentials) -> list[str]:
    """Why we cannot make this thread, one reason each."""
    found = []
    if _ids(wanted) != _ids(ours) and not (
        cap.has(ours.effective, cap.CAP_SETUID) and cap.has(ours.effective, cap.CAP_SETGID)
    ):
        found.append(f"it ran as uid {wanted.euid}, gid {wanted.egid}: that needs root")
    if wanted.groups != ours.groups and not cap.has(ours.effective, cap.CAP_SETGID):
        found.append("it had other supplementary groups: that needs root")
    for name, theirs, own in (
        ("permitted", wanted.permitted, ours.permitted),
        ("inheritable", wanted.inheritable, ours.bounding | ours.inheritable),
        ("bounding", wanted.bounding, ours.bounding),
    ):
        if theirs & ~own:
            missing = [one for one in range(64) if cap.has(theirs & ~own, one)]
            found.append(f"its {name} set has capabilities we lack ({', '.join(map(str, missing))})")
    return found
