"""What an installation has: commands name the extra that brings what they lack."""

from importlib.util import find_spec

from fedmkt.errors import Refusal


class ExtraMissing(Refusal):
    code = "cli.extra_missing"
    title = "A part of FedMKT is not installed"
    remedy = "Install the extra that the message names."


def require(command: str, *modules: str, extra: str) -> None:
    """Raises ExtraMissing unless all top-level `modules` can be imported; imports none of them."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ExtraMissing(f"`fedmkt {command}` needs {', '.join(missing)}: pip install 'fedmkt[{extra}]'")
