# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses to JSON types and back, driven by their annotations.

Supported field types: int, float, bool, str, bytes (base64), None, enums by value, `X | None`, unions of
dataclasses (told apart by a field `kind: Literal[...]`), `tuple[X, ...]`, `tuple[X, Y]`, `frozenset[str]`,
`dict[str, X]`, and dataclasses of these.  Decoding checks types and raises `ImageDamaged`; unknown keys are
refused, missing keys take the field's default so that a newer reader reads an older image.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import enum
import functools
import json
import types
import typing
from typing import Any, TypeVar

from checkpointd.errors import ImageDamaged

T = TypeVar("T")


def encode(value: Any) -> Any:
    """The value as JSON types."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.value if isinstance(value, enum.Enum) else value
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, (frozenset, set)):
        return sorted(encode(item) for item in value)
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    raise TypeError(f"cannot encode {type(value).__name__}")


def decode(cls: type[T], data: Any) -> T:
    """JSON types as a `cls`.

    Raises:
        ImageDamaged: the data does not fit the class.
    """
    try:
        return typing.cast(T, _decode(cls, data, cls.__name__))
    except (TypeError, ValueError, KeyError, binascii.Error) as error:
        raise ImageDamaged(f"the image's state is malformed: {error}") from error


def decode_json(cls: type[T], text: bytes) -> T:
    """JSON as a `cls`.

    Raises:
        ImageDamaged: the data does not fit the class, or is not JSON.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImageDamaged("the image's state is malformed: it is not JSON") from error
    return decode(cls, data)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode(kind: Any, data: Any, where: str) -> Any:
    if kind is Any:
        return data
    origin = typing.get_origin(kind)
    if origin is typing.Union or origin is types.UnionType:
        return _decode_union(typing.get_args(kind), data, where)
    if origin is typing.Literal:
        if data not in typing.get_args(kind):
            raise ValueError(f"{where}: {data!r} is not one of {typing.get_args(kind)}")
        return data
    if origin is tuple:
        items = typing.get_args(kind)
        _expect(data, list, where)
        if len(items) == 2 and items[1] is Ellipsis:
            return tuple(_decode(items[0], item, f"{where}[{n}]") for n, item in enumerate(data))
        if len(items) != len(data):
            raise ValueError(f"{where}: {len(data)} items, not {len(items)}")
        return tuple(
            _decode(item_kind, item, f"{where}[{n}]")
            for n, (item_kind, item) in enumerate(zip(items, data, strict=True))
        )
    if origin is frozenset:
        _expect(data, list, where)
        return frozenset(_decode(typing.get_args(kind)[0], item, where) for item in data)
    if origin is dict:
        _expect(data, dict, where)
        item_kind = typing.get_args(kind)[1]
        return {key: _decode(item_kind, item, f"{where}.{key}") for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    if kind is bytes:
        _expect(data, str, where)
        return base64.b64decode(data, validate=True)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return kind(data)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    _expect(data, kind, where)
    return data


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(data, dict, where)
    hints = _hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    if unknown := set(data) - names:
        raise ValueError(f"{where}: unknown fields {sorted(unknown)}")
    return kind(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in data.items()})


def _decode_union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    rest = [kind for kind in kinds if kind is not type(None)]
    if len(rest) == 1:
        return _decode(rest[0], data, where)
    if isinstance(data, dict) and "kind" in data:
        for kind in rest:
            if dataclasses.is_dataclass(kind) and data["kind"] in typing.get_args(
                _hints(typing.cast(type, kind)).get("kind", None)
            ):
                return _decode(kind, data, where)
        raise ValueError(f"{where}: unknown kind {data['kind']!r}")
    for kind in rest:
        if isinstance(kind, type) and isinstance(data, kind):
            return _decode(kind, data, where)
    raise ValueError(f"{where}: {type(data).__name__} fits none of the allowed types")


def _expect(data: Any, kind: Any, where: str) -> None:
    if kind is int and isinstance(data, bool):
        raise TypeError(f"{where}: a bool, not an int")
    if not isinstance(data, kind):
        raise TypeError(f"{where}: {type(data).__name__}, not {getattr(kind, '__name__', kind)}")
