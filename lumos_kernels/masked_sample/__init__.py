from ..packages import share_namespace
from .api import masked_sample as masked_sample

share_namespace(masked_sample, __name__)
