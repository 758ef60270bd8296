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
    # vLLM 0.19 sizes its pool by a run with all requests and tokens. Its sampler holds, for each
    # request and word, the logit in bf16 and in fp32, the probability, and the random number that
    # divides it; its top-p filter (0.17 and later) keeps a row of the vocabulary in fp32 an SM.
    logit_bytes=2 + 4 + 4 + 4,
    scratch_logit_bytes=4,
    # A first start compiles inside that run, and vLLM takes the peak of it for activations (its
    # issue 54122). 0.8 GiB: a published first start on an RTX 4090 (Qwen3-4B, vLLM 0.27); another
    # (Qwen3-32B on two, issue 54383) lost 0.47 GiB against a second start, which makes 0.87 GiB.
    compile_bytes=858993459,
    # 0.25 GiB outside torch on one rank and 2.07 GiB on two, vLLM 0.19 on H100 ("Capacity Planner
    # Accuracy Report"), and a cuBLAS workspace of 32 MiB.
    reserved_bytes=301989888,
    rank_reserved_bytes=1954210120,
)
"""vLLM's second engine (0.19) as its server first starts: chunked prompts, decodes first."""

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
