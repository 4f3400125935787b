"""`python -m fedmkt_coordinator` is `fedmkt coordinator`."""

from fedmkt_coordinator.command import app

app(prog_name="fedmkt coordinator")
