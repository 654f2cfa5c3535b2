"""What holds for all tests."""

from hypothesis import settings

# How long an example takes is the machine's matter. In CI this comes on top of Hypothesis' own profile for it.
settings.register_profile("slmops", deadline=None)
settings.load_profile("slmops")
