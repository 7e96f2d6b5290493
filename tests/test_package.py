"""What `import twolevel` gives: everything, on first use, and no torch before that."""

import subprocess
import sys

import pytest

ROOMS = ["analysis", "data", "distributed", "models", "nn", "ops", "training"]


def printed(script: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_and_listing_it_loads_no_torch():
    assert printed("import sys, twolevel; dir(twolevel); print('torch' in sys.modules)") == "False"


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_is_loaded_on_first_use_and_listed_before(room):
    script = f"import twolevel; print('{room}' in dir(twolevel), twolevel.{room}.__name__)"
    assert printed(script) == f"True twolevel.{room}"


def test_names_of_rooms_work_after_the_package_alone_is_imported():
    script = (
        "import twolevel; print(type(twolevel.models.create('wrn-10-1', conv='gc2l', groups=4)).__name__)"
    )
    assert printed(script) == "WideResNet"
    assert printed("import twolevel; print(twolevel.convert is twolevel.nn.convert)") == "True"


def test_an_unknown_name_is_an_attribute_error():
    script = "import twolevel; print(hasattr(twolevel, 'modells'), getattr(twolevel, 'cli2', None))"
    assert printed(script) == "False None"
