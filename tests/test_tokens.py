"""lumos/tokens.py: ids, tokenizers, documents and the transforms of the official data path."""

import json

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumos import tokens
from lumos.tokens import (
    NUM_CODES,
    ByteTokenizer,
    Spans,
    build_document,
    cut_video,
    cut_with_labels,
    drop_text,
    latent_frames,
    load_tokenizer,
    number,
    parse_document,
    read_numbers,
    take_frames,
)
from lumos_kernels.layout import FrameLayout

FEW = settings(max_examples=60, deadline=None)
TEXT = [16500, 16501, 16502]


def random_codes(frames, rows=4, cols=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, NUM_CODES, (frames, rows, cols), generator=generator)


def test_a_document_token_by_token():
    codes = torch.arange(16).reshape(1, 4, 4)
    lines = [t for r in range(4) for t in [*range(65536 + 4 * r, 65540 + 4 * r), 8803]]
    expected = [0, 16500, 8710, 9004, 8806, 8816, 8197, 8805, 8805, *lines, 8196, 9005, 8710]
    assert build_document([16500], codes, seconds=2, fps=12).tolist() == expected


def test_real_sizes():
    assert len(build_document([], random_codes(7, 32, 56), 2, 12)) == 7 * 1828 + 7
    assert len(build_document(None, random_codes(1, 48, 84), 1, 1)) == 4084 + 5
    assert [latent_frames(n) for n in (1, 2, 5, 6, 24, 84)] == [1, 2, 2, 3, 7, 22]


@pytest.mark.parametrize("n", [0, 199, -1])
def test_number_outside_its_range(n):
    with pytest.raises(ValueError, match=r"n must be 1\.\.198"):
        number(n)


def test_the_largest_number_is_not_the_mask():
    assert number(198) == 9002 == tokens.MASK - 1
    assert number(1) == 8805


@FEW
@given(st.text(st.characters() | st.characters(categories=["Cs"])))
def test_byte_tokenizer_round_trip(text):
    ids = ByteTokenizer().encode(text)
    assert ByteTokenizer().decode(torch.tensor(ids, dtype=torch.int64)) == text
    assert all(9006 <= i < 65536 for i in ids)


def test_byte_tokenizer_refuses_other_ids_and_survives_broken_utf8():
    with pytest.raises(ValueError, match="8710"):
        ByteTokenizer().decode([16384 + 65, 8710])
    assert ByteTokenizer().decode([16384 + 65, 16384 + 0xFF]) == "A�"


def test_text_tokenizer(tmp_path):
    words = {"<unk>": 0, "a": 20000, "cat": 20001}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert loaded.encode("a cat a") == [20000, 20001, 20000]
        assert loaded.decode(torch.tensor([20000, 20001])) == "a cat"
    assert isinstance(load_tokenizer(None), ByteTokenizer)


def test_text_tokenizer_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


documents = st.builds(
    lambda text, frames, rows, cols, seconds, fps, seed: (
        text,
        random_codes(frames, 4 * rows, 4 * cols, seed),
        seconds,
        fps,
    ),
    st.none() | st.lists(st.integers(16384, 65535) | st.sampled_from((65538, 65539, 65540)), max_size=5),
    *(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)),
    *(st.integers(1, 198), st.integers(1, 198), st.integers(0, 99)),
)


@FEW
@given(documents)
def test_parse_inverts_build(document):
    text, codes, seconds, fps = document
    ids = build_document(text, codes, seconds, fps)
    FrameLayout.from_tokens(ids[None], check=True)
    parsed = parse_document(ids)
    assert (None if parsed.text_ids is None else parsed.text_ids.tolist()) == text
    assert torch.equal(parsed.codes, codes)
    assert (parsed.seconds, parsed.fps) == (seconds, fps)
    spans = Spans.of(ids)
    assert (len(spans.frames), spans.rows, spans.cols) == tuple(codes.shape)
    assert all(ids[a] == 8197 and ids[b - 1] == 8196 for a, b in spans.frames)


