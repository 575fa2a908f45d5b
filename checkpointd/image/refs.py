# SPDX-License-Identifier: Apache-2.0
"""Words that name an image: id, unique prefix, `latest`, `latest~N`, `tag:NAME`, `pid:N`.  Pure."""

from __future__ import annotations

import re

from checkpointd.errors import ImageNotFound, UsageError
from checkpointd.image.info import ImageInfo

_HINT = "use an id or 4 or more of its first digits, latest, latest~N, tag:NAME or pid:N; `checkpoint ls` lists them"


def resolve(ref: str, images: list[ImageInfo]) -> str:
    """The full id `ref` names among `images` (oldest first).

    Raises:
        UsageError: not such a word, or an ambiguous prefix; the candidates are in the message.
        ImageNotFound: nothing has that name.
    """
    word, _, value = ref.partition(":")
    if word == "tag" and value:
        found = [info.id for info in images if info.tag == value]
    elif word == "pid" and re.fullmatch(r"[0-9]{1,10}", value):
        found = [info.id for info in images if info.pid == int(value) and not info.damaged]
    elif match := re.fullmatch(r"latest(?:~([0-9]{1,9}))?", ref):
        steps = int(match[1] or "0")
        if steps >= len(images):
            raise ImageNotFound(
                f"there is no image {ref}: the store holds {len(images)}", hint=_HINT, ref=ref
            )
        return images[-1 - steps].id
    elif re.fullmatch(r"[0-9a-f]{4,64}", ref):
        found = [info.id for info in images if info.id.startswith(ref)]
        if len(found) > 1:
            names = ", ".join(image_id[:16] for image_id in found)
            raise UsageError(f"{ref!r} begins several images: {names}", hint="give more digits", ref=ref)
    else:
        raise UsageError(f"{ref!r} does not name an image", hint=_HINT, ref=ref)
    if not found:
        raise ImageNotFound(f"there is no image {ref}", hint=_HINT, ref=ref)
    return found[-1]
