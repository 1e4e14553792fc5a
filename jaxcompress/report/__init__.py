"""Reports on compressed trees."""

from ._errors import ErrorReport as ErrorReport
from ._errors import ErrorRow as ErrorRow
from ._errors import errors as errors
from ._language import kl_divergence as kl_divergence
from ._language import mean_nll as mean_nll
from ._language import perplexity as perplexity
from ._language import top1_agreement as top1_agreement
from ._plots import histograms as histograms
from ._plots import layers as layers
from ._plots import overlaps as overlaps
from ._pruning import PruningReport as PruningReport
from ._pruning import PruningRow as PruningRow
from ._pruning import pruning as pruning
from ._sensitivity import SensitivityReport as SensitivityReport
from ._sensitivity import SensitivityRow as SensitivityRow
from ._sensitivity import relative_change as relative_change
from ._sensitivity import sensitivity as sensitivity
from ._size import SizeReport as SizeReport
from ._size import SizeRow as SizeRow
from ._size import size as size
from ._size import sparsity as sparsity
