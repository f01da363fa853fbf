"""Which device to compute on, in which precision, whether to compile, and how fast the device could be."""

import re
import time
from contextlib import contextmanager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.errors import UserError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# (dense bfloat16 FLOP/s, memory in GB): float16 on the V100 and T4, which have no bfloat16; an MI250X is two devices.
# NVIDIA's from its datasheets; AMD's as AMD's own profiling tools, torchtitan and reviews quote its datasheets; Apple's
# from its newsroom (M1, M2), and for their larger siblings cores x 256 FLOP x 1.3 GHz (M1) or 1.4 GHz (M2), in 32 or 16
# bits. Where a GPU comes in two sizes, the larger.
GPUS = {'B200': (2250e12, 180), 'H200': (989e12, 141), 'H100 PCIe': (756e12, 80), 'H100': (989e12, 80),
        'A100': (312e12, 80), 'A40': (150e12, 48), 'A10': (125e12, 24), 'L40S': (362e12, 48), 'L40': (181e12, 48),
        'L4': (121e12, 24), 'RTX 5090': (210e12, 32), 'RTX 4090': (165e12, 24), 'RTX 3090': (71e12, 24),
        'V100': (125e12, 32), 'T4': (65e12, 16),
        'MI355X': (2517e12, 288), 'MI325X': (1307e12, 256), 'MI300X': (1307e12, 192), 'MI250X': (192e12, 64),
        'MI210': (181e12, 64), 'MI100': (92e12, 32), 'RX 7900 XTX': (123e12, 24),
        'M2 Ultra': (27e12, 192), 'M2 Max': (13.6e12, 96), 'M2 Pro': (6.8e12, 32), 'Apple M2': (3.6e12, 24),
        'M1 Ultra': (21e12, 128), 'M1 Max': (10.4e12, 64), 'M1 Pro': (5.2e12, 32), 'Apple M1': (2.6e12, 16)}


def pick_device(device='auto'):
    """'auto' is cuda, else mps, else cpu. Raises UserError for any other device that cannot be used."""
    if device == 'auto':
        return 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        torch.zeros(1, device=device).item()  # 'meta' has no values
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise UserError(f'device={device} cannot be used here ({str(error).splitlines()[0]}): try --device=cpu')
    if device.startswith('cuda:'):
        torch.cuda.set_device(device)  # else events, synchronize() and the like are the first GPU's
    return device


def pick_dtype(dtype, device):
    """'auto' is bfloat16 where the hardware multiplies it, else float16 on a GPU, else float32."""
    if dtype == 'auto':
        if 'cuda' in device:
            return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
        cpu = torch.cpu.get_capabilities() if device == 'cpu' else {}
        return 'bfloat16' if cpu.get('amx_bf16') or cpu.get('avx512_bf16') else 'float32'
    if dtype not in DTYPES:
        raise UserError(f'dtype={dtype} is not one of auto, {", ".join(DTYPES)}')
    return dtype


def autocast(dtype, device):
    """The context in which matrix products run in dtype while weights stay float32."""
    if dtype == 'float32':
        return nullcontext()
    return torch.autocast(torch.device(device).type, DTYPES[dtype])


def pick_compile(compile, device, print=print):
    """'auto' is True where torch.compile works, which compiling one addition shows; else a line is printed."""
    if compile in (True, False):
        return compile
    if compile != 'auto':
        raise UserError(f'compile={compile} is not one of auto, True, False')
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
        return True
    except Exception as error:  # no compiler, no Python headers, no Triton: each has an exception of its own
        print(f'not compiling, since torch.compile does not work here: {str(error).splitlines()[0]}')
        return False


def fetch(x):
    """Start to copy a tensor to the host. Returns a function that waits for the copy, and gives it as a list."""
    copy = x.to('cpu', non_blocking=x.is_cuda)  # into pinned memory; mps has no event to wait for
    arrived = torch.cuda.current_stream().record_event() if x.is_cuda else None

    def wait():
        if arrived:
            arrived.synchronize()
        return copy.tolist()
    return wait


def synchronize(device):
    """Wait until the device has finished its work."""
    torch.get_device_module(device).synchronize()


def device_name(device):
    """What a GPU calls itself: 'NVIDIA H100 80GB HBM3', 'AMD Instinct MI300X', 'Apple M2 Max'; else ''."""
    if 'cuda' in device:
        return torch.cuda.get_device_name()
    return torch.backends.mps.get_name() if 'mps' in device else ''


def peak_flops(dtype, device):
    """Peak FLOP/s of this device: from GPUS if it is there, else the best of five large matrix products, measured now
    (less than a tenth of a second on a CPU)."""
    name = device_name(device)
    for gpu, (flops, _) in GPUS.items():
        if re.search(rf'\b{gpu}\b', name) and dtype != 'float32':  # an A10G is no A10
            return flops
    n = 768 if device == 'cpu' else 4096
    if device == 'cpu' and dtype == 'float16':
        dtype = 'float32'  # float16 is emulated there
    a, b = (torch.randn(n, n, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    best = float('inf')
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


@contextmanager
def cpu_vector_kernels(on):
    """While on, PyTorch uses the CPU kernels that are fastest for one token in bfloat16: its own matrix-vector product,
    twice as fast as oneDNN's, and unfused attention, three times as fast as fused."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and not on
    try:
        with sdpa_kernel(SDPBackend.MATH) if on else nullcontext():
            yield
    finally:
        torch.backends.mkldnn.enabled = before
