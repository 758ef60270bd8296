"""One child random stream per source of chance, so that changing one leaves the others alone."""

import zlib

import numpy as np


def generator(seed: int, source: str) -> np.random.Generator:
    """A generator for one named source (`arrivals`, `input_lengths`, ...) of the scenario's seed.

    Args:
        seed: the scenario's seed, not negative.
        source: name of what is drawn. Two names never share a stream.

    Raises:
        ValueError: the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative; use 0 or more")
    return np.random.default_rng([seed, zlib.crc32(source.encode())])
