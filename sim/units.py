"""Names for powers of ten and two, so that a number in code reads like the datasheet it is from."""

KB, MB, GB, TB = 1e3, 1e6, 1e9, 1e12
KIB, MIB, GIB = 2**10, 2**20, 2**30
TFLOPS = 1e12
MS, US = 1e-3, 1e-6


def human_bytes(num_bytes: float) -> str:
    """`num_bytes` with a binary unit, for messages and tables."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"
