"""`python -m fedmkt_client_agent` is `fedmkt agent`."""

from fedmkt_client_agent.command import app

app(prog_name="fedmkt agent")
