"""C structs of the contract as named values, for records.

A struct becomes a dict of its fields by name; an array of bytes, and a union, the bytes it holds; any other
array a list. Fields that are only there for alignment ("pad...", and those named by the caller) are left out.
"""

from __future__ import annotations

from typing import Any

from coordinator.contract.errors import RecordError


def _fields(ffi: Any, struct: Any, omit: frozenset[str]) -> list[tuple[str, Any]]:
    return [
        (name, field.type)
        for name, field in ffi.typeof(struct).fields
        if not name.startswith("pad") and name not in omit
    ]


def _is_bytes(kind: Any) -> bool:
    return bool(kind.kind == "array" and kind.item.cname in ("uint8_t", "unsigned char"))


def struct_get(ffi: Any, struct: Any, omit: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The fields of a cffi struct."""
    return {name: _get(ffi, getattr(struct, name), kind) for name, kind in _fields(ffi, struct, omit)}


def _get(ffi: Any, value: Any, kind: Any) -> Any:
    if kind.kind == "primitive":
        return int(value)
    if kind.kind == "struct":
        return struct_get(ffi, value)
    if kind.kind == "union" or _is_bytes(kind):
        return bytes(ffi.buffer(ffi.addressof(value) if kind.kind == "union" else value))
    return [_get(ffi, value[i], kind.item) for i in range(kind.length)]


def struct_set(ffi: Any, struct: Any, values: Any, what: str, omit: frozenset[str] = frozenset()) -> None:
    """Fill a cffi struct; RecordError, and nothing useful in it, where the values do not fit it."""
    fields = _fields(ffi, struct, omit)
    names = {name for name, _ in fields}
    if not isinstance(values, dict) or values.keys() != names:
        given = values.keys() if isinstance(values, dict) else set()
        odd = ", ".join(sorted(map(str, given ^ names))) or "its form"
        raise RecordError(f"{what}: fields on one side only: {odd}")
    for name, kind in fields:
        _set(ffi, struct, name, values[name], kind, f"{what}.{name}")


def _set(ffi: Any, holder: Any, key: Any, value: Any, kind: Any, what: str) -> None:
    """``holder`` is a struct (``key`` a name) or an array (``key`` an index)."""
    by_name = isinstance(key, str)
    if kind.kind == "primitive":
        limit = 1 << 8 * ffi.sizeof(kind)
        if type(value) is not int or not 0 <= value < limit:
            raise RecordError(f"{what}: {value!r} is not a number below {limit:#x}")
        if by_name:
            setattr(holder, key, value)
        else:
            holder[key] = value
        return
    target = getattr(holder, key) if by_name else holder[key]
    if kind.kind == "struct":
        struct_set(ffi, target, value, what)
    elif kind.kind == "union" or _is_bytes(kind):
        buffer = ffi.buffer(ffi.addressof(target) if kind.kind == "union" else target)
        if not isinstance(value, bytes) or len(value) != len(buffer):
            raise RecordError(f"{what}: wants {len(buffer)} bytes")
        buffer[:] = value
    else:
        if not isinstance(value, list) or len(value) != kind.length:
            raise RecordError(f"{what}: wants {kind.length} values")
        for index, item in enumerate(value):
            _set(ffi, target, index, item, kind.item, f"{what}[{index}]")
