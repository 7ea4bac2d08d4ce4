import errno

import numpy as np
import pytest

from ldm.errors import InputError, OutOfMemory, is_out_of_memory, memory_advice


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
    expected = pytest.raises(OutOfMemory, match="^there is not enough memory: lower it$")
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
