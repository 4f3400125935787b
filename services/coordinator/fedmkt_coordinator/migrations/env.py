"""Run by Alembic: the connection comes from `store.migrate`, already inside a transaction that holds the lock."""

from alembic import context

from fedmkt_coordinator.store.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
