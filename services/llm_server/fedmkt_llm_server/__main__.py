"""`python -m fedmkt_llm_server` is `fedmkt llm-server`."""

from fedmkt_llm_server.command import app

app(prog_name="fedmkt llm-server")
