"""Our reader of safetensors against the real one: both take a file, with equal numbers, or neither.

The table and the fuzzing below say where it was looked; the real reader is always asked again.
"""

import json
import math
import struct

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import load, save
from safetensors.torch import load as load_torch

from checkpoint import writer
from checkpoint.reader import Checkpoint, CheckpointError
from checkpoint.safetensors_python import MAX_HEADER, read, read_arrays, write_arrays

DATA = struct.pack("<f", 1.5)
PLACE = '"shape":[1],"data_offsets":[0,4]'
INFO = '{"dtype":"F32",' + PLACE + "}"


def file(header: str | bytes, data: bytes = DATA, length: int | None = None) -> bytes:
    header = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def one(info: str, data: bytes = DATA) -> bytes:
    """A file of one tensor."""
    return file(f'{{"a":{info}}}', data)


def field(**changes: str) -> bytes:
    """A file of one tensor, some fields of which are other JSON."""
    fields = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0,4]"} | changes
    return one("{" + ",".join(f'"{name}":{value}' for name, value in fields.items()) + "}")


def taken(content: bytes) -> bool:
    """Whether both readers take a file, and fails if they differ in that or in a number."""
    try:
        real = load(content)
    except (SafetensorError, ValueError, KeyError, TypeError):
        real = None
    try:
        ours = read(content)
    except ValueError as error:
        assert str(error) and real is None, error
        return False
    assert real is not None
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: array.shape for name, array in real.items()
    }
    for name, tensor in ours.items():
        if real[name].size or max(tensor.shape, default=0) < 1000:
            # as text, in which NaN is NaN and -0.0 is not 0.0
            assert repr(tensor.tolist()) == repr(real[name].tolist())
    return True


