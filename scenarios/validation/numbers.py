"""Question 3: are the real panel's tokens those of transformers, and how far apart are logits?"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from backends.reference import KeepLogits, OneRank, Reference
from backends.serving import serve
from backends.tokenizer import Tokenizer
from backends.transformer import Transformer
from scenarios.validation.openings import SYSTEM, TEXTS
from scenarios.validation.verdict import Line, Verdict, judge_exact
from sim.engine import ReplicaLimits
from sim.policies.batching.base import Batching
from sim.workload.recorded import Recorded
from sim.workload.source import Source

LOGITS_ACCEPTED = 1e-3
"""Largest difference of a logit, float32 on both sides; logits are of the order of ten."""
NEAR_TIES_PER_TOKENS = 1000
"""At most one near tie in so many tokens, rounded up: one may always happen."""


class Comparison(NamedTuple):
    """What came out of comparing answers."""

    num_tokens: int
    wrong: int
    """Tokens that differ although the reference's margin is clear."""
    near_ties: int
    """Tokens that differ where the margin is below twice the logit error."""
    logit_error: float
    """Largest difference of any logit on the same tokens."""


def compare(  # noqa: PLR0913  a model, its reference, a policy and its load
    model: Transformer, folder: Path, reference: Reference, batching: Batching,
    num_prompts: int, new_tokens: int, *, prefix_caching: bool = False,
) -> Comparison:  # fmt: skip
    """Answer the prompts with the replica and with transformers, greedily.

    Where a token differs, the reference goes on from the replica's token (teacher forcing), so that
    every later token is compared too. With prefix caching all prompts begin with one system prompt.
    """
    tokenizer = Tokenizer(folder)
    begin = SYSTEM if prefix_caching else ""
    asked = [tokenizer.encode(begin + text) for text in TEXTS[:num_prompts]]
    kept = KeepLogits()
    served = serve(
        model, Source(all_at_once(asked, new_tokens), 0, model.max_context), batching,
        tight_limits(asked, new_tokens, prefix_caching=prefix_caching),
        prompts=lambda request: asked[request.request_id], sampler=kept,
    )  # fmt: skip
    answers = [served.answers[index] for index in range(len(asked))]
    generated = reference.generate(asked, new_tokens)
    return judge_answers(asked, answers, generated, kept, reference)


def all_at_once(asked: list[list[int]], new_tokens: int) -> Recorded:
    """The prompts as requests of t = 0."""
    return Recorded(
        arrival_s=[0.0] * len(asked), prompt_tokens=[len(ids) for ids in asked],
        output_tokens=[new_tokens] * len(asked),
    )  # fmt: skip


def tight_limits(
    asked: list[list[int]], new_tokens: int, *, prefix_caching: bool = False
) -> ReplicaLimits:
    """Room for a part of the requests only: batches change, and some requests are pre-empted."""
    longest = max(map(len, asked)) + new_tokens
    return ReplicaLimits(12, 192, 16, max(8, 3 * -(-longest // 16)), prefix_caching)


def judge_answers(
    asked: list[list[int]], answers: list[list[int]], generated: list[list[int]],
    kept: KeepLogits, reference: Reference | OneRank,
) -> Comparison:  # fmt: skip
    """Compare answers token by token, with logits on the replica's own tokens."""
    wanted: list[list[np.ndarray]] = []
    error = 0.0
    for index, (prompt, answer) in enumerate(zip(asked, answers, strict=True)):
        rows = list(reference.logits(prompt, answer))
        ours = [kept.logits[index, len(prompt) + step] for step in range(len(answer))]
        error = max(error, *(float(np.abs(a - b).max()) for a, b in zip(ours, rows, strict=True)))
        wanted.append(rows)
    wrong = near = 0
    for answer, expected, rows in zip(answers, generated, wanted, strict=True):
        for step, token in enumerate(answer):
            # Up to the first difference `generate` speaks, after it the teacher-forced logits.
            forced = answer[:step] != expected[:step]
            best = int(rows[step].argmax()) if forced else expected[step]
            if token == best:
                continue
            margin = float(rows[step][best] - rows[step][token])
            near += margin < 2 * error
            wrong += margin >= 2 * error
    return Comparison(sum(map(len, answers)), wrong, near, error)


def number_lines(
    name: str, found: Comparison, num_prompts: int, whose: str = "transformers'", about: str = "",
    accepted: float = LOGITS_ACCEPTED,
) -> list[Line]:  # fmt: skip
    """Question 3 for one policy, against `whose` answers."""
    allowed = -(-found.num_tokens // NEAR_TIES_PER_TOKENS)
    wrong = found.wrong + max(found.near_ties - allowed, 0)
    close = found.logit_error <= accepted
    return [
        Line(
            question="numbers", metric=f"{name}: tokens unlike {whose}",
            simulated="", measured=f"{found.num_tokens:,} tokens",
            error=wrong, accepted=0, verdict=judge_exact(wrong),
            note=f"{num_prompts} prompts; near ties, teacher-forced: {found.near_ties} of "
            f"{allowed} allowed{about}",
        ),
        Line(
            question="numbers", metric=f"{name}: largest logit difference",
            simulated="", measured=f"{found.logit_error:.1e}", error=found.logit_error,
            accepted=accepted, verdict=Verdict.passed if close else Verdict.missed,
        ),
    ]  # fmt: skip
