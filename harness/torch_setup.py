"""How a process that trains sets up torch."""

import os

# For glibc: no mapping of its own for a tensor below 32 MiB, and up to 4 GiB kept when it is free. Tensors come and go
# by the thousand in a step; otherwise their memory goes back to the system, and its pages are made anew each time.
_MALLOC = "glibc.malloc.mmap_threshold=33554432:glibc.malloc.trim_threshold=4294967296"


def set_up_environment(threads: int) -> None:
    """What libraries read when they are loaded, which may be before a process's own code runs.

    For processes that are started afterwards; settings of memory that the user has made stay.
    """
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
    if not any(name == "GLIBC_TUNABLES" or name.startswith("MALLOC_") for name in os.environ):
        os.environ["GLIBC_TUNABLES"] = _MALLOC


def set_up_torch(threads: int) -> None:
    """Threads, and on the CPU numbers that are the same every time.

    On a GPU attention's gradients are not. Torch has kernels for it that are, and takes them only where every operation
    without one is an error.
    """
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would write over the live table and fill log.txt
    torch.set_num_threads(threads)
    # cuDNN's attention plans for each new shape, which takes longer than attending; here nearly every shape is new.
    torch.backends.cuda.enable_cudnn_sdp(False)
    if torch.get_num_interop_threads() != 1:  # may be set only once in a process
        torch.set_num_interop_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's matrix products are not repeatable
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that comes with the line above and costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
