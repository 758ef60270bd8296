"""The texts whose continuations question 3 compares."""

from itertools import product

OPENINGS = (
    "Question: what is {}? Answer:",
    "Once upon a time there was {}, and one day",
    "Here is a short and simple explanation of {} for a child of ten years:",
    "A list of three facts about {}. 1.",
)
TOPICS = (
    "the moon", "a steam engine", "photosynthesis", "an honest merchant in a small town", "gravity",
    "a library", "the Roman Empire", "a compiler", "rain", "a violin", "the number zero",
    "a glacier", "inflation", "a lighthouse on a lonely island", "bread", "the printing press",
)  # fmt: skip
TEXTS = [opening.format(topic) for topic, opening in product(TOPICS, OPENINGS)]
SYSTEM = (
    "You are a patient assistant who answers in plain words, keeps to what is known, says so where "
    "something is not, and gives one example for everything that is not obvious. "
)
"""What they all begin with where prefixes are cached: a few whole blocks."""
