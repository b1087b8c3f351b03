from ..packages import share_namespace
from .api import frame_attention as frame_attention

share_namespace(frame_attention, __name__)
