from ..packages import share_namespace
from .api import mm_rope as mm_rope

share_namespace(mm_rope, __name__)
