"""Device functions of all kernels: rounding that does not depend on the launch."""

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except Exception:  # a Triton for another vendor: early starts are of CUDA alone, and never compiled
    gdc_launch_dependents = gdc_wait = None

# read once, like every @triton.jit does when its module is imported
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """The float32 ``x`` in ``dtype``, rounded to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # the interpreter would cut the low half off, so leave nothing there to cut
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def await_previous():
    """In a kernel launched early (``early_start``): wait for all that went before on the stream.

    Later code may read the previous kernel's results and overwrite its inputs. The next kernel may
    take its place on the device meanwhile, and waits in turn.
    """
    gdc_wait()
    gdc_launch_dependents()
