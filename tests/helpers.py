"""What the kernel tests share."""

import torch

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def relative_error(out, expected):
    """‖out − expected‖ / ‖expected‖ in double; the absolute error where ``expected`` is zero. NaN never passes."""
    out, expected = out.detach().double().cpu(), expected.detach().double().cpu()
    assert out.shape == expected.shape
    error = (out - expected).norm()
    scale = expected.norm()
    return (error / scale if scale > 0 else error).item()


def saved_bytes(function, *inputs):
    """Bytes that ``function`` saves for backward, the storages of ``inputs`` not counted."""
    mine = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in mine:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(saved.values())
