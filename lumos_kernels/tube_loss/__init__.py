from lumos_kernels.tube_loss.api import TubeLossStats as TubeLossStats
from lumos_kernels.tube_loss.api import tube_masked_loss as tube_masked_loss
