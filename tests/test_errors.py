import errno

import numpy as np
import pytest

from ldm.errors import (
    InputError,
    NotFinite,
    OutOfMemory,
    escaped,
    is_out_of_memory,
    memory_advice,
    shown,
)


def numpy_error():
    with pytest.raises(MemoryError) as caught:
        np.empty(2**62, np.uint8)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        numpy_error(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"),
        RuntimeError("could not create a primitive"),
        RuntimeError("unable to mmap 4265146304 bytes from file </m.ckpt>: Cannot allocate memory"),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
        RuntimeError("std::bad_alloc"),
        ImportError("libx.so: failed to map segment from shared object: Cannot allocate memory"),
    ],
)
def test_too_little_memory_is_recognised_however_it_is_said(error):
    assert is_out_of_memory(error)
    expected = pytest.raises(OutOfMemory, match=r"^there is not enough memory: lower it$")
    with expected as caught, memory_advice("lower it"):
        raise error
    assert (caught.value.exit_code, InputError("x").exit_code) == (3, 2)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        InputError("prompt 'out of memory': no"),
        KeyboardInterrupt(),
    ],
)
def test_other_errors_stay_what_they_are(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, memory_advice():
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a b", "'a b'"),
        ("häuser 家", "'häuser 家'"),
        ("two\nlines", r"'two\nlines'"),
        ("\x1b[31mred\x07", r"'\x1b[31mred\x07'"),
        ("gpj.\u202eexe", r"'gpj.\u202eexe'"),
        ("\ud800", r"'\ud800'"),
        (1.5, "1.5"),
        (None, "None"),
        ([1, 2], "[1, 2]"),
    ],
)
def test_a_value_is_one_printable_line(value, text):
    assert shown(value) == text


LONG = ["x" * 10**6, "\x00" * 10**6, [list(range(10**5))] * 9, 10**5000]


@pytest.mark.parametrize("value", LONG, ids=["text", "zeros", "lists", "number"])
def test_a_long_value_is_cut(value):
    assert len(shown(value)) <= 82
    assert shown(value).rstrip("'").endswith("...") or "..." in shown(value)


def test_a_list_that_holds_itself_and_a_broken_repr():
    loop = []
    loop.append(loop)
    assert "..." in shown(loop)

    class Broken:
        def __repr__(self):
            raise RuntimeError

    assert "Broken" in shown(Broken())


def test_a_name_has_no_quotes():
    assert escaped("a/b\tc") == r"a/b\tc"
    assert escaped("abcdefgh", limit=6) == "abc..."


def test_a_stage_without_numbers_is_named_in_a_whole_sentence():
    """Also in programs that know nothing to add, such as appendix_f."""
    error = NotFinite("the U-Net")
    assert error.stage == "the U-Net"
    assert str(error) == "the U-Net gives values that are not numbers, in float32 too"