TAKEN = {
    "plain": one(INFO),
    "no tensors": file("{}", b""),
    "space around it": file(f' \t\r\n{{"a":{INFO}}}  \n'),
    "fields in a list": one('["F32",[1],[0,4]]'),
    "a dtype as Rust writes enumerations": field(dtype='{"F32":null}'),
    "a scalar": field(shape="[]"),
    "many dimensions": field(shape=f"[{','.join(['1'] * 64)}]"),
    "unknown keys": field(x='{"y":[1,2.5e3,-0,null,true,"\\ud83d\\ude00"],"y":1e-999}'),
    "a large integer where none is needed": field(x="9" * 300),
    "an escaped key": one(INFO.replace("dtype", "d\\u0074ype")),
    "the empty name": file(f'{{"":{INFO}}}'),
    "a name twice, of which the last is right": file(
        f'{{"a":["F8_E4M3",[7],[9,1]],"a":["F32",[1],[5,9]],"a":{INFO}}}'
    ),
    "as deep as may be": field(x="[" * 125 + "]" * 125),
    "tensors in any order": file('{"b":["F32",[1],[4,8]],"a":["F32",[1],[0,4]]}', DATA * 2),
    "numbers at odd places": file('{"a":["U8",[1],[0,1]],"b":["F32",[1],[1,5]]}', b"\1" + DATA),
    "truth values other than 0 and 1": one('["BOOL",[2,2],[0,4]]', b"\0\1\2\xff"),
    "tensors without numbers": file(
        f'{{"a":{INFO},"b":["F32",[0],[4,4]],"c":["U8",[2,0,3],[0,0]],"d":["I8",[0,9],[4,4]]}}'
    ),
    "many empty lists": file('{"a":["F32",[1099511627776,0],[0,0]]}', b""),
    "as many as NumPy counts": file(f'{{"a":["F32",[0,{2**61 - 1}],[0,0]]}}', b""),
    "metadata": file(f'{{"a":{INFO},"__metadata__":{{"a":"b","a":"c"}}}}'),
    "metadata null": file(f'{{"__metadata__":null,"a":{INFO}}}'),
    "metadata alone": file('{"__metadata__":{}}', b""),
}
REFUSED = {
    "nothing": b"",
    "7 bytes": bytes(7),
    "no header": bytes(8),
    "a header beyond the end": file("{}", b"", length=3),
    "a header longer than memory": file("{}", length=2**64 - 1),
    "a header longer than is allowed": file("{}", length=MAX_HEADER + 1),
    "not UTF-8": file(b'{"\xff":' + INFO.encode() + b"}"),
    "UTF-16": file(f'{{"a":{INFO}}}'.encode("utf-16-le")),
    "a surrogate as UTF-8": file(b'{"\xed\xa0\x80":' + INFO.encode() + b"}"),
    "a byte order mark": file(f'\ufeff{{"a":{INFO}}}'),
    "NUL after it": file(f'{{"a":{INFO}}}\0'),
    "something after it": file(f'{{"a":{INFO}}} x'),
    "half of it": file(f'{{"a":{INFO}'),
    "a list": file(f'[["a",{INFO}]]'),
    "a string": file('"a"'),
    "null": file("null", b""),
    "a tensor that is null": one("null"),
    "a tensor that is a list of four": one('["F32",[1],[0,4],0]'),
    "a tensor without a dtype": one("{" + PLACE + "}"),
    "a dtype twice": one('{"dtype":"F32","dtype":"F32",' + PLACE + "}"),
    "offsets twice and no shape": one(
        '{"dtype":"F32","data_offsets":[0,4],"data_offsets":[0,4]}', bytes(4)
    ),
    "an unknown dtype": field(dtype='"f32"'),
    "a dtype that is a number": field(dtype="17"),
    "an enumeration with a value": field(dtype='{"F32":{}}'),
    "an enumeration of two": field(dtype='{"F32":null,"F32":null}'),
    "a name twice, of which the last is wrong": file(f'{{"a":{INFO},"a":["F32",[2],[0,4]]}}'),
    "a name twice, of which one has no form": file(f'{{"a":["F31",[1],[0,4]],"a":{INFO}}}'),
    "a name twice, of which one has three offsets": file(f'{{"a":["F32",[1],[0,4,4]],"a":{INFO}}}'),
    "too deep": field(x="[" * 126 + "]" * 126),
    "far too deep": field(x='{"a":' * 10**5 + "1" + "}" * 10**5),
    "a hole": file('{"a":["F32",[1],[0,4]],"b":["F32",[1],[8,12]]}', DATA * 3),
    "a hole at the start": file('{"a":["F32",[1],[4,8]]}', DATA * 2),
    "an overlap": file('{"a":["F32",[1],[0,4]],"b":["F32",[1],[2,6]]}', DATA * 2),
    "the same place twice": file('{"a":["F32",[1],[0,4]],"b":["F32",[1],[0,4]]}'),
    "unread bytes at the end": one(INFO, DATA + b"\0"),
    "bytes missing at the end": one(INFO, DATA[:3]),
    "too many dimensions": field(shape=f"[{','.join(['1'] * 65)}]"),
    "a product beyond 64 bits": field(shape="[4294967296,4294967296,0]"),
    "more than NumPy counts": file(f'{{"a":["F32",[0,{2**61}],[0,0]]}}', b""),
    "a dimension beyond 63 bits": file(f'{{"a":["U8",[{2**63},0],[0,0]]}}', b""),
    "metadata twice": file(f'{{"__metadata__":{{}},"\\u005f_metadata__":{{}},"a":{INFO}}}'),
    "metadata like a tensor": file(f'{{"__metadata__":{INFO}}}'),
}
WRONG_FIELDS = [
    ("shape", ["[2]", "[0]", "[-1,-1]", "[1.0]", "[-0]", "[1e0]", '["1"]', "[true]", "[null]"]),
    ("shape", ["[01]", "[1,]", "1", "null", "{}", "[[1]]", "[18446744073709551615]"]),
    ("data_offsets", ["[0,3]", "[0,5]", "[0,8]", "[1,5]", "[4,0]", "[4,8]", "[0]", "[0,4,4]"]),
    ("data_offsets", ["[0,-4]", "[-4,0]", "[0.0,4]", '{"0":0,"1":4}', "null", '"04"']),
    ("data_offsets", ["[18446744073709551612,0]", "[-0,4]"]),
    ("x", ["NaN", "-Infinity", "1e999", "1" + "0" * 309, "1" * 5000, "1.7976931348623158e308"]),
    ("x", ["01", "1.", ".5", "+1", "\uff11", "True", "/**/1", "", "{1:1}", "'a'"]),
    ("x", ['"\\ud800"', '{"\\udc00":0}', '"\t"', '"\\x41"', '"\\u00 1"']),
]
WRONG_METADATA = ["[]", "0", "false", '"x"', '[["a","b"]]', '{"a":1}', '{"a":null}', '{"a":{}}']
WRONG_METADATA += ['{"a":1,"a":"b"}', '{"a":"\\ud800"}']


