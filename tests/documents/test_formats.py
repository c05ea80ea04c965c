"""Files as they come: compression, encodings, JSON, tables, token ids; and what is refused."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import numpy as np
import pytest

import longrope

LINES = b'{"text": "one"}\n{"text": "two"}\n'


def texts(documents):
    return [bytes(d.astype(np.uint8)).decode() for d in documents]


def zstd(data):
    zstandard = pytest.importorskip("zstandard")
    # Two frames: what `cat a.zst b.zst` makes.
    return zstandard.compress(data[:5]) + zstandard.compress(data[5:])


COMPRESSIONS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("ending", COMPRESSIONS)
@pytest.mark.parametrize("named", [True, False], ids=["by name", "by content"])
def test_compressed_files_are_read_by_their_content(tmp_path, ending, named):
    compress = COMPRESSIONS[ending]
    path = tmp_path / ("a.jsonl" + ending * named)
    path.write_bytes(compress(LINES))
    assert texts(longrope.load_data(path)) == ["one", "two"]
    path = tmp_path / ("b.txt" + ending * named)
    path.write_bytes(compress(b"plain text"))
    assert texts(longrope.load_data(path)) == ["plain text"]


@pytest.mark.parametrize("ending", COMPRESSIONS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_compressed_file_that_was_cut_off_is_refused(tmp_path, ending, name):
    noise = np.random.default_rng(0).integers(97, 123, 5000, dtype=np.uint8).tobytes()
    data = COMPRESSIONS[ending](json.dumps({"text": noise.decode()}).encode())
    path = tmp_path / (name + ending)
    path.write_bytes(data[:-100])
    with pytest.raises(ValueError, match=r"a\.\w+\.\w+.*: expected whole \w+ data, got"):
        longrope.load_data(path)


def test_a_name_that_ends_in_gz_may_hold_plain_text(tmp_path):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(b"unpacked on the way")
    assert texts(longrope.load_data(path)) == ["unpacked on the way"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_byte_order_marks_and_line_ends(tmp_path, encoding, newline):
    text = f"Chapter 1{newline}Ünd 🙂{newline}"
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    assert texts(longrope.load_data(path)) == ["Chapter 1\nÜnd 🙂\n"]
    seen = []
    longrope.load_data(path, lambda text: seen.append(text) or [1])
    assert seen == ["Chapter 1\nÜnd 🙂\n"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(f'{{"text": "one"}}{newline}{{"text": "zwö"}}{newline}'.encode(encoding))
    assert texts(longrope.load_data(path)) == ["one", "zwö"]


def test_big_endian_and_a_line_end_across_two_blocks(tmp_path, monkeypatch):
    from longrope.documents import streams

    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF16_BE + "a\r\nb\r".encode("utf-16-be"))
    assert texts(longrope.load_data(path)) == ["a\nb\r"]
    monkeypatch.setattr(streams, "BLOCK", 2)
    path.write_bytes(b"a\r\nbc\r\n\r")
    assert texts(longrope.load_data(path)) == ["a\nbc\n\r"]


def test_a_stray_byte_is_kept_and_another_encoding_is_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 300 + b"\xe9" + b"y" * 300)
    assert longrope.load_data(path)[0][300] == 0xE9
    seen = []
    longrope.load_data(path, lambda text: seen.append(text) or [1])
    assert seen[0][300] == "\ufffd"
    path.write_bytes("Über café\n".encode("latin-1") * 40)
    with pytest.raises(ValueError, match=r"expected text in UTF-8 .* got 80 bytes of 400"):
        longrope.load_data(path)


def archive(kind):
    made = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(made, "w") as file:
            file.writestr("a.txt", "text")
    else:
        with tarfile.open(fileobj=made, mode="w:gz") as file:
            entry = tarfile.TarInfo("a.txt")
            entry.size = 4
            file.addfile(entry, io.BytesIO(b"text"))
    return made.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.zip", "zip", "got a zip archive"),
        ("a.tar.gz", "tar", "got a tar archive"),
        ("a.pdf", b"%PDF-1.7 text", "got a PDF"),
        ("a.txt", b"text\0text", r"binary data \(it has NUL bytes\)"),
        ("a.txt", "text".encode("utf-16-le"), "binary data"),
        ("a.txt", codecs.BOM_UTF16_LE + b"\x00\xd8\x00", "expected utf-16 text"),
        ("a.bin", b"\1\0\2\0", r"expected the type of its tokens \(token_dtype"),
        ("a.json", b'"text"', "expected a JSON list, object or lines"),
        ("a.json", b'{"name": 1}', "objects with a field .* got an object with 'name'"),
        ("a.json", b'[{"text": "one"},', "expected JSON, got a file broken at"),
        ("a.json", b'[{"text": "one"} 2]', "expected JSON, got a file broken at"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b"[\xff]", "expected JSON, got binary data"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: expected one JSON value a line"),
        ("a.jsonl", b"9" * 5000, r"a\.jsonl:1: expected"),
        ("a.arrow", b"no table", "is not an Arrow file"),
        ("a.npy", b"no array", r"expected a \.npy file of numbers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_text_is_refused_in_one_sentence(tmp_path, name, content, sentence):
    if name == "a.arrow":
        pytest.importorskip("pyarrow")
    content = archive(content) if isinstance(content, str) else content
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence) as raised:
        longrope.load_data(tmp_path / name)
    assert "\n" not in str(raised.value) and name in str(raised.value)


def npy(descr="'<i4'", shape="(4,)", version=1, content=bytes(16)):
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}".encode()
    size = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + header + content


def archive_of_arrays():
    made = io.BytesIO()
    np.savez(made, ids=np.arange(5))
    return made.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        archive_of_arrays(),
        archive_of_arrays()[:-30],
        b"PK\x03\x04",
        b"",
        npy("'V0'", "(-1,)"),  # which np.memmap divides by
        npy("[]"),
        npy("'<i4'", "(-4,)"),
        npy("'<i4'", "(5,)"),
        npy("'<i4'", "(2**62,)"),
        npy("'<i4'", "(4611686018427387904,)"),  # 0 bytes, in 64 bits
        npy("'<i4'", "(4611686018427387904, 0)"),
        npy("'<i4'", "()"),
        npy("'<M8[s]'"),
        npy("{}"),
        npy("3"),
        npy("(" * 9000),
        npy("'" + "x" * 60_000 + "'"),
        npy(version=4),
        npy("'<i4', []: 1, 'x'"),
    ],
    ids=lambda content: content[:80].decode("ascii", "replace").partition("'descr': ")[2][:20],
)
def test_a_hostile_npy_file_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.npy.*(: expected|holds no document)") as raised:
        longrope.load_data(path)
    said = str(raised.value).removeprefix(str(path))
    assert "\n" not in said and len(said) < 300


@pytest.mark.parametrize("version", [1, 2, 3])
def test_every_version_of_npy_is_read_in_either_order(tmp_path, version):
    tokens = np.arange(6, dtype="<i4")
    path = tmp_path / "a.npy"
    path.write_bytes(npy(shape="(6,)", version=version, content=tokens.tobytes()))
    assert [d.tolist() for d in longrope.load_data(path)] == [tokens.tolist()]
    np.save(path, np.asfortranarray(tokens.reshape(2, 3)))
    assert [d.tolist() for d in longrope.load_data(path)] == [[0, 1, 2], [3, 4, 5]]


def test_json_lists_objects_and_lines(tmp_path):
    path = tmp_path / "a.json"
    for content, expected in (
        (json.dumps([{"text": "one"}, "two", {"text": "three"}]), ["one", "two", "three"]),
        (json.dumps([{"text": "one"}, {"text": "two"}], indent=2), ["one", "two"]),
        (json.dumps({"text": "one", "n": 1}, indent=2), ["one"]),
        (LINES.decode(), ["one", "two"]),
        (json.dumps([104, 105]), ["hi"]),
        (json.dumps([[104, 105], [106]]), ["hi", "j"]),
    ):
        path.write_text(content)
        assert texts(longrope.load_data(path)) == expected
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"holds no document"):
        longrope.load_data(path)
    (tmp_path / "a.ndjson").write_bytes(LINES)
    assert texts(longrope.load_data(tmp_path / "a.ndjson")) == ["one", "two"]


def test_null_rows_are_counted_and_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": null}\n{"text": "one"}\nnull\n{"input_ids": null, "text": "two"}\n')
    with pytest.warns(UserWarning) as said:
        assert texts(longrope.load_data(path)) == ["one", "two"]
    assert [str(w.message) for w in said] == [
        f"load_data: left out 2 null rows ({path}:1, {path}:3)"
    ]


def test_columns_of_every_type(tmp_path):
    pa = pytest.importorskip("pyarrow")
    feather = pytest.importorskip("pyarrow.feather")
    import pyarrow.parquet as pq

    columns = {
        "string": pa.array(["one", None, "two"]),
        "large": pa.array(["one", None, "two"], pa.large_string()),
        "bytes": pa.array([b"one", None, b"two"]),
        "dictionary": pa.array(["one", None, "two"]).dictionary_encode(),
    }
    for ids in (pa.list_(pa.uint16()), pa.large_list(pa.int64()), pa.list_(pa.int8())):
        columns[str(ids)] = pa.array([list(b"one"), None, list(b"two")], ids)
    table = pa.table(columns)
    pq.write_table(table, tmp_path / "a.parquet")
    feather.write_feather(table, str(tmp_path / "a.feather"))
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    for file in sorted(tmp_path.iterdir()):
        for name in columns:
            with pytest.warns(UserWarning, match=r"left out 1 null row \(.*row 1\)"):
                assert texts(longrope.load_data(file, text_field=name)) == ["one", "two"]


def test_a_named_column_wins_over_ids_that_were_made_before(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"input_ids": [[1, 2]], "text": ["text"], "body": ["body"]}), path)
    assert longrope.load_data(path)[0].tolist() == [1, 2]
    assert texts(longrope.load_data(path, text_field="body")) == ["body"]


def test_token_files(tmp_path):
    tokens = np.array([5, 60000, 7], np.uint16)
    tokens.tofile(tmp_path / "a.bin")
    (found,) = longrope.load_data(tmp_path / "a.bin", token_dtype="uint16")
    assert found.dtype == np.uint16 and found.tolist() == tokens.tolist()
    with pytest.raises(ValueError, match=r"expected a whole number of uint32 tokens, got 6 bytes"):
        longrope.load_data(tmp_path / "a.bin", token_dtype="uint32")
    with pytest.raises(ValueError, match=r"token_dtype: expected one of 'uint8', .* got 'float32'"):
        longrope.load_data(tmp_path / "a.bin", token_dtype="float32")
    np.save(tmp_path / "one.npy", tokens)
    np.save(tmp_path / "rows.npy", np.stack([tokens, tokens]).astype(np.uint32))
    assert len(longrope.load_data(tmp_path / "one.npy")) == 1
    assert [d.tolist() for d in longrope.load_data(tmp_path / "rows.npy")] == [tokens.tolist()] * 2
    np.save(tmp_path / "float.npy", np.ones(3))
    with pytest.raises(ValueError, match=r"expected token ids in 1 or 2 dimensions, got float64"):
        longrope.load_data(tmp_path / "float.npy")
    np.save(tmp_path / "object.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"object\.npy: expected a \.npy file of numbers"):
        longrope.load_data(tmp_path / "object.npy")
    np.array([20240520, 1], np.int32).tofile(tmp_path / "header.bin")
    with pytest.raises(ValueError, match=r"got a file with a header"):
        longrope.load_data(tmp_path / "header.bin", token_dtype="uint16")
