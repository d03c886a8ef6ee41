"""Files as people have them: plain text, compressed text, tables with a column of text, and folders of these."""

import bz2
import contextlib
import csv
import gzip
import importlib
import io
import itertools
import json
import lzma
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, cast

from .checks import shown
from .terminal import one_line


# Tables by their names' endings; the endings of compressed files may follow.
TABLES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
_COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".zst", ".zip")
# How files begin that are no text and cannot be read here, and what an error calls them.
_REFUSED = {
    "a PDF document": (rb"%PDF-",),
    "a document of an office program": (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", rb"\{\\rtf1"),
    "a 7z archive": (rb"7z\xbc\xaf\x27\x1c",),
    "a RAR archive": (rb"Rar!\x1a\x07",),
    "a tar archive": (rb".{257}ustar",),
    "a package or a library": (rb"!<arch>\n", rb"\xed\xab\xee\xdb"),
    "compressed with lz4": (rb"\x04\x22\x4d\x18",),
    "compressed with compress": (rb"\x1f\x9d",),
    "a picture": (
        rb"\x89PNG",
        rb"\xff\xd8\xff",
        rb"GIF8[79]a",
        rb"RIFF.{4}WEBP",
        rb"BM.{4}\x00{4}",
        rb"II\*\x00|MM\x00\*",
        rb"\x00\x00[\x01\x02]\x00.\x00",
        rb"8BPS\x00",
        rb"\x00\x00\x00\x0cjP  ",
    ),
    "a sound or a film": (
        rb"ID3[\x02-\x04]",
        rb"\xff[\xf1-\xf3\xf9-\xfb][\x10-\xeb](?=.*\x00)",
        rb"RIFF.{4}(?:WAVE|AVI )",
        rb"OggS\x00",
        rb"fLaC\x00",
        rb"\x00\x00.{2}ftyp",
        rb"\x1a\x45\xdf\xa3",
        rb"FLV\x01",
        rb"MThd\x00",
        rb"\x00\x00\x01[\xb3\xba]",
    ),
    "a font": (rb"wOF[F2]", rb"OTTO\x00", rb"\x00\x01\x00\x00\x00"),
    "a program": (
        rb"\x7fELF",
        rb"MZ.{0,200}\x00\x00",
        rb"\x00asm",
        rb"\xca\xfe\xba\xbe",
        rb"[\xce\xcf]\xfa\xed\xfe",
        rb"..\r\n[\x00-\x03]\x00{3}",
    ),
    "a database": (rb"SQLite format 3\x00",),
    "an array of numpy": (rb"\x93NUMPY",),
    "a pickle": (rb"\x80[\x02-\x05]",),
    "a model's weights": (rb"GGUF[\x01-\x09]\x00", rb".{5}\x00{3}\{\x22"),
    "an HDF5 file": (rb"\x89HDF\r\n",),
    "an Arrow file": (rb"ARROW1",),
    "an Avro file": (rb"Obj\x01",),
}
_DAMAGED = (EOFError, NotImplementedError, OSError, RuntimeError, lzma.LZMAError, zipfile.BadZipFile, zlib.error)
_PARQUET = b"PAR1"
_JSON_HOLDS = (
    "A .json file holds an array of records, or a record in each line; to train on the JSON itself, name it .txt"
)
_CHUNK = 1 << 20
_FIELD_LIMIT = 2**31 - 1  # characters in a cell of CSV; Python's default, 131,072, is too few for a document


def is_plain(path: Path) -> bool:
    """Whether a file is plain text: neither a table nor compressed.

    Raises:
        ValueError: If it is not text at all, like a picture.
    """
    start = _start(path)
    if _opener(start) is None:
        _refuse_other_kinds(path, start)
    return not is_table(path) and _opener(start) is None


def is_table(path: Path) -> bool:
    """Whether a file is a table: parquet is known by its first bytes, other tables by the ending of the name."""
    return _ending(path) in TABLES or _start(path).startswith(_PARQUET)


class _NotJsonError(Exception):
    """A row that cannot be read as JSON."""


def documents(path: Path, text_column: str, table: bool | None = None) -> Iterator[Iterable[bytes]]:
    """The documents of a file, each in pieces: a text file is one document, a table has one in each row.

    Args:
        path: The file.
        text_column: The column of a table that holds the text; rows without text are left out.
        table: Whether it is read as a table; by default `is_table` decides.

    Raises:
        ValueError: If the file is damaged, cannot be read here, or has no such column of text.
    """
    if is_table(path) if table is None else table:
        yield from ([text] for text in _rows(path, text_column))
    else:
        yield _pieces(path)


def _ending(path: Path) -> str:
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in _COMPRESSED_ENDINGS:
        compression = endings.pop()
        if compression == ".zip" and not set(endings[-1:]) & set(TABLES):  # `data.zip` may hold `data.jsonl`
            with contextlib.suppress(*_DAMAGED), zipfile.ZipFile(path) as archive:
                endings += [Path(member).suffix.lower() for member in archive.namelist() if not member.endswith("/")]
    return endings[-1] if endings else ""


def _start(path: Path) -> bytes:
    with readable(path), path.open("rb") as file:
        return file.read(512)


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an error at reading a file, such as one that was deleted meanwhile, into a `ValueError` that names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{one_line(path.name)} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it is gone, deleted or renamed while the corpus was read"
    return one_line((isinstance(error, OSError) and error.strerror) or error)


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    kind = next((kind for kind, begin in _REFUSED.items() if re.match(rb"|".join(begin), start, re.DOTALL)), None)
    if kind is not None:
        raise ValueError(f"{one_line(path.name)} is {kind}, not a text; give text, or a folder of texts")


def _opener(start: bytes) -> Callable[[Path], IO[bytes]] | None:
    """The function that opens a compressed file, chosen by its first bytes."""
    if start.startswith(b"\x1f\x8b"):
        return lambda path: cast(IO[bytes], gzip.open(path))
    if start.startswith(b"BZh") and start[4:10] == b"1AY&SY":
        return lambda path: cast(IO[bytes], bz2.open(path))
    if start.startswith(b"\xfd7zXZ\0"):
        return lambda path: cast(IO[bytes], lzma.open(path))
    if start.startswith(b"\x28\xb5\x2f\xfd"):
        return _open_zstd
    if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):  # the second of an empty archive
        return _open_zip
    return None


def _open_zstd(path: Path) -> IO[bytes]:
    for name in ("compression.zstd", "zstandard"):  # Python 3.14, or a package
        try:
            module: Any = importlib.import_module(name)
        except ImportError:
            continue
        return cast(IO[bytes], module.open(path, "rb"))
    name = one_line(path.name)
    raise ValueError(f"{name} is compressed with zstd, which this Python cannot read; unpack it first: zstd -d {name}")


def _open_zip(path: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(path)
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) != 1:
        raise ValueError(
            f"{one_line(path.name)} is a zip archive of {len(members)} files (as documents of office programs are); unpack"
            " it, and give a text or a folder of texts"
        )
    return archive.open(members[0])


def _open(path: Path) -> IO[bytes]:
    opener = _opener(_start(path))
    return path.open("rb") if opener is None else opener(path)


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with _open(path) as file:
            first = file.read(_CHUNK)
            _refuse_other_kinds(path, first)
            if _opener(first) is not None:
                raise ValueError(f"{one_line(path.name)} is compressed twice; unpack it once")
            yield first
            while piece := file.read(_CHUNK):
                yield piece
    except _DAMAGED as error:
        raise ValueError(f"{one_line(path.name)} cannot be read: {_reason(error)}") from error


def _rows(path: Path, column: str) -> Iterator[bytes]:
    """The texts of a table. Rows without text are left out."""
    ending, name = _ending(path), one_line(path.name)
    read = {".json": _json, ".jsonl": _json_lines, ".ndjson": _json_lines, ".csv": _csv, ".tsv": _tsv}.get(
        ending, _parquet
    )
    number = 0
    try:
        with _open(path) as file:
            for number, row in enumerate(read(file, column), 1):
                yield from text_of_row(row, column, f"row {number} of {name}")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 after row {number}: {error.reason}") from error
    except (csv.Error, _NotJsonError, RecursionError) as error:
        reason = one_line(error).replace("unexpected end of data", "a quotation mark is not closed")
        hint = f". {_JSON_HOLDS}" if ending == ".json" else ""
        raise ValueError(f"{name}: row {number + 1} cannot be read: {reason}{hint}") from error
    except _DAMAGED as error:
        raise ValueError(f"{name} cannot be read: {_reason(error)}") from error


def text_of_row(row: Any, column: str, place: str) -> Iterator[bytes]:
    """The text of a row in UTF-8, if there is any.

    Raises:
        ValueError: If the row has no such column, or the column does not hold text. `place` names the row.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{place} is {shown('', row)}; it must be a mapping of columns")
    if column not in row:
        columns = [key for key in row if key is not None]
        raise ValueError(f"text_column is {shown('', column)}; {place} has the columns {shown('', columns)}")
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"text_column {shown('', column)} holds {shown('', text)} in {place}; it must hold text")
    if text:
        try:
            yield text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text in {place} cannot be written in UTF-8: {error.reason}") from None


def _json(file: IO[bytes], column: str) -> Iterator[Any]:
    with io.TextIOWrapper(file, "utf-8-sig", newline="\n") as lines:
        first = next((line for line in lines if line.strip()), "")
        if first.lstrip().startswith("["):
            yield from _decoded(first + lines.read())
        else:
            yield from _parsed(itertools.chain([first], lines))


def _json_lines(file: IO[bytes], column: str) -> Iterator[Any]:
    with io.TextIOWrapper(file, "utf-8-sig", newline="\n") as lines:
        yield from _parsed(lines)


def _parsed(lines: Iterable[str]) -> Iterator[Any]:
    return (_decoded(line) for line in lines if line.strip())


def _decoded(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_mapping)
    except ValueError as error:  # also of a number with thousands of digits
        raise _NotJsonError(str(error)) from error


def looks_like_json_lines(text: bytes) -> bool:
    """Whether a text that begins with `text` seems to be JSON lines: its first line is a record."""
    line = text.removeprefix(b"\xef\xbb\xbf").lstrip().split(b"\n", 1)[0].strip()
    if not (line.startswith(b"{") and line.endswith(b"}")):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (RecursionError, ValueError):
        return False


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        raise csv.Error("a name is given twice")
    return mapping


def _csv(file: IO[bytes], column: str, delimiter: str = ",") -> Iterator[Any]:
    csv.field_size_limit(_FIELD_LIMIT)
    with io.TextIOWrapper(file, "utf-8-sig", newline="") as lines:
        rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
        columns = rows.fieldnames or []
        if columns.count(column) > 1:
            raise csv.Error(f"{columns.count(column)} columns have the name {shown('', column)}")
        for row in rows:
            if None in row or None in row.values():  # cells without a name, or a name without a cell
                raise csv.Error(
                    f"it has {'more' if None in row else 'fewer'} cells than the header, {len(columns)}; a cell that holds"
                    f" {delimiter!r} or a line break must be in quotes"
                )
            yield row


def _tsv(file: IO[bytes], column: str) -> Iterator[Any]:
    return _csv(file, column, "\t")


def _parquet(file: IO[bytes], column: str) -> Iterator[Any]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file, page_checksum_verification=True)
        names = table.schema_arrow.names
        if names.count(column) > 1:
            raise OSError(f"{names.count(column)} columns have the name {shown('', column)}")
        if column not in names:
            yield dict.fromkeys(names)
        for batch in table.iter_batches(columns=[column], batch_size=256):
            yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise OSError(str(error).split("\n")[0]) from error


def files_of_folder(folder: Path, left_out: Path | None = None) -> tuple[list[Path], dict[str, list[Path]]]:
    """The text files of a folder, ordered by path, and the files left out, by the reason.

    Hidden files are left out silently. What a training run wrote is left out too, whether into `left_out` or another
    folder: otherwise a run's output would become part of the next run's corpus.
    """
    found: list[Path] = []
    others: dict[str, list[Path]] = {}
    own = None if left_out is None else left_out.expanduser().resolve()

    def note(error: OSError) -> None:
        others.setdefault("unreadable folders", []).append(Path(error.filename))

    for place, folders, names in os.walk(folder, onerror=note):
        here = Path(place)
        kept = []
        for name in folders:
            path = here / name
            if name.startswith("."):
                continue
            if path.is_symlink():
                others.setdefault("links to folders", []).append(path)
            elif path.resolve() == own or is_of_a_run(path):
                others.setdefault("folders of training runs", []).append(path)
            else:
                kept.append(name)
        folders[:] = kept
        for name in names:
            path = here / name
            if not name.startswith("."):
                reason = _why_not(path)
                (found if reason is None else others.setdefault(reason, [])).append(path)
    if not all(map(is_table, found)):
        tables = {path for path in found if _start(path).startswith(_PARQUET)}
        found = [path for path in found if path not in tables]
        if tables:
            others["tables among texts"] = [*tables]
    return sorted(found), {reason: sorted(paths) for reason, paths in others.items()}


def is_of_a_run(folder: Path) -> bool:
    """Whether a training run wrote `folder`."""

    def has(name: str) -> bool:
        return (folder / name).is_file()

    if has("trainer_state.json") or (has("config.json") and (has("model.safetensors") or has("metrics.json"))):
        return True
    return any((path / "trainer_state.json").is_file() for path in folder.glob("checkpoint-*"))


def _why_not(path: Path) -> str | None:
    """Why a file is not read, or `None` if it is."""
    if not path.is_file():
        return (
            "links to nothing" if path.is_symlink() else "no regular files" if path.exists() else "deleted meanwhile"
        )
    try:
        with path.open("rb") as file:
            start = file.read(8192)
    except OSError:
        return "unreadable"
    if not start:
        return "empty"
    if _opener(start) is not None or start.startswith(_PARQUET):
        return None
    try:
        _refuse_other_kinds(path, start)
    except ValueError:
        return "binary"
    return "binary" if b"\0" in start and not start.startswith((b"\xff\xfe", b"\xfe\xff")) else None


def described(others: dict[str, list[Path]]) -> str:
    """What is left out of a folder, for a message: each reason with the count and the first names."""
    parts = []
    for reason, paths in others.items():
        names = ", ".join(one_line(path.name) for path in paths[:5]) + (", ..." if len(paths) > 5 else "")
        parts.append(f"{reason}: {len(paths):,} ({names})")
    return "; ".join(parts)
