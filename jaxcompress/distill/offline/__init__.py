"""Teacher outputs on disk: written once, read in any order."""

from ._reader import Stored as Stored
from ._reader import open as open
from ._top_k import TopK as TopK
from ._writer import Writer as Writer
from ._writer import fingerprint as fingerprint
from ._writer import write as write
