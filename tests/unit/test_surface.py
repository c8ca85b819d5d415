"""What `import crossfade` promises."""

import subprocess
import sys

import pytest

import crossfade


def test_every_public_name_is_there() -> None:
    homes = [name for names in crossfade._HOMES.values() for name in names]
    assert sorted(homes) == sorted(crossfade.__all__)
    for name in crossfade.__all__:
        assert getattr(crossfade, name).__name__ == name


def test_another_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'Crossfaid'"):
        _ = crossfade.Crossfaid


def test_looking_after_servers_loads_no_driver() -> None:
    loaded = "import sys, crossfade.embedded; print(*{'pymongo', 'psycopg', 'sqlalchemy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
