"""What holds for every test."""

from hypothesis import settings

# No time limit an example, since tests share their cores; the same examples in every run, so that green stays green.
settings.register_profile("book", deadline=None, derandomize=True)
settings.load_profile("book")
