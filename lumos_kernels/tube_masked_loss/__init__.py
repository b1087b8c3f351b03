from ..packages import share_namespace
from .api import TubeLossStats as TubeLossStats
from .api import tube_masked_loss as tube_masked_loss

share_namespace(tube_masked_loss, __name__)
