"""Real engines as replicas model them, and the limits that they choose for a device."""

from hardware_models.schema import Gpu
from sim.engine import Engine
from sim.units import GIB

VLLM_V1 = Engine(
    name="vllm_v1",
    default_batching="chunked_prefill",
    max_num_seqs=None,
    max_num_batched_tokens=None,
    prefix_caching=True,
    schedules_ahead=True,
    # Assumed, not fitted: inputs are copied, small kernels prepare them, and a CUDA graph is
    # launched, although the next iteration is scheduled ahead. `benchmarks/real_requests.py --fit`
    # prints what a recorded run would ask for.
    iteration_overhead_s=5e-4,
    # Peak of a dummy sampling step, vLLM 0.11 on H100: 4.76 GiB for 1,024 sequences of 128,256
    # words, 5.56 and 5.64 GiB for 151,936 words ("vLLM Empirical Memory Profiling Results").
    logit_bytes=38.7,
    # Non-torch memory in the same table: 0.13 GiB on one rank, 0.54 GiB on two.
    reserved_bytes=139586437,
    rank_reserved_bytes=440234148,
)
"""vLLM's second engine (0.11 to 0.19) as its server starts: chunked prompts, decodes first."""

ENGINES = {"diptych": Engine(), "vllm_v1": VLLM_V1}
"""Every engine profile by its name on the command line."""


def batch_limits(engine: Engine, gpu: Gpu | None) -> tuple[int, int]:
    """(`max_num_seqs`, `max_num_batched_tokens`), those left open as vLLM's server sets them.

    It takes 1,024 sequences and 8,192 tokens on devices of 70 GiB and more, but for the A100, and
    256 and 2,048 on others (`EngineArgs.get_batch_defaults`), and never more sequences than tokens.
    """
    large = (
        gpu is not None
        and gpu.peak.memory_bytes >= 70 * GIB
        and not gpu.name.lower().startswith("a100")
    )
    sequences, tokens = (1024, 8192) if large else (256, 2048)
    tokens = engine.max_num_batched_tokens or max(tokens, engine.max_num_seqs or 0)
    return engine.max_num_seqs or min(sequences, tokens), tokens