@pytest.mark.parametrize("content", TAKEN.values(), ids=TAKEN)
def test_both_take(content):
    assert taken(content)


@pytest.mark.parametrize("content", REFUSED.values(), ids=REFUSED)
def test_both_refuse(content):
    assert not taken(content)


def test_both_refuse_a_field_or_metadata_that_is_another_value():
    for name, values in WRONG_FIELDS:
        for value in values:
            assert not taken(field(**{name: value})), (name, value)
    for value in WRONG_METADATA:
        assert not taken(file(f'{{"__metadata__":{value},"a":{INFO}}}')), value


def test_the_longest_header_and_one_byte_more():
    assert taken(file("{}".ljust(MAX_HEADER), b""))
    assert not taken(file("{}".ljust(MAX_HEADER + 1), b""))


# Numbers ------------------------------------------------------------------------------------------

DTYPES = ["f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?"]
shapes = st.lists(st.integers(0, 4), max_size=4)
arrays = st.builds(
    lambda dtype, shape, seed: np.frombuffer(
        np.random.default_rng(seed).bytes(math.prod(shape) * np.dtype(dtype).itemsize), dtype
    ).reshape(shape),
    st.sampled_from(DTYPES),
    shapes,
    st.integers(0, 2**32),
)
contents = st.builds(
    save,
    st.dictionaries(st.text(max_size=8), arrays, max_size=4),
    # not empty: safetensors 0.8.0 writes save({}, {}) so that it cannot read it
    st.none() | st.dictionaries(st.text(max_size=8), st.text(max_size=8), min_size=1, max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(contents)
def test_what_the_real_one_writes_is_read(content):
    assert taken(content)


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_every_number_of_16_bits(dtype):
    patterns = np.arange(2**16, dtype="<u2").tobytes()
    content = one(f'["{dtype}",[256,2,128],[0,{2**17}]]', patterns)
    assert repr(read(content)["a"].tolist()) == repr(load_torch(content)["a"].double().tolist())


def test_a_bfloat16_scalar():
    content = one('["BF16",[],[0,2]]', b"\xc0\x3f")
    assert read(content)["a"].tolist() == load_torch(content)["a"].item() == 1.5


@pytest.mark.parametrize("dtype, count", [("C64", 3), ("F8_E4M3", 24), ("F6_E2M3", 32), ("F4", 48)])
def test_dtypes_without_a_place_in_a_decoder(dtype, count):
    content = one(f'["{dtype}",[{count}],[0,24]]', bytes(24))
    assert deserialize(content)
    with pytest.raises(ValueError, match=f"no dtype {dtype}"):
        read(content)


def test_empty_lists_that_no_memory_holds():
    with pytest.raises(ValueError, match="too many empty lists"):
        read(TAKEN["many empty lists"])["a"].tolist()


# Damage -------------------------------------------------------------------------------------------

BYTES = st.sampled_from(b'{}[]",:\\0123456789-.eE \n\t\0\x7f\x80\xc3\xff_aFIU') | st.integers(
    0, 255
)
changes = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "delete", "copy"]), st.integers(0, 400), BYTES),
    min_size=1,
    max_size=4,
)


@settings(max_examples=400, deadline=None)
@given(contents, changes, st.booleans())
def test_damaged_files(content, changes, mend):
    """Bytes changed anywhere; `mend` corrects the length of the header, so that more is read."""
    (length,) = struct.unpack_from("<Q", content)
    data = len(content) - 8 - length
    damaged = bytearray(content[8:] if mend else content)
    for change, place, byte in changes:
        at = place % (len(damaged) + 1)
        before = damaged[max(0, at - byte % 16) : at]
        damaged[at : at + (change in ("set", "delete"))] = {
            "set": bytes([byte]),
            "insert": bytes([byte]),
            "delete": b"",
            "copy": bytes(before),
        }[change]
    if mend:
        length = max(0, len(damaged) - data)
        damaged = struct.pack("<Q", length) + damaged
    assume(b"C64" not in damaged and b"BF16" not in damaged)
    taken(bytes(damaged))


