"""Alembic's scripts, run by `fedmkt_coordinator.store.migrate` at every start."""
