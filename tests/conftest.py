"""Hypothesis draws the same examples on every run, and takes the time that it takes."""

from hypothesis import settings

settings.register_profile("diptych", deadline=None, derandomize=True)
settings.load_profile("diptych")
