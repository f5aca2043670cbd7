"""What all unit tests have in common. Property tests are not timed: the machine may be busy."""

import pytest
from hypothesis import settings

from bridge import telemetry

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def stands_nowhere() -> None:
    """Lines of the log are about nothing yet: a test before this one may have run a round in this thread."""
    telemetry.stand(epoch=None, version=None)
    telemetry._of_thread.set(None)
