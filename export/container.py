"""The contract inside exported files: written into them, read and checked before anything in them runs.

An ONNX file is a protobuf message, and messages may be put together end to end: the contract is one more entry of
`metadata_props` behind the model. A TorchScript or AOTInductor file is a zip archive: the contract is one more file in
it. Either way the checksum covers all the rest, and neither onnx nor torch is needed to read it.
"""

import hashlib
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from dsg.export.contract import Contract, ExportError, Format

_KEY = b"dsg"
_ENTRY = "extra/dsg.json"
_METADATA_PROPS = 14  # number of that field in ONNX's ModelProto
_LENGTH_DELIMITED = 2
_FIXED_BYTES = {1: 8, 5: 4}
_MOST_CONTRACT_BYTES = 1 << 24
_BLOCK = 1 << 20


def attach(path: Path, contract: Contract) -> Contract:
    """Write the contract into a file that has none yet.

    Returns:
        the contract with its checksum.
    """
    if contract.format is Format.ONNX:
        model = path.read_bytes()
        contract = replace(contract, checksum=hashlib.sha256(model).hexdigest())
        entry = _field(1, _KEY) + _field(2, contract.to_json().encode())  # key and value of a StringStringEntryProto
        with path.open("ab") as file:
            file.write(_field(_METADATA_PROPS, entry))
        return contract
    contract = replace(contract, checksum=_zip_checksum(path))
    with zipfile.ZipFile(path, "a") as archive:
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{_ENTRY}", contract.to_json())
    return contract


def read_contract(path: Path) -> Contract:
    """The contract of a file, after the rest of the file was found as the checksum says. Runs nothing in it.

    Raises:
        FileNotFoundError: no such file.
        ExportError: another kind of file, one that is cut short or was changed, or an export of something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no model at {path}")
    kind = next(kind for kind in Format if kind.suffix == path.suffix.lower())
    text, checksum = _read_onnx(path) if kind is Format.ONNX else _read_zip(path)
    try:
        contract = Contract.from_json(text)
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(
            f"{path}: its description cannot be read ({error}); was it written by another version?"
        ) from None
    if contract.format is not kind:
        raise ExportError(f"{path} is a {contract.format} file by what it says in it; give it the ending it had")
    if contract.checksum != checksum:
        raise ExportError(f"{path} was changed after dsg export wrote it (its checksum differs); get the file again")
    return contract


# --- ONNX -----------------------------------------------------------------------------------------


def _read_onnx(path: Path) -> tuple[bytes, str]:
    """The contract's text, and the checksum of all before it."""
    data = path.read_bytes()
    begin, payload = 0, b""
    for number, kind, start, content in _fields(path, data):
        begin, payload = start, bytes(content) if (number, kind) == (_METADATA_PROPS, _LENGTH_DELIMITED) else b""
    entry = {number: bytes(content) for number, _, _, content in _fields(path, payload)} if payload else {}
    if entry.get(1) != _KEY or 2 not in entry:
        raise ExportError(f"{path} is an ONNX file that dsg export did not write; it has no description to go by")
    return entry[2], hashlib.sha256(memoryview(data)[:begin]).hexdigest()


def _fields(path: Path, data: bytes) -> Iterator[tuple[int, int, int, memoryview]]:
    """Number, wire type, begin and content of each field of a protobuf message."""
    view, at = memoryview(data), 0
    try:
        while at < len(data):
            start = at
            key, at = _varint(data, at)
            number, kind = key >> 3, key & 7
            if kind == 0:
                end = _varint(data, at)[1]
            elif kind == _LENGTH_DELIMITED:
                length, at = _varint(data, at)
                end = at + length
            else:
                end = at + _FIXED_BYTES[kind]
            if number == 0 or end > len(data):
                raise IndexError
            yield number, kind, start, view[at:end]
            at = end
    except (IndexError, KeyError):
        raise ExportError(f"{path} is not an ONNX file, or it is cut short or damaged; get the file again") from None


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in protobuf's code, and the place after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError


def _field(number: int, content: bytes) -> bytes:
    """A length-delimited field."""
    return bytes([number << 3 | _LENGTH_DELIMITED]) + _as_varint(len(content)) + content


def _as_varint(value: int) -> bytes:
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


# --- zip archives ---------------------------------------------------------------------------------


def _read_zip(path: Path) -> tuple[bytes, str]:
    """The contract's text, and the checksum of all other files in the archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [entry for entry in archive.infolist() if _is_contract(entry.filename)]
            if len(entries) != 1 or entries[0].file_size > _MOST_CONTRACT_BYTES:
                raise ExportError(f"{path} is a file that dsg export did not write; it has no description to go by")
            return archive.read(entries[0]), _zip_checksum(path)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OSError, IndexError) as error:
        raise ExportError(
            f"{path} is not a {path.suffix} file, or it is cut short or damaged ({error}); get the file again"
        ) from None


def _is_contract(name: str) -> bool:
    return name.partition("/")[2] == _ENTRY


def _zip_checksum(path: Path) -> str:
    """SHA-256 over names, sizes and bytes of the files in an archive, in the order of names, without the contract."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
            if _is_contract(entry.filename):
                continue
            digest.update(f"{entry.filename} {entry.file_size}\n".encode())
            with archive.open(entry) as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
    return digest.hexdigest()