def often(right, *wrong, times=6):
    """Mostly what is right, so that several parts are right at once."""
    return st.sampled_from([right] * (times * len(wrong)) + list(wrong))


odd = st.sampled_from(
    ["null", "true", "-1", "-0", "1.0", "1e400", '"F32"', "{}", "[]", "[1]", "[[]]"]
)
NAMES = ['"t0"', '"\\u0074\\u0030"', '""', '"__metadata__"', '"\\ud800"', "t0"]
DTYPE_NAMES = {"F64": 8, "F32": 4, "F16": 2, "I64": 8, "U16": 2, "BOOL": 1, "F8_E4M3": 1, "F31": 4}


@st.composite
def headers(draw):
    """A file made of parts of which each may be wrong."""
    parts, place = [], 0
    for i in range(draw(st.integers(0, 3))):
        name = draw(often(f'"t{i}"', *NAMES))
        dtype = draw(often("F32", *DTYPE_NAMES, times=1))
        shape = draw(st.lists(often(1, 0, 2, 3, 2**32, 2**63, times=1), max_size=3))
        size = min(math.prod(shape) * DTYPE_NAMES[dtype], 2**65)
        first, last = (n + draw(often(0, 1, -1, 4)) for n in (place, place + size))
        fields = [
            ("dtype", json.dumps(dtype)),
            ("shape", json.dumps(shape)),
            ("data_offsets", json.dumps([first, last])),
        ]
        fields = [
            (name, draw(odd) if draw(often(False, True)) else right) for name, right in fields
        ]
        fields += draw(often([], [("x", draw(odd))], fields[:1], times=2))
        fields = draw(st.permutations(fields))
        as_list = draw(often(False, True))
        info = ",".join(value if as_list else f'"{name}":{value}' for name, value in fields)
        parts.append(f"{name}:{'[' if as_list else '{'}{info}{']' if as_list else '}'}")
        place += size if draw(often(True, False)) else 0
    parts += draw(often([], ['"__metadata__":{"a":"b"}'], [f'"__metadata__":{draw(odd)}']))
    header = "{" + ",".join(draw(st.permutations(parts))) + "}"
    return file(header, bytes(min(place, 2**10)))


@settings(max_examples=500, deadline=None)
@given(headers())
def test_headers_of_right_and_wrong_parts(content):
    taken(content)


# In a checkpoint ----------------------------------------------------------------------------------


def test_a_checkpoint_gives_lists(tmp_path):
    weights = {"W": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32([0.1])}
    files = {"model.safetensors": save(weights), "broken": b"{}"}
    files["empty"] = TAKEN["many empty lists"]
    found = Checkpoint(writer.save(tmp_path, 1, files))
    assert found.lists("model.safetensors") == {name: w.tolist() for name, w in weights.items()}
    assert found.lists("model.safetensors").keys() == found.tensors("model.safetensors").keys()
    for name in ("broken", "empty"):
        with pytest.raises(CheckpointError, match=f"{name}: not a safetensors file: "):
            found.lists(name)
    with pytest.raises(CheckpointError, match="none is not part of this checkpoint"):
        found.lists("none")


def test_arrays_are_written_as_the_real_library_writes_them():
    arrays = {
        "b": np.arange(12, dtype=np.float32).reshape(3, 4).T,
        "a": np.float32(2.5).reshape(()),
        "\u00fc": np.zeros((0, 3), np.float32),
    }
    real = {name: np.array(array, order="C") for name, array in arrays.items()}
    assert write_arrays(arrays) == save(real)
    dtypes = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?")
    mixed = {dtype: np.arange(3).astype(dtype) for dtype in dtypes}
    for found in (load(write_arrays(mixed)), read_arrays(save(mixed))):
        assert found.keys() == mixed.keys()
        for name, array in mixed.items():
            assert found[name].dtype == array.dtype and found[name].tolist() == array.tolist()
    assert all(a.flags.writeable and a.flags.aligned for a in read_arrays(save(mixed)).values())
