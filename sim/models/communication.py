"""What the ranks of one replica send each other in an iteration: payload, by what it carries.

Tensor parallel as in Megatron-LM (Shoeybi et al., 2019, section 3): columns of the first matrix of
a pair and rows of the second, so that each pair costs one all-reduce; the vocabulary is split too.
Pipeline parallel: a stage hands its hidden states to the next.
"""

from typing import Literal, NamedTuple

from sim.models.dimensions import Architecture
from sim.models.work import IterationShape

TOKEN_ID_BYTES = 8
"""A sampled token goes back to the first stage as one whole number."""

Operation = Literal["all_reduce", "all_gather", "send_receive"]


class Collective(NamedTuple):
    """One thing that ranks do together, `count` times an iteration."""

    name: str
    """What is carried: embedding, attention_output, mlp_output, logits, hidden_states or tokens."""
    operation: Operation
    payload_bytes: int
    """Of the tensor that each rank hands in; of a send_receive what goes from one to the other."""
    # Hides tuple.count, as in `sim.models.work.Operator`.
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]
    """Executions in the iteration, over all groups of `ranks`."""
    ranks: int
    """In one group; 2 for a send_receive."""

    @property
    def total_bytes(self) -> int:
        """Payload of all ranks and executions; that of a send_receive is handed in once."""
        senders = 1 if self.operation == "send_receive" else self.ranks
        return self.payload_bytes * self.count * senders


def iteration_collectives(
    architecture: Architecture,
    shape: IterationShape,
    tp_size: int,
    pp_size: int,
    dtype_bytes: int,
) -> list[Collective]:
    """What one iteration sends, in order; what carries nothing is left out.

    Between stages goes the sum of a layer's output and its residual, one tensor; every rank of a
    stage has all of it and sends it to its counterpart in the next. The logits are those of the
    vocabulary padded to equal parts. Of several stages the last one samples.

    Args:
        architecture: the model; experts are split as an MLP is, and cost the same all-reduce.
        shape: the batch.
        tp_size: ranks that share every layer.
        pp_size: stages that share the layers out.
        dtype_bytes: bytes of an element of weights and activations.
    """
    rows, sampled = shape.tokens, shape.sampled_tokens
    hidden_bytes = rows * architecture.hidden_size * dtype_bytes
    logit_bytes = sampled * -(-architecture.vocab_size // tp_size) * dtype_bytes
    layers = architecture.num_layers
    found: list[Collective] = []
    if tp_size > 1 and rows:
        found += [
            Collective("embedding", "all_reduce", hidden_bytes, 1, tp_size),
            Collective("attention_output", "all_reduce", hidden_bytes, layers, tp_size),
            Collective("mlp_output", "all_reduce", hidden_bytes, layers, tp_size),
        ]
    if pp_size > 1 and rows:
        pairs = (pp_size - 1) * tp_size
        found.append(Collective("hidden_states", "send_receive", hidden_bytes, pairs, 2))
    if tp_size > 1 and sampled:
        found.append(Collective("logits", "all_gather", logit_bytes, 1, tp_size))
    if pp_size > 1 and sampled:
        found.append(Collective("tokens", "send_receive", sampled * TOKEN_ID_BYTES, 1, 2))
    return found
