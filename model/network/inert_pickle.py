"""Pickles of NumPy arrays, read without running anything in them: what detectron2's model zoo is made of.

A pickle is a program that may call any function it names. Here every name it may use stands for a plain record of this
file, and any other name ends the reading; arrays are put together from these records afterwards.
"""

import io
import pickle
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_NESTED = 32
_KINDS = {"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1"}


class InertPickleError(ValueError):
    """A pickle that holds something else than arrays, numbers and texts, or a broken one."""


@dataclass
class _Type:
    """`numpy.dtype(name)`, then its state (version, byte order, ...)."""

    name: Any = ""
    rest: tuple[Any, ...] = ()
    order: str = "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]

    def numpy(self) -> np.dtype[Any]:
        if not isinstance(self.name, str) or self.name not in _KINDS:
            raise InertPickleError(f"it has an array of type {str(self.name)[:40]!r}")
        kind = np.dtype(self.name)
        return kind.newbyteorder(">") if self.order == ">" else kind


@dataclass
class _Array:
    """`numpy.ndarray`, then its state (version, shape, type, Fortran order, bytes)."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def numpy(self) -> NDArray[Any]:
        try:
            _, shape, kind, is_fortran, raw = self.state
        except (TypeError, ValueError):
            raise InertPickleError("it has an array without a state") from None
        return _filled(raw, kind, shape, "F" if is_fortran else "C")


@dataclass
class _Buffered:
    """`numpy._frombuffer(bytes, type, shape, order)`, how newer protocols write arrays."""

    arguments: tuple[Any, ...] = ()

    def numpy(self) -> NDArray[Any]:
        try:
            raw, kind, shape, order = self.arguments
        except ValueError:
            raise InertPickleError("it has an array of an unknown form") from None
        return _filled(raw, kind, shape, order)


@dataclass
class _Scalar:
    """`numpy.scalar(type, bytes)`."""

    kind: Any = None
    raw: Any = b""

    def numpy(self) -> NDArray[Any]:
        return _filled(self.raw, self.kind, (), "C")


class _Ordered(dict[Any, Any]):
    """`collections.OrderedDict`."""


@dataclass
class _Name:
    """A name that is only ever an argument, such as the class `numpy.ndarray`."""

    arguments: tuple[Any, ...] = field(default_factory=tuple)


def _dtype(name: Any = "", *rest: Any) -> _Type:
    return _Type(name, rest)


def _array(*_: Any) -> _Array:
    return _Array()


def _buffered(*arguments: Any) -> _Buffered:
    return _Buffered(arguments)


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes as protocol 2 writes them: a text, to be encoded."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise InertPickleError("it encodes something else than bytes")
    return text.encode("latin1")


def _no_bytes(*arguments: Any) -> bytes:
    """`bytes()`: how protocol 2 writes an empty array."""
    if arguments:
        raise InertPickleError("it makes bytes of something")
    return b""


_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Ordered,
    ("_codecs", "encode"): _encoded,
    **{(module, "bytes"): _no_bytes for module in ("__builtin__", "builtins")},
    ("numpy", "dtype"): _dtype,
    ("numpy", "ndarray"): _Name,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _Scalar for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _buffered for core in ("core", "_core")},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _ALLOWED.get((module, name))
        if found is None:
            raise InertPickleError(f"it names {module}.{name}, which no file of weights needs")
        return found

    def persistent_load(self, pid: Any) -> Any:
        raise InertPickleError("it refers to data outside of itself")


def read_inert(content: bytes) -> Any:
    """The objects of a pickle: dicts, lists, tuples, texts, numbers, NumPy arrays.

    Raises:
        InertPickleError: anything else is in it, or it is cut off or broken.
    """
    try:
        loaded = _Unpickler(io.BytesIO(content), encoding="latin1").load()
    except InertPickleError:
        raise
    except Exception as error:  # a broken pickle raises nearly anything
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise InertPickleError(f"it is cut off or broken: {reason}") from None
    return _plain(loaded, _MOST_NESTED)


def _plain(value: Any, depth: int) -> Any:
    """Records as the arrays they stand for."""
    if depth == 0:
        raise InertPickleError("it is nested too deep")
    if isinstance(value, _Array | _Buffered | _Scalar):
        return value.numpy()
    if isinstance(value, dict):
        return {key: _plain(item, depth - 1) for key, item in value.items() if isinstance(key, str | int)}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item, depth - 1) for item in value]
    return value


def _filled(raw: Any, kind: Any, shape: Any, order: Any) -> NDArray[Any]:
    if isinstance(raw, str):  # bytes that Python 2 wrote
        raw = raw.encode("latin1")
    sizes_are_whole = isinstance(shape, tuple) and all(isinstance(n, int) and n >= 0 for n in shape)
    if not isinstance(raw, bytes | bytearray) or not isinstance(kind, _Type) or not sizes_are_whole:
        raise InertPickleError("it has an array of objects, or of an unknown form")
    dtype = kind.numpy()
    if len(raw) != prod(shape) * dtype.itemsize:
        raise InertPickleError(f"it has an array of {list(shape)} with {len(raw)} bytes")
    return np.frombuffer(raw, dtype).reshape(shape, order="F" if order == "F" else "C")