@settings(max_examples=300, deadline=None)
@given(documents, st.data())
def test_a_damaged_document_is_refused_or_says_exactly_what_it_holds(document, data):
    ids = build_document(*document).tolist()
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(ids) - 1))
        other = st.sampled_from(
            (0, 8196, 8197, 8710, 8803, 8804, 8805, 8806, 9003, 9004, 9005, 65536, 129535, 129536, -1)
        )
        piece = data.draw(st.just([]) | st.lists(other, min_size=1, max_size=2))
        ids[at : at + data.draw(st.integers(0, 40))] = piece
        if not ids:
            break
    ids = torch.tensor(ids, dtype=torch.int64)
    try:
        parsed = parse_document(ids)
    except ValueError:
        return
    rebuilt = build_document(parsed.text_ids, parsed.codes, parsed.seconds, parsed.fps)
    assert rebuilt.tolist() in (ids.tolist(), [*ids.tolist(), 8710])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: ids[ids != 9004], "one video start"),
        (lambda ids: ids[ids != 9005], "one video end"),
        (lambda ids: ids.masked_fill(ids == 8816, 8804), "seconds and fps"),
        (lambda ids: ids.masked_fill(ids == 8710, 16500), "separator"),
        (lambda ids: torch.cat([ids[:4], ids[5:]]), "must begin with 0 and end with 8710"),
        (lambda ids: ids[1:], "must begin with 0 and end with 8710"),
        (lambda ids: torch.cat([ids[:32], ids[:1], ids[32:]]), "they must fill the video"),
        (lambda ids: torch.cat([ids[:56], ids[-2:], ids[32:56]]), "they must fill the video"),
        (lambda ids: torch.cat([ids[:8], ids[-2:]]), "at least one frame"),
        (lambda ids: torch.cat([ids, ids[-1:]]), "nothing else"),
        (lambda ids: ids.masked_fill(ids == 65599, 9003), "frame 1, row 1, column 0 is masked; 1 such"),
        (lambda ids: ids.masked_fill(ids == 65599, 16500), "is 16500, not a visual id"),
        (lambda ids: ids.masked_fill(ids == 65599, 129536), r"ids must be in \[0, 129536\)"),
        (lambda ids: ids.masked_fill(ids == 8803, 9003), "new lines"),
        (lambda ids: ids[:-30], "one video end"),
        (lambda ids: ids[ids != 65599], "frame 1"),
        (lambda ids: ids.float(), "float32"),
        (lambda ids: ids[None], r"\[1, "),
    ],
)
def test_what_is_wrong_with_a_document(change, message):
    codes = torch.zeros(2, 4, 4, dtype=torch.int64)
    codes[1, 1, 0] = 63
    ids = build_document(TEXT, codes, 2, 12)
    with pytest.raises(ValueError, match=message):
        parse_document(change(ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seconds": 0}, "seconds"),
        ({"fps": 199}, "fps"),
        ({"codes": torch.full((1, 4, 4), 64000)}, "codes"),
        ({"codes": torch.full((1, 4, 4), -1)}, "codes"),
        ({"codes": torch.zeros(1, 4, 4)}, "codes"),
        ({"codes": torch.zeros(1, 4, 6, dtype=torch.int64)}, "cols"),
        ({"codes": torch.zeros(0, 4, 4, dtype=torch.int64)}, "codes"),
        ({"text_ids": [16500, 9004]}, r"text_ids\[1\] is 9004"),
        ({"text_ids": [8197]}, r"text_ids\[0\]"),
        ({"text_ids": [70000]}, r"text_ids\[0\]"),
    ],
)
def test_build_document_names_the_argument(changes, message):
    good = {"text_ids": TEXT, "codes": random_codes(1), "seconds": 1, "fps": 1}
    with pytest.raises(ValueError, match=message):
        build_document(**good | changes)


