"""The token ids of Lumos-1 that carry structure, and the slice of visual codes (arXiv 2507.08801, official code).

A document is `0, text..., 8710, 9004, 8804 + seconds, 8804 + fps, frames..., 9005, 8710`. A frame of R x C_ codes is
`8197, 8804 + R/4, 8804 + C_/4, R lines of (C_ codes, 8803), 8196`. Code c has the id 65536 + c.
"""

from __future__ import annotations

TEXT_START = 0  # also the padding id
FRAME_END = 8196
FRAME_START = 8197
SEPARATOR = 8710  # ends the text and the document
NEW_LINE = 8803
NUMBER_BASE = 8804  # NUMBER_BASE + n writes the number n
MASK = 9003
VIDEO_START = 9004
VIDEO_END = 9005

VISUAL_START = 65536
NUM_CODES = 64000
# (first, last): the class slice of the loss and of sampling, columns first .. last - 1 of the vocabulary.
VISUAL_CLASSES = (VISUAL_START, VISUAL_START + NUM_CODES)

GRID_UNIT = 4  # a frame header counts its rows and columns in units of 4 codes
FRAME_HEADER = 3  # FRAME_START, rows, columns
