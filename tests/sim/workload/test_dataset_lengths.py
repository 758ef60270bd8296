"""Lengths of LoongServe's datasets: published ranges, derived means, the analytic Zipf table."""

import numpy as np
import pytest

from sim.workload.base import RequestColumns, Workload
from sim.workload.dataset_lengths import L_EVAL, LV_EVAL, PROMPTS, DatasetLoad, LogNormal
from sim.workload.long_context import Dataset, LongContext
from sim.workload.zipf_lengths import ZipfLengths, chance_up_to

COUNT = 20_000


def columns_of(workload: Workload, seed: int = 1, chunk_rows: int = COUNT) -> RequestColumns:
    chunks = list(workload.columns(seed, chunk_rows))
    return RequestColumns(
        *(
            np.concatenate([getattr(chunk, name) for chunk in chunks])
            for name in ("arrival_s", "prompt_tokens", "output_tokens")
        )
    )


def load(dataset: Dataset, **changed: float) -> LongContext:
    return LongContext(**{"dataset": dataset, "rate_per_s": 2.0, "num_requests": COUNT} | changed)


@pytest.mark.parametrize(
    ("alpha", "mean", "median", "p90", "p99"),
    [
        (1.0, 20_091, 1_379, 73_913, 181_050),
        (1.2, 7_906, 160, 17_266, 147_204),
        (1.4, 2_528, 51, 2_039, 69_519),
    ],
)
def test_zipf_lengths_have_the_analytic_statistics(
    alpha: float, mean: int, median: int, p90: int, p99: int
) -> None:
    summed = chance_up_to(alpha, 10, 199_999)
    lengths = np.arange(10, 200_000)
    assert np.diff(summed, prepend=0.0) @ lengths == pytest.approx(mean, rel=1e-3)
    found = lengths[np.searchsorted(summed, [0.5, 0.9, 0.99])]
    assert found == pytest.approx([median, p90, p99], rel=1e-3, abs=1)
    drawn = columns_of(ZipfLengths(alpha=alpha, rate_per_s=1.0, num_requests=COUNT)).prompt_tokens
    assert drawn.min() >= 10
    assert drawn.max() < 200_000
    below = np.searchsorted(np.sort(drawn), [median, p90, p99], side="right") / COUNT
    assert below == pytest.approx([0.5, 0.9, 0.99], abs=4 * 0.5 / COUNT**0.5)


@pytest.mark.parametrize(
    ("dataset", "shortest", "longest", "answer"),
    [
        ("sharegpt", 4, 2_300, 231),
        ("l_eval", 2_700, 210_500, 126),
        ("lv_eval", 15_100, 497_300, 30),
    ],
)
def test_prompts_keep_the_published_range_and_answers_their_mean(
    dataset: str, shortest: int, longest: int, answer: int
) -> None:
    found = columns_of(load(Dataset[dataset]))
    assert shortest <= found.prompt_tokens.min() < 1.1 * shortest + 2
    assert 0.9 * longest < found.prompt_tokens.max() <= longest
    assert found.output_tokens.mean() == pytest.approx(answer, abs=4 * answer / COUNT**0.5)
    assert found.output_tokens.min() == 4
    assert found.output_tokens.max() <= 999


@pytest.mark.parametrize("place", [L_EVAL, LV_EVAL])
def test_log_normal_prompts_have_the_geometric_mean_of_their_range_as_median(place: int) -> None:
    lengths = PROMPTS[place]
    assert isinstance(lengths, LogNormal)
    ends = lengths.quantiles(np.array([0.0, 0.5, 1.0]))
    middle = (lengths.shortest * lengths.longest) ** 0.5
    assert ends == pytest.approx([lengths.shortest, middle, lengths.longest], rel=1e-9)
    # Its density is the slope of its inverse CDF, up to a factor.
    at = np.linspace(0.05, 0.95, 19)
    slope = 2e-6 / (lengths.quantiles(at + 1e-6) - lengths.quantiles(at - 1e-6))
    density = lengths.density(lengths.quantiles(at))
    np.testing.assert_allclose(slope / slope[9], density / density[9], rtol=1e-6)
    assert lengths.density(np.array([lengths.shortest - 1.0, lengths.longest + 1.0])).tolist() == [
        0, 0,
    ]  # fmt: skip


def test_sharegpt_gives_the_latencies_of_the_published_run() -> None:
    """vLLM at 1 request/s: 73.0 ms to the first token, 21.32 ms a token, 4,998 ms in all."""
    found = columns_of(load(Dataset.sharegpt))
    prompts, answers = found.prompt_tokens, found.output_tokens
    # TP8's prefill takes 0.01511 ms per token; all that is left is the same for every request.
    ttft_ms = 73.0 + 0.01511 * (prompts - prompts.mean())
    e2e_ms = ttft_ms + 21.32 * (answers - 1)
    assert e2e_ms.mean() == pytest.approx(4998, rel=0.02)
    assert (e2e_ms / (prompts + answers)).mean() == pytest.approx(5.206, rel=0.06)
    assert (ttft_ms / prompts).mean() == pytest.approx(0.3745, rel=0.2)


