"""Cut from an ELF library what no program loads: the notes for debuggers, four fifths of llama.cpp's.

python cut_library.py FILE. What `strip` does, without the compiler's tools in the image's build.
"""

import struct
import sys
from pathlib import Path

SECTIONS = 40  # where the header says where the table of sections is: for linkers and debuggers only


def cut(data: bytes) -> bytes:
    """The library up to the end of its last segment. ValueError when it is no 64-bit little-endian ELF file."""
    if data[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    end = 0
    for segment in range(count):
        offset, _, _, length = struct.unpack_from("<QQQQ", data, table + segment * size + 8)
        end = max(end, offset + length)
    kept = bytearray(data[:end])
    kept[SECTIONS : SECTIONS + 8] = bytes(8)
    kept[60:64] = bytes(4)  # their number, and which one has their names
    return bytes(kept)


def main() -> None:
    """Change the file."""
    path = Path(sys.argv[1])
    path.write_bytes(cut(path.read_bytes()))


if __name__ == "__main__":
    main()
