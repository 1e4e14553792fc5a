"""Files: safe, atomic, checked."""

from ._errors import FileError as FileError
from ._file import Verified as Verified
from ._file import file_bytes as file_bytes
from ._file import load as load
from ._file import read_manifest as read_manifest
from ._file import save as save
from ._file import verify as verify
