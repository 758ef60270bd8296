"""The questions asked of a replica on several ranks."""

from typing import Any, NamedTuple

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from backends.kv_cache import Corruption
from backends.parallel_serving import ParallelRun, architecture_of, serve_parallel
from backends.ranks import require_ranks
from backends.reference import KeepLogits, OneRank
from backends.serving import RANDOM, require_model
from backends.tokenizer import Tokenizer, prompt_token_ids
from backends.transformer import Transformer
from backends.weights import TINY_CONFIG, Model, load_model, random_model
from scenarios.tables import console
from scenarios.validation import decisions
from scenarios.validation.numbers import all_at_once, judge_answers, number_lines, tight_limits
from scenarios.validation.openings import TEXTS
from scenarios.validation.options import Fault, Options, Question
from scenarios.validation.parallel import parallel_lines
from scenarios.validation.verdict import Line, not_run
from sim.models.split import require_parallel
from sim.policies.batching.base import Batching


class Ranks(NamedTuple):
    """How many, and where."""

    tp_size: int
    pp_size: int
    device: str

    def run(self, **fields: Any) -> ParallelRun:
        """A run on them."""
        return ParallelRun(tp_size=self.tp_size, pp_size=self.pp_size, device=self.device, **fields)


def answer(
    options: Options, policies: dict[str, Batching], tp_size: int, pp_size: int
) -> list[Line]:
    """The lines of the questions that were asked, for every policy.

    Raises:
        ValueError: ranks, model or weights that are not there, before anything is run.
    """
    ranks = Ranks(tp_size, pp_size, options.device.value)
    require_ranks(tp_size * pp_size, ranks.device)
    asked = set(options.only)
    if Question.numbers in asked:
        require_model(options.weights, ranks.device)
    lines: list[Line] = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console(errors=True), transient=True) as progress:
        if asked & {Question.decisions, Question.bytes}:
            task = progress.add_task("decisions and bytes", total=len(policies))
            for name, batching in policies.items():
                found = _exact_lines(name, batching, options, ranks)
                lines += [line for line in found if Question(line.question) in asked]
                progress.advance(task)
        if Question.numbers in asked:
            task = progress.add_task("numbers", total=1 + len(policies))
            asking = _Numbers(options, ranks)
            progress.advance(task)
            for name, batching in policies.items():
                lines += asking.lines(name, batching)
                progress.advance(task)
    if Question.time in asked:
        lines.append(not_run(Question.time, "only one rank's iterations are calibrated"))
    return lines


def small_config(tp_size: int, pp_size: int) -> dict[str, object]:
    """The tiny model where it divides, else one as tiny whose heads and layers do."""
    config = dict(TINY_CONFIG)
    try:
        require_parallel(random_model(config).config, tp_size, pp_size)
    except ValueError:
        config |= {
            "num_attention_heads": 2 * tp_size, "num_key_value_heads": tp_size,
            "hidden_size": 16 * tp_size, "intermediate_size": 32 * tp_size,
            "num_hidden_layers": max(2, pp_size),
        }  # fmt: skip
    return config


def _exact_lines(name: str, batching: Batching, options: Options, ranks: Ranks) -> list[Line]:
    count, fault = options.sizes.decision_requests, options.corrupt
    # In mid-run, so that the fault meets a full pool.
    at = {Fault.skip_free: count // 2, Fault.drop_copy: count * 20}
    run = ranks.run(
        weights=RANDOM, config=small_config(ranks.tp_size, ranks.pp_size),
        workload=decisions.workload(count), batching=batching, limits=decisions.LIMITS,
        seed=options.seed, max_model_tokens=decisions.CONTEXT,
        corruption=None if fault is Fault.none else Corruption(kind=fault.value, index=at[fault]),
    )  # fmt: skip
    return parallel_lines(name, run, architecture_of(run))


class _Numbers:
    """Question 3: the ranks' tokens against those of the same weights on one rank."""

    def __init__(self, options: Options, ranks: Ranks) -> None:
        self._ranks, self._new_tokens = ranks, options.sizes.new_tokens
        self._weights, self._config, self._about = options.weights, None, ""
        model = random_model() if options.weights == RANDOM else load_model(options.weights)
        try:
            require_parallel(model.config, ranks.tp_size, ranks.pp_size)
        except ValueError as error:
            self._weights = RANDOM
            self._about = f"; of random weights, as {error}"
        if self._weights == RANDOM:
            self._config = small_config(ranks.tp_size, ranks.pp_size)
            model = random_model(self._config)
        self._asked = _prompts(model, options.sizes.prompts)
        self._reference = OneRank(Transformer(model.config, model.weights, ranks.device))
        self._generated = self._reference.generate(self._asked, self._new_tokens)

    def lines(self, name: str, batching: Batching) -> list[Line]:
        """Of one policy."""
        run = self._ranks.run(
            weights=self._weights, config=self._config, batching=batching,
            workload=all_at_once(self._asked, self._new_tokens), prompts=self._asked,
            limits=tight_limits(self._asked, self._new_tokens), sampler=KeepLogits(),
        )  # fmt: skip
        found = serve_parallel(run)
        answers = [found.served.answers[index] for index in range(len(self._asked))]
        kept = found.sampler
        assert isinstance(kept, KeepLogits)
        judged = judge_answers(self._asked, answers, self._generated, kept, self._reference)
        return number_lines(name, judged, len(self._asked), "one rank's", self._about)


def _prompts(model: Model, count: int) -> list[list[int]]:
    """Token ids of texts, or random ones of as many tokens where there is no tokenizer."""
    if model.folder is None:
        vocabulary = model.config.vocab_size
        return [
            prompt_token_ids(0, index, len(text.split()), vocabulary)
            for index, text in enumerate(TEXTS[:count])
        ]
    tokenizer = Tokenizer(model.folder)
    return [tokenizer.encode(text) for text in TEXTS[:count]]
