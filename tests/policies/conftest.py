import pytest

settings = pytest.importorskip("hypothesis").settings

# a machine that is busy with something else must not fail a test
settings.register_profile("policies", deadline=None)
settings.load_profile("policies")
