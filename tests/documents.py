"""Small documents and samples of the official form, for tests of the data path."""

import json
import pickle

import torch

from lumos.tokens import NUM_CODES, build_document


def document(frames=2, rows=4, cols=8, seed=0, text=(16500, 65539, 16501, 65540), seconds=1, fps=4):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, NUM_CODES, (frames, rows, cols), generator=generator)
    return build_document(text, codes, seconds, fps)


def official(ids=None, begin=None, **changes):
    """What the official pre-tokenisation pickles: labels -100 on the text."""
    ids = (document() if ids is None else ids).tolist()
    begin = ids.index(9004) if begin is None else begin
    return {"token": ids, "label": [-100] * begin + ids[begin:], "id": 7} | changes


def write_official(folder, frames=(2, 7, 1), index="merge-record.json"):
    """A folder files/ of pickles, sample i of seed i and frames[i] frames, and their index. Returns the entries."""
    (folder / "files").mkdir(parents=True)
    entries = []
    for number, count in enumerate(frames):
        content = official(document(count, seed=number, seconds=7 if count > 1 else 1, fps=4 if count > 1 else 1))
        (folder / "files" / f"{number}.pkl").write_bytes(pickle.dumps(content | {"id": number}))
        entries.append({"file": f"files/{number}.pkl", "len": len(content["token"]), "id": number})
    (folder / index).write_text(json.dumps(entries))
    return entries