@pytest.mark.parametrize(
    ("data_fps", "fps", "seconds", "kept"),
    [
        (12, 12, 2, range(7)),
        (12, 12, 7, range(22)),
        (24, 12, 2, range(0, 14, 2)),
        (12, 6, 3, range(0, 12, 2)),
        (12, 2, 3, [0, 6, 12]),
    ],
)
def test_cut_video_keeps_the_frames_upstream_keeps(data_fps, fps, seconds, kept):
    codes = random_codes(22)
    text = [16500, 65539, 16501, 65540, 65538]
    ids = build_document(text, codes, 7, data_fps)
    numbers = {fps * seconds: [16399, 16400], fps: [16401]}
    expected = build_document([16500, 16399, 16400, 16501, 16401, 65538], codes[list(kept)], seconds, fps)
    assert torch.equal(cut_video(ids, fps, seconds, numbers), expected)
    assert torch.equal(cut_video(ids, fps, seconds), build_document(text, codes[list(kept)], seconds, fps))


def test_placeholder_ids_inside_the_video_are_codes():
    codes = torch.full((1, 4, 4), 3)  # id 65539
    ids = build_document([65539], codes, 1, 1)
    cut = parse_document(cut_video(ids, 12, 2, {1: [16400]}))
    assert cut.text_ids.tolist() == [16400]
    assert torch.equal(cut.codes, codes)


def test_an_image_stays_an_image():
    ids = build_document(TEXT, random_codes(1), 1, 1)
    assert torch.equal(cut_video(ids, 12, 2), ids)


def test_labels_follow_the_ids():
    ids = build_document([16500, 65539], random_codes(22), 7, 12)
    spans = Spans.of(ids)
    video = (torch.arange(len(ids)) >= 4) & (torch.arange(len(ids)) < len(ids))
    new, labels = cut_with_labels(ids, torch.where(video, ids, -100), spans, 12, 2, {24: [1, 2, 3], 12: [4]})
    begin = int((new == 9004).nonzero()[0])
    assert (labels[:begin] == -100).all()
    assert torch.equal(labels[begin:], new[begin:])
    given_frames = torch.full_like(ids, -100)  # as after masking_mode video_next_frame
    assert (cut_with_labels(ids, given_frames, spans, 12, 2)[1] == -100).all()


@pytest.mark.parametrize(
    ("fps", "seconds", "message"),
    [
        (24, 2, "fps 24 does not divide"),
        (5, 2, "fps 5 does not divide"),
        (12, 8, "the document has 22"),
        (0, 2, "fps must be"),
        (12, 199, "seconds must be"),
    ],
)
def test_cut_video_refuses_what_it_cannot_do(fps, seconds, message):
    with pytest.raises(ValueError, match=message):
        cut_video(build_document(TEXT, random_codes(22), 7, 12), fps, seconds)


def test_cut_video_wants_the_numbers_it_writes():
    with pytest.raises(ValueError, match="no ids for 24"):
        cut_video(build_document([65539], random_codes(7), 2, 12), 12, 2, {12: [1]})


@pytest.mark.parametrize(
    ("n", "seconds", "fps"), [(22, 7, 12), (9, 3, 12), (7, 2, 12), (4, 1, 12), (2, 1, 12), (1, 1, 1)]
)
def test_take_frames(n, seconds, fps):
    codes = random_codes(22)
    ids = build_document(TEXT, codes, 7, 12)
    assert torch.equal(take_frames(ids, n), build_document(TEXT, codes[:n], seconds, fps))


@pytest.mark.parametrize("n", [0, 3])
def test_take_frames_outside_the_document(n):
    with pytest.raises(ValueError, match=r"n must be 1\.\.2"):
        take_frames(build_document(TEXT, random_codes(2), 1, 4), n)


def test_drop_text():
    codes = random_codes(2)
    dropped = drop_text(build_document(TEXT, codes, 1, 4))
    assert torch.equal(dropped, build_document(None, codes, 1, 4))
    assert torch.equal(drop_text(dropped), dropped)
    with pytest.raises(ValueError, match="no video start"):
        drop_text(torch.tensor([0, 16500, 8710]))


def test_read_numbers(tmp_path):
    path = tmp_path / "numbers.json"
    path.write_text(json.dumps({"1": [16400], "12": [16400, 16401]}))
    assert read_numbers(path) == {1: [16400], 12: [16400, 16401]}
    for wrong in ("[1]", '{"x": [1]}', '{"1": []}', '{"1": [70000]}', "{"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"numbers\.json"):
            read_numbers(path)
