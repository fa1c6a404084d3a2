"""The type checker of the tests; ``conftest.py`` has every function and dataclass of the packages checked by it."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, as for mypy
