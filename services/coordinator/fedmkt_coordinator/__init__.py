"""The coordinator: schedules rounds, keeps the truth in a database, serves sites, the LLM server and dashboards.

Runs without torch. `app.create_app` builds it; `command.app` is its command line.
"""