def test_mixed_takes_each_dataset_as_often() -> None:
    prompts = columns_of(load(Dataset.mixed)).prompt_tokens
    error = 4 * 0.5 / COUNT**0.5
    assert np.mean(prompts <= 2_300) == pytest.approx(1 / 3, abs=error)
    alone = [columns_of(load(Dataset[name])).prompt_tokens for name in ("l_eval", "lv_eval")]
    expected = sum(np.mean(one > 60_000) for one in alone) / 3
    assert np.mean(prompts > 60_000) == pytest.approx(expected, abs=error)


def test_answers_of_zipf_prompts_are_of_the_dataset_that_has_prompts_as_long() -> None:
    workload = ZipfLengths(rate_per_s=1.0, num_requests=COUNT, sharegpt_output_tokens=400)
    found = columns_of(workload)
    prompts, answers = found.prompt_tokens, found.output_tokens
    means = [answers[prompts <= 2_500], answers[(prompts > 2_500) & (prompts < 15_100)]]
    assert [part.mean() for part in means] == pytest.approx([400, 126], rel=0.05)
    # Both of the others have prompts as long, and there are fewer of L-Eval's the longer they are.
    both = [answers[(prompts >= low) & (prompts < 2 * low)].mean() for low in (15_100, 100_000)]
    assert 126 > both[0] > both[1] > 30


@pytest.mark.parametrize("kind", [LongContext, ZipfLengths])
def test_neither_chunks_nor_the_rate_change_a_length(kind: type[DatasetLoad]) -> None:
    whole, parts = (
        columns_of(kind(rate_per_s=3.0, num_requests=500), chunk_rows=rows) for rows in (500, 7)
    )
    faster = columns_of(kind(rate_per_s=6.0, num_requests=500))
    for other in (parts, faster):
        np.testing.assert_array_equal(whole.prompt_tokens, other.prompt_tokens)
        np.testing.assert_array_equal(whole.output_tokens, other.output_tokens)
    np.testing.assert_array_equal(whole.arrival_s, parts.arrival_s)
    np.testing.assert_allclose(whole.arrival_s, 2 * faster.arrival_s, rtol=1e-12)
    other = columns_of(kind(rate_per_s=3.0, num_requests=500), seed=2)
    assert not np.array_equal(other.prompt_tokens, whole.prompt_tokens)


def test_the_last_request_comes_when_the_rate_says_unless_gaps_are_left_alone() -> None:
    exact = columns_of(load(Dataset.sharegpt, num_requests=30)).arrival_s
    free = columns_of(load(Dataset.sharegpt, num_requests=30, exact_rate=False)).arrival_s
    assert exact[-1] == pytest.approx(15.0, rel=1e-12)
    assert abs(free[-1] - 15.0) > 0.01
    np.testing.assert_allclose(exact / exact[-1], free / free[-1], rtol=1e-12)
    lasting = load(Dataset.sharegpt, num_requests=None, duration_s=15.0)
    early = columns_of(lasting).arrival_s
    np.testing.assert_array_equal(early[:20], free[:20])


def test_a_stated_limit_ends_answers() -> None:
    assert columns_of(load(Dataset.sharegpt, max_output_tokens=9)).output_tokens.max() == 9


@pytest.mark.parametrize(
    ("kind", "changed", "message"),
    [
        (LongContext, {"rate_per_s": -1.0}, r"rate_per_s=-1.0 must be positive"),
        (LongContext, {"num_requests": None}, r"exactly one must be given"),
        (LongContext, {"l_eval_output_tokens": 4}, r"l_eval_output_tokens=4 .*5 to 500; try .*126"),
        (LongContext, {"sharegpt_output_tokens": 501}, r"answers of 4 to 999 tokens"),
        (ZipfLengths, {"alpha": -0.1}, r"alpha=-0.1 must be finite and not negative"),
        (ZipfLengths, {"min_tokens": 0}, r"min_tokens=0 must be at least 1; try min_tokens=10"),
        (ZipfLengths, {"max_tokens": 9}, r"max_tokens=9 must be at least min_tokens=10 and below"),
        (ZipfLengths, {"max_tokens": 10**8}, r"below 10000010; try max_tokens=199999"),
    ],
)
def test_parameters_out_of_range_are_refused(
    kind: type[DatasetLoad], changed: dict[str, float | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**{"rate_per_s": 1.0, "num_requests": 10} | changed)
