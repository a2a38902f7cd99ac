"""Lines of untrusted bytes: gzip or plain, told apart by their first bytes, split on newline only, within limits.

A fault of the stream (cut, corrupt, a bomb, UTF-16, nothing in it) is an InputError and ends the reading: what came
before it must not be published. What a line holds is not looked at here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tarfile import HeaderError, TarInfo
from typing import BinaryIO, NamedTuple, NoReturn

from isal import isal_zlib

from tasks.errors import InputError
from tasks.oasst.advice import ARROW_AS_LINES, AS_LINES

GZIP = b"\x1f\x8b"
UTF8_MARK = b"\xef\xbb\xbf"
FED = 1 << 16  # bytes read at a time: how closely an error can name its place
MADE = 1 << 20  # decompressed bytes at a time: all that a bomb can make before the limits are asked
RATIO_COUNTS_FROM = 16 << 20  # decompressed bytes; below it a high ratio is harmless and sometimes honest
GZIP_WINDOW = 31  # zlib's word for "a gzip header, and check CRC and size at the end"
CORRUPT: type[Exception] = isal_zlib.error  # type: ignore[assignment]  # its stub says an instance
BLANK = b" \t\r"  # what JSON calls white space; a form feed is not
HEAD = 512  # bytes by which a file is known: the header of a tar archive
# First bytes of files that are no text -> what they are, and what makes lines of them.
KINDS = {
    b"PK\3\4": ("a zip archive", "Unpack it: unzip FILE"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "Unpack it: unzstd FILE"),
    b"BZh": ("compressed by bzip2", "Unpack it: bunzip2 FILE"),
    b"\xfd7zXZ\0": ("compressed by xz", "Unpack it: unxz FILE"),
    b"\x04\x22\x4d\x18": ("compressed by lz4", "Unpack it: unlz4 FILE"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "Unpack it: 7z x FILE"),
    b"Rar!": ("a rar archive", "Unpack it: unrar x FILE"),
    b"ARROW1": ("an Arrow (Feather) file", ARROW_AS_LINES),
    b"FEA1": ("a Feather file", ARROW_AS_LINES),
    b"\xff\xff\xff\xff": ("a stream of Arrow", ARROW_AS_LINES.replace("read_ipc", "read_ipc_stream")),
    b"PAR1": ("a Parquet file within a gzip file", "Unpack it: gunzip FILE"),
    b"PARE": ("an encrypted Parquet file", "Write it without a key"),
    b"Obj\1": ("an Avro file", "Write its rows as JSON, one a line"),
    b"\x89HDF": ("an HDF5 file", "Write its rows as JSON, one a line"),
    b"SQLite format 3": ("a SQLite database", "Write its rows as JSON, one a line"),
    b"%PDF": ("a PDF", "Write its content as rows of JSON, one a line"),
}


class Line(NamedTuple):
    """One line: its number from 1, where it starts in the decompressed stream, its bytes without the newline.

    They are seen where they lie in a chunk, if they lie in one: a copy of each would cost a fifth of the unpacking.
    """

    number: int
    offset: int
    raw: bytes | memoryview


@dataclass(frozen=True)
class Limits:
    """What a stream may ask of us.

    Attributes:
        line: Bytes in one line.
        ratio: Decompressed bytes for each compressed one, counted from RATIO_COUNTS_FROM on.
    """

    line: int = 64 << 20
    ratio: float = 200.0


def _is_tar(head: bytes) -> bool:
    """Tell a tar archive by the checksum of its first header: old ones have no magic bytes."""
    try:
        return bool(TarInfo.frombuf(head[:HEAD], "utf-8", "surrogateescape"))
    except HeaderError:
        return False


class Lines:
    """The lines of one file that are not blank, as they stream by.

    Attributes:
        rows: Lines handed out so far.
        bytes: Decompressed bytes so far.
        mark: Bytes of the UTF-8 byte order mark that the file opens with and that is skipped: 0 or 3.
    """

    def __init__(
        self, path: Path, limits: Limits | None = None, advance: Callable[[float], None] = lambda _: None
    ) -> None:
        """Prepare to read `path`, telling `advance` how many of its (compressed) bytes were read."""
        self._path, self._limits, self._advance = path, limits or Limits(), advance
        self._read = 0  # bytes of the file itself
        self._gzipped = False
        self.rows, self.bytes, self.mark = 0, 0, 0

    def __iter__(self) -> Iterator[Line]:
        """Yield the lines.

        Raises:
            InputError: If the stream is cut, corrupt, over a limit, UTF-16 or empty.
        """
        for line in self._split():
            raw = line.raw
            if raw and (raw[0] not in BLANK or bytes(raw).strip(BLANK)):
                self.rows += 1
                yield line
        if not self.rows:
            self._fail("input.empty", "has nothing in it", "Name another file, or copy or download this one again")

    def _split(self) -> Iterator[Line]:
        number, offset, pieces = 1, 0, list[bytes | memoryview]()  # of the line under way
        for chunk in self._text():
            view, start = memoryview(chunk), 0
            while (end := chunk.find(b"\n", start)) >= 0:
                raw = b"".join([*pieces, view[start:end]]) if pieces else view[start:end]
                self._limit(len(raw), number)
                yield Line(number, self.mark + offset, raw)
                number, offset, start = number + 1, offset + len(raw) + 1, end + 1
                pieces.clear()
            pieces.append(view[start:])
            self._limit(sum(map(len, pieces)), number)
        yield Line(number, self.mark + offset, b"".join(pieces))

    def _limit(self, size: int, number: int) -> None:
        if size > self._limits.line:
            hint = f"Raise parse.max_line_mb; if all of it is one JSON array, write one object a line: {AS_LINES}"
            self._fail("line.too_long", f"has more than {self._limits.line:,} bytes in line {number}", hint)

    def _text(self) -> Iterator[bytes]:
        """Yield the decompressed bytes, without a byte order mark, if they can be UTF-8 text at all."""
        chunks = self._decoded()
        head = b""
        for chunk in chunks:
            head += chunk
            if len(head) >= HEAD:
                break
        self._refuse_disguise(head)
        self.mark = len(UTF8_MARK) if head.startswith(UTF8_MARK) else 0
        yield head.removeprefix(UTF8_MARK)
        yield from chunks

    def _refuse_disguise(self, head: bytes) -> None:
        mark = head[:2] in (b"\xff\xfe", b"\xfe\xff")
        zeros = [byte == 0 for byte in head[:4]]  # every other byte of ASCII that is written as UTF-16
        if mark or zeros in ([False, True] * 2, [True, False] * 2):
            self._fail("input.utf16", "is UTF-16 text, expected UTF-8", "Convert it: iconv -f UTF-16 -t UTF-8")
        if self._gzipped and head.startswith(GZIP):
            self._fail("gzip.nested", "is a gzip file within a gzip file", "Unpack it once")
        if _is_tar(head):
            self._fail("input.kind", "is a tar archive", "Unpack it: tar xf FILE, and name the file that was in it")
        for magic, (what, hint) in KINDS.items():
            if head.startswith(magic):
                self._fail("input.kind", f"is {what}", hint)

    def _decoded(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            first = file.read(FED)
            self._gzipped = first.startswith(GZIP)
            for chunk in self._inflated(self._fed(first, file)) if self._gzipped else self._fed(first, file):
                self.bytes += len(chunk)
                yield chunk

    def _fed(self, first: bytes, file: BinaryIO) -> Iterator[bytes]:
        piece = first
        while piece:
            self._read += len(piece)
            self._advance(len(piece))
            yield piece
            piece = file.read(FED)

    def _inflated(self, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the content of every member. Source: RFC 1952; zero bytes between members are padding, as for gzip."""
        member = None  # the decompressor of the member under way
        for fed in pieces:
            piece = fed
            while piece or member:
                if member is None:
                    piece = piece.lstrip(b"\0")
                    if not piece:
                        break
                    if not GZIP.startswith(piece[:2]):  # isal says so only once it has seen ten bytes
                        self._fail("gzip.corrupt", "has a corrupt gzip stream (bytes after its end)")
                    member = isal_zlib.decompressobj(GZIP_WINDOW)
                made = self._inflate(member, piece)
                self._limit_ratio(len(made))
                yield made
                if member.eof:
                    piece, member = member.unused_data, None
                    continue
                piece = member.unconsumed_tail
                if len(made) < MADE and not piece:  # all of it went in, and nothing waits inside to come out
                    break
        if member is not None:
            self._fail("gzip.truncated", "ends in the middle of its gzip stream")

    def _inflate(self, member: isal_zlib.Decompress, piece: bytes) -> bytes:
        try:
            return member.decompress(piece, MADE)
        except CORRUPT as error:
            self._fail("gzip.corrupt", f"has a corrupt gzip stream ({error})", cause=error)

    def _limit_ratio(self, size: int) -> None:
        made = self.bytes + size
        if made > RATIO_COUNTS_FROM and made > self._limits.ratio * self._read:
            what = f"unpacks to more than {self._limits.ratio:,.0f} times its size"
            self._fail("gzip.ratio", what, "If you trust the file, raise parse.max_ratio")

    def _fail(
        self, code: str, what: str, hint: str = "Copy or download it again", cause: Exception | None = None
    ) -> NoReturn:
        where = f"Seen after {self.rows:,} rows, at or before byte {self._read:,} of the file"
        raise InputError(f"{self._path.name} {what}", where, hint, code) from cause
