"""The database, which is the truth. SQL lives in this package alone."""

from fedmkt_coordinator.store.database import Clock, Store, Transaction, open_engine
from fedmkt_coordinator.store.statements import Outbox, StateChanged

__all__ = ["Clock", "Outbox", "StateChanged", "Store", "Transaction", "open_engine"]
