"""How a process that trains sets up torch."""

import os


def set_up_torch(threads: int) -> None:
    """Threads on the CPU, and numbers that are the same every time."""
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
