"""Files: safe, atomic, checked."""

from . import entropy as entropy
from ._errors import FileError as FileError
from ._load import Verified as Verified
from ._load import load as load
from ._load import read_manifest as read_manifest
from ._load import verify as verify
from ._save import file_bytes as file_bytes
from ._save import save as save
