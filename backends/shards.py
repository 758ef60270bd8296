"""A rank's share of a model: some layers, and in each of them some heads and MLP columns.

Megatron-LM's split (Shoeybi et al., 2019, section 3). Query, key and value are split by heads, gate
and up by their outputs, the output and down projections by their inputs, embedding and lm_head by
the vocabulary. Norms are whole on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.functional import pad

from backends.checkpoints import INVERSE_FREQUENCIES
from backends.weights import Model
from sim.models.architecture import Architecture
from sim.models.parallel import stage_part
from sim.models.split import require_parallel, stage_layers

BY_OUTPUTS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
BY_INPUTS = ("o_proj", "down_proj")
BY_VOCABULARY = ("embed_tokens", "lm_head")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which part of a model a rank has; ranks of a stage follow one another."""

    rank: int
    tp_size: int = 1
    pp_size: int = 1

    @property
    def place(self) -> int:
        """Place among the ranks of the stage."""
        return self.rank % self.tp_size

    @property
    def stage(self) -> int:
        """Which stage, counted from the tokens."""
        return self.rank // self.tp_size

    @property
    def is_first(self) -> bool:
        """Whether it embeds the tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it computes logits."""
        return self.stage == self.pp_size - 1

    def stage_ranks(self, stage: int) -> range:
        """All ranks of a stage."""
        return range(stage * self.tp_size, (stage + 1) * self.tp_size)


def require_shares(architecture: Architecture, tp_size: int, pp_size: int) -> None:
    """Refuse sizes that do not divide the model, or that ranks here cannot take shares for.

    Raises:
        ValueError: as `require_parallel`, or a layer with experts is to be split.
    """
    require_parallel(architecture, tp_size, pp_size)
    if tp_size > 1 and architecture.sparse_layers:
        raise ValueError(
            f"tp_size={tp_size} must be 1 for {architecture.name}: its "
            f"{architecture.num_experts} experts a layer are not split among ranks here, only the "
            "layers of dense models are; split it into stages by pp_size, or run it on one rank"
        )


def share_of(model: Model, share: Share) -> tuple[Architecture, dict[str, Tensor]]:
    """The architecture and the weights of a rank, layers counted from 0.

    The architecture keeps the whole vocabulary: it says which tokens there are.

    Raises:
        ValueError: the sizes do not divide the model, or would cut its experts.
    """
    config, tp_size = model.config, share.tp_size
    require_shares(config, tp_size, share.pp_size)
    layers = stage_layers(config.num_layers, share.pp_size)[share.stage]
    part = replace(
        stage_part(config, share.pp_size, share.stage),
        num_heads=config.num_heads // tp_size,
        num_kv_heads=config.num_kv_heads // tp_size,
        intermediate_size=config.intermediate_size // tp_size,
    )
    weights = _outer_weights(model.weights, config, share)
    for index, layer in enumerate(layers):
        old = f"model.layers.{layer}."
        for name, tensor in model.weights.items():
            if name.startswith(old):
                cut = _cut(name, tensor, share)
                if cut is not None:
                    weights[f"model.layers.{index}.{name.removeprefix(old)}"] = cut
    return part, weights


def _outer_weights(
    weights: Mapping[str, Tensor], config: Architecture, share: Share
) -> dict[str, Tensor]:
    """What lies before and after the layers, where this rank needs it."""
    names = {INVERSE_FREQUENCIES}
    if share.is_first or (share.is_last and config.tie_embeddings):
        names.add("model.embed_tokens.weight")
    if share.is_last:
        names |= {"model.norm.weight", "lm_head.weight"}
    cuts = {name: _cut(name, weights[name], share) for name in names if name in weights}
    return {name: tensor for name, tensor in cuts.items() if tensor is not None}


def _cut(name: str, tensor: Tensor, share: Share) -> Tensor | None:
    """This rank's part of one tensor; None: another rank has it."""
    *_, module, kind = ["", "", *name.split(".")]
    if share.tp_size == 1:
        return tensor
    if module in BY_VOCABULARY:
        return _rows(pad(tensor, (0, 0, 0, -len(tensor) % share.tp_size)), share)
    if module in BY_OUTPUTS:
        return _rows(tensor, share)
    if module in BY_INPUTS:
        if kind == "bias":  # of the sum, so it is added once
            return tensor if share.place == 0 else None
        return _rows(tensor.T, share).T
    return tensor


def _rows(tensor: Tensor, share: Share) -> Tensor:
    # Cloned, so that the whole does not stay in memory behind the part.
    return tensor.chunk(share.tp_size)[share.place].clone()
