"""Question 3 for elastic instances, and what proactive scale-down sends.

Requests are prefilled by 1 to 4 instances whose KV then lies anywhere, moves, and is decoded by
masters that change in every round: the tokens must be those of one rank.
"""

from __future__ import annotations

from backends.elastic_serving import ElasticRun, serve_elastic
from backends.reference import KeepLogits, OneRank
from backends.serving import RANDOM
from backends.transformer import Transformer
from backends.weights import load_model, random_model
from scenarios.validation.elastic import LIMITS, NUM_INSTANCES, exact_bytes, tiny_scaling
from scenarios.validation.elastic_script import RINGS, EveryWay, TwoRings
from scenarios.validation.elastic_traffic import CHANGES, Watched
from scenarios.validation.numbers import all_at_once, judge_answers, number_lines
from scenarios.validation.several_ranks import prompts_of
from scenarios.validation.verdict import Line
from sim.engine import ReplicaLimits
from sim.workload.recorded import Recorded

LOGITS_ACCEPTED = 1e-4
"""Largest difference of a logit, float32 on both sides."""
WARM_TOKENS = 64
"""Batches up to this size are prepared; nothing here is timed."""
LENGTHS = (17, 64, 5, 33, 90, 48)
"""Prompts of the two rings that are compared: some divide among two ranks and some do not."""


def elastic_number_lines(
    weights: str, num_prompts: int, new_tokens: int, device: str
) -> list[Line]:
    """Tokens and logits against those of one rank.

    Args:
        weights: as `backends.serving.open_model` takes it.
        num_prompts: requests.
        new_tokens: of each answer.
        device: of the ranks and of the reference.
    """
    model = random_model() if weights == RANDOM else load_model(weights)
    asked = prompts_of(model, num_prompts)
    plan = Watched(EveryWay())
    room = sum(len(prompt) + new_tokens for prompt in asked)
    served = serve_elastic(
        ElasticRun(
            weights=weights, num_instances=NUM_INSTANCES, plan=plan, prompts=asked,
            limits=ReplicaLimits(len(asked), WARM_TOKENS, 1, room),
            scaling=tiny_scaling(NUM_INSTANCES), workload=all_at_once(asked, new_tokens),
            device=device, sampler=KeepLogits(),
        )
    )  # fmt: skip
    kept = KeepLogits()
    for one in served.samplers:
        assert isinstance(one, KeepLogits)
        kept.logits |= one.logits
    reference = OneRank(Transformer(model.config, model.weights, device))
    expected = reference.generate(asked, new_tokens)
    answers = [served.answers[at] for at in range(len(asked))]
    found = judge_answers(asked, answers, expected, kept, reference)
    changes = ", ".join(f"{plan.traffic.changes[name]} {name}" for name in CHANGES)
    about = f"; on groups of 1 to {NUM_INSTANCES}: {changes}"
    if weights == RANDOM:
        about += "; of a tiny model of random weights"
    return number_lines("every kind of group", found, len(asked), "one rank's", about,
                        LOGITS_ACCEPTED)  # fmt: skip


def scale_down_line(device: str) -> Line:
    """Ring bytes of the same prefills on two pairs of instances: one scales down, one does not."""
    plan = TwoRings(len(LENGTHS))
    served = serve_elastic(
        ElasticRun(
            num_instances=4, plan=plan, limits=LIMITS._replace(num_blocks=2 * sum(LENGTHS)),
            scaling=tiny_scaling(4), device=device,
            workload=Recorded(
                arrival_s=[0.0] * (2 * len(LENGTHS)), prompt_tokens=[*LENGTHS, *LENGTHS],
                output_tokens=[1] * (2 * len(LENGTHS)),
            ),
        )
    )  # fmt: skip
    everywhere, down = (
        sum(one.payload_bytes for one in served.sent if one.rank in pair) for pair in RINGS
    )
    return exact_bytes(
        "proactive scale-down: bytes sent beside those of keeping KV everywhere", everywhere, down,
        "measured on both sides: rings of two that prefill the same prompts",
    )  # fmt: skip
