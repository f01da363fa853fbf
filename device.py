"""Which device to compute on, in which precision, whether to compile, and how fast the device could be."""

import sys
import time
from contextlib import nullcontext

import torch

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# dense bfloat16 FLOP/s of NVIDIA's datasheets (float16 on the V100 and T4, which have no bfloat16)
PEAK_FLOPS = {'B200': 2250e12, 'H200': 989e12, 'H100 PCIe': 756e12, 'H100': 989e12, 'A100': 312e12, 'A10': 125e12,
              'L40S': 362e12, 'L4': 121e12, 'RTX 5090': 210e12, 'RTX 4090': 165e12, 'RTX 3090': 71e12,
              'V100': 125e12, 'T4': 65e12}


def pick_device(device='auto'):
    """'auto' is cuda, else mps, else cpu; any other name must be a device that is there. Exits if it is not."""
    if device == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        sys.exit(f'device={device} cannot be used here ({str(error).splitlines()[0]}): try --device=cpu')
    return device


def pick_dtype(dtype, device):
    """'auto' is bfloat16 where the hardware multiplies it, else float16 on a GPU, else float32."""
    if dtype == 'auto':
        if 'cuda' in device:
            return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
        cpu = torch.cpu.get_capabilities() if device == 'cpu' else {}
        return 'bfloat16' if cpu.get('amx_bf16') or cpu.get('avx512_bf16') else 'float32'
    if dtype not in DTYPES:
        sys.exit(f'dtype={dtype} is not one of auto, {", ".join(DTYPES)}')
    return dtype


def autocast(dtype, device):
    """The context in which matrix products run in dtype while weights stay float32."""
    if dtype == 'float32':
        return nullcontext()
    return torch.autocast(torch.device(device).type, DTYPES[dtype])


def keep_products_in(dtype, model):
    """Store the weights of matrix products in dtype, to write with: they are what autocast would make of them, and need
    not be made anew for every token. Everything else stays float32, the token embedding too."""
    embedding = model.transformer.wte
    embedding.weight = torch.nn.Parameter(embedding.weight.detach().clone())  # else it is the head's
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.to(DTYPES[dtype])


def pick_compile(compile, device):
    """'auto' is True where torch.compile works, which it finds out by compiling one addition."""
    if compile in (True, False):
        return compile
    if compile != 'auto':
        sys.exit(f'compile={compile} is not one of auto, True, False')
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
        return True
    except Exception as error:  # no compiler, no Python headers, no Triton: each has an exception of its own
        print(f'not compiling, since torch.compile does not work here: {str(error).splitlines()[0]}')
        return False


def synchronize(device):
    """Wait until the device has done all it was given."""
    if 'cuda' in device:
        torch.cuda.synchronize()
    elif 'mps' in device:
        torch.mps.synchronize()


def peak_flops(dtype, device):
    """FLOP/s this device could do: from its datasheet if it is a known GPU, else the best of five large matrix
    products, measured now (a fifth of a second on a CPU)."""
    if 'cuda' in device:
        name = torch.cuda.get_device_name()
        for gpu, flops in PEAK_FLOPS.items():
            if gpu in name and dtype != 'float32':
                return flops
    n = 4096 if 'cuda' in device else 1024
    if device == 'cpu' and dtype == 'float16':
        dtype = 'float32'  # as fast as it gets: float16 is emulated there
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    best = float('inf')
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
